"""Files that a dirty bitmap marks, against what the kernel shows of a guest before and after it wrote.

QEMU writes: a guest's disk is a file that ``qemu-storage-daemon`` exports, and the bitmap is what QEMU makes of the
writes. Where the kernel can, it mounts that file and writes to it itself (:func:`written_by_a_kernel`); for logical and
encrypted volumes, which it mounts nowhere here, the sectors in which two states differ are written to it, so that the bitmap
marks no more than had to be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import guest_disks, qemu
from tests.filesystems import MIB, SECTOR
from tests.guest_disks import Seen

_SOURCES = Path(__file__).parent.parent / "src"
_PIECE = MIB  # of two states compared at a time
_DEADLINE = 60  # seconds


@contextlib.contextmanager
def exported(image: Path) -> Iterator[Path]:
    """The disk of an image as a file: reads and writes are QEMU's, and so is the bitmap."""
    qemu.need("qemu-storage-daemon")
    guest_disks.need_mounts()
    if not Path("/dev/fuse").exists():
        pytest.skip("/dev/fuse is absent")
    disk = image.with_suffix(".fuse")
    disk.touch()
    node = f"driver=qcow2,node-name=disk,file.driver=file,file.filename={image}"
    export = f"type=fuse,id=export,node-name=disk,mountpoint={disk},writable=on"
    pid = image.with_suffix(".pid")
    pid.unlink(missing_ok=True)
    daemon = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", node, "--export", export, "--pidfile", pid],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        until = time.monotonic() + _DEADLINE
        while not pid.exists() and daemon.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert daemon.poll() is None, daemon.stderr and daemon.stderr.read()
        yield disk
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(_DEADLINE)
        if daemon.stderr is not None:
            daemon.stderr.close()
    assert daemon.returncode == 0


def image_with_bitmap(raw: Path, image: Path, granularity: int) -> Path:
    """An image of a disk with a bitmap of no writes."""
    image.unlink(missing_ok=True)
    qemu.img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    qemu.img("bitmap", "--add", "-g", str(granularity), image, "daily")
    return image


def write_differences(image: Path, before: Path, after: Path) -> None:
    """Write the sectors in which two raw disks differ."""
    with exported(image) as disk, before.open("rb") as old, after.open("rb") as new, disk.open("r+b", 0) as target:
        at = 0
        while piece := new.read(_PIECE):
            was = old.read(_PIECE)
            if was != piece:
                for start, end in _runs(was, piece):
                    os.pwrite(target.fileno(), piece[start:end], at + start)
            at += len(piece)
        os.fsync(target.fileno())


def _runs(was: bytes, now: bytes) -> Iterator[tuple[int, int]]:
    start: int | None = None
    for at in range(0, len(now) + SECTOR, SECTOR):
        differs = was[at : at + SECTOR] != now[at : at + SECTOR]
        if differs and start is None:
            start = at
        elif not differs and start is not None:
            yield start, at
            start = None


class Marked(NamedTuple):
    """What ``diff --from bitmap:daily --files`` says."""

    files: dict[str, int]  # bytes in marked ranges by path, streams counted to their files
    report: dict[str, Any]
    text: str


def marked(image: Path, passphrase: Path | None = None) -> Marked:
    """Run the command; every volume must be read."""
    secret = () if passphrase is None else ("--guest-passphrase-file", passphrase)
    outputs = []
    for form in ("json", "text"):
        command = [sys.executable, "-m", "qcow2_forensics", "diff", image, "--from", "bitmap:daily", "--files"]
        done = subprocess.run(
            [*command, "--format", form, *secret], check=False, capture_output=True, text=True, cwd=_SOURCES
        )
        assert done.returncode == 0, done.stderr + done.stdout[-500:]
        outputs.append(done.stdout)
    report: dict[str, Any] = json.loads(outputs[0])
    files: dict[str, int] = {}
    for item in report["files"]:
        if item["after"]["type"] in "rl":
            path = item["path"].removesuffix(":hidden")
            files[path] = files.get(path, 0) + item["changed_bytes"]
    return Marked(files, report, outputs[1])


Trees = Mapping[str, Mapping[str, Seen]]


def wrong(found: Marked, before: Trees, after: Trees, *, exact: bool) -> Iterator[str]:
    """Yield where the report is not what the kernel shows.

    Every file with other content than before must be listed. ``exact``: no file that is as it was, if marks are as small as
    sectors; otherwise one beside a written one may be.
    """
    changed = {f"{place}{path}" for place in after for path in _changed(before[place], after[place])}
    same = {
        f"{place}{path}" for place in after for path, item in after[place].items() if item == before[place].get(path)
    }
    yield from (f"its content changed, and it is not listed: {path}" for path in sorted(changed - found.files.keys()))
    if exact:
        yield from (f"nothing of it changed, and it is listed: {path}" for path in sorted(same & found.files.keys()))
    structures = found.report["summary"]["bytes_in_no_file"] or any(path.endswith("/$MFT") for path in found.files)
    only_names = any(before[place].keys() != after[place].keys() for place in after)
    if only_names and not (structures and "names, times and owners may have been written" in found.text):
        yield "names changed, and the report says nothing of it"


def _changed(before: Mapping[str, Seen], after: Mapping[str, Seen]) -> Iterator[str]:
    """Yield the files that were written to: with other bytes, or new and not renamed."""
    kept = {(item.sha256, item.modified) for item in before.values()}
    for path, item in after.items():
        old = before.get(path)
        renamed = old is None and (item.sha256, item.modified) in kept
        if item.type == "r" and item.size and not renamed and (old is None or old.sha256 != item.sha256):
            yield path


def check(
    kind: str, folder: Path, raws: Sequence[Path], trees: Sequence[Trees], passphrase: Path | None = None
) -> Iterator[str]:
    """Yield what is wrong after each step from a state to the next, with marks of a sector and as QEMU makes them."""
    for step in range(len(raws) - 1):
        for granularity in (SECTOR, 65536):
            image = image_with_bitmap(raws[step], folder / f"{kind}-bitmap.qcow2", granularity)
            write_differences(image, raws[step], raws[step + 1])
            found = marked(image, passphrase)
            for sentence in wrong(found, trees[step], trees[step + 1], exact=granularity == SECTOR):
                yield f"{kind} step {step + 1}, marks of {granularity}: {sentence}"
