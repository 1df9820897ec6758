"""Which slot fits each L2 table best, by the clusters that it stores and those that the file systems use there.

::

    the bitmap says of slot 7   used  used  free  free  used
    the table stores            yes   yes   no    no    yes      fits
    another one stores          no    yes   yes   yes   no       does not

Tables of a disk that was written from start to end rise with their slots, so that the best of all rising
arrangements is looked for; without that order only a table and a slot that clearly prefer each other.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..limits import PLACED_BESIDE, PLACEMENT_CELLS, PLACEMENT_WORK
from .allocation import Bits

Scores = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# How likely it is that a cluster is stored: of what is in use, of what is free, and where nothing is known.
_STORED = {1: 0.93, 0: 0.04, -1: 0.5}
_MARGIN = 8.0  # natural units by which a table's best slot has to be better than its second, and the reverse


def fits(stored: Mask, use: Bits) -> Scores | None:
    """Return (tables, slots) how much better each slot fits with the table than without one; None for too much work.

    ``stored``: (tables, clusters), ``use``: (slots, clusters).
    """
    tables, clusters = stored.shape
    if tables * clusters * len(use) > PLACEMENT_WORK or tables * len(use) > PLACEMENT_CELLS:
        return None
    yes, no = np.zeros(use.shape), np.zeros(use.shape)
    for kind, chance in _STORED.items():
        yes[use == kind] = math.log(chance)
        no[use == kind] = math.log(1 - chance)
    # With the table every cluster counts as it is; without it, all of them are not stored.
    result: Scores = stored.astype(np.float64) @ (yes - no).T
    return result


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


def mutual(scores: Scores) -> dict[int, int]:
    """Return table to slot for those that clearly prefer each other, found one after the other."""
    scores = scores.copy()
    result: dict[int, int] = {}
    while len(result) < len(scores):
        rows, columns = _margins(scores), _margins(scores.T)
        best = scores.argmax(axis=1)
        ready = [
            table
            for table in np.flatnonzero(rows >= _MARGIN).tolist()
            if columns[best[table]] >= _MARGIN and scores[:, best[table]].argmax() == table
        ]
        if not ready:
            break
        for table in ready:
            slot = int(best[table])
            result[table] = slot
            scores[table, :] = -np.inf
            scores[:, slot] = -np.inf
    return result


def beside(scores: Scores, order: list[int | None], free: list[int]) -> dict[int, int]:
    """Return table to slot for those that fit beside their neighbours in the file, found one after the other.

    ``order`` are all tables in the order of the file: the slot of the placed ones, None for those of ``scores``, in
    their order. A guest fills its disk in stretches, so that tables beside each other in the file mostly are in L1.
    """
    order = list(order)
    waiting = [at for at, slot in enumerate(order) if slot is None]
    numbers = {at: number for number, at in enumerate(waiting)}
    columns = {slot: column for column, slot in enumerate(free)}
    best = scores.max(axis=1) if scores.size else np.zeros(len(scores))
    result: dict[int, int] = {}
    steps = dict.fromkeys((at for at, slot in enumerate(order) if slot is not None), 0)  # from what was placed before
    if len(waiting) > PLACED_BESIDE:
        return result
    while True:
        proposed: dict[int, tuple[bool, int, float, int]] = {}  # slot: both neighbours agree, -steps, fit, table
        for at in waiting:
            before = order[at - 1] if at else None
            after = order[at + 1] if at + 1 < len(order) else None
            agree = before is not None and after is not None and before + 1 == after - 1
            for neighbour, slot in ((at - 1, before), (at + 1, after)):
                wanted = -1 if slot is None else slot + at - neighbour
                if wanted not in columns:
                    continue
                fit = float(scores[numbers[at], columns[wanted]] - best[numbers[at]])
                proposal = agree, -steps[neighbour], fit, at
                if fit >= -_MARGIN and proposal > proposed.get(wanted, (False, -len(order), 0.0, -1)):
                    proposed[wanted] = proposal
        if not proposed:
            return result
        (_, behind, _, at), slot = max((proposal, slot) for slot, proposal in proposed.items())
        order[at] = slot
        steps[at] = 1 - behind
        del columns[slot]
        waiting.remove(at)
        result[numbers[at]] = slot


def _margins(scores: Scores) -> Scores:
    """Return for each row by how much its best is better than its second; 0 where it is no gain at all."""
    if scores.shape[1] == 1:
        return np.where(scores[:, 0] > 0, scores[:, 0], 0.0)
    top = np.partition(scores, -2, axis=1)[:, -2:]
    with np.errstate(invalid="ignore"):
        margins: Scores = np.nan_to_num(top[:, 1] - top[:, 0], nan=0.0, posinf=_MARGIN)
    return np.where(top[:, 1] > 0, margins, 0.0)
