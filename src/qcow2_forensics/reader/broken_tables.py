"""How far a mapping cannot be read: L2 tables that are lost, or of which no entry is sound.

A comparison reports what cannot be read as unreadable, and continues after it. A crafted L1 table may name a
few such tables a million times; each is looked at once.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from ..errors import FormatError
from ..limits import BROKEN_TABLES_KEPT
from .cache import Fifo
from .runs import L1_PAGE

if TYPE_CHECKING:
    from .mapping import Mapping


class BrokenTables:
    """Which L2 tables of one mapping have no sound entry, by their host offset.

    The mapping is handed to each call and not kept: that would be a cycle.
    """

    def __init__(self) -> None:
        self._known: Fifo[int, bool] = Fifo(BROKEN_TABLES_KEPT)

    def until(self, mapping: Mapping, offset: int, end: int) -> int:
        """Return how far from ``offset``, and at most to ``end``, nothing can be mapped; ``offset`` where it can."""
        index = offset // mapping.table_span
        if not offset % mapping.table_span and index < mapping.l1_size:
            self._judge(mapping, index)
        while index < mapping.l1_size and index * mapping.table_span < end:
            try:
                page = mapping.l1_page(index // L1_PAGE)
            except FormatError:
                page = array("Q")
            except OSError:
                break  # of the medium: nothing is known of what follows
            first = index % L1_PAGE
            if first >= len(page):
                index = mapping.l1_size  # cut off by the end of the file
                break
            rest = page[first:] if first else page
            sound = {entry for entry in set(rest) if not self._is_broken(mapping, mapping.table_of(entry))}
            if sound:
                index += next(at for at, entry in enumerate(rest) if entry in sound)
                break
            index += len(rest)
        return min(end, max(offset, index * mapping.table_span))

    def _is_broken(self, mapping: Mapping, table: int) -> bool:
        return bool(table) and (mapping.is_lost(table) or self._known.entries.get(table, False))

    def _judge(self, mapping: Mapping, index: int) -> None:
        """Remember whether no cluster at all under an L1 slot has an entry that can be read."""
        try:
            table = mapping.l2_table_offset(index)
        except (FormatError, OSError):
            return  # the entry itself says it
        if not table or table in self._known.entries:
            return
        self._known.add(table, False)
        start = index * mapping.table_span
        for at in range(start, start + mapping.table_span, mapping.cluster_size):
            try:
                next(mapping.runs(at, mapping.cluster_size))
            except FormatError:
                continue
            except OSError:
                pass  # of the medium: nothing is known of the table
            return
        self._known.add(table, True)
