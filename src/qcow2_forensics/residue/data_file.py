"""Bytes of an external data file that the image does not show.

Every guest cluster has its place in the data file at its own guest offset, whether an entry shows it or not::

    L2 entries   [ data | zeros | nothing | data ]
    data file    | .... | xxxxx | ....... | .... |  xxxxx     x: bytes nobody is shown
                          zero-flagged               beyond-disk
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..census.columns import U64, Columns, Mask, Places
from ..census.mapped_tables import BATCH, l2_columns, l2_offsets
from ..format.entries import SUBCLUSTERS
from ..format.image import Image
from ..format.source import Source
from ..reader.host_holes import host_runs
from ..reader.mapping import L1_PAGE, Mapping
from .host_ranges import HostRange, pieces
from .model import Piece

_SHOWN, _ZEROS, _NOTHING = range(3)
_KINDS = {_ZEROS: "zero-flagged", _NOTHING: "unmapped"}


class _Ranges(NamedTuple):
    """Guest ranges that the image does not show, one array a column, rising and apart from each other."""

    starts: Places
    stops: Places
    kinds: Places  # _ZEROS or _NOTHING


def data_file_residue(image: Image, data: Source, *, strict: bool = True) -> Iterator[Piece]:
    """Yield bytes of an external data file that the image does not show.

    ``kind`` is ``zero-flagged`` where an entry says zeros, ``unmapped`` where the image has nothing, and
    ``beyond-disk`` behind the disk. An entry that cannot be read raises
    :class:`FormatError` where its turn comes; when not ``strict`` it shows nothing.
    """
    ranges = _hidden(image, data, strict)
    for piece in pieces(data.read, ranges, image.cluster_size):
        yield replace(piece, file="data")


def _hidden(image: Image, data: Source, strict: bool) -> Iterator[HostRange]:
    """Yield the ranges of the data file that the image does not show and that may hold bytes."""
    end = min(image.disk_size, data.size)
    mapping = Mapping(image, image.header.l1_table_offset, image.header.l1_size)
    for ranges in _unshown(mapping, end, strict):
        yield from _stored(data, ranges, image.cluster_size)
    if data.size > image.disk_size:
        behind = np.asarray([[image.disk_size], [data.size], [_NOTHING]])
        for found in _stored(data, _Ranges(*behind), image.cluster_size):
            yield found._replace(kind="beyond-disk", guest_offset=None)


def _unshown(mapping: Mapping, end: int, strict: bool) -> Iterator[_Ranges]:
    """Yield what the active state does not show up to a guest offset, a batch of L2 tables at a time."""
    span = mapping.table_span
    slots = min(mapping.l1_size, -(-end // span))
    rows = max(1, BATCH // (mapping.image.header.l2_entries * mapping.image.header.l2_entry_size))
    done = 0  # guest offset up to which everything was looked at
    for page in range(-(-slots // L1_PAGE)):
        tables = l2_offsets(mapping, page)[: slots - page * L1_PAGE]
        used = np.flatnonzero(tables)
        for at in range(0, len(used), rows):
            some = used[at : at + rows]
            starts = (some + page * L1_PAGE) * span
            columns, lost = l2_columns(mapping, tables[some])
            guests = starts[:, None] + np.arange(columns.entries.shape[1]) * mapping.cluster_size
            unreadable = _unreadable(columns, guests) | lost[:, None]
            stop = int(starts[-1]) + span
            broken = [int(guest) for guest in guests[unreadable][:1]] if strict else []
            found = _ranges(columns, unreadable, guests, done, mapping.cluster_size)
            yield _clipped(found, min([end, *broken]))
            for guest in broken:
                for _ in mapping.runs(guest, mapping.cluster_size):
                    pass  # raises the error that names the entry
            done = stop
    if done < end:
        yield _Ranges(*np.asarray([[done], [end], [_NOTHING]]))


def _unreadable(columns: Columns, guests: Places) -> Mask:
    """Return which entries QEMU cannot read beside a data file."""
    bad = columns.compressed.copy()
    present = columns.present
    if columns.bitmaps is None:
        present = present & ((columns.hosts != 0) | ~columns.zero_flags)
        if columns.entry_format.version < 3:
            bad |= columns.zero_flags
    else:
        allocated = columns.allocated_bits
        bad |= ((allocated & columns.zero_bits) != 0) | ((allocated != 0) & ~present)
    bad |= present & (columns.hosts != guests.astype(np.uint64))
    return bad


def _ranges(columns: Columns, unreadable: Mask, guests: Places, done: int, size: int) -> _Ranges:
    """Return what the entries of some tables do not show, and the guest ranges before each table that have none."""
    if columns.bitmaps is None:
        shown = columns.present & ~columns.zero_flags & ~unreadable
        kinds = np.where(shown, _SHOWN, np.where(columns.zero_flags & ~unreadable, _ZEROS, _NOTHING))
        starts = guests.reshape(-1)
    else:
        allocated, zeros = (_bits(word, unreadable) for word in (columns.allocated_bits, columns.zero_bits))
        kinds = np.where(allocated, _SHOWN, np.where(zeros, _ZEROS, _NOTHING))
        size //= SUBCLUSTERS
        starts = (guests[:, :, None] + np.arange(SUBCLUSTERS) * size).reshape(-1)
    kinds = kinds.reshape(-1)
    stops = starts + size
    before = np.append(done, stops[:-1])  # where the cluster, or subcluster, before ends
    gaps = starts > before
    starts, stops = np.concatenate((before[gaps], starts)), np.concatenate((starts[gaps], stops))
    kinds = np.concatenate((np.full(int(gaps.sum()), _NOTHING), kinds))
    order = np.argsort(starts, kind="stable")
    starts, stops, kinds = starts[order], stops[order], kinds[order]
    first = np.append(True, kinds[1:] != kinds[:-1])
    last = np.append(first[1:], True)
    merged = _Ranges(starts[first], stops[last], kinds[first])
    kept = merged.kinds != _SHOWN
    return _Ranges(*(column[kept] for column in merged))


def _bits(words: U64, unreadable: Mask) -> Mask:
    """Return the 32 bits of each word, lowest first, in a row of their own; none of an unreadable entry's."""
    bits = np.unpackbits(words.astype("<u4").reshape(-1).view(np.uint8), bitorder="little").reshape(*words.shape, 32)
    found: Mask = (bits != 0) & ~unreadable[:, :, None]
    return found


def _clipped(ranges: _Ranges, end: int) -> _Ranges:
    kept = ranges.starts < end
    return _Ranges(ranges.starts[kept], np.minimum(ranges.stops[kept], end), ranges.kinds[kept])


def _stored(data: Source, ranges: _Ranges, size: int) -> Iterator[HostRange]:
    """Yield the ranges of the data file, without the clusters of them that the file system keeps as holes."""
    if not len(ranges.starts):
        return
    first, last = int(ranges.starts[0]), int(ranges.stops[-1])
    done = first
    for run in host_runs(data, first, last - first):
        # Holes may be smaller than a cluster.
        begin, end = max(done, run.offset // size * size), -(-(run.offset + run.length) // size) * size
        if run.is_hole or begin >= end:
            continue
        done = end
        low = int(np.searchsorted(ranges.stops, begin, side="right"))
        high = int(np.searchsorted(ranges.starts, end, side="left"))
        columns = (column[low:high].tolist() for column in ranges)
        for start, stop, kind in zip(*columns, strict=True):
            at, until = max(start, begin), min(stop, end)
            yield HostRange(at, until - at, _KINDS[kind], at)
