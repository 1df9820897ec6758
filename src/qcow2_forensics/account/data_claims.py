"""What the states show of the host clusters, as claims: guest data, VM states and compressed streams."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from ..census import Census, Owner
from ..census.arrays import I64, distinct, distinct_rows, is_among
from ..census.columns import compressed_extents
from ..format.entries import SUBCLUSTERS
from .labels import ByteKind, Place
from .marks import Marks
from .shown import ACTIVE, SNAPSHOT, ShownBytes
from .streams import Decoded
from .tiling import runs_of

_SNAPSHOTS, _BOTH = "snapshots", "active state and snapshots"


def labels_of_flags(marks: Marks, of_snapshots: ByteKind = ByteKind.DATA) -> I64:
    """Return the label of data by the flags of the states that show it; -1 where none does."""
    table = np.full(8, marks.label(ByteKind.VM_STATE, _SNAPSHOTS), np.int64)
    table[0] = -1
    table[ACTIVE] = marks.label(ByteKind.DATA, "active state")
    table[SNAPSHOT] = marks.label(of_snapshots, _SNAPSHOTS)
    table[ACTIVE | SNAPSHOT] = marks.label(ByteKind.DATA, _BOTH)
    return table


class AllocatedData:
    """Guest data by allocation alone: whole clusters, as the census counts them."""

    def __init__(self, marks: Marks, *, with_vm_states: bool) -> None:
        of_snapshots = ByteKind.DATA_OR_VM_STATE if with_vm_states else ByteKind.DATA
        self._labels = np.append(labels_of_flags(marks, of_snapshots), marks.label(ByteKind.COMPRESSED))

    def rows(self, starts: I64, stops: I64, owners: npt.NDArray[np.unsignedinteger]) -> I64:
        """Return claims on runs of clusters with these owners, between host offsets."""
        found = self._labels[_flags_of_owners()[owners]]
        kept: I64 = np.column_stack((starts, stops, found))[found >= 0]
        return kept


@functools.cache
def _flags_of_owners() -> npt.NDArray[np.uint8]:
    """Return the flags of the states that show a cluster for every combination of its owners, 8 for compressed data."""
    bits = np.arange(1 << 15)
    flags = np.where(bits & int(Owner.DATA), ACTIVE, 0) | np.where(bits & int(Owner.SNAPSHOT_DATA), SNAPSHOT, 0)
    flags[(bits & int(Owner.COMPRESSED)) != 0] = 8
    return flags.astype(np.uint8)


class ShownData:
    """Guest data byte by byte: what the states show."""

    def __init__(self, census: Census, marks: Marks, decoded: Decoded) -> None:
        self._census = census
        self._seen = census.seen(ShownBytes)
        self._labels = labels_of_flags(marks)
        self._size = census.cluster_size
        parts = self._seen.parts()
        for flags in distinct(parts[:, 2]).tolist():
            some = parts[parts[:, 2] == flags]
            marks.add_many(int(self._labels[flags]), some[:, 0], some[:, 1])
        past, state_end = self._seen.past(), marks.label(Place.PAST_STATE_END)
        marks.add_many(state_end, past[:, 0], past[:, 1])
        self._streams(marks, decoded)

    def _streams(self, marks: Marks, decoded: Decoded) -> None:
        header, entries = self._census.image.header, np.asarray(decoded.entries, np.uint64)
        used = np.asarray(decoded.used, np.int64).reshape(-1, 2)
        past = self._seen.past_streams()
        if len(past):
            used = used[~is_among(entries, past)]
            offsets, lengths = compressed_extents(past, header)
            marks.add_many(marks.label(Place.PAST_STATE_END, "compressed"), offsets, offsets + lengths)
        every = self._census.compressed_entries
        unread = every[~is_among(every, distinct(entries)) & ~is_among(every, past)]
        if len(unread):
            offsets, lengths = compressed_extents(unread, header)
            used = np.concatenate((used, np.column_stack((offsets, offsets + lengths)).astype(np.int64)))
        if len(used):  # several entries may name one stream, and a writer's streams do not overlap
            used = distinct_rows(used)
            marks.add_many(marks.label(ByteKind.COMPRESSED), used[:, 0], used[:, 1])

    def rows(self, first: int, last: int) -> I64:
        """Return claims on the host clusters from ``first`` to ``last`` that are shown as a whole, or in subclusters."""
        index_map, size = self._census.index_map, self._size
        flags = index_map.part(self._seen.flags, first, last)
        if self._seen.extended and flags.any():
            size //= SUBCLUSTERS
            words = index_map.part(self._seen.subclusters, first, last).astype("<u4")
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")
            flags = np.repeat(flags, SUBCLUSTERS) * bits
        starts, stops, values = runs_of(flags, first * self._size, size)
        kept: I64 = np.column_stack((starts, stops, self._labels[values]))[values != 0]
        return kept
