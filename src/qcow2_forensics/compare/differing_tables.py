"""Guest ranges that the L2 tables of two mappings do not prove equal, found a batch of tables at a time.

A small file can hold tables in which every entry differs in kind from the one before, and two states can
have different tables that mean the same. Run by run that is millions of steps::

    before   T1: [ A | - | 0 | B ]          A, B clusters in the file, - nothing, 0 zeros
    after    T2: [ A | 0 | - | C ]    ->    only the last one is left open
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..census.arrays import U64, Mask, Places
from ..census.columns import BATCH, without_copied
from ..census.mapped_tables import l2_columns, l2_offsets
from ..errors import Qcow2Error
from ..format.header import SECTOR
from ..reader.mapping import L1_PAGE, Mapping

_NEAR = 16  # clusters between two open ones that are left open with them: beginning anew costs more
_DATA, _BLANK = 2, 1  # bits of a code that no cluster offset has


class DifferingTables:
    """Compares two mappings of equal geometry; without a second one, the first with one that maps nothing.

    Of one file, clusters at one place are equal, and so are tables; of two files only zeros are. From
    guest offset ``blank_from`` on, mapping nothing reads as zeros in both.
    """

    def __init__(self, first: Mapping, second: Mapping | None, *, one_file: bool, blank_from: int) -> None:
        self._mappings = first, second
        self._one_file = one_file
        self._blank_from = blank_from
        self._span, self._size = first.table_span, first.cluster_size
        self._width = self._span // self._size  # clusters under one table
        self._rows = max(1, BATCH // (8 * self._width))
        self._proven: tuple[U64, U64] | None = None  # L1 entries all of which were found equal

    def ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield rising guest ranges (start, end), whole clusters but at the edges, that are left open."""
        mapped = max(mapping.l1_size for mapping in self._mappings if mapping is not None)
        first, last = start // self._span, min(-(-end // self._span), mapped)  # past both tables nothing is mapped
        for page in range(first // L1_PAGE, -(-last // L1_PAGE) if first < last else 0):
            low, high = max(first, page * L1_PAGE), min(last, (page + 1) * L1_PAGE)
            for left, right in self._page(page, low, high):
                if max(start, left) < min(end, right):
                    yield max(start, left), min(end, right)

    def _page(self, page: int, low: int, high: int) -> Iterator[tuple[int, int]]:
        try:
            tables = [l2_offsets(mapping, page) for mapping in self._mappings]
        except Qcow2Error:  # reported where the range is looked at
            yield low * self._span, high * self._span
            return
        part = slice(low - page * L1_PAGE, high - page * L1_PAGE)
        one, two = tables[0][part], tables[1][part]
        if self._proven is not None and np.array_equal(self._proven[0], one) and np.array_equal(self._proven[1], two):
            return  # L1 tables of megabytes repeat themselves
        slots = np.flatnonzero(one != two if self._one_file else (one | two) != 0)
        slots = slots[~self._repeats(slots + low, one[slots], two[slots])]
        self._proven = (one, two) if not len(slots) else None
        for at in range(0, len(slots), self._rows):
            chosen = slots[at : at + self._rows]
            try:
                clusters, left_open, _ = self._look(chosen + low, one[chosen], two[chosen])
            except Qcow2Error:
                for slot in (chosen + low).tolist():
                    yield slot * self._span, (slot + 1) * self._span
                continue
            found = clusters[left_open]
            if len(found):
                edges = np.flatnonzero(np.diff(found) > _NEAR)
                starts, stops = np.append(found[:1], found[edges + 1]), np.append(found[edges], found[-1:])
                for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                    yield start * self._size, (stop + 1) * self._size

    def _repeats(self, slots: Places, one: U64, two: U64) -> Mask:
        """Return which slots hold a pair of tables that other slots hold too and that is equal throughout."""
        order = np.lexsort((two, one))
        fresh = np.append(True, (np.diff(one[order]) != 0) | (np.diff(two[order]) != 0))[: len(order)]
        firsts = order[fresh]
        same = np.zeros(len(firsts), dtype=np.bool_)
        if 2 * len(firsts) <= len(slots):  # else looking at each costs no more
            for at in range(0, len(firsts), self._rows):
                chosen = firsts[at : at + self._rows]
                try:
                    _, left_open, placed = self._look(slots[chosen], one[chosen], two[chosen])
                except Qcow2Error:
                    continue  # reported when their turn comes
                same[at : at + self._rows] = ~(left_open | placed).any(axis=1)
        found = np.zeros(len(slots), dtype=np.bool_)
        found[order] = same[np.cumsum(fresh) - 1]
        return found

    def _look(self, slots: Places, one: U64, two: U64) -> tuple[U64, Mask, Mask]:
        """Return the guest clusters under some L1 slots, which of them are left open, and which answers hold only there."""
        clusters = (slots[:, None] * self._width + np.arange(self._width)).astype(np.uint64)
        blank = slots * self._span >= self._blank_from
        first, unsound, placed = _codes(self._mappings[0], one, clusters, blank)
        second, unsound_too, placed_too = _codes(self._mappings[1], two, clusters, blank)
        left_open = (first != second if self._one_file else (first | second) != 0).any(axis=2)
        return clusters, left_open | unsound | unsound_too, placed | placed_too


def _codes(mapping: Mapping | None, tables: U64, clusters: U64, blank: Mask) -> tuple[U64, Mask, Mask]:
    """Return two words for each cluster, equal where it reads equal, and which of them these words do not decide.

    ``(tables, entries, 2)`` and twice ``(tables, entries)``. Zeros are 0, and so is what maps nothing in the rows
    of ``blank``. The second mask says which entries are right for these clusters only: those that name a place in
    an external data file.
    """
    codes = np.zeros((*clusters.shape, 2), dtype=np.uint64)
    nowhere = np.zeros(clusters.shape, dtype=np.bool_)
    if mapping is None:
        return codes, nowhere, nowhere
    columns, lost = l2_columns(mapping, tables)
    if mapping.version == 1:
        codes[:, :, 0] = columns.entries
        unaligned = (columns.hosts & np.uint64(SECTOR - 1)) != 0
        return codes, unaligned | lost[:, None], nowhere
    hosts, packed, stored = columns.hosts, columns.compressed, columns.present
    if mapping.data_file:
        unsound = packed | (stored & (hosts != clusters << np.uint64(mapping.cluster_bits)))
    else:
        unsound = (hosts & np.uint64(mapping.cluster_size - 1)) != 0
    shown = ~blank[:, None].repeat(clusters.shape[1], axis=1)  # where zeros hide what a backing file holds
    if columns.bitmaps is not None:
        data_bits, zero_bits = columns.allocated_bits, columns.zero_bits
        unsound |= ~packed & (((data_bits & zero_bits) != 0) | ((data_bits != 0) & ~stored))
        codes[:, :, 0] = np.where(data_bits != 0, hosts | np.uint64(_DATA), np.uint64(0))
        codes[:, :, 1] = np.where(packed, np.uint64(0), data_bits | np.where(shown, zero_bits << np.uint64(32), 0))
    else:
        zero = columns.zero_flags
        if mapping.version < 3:
            unsound |= zero
        plain = np.where(stored, hosts | np.uint64(_DATA), np.uint64(0))
        codes[:, :, 0] = np.where(zero, np.where(shown, np.uint64(_BLANK), np.uint64(0)), plain)
    codes[:, :, 0] = np.where(packed, without_copied(columns.entries), codes[:, :, 0])
    return codes, unsound | lost[:, None], stored if mapping.data_file else nowhere
