"""The account of an external data file: what the active state shows of it, and what it does not.

Every guest cluster has its place in the data file at its own guest offset, whether an entry shows it or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..census.arrays import I64, U64, Mask, Places, run_starts
from ..census.columns import BATCH, Columns
from ..census.mapped_tables import l2_columns, l2_offsets
from ..format.entries import SUBCLUSTERS
from ..format.image import Image
from ..format.source import Source
from ..reader.mapping import L1_PAGE, Mapping
from .labels import ByteKind, Label, Labels, Place
from .remainders import looked_at
from .tiling import Tile, joined

SHOWN, ZEROS, NOTHING, PAST_END = range(4)  # what the active state makes of a guest range


class Ranges(NamedTuple):
    """Guest ranges that the image does not show, one array a column, rising and apart from each other."""

    starts: Places
    stops: Places
    kinds: Places  # ZEROS, NOTHING or PAST_END


class DataFileAccount:
    """What each byte of an external data file is; remainders are read."""

    def __init__(self, image: Image, data: Source) -> None:
        self.image = image
        self.data = data
        labels = Labels()
        shown = labels.number(ByteKind.DATA, "active state")
        places = (Place.ZERO_FLAGGED, Place.UNMAPPED, Place.PAST_STATE_END)
        self._labels_of_kinds = np.asarray([shown, *map(labels.number, places)])
        self.labels: list[Label] = labels.all

    def tiles(self) -> Iterator[Tile]:
        """Yield what each byte of the file is, some L2 tables at a time."""
        image, size = self.image, self.data.size
        end, done = min(image.disk_size, size), 0
        mapping = Mapping(image, image.header.l1_table_offset, image.header.l1_size)
        for ranges in unshown(mapping, end, strict=False):
            if len(ranges.starts):
                yield self._tile(done, ranges)
                done = int(ranges.stops[-1])
        if done < size:
            last = [(end, end, NOTHING), (end, size, PAST_END)]  # what lies before the first range is shown
            yield self._tile(done, Ranges(*np.asarray(last).T))

    def _tile(self, done: int, ranges: Ranges) -> Tile:
        """Return ranges that are not shown, with what is shown before each."""
        before = np.append(done, ranges.stops[:-1])
        starts = np.column_stack((before, ranges.starts)).reshape(-1)
        stops = np.column_stack((ranges.starts, ranges.stops)).reshape(-1)
        kinds = np.column_stack((np.zeros_like(ranges.kinds), ranges.kinds)).reshape(-1)
        kept = stops > starts
        starts, stops, kinds = starts[kept], stops[kept], kinds[kept]
        claims: I64 = (kinds == SHOWN).astype(np.int64)
        rows = Tile(starts, stops, self._labels_of_kinds[kinds], claims, np.full(len(starts), -1))
        return joined(looked_at(self.data, rows, kinds != SHOWN))


def unshown(mapping: Mapping, end: int, strict: bool) -> Iterator[Ranges]:
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
        yield Ranges(*np.asarray([[done], [end], [NOTHING]]))


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


def _ranges(columns: Columns, unreadable: Mask, guests: Places, done: int, size: int) -> Ranges:
    """Return what the entries of some tables do not show, and the guest ranges before each table that have none."""
    if columns.bitmaps is None:
        shown = columns.present & ~columns.zero_flags & ~unreadable
        kinds = np.where(shown, SHOWN, np.where(columns.zero_flags & ~unreadable, ZEROS, NOTHING))
        starts = guests.reshape(-1)
    else:
        allocated, zeros = (_bits(word, unreadable) for word in (columns.allocated_bits, columns.zero_bits))
        kinds = np.where(allocated, SHOWN, np.where(zeros, ZEROS, NOTHING))
        size //= SUBCLUSTERS
        starts = (guests[:, :, None] + np.arange(SUBCLUSTERS) * size).reshape(-1)
    kinds = kinds.reshape(-1)
    stops = starts + size
    before = np.append(done, stops[:-1])  # where the cluster, or subcluster, before ends
    gaps = starts > before
    starts, stops = np.concatenate((before[gaps], starts)), np.concatenate((starts[gaps], stops))
    kinds = np.concatenate((np.full(int(gaps.sum()), NOTHING), kinds))
    order = np.argsort(starts, kind="stable")
    starts, stops, kinds = starts[order], stops[order], kinds[order]
    first = run_starts(kinds)
    last = np.append(first[1:], len(kinds)) - 1
    merged = Ranges(starts[first], stops[last], kinds[first])
    kept = merged.kinds != SHOWN
    return Ranges(*(column[kept] for column in merged))


def _bits(words: U64, unreadable: Mask) -> Mask:
    """Return the 32 bits of each word, lowest first, in a row of their own; none of an unreadable entry's."""
    bits = np.unpackbits(words.astype("<u4").reshape(-1).view(np.uint8), bitorder="little").reshape(*words.shape, 32)
    found: Mask = (bits != 0) & ~unreadable[:, :, None]
    return found


def _clipped(ranges: Ranges, end: int) -> Ranges:
    kept = ranges.starts < end
    return Ranges(ranges.starts[kept], np.minimum(ranges.stops[kept], end), ranges.kinds[kept])
