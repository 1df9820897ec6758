"""L2 tables that an L1 table names and that were overwritten: what else says where their clusters belong.

An older version of the table (a snapshot's, or one in free space) comes first. Without one the
clusters that nothing claims although they are counted, between the lost table and the next, are taken in the
order of the file for what the file system uses there. Both are guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import NamedTuple

import numpy as np

from ..census import Census
from ..census.arrays import U64
from ..census.columns import is_packed
from ..format.header import SECTOR
from ..format.source import Source
from ..limits import LOST_TABLES_REBUILT
from ..residue.structure_detection import Geometry, l2_rows
from .allocation import Bits
from .confidence import Confidence
from .geometry import compression_of
from .patched_source import Patch, PatchedSource
from .placement import Placement, Use
from .rebuilt_metadata import l2_place, stored_l2
from .structures import partitions
from .table_contents import TableReader
from .table_search import table_words

_TABLES_ASKED = 16  # whether they hold compressed clusters
_ROUNDS = 4  # of finding the file system in what was put together so far
UseOf = Callable[[TableReader, Mapping[int, int]], Use | None]


class RebuiltTables(NamedTuple):
    """L2 tables in place of lost ones: their bytes by host offset, and which slot each is for."""

    patches: tuple[Patch, ...]
    placements: tuple[Placement, ...]


def lost_slots(source: Source, geometry: Geometry, targets: Mapping[int, int], leaks: U64) -> list[int]:
    """Return the slots whose table is no L2 table any more, or zeros while clusters are without an owner."""

    def is_lost(offset: int) -> bool:
        words = table_words(source, offset, geometry)
        return not l2_rows(words[np.newaxis], geometry).sound[0] if words.any() else bool(len(leaks))

    of_tables = {offset: is_lost(offset) for offset in dict.fromkeys(targets.values())}
    return list(islice((slot for slot, offset in targets.items() if of_tables[offset]), LOST_TABLES_REBUILT))


def leaked_clusters(census: Census) -> U64:
    """Return the host offsets of clusters that are counted and that nothing claims, in order."""
    size = census.image.cluster_size
    ranges = [np.arange(offset, offset + length, size, dtype=np.uint64) for offset, length in census.leaked()]
    return np.concatenate([np.zeros(0, np.uint64), *ranges])


def rebuild(
    reader: TableReader,
    source: Source,
    geometry: Geometry,
    targets: Mapping[int, int],
    lost: list[int],
    older: Mapping[int, Placement],
    leaks: U64,
    use_of: UseOf,
) -> RebuiltTables:
    """Return tables for the slots that lost theirs; ``targets`` are the tables that L1 names, by slot.

    ``older`` are other versions of tables, by slot. ``use_of`` says what file systems use, given a reader and
    the tables by slot.
    """
    placements = {slot: older[slot] for slot in lost if slot in older}
    open_slots = [slot for slot in lost if slot not in older]
    kept = {slot: offset for slot, offset in targets.items() if slot not in lost}
    kept |= {slot: placed.offset for slot, placed in placements.items()}
    clusters = geometry.l2_span // geometry.cluster_size
    alone = len(open_slots) == 1  # then all of them are of this table, wherever they are
    hosts = {slot: (leaks if alone else _between(leaks, targets[slot], targets))[:clusters] for slot in open_slots}
    hosts = {slot: found for slot, found in hosts.items() if len(found)}
    if _holds_streams(reader, source, geometry, sorted(kept.values()), leaks):
        hosts = {}
    columns = {slot: _first_places(source, slot, found, geometry, clusters) for slot, found in hosts.items()}
    patches = _patches(hosts, columns, geometry)
    for _ in range(_ROUNDS if hosts else 0):
        where = kept | {slot: l2_place(number, geometry) for number, slot in enumerate(hosts)}
        use = use_of(reader.over(PatchedSource(source, patches)), where)
        if use is None:
            break
        before = columns
        rows = use(list(hosts))
        columns = {slot: _used(rows[number], len(found)) for number, (slot, found) in enumerate(hosts.items())}
        patches = _patches(hosts, columns, geometry)
        if columns == before:
            break
    for number, slot in enumerate(hosts):
        reason = "its table is lost: clusters without an owner, in the order of the file"
        placements[slot] = Placement(slot, l2_place(number, geometry), Confidence.GUESS, reason)
    return RebuiltTables(tuple(patches), tuple(placements[slot] for slot in sorted(placements)))


def _holds_streams(reader: TableReader, source: Source, geometry: Geometry, tables: list[int], leaks: U64) -> bool:
    """Whether clusters hold compressed streams: where each belongs was in the lost table alone."""
    if any(is_packed(reader.entries(offset)).any() for offset in tables[:_TABLES_ASKED]):
        return True
    size = geometry.cluster_size
    return bool(len(leaks)) and compression_of(source.read(int(leaks[0]), 2 * size), size) is not None


def _between(leaks: U64, offset: int, targets: Mapping[int, int]) -> U64:
    """Return the leaked clusters between a table and the next that L1 names."""
    stop = min((other for other in targets.values() if other > offset), default=1 << 62)
    first, last = np.searchsorted(leaks, [offset + 1, stop])
    return leaks[first:last]


def _first_places(source: Source, slot: int, hosts: U64, geometry: Geometry, clusters: int) -> list[int]:
    """Return the places in a table to begin with: one after the other, with the gap before a first partition."""
    places = list(range(len(hosts)))
    head = b"" if slot else source.read(int(hosts[0]), min(2 * SECTOR * 32, geometry.cluster_size * len(hosts)))
    found = partitions(head) if len(head) >= SECTOR else ()
    first = min((partition.start for partition in found if partition.start), default=0) // geometry.cluster_size
    lead = -(-3 * SECTOR // geometry.cluster_size)  # the partition table itself
    if first <= lead or first + len(hosts) > clusters:
        return places
    return places[:lead] + [place - lead + first for place in places[lead:]]


def _used(use: Bits, count: int) -> list[int]:
    """Return ``count`` places in a table: those that are in use first, then those of which nothing is known."""
    used, unknown = np.flatnonzero(use > 0).tolist(), np.flatnonzero(use < 0).tolist()
    free = np.flatnonzero(use == 0).tolist()
    return sorted([*used, *unknown, *free][:count])


def _patches(hosts: Mapping[int, U64], columns: Mapping[int, list[int]], geometry: Geometry) -> list[Patch]:
    return [
        stored_l2(number, found, np.array(columns[slot], np.int64), geometry)
        for number, (slot, found) in enumerate(hosts.items())
    ]
