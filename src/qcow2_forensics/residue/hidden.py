"""Bytes of mapped clusters that no state shows: under zero flags, in dead subclusters, past the end.

What any live state shows is not residue, so the clusters every tree reads are gathered first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..host_holes import host_runs
from ..image import Image
from ..mapping import Kind, Mapping
from ..source import Source
from ..structures import SUBCLUSTERS
from .pieces import Piece
from .slack import piece_of
from .trees import live_tables

_ALL = np.uint64(0xFFFF_FFFF)


def shown_clusters(image: Image) -> npt.NDArray[np.bool_]:
    """Return, for each host cluster of the file, whether some state reads (part of) it as data."""
    count = -(-image.file_size // image.cluster_size)
    shown = np.zeros(count + 1, np.bool_)
    for table in live_tables(image):
        columns = table.columns
        offsets = np.where(columns.zero_flags, np.uint64(0), columns.offsets)
        if columns.bitmaps is not None:
            offsets = np.where((columns.bitmaps & _ALL) == 0, np.uint64(0), offsets)
        numbers = offsets // np.uint64(image.cluster_size)
        shown[np.minimum(numbers, np.uint64(count)).astype(np.intp)] = True
    shown[0] = False
    return shown


def zero_flagged(image: Image, shown: npt.NDArray[np.bool_], data: Source | None = None) -> Iterator[Piece]:
    """Yield clusters whose entry says zeros while their bytes are still there.

    With an external data file the bytes are in ``data``, at the guest's own offset.
    """
    if image.header.version < 3 or image.header.extended_l2:
        return
    size = image.cluster_size
    external = image.header.external_data
    host: Source | Image = data if external and data is not None else image
    if external and data is None:
        return
    seen: set[int] = set()
    for table in live_tables(image):
        columns = table.columns
        offsets = columns.offsets
        for index in np.flatnonzero(columns.zero_flags & (offsets != 0)).tolist():
            offset = int(offsets[index])
            if offset in seen or offset % size or (not external and _is_shown(shown, offset // size)):
                continue
            seen.add(offset)
            piece = piece_of(host.read(offset, size), offset, "zero-flagged")
            if piece is not None:
                guest = table.guest_offset + index * size + piece.offset - offset
                where = "data" if external else ""
                yield replace(piece, guest_offset=guest, snapshot=table.state.name, file=where)


def _is_shown(shown: npt.NDArray[np.bool_], number: int) -> bool:
    return number >= len(shown) or bool(shown[number])


class _Partial(NamedTuple):
    """A mapped cluster of which some subclusters are allocated, and where it was first seen."""

    allocated: int
    guest_offset: int
    snapshot: str


def subclusters(image: Image) -> Iterator[Piece]:
    """Yield bytes in subclusters that no state allocates, of clusters that are mapped (extended L2)."""
    if not image.header.extended_l2 or image.header.external_data:
        return
    size = image.cluster_size
    part = size // SUBCLUSTERS
    for host, cluster in _partial_clusters(image).items():
        data = image.read(host, size)
        at = 0
        while at < SUBCLUSTERS:
            stop = at
            while stop < SUBCLUSTERS and not cluster.allocated >> stop & 1:
                stop += 1
            if stop > at:
                guest = cluster.guest_offset + at * part
                piece = piece_of(data[at * part : stop * part], host + at * part, "subcluster")
                if piece is not None:
                    yield replace(piece, guest_offset=guest, snapshot=cluster.snapshot)
            at = stop + 1


def _partial_clusters(image: Image) -> dict[int, _Partial]:
    """Return, per host offset, the mapped clusters no state shows whole."""
    size = image.cluster_size
    found: dict[int, _Partial] = {}
    whole: set[int] = set()
    for table in live_tables(image):
        offsets, bitmaps = table.columns.offsets, table.columns.bitmaps
        if bitmaps is None:
            continue
        bits = bitmaps & _ALL
        whole.update(offsets[(bits == _ALL) & (offsets != 0)].tolist())
        for index in np.flatnonzero((bits != _ALL) & (offsets != 0)).tolist():
            host = int(offsets[index])
            known = found.get(host)
            if known is not None:
                found[host] = known._replace(allocated=known.allocated | int(bits[index]))
            elif host % size == 0:
                found[host] = _Partial(int(bits[index]), table.guest_offset + index * size, table.state.name)
    return {host: cluster for host, cluster in found.items() if host not in whole}


def tail(image: Image) -> Iterator[Piece]:
    """Yield what stands behind the end of the disk in its last, partly visible cluster."""
    header = image.header
    inside = image.disk_size % image.cluster_size
    if not inside or header.version == 1 or header.external_data or header.crypt_method:
        return
    guest = image.disk_size - inside
    for table in live_tables(image):
        index = (guest - table.guest_offset) // image.cluster_size
        if table.state.snapshot is None and 0 <= index < len(table.columns.entries):
            if not table.columns.zero_flags[index] and (host := int(table.columns.offsets[index])):
                start = host + inside
                data = image.read(start, image.cluster_size - inside)
                piece = piece_of(data, start, "beyond-disk")
                if piece is not None:
                    yield replace(piece, guest_offset=image.disk_size + piece.offset - start)
            return


def data_file_residue(image: Image, data: Source) -> Iterator[Piece]:
    """Yield bytes of an external data file that the image does not show.

    ``kind`` is ``zero-flagged`` where an entry says zeros, ``unmapped`` where the image has
    nothing, and ``beyond-disk`` behind the disk. Each piece is one cluster at most.
    """
    size = image.cluster_size
    mapping = Mapping(image, image.header.l1_table_offset, image.header.l1_size)
    for run in mapping.runs(0, image.disk_size):
        if run.kind in (Kind.HOLE, Kind.ZERO):
            kind = "zero-flagged" if run.kind == Kind.ZERO else "unmapped"
            for piece in _nonzero(data, run.offset, run.length, size, kind):
                yield replace(piece, guest_offset=piece.offset)
    yield from _nonzero(data, image.disk_size, data.size - image.disk_size, size, "beyond-disk")


def _nonzero(data: Source, offset: int, length: int, size: int, kind: str) -> Iterator[Piece]:
    for run in host_runs(data, offset, min(length, data.size - offset)) if length > 0 else ():
        if run.is_hole:
            continue
        at = run.offset
        while at < run.offset + run.length:
            count = min(size - at % size, run.offset + run.length - at)
            piece = piece_of(data.read(at, count), at, kind)
            if piece is not None:
                yield replace(piece, file="data")
            at += count
