"""Which slot fits each L2 table best, by the clusters that it stores and those that the file systems use there.

::

    the bitmap has for slot 7   used  used  free  free  used
    the table stores            yes   yes   no    no    yes      fits
    another one stores          no    yes   yes   yes   no       does not

Tables of a disk that was written from start to end rise with their slots, so that the best of all rising
arrangements is looked for. Without that order a table gets the one slot that clearly fits better than any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..census.arrays import Mask
from ..limits import PLACEMENT_CELLS, PLACEMENT_WORK
from .allocation import FREE, UNKNOWN, USED, Bits

Scores = npt.NDArray[np.float64]

# How likely it is that a cluster is stored, of what is in use and of what is free, before a table of known place says so.
_STORED = {USED: 0.93, FREE: 0.04}
_OF_UNKNOWN = 0.5
_WEIGHT = 32.0  # clusters that this assumption counts as
_RANGE = 0.02, 0.98  # no observation is certain
MARGIN = 8.0  # natural units by which the best slot of a table has to be better than its second


def chances(stored: Mask, use: Bits) -> dict[int, float]:
    """Return how often clusters in use and free ones are stored in tables of known place, (tables, clusters) both.

    A guest that deletes files leaves clusters stored that are free; then the free ones say little.
    """
    result: dict[int, float] = {}
    for kind, assumed in (*_STORED.items(), (UNKNOWN, _OF_UNKNOWN)):
        seen = stored[use == kind]
        share = (float(seen.sum()) + _WEIGHT * assumed) / (len(seen) + _WEIGHT)
        result[kind] = min(max(share, _RANGE[0]), _RANGE[1])
    result[UNKNOWN] = max(result[UNKNOWN], result[FREE])  # most of it is allocated, as a journal
    return result


def fits(stored: Mask, use: Bits, stored_chances: Mapping[int, float]) -> Scores | None:
    """Return (tables, slots) how much better each slot fits with the table than without one; None for too much work.

    ``stored``: (tables, clusters), ``use``: (slots, clusters); ``stored_chances`` are those of :func:`chances`.
    """
    if _is_too_much(stored, use):
        return None
    gain = np.zeros(use.shape)
    for kind, chance in stored_chances.items():
        gain[use == kind] = math.log(chance / (1 - chance))
    # With the table every cluster counts as it is; without it, all of them are not stored.
    result: Scores = stored.astype(np.float64) @ gain.T
    return result


def agreements(stored: Mask, use: Bits, stored_chances: Mapping[int, float]) -> Scores | None:
    """Return (tables, slots) how much better what a table stores is predicted by a slot's use than by nothing.

    Unlike :func:`fits` it counts clusters in use that the table does not store: another table may have the slot.
    ``stored_chances`` are those of :func:`chances`. None for too much work.
    """
    if _is_too_much(stored, use):
        return None
    yes, no = np.zeros(use.shape), np.zeros(use.shape)
    for kind in _STORED:  # what is not known has no say
        chance = stored_chances[kind]
        yes[use == kind], no[use == kind] = math.log(2 * chance), math.log(2 * (1 - chance))
    result: Scores = stored.astype(np.float64) @ (yes - no).T + no.sum(axis=1)
    return result


def _is_too_much(stored: Mask, use: Bits) -> bool:
    tables, clusters, slots = len(stored), stored.shape[1], len(use)
    too_much: bool = tables * clusters * slots > PLACEMENT_WORK or tables * slots > PLACEMENT_CELLS
    return too_much


def rising(scores: Scores) -> list[int] | None:
    """Return the slot of each table in the best arrangement in which slots rise; None with fewer slots than tables.

    Of arrangements that fit as well, the one with the lowest slots: a file that has more clusters than it
    stores, as one whose end is zeros, stores its first ones.
    """
    tables, slots = scores.shape
    if tables > slots:
        return None
    best = np.zeros(slots + 1)  # of the tables before, in the first n slots
    taken = np.zeros((tables, slots + 1), np.bool_)
    for index in range(tables):
        here = np.full(slots + 1, -np.inf)
        here[1:] = best[:-1] + scores[index]
        best = np.maximum.accumulate(here)
        taken[index, 1:] = here[1:] > best[:-1]  # of slots that fit as well, the first
    result: list[int] = []
    at = slots
    for index in range(tables - 1, -1, -1):
        while not taken[index, at]:
            at -= 1
        at -= 1
        result.append(at)
    return result[::-1]


def clear_slots(scores: Scores) -> dict[int, int]:
    """Return table to slot for those that fit one slot clearly better than every other, and no two of them the same.

    ``scores``: (tables, slots), minus infinity where a slot is taken or a table placed.
    """
    if not scores.size:
        return {}
    best = scores.argmax(axis=1)
    top = scores[np.arange(len(scores)), best]
    near = np.count_nonzero(scores > (top - MARGIN)[:, np.newaxis], axis=1)
    tables = np.flatnonzero((top > 0) & (near == 1))
    wanted = np.bincount(best[tables], minlength=scores.shape[1])
    return {int(table): int(best[table]) for table in tables if wanted[best[table]] == 1}
