"""Turns a guest range into runs that tile it exactly: data, zeros, unallocated, compressed.

A :class:`Mapping` is one L1 table, the active one or a snapshot's, and the L2 tables under it.
Tables are read in slices on first use and kept, within a budget, as arrays of integers.

::

    guest offset  ->  L1 index | L2 index | offset in cluster
                         |          |
                     L1 entry -> L2 entry -> host cluster, zeros, nothing, or a compressed stream
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import TypeAlias

from ..errors import FormatError
from ..format.entries import COPIED, OFFSET_MASK, named_offset, parse_entries
from ..format.image import Image
from ..limits import Budget, KiB
from .broken_tables import BrokenTables
from .cache import Fifo
from .l2_runs import HIGHEST, extended_runs, qcow1_runs, sequence_end, standard_runs
from .runs import L1_PAGE, Kind, Run, coalesced

__all__ = ["L1_PAGE", "Kind", "Mapping", "PlainRun", "Run"]

_SLICE_BYTES = 64 * KiB  # of an L2 table, read and cached together
_LEAST_SLICE = 4 * 512  # what a smaller one counts: the smallest are a quarter, which the budget allows for
_EMPTY_L1_PAGE = array("Q", bytes(8 * L1_PAGE))  # one for all that lie past the end: a header may claim thousands

Slice: TypeAlias = "array[int]"
PlainRun: TypeAlias = tuple[int, int, int]  # guest start, guest end, and what to add for the host offset


class Mapping:
    """The guest-to-host mapping of one L1 table.

    ``eof_zeros`` gives QEMU's answer for tables past the end of the file: zeros, so nothing is
    mapped there. Without it they are a :class:`FormatError`. ``filled_tables`` counts them.
    """

    def __init__(self, image: Image, l1_table_offset: int, l1_size: int, *, eof_zeros: bool = False) -> None:
        header = image.header
        self.image = image
        self.l1_table_offset = l1_table_offset
        self.l1_size = l1_size
        self.filled_tables = 0
        self._eof_zeros = eof_zeros
        self.version = header.version
        self.data_file = header.external_data
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self._entry_words = header.l2_entry_size // 8
        self._table_bytes = header.l2_entries * header.l2_entry_size
        slice_entries = min(header.l2_entries, _SLICE_BYTES // header.l2_entry_size)
        self._slices_per_table = header.l2_entries // slice_entries
        self.slice_mask = slice_entries - 1
        self.slice_shift = self.cluster_bits + slice_entries.bit_length() - 1
        self.slice_span = 1 << self.slice_shift
        self._slice_bytes = slice_entries * header.l2_entry_size
        self.table_span = header.l2_span  # guest bytes under one L1 entry
        self._cache: Fifo[int, Slice] = Fifo(max(16, image.limits.table_cache_bytes // self._slice_bytes))
        self.slices = self._cache.entries  # guest slice number -> its entries, empty where no L2 table is
        # All pages of what QEMU takes; version 1 may have an L1 table of 2 GiB.
        self._l1_pages: Fifo[int, Slice] = Fifo(max(4, image.limits.l1_bytes // (L1_PAGE * 8)))
        self._broken = BrokenTables()
        # Bits that make an entry anything but a stored cluster; all of them where the format is not the plain one.
        self.not_plain = ~(COPIED | OFFSET_MASK) & (2**64 - 1) | HIGHEST | (OFFSET_MASK & (self.cluster_size - 1))
        if self.version == 1 or header.extended_l2 or self.data_file:
            self.not_plain = 2**64 - 1
        # No bound method, which would be a cycle: files would stay open until it is collected.
        self._scan: Callable[[Mapping, Slice, int, int, int], Iterator[Run]]
        if self.version == 1:
            self._scan = qcow1_runs
        else:
            self._scan = extended_runs if header.extended_l2 else standard_runs

    # --- tables --------------------------------------------------------------------------------

    def l1_page(self, number: int) -> Slice:
        """Return entries ``number * 8192`` onwards of the L1 table.

        Fewer at its end, and where the file ends inside the table: :meth:`l1_entry` then raises.
        """
        page = self._l1_pages.entries.get(number)
        if page is None:
            first = number * L1_PAGE
            offset = self.l1_table_offset + first * 8
            count = max(0, min(L1_PAGE, self.l1_size - first))
            if not self._eof_zeros:
                count = min(count, max(0, self.image.file_size - offset) // 8)
            if count == L1_PAGE and self._eof_zeros and offset >= self.image.file_size:
                self.filled_tables += 1
                page = _EMPTY_L1_PAGE
            else:
                page = self._load(offset, count, "the L1 table")
            self._l1_pages.add(number, page)
        return page

    def l1_entry(self, index: int) -> int:
        """Return an L1 entry; 0 past the end of the table."""
        if not 0 <= index < self.l1_size:
            return 0
        page = self.l1_page(index // L1_PAGE)
        if index % L1_PAGE >= len(page):
            raise self._bad_l1(index, "lies past the end of the file")
        return page[index % L1_PAGE]

    def l2_table_offset(self, index: int) -> int:
        """Return the host offset of the L2 table in an L1 slot, 0 for none; checked for alignment."""
        entry = self.l1_entry(index)
        if not entry:
            return 0
        offset = self.table_of(entry)
        if self.version == 1:
            if entry > 2**63 - 1 - self._table_bytes:
                raise self._bad_l1(index, "is beyond any file")
        elif offset & (self.cluster_size - 1):
            raise self._bad_l1(index, "names an unaligned L2 table")
        return offset

    def _bad_l1(self, index: int, what: str) -> FormatError:
        at = self.l1_table_offset + index * 8
        return FormatError(f"L1[{index}] {what}", offset=at, field="l1_entry")

    def slice(self, number: int) -> Slice:
        """Return the entries of guest slice ``number``; empty where there is no L2 table, or nothing of it."""
        entries = self.slices.get(number)
        if entries is None:
            l1_index, part = divmod(number, self._slices_per_table)
            table = self.l2_table_offset(l1_index)
            offset = table + part * self._slice_bytes
            if not table:
                entries = array("Q")
            elif self._eof_zeros and offset >= self.image.file_size:
                self.filled_tables += 1
                entries = array("Q")
            else:
                entries = self._load(offset, self._slice_bytes // 8, f"the L2 table of L1[{l1_index}]")
            self._cache.add(number, entries)
        return entries

    def _load(self, offset: int, count: int, structure: str) -> Slice:
        if self._eof_zeros and offset + count * 8 > self.image.file_size:
            self.filled_tables += 1
            return parse_entries(self.image.read(offset, count * 8).ljust(count * 8, b"\0"))
        return self.image.table(offset, count, structure)

    # --- runs ----------------------------------------------------------------------------------

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """Yield runs that tile ``[offset, offset + length)`` exactly, coalesced.

        The range may reach past the L1 table: nothing is mapped there. Raises
        :class:`FormatError` at the first cluster that cannot be read, naming its entry, and
        :class:`LimitExceeded` where more tables are named than the file has room for.
        """
        return coalesced(self._pieces(offset, length))

    def _pieces(self, offset: int, length: int) -> Iterator[Run]:
        end = offset + length
        budget: Budget | None = None
        while offset < end:
            number = offset >> self.slice_shift
            entries = self.slices.get(number)
            if entries is None:
                filled = self.filled_tables
                entries = self.slice(number)
                # Within one range each table that QEMU wrote is read once; past the end of the file nothing is.
                budget = budget or Budget("bytes of L2 tables under one range", self.image.file_size, self.image.limits)
                if entries and self.filled_tables == filled:
                    budget.spend(max(self._slice_bytes, _LEAST_SLICE))
            if entries:
                stop = min(end, (number + 1) << self.slice_shift)
                yield from self._scan(self, entries, number, offset, stop)
            else:
                stop = min(end, self._next_table(offset, end))
                yield Run(offset, stop - offset, Kind.HOLE)
            offset = stop

    def broken_until(self, offset: int, end: int) -> int:
        """Return how far from ``offset``, and at most to ``end``, nothing can be mapped; ``offset`` where it can."""
        return self._broken.until(self, offset, end)

    def table_of(self, l1_entry: int) -> int:
        """Return the host offset of the L2 table that an L1 entry names, 0 for none; not checked."""
        return l1_entry if self.version == 1 else named_offset(l1_entry)

    def is_lost(self, table: int) -> bool:
        """Whether no L2 table can be read at this host offset, whatever it holds."""
        if self.version == 1 and table > 2**63 - 1 - self._table_bytes:
            return True
        if self.version != 1 and table & (self.cluster_size - 1):
            return True
        return not self._eof_zeros and table + self._slice_bytes > self.image.file_size

    def _next_table(self, offset: int, end: int = 2**64) -> int:
        """Return where the range without L2 tables around ``offset`` ends, or a place past ``end``."""
        index = offset // self.table_span + 1
        while index < self.l1_size and index * self.table_span < end:
            page = self.l1_page(index // L1_PAGE)
            first = index % L1_PAGE
            if page is not _EMPTY_L1_PAGE and any(page):
                for at in range(first, len(page)):
                    if page[at]:
                        return (index - first + at) * self.table_span
            if index - first + len(page) < min(self.l1_size, index - first + L1_PAGE):
                return (index - first + max(first, len(page))) * self.table_span  # cut off by the end of the file
            index += L1_PAGE - first
        return 2**64

    def shared_until(self, other: Mapping, offset: int) -> int:
        """Return where the two mappings first name different L2 tables, at or after ``offset``.

        ``offset`` itself when its own L2 table differs. Both must map the same file: what they
        share is then equal byte for byte, whether it can be read or not. Costs L1 pages only.
        """
        index = offset // self.table_span
        while index < max(self.l1_size, other.l1_size):
            number, first = divmod(index, L1_PAGE)
            mine, theirs = self._whole_l1_page(number), other._whole_l1_page(number)
            if mine is None or theirs is None:
                return max(offset, index * self.table_span)  # cut off by the end of the file
            if mine != theirs:
                for at in range(first, max(len(mine), len(theirs))):
                    one = mine[at] if at < len(mine) else 0
                    two = theirs[at] if at < len(theirs) else 0
                    if one != two and self.table_of(one) != self.table_of(two):
                        return max(offset, (index - first + at) * self.table_span)
            index += L1_PAGE - first
        return 2**64

    def unmapped_until(self, offset: int) -> int:
        """Return where the range without L2 tables at ``offset`` ends; ``offset`` itself in a mapped one.

        Where the L1 table cannot be read the range ends: what is there is for :meth:`runs` to say.
        """
        try:
            if self.l1_entry(offset // self.table_span):
                return offset
            return self._next_table(offset)
        except FormatError:
            return offset

    def _whole_l1_page(self, number: int) -> Slice | None:
        """Return an L1 page, empty past the table, None where the file ends inside it."""
        count = min(L1_PAGE, self.l1_size - number * L1_PAGE)
        page = self.l1_page(number) if count > 0 else array("Q")
        return page if len(page) == max(0, count) else None

    def plain_run(self, offset: int, wanted: int) -> PlainRun | None:
        """Return the clusters around ``offset`` that are simply stored, one after the other in the file.

        Looks ahead for ``wanted`` bytes, to the end of one slice at most. None where the cluster is
        anything else: then :meth:`runs` knows what it is.
        """
        number = offset >> self.slice_shift
        entries = self.slices.get(number)
        if entries is None:
            entries = self.slice(number)
        if not entries:
            return None
        bits, size = self.cluster_bits, self.cluster_size
        index = (offset >> bits) & self.slice_mask
        entry = entries[index]
        host = entry & OFFSET_MASK
        if not host or entry & self.not_plain:
            return None
        start = offset & -size
        stop = min(len(entries), index + 1 + ((offset + wanted - 1 - start) >> bits))
        end = start + ((sequence_end(entries, index + 1, stop, size) - index) << bits)
        return start, end, host - start

    def entry_offset(self, offset: int) -> int | None:
        """Return the file offset of the L2 entry for a guest offset, None without an L2 table."""
        number = offset >> self.slice_shift
        l1_index, part = divmod(number, self._slices_per_table)
        table = self.l2_table_offset(l1_index)
        if not table:
            return None
        index = (offset >> self.cluster_bits) & self.slice_mask
        return table + part * self._slice_bytes + index * self._entry_words * 8

    def bad_entry(self, offset: int, what: str) -> FormatError:
        """Return the error that names the L2 entry of a guest offset and where it is in the file."""
        at = self.entry_offset(offset)
        return FormatError(f"the L2 entry of guest offset {offset:#x} {what}", offset=at, field="l2_entry")
