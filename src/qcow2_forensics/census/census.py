"""The results of a census: who claims each host cluster, and what its refcount is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from ..format.image import Image
from .arrays import I64, U64, Mask
from .checked_metadata import MetadataLayout, Reason
from .claims import Claims
from .index_map import IndexMap, Values
from .issues import Issues, Item
from .owners import Owner, Range
from .refcount_check import Comparison, compare_refcounts
from .refcount_classes import MORE, ONE
from .walk import L2Tables, Subscriber, Tables, batches

_RUN_CHUNK = 1 << 17  # clusters looked at together: temporaries stay in the cache

S = TypeVar("S", bound=Subscriber)


class Structures(NamedTuple):
    """Metadata structures of one kind: host offsets and lengths in bytes, and whose they are."""

    offsets: U64
    lengths: U64
    owner: Owner
    trees: tuple[int, ...] = ()  # for L1 tables: -1 the active state, else a snapshot's index


class Census:
    """Who claims each host cluster, and what its refcount says. Made by :func:`take_census`.

    ``check`` holds the counters of ``qemu-img check --output=json``; it is None where that check
    stops without printing any, and ``reasons`` says why. ``end`` is the host offset after the last
    cluster that is claimed or counted, as far as the file goes.
    """

    def __init__(
        self,
        image: Image,
        claims: Claims,
        layout: MetadataLayout,
        named: L2Tables,
        walked: L2Tables,
        structures: list[Structures],
        seen: dict[type[Subscriber], Subscriber],
    ) -> None:
        self.image = image
        self.cluster_size = image.cluster_size
        self.clusters = claims.clusters
        self.layout = layout
        self.reasons: list[Reason] = layout.reasons
        self.named = named
        self._walked = walked
        self._seen = seen
        self.structures = structures
        self.refcounts = claims.refcounts
        self.index_map: IndexMap = claims.index_map
        self.issues: Issues = claims.issues
        self._claims = claims
        self.comparison: Comparison = compare_refcounts(claims)
        self.end = (self.comparison.last + 1) * self.cluster_size
        claims.aliases.forget()

    # --- the check -------------------------------------------------------------------------------

    @property
    def corruptions(self) -> int:
        """What QEMU's check counts as corruptions, also where it prints nothing."""
        return self._claims.corruptions + self.comparison.corruptions

    @cached_property
    def check(self) -> dict[str, str | int] | None:
        """The counters under QEMU's names, in its order; None where its check would stop."""
        if self.reasons:
            return None
        claims, found = self._claims, self.comparison
        counters = {
            "image-end-offset": (found.highest + 1) * self.cluster_size,
            "total-clusters": -(-self.image.disk_size // self.cluster_size),
            "corruptions": self.corruptions,
            "leaks": found.leaks,
            "allocated-clusters": claims.allocated,
            "fragmented-clusters": claims.fragmented,
            "compressed-clusters": claims.compressed,
        }
        shown: dict[str, str | int] = {"filename": self.image.name, "format": "qcow2", "check-errors": found.errors}
        shown.update((name, value) for name, value in counters.items() if value)
        return shown

    @property
    def allocated(self) -> int:
        """How many guest clusters of the active state have host bytes, compressed ones too."""
        return self._claims.allocated

    @property
    def compressed(self) -> int:
        """How many entries of all states are compressed, every reference counted."""
        return self._claims.compressed_entries

    def owned(self, owner: Owner) -> int:
        """Return how many host clusters have one of some owners."""
        chosen = (((owners & np.uint16(owner)) != 0, stops - starts) for starts, stops, owners in self.owner_runs())
        return sum(int(lengths[mask].sum()) for mask, lengths in chosen)

    @property
    def mapped_clusters(self) -> int:
        """How many guest clusters of all states have host bytes, every reference counted."""
        return self._claims.mapped_clusters

    @property
    def aliases(self) -> set[int]:
        """Host clusters mapped at several guest offsets, the first hundred met."""
        return self._claims.aliases.clusters

    @property
    def highest_missing(self) -> int:
        """The furthest host offset something points at beyond the end of the file, -1 for none."""
        return self._claims.highest_missing

    # --- host clusters ---------------------------------------------------------------------------

    def owner(self, offset: int) -> Owner:
        """Return who claims the cluster at a host offset."""
        cluster = offset // self.cluster_size
        # The last claim may reach into the cluster just past the end of the file.
        return self._claims.owners.at(self.index_map.at(cluster)) if cluster <= self.clusters else Owner(0)

    def references(self, offset: int) -> int:
        """Return how often the cluster at a host offset is claimed."""
        cluster = offset // self.cluster_size
        return self._claims.counts[self.index_map.at(cluster)] if cluster <= self.clusters else 0

    def refcount(self, offset: int) -> int | None:
        """Return the stored refcount of the cluster at a host offset, None when it cannot be read."""
        values, readable = self.refcounts.lookup(np.asarray([offset // self.cluster_size], dtype=np.uint64))
        return int(values[0]) if readable[0] else None

    def is_claimed(self, clusters: npt.NDArray[np.integer]) -> Mask:
        """Return which of some host clusters, all inside the file, anything refers to."""
        claimed: Mask = self.owners(clusters) != 0
        return claimed

    def owners(self, clusters: npt.NDArray[np.integer]) -> Values:
        """Return the :class:`Owner` bits of some host clusters, all inside the file."""
        found: Values = self._claims.owners[self.index_map.of(clusters.astype(np.uint64))]
        return found

    def owner_runs(self) -> Iterator[tuple[I64, I64, Values]]:
        """Yield starts, stops and :class:`Owner` bits of runs of clusters with the same ones, tiling the host file.

        A window of the file at a time; runs are cut where windows end.
        """
        for start in range(0, self.clusters, _RUN_CHUNK):
            yield self._claims.owners.runs(self.index_map, start, min(start + _RUN_CHUNK, self.clusters))

    @property
    def unclaimed_bytes(self) -> int:
        """How many bytes of the file are in clusters that nobody claims: those of :meth:`free` and :meth:`leaked`."""
        claimed = int(np.count_nonzero(self._claims.counts.all))
        return (self._claims.checked - claimed) * self.cluster_size

    def free(self) -> Iterator[Range]:
        """Yield runs of clusters nobody claims and whose refcount is 0 or cannot be read."""
        return self._runs(counted=False)

    def leaked(self) -> Iterator[Range]:
        """Yield runs of clusters nobody claims although their refcount is above 0."""
        yield from (Range(*run) for run in self.leaked_runs.tolist())

    @cached_property
    def leaked_runs(self) -> I64:
        """The same as an array, rows (offset, length); several facts ask for them."""
        return np.asarray([*self._runs(counted=True)], np.int64).reshape(-1, 2)

    def _runs(self, *, counted: bool) -> Iterator[Range]:
        pending: list[int] = []
        size = self.cluster_size
        for start in range(0, self.clusters, _RUN_CHUNK):
            stop = min(start + _RUN_CHUNK, self.clusters)
            for first, last in self._stretches(start, stop, counted=counted):
                if pending and pending[1] == first:
                    pending[1] = last
                    continue
                if pending:
                    yield Range(pending[0] * size, (pending[1] - pending[0]) * size)
                pending = [first, last]
        if pending:
            yield Range(pending[0] * size, (pending[1] - pending[0]) * size)

    def _stretches(self, start: int, stop: int, *, counted: bool) -> list[list[int]]:
        if self.index_map.blank(start, stop) and self.refcounts.blank(start, stop):
            return [] if counted else [[start, stop]]
        unclaimed = self.index_map.part(self._claims.counts.all, start, stop) == 0
        if not unclaimed.any():
            return []
        stored = self._claims.refcount_classes.part(start, stop)
        kept = (stored == ONE) | (stored == MORE)
        wanted = unclaimed & (kept if counted else ~kept)
        if not wanted.any():
            return []
        edges = np.flatnonzero(np.diff(wanted.view(np.int8), prepend=0, append=0)) + start
        found: list[list[int]] = edges.reshape(-1, 2).tolist()
        return found

    # --- tables ----------------------------------------------------------------------------------

    def seen(self, kind: type[S]) -> S:
        """Return what a subscriber saw of the L2 tables; when it did not see them being counted, they are walked again."""
        if kind not in self._seen:
            subscriber = kind(self.image, self.index_map)
            for batch in self.tables():
                subscriber.tables(batch)
            self._seen[kind] = subscriber
        return cast(S, self._seen[kind])

    @cached_property
    def compressed_entries(self) -> U64:
        """Every compressed entry of all states once, rising."""
        return self._claims.streams.result()

    def tables(self) -> Iterator[Tables]:
        """Yield every L2 table once, in batches; those past the end of the file are left out.

        For a second look only, at what one knows to be there: facts about all tables subscribe to the first.
        """
        return batches(self.image, self._walked)

    def referrers(self, clusters: set[int], limit: int = 1000) -> dict[int, list[Item]]:
        """Return which L2 entries map some host clusters: one more pass over the tables."""
        from .referrers import referrers

        return referrers(self, clusters, limit)
