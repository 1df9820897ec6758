"""The room that exports take against that of ``qemu-img convert -O raw``, on small images of many forms.

Prints one line per case, or for those whose names it is given, and ends with 1 where ours takes more than 1.05 times QEMU's (and a page more), or
where the bytes differ. VHD, VHDX and VMDK bases need the libraries of the extra ``formats``.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness import tool

KiB, MiB = 1 << 10, 1 << 20
MOST = 1.05


def create(path: Path, size: str, *options: str, fmt: str = "qcow2") -> Path:
    tool("qemu-img", "create", "-q", "-f", fmt, *options, path, size)
    return path


def write(path: Path, *commands: str, fmt: str = "qcow2") -> Path:
    tool("qemu-io", "-f", fmt, *(part for command in commands for part in ("-c", command)), path)
    return path


def over(base: Path, fmt: str, *commands: str) -> Path:
    """Return an overlay on ``base``."""
    top = base.with_name("top.qcow2")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", fmt, top)
    return write(top, *commands) if commands else top


def empty_vhd(folder: Path) -> Path:
    return over(create(folder / "base.vpc", "1G", fmt="vpc"), "vpc")


def huge_vhd(folder: Path) -> Path:
    return over(create(folder / "base.vpc", "127G", fmt="vpc"), "vpc")


def over_vmdk(folder: Path) -> Path:
    return over(write(create(folder / "base.vmdk", "1G", fmt="vmdk"), "write -P 5 300M 1M", fmt="vmdk"), "vmdk")


def over_vhdx(folder: Path) -> Path:
    return over(write(create(folder / "base.vhdx", "1G", fmt="vhdx"), "write -P 5 300M 1M", fmt="vhdx"), "vhdx")


def vhd_with_data(folder: Path) -> Path:
    base = write(create(folder / "base.vpc", "1G", fmt="vpc"), "write -P 5 300M 64k", fmt="vpc")
    return over(base, "vpc", "write -P 6 500M 4k")


def stored_zeros(folder: Path) -> Path:
    return write(create(folder / "disk.qcow2", "64M"), "write -P 0 0 32M", "write -P 7 40M 64k")


def zero_clusters(folder: Path) -> Path:
    return write(create(folder / "disk.qcow2", "64M"), "write -P 7 0 32M", "write -z 1M 30M")


def _mixed_raw(folder: Path) -> Path:
    """Return 8 MiB of which every fourth 4 KiB, and in the second half every other 64 KiB, is noise."""
    noise = random.Random(23)
    raw = folder / "mixed.raw"
    with raw.open("wb") as out:
        out.truncate(8 * MiB)
        for at in [*range(0, 4 * MiB, 16 * KiB), *range(4 * MiB, 8 * MiB, 128 * KiB)]:
            out.seek(at)
            out.write(noise.randbytes(4 * KiB if at < 4 * MiB else 64 * KiB))
    return raw


def _converted(folder: Path, *options: str) -> Path:
    image = folder / "disk.qcow2"
    tool("qemu-img", "convert", "-O", "qcow2", *options, _mixed_raw(folder), image)
    return image


def mixed(folder: Path) -> Path:
    return _converted(folder)


def mixed_full(folder: Path) -> Path:
    return _converted(folder, "-S", "0")


def compressed(folder: Path) -> Path:
    return _converted(folder, "-c")


def compressed_zstd(folder: Path) -> Path:
    return _converted(folder, "-c", "-o", "compression_type=zstd")


def small_clusters(folder: Path) -> Path:
    return _converted(folder, "-o", "cluster_size=512")


def large_clusters(folder: Path) -> Path:
    return _converted(folder, "-o", "cluster_size=2M")


def subclusters(folder: Path) -> Path:
    image = create(folder / "disk.qcow2", "64M", "-o", "extended_l2=on,cluster_size=128k")
    return write(image, "write -P 1 0 4k", "write -P 2 1M 12k", "write -z 2M 64k", "write -P 3 60M 100k")


def over_sparse_raw(folder: Path) -> Path:
    return over(_mixed_raw(folder), "raw", "write -P 9 1M 64k", "write -z 5M 1M")


def chain(folder: Path) -> Path:
    base = write(create(folder / "base.qcow2", "64M"), "write -P 1 0 8M")
    return over(base, "qcow2", "write -z 0 7M", "write -P 2 20M 64k")


def data_file(folder: Path) -> Path:
    image = create(folder / "disk.qcow2", "64M", "-o", f"data_file={folder / 'data.raw'},data_file_raw=on")
    return write(image, "write -P 1 1M 64k", "write -P 0 4M 8M")


# The first three once took all that was allocated or declared.
CASES: tuple[Callable[[Path], Path], ...] = (
    *(empty_vhd, huge_vhd, over_vmdk),
    *(over_vhdx, vhd_with_data, stored_zeros, zero_clusters, mixed, mixed_full, compressed, compressed_zstd),
    *(small_clusters, large_clusters, subclusters, over_sparse_raw, chain, data_file),
)


def room(path: Path) -> int:
    """Return how many bytes a file takes on its file system."""
    return path.stat().st_blocks * 512


def measure(case: Callable[[Path], Path], folder: Path) -> tuple[int, int, bool]:
    """Return the room of our export and of QEMU's, and whether their bytes are the same."""
    image = case(folder)
    ours, theirs = folder / "ours", folder / "theirs"
    tool("qemu-img", "convert", "-O", "raw", image, theirs)
    # 127 GiB of zeros take minutes to hash.
    tool(sys.executable, "-m", "qcow2_forensics", "export", "--no-hash", image, ours)
    for path in (ours, theirs):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())  # before that, a file system may count more
    same = theirs.stat().st_size == ours.stat().st_size and same_bytes(ours, theirs)
    return room(ours), room(theirs), same


def data_of(path: Path) -> list[tuple[int, int]]:
    """Return the stretches of a file that are no holes, as (offset, end)."""
    found = []
    with path.open("rb") as stream:
        end, size = 0, path.stat().st_size
        while end < size:
            try:
                start = os.lseek(stream.fileno(), end, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                break
            end = os.lseek(stream.fileno(), start, os.SEEK_HOLE)
            found.append((start, end))
    return found


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files of one size hold the same bytes; holes of both are not read."""
    with one.open("rb") as left, other.open("rb") as right:
        for start, end in {*data_of(one), *data_of(other)}:
            for at in range(start, end, MiB):
                length = min(MiB, end - at)
                if os.pread(left.fileno(), length, at) != os.pread(right.fileno(), length, at):
                    return False
    return True


def within(ours: int, theirs: int) -> bool:
    """Whether ours is at most :data:`MOST` times theirs; a page is free, for files with nothing in them."""
    return ours <= max(MOST * theirs, theirs + 4 * KiB)


def main() -> int:
    chosen = [case for case in CASES if case.__name__ in sys.argv[1:]] or CASES
    failed = False
    print(f"{'case':<18}{'export':>12}{'qemu-img':>12}  KiB")
    for case in chosen:
        with tempfile.TemporaryDirectory() as name:
            ours, theirs, same = measure(case, Path(name))
        good = same and within(ours, theirs)
        failed |= not good
        verdict = "" if good else ("  too much room" if same else "  other bytes")
        print(f"{case.__name__:<18}{ours // KiB:>12,}{theirs // KiB:>12,}{verdict}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
