"""Volatility's plugins on a QCOW2 snapshot, against a raw dump of the same memory and its own QEMU layer.

The guests are the real Linux guest of the evidence case (``QCOW2_EVIDENCE`` names its folder), grown
to 2 GiB that are all data and to 5 GiB that are mostly zero. Volatility's own layer gets the stream
already extracted, and a symbol file whose banner lies inside one page, for it finds no other.

The kernel and all that it maps lie in the first 128 MiB of each: ``linux.pslist`` reads no further, and
``yarascan`` covers no more. With KASLR a real 5 GiB guest has its kernel anywhere, see docs/volatility.md.

Every run is a process of its own, started as a user starts it; ``--json`` of ``run.py`` keeps the
times, and the last lines give the most memory that a process of each reader held.
"""

from __future__ import annotations

import base64
import json
import lzma
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import Case, tool

import qcow2_forensics as q
from qcow2_forensics.limits import GiB, MiB

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ROOT / "plugins" / "volatility"
PAGE = 4096
RAW, OURS, STOCK = "raw dump", "qcow2-forensics", "volatility3 QemuSuspendLayer, stream extracted"
BANNER = b"Linux version 6.1.0-56-cloud-amd64 (debian-kernel@lists.debian.org) (gcc-12"
SPLIT = 3 * GiB  # where a pc machine's RAM stops below 4 GiB once it has more than this


def cases(folder: Path, *, smoke: bool = False) -> Iterator[Case]:
    evidence = os.environ.get("QCOW2_EVIDENCE")
    if not evidence:
        raise ImportError("set QCOW2_EVIDENCE to the folder of the evidence case")
    real = guest(Path(evidence), folder)
    symbols(Path(evidence), folder)
    grown = (
        {"128 MiB": (len(real), False)}
        if smoke
        else {"dense 2 GiB": (2 * GiB, True), "5 GiB, mostly zero": (5 * GiB, False)}
    )
    yield Case(
        "vol -h",
        {"without the plugins": lambda: vol(folder, "-h", plugins=False), OURS: lambda: vol(folder, "-h")},
    )
    plugins = {
        "banners": ("banners.Banners",),
        "pslist": ("linux.pslist.PsList",),
        "yarascan": ("yarascan.YaraScan", "--yara-string", "C2-CALLBACK"),
    }
    for words, (size, dense) in grown.items():
        name = words.split()[0].lower() + ("-dense" if dense else "")
        made = machine(folder / name, real, size, dense=dense)
        for plugin, arguments in plugins.items():
            readers: dict[str, Callable[[], Any]] = {
                RAW: lambda made=made, arguments=arguments: vol(folder, "-f", made["raw"], *arguments, plugins=False),
                OURS: lambda made=made, arguments=arguments: vol(folder, "-f", made["qcow2"], *arguments),
            }
            if smoke or "BENCH_STOCK" in os.environ:  # it takes minutes
                readers[STOCK] = lambda made=made, arguments=arguments: vol(
                    folder, "-f", made["qevm"], *arguments, plugins=False
                )
            yield Case(f"{plugin}, {words}", readers, count=size)


def vol(folder: Path, *arguments: str | Path, plugins: bool = True) -> str:
    """Run ``vol`` with the friendly symbols and return what it printed."""
    command = [
        sys.executable,
        "-c",
        "import sys; from volatility3.cli import main; sys.argv[0] = 'vol'; main()",
        "-q",
        "-s",
        folder / "symbols",
        "--cache-path",
        folder / "cache",
    ]
    (folder / "cache").mkdir(exist_ok=True)
    if plugins:
        command += ["-p", PLUGINS]
    variables = {**os.environ, "QCOW2_FORENSICS_AUTOLOAD": "0", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [*map(str, command), *map(str, arguments)],
        env=variables,
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    return done.stdout


def guest(evidence: Path, folder: Path) -> bytes:
    """Return the memory of the evidence case's latest snapshot."""
    image = folder / "case.qcow2"
    if not image.exists():
        with lzma.open(evidence / "case.qcow2.xz") as packed, image.open("wb") as out:
            shutil.copyfileobj(packed, out, MiB)
    with q.open_guest_memory(image) as memory:
        return memory.read(0, memory.size)


def symbols(evidence: Path, folder: Path) -> None:
    """Write the case's symbols with a banner that the guest also holds inside a single page."""
    target = folder / "symbols" / "linux" / "friendly.json"
    if not target.exists():
        found = json.loads(lzma.decompress(next(evidence.glob("*.json.xz")).read_bytes()))
        found["symbols"]["linux_banner"]["constant_data"] = base64.b64encode(BANNER).decode()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found))


def machine(path: Path, real: bytes, size: int, *, dense: bool) -> dict[str, Path]:
    """Write a guest of ``size`` bytes that starts with the real one: as a raw dump, a stream, and in a qcow2."""
    paths = {kind: path.with_suffix(f".{kind}") for kind in ("raw", "qevm", "qcow2")}
    if not paths["qcow2"].exists():
        write_guest(paths["raw"], paths["qevm"], real, size, dense=dense)
        write_qcow2(paths["qevm"], paths["qcow2"])
    return paths


def write_guest(raw: Path, qevm: Path, real: bytes, size: int, *, dense: bool) -> None:
    """Grow the guest: with the real memory's bytes changed, or with zeros and some data here and there."""
    real_pages = np.frombuffer(real, np.uint8).reshape(-1, PAGE)
    below = min(size, SPLIT) if size > 3584 * MiB else size
    with raw.open("wb") as dump, qevm.open("wb") as stream:
        stream.write(b"QEVM" + struct.pack(">IBI", 3, 7, 13) + b"pc-i440fx-7.2")
        stream.write(struct.pack(">BIB", 1, 2, 3) + b"ram" + struct.pack(">II", 0, 4))
        stream.write(struct.pack(">QB", size | 4, 6) + b"pc.ram" + struct.pack(">QQ", size, 16))
        dump.truncate(size if below == size else 4 * GiB + size - below)
        for number in range(0, size // PAGE, len(real_pages)):
            if number == 0:
                pages = real_pages
            elif dense:
                pages = real_pages ^ np.uint8(0x5A + number // len(real_pages))
            else:
                pages = np.zeros_like(real_pages)
                pages[4096:4608] = real_pages[4096:4608] ^ np.uint8(0x5A)
            pages = pages[: size // PAGE - number]
            address = number * PAGE if number * PAGE < below else number * PAGE - below + 4 * GiB
            stream.write(
                struct.pack(">BI", 2 if number + len(pages) < size // PAGE else 3, 2)
                + records(pages, number)
                + struct.pack(">Q", 16)
                + b"\x7e\0\0\0\2"
            )
            if pages.any():
                dump.seek(address)
                dump.write(pages.tobytes())
        stream.write(ending(below, size - below))


def records(pages: np.ndarray[Any, Any], first: int) -> bytes:
    """Return the page records of the stream; the first one names the block."""
    zero = ~pages.any(axis=1)
    out = bytearray()
    for index in range(len(pages)):
        named = 0 if index == 0 else 0x20
        word = (first + index) * PAGE | named | (2 if zero[index] else 8)
        out += struct.pack(">Q", word) + (b"" if named else b"\6pc.ram")
        out += b"\0" if zero[index] else pages[index].tobytes()
    return bytes(out)


def ending(below: int, above: int) -> bytes:
    """Return the clock's section, which gives the amount of RAM, and the end of the stream."""
    cmos = bytearray(128)
    cmos[0x34:0x36] = min((below - 16 * MiB) >> 16, 0xFFFF).to_bytes(2, "little")
    cmos[0x5B:0x5E] = (above >> 16).to_bytes(3, "little")
    section = struct.pack(">BIB", 4, 9, 11) + b"mc146818rtc" + struct.pack(">II", 0, 3) + cmos + b"\x7e\0\0\0\x09"
    fields = [{"name": "cmos_data", "size": 128}]
    device = {"name": "mc146818rtc", "instance_id": 0, "version": 3, "fields": fields}
    text = json.dumps({"page_size": PAGE, "devices": [device]}).encode()
    return section + b"\0\x06" + struct.pack(">I", len(text)) + text


def write_qcow2(qevm: Path, image: Path) -> None:
    """Have qemu-io write the stream where VM state lies, take a snapshot of that, and record its size there."""
    tool("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    length = qevm.stat().st_size
    piece = image.with_suffix(".piece")
    with qevm.open("rb") as stream:
        for offset in range(0, length, 512 * MiB):
            data = stream.read(512 * MiB)
            piece.write_bytes(data.ljust(-(-len(data) // 512) * 512, b"\0"))
            tool("qemu-io", "-f", "qcow2", "-c", f"write -q -b -s {piece} {offset} {piece.stat().st_size}", image)
    piece.unlink()
    tool("qemu-img", "snapshot", "-c", "memory", image)
    with q.open_image(image) as opened:
        entry = opened.snapshots[0]
    with image.open("r+b") as file:
        file.seek(entry.offset + 32)
        file.write(struct.pack(">I", length if length < 1 << 32 else 0))
        file.seek(entry.offset + 40)
        file.write(struct.pack(">Q", length))
