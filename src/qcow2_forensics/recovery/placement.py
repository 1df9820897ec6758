"""Which L1 slot each L2 table belongs in, where the L1 table is lost.

In this order: a table that snapshots share keeps their slot; a table that shares clusters with one of
known slot is a later or earlier version of it; content that records its own position. What is left takes slots by
the order of tables in the file where everything says that the disk was written from start to end. Where it was not,
a table gets a slot only where its clusters continue those of a table with a slot, or where what it stores fits one
slot clearly better than every other. A table for which there is neither gets none.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..census.arrays import U64, Mask, distinct, is_among, run_starts
from ..census.columns import is_packed, named_offsets
from ..format.entries import ZERO
from ..limits import PLACEMENT_PAIRS
from .alignment import agreements, chances, fits, rising
from .allocation import Bits
from .chains import arrange, chains_of, trusted_steps
from .confidence import Confidence
from .continuation import continuations, written_in_order
from .slot_evidence import ENOUGH, Choice, Votes, choices

_ROUNDS = 3
_ORDER = "the order in the file only"
_OUTWEIGHS = 1e7  # natural units: more than all clusters of a table, whose use is no evidence of each by itself


class Placement(NamedTuple):
    """L2 table at host ``offset`` in L1 slot ``slot``, how sure that is, and why."""

    slot: int
    offset: int
    confidence: Confidence
    reason: str


class Unplaced(NamedTuple):
    """An L2 table whose slot is to be found. ``votes`` are the slots its content agrees with, with the evidence.

    ``sure`` are those of them for which it is known what the positions in it count from.
    """

    offset: int
    entries: U64
    votes: Votes
    sure: Set[int] = frozenset()


class Placed(NamedTuple):
    """Tables with a slot, each slot once and rising, and those for whose place there is no evidence, in the order of the file.

    ``is_in_order`` says that the disk was written from start to end.
    """

    placements: list[Placement]
    left: list[Unplaced]
    is_in_order: bool = False


Use = Callable[[list[int]], Bits]  # which clusters are in use in each of some slots
UseOf = Callable[[Mapping[int, int]], Use | None]  # by the tables that are placed: host offset by slot


def place(
    tables: list[Unplaced],
    known: Mapping[int, list[U64]],
    slots: int,
    cluster_size: int,
    use_of: UseOf | None = None,
    *,
    fixed: Iterable[Placement] = (),
    ordered: bool = True,
) -> Placed:
    """Return a slot for as many tables as there is evidence for.

    ``known`` maps slots to the entries of tables that snapshots have there; ``slots`` is the length
    of the L1 table. ``use_of`` says which clusters the file systems use, given the tables placed so far.
    ``fixed`` are tables whose slot is known already; they keep it. Tables that are not ``ordered``, as free ones,
    get no slot by what surrounds them in the file.
    """
    tables = sorted(tables, key=lambda table: table.offset)
    found = _by_evidence(tables, known, slots, fixed)
    have = {placed.offset for placed in found.values()}
    waiting = [table for table in tables if table.offset not in have]
    rest: list[Placement] = []
    in_order = ordered and _is_in_order(tables, found, cluster_size)
    if ordered and waiting:
        for _ in range(_ROUNDS):  # what is placed may hold the bitmap of a part that is not
            before = rest
            where = {placed.slot: placed.offset for placed in (*found.values(), *before)}
            use = use_of(where) if use_of is not None else None
            if in_order:
                rest = _between(waiting, found, slots, use)
            else:
                rest = _surrounded(tables, waiting, found, known, slots, cluster_size, use)
            if rest == before or use_of is None:
                break
    by_slot = found | {placed.slot: placed for placed in rest}
    have |= {placed.offset for placed in rest}
    left = [table for table in waiting if table.offset not in have]
    return Placed([by_slot[slot] for slot in sorted(by_slot)], left, in_order)


def in_file_order(placed: Placed, slots: int) -> list[Placement]:
    """Return what was placed, and what was left in the free slots in the order of the file: an arrangement to try."""
    taken = {placement.slot for placement in placed.placements}
    free = (slot for slot in range(slots) if slot not in taken)
    more = [
        Placement(slot, table.offset, Confidence.GUESS, _ORDER) for slot, table in zip(free, placed.left, strict=False)
    ]
    return sorted([*placed.placements, *more])


def _by_evidence(
    tables: list[Unplaced],
    known: Mapping[int, list[U64]],
    slots: int,
    fixed: Iterable[Placement],
) -> dict[int, Placement]:
    """Return tables by slot whose own clusters or content say where they belong; of several the surest."""
    found = {placed.slot: placed for placed in fixed if placed.slot < slots}
    versions = _Versions(known)
    rest: list[Unplaced] = []
    for table in tables:
        version = versions.of(table)
        if version is None or version.slot >= slots:
            rest.append(table)
        elif version.slot not in found or version.confidence > found[version.slot].confidence:
            found[version.slot] = version
    sure_slots = {table.offset: table.sure for table in rest}
    for number, choice in _choices(rest, found).items():
        if choice.slot not in found:
            sure = Confidence.LIKELY if choice.is_enough and choice.slot in sure_slots[number] else Confidence.GUESS
            found[choice.slot] = Placement(choice.slot, number, sure, f"content records its position: {choice.what}")
    return found


def _choices(tables: list[Unplaced], taken: Iterable[int]) -> dict[int, Choice]:
    """Return the slot of each table for which its evidence is best, after those for which nothing else comes close.

    Of two alike partitions, both of which agree with two slots, the one that has more for its slot leaves the other. That is
    never enough: the other may be a file system that no partition table names.
    """
    votes: dict[int, Votes] = {table.offset: table.votes for table in tables}
    result = {number: choice for number, choice in choices(votes).items() if choice.is_enough}
    clear = result
    gone = set(taken)
    for _ in range(_ROUNDS):
        gone |= {choice.slot for choice in clear.values()}
        votes = {
            number: {s: kinds for s, kinds in found.items() if s not in gone}
            for number, found in votes.items()
            if number not in clear
        }
        clear = {number: choice for number, choice in choices(votes).items() if choice.is_enough}
        if not clear:
            break
        result = {number: choice._replace(margin=0.0) for number, choice in clear.items()} | result
    return {number: choice._replace(margin=0.0) for number, choice in choices(votes).items()} | result


def _is_in_order(tables: list[Unplaced], found: Mapping[int, Placement], cluster_size: int) -> bool:
    """Whether nothing says that the disk was not written from start to end."""
    anchors = sorted(found.values(), key=lambda placed: placed.offset)
    rising_ = all(before.slot < after.slot for before, after in pairwise(anchors))
    return rising_ and written_in_order([table.entries for table in tables], cluster_size)


class _Versions:
    """Finds the slot of a table through the clusters that it shares with tables of known slot."""

    def __init__(self, known: Mapping[int, list[U64]]) -> None:
        tables = [(slot, _hosts(entries)) for slot, versions in known.items() for entries in versions]
        none = np.zeros(0, np.uint64)
        hosts = np.concatenate([none, *(named[named != 0] for _, named in tables)])
        slots = np.concatenate([none, *(np.full(np.count_nonzero(named), slot, np.uint64) for slot, named in tables)])
        places = np.concatenate([none, *(np.flatnonzero(named).astype(np.uint64) for _, named in tables)])
        # A key for each host offset at a place of a table, and the lowest and highest slot of the tables that have it there.
        self._hosts = distinct(hosts)
        self._span = np.uint64(max((len(named) for _, named in tables), default=1))
        keys = self._key(hosts, places)
        order = np.lexsort((slots, keys))
        keys, slots = keys[order], slots[order]
        first = run_starts(keys)
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
        used = used[is_among(hosts[used], self._hosts)]
        keys = self._key(hosts[used], used.astype(np.uint64))
        keys = keys[is_among(keys, self._keys)]
        at = np.searchsorted(self._keys, keys)
        slots = distinct(np.concatenate([self._lowest[at], self._highest[at]]))
        if len(slots) != 1:
            return None
        index, count = int(slots[0]), len(keys)
        reason = f"{count} clusters are those of a snapshot's table in this place"
        return Placement(index, table.offset, Confidence.CERTAIN if count > 1 else Confidence.LIKELY, reason)


def _hosts(entries: U64) -> U64:
    """Return what identifies the cluster of each entry: its host offset, or its compressed descriptor; 0 for none."""
    packed = is_packed(entries)
    hosts: U64 = np.where(packed, entries, named_offsets(entries))
    return hosts


def _between(waiting: list[Unplaced], found: Mapping[int, Placement], slots: int, use: Use | None) -> list[Placement]:
    """Place tables of a disk that was written in order between those that are placed.

    Between two neighbours that leave exactly as many slots as there are tables that order is likely.
    Where more slots are free the tables take those whose use fits best with what they store, or else the
    next ones, which is a guess.
    """
    anchors = sorted(found.values(), key=lambda placed: placed.offset)
    groups: dict[int, list[Unplaced]] = {}
    offsets = [anchor.offset for anchor in anchors]
    for table in waiting:
        groups.setdefault(bisect_right(offsets, table.offset), []).append(table)
    result: list[Placement] = []
    for group, tables in groups.items():
        first = anchors[group - 1].slot + 1 if group else 0
        stop = anchors[group].slot if group < len(anchors) else slots
        free = range(first, stop)
        if len(free) == len(tables):
            why = "the order of tables in the file, which leaves no other slot"
            result += _in_order(tables, free, Confidence.LIKELY, why)
        else:
            result += _fitting(tables, free, use)
    return result


def _in_order(tables: list[Unplaced], free: Sequence[int], confidence: Confidence, reason: str) -> list[Placement]:
    return [Placement(slot, table.offset, confidence, reason) for slot, table in zip(free, tables, strict=False)]


def _fitting(tables: list[Unplaced], free: range, use: Use | None) -> list[Placement]:
    """Place tables in order in the free slots that their content agrees with, and whose use fits what they store."""
    chosen = None
    if free and len(free) * len(tables) <= PLACEMENT_PAIRS:
        scores = np.zeros((len(tables), len(free)))
        for row, table in enumerate(tables):  # a position may be that of several file systems; the order decides
            for slot, kinds in table.votes.items():
                if slot in free:
                    bits = sum(kinds.values())
                    scores[row, slot - free.start] = math.log(2) * bits + (_OUTWEIGHS if bits >= ENOUGH else 0.0)
        chosen = rising(scores) if scores.any() else None
        if use is not None:
            chosen = slots_by_use(_stored(tables), use(list(free)), scores, chosen)
    if chosen is None:
        return _in_order(tables, free, Confidence.GUESS, _ORDER)
    why = "what it stores agrees with the file systems there, in the order of the file"
    return _in_order(tables, [free[column] for column in chosen], Confidence.GUESS, why)


def slots_by_use(stored: Mask, use: Bits, votes: npt.NDArray[np.float64], chosen: list[int] | None) -> list[int] | None:
    """Return the slots that fit best by ``votes`` (tables, slots) and by what is stored of what is in use.

    How much of what is free is stored differs: deleted files may all be there still. It is counted where tables are
    by their votes, then where they are by both.
    """
    rows = [row for row, slot in enumerate(chosen or ()) if votes[row, slot] > 0]
    for _ in range(_ROUNDS):
        slots = [(chosen or [])[row] for row in rows]
        scores = fits(stored, use, chances(stored[rows], use[slots]))
        found = rising(scores + votes) if scores is not None else None
        if found is None or found == chosen:
            break
        chosen, rows = found, list(range(len(found)))
    return chosen


def _surrounded(
    tables: list[Unplaced],
    waiting: list[Unplaced],
    found: Mapping[int, Placement],
    known: Mapping[int, list[U64]],
    slots: int,
    cluster_size: int,
    use: Use | None,
) -> list[Placement]:
    """Place tables of a disk that was not written in order, each by what continues it or fits it alone."""
    by_offset = {placed.offset: placed.slot for placed in found.values()}
    versions = [(slot, entries) for slot, some in known.items() for entries in some]
    versions += [(by_offset[table.offset], table.entries) for table in tables if table.offset in by_offset]
    pairs = continuations([*(table.entries for table in waiting), *(entries for _, entries in versions)], cluster_size)
    scores = None
    if use is not None and slots * len(waiting) <= PLACEMENT_PAIRS:
        seen = [(slot, entries) for slot, entries in versions if slot in found]
        stored = np.array([_is_stored(entries) for _, entries in seen]).reshape(len(seen), -1)
        scores = agreements(_stored(waiting), use(list(range(slots))), chances(stored, use([slot for slot, _ in seen])))
    of_known = [slot for slot, _ in versions]
    count = len(waiting)
    linked = [(first - count, second - count) for first, second in pairs if min(first, second) >= count]
    chains = chains_of(count, of_known, pairs)
    arranged = arrange(chains, slots, set(found), scores, trusted_steps(of_known, linked))
    return [Placement(slot, waiting[at].offset, Confidence.GUESS, why) for at, (slot, why) in arranged.items()]


def _stored(tables: list[Unplaced]) -> Mask:
    return np.stack([_is_stored(table.entries) for table in tables])


def _is_stored(entries: U64) -> Mask:
    """Return which entries of tables have bytes in the file: not those that are unallocated or read as zeros."""
    plain = (named_offsets(entries) != 0) & ((entries & np.uint64(ZERO)) == 0)
    stored: Mask = is_packed(entries) | plain
    return stored
