"""Turns a guest range into runs that tile it exactly: data, zero, hole, compressed.

A :class:`Mapping` is one L1 table, the active one or a snapshot's, and the L2 tables under it.
Tables are read in slices on first use and kept, within a budget, as arrays of integers.

::

    guest offset  ->  L1 index | L2 index | offset in cluster
                         |          |
                     L1 entry -> L2 entry -> host cluster, zeros, nothing, or a compressed stream
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

from .cache import Fifo
from .errors import FormatError
from .image import Image
from .limits import KiB
from .sequences import sequence_end
from .structures import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    QCOW1_COMPRESSED,
    SECTOR,
    SUBCLUSTERS,
    ZERO,
    compressed_descriptor,
    qcow1_compressed_descriptor,
    words,
)

_SLICE_BYTES = 64 * KiB  # of an L2 table, read and cached together
L1_PAGE = 8192  # L1 entries read and kept together
_BLANK_TABLES = 1 << 17  # remembered: as many as fit in a file of 64 MiB
_EMPTY_L1_PAGE = array("Q", bytes(8 * L1_PAGE))  # one for all that lie past the end: a header may claim thousands


class Kind(enum.IntEnum):
    """What a run of guest bytes is."""

    DATA = 0  # stored at host_offset
    ZERO = 1  # reads as zeros, whatever a backing file holds
    HOLE = 2  # not in this image: the backing file's bytes, or zeros without one
    COMPRESSED = 3  # (part of) one compressed cluster
    MISSING = 4  # extents only: would come from a backing file that is not here; reading it raises


class Run(NamedTuple):
    """``length`` guest bytes at ``offset`` of one kind.

    ``host_offset`` is that of the first byte for DATA, of preallocated space under ZERO and HOLE
    (None without), and of the stream for COMPRESSED, whose ``size`` bytes hold it at most.
    """

    offset: int
    length: int
    kind: Kind
    host_offset: int | None = None
    size: int = 0


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
        self._version = header.version
        self._data_file = header.external_data
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
        self._blank_tables: Fifo[int, Kind | None] = Fifo(_BLANK_TABLES)  # L2 tables by host offset, see _blank
        self._broken_tables: Fifo[int, bool] = Fifo(_BLANK_TABLES)
        # Bits that make an entry anything but a stored cluster; all of them where the format is not the plain one.
        self.not_plain = ~(COPIED | OFFSET_MASK) & (2**64 - 1) | (OFFSET_MASK & (self.cluster_size - 1))
        if self._version == 1 or header.extended_l2 or self._data_file:
            self.not_plain = 2**64 - 1
        # A plain function: a bound method would be a cycle, and files would stay open until it is collected.
        self._scan: Callable[[Mapping, Slice, int, int, int], Iterator[Run]]
        if self._version == 1:
            self._scan = Mapping._qcow1_runs
        else:
            self._scan = Mapping._extended_runs if header.extended_l2 else Mapping._standard_runs

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
        offset = entry if self._version == 1 else entry & OFFSET_MASK
        if self._version == 1:
            if entry > 2**63 - 1 - self._table_bytes:
                raise self._bad_l1(index, "is beyond any file")
        elif offset & (self.cluster_size - 1):
            raise self._bad_l1(index, "names an unaligned L2 table")
        return offset

    def _bad_l1(self, index: int, what: str) -> FormatError:
        at = self.l1_table_offset + index * 8
        return FormatError(f"L1[{index}] {what}", offset=at, field="l1_entry")

    def slice(self, number: int) -> Slice:
        """Return the entries of guest slice ``number``; empty where there is no L2 table."""
        entries = self.slices.get(number)
        if entries is None:
            l1_index, part = divmod(number, self._slices_per_table)
            table = self.l2_table_offset(l1_index)
            if table:
                offset = table + part * self._slice_bytes
                entries = self._load(offset, self._slice_bytes // 8, f"the L2 table of L1[{l1_index}]")
            else:
                entries = array("Q")
            self._cache.add(number, entries)
        return entries

    def _load(self, offset: int, count: int, structure: str) -> Slice:
        if self._eof_zeros and offset + count * 8 > self.image.file_size:
            self.filled_tables += 1
            return words(self.image.read(offset, count * 8).ljust(count * 8, b"\0"))
        return self.image.table(offset, count, structure)

    # --- runs ----------------------------------------------------------------------------------

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """Yield runs that tile ``[offset, offset + length)`` exactly, coalesced.

        The range may reach past the L1 table: nothing is mapped there. Raises
        :class:`FormatError` at the first cluster that cannot be read, naming its entry.
        """
        pending: Run | None = None
        try:
            for run in self._pieces(offset, length):
                if pending is None:
                    pending = run
                    continue
                if _continues(pending, run):
                    pending = Run(pending.offset, pending.length + run.length, pending.kind, pending.host_offset)
                else:
                    yield pending
                    pending = run
        except FormatError:
            if pending is not None:
                yield pending  # what is right in front of the fault
            raise
        if pending is not None:
            yield pending

    def _pieces(self, offset: int, length: int) -> Iterator[Run]:
        end = offset + length
        while offset < end:
            if end - offset >= self.table_span and not offset % self.table_span:
                kind = self._blank(offset // self.table_span)
                if kind is not None:
                    stop = min(end, self._blank_until(offset // self.table_span + 1, kind, end) * self.table_span)
                    yield Run(offset, stop - offset, kind)
                    offset = stop
                    continue
            number = offset >> self.slice_shift
            entries = self.slices.get(number)
            if entries is None:
                entries = self.slice(number)
            if entries:
                stop = min(end, (number + 1) << self.slice_shift)
                yield from self._scan(self, entries, number, offset, stop)
            else:
                stop = min(end, self._next_table(offset, end))
                yield Run(offset, stop - offset, Kind.HOLE)
            offset = stop

    # A crafted L1 table may name a few L2 tables that map nothing a million times. Each is looked at once.

    def _blank(self, index: int) -> Kind | None:
        """Return ZERO or HOLE when all under an L1 slot is that, without host clusters; None when it is not."""
        table = self.l2_table_offset(index)
        if not table:
            return Kind.HOLE
        if table not in self._blank_tables.entries:
            self._blank_tables.add(table, self._judge(index))
        return self._blank_tables.entries.get(table)

    def _judge(self, index: int) -> Kind | None:
        kind: Kind | None = None
        try:
            for number in range(index * self._slices_per_table, (index + 1) * self._slices_per_table):
                start = number << self.slice_shift
                for run in self._scan(self, self.slice(number), number, start, start + self.slice_span):
                    if run.kind not in (Kind.ZERO, Kind.HOLE) or run.host_offset is not None:
                        return None
                    if kind not in (None, run.kind):
                        return None
                    kind = run.kind
        except FormatError:
            return None  # said when its turn comes
        return kind

    def _blank_until(self, index: int, kind: Kind, end: int) -> int:
        """Return the first L1 slot from ``index`` on that is not known to be blank in the same way."""
        kinds = self._blank_tables.entries

        def is_alike(entry: int) -> bool:
            table = self._table_of(entry)
            return (kinds.get(table) if table else Kind.HOLE) == kind

        index = self._alike_until(index, end, is_alike)
        return 2**64 if kind == Kind.HOLE and index >= self.l1_size else index  # nothing is mapped past the table

    def broken_until(self, offset: int, end: int) -> int:
        """Return how far from ``offset``, and at most to ``end``, nothing can be mapped; ``offset`` where it can."""
        index = offset // self.table_span
        if not offset % self.table_span and index < self.l1_size:
            self._judge_broken(index)
        index = self._alike_until(index, end, self._is_broken)
        if index < self.l1_size and index % L1_PAGE >= len(self.l1_page(index // L1_PAGE)):
            index = self.l1_size  # cut off by the end of the file
        return min(end, max(offset, index * self.table_span))

    def _judge_broken(self, index: int) -> None:
        """Remember whether no cluster at all under an L1 slot has an entry that can be."""
        start = index * self.table_span
        try:
            table = self.l2_table_offset(index)
            if not table or table in self._broken_tables.entries:
                return
            self._broken_tables.add(table, False)
            for at in range(start, start + self.table_span, self.cluster_size):
                number = at >> self.slice_shift
                try:
                    next(self._scan(self, self.slice(number), number, at, at + self.cluster_size))
                except FormatError:
                    continue
                return
            self._broken_tables.add(table, True)
        except FormatError:
            pass  # the entry itself says it

    def _is_broken(self, entry: int) -> bool:
        table = self._table_of(entry)
        if not table:
            return False
        if self._version == 1 and table > 2**63 - 1 - self._table_bytes:
            return True
        if self._version != 1 and table & (self.cluster_size - 1):
            return True
        if not self._eof_zeros and table + self._slice_bytes > self.image.file_size:
            return True
        return self._broken_tables.entries.get(table, False)

    def _table_of(self, entry: int) -> int:
        return entry if self._version == 1 else entry & OFFSET_MASK

    def _alike_until(self, index: int, end: int, is_alike: Callable[[int], bool]) -> int:
        """Return the first L1 slot from ``index`` on that fails a test, or where the table or ``end`` is reached.

        Every value is tested once for many slots: what is crafted repeats, and what does not repeat is paid for.
        """
        width = 8  # grows, so that a short answer costs little and a long one is found at the speed of C
        while index < self.l1_size and index * self.table_span < end:
            page, first = self.l1_page(index // L1_PAGE), index % L1_PAGE
            part = page[first : first + width]
            others = {entry for entry in set(part) if not is_alike(entry)}
            if others or not part:
                return index + next((at for at, entry in enumerate(part) if entry in others), 0)
            index += len(part)
            width = min(4 * width, L1_PAGE)
        return index

    def _next_table(self, offset: int, end: int = 2**64) -> int:
        """Return where the guest range without L2 tables that holds ``offset`` ends, or a place past ``end``."""
        span = self.slice_span * self._slices_per_table
        index = offset // span + 1
        while index < self.l1_size and index * span < end:
            page = self.l1_page(index // L1_PAGE)
            first = index % L1_PAGE
            if page is not _EMPTY_L1_PAGE and any(page):
                for at in range(first, len(page)):
                    if page[at]:
                        return (index - first + at) * span
            if index - first + len(page) < min(self.l1_size, index - first + L1_PAGE):
                return (index - first + max(first, len(page))) * span  # cut off by the end of the file
            index += L1_PAGE - first
        return 2**64

    def shared_until(self, other: Mapping, offset: int) -> int:
        """Return where the two mappings first name different L2 tables, at or after ``offset``.

        ``offset`` itself when its own L2 table differs. Both must map the same file: what they
        share is then equal byte for byte, whether it can be read or not. Costs L1 pages only.
        """
        mask = 2**64 - 1 if self._version == 1 else OFFSET_MASK
        span = self.slice_span * self._slices_per_table
        index = offset // span
        while index < max(self.l1_size, other.l1_size):
            number, first = divmod(index, L1_PAGE)
            mine, theirs = self._whole_l1_page(number), other._whole_l1_page(number)
            if mine is None or theirs is None:
                return max(offset, index * span)  # cut off by the end of the file
            if mine != theirs:
                for at in range(first, max(len(mine), len(theirs))):
                    one = mine[at] if at < len(mine) else 0
                    two = theirs[at] if at < len(theirs) else 0
                    if (one ^ two) & mask:
                        return max(offset, (index - first + at) * span)
            index += L1_PAGE - first
        return 2**64

    def unmapped_until(self, offset: int) -> int:
        """Return where the range without L2 tables at ``offset`` ends; ``offset`` itself in a mapped one.

        Where the L1 table cannot be read the range ends: what is there is for :meth:`runs` to say.
        """
        try:
            if self.l1_entry(offset // (self.slice_span * self._slices_per_table)):
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

    # One generator per entry format. Each yields the runs of one slice between two guest offsets;
    # ``host`` arithmetic is relative to the offset inside the first cluster.

    def _standard_runs(self, entries: Slice, number: int, offset: int, stop: int) -> Iterator[Run]:
        bits, size, mask = self.cluster_bits, self.cluster_size, self.slice_mask
        special = COMPRESSED | ZERO | (OFFSET_MASK & (size - 1))
        while offset < stop:
            index = (offset >> bits) & mask
            entry = entries[index]
            inside = offset & (size - 1)
            if entry & COMPRESSED:
                run_end = min(stop, offset - inside + size)
                yield self._compressed(entry, offset, run_end - offset)
                offset = run_end
                continue
            last = ((stop - 1) >> bits) & mask
            # The usual case: entries that continue the first one, as a cluster or as nothing.
            step = size if entry & OFFSET_MASK or (self._data_file and entry & COPIED) else 0
            index = sequence_end(entries, index + 1, last + 1, step)
            run_end = min(stop, (number << self.slice_shift) + (index << bits))
            host = entry & OFFSET_MASK
            if entry & special or self._data_file:
                kind, start = self._special(entry, offset, inside)
            elif host:
                kind, start = Kind.DATA, host + inside
            else:
                kind, start = Kind.HOLE, None
            yield Run(offset, run_end - offset, kind, start)
            offset = run_end

    def _special(self, entry: int, offset: int, inside: int) -> tuple[Kind, int | None]:
        """Classify an entry that is not plain data or nothing; raise for what QEMU cannot read."""
        host = entry & OFFSET_MASK
        if entry & ZERO:
            if self._version < 3:
                raise self._bad_entry(offset, "has the zero flag, which version 2 does not know")
            kind = Kind.ZERO
        elif host or (entry & COPIED and self._data_file):
            kind = Kind.DATA
        else:
            return Kind.HOLE, None
        if not host and kind == Kind.ZERO:
            return kind, None
        self._check_host(host, offset, inside)
        return kind, host + inside

    def _check_host(self, host: int, offset: int, inside: int) -> None:
        if host & (self.cluster_size - 1):
            raise self._bad_entry(offset, f"names the unaligned host offset {host:#x}")
        if self._data_file and host != offset - inside:
            raise self._bad_entry(offset, f"maps to {host:#x} in the data file, not to its guest offset")

    def _extended_runs(self, entries: Slice, number: int, offset: int, stop: int) -> Iterator[Run]:
        bits, size, mask = self.cluster_bits, self.cluster_size, self.slice_mask
        subcluster = size // SUBCLUSTERS
        full = 0xFFFF_FFFF
        while offset < stop:
            index = (offset >> bits) & mask
            entry, bitmap = entries[2 * index], entries[2 * index + 1]
            inside = offset & (size - 1)
            run_end = min(stop, offset - inside + size)
            if entry & COMPRESSED:
                yield self._compressed(entry, offset, run_end - offset)
                offset = run_end
                continue
            if bitmap == full and entry & OFFSET_MASK and not (entry & OFFSET_MASK & (size - 1) or self._data_file):
                # The usual case: whole clusters, one after the other in the file.
                last, expected = ((stop - 1) >> bits) & mask, entry + size
                index += 1
                while index <= last and entries[2 * index] == expected and entries[2 * index + 1] == full:
                    expected += size
                    index += 1
                run_end = min(stop, (number << self.slice_shift) + (index << bits))
                yield Run(offset, run_end - offset, Kind.DATA, (entry & OFFSET_MASK) + inside)
                offset = run_end
                continue
            allocated, zeros = bitmap & full, bitmap >> 32
            host = entry & OFFSET_MASK
            present = bool(host) or bool(self._data_file and entry & COPIED)
            if allocated & zeros:
                raise self._bad_entry(offset, "has subclusters that are both allocated and zero")
            if allocated and not present:
                raise self._bad_entry(offset, "has allocated subclusters without a cluster")
            if present and (host & (size - 1) or self._data_file):
                self._check_host(host, offset, inside)
            while offset < run_end:
                at = (offset & (size - 1)) // subcluster
                bit = 1 << at
                kind = Kind.DATA if allocated & bit else Kind.ZERO if zeros & bit else Kind.HOLE
                same = allocated if kind == Kind.DATA else zeros if kind == Kind.ZERO else ~(allocated | zeros)
                at += 1
                while at < SUBCLUSTERS and same >> at & 1:
                    at += 1
                piece_end = min(run_end, offset - (offset & (size - 1)) + at * subcluster)
                start = host + (offset & (size - 1)) if present else None
                yield Run(offset, piece_end - offset, kind, start)
                offset = piece_end

    def _qcow1_runs(self, entries: Slice, _number: int, offset: int, stop: int) -> Iterator[Run]:
        bits, size, mask = self.cluster_bits, self.cluster_size, self.slice_mask
        while offset < stop:
            entry = entries[(offset >> bits) & mask]
            inside = offset & (size - 1)
            length = min(stop, offset - inside + size) - offset
            if not entry:
                yield Run(offset, length, Kind.HOLE)
            elif entry & QCOW1_COMPRESSED:
                host, stored = qcow1_compressed_descriptor(entry, bits)
                yield Run(offset, length, Kind.COMPRESSED, host, stored)
            elif entry % SECTOR:
                raise self._bad_entry(offset, f"names the unaligned host offset {entry:#x}")
            else:
                yield Run(offset, length, Kind.DATA, entry + inside)
            offset += length

    def _compressed(self, entry: int, offset: int, length: int) -> Run:
        if self._data_file:
            raise self._bad_entry(offset, "is compressed, which an external data file cannot hold")
        host, size = compressed_descriptor(entry, self.cluster_bits)
        return Run(offset, length, Kind.COMPRESSED, host, size)

    def entry_offset(self, offset: int) -> int | None:
        """Return the file offset of the L2 entry for a guest offset, None without an L2 table."""
        number = offset >> self.slice_shift
        l1_index, part = divmod(number, self._slices_per_table)
        table = self.l2_table_offset(l1_index)
        if not table:
            return None
        index = (offset >> self.cluster_bits) & self.slice_mask
        return table + part * self._slice_bytes + index * self._entry_words * 8

    def _bad_entry(self, offset: int, what: str) -> FormatError:
        at = self.entry_offset(offset)
        return FormatError(f"the L2 entry of guest offset {offset:#x} {what}", offset=at, field="l2_entry")


def _continues(first: Run, second: Run) -> bool:
    """Whether two neighbouring runs are one: same kind, and host bytes that follow each other."""
    if first.kind != second.kind or first.kind == Kind.COMPRESSED:
        return False
    if first.host_offset is None or second.host_offset is None:
        return first.host_offset is second.host_offset
    return first.host_offset + first.length == second.host_offset
