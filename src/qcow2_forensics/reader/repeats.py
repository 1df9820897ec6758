"""L2 tables that an L1 table names many times over, and that map nothing or cannot be read.

A crafted L1 table of megabytes may name a few L2 tables a million times. Each is looked at once;
after that whole stretches of L1 slots are passed at the speed of C.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Protocol

from ..errors import FormatError
from .cache import Fifo
from .runs import Kind, Run

L1_PAGE = 8192  # L1 entries read and kept together
_REMEMBERED = 1 << 17  # tables: as many as fit in a file of 64 MiB


class Tables(Protocol):
    """What this takes of a mapping. It is handed to each call and not kept: that would be a cycle."""

    l1_size: int
    table_span: int  # guest bytes under one L1 entry
    slice_span: int  # guest bytes under one slice of an L2 table
    cluster_size: int

    def l1_page(self, number: int) -> array[int]: ...

    def l2_table_offset(self, index: int) -> int: ...

    def table_of(self, l1_entry: int) -> int: ...

    def is_lost(self, table: int) -> bool: ...

    def slice_runs(self, number: int) -> Iterator[Run]: ...

    def runs(self, offset: int, length: int) -> Iterator[Run]: ...


class Repeats:
    """What is known of the L2 tables of one mapping, by their host offset."""

    def __init__(self) -> None:
        self._blank: Fifo[int, Kind | None] = Fifo(_REMEMBERED)
        self._broken: Fifo[int, bool] = Fifo(_REMEMBERED)

    # --- tables that map nothing -------------------------------------------------------------------

    def blank_run(self, tables: Tables, offset: int, end: int) -> Run | None:
        """Return what starts at an L1 slot and is all zeros, or all hole, without host clusters; None if it is not."""
        index = offset // tables.table_span
        table = tables.l2_table_offset(index)
        kinds = self._blank.entries
        if table and table not in kinds:
            self._blank.add(table, _judge(tables, index))
        kind = kinds.get(table) if table else Kind.HOLE
        if kind is None:
            return None

        def is_alike(entry: int) -> bool:
            named = tables.table_of(entry)
            return (kinds.get(named) if named else Kind.HOLE) == kind

        index = _alike_until(tables, index + 1, end, is_alike)
        if kind != Kind.HOLE or index < tables.l1_size:  # nothing is mapped past the table
            end = min(end, index * tables.table_span)
        return Run(offset, end - offset, kind)

    # --- tables that cannot be read ----------------------------------------------------------------

    def broken_until(self, tables: Tables, offset: int, end: int) -> int:
        """Return how far from ``offset``, and at most to ``end``, nothing can be mapped; ``offset`` where it can."""
        index = offset // tables.table_span
        if not offset % tables.table_span and index < tables.l1_size:
            self._judge_broken(tables, index)

        def is_broken(entry: int) -> bool:
            table = tables.table_of(entry)
            return bool(table) and (tables.is_lost(table) or self._broken.entries.get(table, False))

        index = _alike_until(tables, index, end, is_broken)
        if index < tables.l1_size and index % L1_PAGE >= len(tables.l1_page(index // L1_PAGE)):
            index = tables.l1_size  # cut off by the end of the file
        return min(end, max(offset, index * tables.table_span))

    def _judge_broken(self, tables: Tables, index: int) -> None:
        """Remember whether no cluster at all under an L1 slot has an entry that can be."""
        try:
            table = tables.l2_table_offset(index)
        except FormatError:
            return  # the entry itself says it
        if not table or table in self._broken.entries:
            return
        self._broken.add(table, False)
        start = index * tables.table_span
        for at in range(start, start + tables.table_span, tables.cluster_size):
            try:
                next(tables.runs(at, tables.cluster_size))
            except FormatError:
                continue
            return
        self._broken.add(table, True)


def _judge(tables: Tables, index: int) -> Kind | None:
    """Return the one kind of all that an L2 table says, None when it names host clusters or is of several kinds."""
    per_table = tables.table_span // tables.slice_span
    kind: Kind | None = None
    try:
        for number in range(index * per_table, (index + 1) * per_table):
            for run in tables.slice_runs(number):
                if run.kind not in (Kind.ZERO, Kind.HOLE) or run.host_offset is not None:
                    return None
                if kind not in (None, run.kind):
                    return None
                kind = run.kind
    except FormatError:
        return None  # said when its turn comes
    return kind


def _alike_until(tables: Tables, index: int, end: int, is_alike: Callable[[int], bool]) -> int:
    """Return the first L1 slot from ``index`` on that fails a test, or where the table or ``end`` is reached.

    Every value is tested once for many slots: what is crafted repeats, and what does not repeat is paid for.
    """
    width = 8  # grows, so that a short answer costs little and a long one is found at the speed of C
    passed: array[int] | None = None  # a page of which all passed: past the end of the file one stands for all
    while index < tables.l1_size and index * tables.table_span < end:
        page, first = tables.l1_page(index // L1_PAGE), index % L1_PAGE
        if page is passed and not first:
            index += len(page)
            continue
        part = page[first : first + width]
        others = {entry for entry in set(part) if not is_alike(entry)}
        if others or not part:
            return index + next((at for at, entry in enumerate(part) if entry in others), 0)
        if len(part) == len(page):
            passed = page
        index += len(part)
        width = min(4 * width, L1_PAGE)
    return index
