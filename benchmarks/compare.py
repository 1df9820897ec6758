"""Comparing states, and pytsk3 over a QCOW2 image, against what people do without this library.

The yardsticks are the work around: export both states and compare the files; ``qemu-img compare``
for an overlay and its backing file; pytsk3 on an exported raw disk, and on Python images made of
other QCOW2 readers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytsk3
from harness import Case, tool

import pytsk3_qcow2
import qcow2_forensics as q
from pytsk3_qcow2.files import file_systems
from qcow2_forensics.compare.ranges import compare
from qcow2_forensics.limits import GiB, KiB, MiB


def cases(folder: Path, *, smoke: bool = False) -> Iterator[Case]:
    size = (64 * MiB) if smoke else (2 * GiB)
    states = two_states(folder, size)
    yield Case(
        "ranges between a snapshot and the active state",
        {
            "export both, cmp": lambda: export_and_compare(states, folder),
            "qcow2-forensics": lambda: ours(states, "old", None),
        },
        count=size,
    )
    base, over = overlay(folder, size)
    yield Case(
        "ranges between an overlay and its backing file",
        {
            "qemu-img compare": lambda: tool(
                "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", base, over, check=False
            ),
            "qcow2-forensics": lambda: ours_chain(over),
        },
        count=size,
    )
    big = tebibyte(folder)
    yield Case("ranges between two states of a 1 TiB disk", {"qcow2-forensics": lambda: ours(big, "one", None)})
    raw, packed = files(folder, 32 * MiB if smoke else 512 * MiB)
    readers: dict[str, Callable[[], Any]] = {
        "pytsk3, raw export": lambda: hash_files(pytsk3.Img_Info(str(raw))),
        "qcow2-forensics": lambda: hash_files(pytsk3_qcow2.Img_Info(packed)),
    }
    readers |= {name: lambda make=make: hash_files(make(packed)) for name, make in peers().items()}
    yield Case("list and hash every file through pytsk3", readers, count=raw.stat().st_size)


def ours(path: Path, first: str | None, second: str | None) -> int:
    with q.open_disk(path, first) as before, q.open_disk(path, second) as after:
        return sum(item.length for item in compare(before, after))


def ours_chain(path: Path) -> int:
    with q.open_disk(path) as disk:
        assert disk.backing is not None
        return sum(item.length for item in compare(disk.backing, disk))


def export_and_compare(path: Path, folder: Path) -> int:
    one, two = folder / "one.raw", folder / "two.raw"
    tool("qemu-img", "convert", "-l", "snapshot.name=old", "-O", "raw", path, one)
    tool("qemu-img", "convert", "-O", "raw", path, two)
    return tool("cmp", "-l", one, two, check=False)


def hash_files(image: Any) -> int:
    count = 0
    for system in file_systems(image):
        for record in system.records():
            if record.type == "r" and record.allocated:
                digest = hashlib.sha256()
                for data in system.chunks(record):
                    digest.update(data)
                count += 1
    return count


# --- other readers as pytsk3 images ---------------------------------------------------------------


def peers() -> dict[str, Callable[[Path], Any]]:
    """Return a maker of a pytsk3 image for each other QCOW2 reader that is installed."""
    found: dict[str, Callable[[Path], Any]] = {}
    try:
        import pyqcow

        def libqcow(path: Path) -> Any:
            handle = pyqcow.file()
            handle.open(str(path))
            return Wrapped(handle.read_buffer_at_offset, handle.get_media_size())

        found["pyqcow"] = libqcow
    except ImportError:
        pass
    try:
        from dissect.hypervisor.disk.qcow2 import QCow2

        def dissect(path: Path) -> Any:
            stream = QCow2(path).open()

            def read(length: int, offset: int) -> bytes:
                stream.seek(offset)
                return bytes(stream.read(length))

            return Wrapped(read, stream.size)

        found["dissect.hypervisor"] = dissect
    except ImportError:
        pass
    return found


class Wrapped(pytsk3.Img_Info):  # type: ignore[misc]
    """The usual recipe: a Python object behind pytsk3."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size = read, size
        super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

    def close(self) -> None:
        pass

    def read(self, offset: int, length: int) -> bytes:
        return self._read(length, offset)

    def get_size(self) -> int:
        return self._size


# --- images -----------------------------------------------------------------------------------------


def two_states(folder: Path, size: int) -> Path:
    """A disk full of data with a snapshot, one cluster in fifty written since."""
    path = folder / "states.qcow2"
    if not path.exists():
        tool("qemu-img", "create", "-q", "-f", "qcow2", path, size)
        fill(path, size)
        tool("qemu-img", "snapshot", "-c", "old", path)
        scatter(path, size, 50)
    return path


def overlay(folder: Path, size: int) -> tuple[Path, Path]:
    base, over = folder / "base.qcow2", folder / "over.qcow2"
    if not over.exists():
        tool("qemu-img", "create", "-q", "-f", "qcow2", base, size)
        fill(base, size)
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", over)
        # Bytes like those below, up to the last cluster: qemu-img stops at the first difference.
        tool(
            "qemu-io",
            "-f",
            "qcow2",
            "-c",
            f"write -q -P 5 0 {size // 50}",
            "-c",
            f"write -q -P 6 {size - 64 * KiB} 64k",
            over,
        )
    return base, over


def tebibyte(folder: Path) -> Path:
    """4 GiB of mapped clusters and three snapshots, a little written after each."""
    path = folder / "tebibyte.qcow2"
    if not path.exists():
        tool("qemu-img", "create", "-q", "-f", "qcow2", path, "1T")
        tool("qemu-img", "resize", "-q", "-f", "qcow2", "--preallocation=metadata", path, (1 << 40) + 4 * GiB)
        for name in ("one", "two", "three"):
            tool("qemu-img", "snapshot", "-c", name, path)
            scatter(path, 1 << 40, (1 << 40) // (64 * KiB) // 500)
    return path


def fill(path: Path, size: int) -> None:
    tool("qemu-io", "-f", "qcow2", *(f"-cwrite -q -P 5 {at} 64M" for at in range(0, size, 64 * MiB)), path)


def scatter(path: Path, size: int, step: int) -> None:
    noise = random.Random(1)
    commands = [f"-cwrite -q -P 9 {at} 4k" for at in range(0, size - 64 * KiB, step * 64 * KiB) if noise.random() < 0.9]
    for first in range(0, len(commands), 500):
        tool("qemu-io", "-f", "qcow2", *commands[first : first + 500], path)


def files(folder: Path, size: int) -> tuple[Path, Path]:
    """An ext4 disk filled to two thirds with files of many sizes, raw and as a QCOW2 image."""
    raw, path = folder / "files.raw", folder / "files.qcow2"
    if not path.exists():
        source = folder / "files"
        source.mkdir()
        noise, left, number = random.Random(2), size * 2 // 3, 0
        while left > 0:
            length = min(left, int(2 ** noise.uniform(8, 22)))
            target = source / f"d{number % 40}" / f"f{number}"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(noise.randbytes(length))
            left -= length
            number += 1
        with raw.open("wb") as out:
            out.truncate(size)
        tool("mkfs.ext4", "-q", "-d", source, raw)
        tool("qemu-img", "convert", "-O", "qcow2", raw, path)
    return raw, path
