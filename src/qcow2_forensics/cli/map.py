"""``map``: where every guest range is stored, as ``qemu-img map`` shows it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..format.header import Crypt
from ..format.source import Source
from ..reader.disk import Disk, Layer, RawDisk, layers_of
from ..reader.host_holes import host_runs, looks_preallocated
from ..reader.mapping import Kind
from ..text import FORMATS, Column, hexadecimal, write_table
from . import add_format_argument, add_image_argument
from .options import add_disk_arguments, open_from

HELP = "show where guest ranges are stored"
DESCRIPTION = "Show for every guest range whether it is data, zeros or nothing, and where it is stored."
EPILOG = """examples:
  qcow2-forensics map disk.qcow2
  qcow2-forensics map disk.qcow2 --snapshot 1 --format json

The JSON has the fields of "qemu-img map --output=json", as QEMU 8.2 and later print it, and the same ranges.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``map`` takes."""
    add_image_argument(parser)
    add_disk_arguments(parser)
    add_format_argument(parser, FORMATS)


# Of each kind of extent: present, zero, data, compressed.
_SHOWN = {
    Kind.DATA: (True, False, True, False),
    Kind.ZERO: (True, True, False, False),
    Kind.HOLE: (False, True, False, False),
    Kind.COMPRESSED: (True, False, True, True),
    Kind.MISSING: (False, False, False, False),
}


class MapEntry(NamedTuple):
    """One row of ``qemu-img map --output=json``; ``offset`` is None where it has none."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None

    def to_dict(self) -> dict[str, int | bool]:
        row = self._asdict()
        if self.offset is None:
            del row["offset"]
        return row


def entries(disk: Disk) -> Iterator[MapEntry]:
    """Yield the rows of the map, neighbours that say the same joined as QEMU joins them."""
    if not disk.size:
        yield MapEntry(0, 0, 0, False, False, False, False, None)  # an empty disk is one empty row
    pending: MapEntry | None = None
    for entry in _pieces(disk):
        if pending is not None and _joins(pending, entry):
            pending = pending._replace(length=pending.length + entry.length)
            continue
        if pending is not None:
            yield pending
        pending = entry
    if pending is not None:
        yield pending


def _pieces(disk: Disk) -> Iterator[MapEntry]:
    layers = list(_layers(disk))
    for offset, length, kind, stored, depth in disk.extents():
        layer = layers[depth]
        host = None if layer.encrypted else stored
        whole = MapEntry(offset, length, depth, *_SHOWN[kind], host)
        if kind != Kind.DATA or host is None or layer.holes_of is None:
            yield whole
            continue
        # The file below may hold nothing there: bytes never written, or past its end.
        for run in host_runs(layer.holes_of, host, length):
            yield whole._replace(
                start=offset + run.offset - host,
                length=run.length,
                zero=run.is_hole,
                data=not run.is_hole or not layer.raw,
                offset=run.offset,
            )


class _Layer(NamedTuple):
    """What the map asks of one layer: the file to look for holes in, None not to look."""

    holes_of: Source | None
    raw: bool
    encrypted: bool


def _layers(top: Layer) -> Iterator[_Layer]:
    for layer in layers_of(top):
        if isinstance(layer, Disk):
            encrypted = layer.image.header.crypt_method != Crypt.NONE
            yield _Layer(layer.host if looks_preallocated(layer.image) else None, False, encrypted)
        else:
            yield _Layer(layer.source if isinstance(layer, RawDisk) else None, True, False)


def _joins(first: MapEntry, second: MapEntry) -> bool:
    if first.offset is None or second.offset is None:
        follows = first.offset is second.offset
    else:
        follows = first.offset + first.length == second.offset
    return follows and first[2:7] == second[2:7]


def run(args: argparse.Namespace) -> int:
    """Print the map of one disk."""
    with open_from(args) as disk:
        write_table((row.to_dict() for row in entries(disk)), _TABLE, args.format, sys.stdout, gap=" ")
    return 0


def _kind(row: Mapping[str, Any]) -> str:
    return "data" if row["data"] else "zero" if row["present"] else "absent"


_TABLE = (
    Column("start", "Start", lambda row: f"{row['start']:#x}", right=True, width=18),
    Column("length", "Length", lambda row: f"{row['length']:#x}", right=True, width=14),
    Column("kind", "Kind", _kind, width=8),
    Column("depth", "Depth", right=True, width=5),
    Column("offset", "Host offset", lambda row: hexadecimal(row.get("offset")), right=True, width=18),
)
