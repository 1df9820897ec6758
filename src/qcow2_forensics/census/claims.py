"""Counts every claim on a host cluster, and notes every entry that breaks a rule.

Follows the order and the rules of QEMU's consistency check, so that its counters come out alike;
what that check does not look at (aliases, references the guest cannot reach) is noted too.
Longer than other modules: one pass in one order over one set of counters, which any cut would have to pass on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ..findings import EVIDENCE_LIMIT
from ..format.entries import named_offset
from ..format.image import Image
from .aliases import Aliases
from .arrays import U64, DistinctValues, Mask, Places, ranges, weighted_segments
from .chosen_entries import ChosenEntries
from .columns import compressed_extents, has_copied, without_copied
from .index_map import IndexMap
from .issues import Issues, Item, spread
from .owner_codes import OwnerCodes
from .owners import Owner
from .refcount_classes import RefcountClasses
from .refcounts import StoredRefcounts
from .reference_counts import Counters
from .walk import L1Chunk, L2Tables, Tables

_SHORT_RUN = 8  # clusters of one structure
_LINEAR_WIDTH = 256  # entries: shorter tables are faster handled together than one by one


class Claims:
    """Counters, owners and issues of one image while its metadata is walked."""

    def __init__(self, image: Image, refcounts: StoredRefcounts, length: int, index_map: IndexMap) -> None:
        header = image.header
        self.image = image
        self.refcounts = refcounts
        self.length = length  # of the file, in whole sectors, as QEMU sees it
        self.index_map = index_map
        self.clusters = index_map.clusters  # of the host file
        self.cluster_size = header.cluster_size
        self.cluster_bits = header.cluster_bits
        self.data_file = header.external_data
        self.extended = header.extended_l2
        self.version = header.version
        self.encrypted = header.crypt_method != 0
        self.disk_size = image.disk_size
        self.issues = Issues(header.cluster_bits)
        self.corruptions = 0
        self.allocated = 0
        self.fragmented = 0
        self.compressed = 0
        self.compressed_entries = 0  # of all states
        self.streams = DistinctValues()  # compressed entries of all states
        self.mapped_clusters = 0  # guest clusters with host bytes, every reference counted
        # These have an element for each host cluster that the index map knows.
        self.counts = Counters(index_map.length)
        self.owners = OwnerCodes(index_map.length)
        self.aliases = Aliases(index_map.length)
        self.refcount_classes = RefcountClasses(refcounts, index_map)
        self.highest_missing = -1  # the furthest host offset pointed at beyond the end of the file

    # --- claims of whole structures --------------------------------------------------------------

    def claim(
        self, kind: Owner, spans: U64 | Sequence[tuple[int, int]], structure: str, trees: U64 | None = None
    ) -> None:
        """Count byte ranges ``(offset, length)``, each of which occupies every cluster it touches."""
        if len(spans) == 1:  # most structures are in one piece
            offset, length = (int(value) for value in spans[0])
            if length > 0 and offset + length < self.length + self.cluster_size:
                first = offset >> self.cluster_bits
                self._claim_run(kind, first, ((offset + length - 1) >> self.cluster_bits) + 1, 1)
                return
        table = np.asarray(spans, dtype=np.uint64).reshape(-1, 2)
        numbers = np.flatnonzero(table[:, 1])
        offsets, lengths = table[numbers].T
        bound = np.uint64(self.length + self.cluster_size)
        beyond = (offsets >= bound) | (lengths >= bound) | (offsets + lengths >= bound)
        if beyond.any():
            count, lost = int(beyond.sum()), numbers[beyond].tolist()
            self.corruptions += count
            places = ((number, *table[number].tolist()) for number in lost)
            items = (
                Item(structure, None, length, offset, None, int(trees[number]) if trees is not None else -1)
                for number, offset, length in places
            )
            self.missing(items, count, int(offsets[beyond].max()))
        bits, one = np.uint64(self.cluster_bits), np.uint64(1)
        first, last = offsets[~beyond] >> bits, ((offsets[~beyond] + lengths[~beyond] - one) >> bits) + one
        segments = weighted_segments(np.column_stack((first, last, np.zeros_like(first))).astype(np.int64))
        lengths = segments.end - segments.start
        short = lengths <= _SHORT_RUN  # many of them only where crafted: all at once
        for start, stop, weight in np.column_stack(segments[:3])[~short].tolist():
            self._claim_run(kind, start, stop, weight)
        _, clusters = ranges(segments.start[short], segments.end[short])
        indices = self.index_map.of(clusters.astype(np.uint64))
        self.counts.add(indices, np.repeat(segments.weight[short], lengths[short]).astype(np.uint64))
        self.owners.add(indices, kind)

    def _claim_run(self, kind: Owner, start: int, stop: int, weight: int) -> None:
        """Count the clusters from ``start`` to ``stop``, ``weight`` times each."""
        index, count = self.index_map.at(start), stop - start
        self.counts.add_range(index, count, weight)
        self.owners.add(slice(index, index + count), kind)

    def bitmap_clusters(self, hosts: U64, weight: U64, positions: U64) -> None:
        """Count the clusters that the bitmap table entries at ``positions`` name, ``weight`` times each."""
        beyond = hosts >= np.uint64(self.length)
        if beyond.any():
            self.corruptions += int(weight[beyond].sum())
            pairs = zip(
                positions[beyond][:EVIDENCE_LIMIT].tolist(), hosts[beyond][:EVIDENCE_LIMIT].tolist(), strict=True
            )
            items = [Item("bitmap table", at, host, host) for at, host in pairs]
            self.missing(items, int(beyond.sum()), int(hosts[beyond].max()))
            hosts, weight = hosts[~beyond], weight[~beyond]
        indices = self.index_map.of(hosts >> np.uint64(self.cluster_bits))
        self.counts.add(indices, weight)
        self.owners.add(indices, Owner.BITMAP_DATA)

    def missing(self, items: Iterable[Item], count: int, host: int) -> None:
        """Note references beyond the end of the file."""
        self.issues.add("beyond-eof", items, count)
        self.highest_missing = max(self.highest_missing, host)

    # --- L1 tables -------------------------------------------------------------------------------

    def l1_entries(self, chunk: L1Chunk, *, active: bool) -> None:
        """Check the entries of a piece of an L1 table; what they name is counted by :meth:`l2_tables`."""
        tables = chunk.tables
        beyond = tables >= np.uint64(self.length)
        self._l1_corrupt("reserved-bits", chunk, chunk.reserved)
        self._l1_corrupt("unaligned", chunk, self._is_unaligned(tables))
        self._l1_corrupt("beyond-eof", chunk, beyond)
        self._missing_hosts(tables[beyond])
        self._l1_note("l1-at-zero", chunk, tables == 0)
        if active:
            single, readable = self.refcount_classes.single(tables >> np.uint64(self.cluster_bits))
            self._l1_corrupt("copied-flag", chunk, (chunk.copied != single) & readable & (tables != 0))

    def _l1_corrupt(self, kind: str, chunk: L1Chunk, mask: Mask) -> None:
        self.corruptions += int(chunk.weight[mask].sum())
        self._l1_note(kind, chunk, mask)

    def _l1_note(self, kind: str, chunk: L1Chunk, mask: Mask) -> None:
        if mask.any():
            self.issues.add(kind, self._l1_items(chunk, np.flatnonzero(mask)), int(mask.sum()))

    def _l1_items(self, chunk: L1Chunk, places: Places) -> Iterator[Item]:
        span = self.image.header.l2_span
        for place in spread(places, chunk.positions[places].astype(np.int64) >> self.cluster_bits).tolist():
            entry = int(chunk.entries[place])
            guest, tree = int(chunk.index[place]) * span, int(chunk.tree[place])
            yield Item("L1", int(chunk.positions[place]), entry, named_offset(entry), guest, tree)

    def _is_unaligned(self, hosts: U64) -> Mask:
        odd: Mask = (hosts & np.uint64(self.cluster_size - 1)) != 0
        return odd

    def _missing_hosts(self, hosts: U64) -> None:
        """Note host offsets beyond the end of the file."""
        if len(hosts):
            self.highest_missing = max(self.highest_missing, int(hosts.max()))

    def l2_tables(self, named: L2Tables) -> None:
        """Count the clusters of the L2 tables themselves."""
        inside = named.part(named.offsets < np.uint64(self.length))
        bits, one = np.uint64(self.cluster_bits), np.uint64(1)
        clusters = inside.offsets >> bits
        weights = inside.active + inside.snapshots
        odd = self._is_unaligned(inside.offsets)
        indices, second = self.index_map.of(clusters), self.index_map.of(clusters[odd] + one)
        for owner, mask in ((Owner.L2, inside.active != 0), (Owner.SNAPSHOT_L2, inside.snapshots != 0)):
            self.owners.add(indices[mask], owner)
            self.owners.add(second[mask[odd]], owner)
        self.counts.add(indices, weights)
        self.counts.add(second, weights[odd])

    # --- L2 entries ------------------------------------------------------------------------------

    def entries(self, tables: Tables) -> None:
        """Count everything a batch of L2 tables maps."""
        if not self.data_file and not self.extended and tables.entries.shape[1] >= _LINEAR_WIDTH:
            tables = self._linear_tables(tables)
        columns = tables.columns
        if not columns.entries.any() and (columns.bitmaps is None or not columns.bitmaps.any()):
            return
        if columns.has_compressed:
            self._compressed(ChosenEntries.where(tables, columns.compressed))
        self._corrupt("reserved-bits", ChosenEntries.where(tables, columns.reserved))
        mapped = columns.present
        if self.data_file and not self.extended:
            mapped = mapped & ((columns.hosts != 0) | ~columns.zero_flags)
        self._subclusters(tables, mapped)
        self._odd_entries(tables, mapped)
        found = ChosenEntries.where(tables, mapped)
        if len(found):
            self._mapped(found)

    def _linear_tables(self, tables: Tables) -> Tables:
        """Count the tables that map one unbroken run of clusters; return the others.

        Large images are mostly made of them, and slices are many times faster than indices. A
        table goes this way only when nothing about it can be wrong.
        """
        width, size = tables.entries.shape[1], np.uint64(self.cluster_size)
        first = tables.entries[:, 0]
        hosts = without_copied(first)
        span = np.uint64(width - 1) * size
        likely = (tables.entries[:, -1] - first == span) & (hosts != 0) & ((hosts & (size - np.uint64(1))) == 0)
        likely &= (hosts < np.uint64(1 << 55)) & (hosts + span < np.uint64(self.length)) & ~tables.shared
        likely &= (tables.index + np.uint64(1)) * np.uint64(width) <= np.uint64(self.disk_size // self.cluster_size)
        rows = np.flatnonzero(likely)
        if not len(rows):
            return tables
        entries = tables.entries if len(rows) == len(tables) else tables.entries[rows]
        rows = rows[(entries[:, 1:] - entries[:, :-1] == size).all(axis=1)]
        starts = self.index_map.of(hosts[rows] >> np.uint64(self.cluster_bits))
        order = np.argsort(starts)
        apart = bool((np.diff(starts[order].astype(np.int64)) >= width).all())
        # Where two tables map the same clusters, the first is counted before the second is looked at.
        together = [order] if apart else [np.asarray([one]) for one in range(len(rows))]
        done = [rows[some][self._linear_runs(tables, rows[some], starts[some])] for some in together if len(some)]
        return tables.without(np.concatenate(done)) if done else tables

    def _linear_runs(self, tables: Tables, rows: Places, starts: U64) -> Mask:
        """Count the runs of clusters, with indices from ``starts``, that linear tables map; return which are counted.

        The runs rise, and share no cluster.
        """
        width = tables.entries.shape[1]
        counted: Mask = (tables.active[rows] == 0) | self._copied_as_a_whole(tables, rows, starts)
        guests = tables.index[rows] * np.uint64(width)
        counted[counted] = self.aliases.runs(starts[counted], width, guests[counted])
        rows, starts = rows[counted], starts[counted]
        if len(rows):
            active, snapshots = tables.active[rows], tables.snapshots[rows]
            self.counts.add_runs(starts, width, active + snapshots)
            self.owners.add(starts[active != 0], Owner.DATA, width)
            self.owners.add(starts[snapshots != 0], Owner.SNAPSHOT_DATA, width)
            self.allocated += int(active.sum()) * width
            self.mapped_clusters += int((active + snapshots).sum()) * width
        return counted

    def _copied_as_a_whole(self, tables: Tables, rows: Places, starts: U64) -> Mask:
        """Return of which linear tables, whose clusters have indices from ``starts``, the copied flags are right."""
        clusters = tables.offsets[rows] >> np.uint64(self.cluster_bits)
        known: Mask = (clusters != 0) & self.refcount_classes.single(clusters)[1]
        width, copied = tables.entries.shape[1], has_copied(tables.entries[rows, 0])
        known &= self.refcount_classes.copied_fits(starts, width, copied)
        return known

    def _corrupt(self, kind: str, found: ChosenEntries) -> None:
        """Note entries that break a rule of QEMU's check."""
        if len(found):
            self.corruptions += int(found.references.sum())
            self._note(kind, found)

    def _note(self, kind: str, found: ChosenEntries) -> None:
        """Note entries, of which QEMU's check may see nothing wrong."""
        if len(found):
            self.issues.add(kind, found.items(), len(found))

    def _subclusters(self, tables: Tables, mapped: Mask) -> None:
        columns = tables.columns
        if columns.bitmaps is None or not columns.bitmaps.any():
            return
        allocated = columns.allocated_bits
        both = ((allocated & columns.zero_bits) != 0) & mapped
        # Compressed entries with a bitmap are counted where compressed entries are.
        nowhere = (allocated != 0) & ~mapped & ~columns.compressed
        for wrong in (both, nowhere):
            self._corrupt("subcluster", ChosenEntries.where(tables, wrong))

    def _odd_entries(self, tables: Tables, mapped: Mask) -> None:
        """Note what QEMU's check does not look at."""
        columns = tables.columns
        if self.extended:
            # One with other reserved bits too is reported already.
            self._note("extended-bit-0", ChosenEntries.where(tables, columns.bit_zero & ~columns.reserved))
        elif self.version < 3:
            self._note("zero-flag-v2", ChosenEntries.where(tables, columns.zero_flags))
        plain = ~mapped & ~columns.compressed & (columns.entries != 0) & ~columns.zero_flags
        self._note("alloc-at-zero", ChosenEntries.where(tables, plain))

    def _mapped(self, found: ChosenEntries) -> None:
        """Count normal and zero-flagged allocated clusters."""
        self.allocated += int(found.active.sum())
        self.mapped_clusters += int(found.references.sum())
        self.fragmented += int(found.active[1:][self._breaks(found)].sum())
        self._corrupt("unaligned", found.part(self._is_unaligned(found.hosts)))
        self._copied(found)
        self._unreachable(found)
        if self.data_file:
            at_guest = found.hosts == found.guests << np.uint64(self.cluster_bits)
            self._note("datafile-mismatch", found.part(~at_guest))
            return
        beyond = found.hosts >= np.uint64(self.length)
        if beyond.any():
            self._beyond_end(found.part(beyond), found.hosts[beyond])
            found = found.part(~beyond)
        clusters = found.hosts >> np.uint64(self.cluster_bits)
        indices = self.index_map.of(clusters)
        self._count(found, indices, Owner.DATA, Owner.SNAPSHOT_DATA)
        self._aliased(found, clusters, self.aliases.plain(indices, found.guests))
        odd = self._is_unaligned(found.hosts)
        if odd.any():
            second = self.index_map.of(clusters[odd] + np.uint64(1))
            self._count(found.part(odd), second, Owner.DATA, Owner.SNAPSHOT_DATA)

    def _breaks(self, found: ChosenEntries) -> Mask:
        """Return where, within a table, a cluster does not follow the one mapped before it."""
        step = found.hosts[1:] - found.hosts[:-1]
        broken: Mask = (step != np.uint64(self.cluster_size)) & (found.rows[1:] == found.rows[:-1])
        return broken

    def _beyond_end(self, found: ChosenEntries, hosts: U64) -> None:
        self._corrupt("beyond-eof", found)
        self._missing_hosts(hosts)

    def _count(self, found: ChosenEntries, indices: U64, active: Owner, snapshot: Owner) -> None:
        """Count the host cluster of each entry, given by its index, for the states that map it."""
        if not len(found):
            return
        weights, first = found.references, int(found.references[0])
        self.counts.add(indices, first if bool((weights == weights[0]).all()) else weights)
        for owner, shares in ((active, found.tables.active), (snapshot, found.tables.snapshots)):
            if shares.all():
                self.owners.add(indices, owner)
            elif shares.any():
                self.owners.add(indices[shares[found.rows] != 0], owner)

    def _copied(self, found: ChosenEntries) -> None:
        """Compare the copied flags of the active state with the refcounts on disk."""
        tables = found.tables
        if not tables.active.any():
            return
        _, table_readable = self.refcount_classes.single(tables.offsets >> np.uint64(self.cluster_bits))
        flags = found.of(tables.columns.copied)
        if self.data_file:
            wrong = ~flags
        else:
            single, readable = self.refcount_classes.single(found.hosts >> np.uint64(self.cluster_bits))
            wrong = (flags != single) & readable
        looked_at = (tables.active != 0) & table_readable & (tables.offsets != 0)
        wrongly_flagged = found.part(wrong & looked_at[found.rows])
        self.corruptions += int(wrongly_flagged.active.sum())
        self._note("copied-flag", wrongly_flagged)

    def _unreachable(self, found: ChosenEntries) -> None:
        """Note what the active state maps past the end of the disk, zero-flagged clusters left out."""
        tables = found.tables
        first = -(-self.disk_size // self.cluster_size)
        if int(tables.index.max() + np.uint64(1)) * tables.entries.shape[1] <= first:
            return
        past = (found.guests >= np.uint64(first)) & (found.active != 0) & ~found.of(tables.columns.zero_flags)
        self._note("beyond-end", found.part(past))

    def _aliased(self, found: ChosenEntries, clusters: U64, clash: Mask) -> None:
        clash = clash | found.tables.shared[found.rows]
        if clash.any():
            self.aliases.keep(clusters[clash])
            self._note("alias", found.part(clash))

    def _compressed(self, found: ChosenEntries) -> None:
        columns = found.tables.columns
        entries = found.of(columns.entries)
        self.streams.add(entries)
        if self.encrypted:
            self._note("compressed-encrypted", found)
        self._corrupt("compressed-copied", found.part(found.of(columns.copied)))
        if self.data_file:
            self._corrupt("compressed-data-file", found)
            return
        if columns.bitmaps is not None:
            odd = found.of(columns.bitmaps) != 0
            self._corrupt("subcluster", found.part(odd))
            found, entries = found.part(~odd), entries[~odd]
        if not len(found):
            return
        active, references = int(found.active.sum()), int(found.references.sum())
        self.allocated += active
        self.compressed += active
        self.fragmented += active
        self.compressed_entries += references
        self.mapped_clusters += references
        offsets, sizes = compressed_extents(entries, self.image.header)
        if self.cluster_bits < 14:
            self._note("compressed-high-bits", found.part(offsets >> np.uint64(56) != 0))
        self._unreachable(found)
        beyond = offsets + sizes >= np.uint64(self.length + self.cluster_size)
        if beyond.any():
            self._beyond_end(found.part(beyond), offsets[beyond])
            found, offsets, sizes = found.part(~beyond), offsets[~beyond], sizes[~beyond]
        bits, one = np.uint64(self.cluster_bits), np.uint64(1)
        clusters, last = offsets >> bits, (offsets + sizes - one) >> bits
        self._aliased(found, clusters, self.aliases.streams(offsets, found.guests))
        while len(found):
            indices = self.index_map.of(clusters)
            self._count(found, indices, Owner.DATA | Owner.COMPRESSED, Owner.SNAPSHOT_DATA | Owner.COMPRESSED)
            more = clusters < last
            found, clusters, last = found.part(more), clusters[more] + one, last[more]

    @property
    def checked(self) -> int:
        """How many clusters the check compares: those of the file, and one more if a claim reaches into it."""
        return self.clusters + (self.counts[self.index_map.at(self.clusters)] > 0)
