"""``export``: write any state of the disk to a raw file, sparse and hashed on the way."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

from ..disk import Disk
from ..errors import printable
from ..limits import KiB, MiB
from ..mapping import Kind
from .opening import add_disk_arguments, add_image_argument, open_from
from .output import Progress, atomic_writer, human_size

_CHUNK = 512 * KiB  # read, hashed and written at once: what fits in the processor's cache
_ZEROS = bytes(MiB)
_PIECES_BEHIND = 8  # what the hash may lag behind the reader

_EPILOG = """examples:
  qcow2-forensics export disk.qcow2 disk.raw
  qcow2-forensics export disk.qcow2 before.raw --snapshot before-incident
  qcow2-forensics export overlay.qcow2 own.raw --no-backing

The output is sparse, and gets its name only when it is whole. Its SHA-256 is printed.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``export`` to the command line."""
    parser = subparsers.add_parser(
        "export",
        help="write a state of the disk to a raw file",
        description="Write the disk, as it is or as a snapshot has it, to a sparse raw file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_image_argument(parser)
    parser.add_argument("output", metavar="OUT", help="the raw file to write")
    add_disk_arguments(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT when it exists")
    parser.add_argument("--no-hash", action="store_true", help="do not compute the SHA-256 of the raw bytes")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="form of the summary")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export one disk and print what was written."""
    with open_from(args) as disk:
        with atomic_writer(args.output, force=args.force) as out, Progress("export", disk.size) as progress:
            digest = write_raw(disk, out, progress, hashed=not args.no_hash)
        summary = {
            "output": printable(args.output),
            "size": disk.size,
            "sha256": digest,
            "filled_bytes": sum(layer.filled["bytes"] for layer in _layers(disk)),
            "filled_tables": sum(layer.mapping.filled_tables for layer in _layers(disk)),
        }
    if args.format == "json":
        print(json.dumps(summary))
        return 0
    print(f"{summary['output']}: {disk.size} bytes ({human_size(disk.size)})")
    if digest:
        print(f"sha256 {digest}")
    if summary["filled_bytes"]:
        print(f"{summary['filled_bytes']} bytes past the end of the image were filled with zeros")
    if summary["filled_tables"]:
        print(f"{summary['filled_tables']} reads of tables past the end of the image were taken as empty")
    return 0


def _layers(disk: Disk) -> Iterator[Disk]:
    """Yield the image and every image below it."""
    layer: object = disk
    while isinstance(layer, Disk):
        yield layer
        layer = layer.backing


def write_raw(disk: Disk, out: BinaryIO, progress: Progress, *, hashed: bool = True) -> str | None:
    """Write ``disk`` to an empty file, leaving holes for zeros; return the SHA-256 in hex."""
    out.truncate(disk.size)  # first of all: a size no file can have fails before anything is read
    with _Hasher() if hashed else nullcontext() as hasher:
        for offset, length, is_zero in _ranges(disk):
            if is_zero:
                if hasher is None:
                    progress.advance(length)
                    continue
                for step in _steps(length, len(_ZEROS)):
                    hasher.update(_ZEROS if step == len(_ZEROS) else _ZEROS[:step])
                    progress.advance(step)
                continue
            out.seek(offset)
            at = offset
            for step in _steps(length, _CHUNK):
                data = disk.read(at, step)
                if hasher is not None:
                    hasher.update(data)
                out.write(data)
                at += step
                progress.advance(step)
    return hasher.hexdigest() if hasher is not None else None


def _ranges(disk: Disk) -> Iterator[tuple[int, int, bool]]:
    """Yield (offset, length, whether it reads as zeros), neighbours of one sort joined."""
    kinds = ((extent.kind in (Kind.ZERO, Kind.HOLE), extent) for extent in disk.extents())
    for is_zero, group in groupby(kinds, key=itemgetter(0)):
        start = end = -1
        for _, extent in group:
            start = extent.offset if start < 0 else start
            end = extent.offset + extent.length
        yield start, end - start, is_zero


def _steps(length: int, most: int) -> Iterator[int]:
    while length > 0:
        yield min(length, most)
        length -= most


class _Hasher:
    """SHA-256 in a thread of its own, a few pieces behind: hashing releases the interpreter lock."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "sha256")
        self._waiting: deque[Future[None]] = deque()

    def update(self, data: bytes) -> None:
        if len(self._waiting) >= _PIECES_BEHIND:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._digest.update, data))

    def hexdigest(self) -> str:
        """Return the digest of everything; only after the ``with`` block. Raises what hashing a piece raised."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._digest.hexdigest()

    def __enter__(self) -> _Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=False)
