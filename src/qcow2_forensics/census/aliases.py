"""Which host clusters and compressed streams two guest offsets map.

QEMU shares a cluster between states only at one and the same guest offset, so one remembered
guest offset for each is enough to see every other one.
"""

from __future__ import annotations

import numpy as np

from ..findings import EVIDENCE_LIMIT
from .arrays import U64, Mask
from .guest_tags import GuestTags

_STREAMS = 1 << 20  # remembered; a colliding one displaces another, which can hide an alias, never invent one
_HASH = np.uint64(0x9E37_79B9_7F4A_7C15)
_MODULUS = 2**32 - 1  # guest clusters are remembered in 32 bits; 0 is none


class Aliases:
    """What is known of the guest offsets of host clusters and streams; offsets count in clusters.

    Host clusters are named by their places in the :class:`~.index_map.IndexMap`.
    """

    def __init__(self, length: int) -> None:
        self.clusters: set[int] = set()  # host clusters with an alias, the first met
        self._guests = GuestTags(length)
        self._streams: U64 | None = None
        self._stream_guests = np.zeros(0, dtype=np.uint64)

    def runs(self, starts: U64, count: int, guests: U64) -> Mask:
        """Remember that ``count`` host clusters from each of ``starts`` map guest clusters from each of ``guests``.

        The runs rise and share no cluster. Return for which they are remembered: those that are the plain case.
        """
        first = guests.astype(np.int64) % _MODULUS + 1
        plain = first + count <= _MODULUS
        counts = np.full(int(plain.sum()), count)
        plain[plain] = self._guests.set_runs(starts[plain].astype(np.int64), counts, first[plain])
        return plain

    def plain(self, indices: U64, guests: U64) -> Mask:
        """Remember which guest clusters map host clusters; return which of these have another one too."""
        tags = (guests % np.uint64(_MODULUS) + np.uint64(1)).astype(np.uint32)
        return self._guests.exchange(indices, tags)

    def streams(self, offsets: U64, guests: U64) -> Mask:
        """Do the same for compressed streams at host byte offsets."""
        if self._streams is None:
            self._streams = np.zeros(_STREAMS, dtype=np.uint64)
            self._stream_guests = np.zeros(_STREAMS, dtype=np.uint64)
        slots = (offsets * _HASH) >> np.uint64(44)
        names = offsets + np.uint64(1)
        clash: Mask = (self._streams[slots] == names) & (self._stream_guests[slots] != guests)
        self._streams[slots] = names
        self._stream_guests[slots] = guests
        clash |= (self._streams[slots] == names) & (self._stream_guests[slots] != guests)
        return clash

    def forget(self) -> None:
        """Free what only the counting needs."""
        self._guests = GuestTags(0)
        self._streams = None

    def keep(self, clusters: U64) -> None:
        """Keep host clusters that have an alias."""
        self.clusters.update(clusters[: max(0, EVIDENCE_LIMIT - len(self.clusters))].tolist())
