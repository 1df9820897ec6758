"""Bytes of mapped clusters that no state shows: under zero flags, in dead subclusters, past the end.

What any live state shows is not residue, so where there are zero flags the clusters every tree reads are gathered too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..census import Census, IndexMap, Subscriber, Tables
from ..census.arrays import I64, U64, Mask, stretches
from ..format.entries import SUBCLUSTER_MASK, SUBCLUSTERS
from ..format.image import Image
from ..format.source import Source
from ..reader.host_holes import host_runs
from . import live_mappings
from .host_ranges import HostRange, piece_of, pieces
from .model import Piece

_TOGETHER = 1 << 14  # clusters whose subclusters are looked at at once


class ZeroFlags:
    """Whether any L2 entry puts a zero flag over a cluster."""

    def __init__(self, _image: Image, _clusters: IndexMap) -> None:
        self.any = False

    def tables(self, batch: Tables) -> None:
        """Take in a batch of tables."""
        self.any = self.any or bool((batch.columns.zero_flags & (batch.columns.hosts != 0)).any())


class AllocatedSubclusters:
    """Which subclusters of each host cluster some state allocates, a bit each (extended L2)."""

    def __init__(self, image: Image, clusters: IndexMap) -> None:
        self._image = image
        self._clusters = clusters
        self.bits = np.zeros(clusters.length, np.uint32)  # by index

    def tables(self, batch: Tables) -> None:
        """Take in a batch of tables."""
        hosts = batch.columns.hosts
        placed = _placed(self._image, hosts)
        if placed.any():
            indices = self._clusters.of(hosts[placed] >> np.uint64(batch.cluster_bits))
            np.bitwise_or.at(self.bits, indices, batch.columns.allocated_bits[placed].astype(np.uint32))


def subscribers(image: Image) -> tuple[type[Subscriber], ...]:
    """Return the subscribers to the walk over L2 tables that hidden bytes are found with."""
    header = image.header
    if header.external_data or header.version < 3:
        return ()
    return (AllocatedSubclusters,) if header.extended_l2 else (ZeroFlags,)


class Mapped(NamedTuple):
    """Host clusters that L2 entries name, by rising host offset, an array a column."""

    hosts: I64
    guests: I64
    trees: I64  # index of the snapshot whose table is reported as the owner, -1 for the active state

    def stored(self, source: Source, size: int) -> Mapped:
        """Return the clusters of which the file system stores any byte; each of its runs is asked for once."""
        kept = np.ones(len(self.hosts), np.bool_)
        at = 0
        while at < len(kept) and self.hosts[at] < source.size:
            host = int(self.hosts[at])
            run = next(host_runs(source, host, source.size - host))
            # A cluster that ends in the next run counts as stored.
            last = run.offset + run.length - (size if run.is_hole and run.offset + run.length < source.size else 1)
            stop = max(at + 1, int(np.searchsorted(self.hosts, last, side="right")))
            kept[at:stop] = not run.is_hole or host > last
            at = stop
        return Mapped(*(column[kept] for column in self))


def _mapped(census: Census, wanted: Callable[[Tables], Mask], known: Mask) -> Mapped:
    """Return the host clusters of wanted entries that are in the file and not known yet, and note them as known."""
    bits = census.image.header.cluster_bits
    parts = [np.zeros((3, 0), np.int64)]
    for batch in census.tables():
        places, offsets = np.flatnonzero(wanted(batch)), batch.columns.hosts.reshape(-1)
        numbers = offsets[places] >> np.uint64(bits)
        inside = numbers < np.uint64(census.clusters)
        places, numbers = places[inside], numbers[inside]
        indices = census.index_map.of(numbers)
        _, first = np.unique(indices, return_index=True)
        first = first[~known[indices[first]]]
        known[indices[first]] = True
        places = places[first]
        guests = batch.guest_clusters(places) << np.uint64(bits)
        trees = batch.tree[places // batch.entries.shape[1]]
        parts.append(np.stack((offsets[places].astype(np.int64), guests.astype(np.int64), trees)))
    columns = np.concatenate(parts, axis=1)
    return Mapped(*columns[:, np.argsort(columns[0], kind="stable")])


def _ranges(image: Image, mapped: Mapped, length: int, kind: str) -> Iterator[HostRange]:
    """Join places of one length that follow each other on the host and in the guest, and yield the ranges."""
    apart = (np.diff(mapped.hosts) != length) | (np.diff(mapped.guests) != length)
    for first, stop in stretches(len(mapped.hosts), apart):
        tree = int(mapped.trees[first])
        owner = image.snapshots[tree].id if 0 <= tree < len(image.snapshots) else ""
        yield HostRange(int(mapped.hosts[first]), (stop - first) * length, kind, int(mapped.guests[first]), owner)


def zero_flagged(image: Image, census: Census) -> Iterator[Piece]:
    """Yield what is in clusters that read as zeros while their bytes are still there."""
    if image.header.version < 3 or image.header.extended_l2 or image.header.external_data:
        return
    size = image.cluster_size
    if not census.seen(ZeroFlags).any:
        return
    clusters, bits = census.index_map, np.uint64(image.header.cluster_bits)
    shown = np.zeros(clusters.length, np.bool_)  # by index: read as data by some state

    def flagged(batch: Tables) -> Mask:
        hosts = batch.columns.data_hosts
        shown[clusters.of(np.minimum(hosts[hosts != 0] >> bits, np.uint64(clusters.clusters)))] = True
        return batch.columns.zero_flags & _placed(image, batch.columns.hosts)

    mapped = _mapped(census, flagged, np.zeros(clusters.length, np.bool_))
    hidden = ~shown[clusters.of(mapped.hosts.astype(np.uint64) >> bits)]
    mapped = Mapped(*(column[hidden] for column in mapped))
    yield from pieces(image.read, _ranges(image, mapped.stored(image.source, size), size, "zero-flagged"), size)


def subclusters(image: Image, census: Census) -> Iterator[Piece]:
    """Yield what is in subclusters that no state allocates, of clusters that are mapped (extended L2)."""
    if not image.header.extended_l2 or image.header.external_data:
        return
    allocated = census.seen(AllocatedSubclusters).bits
    known = allocated == np.uint32(SUBCLUSTER_MASK)
    mapped = _mapped(census, lambda batch: _placed(image, batch.columns.hosts), known)
    mapped = mapped.stored(image.source, image.cluster_size)
    yield from pieces(image.read, _dead(image, census, mapped, allocated), image.cluster_size)


def _dead(image: Image, census: Census, mapped: Mapped, allocated: npt.NDArray[np.uint32]) -> Iterator[HostRange]:
    """Yield the subclusters of some clusters that are not allocated, as ranges."""
    part = image.cluster_size // SUBCLUSTERS
    places = np.arange(SUBCLUSTERS)
    for at in range(0, len(mapped.hosts), _TOGETHER):
        some = Mapped(*(column[at : at + _TOGETHER] for column in mapped))
        bits = allocated[census.index_map.of(some.hosts.astype(np.uint64) >> np.uint64(image.header.cluster_bits))]
        row, column = np.nonzero((bits[:, None] >> places.astype(np.uint32)) & np.uint32(1) == 0)
        dead = Mapped(some.hosts[row] + column * part, some.guests[row] + column * part, some.trees[row])
        yield from _ranges(image, dead, part, "subcluster")


def _placed(image: Image, offsets: U64) -> Mask:
    placed: Mask = (offsets != 0) & (offsets & np.uint64(image.cluster_size - 1) == 0)
    placed &= offsets < np.uint64(image.file_size)
    return placed


def tail(image: Image) -> Iterator[Piece]:
    """Yield what follows the end of the disk in its last, partly visible cluster."""
    header = image.header
    inside = image.disk_size % image.cluster_size
    if not inside or header.version == 1 or header.external_data or header.crypt_method:
        return
    active = live_mappings.StateTable(None, header.l1_table_offset, header.l1_size)
    entry = live_mappings.l2_entry(image, active, image.disk_size // image.cluster_size)
    host = int(entry.hosts[0])
    if host and not entry.zero_flags[0]:
        start = host + inside
        for piece in piece_of(image.read(start, image.cluster_size - inside), start, "beyond-disk"):
            yield replace(piece, guest_offset=image.disk_size + piece.offset - start)
