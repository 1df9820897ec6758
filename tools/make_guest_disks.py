#!/usr/bin/env python3
"""Make disks of every common kind with the real tools, in four known states, and compare what is listed with the kernel.

    tools/make_guest_disks.py FOLDER                    # all kinds that this machine can make
    tools/make_guest_disks.py FOLDER xfs lvm --check    # two of them, and what diff and timeline say of them
    tools/make_guest_disks.py FOLDER lvm --bitmaps      # what diff says of the bitmap that QEMU keeps between two states
    tools/make_guest_disks.py FOLDER ntfs --plaso       # rows of log2timeline: raw disk, all, changed

Needs root and loop devices. Of each kind FOLDER then has KIND.qcow2 with the snapshots ``one``, ``two`` and
``three``, a raw disk of each state, and KIND.json with what the mounted file systems show of each. A kind that cannot
be made here is skipped with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))

import _pytest.outcomes  # noqa: E402 - after the path
from tests import guest_bitmaps, guest_disks, guest_kernel, qemu  # noqa: E402
from tests.filesystems import MIB, need_tools  # noqa: E402
from tests.guest_disks import Seen  # noqa: E402

if TYPE_CHECKING:
    from tests import plaso_tools

UNREAD = frozenset(["btrfs"])  # what no library we use reads: it must be named
NAMES = ("one", "two", "three", None)
PASSPHRASE = "sesame"  # noqa: S105 - of a volume made here


# --- what is done between the states -----------------------------------------------------------


def populate(folder: Path) -> None:
    """Files of many sizes, in folders, with holes and, where there are links, links."""
    for number in range(150):
        place = folder / f"folder{number % 5}"
        place.mkdir(exist_ok=True)
        (place / f"file {number}.dat").write_bytes(os.urandom(number * 97))
    (folder / "large.bin").write_bytes(os.urandom(3 * MIB))
    (folder / "edited.txt").write_text("before\n" * 3000)
    (folder / "in place.txt").write_bytes(b"A" * 50_000)
    (folder / "removed.txt").write_text("removed\n" * 2000)
    (folder / "moved.txt").write_text("moved\n")
    with contextlib.suppress(OSError):
        os.symlink("edited.txt", folder / "link")
    _stream(folder / "edited.txt", b"stream one\n" * 500)


def edit(folder: Path) -> None:
    """Grow a file, overwrite one in place, remove, rename, add."""
    (folder / "edited.txt").write_text("after\n" * 9000)
    with (folder / "in place.txt").open("r+b") as stream:
        stream.seek(20_000)
        stream.write(b"B" * 100)
    (folder / "removed.txt").unlink()
    (folder / "moved.txt").rename(folder / "folder1/renamed.txt")
    (folder / "implant.exe").write_bytes(os.urandom(90_000))
    _stream(folder / "edited.txt", b"stream two\n" * 700)


def cover(folder: Path) -> None:
    """Remove what was added, a whole folder, and set a time back."""
    (folder / "implant.exe").unlink()
    for path in sorted((folder / "folder2").iterdir()):
        path.unlink()
    (folder / "folder2").rmdir()
    os.utime(folder / "in place.txt", (1_600_000_000, 1_600_000_000))


def reuse(folder: Path) -> None:
    """Write over what was freed."""
    (folder / "later.bin").write_bytes(os.urandom(MIB))
    (folder / "new folder").mkdir()
    (folder / "new folder/readme.txt").write_text("later\n")


WORK = (populate, edit, cover, reuse)


def _stream(path: Path, content: bytes) -> None:
    """Write an alternate data stream, where the file system is mounted with names for them."""
    if (path.parent / ".streams").exists():
        path.with_name(f"{path.name}:hidden").write_bytes(content)


# --- the kinds -----------------------------------------------------------------------------------


@dataclass
class State:
    """One state of a disk: the raw disk, and what the kernel shows of the file system below each path."""

    raw: Path
    trees: dict[str, dict[str, Seen]] = field(default_factory=dict)


def simple(kind: str, size: int) -> Callable[[Path], Iterator[State]]:
    """Make a disk with one partition and one file system in it."""

    def make(folder: Path) -> Iterator[State]:
        disk = guest_disks.make(folder, kind, size * MIB, f"{kind}-volume.raw")
        for number, work in enumerate(WORK):
            disk.change(_with_streams(work) if kind == "ntfs" else work)
            yield State(_disk(folder, f"{kind}.{number}.raw", [disk.path]), {"/p1": disk.tree()})

    return make


def _with_streams(work: Callable[[Path], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        (folder / ".streams").touch()
        work(folder)

    return changed


def _disk(folder: Path, name: str, parts: list[Path]) -> Path:
    path = folder / name
    guest_disks.partitioned(path, parts)
    return path


def lvm(folder: Path, *, extended: bool = True) -> Iterator[State]:
    """XFS and ext4 in logical volumes, one of them ``extended`` behind the other; ext4 in a partition."""
    made = guest_disks.group(folder, [160 * MIB])
    guest_disks.create_volume(made, "root", (64 if extended else 96) * MIB)
    guest_disks.create_volume(made, "home", 32 * MIB)
    if extended:
        made.lvm(["lvextend", "-q", "-L", f"{96 * MIB}b", "vg0/root"])
    boot = guest_disks.make(folder, "ext4", 8 * MIB, "lvm-boot.raw")
    inside = {
        name: guest_disks.make(folder, kind, size * MIB, f"lvm-{name}.raw")
        for name, kind, size in (("root", "xfs", 96), ("home", "ext4", 32))
    }
    for number, work in enumerate(WORK):
        for name, disk in inside.items():
            disk.change(work)
            made.write(name, disk.path)
        trees = {f"/p2/vg0/{name}": disk.tree() for name, disk in inside.items()}
        yield State(_disk(folder, f"lvm.{number}.raw", [boot.path, *made.devices]), {"/p1": boot.tree(), **trees})


def luks(folder: Path) -> Iterator[State]:
    """XFS in a LUKS volume in a partition."""
    disk = guest_disks.make(folder, "xfs", 64 * MIB, "luks-plain.raw")
    locked = folder / "luks-volume.raw"
    for number, work in enumerate(WORK):
        _lock(disk.change(work).path, locked)
        yield State(_disk(folder, f"luks.{number}.raw", [locked]), {"/p1/luks": disk.tree()})


def _lock(plain: Path, locked: Path) -> None:
    """Encrypt a volume, or write what it is now to the encrypted one, as a guest does."""
    need_tools("qemu-img")
    secret = ("--object", f"secret,id=key,data={PASSPHRASE}")
    if locked.exists():
        options = f"driver=luks,key-secret=key,file.filename={locked}"
        qemu.img("convert", "-n", *secret, "-f", "raw", "--target-image-opts", plain, options)
    else:
        qemu.img("convert", *secret, "-O", "luks", "-o", "key-secret=key,iter-time=10", plain, locked)


def luks_in_lvm(folder: Path) -> Iterator[State]:
    """ext4 in LUKS in a logical volume."""
    made = guest_disks.group(folder, [64 * MIB])
    guest_disks.create_volume(made, "secret", 40 * MIB)
    disk = guest_disks.make(folder, "ext4", 24 * MIB, "luks-in-lvm-plain.raw")
    locked = folder / "luks-in-lvm-volume.raw"
    locked.unlink(missing_ok=True)
    for number, work in enumerate(WORK):
        _lock(disk.change(work).path, locked)
        made.write("secret", locked)
        raw = _disk(folder, f"luks-in-lvm.{number}.raw", made.devices)
        yield State(raw, {"/p1/vg0/secret/luks": disk.tree()})


def lvm_in_luks(folder: Path) -> Iterator[State]:
    """ext4 and XFS in logical volumes in LUKS."""
    made = guest_disks.group(folder, [112 * MIB])
    inside = {}
    for name, kind, size in (("root", "ext4", 32), ("data", "xfs", 64)):
        guest_disks.create_volume(made, name, size * MIB)
        inside[name] = guest_disks.make(folder, kind, size * MIB, f"lvm-in-luks-{name}.raw")
    locked = folder / "lvm-in-luks-volume.raw"
    locked.unlink(missing_ok=True)
    for number, work in enumerate(WORK):
        for name, disk in inside.items():
            made.write(name, disk.change(work).path)
        _lock(made.devices[0], locked)
        trees = {f"/p1/luks/vg0/{name}": disk.tree() for name, disk in inside.items()}
        yield State(_disk(folder, f"lvm-in-luks.{number}.raw", [locked]), trees)


def hybrid(folder: Path) -> Iterator[State]:
    """ext4 and NTFS on a disk with a GPT and an MBR that lists the same partitions."""
    need_tools("sgdisk")
    disks = [guest_disks.make(folder, kind, 24 * MIB, f"hybrid-{kind}.raw") for kind in ("ext4", "ntfs")]
    for number, work in enumerate(WORK):
        for disk in disks:
            disk.change(_with_streams(work) if disk.kind == "ntfs" else work)
        raw = _disk(folder, f"hybrid.{number}.raw", [disk.path for disk in disks])
        _run("sgdisk", "--disk-guid=8b1f24f3-3b8e-4a5c-9d5e-7d3e6a0c1b2f", "--hybrid=1:2", raw)
        yield State(raw, {f"/p{place}": disk.tree() for place, disk in enumerate(disks, 1)})


def short_names(folder: Path) -> Iterator[State]:
    """NTFS where every file with a long name has a short one too."""
    disk = guest_disks.make(folder, "ntfs", 32 * MIB, "ntfs-short-volume.raw")

    shortened_before: set[str] = set()

    def shortened(work: Callable[[Path], None]) -> Callable[[Path], None]:
        def changed(place: Path) -> None:
            _with_streams(work)(place)
            for number, path in enumerate(sorted(place.rglob("*.*")), 1):
                if " " in path.name and path.is_file() and path.name not in shortened_before:
                    name = f"F{number:06}.{path.suffix[1:4].upper()}"
                    os.setxattr(path, "system.ntfs_dos_name", name.encode())
                    shortened_before.add(path.name)

        return changed

    for number, work in enumerate(WORK):
        disk.change(shortened(work))
        yield State(_disk(folder, f"ntfs-short.{number}.raw", [disk.path]), {"/p1": disk.tree()})


def hfsplus(folder: Path) -> Iterator[State]:
    """HFS+ of macOS, written to by a kernel under emulation: see tests/guest_kernel.py."""
    volume = guest_kernel.hfs_volume(folder)
    for number, work in enumerate(guest_kernel.WORK):
        tree = guest_kernel.change(volume, "hfsplus", work)
        yield State(_disk(folder, f"hfsplus.{number}.raw", [volume]), {"/p1": tree})


def swap(folder: Path) -> Iterator[State]:
    """Swap space that pages are written to, beside an ext4 file system."""
    need_tools("mkswap")
    disk = guest_disks.make(folder, "ext4", 24 * MIB, "swap-ext4.raw")
    space = folder / "swap-space.raw"
    with space.open("wb") as stream:
        stream.truncate(16 * MIB)
    _run("mkswap", "-q", space)
    for number, work in enumerate(WORK):
        disk.change(work)
        with space.open("r+b") as stream:
            stream.seek((number + 1) * MIB)
            stream.write(os.urandom(100_000))
        yield State(_disk(folder, f"swap.{number}.raw", [disk.path, space]), {"/p1": disk.tree()})


KINDS: dict[str, Callable[[Path], Iterator[State]]] = {
    "ext4": simple("ext4", 32),
    "xfs": simple("xfs", 64),
    "btrfs": simple("btrfs", 128),
    "ntfs": simple("ntfs", 32),
    "exfat": simple("exfat", 32),
    "lvm": lvm,
    "lvm-plain": functools.partial(lvm, extended=False),  # libvslvm reads no extended volumes, nor does plaso
    "luks": luks,
    "luks-in-lvm": luks_in_lvm,
    "lvm-in-luks": lvm_in_luks,
    "hybrid": hybrid,
    "ntfs-short": short_names,
    "hfsplus": hfsplus,
    "swap": swap,
}


def make(kind: str, folder: Path) -> list[State]:
    """Make a kind in its four states, the image of them, and the file with what the kernel shows."""
    states = list(KINDS[kind](folder))
    guest_disks.states(folder / f"{kind}.qcow2", [(name, state.raw) for name, state in zip(NAMES, states, strict=True)])
    shown = [
        {place: {path: list(item) for path, item in tree.items()} for place, tree in state.trees.items()}
        for state in states
    ]
    (folder / f"{kind}.json").write_text(json.dumps(shown, indent=1))
    return states


# --- what is listed, against the kernel --------------------------------------------------------


def check(kind: str, folder: Path, states: list[State]) -> list[str]:
    """Return where ``diff --files`` and ``timeline`` say something else than the kernel, of each pair of states."""
    wrong: list[str] = []
    for earlier, (before, after) in enumerate(itertools.pairwise(states)):
        names = [NAMES[earlier] or "active", NAMES[earlier + 1] or "active"]
        report = _report(folder / f"{kind}.qcow2", *names, passphrase=_passphrase(folder))
        unread = [item for item in report["volumes"] if not item["read"] and item["type"] != "swap"]
        if {item["type"] for item in unread} == {kind} and kind in UNREAD:
            print(f"  {names[0]}..{names[1]}: not read: {', '.join(item['type'] or '?' for item in unread)}")
            continue
        found = _paths(report)
        expected = {path for path in _expected(before, after) if not path.startswith(report["unlisted"])}
        wrong += [f"{kind} {names}: not reported: {path}" for path in sorted(expected - found)]
        wrong += [
            f"{kind} {names}: reported, but the kernel shows no change: {path}" for path in sorted(found - expected)
        ]
    for name, state in zip(NAMES, states, strict=True):
        wrong += _check_timeline(kind, folder, name or "active", state)
    return wrong


def _passphrase(folder: Path) -> Path:
    path = folder / "passphrase"
    path.write_text(f"{PASSPHRASE}\n")
    return path


def _report(image: Path, before: str, after: str, passphrase: Path) -> dict[str, Any]:
    options = ("--from", before, "--to", after, "--files", "--format", "json", "--guest-passphrase-file", passphrase)
    done = _tool("diff", image, *options)
    if done.returncode not in (0, 2):
        raise RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return {**result, "unlisted": _unlisted(done.stderr)}


def _unlisted(messages: str) -> tuple[str, ...]:
    """Return the folders that are reported as not listed: pytsk3 20260715 cannot list some of HFS+."""
    return tuple(f"{path}/" for path in re.findall(r": (/p\d\S*): .*Unable to open directory", messages))


def _paths(report: dict[str, Any]) -> set[str]:
    """Every path that a report names, in either state, except folders, deleted entries and what the system keeps."""
    found = set()
    for item in report["files"]:
        shown = item["after"] or item["before"]
        if item["change"] == "deleted" or shown["type"] not in "rl" or "/$" in item["path"]:
            continue
        both = item["before"], item["after"] if item["change"] != "removed" else None
        # What the mounted file system does not list as a name, a stream, counts as its file.
        found |= {record["path"].removesuffix(":hidden") for record in both if record}
    return found


def _expected(before: State, after: State) -> set[str]:
    found = set()
    for place in before.trees:
        old, new = before.trees[place], after.trees[place]
        for path in old.keys() | new.keys():
            kinds = {tree[path].type for tree in (old, new) if path in tree}
            if old.get(path) != new.get(path) and kinds & {"r", "l"}:
                found.add(f"{place}{path}")
    return found


def _check_timeline(kind: str, folder: Path, name: str, state: State) -> Iterator[str]:
    image, passphrase = folder / f"{kind}.qcow2", _passphrase(folder)
    done = _tool("timeline", image, "--state", name, "--guest-passphrase-file", passphrase)
    if done.returncode and kind in UNREAD and kind in done.stderr:
        return  # it says what it does not read
    rows: dict[str, tuple[int, int]] = {}
    for line in done.stdout.splitlines():
        columns = line.split("|")
        path = columns[1].partition("] ")[2] or columns[1]
        if len(columns) == 11 and "(deleted" not in path:
            rows[path.partition(" -> ")[0]] = int(columns[6]), int(columns[8])
    for place, tree in state.trees.items():
        for path, item in tree.items():
            if item.type != "r" or f"{place}{path}".startswith(_unlisted(done.stderr)):
                continue
            row = next((row for shown, row in rows.items() if shown.endswith(f"{place}{path}")), None)
            if row is None:
                yield f"{kind} {name}: not in the timeline: {place}{path}"
            elif row != (item.size, item.modified // 10**9):
                yield f"{kind} {name}: {place}{path}: {row} in the timeline, {item.size, item.modified // 10**9} in the kernel"


def bitmaps(kind: str, folder: Path, states: list[State]) -> list[str]:
    """Return where ``diff --from bitmap:NAME --files`` says something else than the kernel, of each step."""
    raws, trees = [state.raw for state in states], [state.trees for state in states]
    return [] if kind in UNREAD else list(guest_bitmaps.check(kind, folder, raws, trees, _passphrase(folder)))


# --- plaso -----------------------------------------------------------------------------------------


def plaso(kind: str, folder: Path, states: list[State]) -> list[str]:
    """Return where log2timeline's rows of the image are not those of the raw disk; print what each run cost."""
    from tests import plaso_tools
    from tests.plaso_tools import Variant

    options = ("--volumes", "all", *(("--credential", f"password:{PASSPHRASE}") if "luks" in kind else ()))
    runs: dict[str, plaso_tools.Run] = {}
    lines: dict[str, list[str]] = {}
    for name, image, wanted in (
        ("raw", states[-1].raw, ""), ("none", folder / f"{kind}.qcow2", "none"),
        ("all", folder / f"{kind}.qcow2", "all"), ("changed", folder / f"{kind}.qcow2", "changed"),
    ):  # fmt: skip
        chosen = (*options, "--qcow_snapshots", wanted) if wanted else options
        place = folder / f"{kind}-{name}"
        shutil.rmtree(place, ignore_errors=True)
        run = plaso_tools.log2timeline(Variant(image), place, *chosen, active=bool(wanted))
        runs[name] = run
        if name == "none" and run.rc == runs["raw"].rc != 0 and _last(run) == _last(runs["raw"]):
            print(f"  log2timeline reads neither the raw disk nor the image: {_last(run)}")
            return []
        if run.rc and name != "raw":
            return [f"{kind} {name}: {run.output[-500:]}"]
        # The stock psort fails on storage files with LUKS volumes.
        lines[name] = plaso_tools.psort(run.storage, place / "psort.csv", active=True) if not run.rc else []
        print(f"  log2timeline {name}: {len(lines[name])} rows, {run.cpu:.1f} s of CPU time", flush=True)
    raw, none = lines["raw"], plaso_tools.evidence_lines(lines["none"])
    wrong = [] if none == raw else [f"{kind}: {len(set(raw) ^ set(none))} rows are not those of the raw disk"]
    wrong += [] if raw else [f"{kind}: no rows"]
    if _stateless(lines["all"]) != _stateless(lines["changed"]):
        wrong.append(f"{kind}: the rows of 'changed' are not those of 'all' without repeats")
    return wrong


def _last(run: plaso_tools.Run) -> str:
    return (run.output.strip().splitlines() or [""])[-1]


def _stateless(lines: list[str]) -> set[str]:
    from tests import plaso_tools

    return {line.replace(_label(line), "") for line in plaso_tools.evidence_lines(lines)}


def _label(line: str) -> str:
    start = line.find("QCOW2-SNAPSHOT")
    return line[start : line.index("]:", start) + 2] if start >= 0 else ""


# --- tools -----------------------------------------------------------------------------------------


def _tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qcow2_forensics", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=REPOSITORY / "src")


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def main() -> int:
    """Make the kinds named on the command line; with ``--check`` the exit code says whether all was as the kernel has it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--check", action="store_true", help="compare diff --files and timeline with the kernel")
    parser.add_argument(
        "--bitmaps", action="store_true", help="compare what diff says of a dirty bitmap with the kernel"
    )
    parser.add_argument(
        "--plaso", action="store_true", help="compare log2timeline's rows of the image and the raw disk"
    )
    options = parser.parse_args()
    wrong: list[str] = []
    for kind in options.kinds:
        folder = options.folder.absolute() / kind
        folder.mkdir(parents=True, exist_ok=True)
        try:
            states = make(kind, folder)
        except _pytest.outcomes.Skipped as skipped:
            print(f"{kind}: skipped: {skipped}", flush=True)
            continue
        print(f"{kind}: {sum(len(tree) for tree in states[-1].trees.values())} names", flush=True)
        wrong += check(kind, folder, states) if options.check else []
        wrong += bitmaps(kind, folder, states) if options.bitmaps else []
        wrong += plaso(kind, folder, states) if options.plaso else []
    print("\n".join(wrong[:100]) or "as the kernel has it")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
