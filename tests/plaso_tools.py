"""Runs plaso's real tools on one small disk in every dress a QCOW image can wear.

The disk is an ext4 file system made by mke2fs, with logs that plaso parses; its images are made by
qemu-img. What is compared are the lines psort prints, sorted. Used by the tests, and by the script
in ``benchmarks`` that runs all variants and both back-ends.
"""

from __future__ import annotations

import gzip
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests import qemu

REPOSITORY = Path(__file__).resolve().parent.parent
PYTHON_PATH = os.pathsep.join(str(REPOSITORY / part) for part in ("src", "plugins/dfvfs"))
PASSPHRASE = "correct horse"
INNER_IMAGE = "QCOW2-IMAGE[/disk.qcow2]:"  # what events of an image in a file system are labelled with
DRIVER = Path(__file__).with_name("plaso_driver.py")
SIZE = 32 << 20  # bytes of the disk
TIMEOUT = 300.0


class Variant(NamedTuple):
    """An image of the disk: ``arguments`` are for log2timeline, ``nested`` is a location inside."""

    path: Path
    arguments: tuple[str, ...] = ()
    nested: str = ""


class Run(NamedTuple):
    """What one run of log2timeline and psort gave; ``cpu`` is of log2timeline and its workers."""

    rc: int
    output: str
    seconds: float
    cpu: float
    storage: Path
    lines: list[str]


# --- the disk ------------------------------------------------------------------------------------


def make_disk(folder: Path, files: int = 300, size: int = SIZE) -> Path:
    """Write the raw disk: logs, a database, archives, and files of every small size."""
    tree = folder / "tree"
    chance = random.Random(2026)
    (tree / "var/log").mkdir(parents=True)
    (tree / "home/alice").mkdir(parents=True)
    syslog = "".join(
        f"2026-05-{1 + i // 400:02d}T{i // 60 % 24:02d}:{i % 60:02d}:00.000000+00:00 host program[{i}]: message {i}\n"
        for i in range(2000)
    )
    (tree / "var/log/syslog").write_text(syslog)
    (tree / "var/log/dpkg.log").write_text(
        "".join(
            f"2026-04-{1 + i // 60:02d} 10:{i % 60:02d}:00 status installed lib{i}:amd64 1.{i}\n" for i in range(900)
        )
    )
    with gzip.GzipFile(tree / "var/log/syslog.1.gz", "wb", mtime=0) as packed:
        packed.write(syslog[:60000].replace("2026", "2025").encode())
    (tree / "home/alice/.bash_history").write_text("".join(f"#{1770000000 + i}\nls {i}\n" for i in range(200)))
    database = sqlite3.connect(tree / "home/alice/notes.sqlite")
    with database:
        database.execute("CREATE TABLE notes (id INTEGER, text TEXT)")
        database.executemany("INSERT INTO notes VALUES (?, ?)", [(i, f"note {i}" * 9) for i in range(4000)])
    database.close()
    with zipfile.ZipFile(tree / "home/alice/papers.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(20):
            archive.writestr(zipfile.ZipInfo(f"paper{i}.txt", (2026, 1, 1, 0, 0, 0)), f"paper {i}\n" * 500)
    for i in range(files):
        place = tree / "srv" / f"folder{i % 12}"
        place.mkdir(parents=True, exist_ok=True)
        length = chance.choice((100, 900, 5000, 40000))
        text = chance.randbytes(length) if i % 5 == 0 else (f"line {i} of a report\n" * (length // 15)).encode()
        (place / f"file{i}.dat").write_bytes(text)
    for path in [*tree.rglob("*"), tree]:
        os.utime(path, (1760000000, 1760000000))
    raw = folder / "disk.raw"
    raw.write_bytes(b"")
    os.truncate(raw, size)
    qemu.need("mke2fs")
    # Blocks of 4 KiB: one block group, so no backup superblock that libfsext insists on reading.
    qemu.run("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-L", "SAMPLE", "-d", str(tree), str(raw))
    shutil.rmtree(tree)
    return raw


# --- its dresses ---------------------------------------------------------------------------------


def raw(folder: Path, disk: Path) -> Variant:
    return Variant(disk)


def _converted(name: str, compressed: bool = False, **options: object) -> Callable[[Path, Path], Variant]:
    def make(folder: Path, disk: Path) -> Variant:
        path = folder / f"{name}.qcow2"
        qemu.convert(disk, path, fmt="raw", target_format="qcow2", compressed=compressed, target_options=options)
        return Variant(path)

    return make


def external_data_file(folder: Path, disk: Path) -> Variant:
    place = folder / "external"
    place.mkdir()
    # Made with a relative name, as it must be when the pair is copied elsewhere.
    qemu.create(place / "ext.qcow2", disk.stat().st_size, data_file="ext.data", cwd=place)
    qemu.img("convert", "-n", "-f", "raw", "-O", "qcow2", disk, place / "ext.qcow2", cwd=place)
    return Variant(place / "ext.qcow2")


def raw_backed_overlay(folder: Path, disk: Path) -> Variant:
    """The lower half of the disk is in a raw backing file; the overlay zeroes rubbish and adds the rest."""
    place = folder / "overlay"
    place.mkdir()
    base = place / "base.raw"
    shutil.copyfile(disk, base)
    return Variant(_overlay(place / "overlay.qcow2", disk, base, "raw"))


def three_deep_chain(folder: Path, disk: Path) -> Variant:
    place = folder / "chain"
    place.mkdir()
    base = place / "base.qcow2"
    qemu.convert(disk, base, fmt="raw", target_format="qcow2", target_options={"cluster_size": 4096})
    middle = _overlay(place / "middle.qcow2", disk, base, "qcow2")
    return Variant(_overlay(place / "top.qcow2", disk, middle, "qcow2"))


def _overlay(path: Path, disk: Path, base: Path, base_format: str) -> Path:
    """An overlay whose base was changed after it was made: it holds what differs from ``disk``."""
    # Rubbish in free space and in the last files; the overlay has what was there before.
    qemu.io(base, "write -P 0x5a 24M 1M", "write -P 0xa5 8M 64k", fmt=base_format)
    qemu.create(path, disk.stat().st_size, backing=base.name, backing_format=base_format, cwd=path.parent)
    with disk.open("rb") as file:
        for offset, length in ((24 << 20, 1 << 20), (8 << 20, 64 << 10)):
            file.seek(offset)
            piece = path.with_suffix(f".{offset}.piece")
            piece.write_bytes(file.read(length))
            command = (
                f"write -z {offset} {length}" if not any(piece.read_bytes()) else f"write -s {piece} {offset} {length}"
            )
            qemu.io(path, command)
            piece.unlink()
    return path


def encrypted(name: str, **method: object) -> Callable[[Path, Path], Variant]:
    def make(folder: Path, disk: Path) -> Variant:
        path = qemu.create(folder / f"{name}.qcow2", disk.stat().st_size, secret=PASSPHRASE, encrypt=method)
        secret = f"secret,id=key0,data={PASSPHRASE}"
        target = f"driver=qcow2,file.filename={path},encrypt.key-secret=key0"
        args = ("--object", secret, "-n", "-f", "raw", disk, "--target-image-opts", target)
        qemu.img("convert", *args)
        return Variant(path, ("--credential", f"password:{PASSPHRASE}"))

    return make


def inside_ext4(folder: Path, disk: Path) -> Variant:
    """A chain of two images in the ext4 file system of another raw disk."""
    tree = folder / "inside"
    tree.mkdir()
    base = tree / "base.qcow2"
    qemu.convert(disk, base, fmt="raw", target_format="qcow2", compressed=True)
    qemu.create(tree / "disk.qcow2", disk.stat().st_size, backing="base.qcow2", backing_format="qcow2", cwd=tree)
    outer = folder / "outer.raw"
    outer.write_bytes(b"")
    os.truncate(outer, disk.stat().st_size)
    qemu.run("mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(outer))
    return Variant(outer, nested="/disk.qcow2")


VARIANTS: dict[str, Callable[[Path, Path], Variant]] = {
    "raw": raw,
    "plain qcow2": _converted("plain"),
    "zlib, version 2": _converted("zlib2", compressed=True, compat="0.10"),
    "zlib, version 3": _converted("zlib3", compressed=True, compat="1.1"),
    "zstd": _converted("zstd", compressed=True, compression_type="zstd"),
    "extended L2": _converted("extended", extended_l2="on", cluster_size="128k"),
    "external data file": external_data_file,
    "raw-backed overlay": raw_backed_overlay,
    "three-deep chain": three_deep_chain,
    "LUKS": encrypted("luks", format="luks"),
    "legacy AES": encrypted("aes", format="aes"),
    "qcow2 inside ext4": inside_ext4,
}


# --- the tools -----------------------------------------------------------------------------------


def environment(active: bool = True) -> dict[str, str]:
    """Return the environment of a tool: with our packages, or with the stock back-end only."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("QCOW2_", "DFVFS_"))}
    variables.pop("PYTHONPATH", None)
    if active:
        variables["PYTHONPATH"] = PYTHON_PATH
    else:
        variables["QCOW2_FORENSICS_AUTOLOAD"] = "0"
    return variables | {"LC_ALL": "C.UTF-8", "TZ": "UTC"}


def run_tool(
    name: str, *arguments: object, cwd: Path, active: bool = True, start_method: str = "fork", nested: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run one of plaso's tools to its end."""
    command = [sys.executable, "-P", str(DRIVER), "1" if active else "0", start_method, nested, name]
    command += map(str, arguments)
    return subprocess.run(
        command,
        check=False,
        cwd=cwd,
        env=environment(active),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        timeout=TIMEOUT,
    )


def log2timeline(
    variant: Variant, folder: Path, *arguments: str, active: bool = True, start_method: str = "fork", workers: int = 2
) -> Run:
    """Extract the events of an image, and print them with the stock psort."""
    folder.mkdir(parents=True, exist_ok=True)
    storage = folder / "timeline.plaso"
    common = ("-u", "--status_view", "none", "--no_dependencies_check", "--partitions", "all", "--vss_stores", "none")
    used = _children_cpu()
    start = time.perf_counter()
    done = run_tool(
        "log2timeline",
        *(*common, "--workers", workers, *variant.arguments, *arguments, "--storage_file", storage, variant.path),
        cwd=folder,
        active=active,
        start_method=start_method,
        nested=variant.nested,
    )
    seconds = time.perf_counter() - start
    cpu = _children_cpu() - used
    lines = psort(storage, folder / "timeline.csv") if storage.exists() and done.returncode == 0 else []
    return Run(done.returncode, done.stdout, seconds, cpu, storage, lines)


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def psort(storage: Path, target: Path, active: bool = False) -> list[str]:
    """Return psort's lines, sorted, without the header."""
    run_tool(
        "psort",
        "-q",
        "-u",
        "--status_view",
        "none",
        "-o",
        "dynamic",
        "-w",
        target,
        storage,
        cwd=target.parent,
        active=active,
    )
    return sorted(target.read_text(errors="replace").splitlines()[1:]) if target.exists() else []


def warnings(storage: Path) -> str:
    """Return what the stock pinfo says about warnings."""
    return run_tool("pinfo", "--sections", "warnings", storage, cwd=storage.parent, active=False).stdout


def evidence_lines(lines: list[str]) -> list[str]:
    """Return the lines about files: without the events about the image's own snapshots, and which inner image they are in."""
    kept = (line for line in lines if ",Snapshot Creation Time," not in line)
    return sorted(line.replace(INNER_IMAGE, "") for line in kept)
