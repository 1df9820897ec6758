"""The mount against QEMU's own FUSE export: the same file, read through both, never from the page cache.

The yardstick is ``qemu-storage-daemon --export fuse``.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import harness

MiB = 1 << 20
QEMU = "qemu-storage-daemon"


def _image(folder: Path, size: int) -> Path:
    path = folder / f"mount-{size // MiB}.qcow2"
    if not path.exists():
        raw = folder / "mount.raw"
        randomness = random.Random(1)
        with raw.open("wb") as out:
            for _ in range(size // MiB):
                out.write(randomness.randbytes(MiB))
        harness.tool("qemu-img", "convert", "-O", "qcow2", raw, path)
        raw.unlink()
    return path


def _sequential(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        while os.read(descriptor, MiB):
            pass
    finally:
        os.close(descriptor)


def _scattered(path: Path, offsets: list[int]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in offsets:
            os.pread(descriptor, 4096, offset)
    finally:
        os.close(descriptor)


def _until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 30
    while not ready():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


@contextlib.contextmanager
def _ours(image: Path, folder: Path) -> Iterator[Path]:
    point = folder / "ours"
    command = [sys.executable, "-m", "qcow2_forensics", "mount", str(image), str(point), "--no-audit"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        _until(lambda: os.path.ismount(point), process)
        try:
            yield point / image.name / "active.raw"
        finally:
            process.terminate()


@contextlib.contextmanager
def _qemu(image: Path, folder: Path) -> Iterator[Path]:
    point = folder / "qemu.raw"
    point.touch()
    file = f"node-name=file,driver=file,read-only=on,filename={image}"
    command = [QEMU, "--blockdev", file, "--blockdev", "node-name=disk,driver=qcow2,file=file,read-only=on"]
    command += ["--export", f"fuse,id=export,node-name=disk,mountpoint={point},writable=off"]
    with subprocess.Popen(command) as process:
        _until(lambda: os.path.ismount(point), process)
        try:
            yield point
        finally:
            process.terminate()


def cases(folder: Path, *, smoke: bool = False) -> Iterator[harness.Case]:
    """Yield one case per way to read; both mounts stay while it runs."""
    if not os.path.exists("/dev/fuse"):
        raise ImportError("/dev/fuse is absent")
    if shutil.which(QEMU) is None:
        raise ImportError(f"{QEMU} is absent")
    size = (16 if smoke else 512) * MiB
    image = _image(folder, size)
    randomness = random.Random(2)
    offsets = [randomness.randrange(size // 4096) * 4096 for _ in range(100 if smoke else 5000)]
    with (
        tempfile.TemporaryDirectory() as temporary,
        _qemu(image, Path(temporary)) as theirs,
        _ours(image, Path(temporary)) as ours,
    ):
        yield harness.Case(
            "mount, sequential 1 MiB",
            {"qemu-storage-daemon": lambda: _sequential(theirs), "qcow2-forensics": lambda: _sequential(ours)},
            count=size,
        )
        yield harness.Case(
            "mount, random 4 KiB",
            {
                "qemu-storage-daemon": lambda: _scattered(theirs, offsets),
                "qcow2-forensics": lambda: _scattered(ours, offsets),
            },
            count=len(offsets),
            unit="reads",
        )
