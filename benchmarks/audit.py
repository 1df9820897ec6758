"""The auditor against ``qemu-img check`` on a disk of 1 TiB with all its metadata.

``python benchmarks/audit.py [FOLDER]`` alone prints what an audit costs in memory, and triage as a
whole process.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from harness import Case, tool

import qcow2_forensics as q
from qcow2_forensics.audit import catalog
from qcow2_forensics.census import take_census
from qcow2_forensics.format.entries import OFFSET_MASK
from qcow2_forensics.limits import GiB, KiB, MiB


def check(path: Path) -> Callable[[], object]:
    """Return the yardstick: ``qemu-img check``, as a whole process, which starts in milliseconds."""
    return lambda: tool("qemu-img", "check", "-q", path, check=False)


def cases(folder: Path, *, smoke: bool = False) -> Iterator[Case]:
    catalog()  # importing the rules is start-up, not work
    size = GiB if smoke else 1024 * GiB
    full = preallocated(folder, size)
    yield Case(
        f"check a disk of {size // GiB} GiB, all metadata there",
        {
            "qemu-img check": check(full),
            "qcow2-forensics census": lambda: counters(full),
            "qcow2-forensics audit": lambda: q.audit(full),
            "qcow2-forensics audit, triage": lambda: q.audit(full, "triage"),
        },
    )
    # Guest order and host order have nothing in common, the worst there is; QEMU asks the file
    # system about every fragment, so only a part of the large disk is done.
    mixed = shuffled(folder, size // 32)
    yield Case(
        f"check a disk of {size // 32 // MiB} MiB, wholly fragmented",
        {"qemu-img check": check(mixed), "qcow2-forensics audit": lambda: q.audit(mixed)},
    )
    for cluster in (4 * KiB, 2 * MiB):
        path = preallocated(folder, size // 64 if cluster < MiB else size, cluster)
        yield Case(
            f"check a preallocated disk of {cluster // KiB} KiB clusters",
            {"qemu-img check": check(path), "qcow2-forensics audit": lambda path=path: q.audit(path)},
        )
    packed = compressed(folder, 16 * MiB if smoke else GiB)
    yield Case(
        "check a compressed image",
        {
            "qemu-img check": check(packed),
            "qcow2-forensics audit": lambda: q.audit(packed),
            "qcow2-forensics audit, deep": lambda: q.audit(packed, "deep"),
        },
    )


def counters(path: Path) -> object:
    with q.open_image(path) as image:
        return take_census(image).check


# --- images --------------------------------------------------------------------------------------


def preallocated(folder: Path, size: int, cluster: int = 64 * KiB) -> Path:
    path = folder / f"metadata-{size}-{cluster}.qcow2"
    if not path.exists():
        options = f"preallocation=metadata,cluster_size={cluster}"
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
    return path


def shuffled(folder: Path, size: int) -> Path:
    """Shuffle all L2 entries of a preallocated disk among each other."""
    path = folder / f"shuffled-{size}.qcow2"
    if path.exists():
        return path
    preallocated(folder, size).rename(path)
    with q.open_image(path) as image:
        header = image.header
        tables = [entry & OFFSET_MASK for entry in image.table(header.l1_table_offset, header.l1_size, "L1")]
        words = [np.frombuffer(image.read(table, header.cluster_size), dtype=">u8") for table in tables]
    used = sum(int((part != 0).sum()) for part in words)
    entries = np.concatenate(words).astype(">u8")
    entries[:used] = np.random.default_rng(1).permutation(entries[:used])
    with path.open("r+b") as file:
        for table, part in zip(tables, entries.reshape(len(tables), -1), strict=True):
            file.seek(table)
            file.write(part.tobytes())
    return path


def compressed(folder: Path, size: int) -> Path:
    path = folder / f"compressed-{size}.qcow2"
    if not path.exists():
        raw = folder / "words.raw"
        generator = random.Random(5)
        block = b"".join(generator.choices([generator.randbytes(8) for _ in range(999)], k=MiB // 8))
        with raw.open("wb") as out:
            for number in range(size // MiB):
                out.write(number.to_bytes(8, "big") + block[8:])
        tool("qemu-img", "convert", "-c", "-O", "qcow2", raw, path)
        raw.unlink()
    return path


# --- whole processes -----------------------------------------------------------------------------

_MEMORY = """
import resource, sys
import qcow2_forensics as q
q.audit(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


_TRIAGE = "import sys; from qcow2_forensics.cli import main; sys.exit(main())"


def main(folder: Path) -> None:
    path = preallocated(folder, 1024 * GiB)
    for depth in ("standard", "deep"):
        run = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(path), depth], capture_output=True, text=True, check=True
        )
        print(f"peak memory of a process, {depth}, 1 TiB: {run.stdout.strip()} MiB")
    small = preallocated(folder, GiB)
    command = [sys.executable, "-c", _TRIAGE, "audit", "--depth", "triage", str(small)]
    times = []
    for _ in range(10):
        started = time.perf_counter()
        tool(*command)
        times.append(time.perf_counter() - started)
    print(f"triage as a whole process: {sorted(times)[5] * 1000:.0f} ms")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(name))
