"""Tables that continue each other get slots together, counted from one of them whose slot is known.

::

    slot    [7]      8        9      [10]      11       12
    file   known -> table -> table -> known -> table -> table -> nothing continues it
                    between two of known slot   behind one of known slot

A single wrong link shifts everything behind it. Between two tables of known slot it shows, for their distance is not that
of their slots; after the last one it shows where a table would get a slot that is taken, or one whose
use contradicts it. Such a part gets no slots at all, and neither do two parts that claim the same slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .alignment import MARGIN, Scores, clear_slots

_BETWEEN = "its clusters continue those of tables before and after it"
_BEHIND = "its clusters continue those of a table in the next slot"
_FITS = "it stores the clusters that the file system uses there, and in no other slot"


# Before anything is known of a file, one link in a hundred is taken to be wrong, as if that was seen ten times.
_WRONG, _SEEN = 0.1, 10.0
_ROUNDS = 8
_CHANCE = 0.1  # that a part has a wrong link: the most that is risked after the last table of known slot


class TableChain(NamedTuple):
    """Tables by number, each of which continues the one before; ``before`` and ``after`` are slots of what surrounds them."""

    tables: tuple[int, ...]
    before: int | None
    after: int | None


class _Part(NamedTuple):
    slots: dict[int, int]  # by table
    is_between: bool


def trusted_steps(slots: Sequence[int], pairs: Iterable[tuple[int, int]]) -> int:
    """Return how many links in a row are worth trusting, by those between tables whose ``slots`` are both known.

    Guests differ in how often they jump from the end of one table to the start of another.
    """
    right = [slots[second] == slots[first] + 1 for first, second in pairs]
    wrong = (right.count(False) + _WRONG) / (len(right) + _SEEN)
    return int(_CHANCE / wrong)


def chains_of(count: int, slots: Sequence[int], pairs: Iterable[tuple[int, int]]) -> list[TableChain]:
    """Return ``count`` tables as chains; numbers in ``pairs`` from ``count`` on are tables that have ``slots``.

    A table that two others continue, or that continues two, is linked to neither.
    """
    after: list[set[int]] = [set() for _ in range(count)]  # a slot is written as -1 - slot
    before: list[set[int]] = [set() for _ in range(count)]
    for first, second in pairs:
        if second < count:
            before[second].add(first if first < count else -1 - slots[first - count])
        if first < count:
            after[first].add(second if second < count else -1 - slots[second - count])
    followers: dict[int, int] = {}
    for table in range(count):
        if len(after[table]) == 1:
            (other,) = after[table]
            if other >= 0 and before[other] == {table}:
                followers[table] = other
    result: list[TableChain] = []
    for start in sorted(set(range(count)) - set(followers.values())):
        tables = [start]
        while tables[-1] in followers:
            tables.append(followers[tables[-1]])
        result.append(TableChain(tuple(tables), _slot(before[start]), _slot(after[tables[-1]])))
    return result


def _slot(near: set[int]) -> int | None:
    """Return the slot that is the one thing before or behind a chain, None for none or several."""
    known = min(near) if len(near) == 1 else 0
    return -1 - known if known < 0 else None


def arrange(
    chains: Sequence[TableChain], slots: int, taken: set[int], scores: Scores | None, steps: int
) -> dict[int, tuple[int, str]]:
    """Return the slot of each table that has one by its neighbours or by what fits, and why.

    ``taken`` are slots of other tables; ``steps`` is how far a chain is trusted from its last table of known slot on.
    ``scores``: (tables, slots) how well each slot fits, None where nothing says so.
    """
    clear: dict[int, int] = {}
    placed: dict[int, tuple[int, str]] = {}
    for _ in range(_ROUNDS):  # what has a slot leaves fewer for the others
        used = taken | set(clear.values())
        parts = _undisputed([part for chain in chains for part in _parts(chain, clear, slots, used, scores, steps)])
        placed = {
            table: (slot, _BETWEEN if part.is_between else _BEHIND)
            for part in parts
            for table, slot in part.slots.items()
        }
        if scores is None:
            break
        open_ = scores.copy()
        open_[:, sorted(used | {slot for slot, _ in placed.values()})] = -np.inf
        open_[sorted(clear.keys() | placed.keys())] = -np.inf
        more = clear_slots(open_)
        if not more:
            break
        clear |= more
    return placed | {table: (slot, _FITS) for table, slot in clear.items()}


def _parts(
    chain: TableChain, clear: Mapping[int, int], slots: int, used: set[int], scores: Scores | None, steps: int
) -> Iterator[_Part]:
    """Yield the parts of a chain that get slots: between two tables of known slot, and before the first and after the last."""
    anchors = [] if chain.before is None else [(-1, chain.before)]
    anchors += [(place, clear[table]) for place, table in enumerate(chain.tables) if table in clear]
    anchors += [] if chain.after is None else [(len(chain.tables), chain.after)]
    for number, (place, slot) in enumerate(anchors):
        low, known = anchors[number - 1] if number else (-1, slot - place - 1)
        if slot - known == place - low:  # always, before the first
            first = low + 1 if number else max(0, place - steps)
            yield from _part(chain, range(first, place), slot - place, number > 0, slots, used, scores)
    for place, slot in anchors[-1:]:
        last = min(len(chain.tables), place + 1 + steps)
        yield from _part(chain, range(place + 1, last), slot - place, False, slots, used, scores)


def _part(
    chain: TableChain, places: range, first: int, is_between: bool, slots: int, used: set[int], scores: Scores | None
) -> Iterator[_Part]:
    """Yield a part of a chain whose first table has or would have the slot ``first``, where nothing contradicts it."""
    found = {chain.tables[place]: first + place for place in places}
    possible = all(
        0 <= slot < slots and slot not in used and (scores is None or scores[table, slot] > -MARGIN)
        for table, slot in found.items()
    )
    if found and possible:
        yield _Part(found, is_between)


def _undisputed(parts: list[_Part]) -> list[_Part]:
    """Return the parts that share no slot; of two that do, the one between tables of known slot."""
    result: list[_Part] = []
    held: set[int] = set()
    for between in (True, False):
        some = [part for part in parts if part.is_between == between and held.isdisjoint(part.slots.values())]
        claims: dict[int, int] = {}
        for part in some:
            for slot in part.slots.values():
                claims[slot] = claims.get(slot, 0) + 1
        result += [part for part in some if all(claims[slot] == 1 for slot in part.slots.values())]
        held |= claims.keys()
    return result
