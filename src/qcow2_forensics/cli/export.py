"""``export``: write any state of the disk to a raw file, sparse and hashed on the way."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

from ..limits import MiB
from ..reader.clusters import decode_here
from ..reader.disk import Disk
from ..reader.mapping import Kind
from ..text import printable, size
from .options import add_disk_arguments, add_image_argument, open_from
from .output import Progress, atomic_writer

_PIECE = 1 * MiB  # read, written and hashed at once
_ZEROS = bytes(MiB)
_WORKERS = min(8, os.cpu_count() or 1)
_PIECES_AHEAD = 3 * _WORKERS  # read and written before the hash comes to them

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
            "output": args.output,
            "size": disk.size,
            "sha256": digest,
            "filled_bytes": sum(layer.filled["bytes"] for layer in _layers(disk)),
            "filled_tables": sum(layer.mapping.filled_tables for layer in _layers(disk)),
        }
    if args.format == "json":
        print(json.dumps(summary))
        return 0
    print(f"{printable(args.output)}: {disk.size} bytes ({size(disk.size)})")
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
    digest = hashlib.sha256() if hashed else None
    with closing(_copied(disk, out.fileno())) as pieces:
        for length, data in pieces:
            if data is None and digest is not None:
                for step in _steps(length, len(_ZEROS)):
                    digest.update(_ZEROS if step == len(_ZEROS) else _ZEROS[:step])
                    progress.advance(step)
                continue
            if data is not None and digest is not None:
                digest.update(data)
            progress.advance(length)
    return digest.hexdigest() if digest is not None else None


def _copied(disk: Disk, descriptor: int) -> Generator[tuple[int, bytes | None]]:
    """Yield (length, bytes) of each piece in order, None for zeros, when it is in the file.

    Threads read and write side by side, a few pieces ahead of who takes them here.
    """

    def copy(offset: int, length: int) -> bytes:
        data = disk.read(offset, length)
        written = 0
        while written < len(data):  # a disk that is full takes a part, and says so at the next call
            written += os.pwrite(descriptor, data[written:] if written else data, offset + written)
        return data

    waiting: deque[tuple[int, Callable[[], bytes | None]]] = deque()
    # What is filled with zeros is counted, which threads must not do side by side.
    pool = ThreadPoolExecutor(_WORKERS, "export", initializer=decode_here) if disk.eof == "strict" else None
    try:
        for offset, length, is_zero in _pieces(disk):
            if is_zero:
                waiting.append((length, lambda: None))
            elif pool is not None:
                waiting.append((length, pool.submit(copy, offset, length).result))
            else:
                waiting.append((length, partial(copy, offset, length)))
            if len(waiting) > _PIECES_AHEAD:
                done, result = waiting.popleft()
                yield done, result()
        for done, result in waiting:
            yield done, result()
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)  # nobody writes any more when the file is closed


def _pieces(disk: Disk) -> Iterator[tuple[int, int, bool]]:
    """Yield (offset, length, whether it reads as zeros); zeros as long as they are, other bytes cut."""
    most = max(_PIECE, *(layer.image.cluster_size for layer in _layers(disk)))
    kinds = ((extent.kind in (Kind.ZERO, Kind.HOLE), extent) for extent in disk.extents())
    for is_zero, group in groupby(kinds, key=itemgetter(0)):
        start = end = -1
        for _, extent in group:
            start = extent.offset if start < 0 else start
            end = extent.offset + extent.length
        step = end - start if is_zero else most
        for offset in range(start, end, step):
            yield offset, min(step, end - offset), is_zero


def _steps(length: int, most: int) -> Iterator[int]:
    while length > 0:
        yield min(length, most)
        length -= most
