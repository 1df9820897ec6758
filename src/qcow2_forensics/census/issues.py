"""What the census found wrong: all of it counted, and a selection listed, spread over the structures it is in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from ..findings import EVIDENCE_LIMIT, BoundedSample
from ..limits import ISSUES_PER_BATCH
from .arrays import Places, run_starts


class Item(NamedTuple):
    """One entry that is wrong: its file offset, its value, what it points at.

    ``tree`` is -1 for the active state, else the index of a snapshot; ``host`` the host offset
    concerned, ``guest`` the guest offset, where there is one.
    """

    structure: str
    offset: int | None
    value: int
    host: int | None = None
    guest: int | None = None
    tree: int = -1


def spread(places: Places, groups: Places) -> Places:
    """Return as many of some rising places as are listed, the first ones of every group; a group's places are neighbours.

    ``groups`` names the group of each place: the table that an entry is in.
    """
    if len(places) <= EVIDENCE_LIMIT:
        return places
    starts = run_starts(groups)
    rank = np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))
    chosen: Places = np.sort(np.argsort(rank, kind="stable")[:EVIDENCE_LIMIT])
    return places[chosen]


@dataclass
class Issue:
    """Items of one kind, spread over the structures they are in; ``count`` is how many wrong entries there were.

    An entry of a table that several states share counts once.
    """

    items: Sequence[Item] = ()
    count: int = 0


class Issues:
    """Issues by kind. A kind is a short word; :mod:`qcow2_forensics.audit` turns it into findings."""

    def __init__(self, cluster_bits: int) -> None:
        self._cluster_bits = cluster_bits
        self._found: dict[str, BoundedSample[Item]] = {}
        self._counts: dict[str, int] = {}

    def add(self, kind: str, items: Iterable[Item], count: int | None = None) -> None:
        """Note items of a kind; ``count`` when there are more than the iterable gives."""
        kept = self._found.setdefault(kind, BoundedSample())
        seen = 0
        for item in items if count is None else islice(items, ISSUES_PER_BATCH):
            seen += 1
            kept.add(item, None if item.offset is None else (item.structure, item.offset >> self._cluster_bits))
        self._counts[kind] = self._counts.get(kind, 0) + (seen if count is None else count)

    def __getitem__(self, kind: str) -> Issue:
        found = self._found.get(kind)
        return Issue(found.items, self._counts[kind]) if found is not None else Issue()

    def __contains__(self, kind: str) -> bool:
        return kind in self._found

    def kinds(self) -> dict[str, int]:
        """Return the count of every kind met."""
        return dict(self._counts)
