"""Which L1 slot each L2 table belongs in, where the L1 table is lost.

In this order: a table that snapshots share keeps their slot; a table that shares clusters with one of
known slot is a later or earlier version of it; content that records its own position; and the order of
tables in the file last, which is that of a disk written from start to end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..census.columns import is_packed, named_offsets
from .confidence import Confidence
from .geometry import U64


class Placement(NamedTuple):
    """L2 table at host ``offset`` in L1 slot ``slot``, how sure that is, and why."""

    slot: int
    offset: int
    confidence: Confidence
    reason: str


class Unplaced(NamedTuple):
    """An L2 table whose slot is to be found. ``votes`` are the slots its content agrees with, with the evidence."""

    offset: int
    entries: U64
    votes: Mapping[int, set[str]]


def place(tables: list[Unplaced], known: Mapping[int, list[U64]], slots: int) -> list[Placement]:
    """Return a slot for as many tables as there is evidence for, each slot once, rising by slot.

    ``known`` maps slots to the entries of tables that snapshots have there; ``slots`` is the length
    of the L1 table.
    """
    found: dict[int, Placement] = {}
    versions = _Versions(known)
    waiting: list[Unplaced] = []
    for table in sorted(tables, key=lambda table: table.offset):
        placed = versions.of(table) or _by_content(table)
        if placed is None:
            waiting.append(table)
        elif placed.slot not in found or placed.confidence > found[placed.slot].confidence:
            found[placed.slot] = placed
    for placed in _by_order(waiting, found, slots):
        found[placed.slot] = placed
    return [found[index] for index in sorted(found)]


class _Versions:
    """Finds the slot of a table through the clusters that it shares with tables of known slot."""

    def __init__(self, known: Mapping[int, list[U64]]) -> None:
        tables = [(slot, _hosts(entries)) for slot, versions in known.items() for entries in versions]
        none = np.zeros(0, np.uint64)
        hosts = np.concatenate([none, *(named for _, named in tables)])
        slots = np.concatenate([none, *(np.full(len(named), slot, np.uint64) for slot, named in tables)])
        places = np.concatenate([none, *(np.arange(len(named), dtype=np.uint64) for _, named in tables)])
        order = np.argsort(hosts, kind="stable")
        order = order[hosts[order] != 0]
        # By host offset: the slot of the table that names it, and the place of its entry in that table.
        self._hosts, self._slots, self._places = hosts[order], slots[order], places[order]

    def of(self, table: Unplaced) -> Placement | None:
        """Return the slot of the one table that maps some of the same host clusters at the same places."""
        hosts = _hosts(table.entries)
        used = np.flatnonzero(hosts)
        firsts = np.searchsorted(self._hosts, hosts[used])
        stops = np.searchsorted(self._hosts, hosts[used], "right")
        shared: Counter[int] = Counter()
        for place_, first, stop in zip(used.tolist(), firsts.tolist(), stops.tolist(), strict=True):
            same = self._places[first:stop] == place_
            shared.update(set(self._slots[first:stop][same].tolist()))
        if len(shared) != 1:
            return None
        ((index, count),) = shared.items()
        reason = f"{count} clusters are those of a snapshot's table in this place"
        return Placement(index, table.offset, Confidence.CERTAIN if count > 1 else Confidence.LIKELY, reason)


def _hosts(entries: U64) -> U64:
    """Return what identifies the cluster of each entry: its host offset, or its compressed descriptor; 0 for none."""
    packed = is_packed(entries)
    hosts: U64 = np.where(packed, entries, named_offsets(entries))
    return hosts


def _by_content(table: Unplaced) -> Placement | None:
    if not table.votes:
        return None
    best = max(len(evidence) for evidence in table.votes.values())
    slots = [index for index, evidence in table.votes.items() if len(evidence) == best]
    if len(slots) != 1:
        return None
    what = ", ".join(sorted(table.votes[slots[0]]))
    return Placement(slots[0], table.offset, Confidence.LIKELY, f"content records its position: {what}")


def _by_order(waiting: list[Unplaced], found: Mapping[int, Placement], slots: int) -> list[Placement]:
    """Place the rest between those that are placed, in the order they have in the file.

    Between two neighbours that leave exactly as many slots as there are tables that order is likely;
    otherwise each takes the next free slot, which is a guess.
    """
    anchors = sorted(found.values(), key=lambda placed: placed.offset)
    rising = all(before.slot < after.slot for before, after in pairwise(anchors))
    if not rising:
        anchors = []  # the file was not written in order: nothing lies between anything
    groups: dict[int, list[Unplaced]] = {}
    offsets = [anchor.offset for anchor in anchors]
    for table in waiting:
        groups.setdefault(bisect_right(offsets, table.offset), []).append(table)
    result: list[Placement] = []
    taken = set(found)
    for group, tables in groups.items():
        first = anchors[group - 1].slot + 1 if group else 0
        stop = anchors[group].slot if group < len(anchors) else slots
        free = [index for index in range(first, stop) if index not in taken]
        exact = rising and len(free) == len(tables)
        reason = (
            "the order of tables in the file, which leaves no other slot" if exact else "the order in the file only"
        )
        for index, table in zip(free, tables, strict=False):
            taken.add(index)
            result.append(Placement(index, table.offset, Confidence.LIKELY if exact else Confidence.GUESS, reason))
    return result
