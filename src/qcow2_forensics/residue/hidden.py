"""Bytes of mapped clusters that no state shows: under zero flags, in dead subclusters, past the end.

What any live state shows is not residue, so the clusters every tree reads are gathered first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .. import structures
from ..census import Census, Tables
from ..host_holes import host_runs
from ..image import Image
from ..mapping import Kind, Mapping
from ..source import Source
from ..structures import SUBCLUSTERS
from .pieces import Piece
from .slack import piece_of
from .tables import Words

_ALL = np.uint64(0xFFFF_FFFF)
Flags = npt.NDArray[np.bool_]


def _offsets(batch: Tables) -> Words:
    """Return the host offsets of plain entries, 0 where there is none or the entry is compressed."""
    compressed = (batch.entries & np.uint64(structures.COMPRESSED)) != 0
    return np.where(compressed, np.uint64(0), batch.entries & np.uint64(structures.OFFSET_MASK))


def _zero_flags(batch: Tables) -> Flags:
    """Return which whole clusters read as zeros; extended entries have no such flag."""
    if batch.bitmaps is not None:
        return np.zeros(batch.entries.shape, np.bool_)
    compressed = (batch.entries & np.uint64(structures.COMPRESSED)) != 0
    flags: Flags = ~compressed & ((batch.entries & np.uint64(structures.ZERO)) != 0)
    return flags


def _snapshot(image: Image, batch: Tables, row: int) -> str:
    tree = int(batch.tree[row])
    return image.snapshots[tree].id if 0 <= tree < len(image.snapshots) else ""


def shown_clusters(census: Census) -> Flags:
    """Return, by seat in the census, whether some state reads (part of) a host cluster as data."""
    shown = np.zeros(census.seats.length, np.bool_)
    for batch in census.tables():
        offsets = np.where(_zero_flags(batch), np.uint64(0), _offsets(batch))
        if batch.bitmaps is not None:
            offsets = np.where((batch.bitmaps & _ALL) == 0, np.uint64(0), offsets)
        numbers = offsets[offsets != 0] >> np.uint64(batch.cluster_bits)
        shown[census.seats.of(np.minimum(numbers, np.uint64(census.clusters)))] = True
    return shown


def zero_flagged(image: Image, census: Census, data: Source | None = None) -> Iterator[Piece]:
    """Yield clusters whose entry says zeros while their bytes are still there.

    With an external data file the bytes are in ``data``, at the guest's own offset.
    """
    external = image.header.external_data
    if image.header.version < 3 or image.header.extended_l2 or (external and data is None):
        return
    size = image.cluster_size
    shown = np.zeros(0, np.bool_) if external else shown_clusters(census)
    host: Source | Image = data if external and data is not None else image
    seen = np.zeros(len(shown), np.bool_)
    for batch in census.tables():
        offsets = _offsets(batch)
        wanted = _zero_flags(batch) & (offsets != 0) & (offsets & np.uint64(size - 1) == 0)
        for row, column in batch.where(wanted):
            offset = int(offsets[row, column])
            if not external:
                if offset // size >= census.clusters:
                    continue
                seat = census.seats.at(offset // size)
                if shown[seat] or seen[seat]:
                    continue
                seen[seat] = True
            piece = piece_of(host.read(offset, size), offset, "zero-flagged")
            if piece is not None:
                guest = batch.guest_offset(row, column) + piece.offset - offset
                where = "data" if external else ""
                yield replace(piece, guest_offset=guest, snapshot=_snapshot(image, batch, row), file=where)


class _Partial(NamedTuple):
    """A mapped cluster of which some subclusters are allocated, and where it was first seen."""

    allocated: int
    guest_offset: int
    snapshot: str


def subclusters(image: Image, census: Census) -> Iterator[Piece]:
    """Yield bytes in subclusters that no state allocates, of clusters that are mapped (extended L2)."""
    if not image.header.extended_l2 or image.header.external_data:
        return
    size = image.cluster_size
    part = size // SUBCLUSTERS
    for host, cluster in _partial_clusters(image, census).items():
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


def _partial_clusters(image: Image, census: Census) -> dict[int, _Partial]:
    """Return, per host offset, the mapped clusters no state shows whole."""
    found: dict[int, _Partial] = {}
    seats = census.seats
    whole = np.zeros(seats.length, np.bool_)
    for batch in census.tables():
        if batch.bitmaps is None:
            continue
        offsets, bits = _offsets(batch), batch.bitmaps & _ALL
        placed = (offsets != 0) & (offsets & np.uint64(image.cluster_size - 1) == 0)
        placed &= offsets < np.uint64(image.file_size)
        whole[seats.of(offsets[placed & (bits == _ALL)] >> np.uint64(batch.cluster_bits))] = True
        for row, column in batch.where(placed & (bits != _ALL)):
            host = int(offsets[row, column])
            known = found.get(host)
            if known is not None:
                found[host] = known._replace(allocated=known.allocated | int(bits[row, column]))
            else:
                guest = batch.guest_offset(row, column)
                found[host] = _Partial(int(bits[row, column]), guest, _snapshot(image, batch, row))
    return {host: cluster for host, cluster in found.items() if not whole[seats.at(host >> image.header.cluster_bits)]}


def tail(image: Image, census: Census) -> Iterator[Piece]:
    """Yield what stands behind the end of the disk in its last, partly visible cluster."""
    header = image.header
    inside = image.disk_size % image.cluster_size
    if not inside or header.version == 1 or header.external_data or header.crypt_method:
        return
    slot, column = divmod(image.disk_size // image.cluster_size, header.l2_entries)
    for batch in census.tables():
        for row in np.flatnonzero((batch.index == slot) & (batch.active > 0)).tolist():
            host = int(_offsets(batch)[row, column])
            if host and not _zero_flags(batch)[row, column]:
                start = host + inside
                piece = piece_of(image.read(start, image.cluster_size - inside), start, "beyond-disk")
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
