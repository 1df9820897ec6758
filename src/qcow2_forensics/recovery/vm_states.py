"""VM states that no snapshot owns any more, found by their first bytes in clusters that nothing claims.

Their order is that of a former L2 table that maps the first cluster, and of the tables after it. Without one
it is that of the clusters in the file, as far as they follow each other unclaimed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from operator import itemgetter
from typing import TypeAlias

import numpy as np

from ..census import Census
from ..census.arrays import U64
from ..census.columns import named_offsets
from ..errors import LimitExceeded
from ..format.source import Source
from ..limits import VM_STATE_CLUSTERS_RECOVERED, VM_STATES_RECOVERED, Budget, MiB
from ..reader.vm_state import STREAM_HEAD
from ..residue.structure_detection import Geometry
from .confidence import Confidence
from .metered_source import stored_pieces
from .patched_source import Patch
from .placement import Placement
from .rebuilt_metadata import stored_l1, stored_l2, with_l1
from .state import RecoveredState
from .table_search import entries_of

_HEAD = int.from_bytes(STREAM_HEAD, "big")
_CHUNK = 4 * MiB
_CLUSTERS_AT_ONCE = 1 << 16


_Former: TypeAlias = "tuple[int, int, U64]"  # the first cluster a former table maps, its own offset, and all it maps


def vm_states(
    source: Source, geometry: Geometry, census: Census, tables: list[int], room: Budget
) -> Iterator[RecoveredState]:
    """Yield VM states in clusters without an owner; ``tables`` are what looks like L2 tables that nothing names.

    ``room`` is what is left for L2 tables of recovered states. Raises :class:`LimitExceeded`.
    """
    skipped = set(tables)
    mapped = ((at, named_offsets(entries_of(source, at, geometry))) for at in tables)
    former = sorted(((int(hosts[0]), at, hosts) for at, hosts in mapped if hosts[0]), key=lambda table: table[:2])
    left = Budget.up_to("clusters of VM states without a table", VM_STATE_CLUSTERS_RECOVERED)
    for head in _heads(source, geometry, census):
        chain = _by_tables(head, former)
        room.spend(len(chain))
        if chain:
            placements = tuple(
                Placement(slot, at, Confidence.LIKELY, "a former L2 table maps it")
                for slot, (_, at, _) in enumerate(chain)
            )
            used = int(np.flatnonzero(chain[-1][2])[-1]) + 1
            size = (len(chain) - 1) * geometry.l2_span + used * geometry.cluster_size
            yield _state(head, "by former tables", geometry, placements, size, ())
            continue
        hosts = _following(head, geometry, census, skipped, left)
        patches = tuple(_tables(hosts, geometry))
        placements = tuple(
            Placement(slot, at, Confidence.GUESS, "the order of clusters in the file only")
            for slot, (at, _) in enumerate(patches)
        )
        yield _state(head, "by their order", geometry, placements, len(hosts) * geometry.cluster_size, patches)


def _heads(source: Source, geometry: Geometry, census: Census) -> Iterator[int]:
    """Yield the host offsets of unclaimed clusters that begin as a migration stream does.

    Raises :class:`LimitExceeded` at one more than are put together.
    """
    size, found = geometry.cluster_size, 0
    for at, length in stored_pieces(source, max(_CHUNK, size)):
        data = source.read(at, length)
        words = np.frombuffer(data, ">u8", count=len(data) // 8)[:: size // 8]
        for row in np.flatnonzero(words >> np.uint64(8) == np.uint64(_HEAD)).tolist():
            offset = at + row * size
            if not census.is_claimed(np.array([offset // size]))[0]:
                if found == VM_STATES_RECOVERED:
                    raise LimitExceeded("number of VM states without an owner", found + 1, found, offset=offset)
                yield offset
                found += 1


def _by_tables(head: int, former: list[_Former]) -> list[_Former]:
    """Return the former tables that map a stream: the one that begins with its first cluster, and those after it.

    ``former`` rises by first cluster, and so does what is returned.
    """
    chain: list[_Former] = []
    index = bisect_left(former, head, key=itemgetter(0))
    if index == len(former) or former[index][0] != head:
        return chain
    while index < len(former):
        chain.append(former[index])
        last = int(former[index][2][-1])
        if not last:
            break
        index = bisect_right(former, max(last, former[index][0]), lo=index + 1, key=itemgetter(0))
    return chain


def _following(head: int, geometry: Geometry, census: Census, tables: set[int], left: Budget) -> list[int]:
    """Return the unclaimed clusters from ``head`` on that follow each other, without what looks like L2 tables."""
    size = geometry.cluster_size
    first, end = head // size, -(-geometry.file_size // size)
    found: list[int] = []
    while first < end:
        clusters = np.arange(first, min(end, first + _CLUSTERS_AT_ONCE))
        claimed = census.is_claimed(clusters)
        stop = int(np.argmax(claimed)) if claimed.any() else len(clusters)
        left.spend(stop)
        found += [at for at in (clusters[:stop] * size).tolist() if at not in tables]
        if stop < len(clusters):
            break
        first += len(clusters)
    return found


def _tables(hosts: list[int], geometry: Geometry) -> Iterator[Patch]:
    per_table = geometry.cluster_size // (8 * geometry.entry_words)
    for number, first in enumerate(range(0, len(hosts), per_table)):
        some = np.array(hosts[first : first + per_table], np.uint64)
        yield stored_l2(number, some, np.arange(len(some)), geometry)


def _state(
    head: int,
    how: str,
    geometry: Geometry,
    placements: tuple[Placement, ...],
    size: int,
    tables: tuple[Patch, ...],
) -> RecoveredState:
    patches = (*with_l1(0, stored_l1(placements)), *tables)
    return RecoveredState(
        0,
        f"a VM state that starts at host offset {head:#x}, its clusters {how}",
        size,
        "the clusters that follow",
        geometry.cluster_size,
        placements,
        backing_unknown=False,
        patches=patches,
        is_memory=True,
    )
