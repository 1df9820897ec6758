"""Which L1 slot each L2 table belongs in, where the L1 table is lost.

In this order: a table that snapshots share keeps their slot; a table that shares clusters with one of
known slot is a later or earlier version of it; content that records its own position; the clusters that
file systems use, against those that the table stores; and the order of tables in the file last, which is
that of a disk written from start to end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..census.columns import is_packed, named_offsets
from ..format.entries import ZERO
from ..limits import PLACEMENT_PAIRS
from .alignment import Scores, beside, fits, mutual, rising
from .allocation import Bits
from .confidence import Confidence
from .geometry import U64

_ROUNDS = 3
_ORDER = "the order in the file only"


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


Use = Callable[[list[int]], Bits]  # which clusters are in use in each of some slots
UseOf = Callable[[Mapping[int, int]], Use | None]  # by the tables that are placed: host offset by slot


def place(
    tables: list[Unplaced],
    known: Mapping[int, list[U64]],
    slots: int,
    use_of: UseOf | None = None,
    *,
    fixed: Iterable[Placement] = (),
    ordered: bool = True,
) -> list[Placement]:
    """Return a slot for as many tables as there is evidence for, each slot once, rising by slot.

    ``known`` maps slots to the entries of tables that snapshots have there; ``slots`` is the length
    of the L1 table. ``use_of`` says which clusters the file systems use, given the tables placed so far.
    ``fixed`` are tables whose slot is known already; they keep it. Tables that are not ``ordered``, as free ones,
    get no slot by their order.
    """
    found = {placed.slot: placed for placed in fixed if placed.slot < slots}
    versions = _Versions(known)
    waiting: list[Unplaced] = []
    for table in sorted(tables, key=lambda table: table.offset):
        placed = versions.of(table) or _by_content(table)
        if placed is None:
            waiting.append(table)
        elif placed.slot not in found or placed.confidence > found[placed.slot].confidence:
            found[placed.slot] = placed
    rest: list[Placement] = []
    for _ in range(_ROUNDS if waiting and ordered else 0):  # what is placed may hold the bitmap of a part that is not
        before = rest
        where = {placed.slot: placed.offset for placed in (*found.values(), *before)}
        rest = _the_rest(waiting, found, slots, use_of(where) if use_of is not None else None)
        if rest == before:
            break
    by_slot = found | {placed.slot: placed for placed in rest}
    return [by_slot[index] for index in sorted(by_slot)]


class _Versions:
    """Finds the slot of a table through the clusters that it shares with tables of known slot."""

    def __init__(self, known: Mapping[int, list[U64]]) -> None:
        tables = [(slot, _hosts(entries)) for slot, versions in known.items() for entries in versions]
        none = np.zeros(0, np.uint64)
        hosts = np.concatenate([none, *(named[named != 0] for _, named in tables)])
        slots = np.concatenate([none, *(np.full(np.count_nonzero(named), slot, np.uint64) for slot, named in tables)])
        places = np.concatenate([none, *(np.flatnonzero(named).astype(np.uint64) for _, named in tables)])
        # A key for each host offset at a place of a table, and the lowest and highest slot of the tables that have it there.
        self._hosts = np.unique(hosts)
        self._span = np.uint64(max((len(named) for _, named in tables), default=1))
        keys = self._key(hosts, places)
        order = np.lexsort((slots, keys))
        keys, slots = keys[order], slots[order]
        first = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))
        self._keys, self._lowest = keys[first], slots[first]
        self._highest = slots[np.append(first[1:], len(keys))[: len(first)] - 1]

    def _key(self, hosts: U64, places: U64) -> U64:
        """Return a number for each host offset at a place; hosts must be known ones."""
        keys: U64 = np.searchsorted(self._hosts, hosts).astype(np.uint64) * self._span + places
        return keys

    def of(self, table: Unplaced) -> Placement | None:
        """Return the slot of the one table that maps some of the same host clusters at the same places."""
        hosts = _hosts(table.entries)
        if not len(self._keys):
            return None
        used = np.flatnonzero(hosts)
        used = used[_is_among(hosts[used], self._hosts)]
        keys = self._key(hosts[used], used.astype(np.uint64))
        keys = keys[_is_among(keys, self._keys)]
        at = np.searchsorted(self._keys, keys)
        slots = np.unique(np.concatenate([self._lowest[at], self._highest[at]]))
        if len(slots) != 1:
            return None
        index, count = int(slots[0]), len(keys)
        reason = f"{count} clusters are those of a snapshot's table in this place"
        return Placement(index, table.offset, Confidence.CERTAIN if count > 1 else Confidence.LIKELY, reason)


def _is_among(values: U64, ordered: U64) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
    return found


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


def _the_rest(waiting: list[Unplaced], found: Mapping[int, Placement], slots: int, use: Use | None) -> list[Placement]:
    """Place the rest between those that are placed, by what they store and by the order they have in the file.

    Between two neighbours that leave exactly as many slots as there are tables that order is likely.
    Where more slots are free the tables take those whose use fits best with what they store, or else the
    next ones, which is a guess.
    """
    anchors = sorted(found.values(), key=lambda placed: placed.offset)
    rising_ = all(before.slot < after.slot for before, after in pairwise(anchors))
    if not rising_:
        anchors = []  # the file was not written in order: nothing lies between anything
    groups: dict[int, list[Unplaced]] = {}
    offsets = [anchor.offset for anchor in anchors]
    for table in waiting:
        groups.setdefault(bisect_right(offsets, table.offset), []).append(table)
    result: list[Placement] = []
    for group, tables in groups.items():
        first = anchors[group - 1].slot + 1 if group else 0
        stop = anchors[group].slot if group < len(anchors) else slots
        free = [index for index in range(first, stop) if index not in found]
        if rising_ and len(free) == len(tables):
            result += _in_order(
                tables, free, Confidence.LIKELY, "the order of tables in the file, which leaves no other slot"
            )
        else:
            result += _fitting(tables, free, use, None if rising_ else found)
    return result


def _in_order(tables: list[Unplaced], free: list[int], confidence: Confidence, reason: str) -> list[Placement]:
    return [Placement(slot, table.offset, confidence, reason) for slot, table in zip(free, tables, strict=False)]


def _fitting(
    tables: list[Unplaced], free: list[int], use: Use | None, found: Mapping[int, Placement] | None
) -> list[Placement]:
    """Place tables in the free slots whose use fits best with what they store; without that by their order.

    ``found`` are the tables placed so far where their order in the file is not that of the disk, None where it is.
    """
    scores = None
    if use is not None and free and len(free) * len(tables) <= PLACEMENT_PAIRS:
        stored = np.stack([_is_stored(table.entries) for table in tables])
        scores = fits(stored, use(free))
    if scores is None or not scores.any():
        return _in_order(tables, free, Confidence.GUESS, _ORDER)
    why = "it stores the clusters that the file system uses there"
    pairs = {}
    if found is not None:
        pairs = mutual(scores)
        pairs |= _beside(tables, free, scores, pairs, found)
    left = [at for at in range(len(tables)) if at not in pairs]
    rest = sorted(set(range(len(free))) - set(pairs.values()))
    chosen = rising(scores[np.ix_(left, rest)])  # those that nothing tells apart rise, as they were written
    if chosen is None:
        chosen = list(range(len(rest)))
    pairs |= {at: rest[slot] for at, slot in zip(left, chosen, strict=False)}
    return [Placement(free[slot], tables[at].offset, Confidence.GUESS, why) for at, slot in pairs.items()]


def _beside(
    tables: list[Unplaced], free: list[int], scores: Scores, pairs: Mapping[int, int], found: Mapping[int, Placement]
) -> dict[int, int]:
    """Return table to index in ``free`` of those that fit beside what is placed before or behind them in the file."""
    left = [at for at in range(len(tables)) if at not in pairs]
    columns = [column for column in range(len(free)) if column not in set(pairs.values())]
    placed = {p.offset: p.slot for p in found.values()} | {tables[at].offset: free[slot] for at, slot in pairs.items()}
    offsets = sorted({*placed, *(tables[at].offset for at in left)})
    slots = [free[column] for column in columns]
    fitting = beside(scores[np.ix_(left, columns)], [placed.get(offset) for offset in offsets], slots)
    by_slot = {slot: column for column, slot in enumerate(free)}
    return {left[number]: by_slot[slot] for number, slot in fitting.items()}


def _is_stored(entries: U64) -> npt.NDArray[np.bool_]:
    """Return which entries of a table have bytes in the file: not those that are unallocated or read as zeros."""
    plain = (named_offsets(entries) != 0) & ((entries & np.uint64(ZERO)) == 0)
    stored: npt.NDArray[np.bool_] = is_packed(entries) | plain
    return stored
