"""Takes the census: walks all metadata in the order of QEMU's check."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from ..errors import FormatError, LimitExceeded
from ..format.entries import named_offset
from ..format.header import SECTOR
from ..format.header_rules import INT64_MAX
from ..format.image import Image
from ..limits import HOST_CLUSTERS, L1_ENTRIES
from .arrays import U64, Mask, Places, distinct, run_starts
from .census import Census, Structures
from .checked_metadata import BitmapPlace, MetadataLayout, Reason, read_layout
from .claimed_clusters import index_map_for
from .claims import Claims
from .columns import has_reserved_bitmap, has_reserved_refcount_table_bits
from .issues import Item, spread
from .owners import Owner
from .refcounts import StoredRefcounts
from .state_ends import StateEnds
from .walk import L2TableCollector, L2Tables, Subscriber, batches, l1_chunks, walkable

_SLOT_CHUNK = 1 << 16  # refcount table entries counted together


def take_census(image: Image, subscribers: Iterable[type[Subscriber]] = ()) -> Census:
    """Count an image; :class:`FormatError` when its geometry is unknown or it is too large to count.

    Each of the ``subscribers`` sees the L2 tables while they are counted: see :meth:`Census.seen`.
    """
    header = image.header
    if header.version == 1:
        raise FormatError(
            "QCOW version 1 has no refcounts: nothing in it says which clusters are free", field="version"
        )
    if header.version not in (2, 3) or not 9 <= header.cluster_bits <= 21:
        raise FormatError("the image has no known geometry to count by", field="cluster_bits")
    length = -(-image.file_size // SECTOR) * SECTOR
    clusters = -(-length // header.cluster_size)
    if clusters > HOST_CLUSTERS:
        raise LimitExceeded("host clusters", clusters, HOST_CLUSTERS)
    layout, refcounts = read_layout(image), StoredRefcounts(image)
    claims = Claims(image, refcounts, length, index_map_for(image, layout, refcounts, length, clusters))
    seen = {kind: kind(image, claims.index_map) for kind in subscribers}
    survey = _Survey(image, claims, layout, seen.values())
    named = survey.run()
    return Census(image, claims, layout, named, survey.walked, survey.structures, seen)


class _Survey:
    """The steps, in the order of QEMU's check."""

    def __init__(self, image: Image, claims: Claims, layout: MetadataLayout, subscribers: Iterable[Subscriber]) -> None:
        self.image = image
        self.claims = claims
        self.layout = layout
        self.subscribers = tuple(subscribers)
        self.structures: list[Structures] = []
        self.walked = L2Tables.nothing()

    def run(self) -> L2Tables:
        header = self.image.header
        self._claim(Owner.HEADER, [(0, header.cluster_size)], "header")
        named = self._l1_tables()
        self.claims.l2_tables(named)
        self._structures(named.offsets, Owner.L2)
        self.walked, complete = walkable(self.image, named)
        if not complete:
            self.layout.reasons.append(Reason("unaligned L2 tables overlap too often to be walked", None))
        for tables in batches(self.image, self.walked):
            self.claims.entries(tables)
            for subscriber in self.subscribers:
                subscriber.tables(tables)
        if header.external_data and header.nb_snapshots:
            self.claims.corruptions += 1
        self._claim(
            Owner.SNAPSHOT_TABLE, [(header.snapshots_offset, self.layout.snapshot_table_length)], "snapshot table"
        )
        table_length = len(self.claims.refcounts.table) * 8
        self._claim(Owner.REFCOUNT_TABLE, [(header.refcount_table_offset, table_length)], "refcount table")
        if self.layout.crypto:
            self._claim(Owner.CRYPTO, [self.layout.crypto], "LUKS header")
        self._bitmaps()
        self.claims.corruptions += len(self.layout.short_extra)
        most = self.claims.refcounts.most
        self._saturate(most)
        self._refcount_blocks(most)
        return named

    def _claim(self, owner: Owner, spans: list[tuple[int, int]], structure: str) -> None:
        self.claims.claim(owner, spans, structure)
        table = np.asarray(spans, dtype=np.uint64).reshape(-1, 2)
        offsets, lengths = table[table[:, 1] != 0].T
        self.structures.append(Structures(offsets, lengths, owner))

    def _structures(self, offsets: U64, owner: Owner) -> None:
        lengths = np.full(len(offsets), self.claims.cluster_size, dtype=np.uint64)
        self.structures.append(Structures(offsets, lengths, owner))

    # --- L1 --------------------------------------------------------------------------------------

    def _l1_tables(self) -> L2Tables:
        header = self.image.header
        collector = L2TableCollector()
        ends = StateEnds(self.image, self.layout.snapshots)
        count = min(header.l1_size, L1_ENTRIES)
        if header.l1_table_offset + count * 8 <= INT64_MAX:
            self._claim(Owner.L1, [(header.l1_table_offset, count * 8)], "L1 table")
            for chunk in l1_chunks(self.image, [header.l1_table_offset], [count], [-1]):
                self.claims.l1_entries(chunk, active=True)
                collector.add(L2Tables.of_chunk(chunk, active=True, ends=ends))
        if self.layout.snapshots:
            self._snapshot_l1_tables(collector, ends)
        return collector.result()

    def _snapshot_l1_tables(self, collector: L2TableCollector, ends: StateEnds) -> None:
        offsets, counts, trees = self._snapshot_tables().T
        spans = np.column_stack((offsets, counts * np.uint64(8)))
        self.claims.claim(Owner.SNAPSHOT_L1, spans, "snapshot L1 table", trees)
        # One that several entries name is one structure.
        firsts = _firsts(spans[:, 0], spans[:, 1])
        firsts = firsts[spans[firsts, 1] != 0]
        owners = tuple(trees[firsts].tolist())
        self.structures.append(Structures(spans[firsts, 0], spans[firsts, 1], Owner.SNAPSHOT_L1, owners))
        for chunk in l1_chunks(self.image, offsets, counts, trees):
            self.claims.l1_entries(chunk, active=False)
            collector.add(L2Tables.of_chunk(chunk, active=False, ends=ends))

    def _snapshot_tables(self) -> U64:
        """Return the snapshots' L1 tables that can be walked, a row (offset, entries, snapshot) each."""
        snapshots, claims = self.layout.snapshots, self.claims
        rows = [(entry.l1_table_offset, entry.l1_size, entry.index) for entry in snapshots]
        offsets, counts, numbers = np.asarray(rows, np.uint64).T
        odd = (offsets & np.uint64(claims.cluster_size - 1)) != 0
        large = ~odd & (counts > np.uint64(L1_ENTRIES))
        far = ~odd & ~large & (offsets > np.uint64(INT64_MAX) - counts * np.uint64(8))
        claims.corruptions += int(odd.sum()) + int(large.sum())
        if odd.any():
            wrong = (snapshots[place] for place in np.flatnonzero(odd).tolist())
            items = (
                Item("snapshot table", one.offset, one.l1_table_offset, one.l1_table_offset, None, one.index)
                for one in wrong
            )
            claims.issues.add("unaligned", items, int(odd.sum()))
        for place in np.flatnonzero(far).tolist():
            text = f"the L1 table of snapshot table entry {snapshots[place].index} is unreadable"
            self.layout.reasons.append(Reason(text, snapshots[place].offset))
        usable = ~(odd | large | far)
        return np.column_stack((offsets[usable], counts[usable], numbers[usable]))

    # --- bitmaps ---------------------------------------------------------------------------------

    def _bitmaps(self) -> None:
        layout, claims = self.layout, self.claims
        if layout.bitmap_directory is None:
            return
        self._claim(Owner.BITMAP_DIRECTORY, [layout.bitmap_directory], "bitmap directory")
        spans = [(place.table_offset, place.table_size * 8) for place in layout.bitmaps]
        self._claim(Owner.BITMAP_TABLE, spans, "bitmap table")
        aligned = [place for place in layout.bitmaps if place.table_offset % claims.cluster_size == 0]
        offsets, counts = [place.table_offset for place in aligned], [place.table_size for place in aligned]
        bad: list[U64] = []
        for chunk in l1_chunks(self.image, offsets, counts, list(range(len(aligned)))):
            entries, weight = chunk.entries, chunk.weight
            hosts = chunk.tables
            reserved = has_reserved_bitmap(entries)
            odd = ~reserved & ((hosts & np.uint64(claims.cluster_size - 1)) != 0)
            good = ~reserved & ~odd & (hosts != 0)
            for kind, mask in (("reserved-bits", reserved), ("unaligned", odd)):
                if mask.any():
                    claims.corruptions += int(weight[mask].sum())
                    claims.issues.add(kind, self._bitmap_items(chunk.positions, entries, mask), int(mask.sum()))
                    bad.append(self._first_in_clusters(chunk.positions[mask]))
            claims.bitmap_clusters(hosts[good], weight[good], chunk.positions[good])
            clusters, times = np.unique(hosts[good], return_counts=True)
            self._structures(np.repeat(clusters, np.minimum(times, 2)), Owner.BITMAP_DATA)  # twice is an overlap
        if bad:
            self._unreadable_bitmaps(aligned, np.sort(np.concatenate(bad)))

    def _first_in_clusters(self, positions: U64) -> U64:
        """Return the first of some rising positions in each cluster: tables begin where clusters do."""
        return positions[np.unique(positions >> np.uint64(self.claims.cluster_bits), return_index=True)[1]]

    def _bitmap_items(self, positions: U64, entries: U64, mask: Mask) -> Iterator[Item]:
        for place in np.flatnonzero(mask).tolist():
            entry = int(entries[place])
            yield Item("bitmap table", int(positions[place]), entry, named_offset(entry))

    def _unreadable_bitmaps(self, places: list[BitmapPlace], bad: U64) -> None:
        """QEMU loads every bitmap that is not in use when it opens the image, and fails on a bad entry."""
        starts = np.asarray([place.table_offset for place in places], dtype=np.uint64)
        ends = starts + np.asarray([place.table_size * 8 for place in places], dtype=np.uint64)
        following = np.searchsorted(bad, starts)
        hit = np.append(bad, np.uint64(2**64 - 1))[following] < ends
        for place in itertools.compress(places, hit.tolist()):
            if not place.in_use:
                self.layout.reasons.append(Reason("a bitmap table has a bad entry", place.entry_offset, bitmap=True))

    # --- refcount structures ---------------------------------------------------------------------

    def _saturate(self, most: int) -> None:
        excess = self.claims.counts.excess(most)
        if excess:
            self.claims.corruptions += excess
            over = self.claims.counts.over(most)
            size, cluster = self.claims.cluster_size, self.claims.index_map.cluster
            items = [Item("host cluster", None, self.claims.counts[index], cluster(index) * size) for index in over]
            self.claims.issues.add("refcount-overflow", items)

    def _refcount_blocks(self, most: int) -> None:
        claims, stored = self.claims, self.claims.refcounts
        offsets = stored.offsets
        slots = np.flatnonzero(stored.table)
        reserved = has_reserved_refcount_table_bits(stored.table[slots])
        self._reftable_issue("reftable-reserved", slots[reserved])
        slots = slots[~reserved]
        odd = (offsets[slots] & np.uint64(claims.cluster_size - 1)) != 0
        self._reftable_issue("reftable-unaligned", slots[odd])
        slots = slots[~odd]
        beyond = offsets[slots] >> np.uint64(claims.cluster_bits) >= np.uint64(claims.checked)
        self._reftable_issue("reftable-beyond-eof", slots[beyond])
        slots = slots[~beyond & (offsets[slots] != 0)]
        if not len(slots):
            return
        blocks: list[U64] = []
        for first in range(0, len(slots), _SLOT_CHUNK):  # each sees what those before it added
            part = slots[first : first + _SLOT_CHUNK]
            clusters = offsets[part] >> np.uint64(claims.cluster_bits)
            indices = claims.index_map.of(clusters)
            after = np.minimum(claims.counts.at(indices), np.uint64(most)) + _occurrence(clusters)
            claims.corruptions += int((after > np.uint64(most)).sum())  # a counter at its end cannot take one more
            self._reftable_issue("reftable-shared", part[np.minimum(after, np.uint64(most)) != 1])
            claims.counts.add(indices, 1)
            claims.owners.add(indices, Owner.REFCOUNT_BLOCK)
            blocks.append(distinct(clusters))
        self._structures(distinct(np.concatenate(blocks)) << np.uint64(claims.cluster_bits), Owner.REFCOUNT_BLOCK)

    def _reftable_issue(self, kind: str, slots: Places) -> None:
        if len(slots):
            self.claims.corruptions += len(slots)
            stored = self.claims.refcounts
            items = (
                Item("refcount table", stored.slot_offset(slot), int(stored.table[slot]), int(stored.offsets[slot]))
                for slot in spread(slots, slots * 8 >> self.claims.cluster_bits).tolist()
            )
            self.claims.issues.add(kind, items, len(slots))


def _firsts(one: U64, two: U64) -> Places:
    """Return the first place of each distinct pair of two columns."""
    order = np.lexsort((two, one))
    firsts: Places = order[run_starts(one[order], two[order])]
    return firsts


def _occurrence(values: U64) -> U64:
    """Return, for each value, how many times it has come so far, itself included."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = run_starts(ordered)
    since = np.arange(1, len(values) + 1) - np.repeat(starts, np.diff(starts, append=len(values)))
    counts = np.zeros(len(values), dtype=np.uint64)
    counts[order] = since.astype(np.uint64)
    return counts
