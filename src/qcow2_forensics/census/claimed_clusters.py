"""Which host clusters anything may claim: looked for before the census of a huge file is taken.

The arrays of a census take two to seven bytes a cluster. A sparse file can have a thousand million clusters
and claim three of them, so for large files the claims are gathered first, as runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..format.header_rules import INT64_MAX
from ..format.image import Image
from ..limits import L1_ENTRIES
from .arrays import U64, merged
from .checked_metadata import MetadataLayout
from .index_map import IndexMap
from .refcounts import StoredRefcounts
from .walk import L1Chunk, L2TableCollector, L2Tables, batches, l1_chunks, walkable

_ALWAYS = 1 << 22  # clusters whose arrays, at most 28 MiB, are not worth a second look
_SHARE = 16  # where more than one cluster in so many is claimed, every cluster gets an index
_ROWS = 1 << 20  # runs gathered before they are merged

Runs = tuple[U64, U64]


def index_map_for(
    image: Image, layout: MetadataLayout, refcounts: StoredRefcounts, length: int, clusters: int
) -> IndexMap:
    """Return the indices for a census of a file of ``length`` bytes, in whole sectors."""
    if clusters <= _ALWAYS:
        return IndexMap(clusters)
    gathered = _Gathered(clusters // _SHARE)
    for first, last in _claims(image, layout, refcounts, length):
        if not gathered.add(first, np.minimum(last, np.uint64(clusters))):
            return IndexMap(clusters)
    runs = gathered.merge()
    return IndexMap(clusters, runs) if gathered.room >= 0 else IndexMap(clusters)


def _claims(image: Image, layout: MetadataLayout, refcounts: StoredRefcounts, length: int) -> Iterator[Runs]:
    """Yield the first and last clusters of whatever the census may count, and of some it will not."""
    header = image.header
    size, bits = np.uint64(header.cluster_size), np.uint64(header.cluster_bits)
    one, end = np.uint64(1), np.uint64(length)

    def whole(hosts: U64) -> Runs:
        hosts = hosts[hosts < end]
        return hosts >> bits, (hosts + size - one) >> bits

    spans = [(0, header.cluster_size), (header.snapshots_offset, layout.snapshot_table_length)]
    spans.append((header.refcount_table_offset, len(refcounts.table) * 8))
    l1_tables = [(header.l1_table_offset, min(header.l1_size, L1_ENTRIES))]
    l1_tables += [(entry.l1_table_offset, entry.l1_size) for entry in layout.snapshots if entry.l1_size <= L1_ENTRIES]
    spans += [(offset, count * 8) for offset, count in l1_tables]
    spans += [layout.crypto] if layout.crypto else []
    spans += [layout.bitmap_directory] if layout.bitmap_directory else []
    bitmaps = [(place.table_offset, place.table_size) for place in layout.bitmaps]
    spans += [(offset, count * 8) for offset, count in bitmaps]
    # What ends a cluster or more past the file is not counted at all.
    kept = {span for span in spans if span[1] > 0 and span[0] + span[1] - length < header.cluster_size}
    if kept:
        starts, lengths = np.asarray(sorted(kept), dtype=np.uint64).T
        yield starts >> bits, (starts + lengths - one) >> bits
    yield whole(refcounts.offsets[refcounts.offsets != 0])
    aligned = [place for place in bitmaps if place[0] % header.cluster_size == 0]
    for chunk in _entries(image, aligned):
        yield whole(chunk.tables)
    collector = L2TableCollector()
    readable = {table for table in l1_tables if table[0] + table[1] * 8 <= INT64_MAX}
    for chunk in _entries(image, sorted(readable)):
        collector.add(L2Tables.of_chunk(chunk, active=True))
    named = collector.result()
    yield whole(named.offsets)
    if not header.external_data:
        for tables in batches(image, walkable(image, named)[0]):
            hosts = tables.columns.hosts
            yield whole(hosts[hosts != 0])
            if tables.columns.has_compressed:
                offsets, sizes = tables.columns.compressed_extents()
                yield offsets >> bits, (offsets + sizes - one) >> bits


def _entries(image: Image, tables: list[tuple[int, int]]) -> Iterator[L1Chunk]:
    offsets, counts = [offset for offset, _ in tables], [count for _, count in tables]
    return l1_chunks(image, offsets, counts, [0] * len(tables))


class _Gathered:
    """Gathers runs of clusters and gives up when they add up to more than ``most``."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._parts: list[Runs] = []
        self._rows = 0
        self._added = 0
        self.room = most  # clusters, after the last merge

    def add(self, first: U64, last: U64) -> bool:
        """Take in the clusters from each ``first`` to its ``last``; False when there are too many by now."""
        kept = first <= last  # what begins past the end of the file is not counted
        if kept.any():
            runs = merged(first[kept], last[kept] + np.uint64(1))
            self._parts.append(runs)
            self._rows += len(runs[0])
            self._added += int((runs[1] - runs[0]).sum())
        if self._rows > _ROWS or self._added > self._most:
            self.merge()
        return self.room >= 0

    def merge(self) -> Runs:
        """Return all runs, rising, none touching another."""
        starts, stops = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        runs = merged(starts, stops)
        self._parts, self._rows, self._added = [runs], 0, 0
        self.room = self._most - int((runs[1] - runs[0]).sum())
        return runs
