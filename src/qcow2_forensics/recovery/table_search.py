"""Every cluster of a file that has the form of an L1, L2 or refcount table, whatever points at it or not."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..census.arrays import I64, U64, Mask, distinct, is_among
from ..census.columns import big_endian, has_copied, is_packed, named_offsets, without_copied
from ..format.header import SECTOR
from ..format.snapshot_table import SnapshotEntry
from ..format.source import Source
from ..limits import CLUSTER_REFERENCES, L1_GAP_BYTES, RECOVERED_TABLES, REFCOUNT_BLOCKS_LOOKED_AT, TABLES_COMPARED, MiB
from ..residue.structure_detection import Geometry, find_entries, judged, l1_rows, l2_rows
from .geometry import compression_type_of
from .metered_source import stored_pieces

_CHUNK = 8 * MiB
_L1_SHARE = 0.5  # of the targets of an L1 table that still look like L2 tables; of a healthy one all do
_MAX_L1_BYTES = 32 * MiB  # what QEMU accepts


class L1Candidate(NamedTuple):
    """Clusters that hold an L1 table by their form: ``targets`` are its entries' host offsets, 0 for none."""

    offset: int
    targets: U64
    copied: int  # entries with the COPIED flag: the active state's, mostly
    sure: int  # entries from the first on that certainly are of this table, not of the one that follows


class FoundTables(NamedTuple):
    """What has the form of a table in a file, by rising host offset.

    ``left_out`` counts tables beyond the limit, ``entries_left_out`` places that may hold a snapshot's entry.
    """

    l1: list[L1Candidate]
    l2: I64
    refcount_tables: list[int]
    snapshots: list[SnapshotEntry]
    left_out: int
    entries_left_out: int


class _Rows(NamedTuple):
    offsets: I64
    l2_form: Mask
    l1_form: Mask  # every word may be an entry of an L1 table; a table may have both forms
    copied: I64
    mapped: I64  # clusters that each of them maps, were it an L2 table

    def without(self, others: Collection[int]) -> _Rows:
        """Return those of the form of an L2 table that are not at some host offsets."""
        kept = self.l2_form & ~is_among(self.offsets, np.array(sorted(others), np.int64))
        return self.at(kept)

    def at(self, which: slice | Mask) -> _Rows:
        """Return some of them."""
        return _Rows(
            self.offsets[which], self.l2_form[which], self.l1_form[which], self.copied[which], self.mapped[which]
        )


def search_tables(source: Source, geometry: Geometry, *, most: int | None = None) -> FoundTables:
    """Return what has the form of a table; reads the file once, or its first ``most`` bytes."""
    parts: list[_Rows] = []
    snapshots: dict[int, SnapshotEntry] = {}
    kept, left_out, entries_left_out = 0, 0, 0
    for at, data in _chunks(source, geometry.cluster_size, source.size if most is None else min(most, source.size)):
        entries = find_entries(data, at, geometry)
        entries_left_out += entries.left_out
        for entry in entries.snapshots:
            snapshots.setdefault(entry.offset, entry)
        rows = _tables_of(source, at, data, geometry)
        left_out += max(0, kept + len(rows.offsets) - RECOVERED_TABLES)
        rows = rows.at(slice(max(0, RECOVERED_TABLES - kept)))
        kept += len(rows.offsets)
        if len(rows.offsets):
            parts.append(rows)
    if not parts:
        return FoundTables([], np.zeros(0, np.int64), [], list(snapshots.values()), 0, entries_left_out)
    found = _Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    l1, refcount_tables = _classify(source, geometry, found, {entry.l1_table_offset for entry in snapshots.values()})
    others = _clusters(l1, geometry.cluster_size) | set(refcount_tables)
    guest = guest_data(source, geometry, found.without(others), others)
    l1 = [table for table in l1 if table.offset not in guest]
    # An L2 table over small numbers has the form of a refcount table, but an L1 table names it.
    named = {int(at) for table in l1 for at in table.targets[table.targets != 0].tolist()}
    refcount_tables = [at for at in refcount_tables if at not in named and at not in guest]
    others = _clusters(l1, geometry.cluster_size) | set(refcount_tables) | guest
    tables = found.without(others).offsets
    return FoundTables(l1, tables, refcount_tables, list(snapshots.values()), left_out, entries_left_out)


def _clusters(tables: list[L1Candidate], size: int) -> set[int]:
    """Return the host offsets of the clusters of L1 tables."""
    return {at for table in tables for at in range(table.offset, table.offset + len(table.targets) * 8, size)}


def _chunks(source: Source, cluster_size: int, end: int) -> Iterator[tuple[int, bytes]]:
    for at, length in stored_pieces(source, _CHUNK, end):
        data = source.read(at, length)
        yield at, data.ljust(-(-len(data) // cluster_size) * cluster_size, b"\0")


def _tables_of(source: Source, at: int, data: bytes, geometry: Geometry) -> _Rows:
    words = big_endian(data).reshape(-1, geometry.cluster_size // 8)
    rows, found = judged(l2_rows, words, geometry)
    whole = found.telling.copy()
    for row in np.flatnonzero(found.tables & ~whole & (found.compressed == 1)).tolist():
        # One compressed cluster and nothing else: a number, or an entry where a stream of that length is.
        entries = words[rows[row]]
        whole[row] = compression_type_of(source, entries[entries != 0].tolist(), geometry.cluster_bits) is not None
    l2_rows_ = rows[found.tables & whole]
    rows = l1_rows_ = l2_rows_
    if geometry.extended_l2:  # an L1 table has no pairs of words, and need not pass for one of L2
        others, found = judged(l1_rows, words, geometry)
        l1_rows_ = others[found.tables]
        rows = distinct(np.concatenate((rows, l1_rows_)))
    chosen = words[rows]
    flagged = has_copied(chosen)
    plain = without_copied(chosen) == named_offsets(chosen)
    offsets = (at + rows * geometry.cluster_size).astype(np.int64)
    l1_form = plain.all(axis=1) & is_among(rows, l1_rows_)
    mapped = np.count_nonzero(named_offsets(chosen)[:, :: geometry.entry_words], axis=1)
    return _Rows(offsets, is_among(rows, l2_rows_), l1_form, flagged.sum(axis=1), mapped)


def guest_data(source: Source, geometry: Geometry, tables: _Rows, others: Collection[int]) -> set[int]:
    """Return which clusters that look like tables are what a guest stores: a larger L2 table names them as its data.

    ``tables`` look like L2 tables, ``others`` like L1 and refcount tables. The largest are looked at first, so that
    a table inside the guest's own data says nothing about others.
    """
    every = np.array(sorted({*tables.offsets.tolist(), *others}), np.uint64)
    guest = np.zeros(len(every), np.bool_)
    places = np.searchsorted(every, tables.offsets.astype(np.uint64))
    sizes = np.ones(len(every), np.int64)
    sizes[places] = tables.mapped
    for place in places[np.argsort(-sizes[places], kind="stable")].tolist():
        if guest[place]:
            continue
        hosts = _named(source, int(every[place]), geometry)
        named = np.minimum(np.searchsorted(every, hosts), len(every) - 1)
        named = named[every[named] == hosts]
        guest[named[sizes[named] < sizes[place]]] = True
    return set(every[guest].tolist())


def _named(source: Source, offset: int, geometry: Geometry) -> U64:
    """Return the host clusters that a table maps, were it an L2 table."""
    hosts = named_offsets(entries_of(source, offset, geometry))
    used: U64 = hosts[hosts != 0]
    return used


def table_words(source: Source, offset: int, geometry: Geometry) -> U64:
    """Return the 64-bit words of one table of a cluster, zeros where the file ends inside it."""
    size = geometry.cluster_size
    data = source.read(offset, max(0, min(size, source.size - offset)))
    return big_endian(data.ljust(size, b"\0"))


def entries_of(source: Source, offset: int, geometry: Geometry) -> U64:
    """Return the entries of one L2 table, without the bitmaps of extended ones."""
    return table_words(source, offset, geometry)[:: geometry.entry_words]


def _classify(
    source: Source, geometry: Geometry, found: _Rows, snapshot_tables: Container[int]
) -> tuple[list[L1Candidate], list[int]]:
    """Return the L1 tables and refcount tables among the tables; what they name distinguishes them from L2 tables."""
    l1: list[L1Candidate] = []
    refcount_tables: list[int] = []
    l2 = found.offsets[found.l2_form]
    for offset, copied in zip(found.offsets[found.l1_form].tolist(), found.copied[found.l1_form].tolist(), strict=True):
        targets = named_offsets(table_words(source, offset, geometry))
        here = targets[targets != 0].astype(np.int64)
        if not len(here) or len(distinct(here)) != len(here):
            continue
        are_tables = is_among(here, l2) & (here != offset)
        if _are_mostly_tables(source, here, are_tables, geometry) and not _same_clusters(
            source, here[are_tables].tolist(), geometry
        ):
            l1.append(L1Candidate(offset, targets, copied, len(targets)))
        elif copied == 0 and _are_refcount_blocks(
            source, here[:REFCOUNT_BLOCKS_LOOKED_AT].tolist(), geometry.cluster_size
        ):
            refcount_tables.append(offset)
    return list(_joined(source, l1, geometry.cluster_size, snapshot_tables)), refcount_tables


def _are_mostly_tables(source: Source, targets: I64, are_tables: Mask, geometry: Geometry) -> bool:
    """Whether most of what an L1 table names looks like L2 tables, of what holds anything.

    A table without entries is made where a guest discards what it never wrote, as mkfs does for the whole disk.
    """
    if not are_tables.any():
        return False
    if are_tables.mean() >= _L1_SHARE:
        return True
    others = sum(not is_blank(source, int(at), geometry.cluster_size) for at in targets[~are_tables])
    return bool(are_tables.sum() >= _L1_SHARE * (are_tables.sum() + others))


def is_blank(source: Source, offset: int, size: int) -> bool:
    """Whether a cluster that is whole in the file holds nothing but zeros."""
    if offset + size > source.size:
        return False
    return not any(source.read(offset, SECTOR)) and not source.read(offset, size).strip(b"\0")


def _same_clusters(source: Source, offsets: list[int], geometry: Geometry) -> bool:
    """Whether most of what some clusters name is named by several of them, which L2 tables of one disk never do.

    The second half of NTFS file records is zeros but for a number at its end, the same in most of them.
    """
    entries = np.concatenate([entries_of(source, at, geometry) for at in offsets[:TABLES_COMPARED]])
    hosts = named_offsets(entries[~is_packed(entries)])
    used = hosts[hosts != 0]
    return len(offsets) > 1 and 0 < 2 * len(distinct(used)) <= len(used)


def _are_refcount_blocks(source: Source, offsets: list[int], size: int) -> bool:
    """Whether clusters may all be refcount blocks of 16 bits: small numbers, not all of them zero."""
    blocks = [source.read(at, max(0, min(size, source.size - at))).ljust(size, b"\0") for at in offsets]
    counts = np.frombuffer(b"".join(blocks), ">u2").reshape(-1, size // 2)
    return bool((counts.max(axis=1) <= CLUSTER_REFERENCES).all() and counts.any(axis=1).all())


def _joined(source: Source, found: list[L1Candidate], size: int, starts: Container[int]) -> Iterator[L1Candidate]:
    """Yield L1 tables of several clusters as one: neighbours that name no L2 table twice, and start no snapshot's table.

    Between them may be clusters of zeros, of parts of the disk that hold nothing. It is sure that a table
    goes on in the next cluster where its last entry is used.
    """
    parts: list[L1Candidate] = []
    named: set[int] = set()
    for table in found:
        here = {int(at) for at in table.targets[table.targets != 0].tolist()}
        follows = bool(parts) and _follows(source, parts[0].offset, parts[-1].offset + size, table.offset)
        if parts and (not follows or table.offset in starts or not named.isdisjoint(here)):
            yield _one(parts)
            parts, named = [], set()
        parts.append(table)
        named |= here
    if parts:
        yield _one(parts)


def _follows(source: Source, first: int, end: int, offset: int) -> bool:
    """Whether an L1 table that starts at ``first`` and was found up to ``end`` may go on at ``offset``."""
    gap = offset - end
    if gap > L1_GAP_BYTES or offset - first >= _MAX_L1_BYTES:
        return False
    return not gap or not source.read(end, gap).strip(b"\0")


def _one(parts: list[L1Candidate]) -> L1Candidate:
    """Return the clusters of one L1 table as one candidate."""
    per_cluster = len(parts[0].targets)
    size = per_cluster * 8
    sure = per_cluster
    for before, after in pairwise(parts):
        if not before.targets[-1] or after.offset != before.offset + size:
            break
        sure += per_cluster
    targets = np.zeros((parts[-1].offset - parts[0].offset) // 8 + per_cluster, np.uint64)
    for part in parts:
        at = (part.offset - parts[0].offset) // 8
        targets[at : at + per_cluster] = part.targets
    return L1Candidate(parts[0].offset, targets, sum(part.copied for part in parts), sure)
