"""Refcounts read through a refcount table that was found by its form, to see which tables are in use."""

from __future__ import annotations

from ..errors import ReadError
from ..format.entries import refcount_block_offset
from ..format.source import Source

_ORDERS = (4, 3, 5, 6, 2, 1, 0)  # refcount_order, the usual one first


class FoundRefcounts:
    """Refcounts by host offset. ``table_size`` is the length of the refcount table in bytes."""

    def __init__(self, source: Source, table_offset: int, table_size: int, cluster_size: int, order: int) -> None:
        self._source = source
        self._table_offset = table_offset
        self._entries = table_size // 8
        self._cluster_size = cluster_size
        self.order = order

    def of(self, offset: int) -> int | None:
        """Return the refcount of the cluster at a host offset, None where it cannot be read.

        None of every cluster where the header gives refcounts a width that does not exist.
        """
        if self.order > max(_ORDERS):
            return None
        per_block = self._cluster_size * 8 >> self.order
        index, slot = divmod(offset // self._cluster_size, per_block)
        if index >= self._entries:
            return 0
        try:
            entry = refcount_block_offset(self._read(self._table_offset + index * 8, 8))
            if not entry:
                return 0
            if self.order >= 3:
                width = 1 << self.order - 3
                return self._read(entry + slot * width, width)
            bits = 1 << self.order
            byte = self._read(entry + slot * bits // 8, 1)
            return byte >> slot * bits % 8 & (1 << bits) - 1
        except ReadError:
            return None

    def _read(self, offset: int, length: int) -> int:
        data = self._source.read(offset, length) if offset + length <= self._source.size else b""
        if len(data) < length:
            raise ReadError("the refcounts reach past the end of the file", offset=offset, length=length)
        return int.from_bytes(data, "big")


def find_refcounts(source: Source, tables: list[int], cluster_size: int, in_use: list[int]) -> FoundRefcounts | None:
    """Return the refcounts of one of the refcount tables found; ``in_use`` are clusters that must be counted.

    Clusters of such tables beside each other are one table. A table is believed where it counts itself and most of ``in_use``.
    """
    runs: list[list[int]] = []
    for offset in sorted(tables):
        if runs and runs[-1][-1] + cluster_size == offset:
            runs[-1].append(offset)
        else:
            runs.append([offset])
    for run in reversed(runs):  # a grown table is written after the former one
        for order in _ORDERS:
            found = FoundRefcounts(source, run[0], len(run) * cluster_size, cluster_size, order)
            counted = sum(1 for offset in in_use if found.of(offset))
            if all(found.of(offset) == 1 for offset in run) and counted * 2 > len(in_use):
                return found
    return None
