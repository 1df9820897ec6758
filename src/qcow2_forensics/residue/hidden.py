"""Bytes of mapped clusters that no state shows: under zero flags, in dead subclusters, past the end.

What any live state shows is not residue, so the clusters every tree reads are gathered first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..census import Census, IndexMap, Subscriber, Tables
from ..format.entries import SUBCLUSTER_MASK, SUBCLUSTERS
from ..format.image import Image
from ..format.source import Source
from ..reader.host_holes import host_runs
from . import live_mappings
from .model import Piece
from .slack import piece_of
from .structure_detection import Words

Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]


def _snapshot(image: Image, batch: Tables, row: int) -> str:
    tree = int(batch.tree[row])
    return image.snapshots[tree].id if 0 <= tree < len(image.snapshots) else ""


class ShownClusters:
    """Which host clusters some state reads as data, and whether any L2 entry puts a zero flag over a cluster."""

    def __init__(self, _image: Image, clusters: IndexMap) -> None:
        self._clusters = clusters
        self.shown = np.zeros(clusters.length, np.bool_)  # by index
        self.any_flagged = False

    def tables(self, batch: Tables) -> None:
        """Take in a batch of tables."""
        hosts = batch.columns.data_hosts
        numbers = hosts[hosts != 0] >> np.uint64(batch.cluster_bits)
        self.shown[self._clusters.of(np.minimum(numbers, np.uint64(self._clusters.clusters)))] = True
        self.any_flagged = self.any_flagged or bool((batch.columns.zero_flags & (batch.columns.hosts != 0)).any())


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
    """Return what of an image has to be known of every L2 table before hidden bytes can be told from shown ones."""
    header = image.header
    if header.external_data or header.version < 3:
        return ()
    return (AllocatedSubclusters,) if header.extended_l2 else (ShownClusters,)


def zero_flagged(image: Image, census: Census) -> Iterator[Piece]:
    """Yield clusters whose entry says zeros while their bytes are still there."""
    if image.header.version < 3 or image.header.extended_l2 or image.header.external_data:
        return
    size = image.cluster_size
    seen = census.seen(ShownClusters)
    if not seen.any_flagged:
        return
    known = seen.shown.copy()  # by index: shown by some state, or looked at already
    for batch in census.tables():
        offsets = batch.columns.hosts
        wanted = batch.columns.zero_flags & (offsets != 0) & (offsets & np.uint64(size - 1) == 0)
        places = _fresh(np.flatnonzero(wanted), offsets.reshape(-1), census, known)
        for place in _stored(places, offsets.reshape(-1), image.source, size).tolist():
            row, column = divmod(place, offsets.shape[1])
            offset = int(offsets[row, column])
            piece = piece_of(image.read(offset, size), offset, "zero-flagged")
            if piece is not None:
                guest = batch.guest_offset(row, column) + piece.offset - offset
                yield replace(piece, guest_offset=guest, snapshot=_snapshot(image, batch, row))


def _fresh(places: Places, offsets: Words, census: Census, known: Flags) -> Places:
    """Return the places, flat ones of a batch, whose host clusters are in the file and not known, and know these."""
    if not len(places):
        return places
    numbers = offsets[places] >> np.uint64(census.image.header.cluster_bits)
    inside = numbers < np.uint64(census.clusters)
    places, numbers = places[inside], numbers[inside]
    indices = census.index_map.of(numbers)
    _, first = np.unique(indices, return_index=True)
    first = np.sort(first[~known[indices[first]]])
    known[indices[first]] = True
    kept: Places = places[first]
    return kept


def _stored(places: Places, offsets: Words, source: Source, size: int) -> Places:
    """Return the places whose host clusters the file system keeps any byte of; each of its runs is asked for once."""
    order = np.argsort(offsets[places], kind="stable")
    rising = offsets[places[order]].astype(np.int64)  # below 2**56
    kept = np.ones(len(places), np.bool_)
    at = 0
    while at < len(rising) and rising[at] < source.size:
        run = next(host_runs(source, int(rising[at]), source.size - int(rising[at])))
        # A cluster that ends in the next run counts as stored.
        last = run.offset + run.length - (size if run.is_hole and run.offset + run.length < source.size else 1)
        stop = max(at + 1, int(np.searchsorted(rising, last, side="right")))
        kept[order[at:stop]] = not run.is_hole or rising[at] > last
        at = stop
    return places[kept]


def subclusters(image: Image, census: Census) -> Iterator[Piece]:
    """Yield bytes in subclusters that no state allocates, of clusters that are mapped (extended L2)."""
    if not image.header.extended_l2 or image.header.external_data:
        return
    size = image.cluster_size
    allocated = census.seen(AllocatedSubclusters).bits
    known = allocated == np.uint32(SUBCLUSTER_MASK)
    for batch in census.tables():
        offsets = batch.columns.hosts.reshape(-1)
        places = _fresh(np.flatnonzero(_placed(image, offsets)), offsets, census, known)
        for place in _stored(places, offsets, image.source, size).tolist():
            host = int(offsets[place])
            row, column = divmod(place, batch.entries.shape[1])
            bits = int(allocated[census.index_map.at(host >> batch.cluster_bits)])
            for piece in _dead(image.read(host, size), host, bits, size // SUBCLUSTERS):
                guest = batch.guest_offset(row, column) + piece.offset - host
                yield replace(piece, guest_offset=guest, snapshot=_snapshot(image, batch, row))


def _placed(image: Image, offsets: Words) -> Flags:
    placed: Flags = (offsets != 0) & (offsets & np.uint64(image.cluster_size - 1) == 0)
    placed &= offsets < np.uint64(image.file_size)
    return placed


def _dead(data: bytes, host: int, allocated: int, part: int) -> Iterator[Piece]:
    """Yield what stands in each run of subclusters that are not allocated."""
    at = 0
    while at < SUBCLUSTERS:
        stop = at
        while stop < SUBCLUSTERS and not allocated >> stop & 1:
            stop += 1
        if stop > at:
            piece = piece_of(data[at * part : stop * part], host + at * part, "subcluster")
            if piece is not None:
                yield piece
        at = stop + 1


def tail(image: Image) -> Iterator[Piece]:
    """Yield what stands behind the end of the disk in its last, partly visible cluster."""
    header = image.header
    inside = image.disk_size % image.cluster_size
    if not inside or header.version == 1 or header.external_data or header.crypt_method:
        return
    active = live_mappings.State(None, header.l1_table_offset, header.l1_size)
    entry = live_mappings.l2_entry(image, active, image.disk_size // image.cluster_size)
    host = int(entry.hosts[0])
    if host and not entry.zero_flags[0]:
        start = host + inside
        piece = piece_of(image.read(start, image.cluster_size - inside), start, "beyond-disk")
        if piece is not None:
            yield replace(piece, guest_offset=image.disk_size + piece.offset - start)
