"""``export``: write any state of the disk to a raw file or a pipe, sparse and hashed on the way."""

from __future__ import annotations

import argparse
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

from ..errors import Qcow2Error
from ..limits import MiB
from ..reader.clusters import decode_here
from ..reader.disk import Disk, images_of
from ..reader.mapping import Kind
from ..reader.salvage import SalvagedDisk, mapfile
from ..reader.writer import HASHES, Writer, atomic_writer, refuse_existing, writing
from ..text import TOOL, plural, printable, size
from . import add_image_argument
from .case import add_sidecar_arguments, now, origin_of, report_output, sidecar_of, sources_of
from .options import add_disk_arguments, open_from
from .output import Progress

_PIECE = 1 * MiB  # read, written and hashed at once
_WORKERS = min(8, os.cpu_count() or 1)
_PIECES_AHEAD = 3 * _WORKERS  # read and written before the hash comes to them
_MISSING_SHOWN = 10  # ranges that the summary in text lists; JSON and the map have them all
_SCHEMA = 1

HELP = "write a state of the disk to a raw file or a pipe"
DESCRIPTION = "Write the disk, as it is or as a snapshot has it, to a sparse raw file or a pipe."
EPILOG = """examples:
  qcow2-forensics export disk.qcow2 disk.raw
  qcow2-forensics export disk.qcow2 before.raw --snapshot before-incident --hash sha256 --hash md5 --sidecar
  qcow2-forensics export overlay.qcow2 own.raw --no-backing
  qcow2-forensics export damaged.qcow2 rest.raw --salvage --mapfile rest.map
  qcow2-forensics export disk.qcow2 - | strings -a

A file is sparse, and gets its name only when it is whole. Its SHA-256 is printed. "-", a FIFO or a
device such as /dev/stdout takes the bytes in order, zeros included; the summary is then on standard
error. With --salvage the exit code is 2 when something is missing.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``export`` takes."""
    add_image_argument(parser)
    parser.add_argument("output", metavar="OUT", help='the raw file to write; "-" for standard output')
    add_disk_arguments(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT when it exists")
    hashing = parser.add_mutually_exclusive_group()
    hashing.add_argument(
        "--hash",
        dest="hashes",
        choices=HASHES,
        action="append",
        help="a hash of the raw bytes to compute (repeatable; default: sha256). sha256-tree hashes each MiB and then the "
        "hashes in pairs, as Amazon S3 Glacier does; holes cost it nothing",
    )
    hashing.add_argument("--no-hash", action="store_true", help="compute no hash of the raw bytes")
    parser.add_argument(
        "--salvage",
        action="store_true",
        help="write what can be read and zeros where nothing can; exit code 2 when something is missing",
    )
    parser.add_argument("--mapfile", metavar="FILE", help="write which bytes are missing, in ddrescue's format")
    add_sidecar_arguments(parser, "source, state, tool, times and hashes")
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="form of the summary (default: text)"
    )


def run(args: argparse.Namespace) -> int:
    """Export one disk and print what was written; 2 when something could not be read."""
    if args.mapfile and not args.salvage:
        raise Qcow2Error("--mapfile goes with --salvage: without it an export is whole or not there")
    sidecar = sidecar_of(args, "--format json")
    hashes = () if args.no_hash else tuple(dict.fromkeys(args.hashes or HASHES[:1]))
    started = now()
    with open_from(args) as disk:
        salvaged = SalvagedDisk(disk) if args.salvage else None
        if args.mapfile:
            refuse_existing(args.mapfile, force=args.force)
        with (
            Progress("export", disk.size) as progress,
            writing(args.output, progress.advance, force=args.force, hashes=hashes) as out,
        ):
            write_raw(disk, out, salvaged)
        summary = _summary(args, disk, out, salvaged, started)
    if args.mapfile:
        with atomic_writer(args.mapfile, force=args.force) as file:
            missing = salvaged.missing if salvaged is not None else []
            file.writelines(f"{line}\n".encode() for line in mapfile(disk.size, missing, TOOL))
    report_output(args, sidecar, summary, _text(summary), as_json=args.format == "json")
    return 2 if summary["partial"] else 0


def _summary(
    args: argparse.Namespace, disk: Disk, out: Writer, salvaged: SalvagedDisk | None, started: str
) -> dict[str, Any]:
    """Return what a report on this export has to say: what was read, what was written, when, and by what."""
    missing = salvaged.missing if salvaged is not None else []
    snapshot = disk.snapshot
    return {
        "schema": _SCHEMA,
        "output": args.output,
        "size": disk.size,
        "sha256": out.sha256,
        "hashes": out.hashes,
        "partial": bool(missing),
        "missing": [{"offset": at, "length": length, "why": why} for at, length, why in missing],
        "filled_bytes": sum(layer.filled["bytes"] for layer in images_of(disk)),
        "filled_tables": sum(layer.mapping.filled_tables for layer in images_of(disk)),
        "state": args.snapshot or "active",
        "assumed": dict(args.assume),
        "confidence": _confidence(disk),
        "snapshot": None if snapshot is None else {"id": snapshot.id, "name": snapshot.name},
        **origin_of(args, sources_of(disk), started),
    }


def _confidence(disk: Disk) -> dict[str, int] | None:
    """Return how many bytes are how sure, of a recovered state or a deleted snapshot; None for any other state."""
    if disk.rebuilt is None and (disk.snapshot is None or disk.snapshot.index >= 0):
        return None
    from ..recovery import Confidence, confidence_of

    counts = {level.label: 0 for level in sorted(Confidence, reverse=True)}
    for piece in confidence_of(disk):
        counts[piece.confidence.label] += piece.length
    return {level: length for level, length in counts.items() if length}


def _text(summary: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the summary for people."""
    word = " (partial)" if summary["partial"] else ""
    yield f"{printable(summary['output'])}: {summary['size']} bytes ({size(summary['size'])})"
    if summary["state"].lstrip("=").startswith("recovered:"):
        yield f"{summary['state']}: put together from what is left of the image; snapshots --recovered says how sure it is"
    for level, length in (summary["confidence"] or {}).items():
        yield f"{level}: {length} bytes ({size(length)})"
    for name, digest in summary["hashes"].items():
        yield f"{name}{word} {digest}"
    missing = summary["missing"]
    if missing:
        total = sum(item["length"] for item in missing)
        yield f"partial: {total} bytes in {plural(len(missing), 'range')} could not be read; zeros were written"
        for item in missing[:_MISSING_SHOWN]:
            yield f"  {item['offset']:#x}, {item['length']} bytes: {item['why']}"
        if len(missing) > _MISSING_SHOWN:
            yield f"  and {plural(len(missing) - _MISSING_SHOWN, 'more range')}"
    if summary["filled_bytes"]:
        yield f"{summary['filled_bytes']} bytes past the end of the image were filled with zeros"
    if summary["filled_tables"]:
        yield f"{summary['filled_tables']} reads of tables past the end of the image were taken as empty"


def write_raw(disk: Disk, out: Writer, salvaged: SalvagedDisk | None = None) -> None:
    """Write ``disk``, or what is salvaged of it, to an empty file or a pipe."""
    out.expect(disk.size)  # first of all: a size no file can have fails before anything is read
    with closing(_copied(disk, out, salvaged)) as pieces:
        for length, data in pieces:
            if data is None:
                out.zeros(length)
            else:
                out.data(data, stored=out.sparse)


def _copied(disk: Disk, out: Writer, salvaged: SalvagedDisk | None) -> Generator[tuple[int, bytes | None]]:
    """Yield (length, bytes) of each piece in order, None for zeros, when it is in the file.

    Threads read and write side by side, a few pieces ahead of who takes them here.
    """
    read = disk.read if salvaged is None else salvaged.read

    def copy(offset: int, length: int) -> bytes:
        data = read(offset, length)
        if out.sparse:
            out.store(offset, data)
        return data

    waiting: deque[tuple[int, Callable[[], bytes | None]]] = deque()
    # What is filled with zeros is counted, which threads must not do side by side.
    pool = ThreadPoolExecutor(_WORKERS, "export", initializer=decode_here) if disk.eof == "strict" else None
    try:
        for offset, length, is_zero in _pieces(disk, salvaged):
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


_READ_AS_ZEROS = (Kind.ZERO, Kind.HOLE, Kind.MISSING)


def _pieces(disk: Disk, salvaged: SalvagedDisk | None) -> Iterator[tuple[int, int, bool]]:
    """Yield (offset, length, whether it reads as zeros); zeros as long as they are, other bytes cut."""
    most = max(_PIECE, *(layer.image.cluster_size for layer in images_of(disk)))
    # What is missing is an error for whoever reads it, unless the rest is wanted all the same.
    zeros = _READ_AS_ZEROS if salvaged is not None else _READ_AS_ZEROS[:2]
    extents = disk.extents() if salvaged is None else salvaged.extents()
    kinds = ((extent.kind in zeros, extent) for extent in extents)
    for is_zero, group in groupby(kinds, key=itemgetter(0)):
        start = end = -1
        for _, extent in group:
            start = extent.offset if start < 0 else start
            end = extent.offset + extent.length
        step = end - start if is_zero else most
        for offset in range(start, end, step):
            yield offset, min(step, end - offset), is_zero
