"""What arrays are asked for everywhere: their different values, ranges as rows, and which runs cover what.

Types of arrays are here too. Everything else in the census, and above it, takes them from here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

U64: TypeAlias = npt.NDArray[np.uint64]
I64: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Places: TypeAlias = npt.NDArray[np.intp]
_T = TypeVar("_T", bound=np.generic)
_N = TypeVar("_N", bound=np.integer)

_WAITING = 1 << 20  # values gathered before they are merged


def windows(values: npt.NDArray[_T], width: int) -> npt.NDArray[_T]:
    """Return every ``width`` neighbours of a one-dimensional array: row ``i`` begins at element ``i``; nothing is copied.

    Indexed with the rows where runs begin, it reads or writes these runs as a whole, many times faster than
    by the numbers of their elements.
    """
    step = values.strides[0]
    # numpy's own functions for this take longer than reading a run does.
    return np.ndarray((len(values) - width + 1, width), values.dtype, values, 0, (step, step))


def run_starts(*columns: npt.NDArray[Any]) -> Places:
    """Return where each run of neighbours that are equal in all columns begins."""
    fresh = np.zeros(len(columns[0]), np.bool_)
    fresh[:1] = True
    for values in columns:
        fresh[1:] |= values[1:] != values[:-1]
    return np.flatnonzero(fresh)


def stretches(count: int, breaks: Mask) -> Iterator[tuple[int, int]]:
    """Yield (first, stop) of the stretches that ``count`` elements fall into; element ``i`` ends one where ``breaks[i]``."""
    if count:
        yield from itertools.pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), count])


def sum_by(keys: U64, weights: U64) -> tuple[U64, U64]:
    """Return the distinct keys, rising, and the sum of the weights of each; exact in 64 bits."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = run_starts(ordered)
    return ordered[starts], np.add.reduceat(weights[order], starts)


def distinct(values: npt.NDArray[_N]) -> npt.NDArray[_N]:
    """Return the different values, rising, as ``numpy.unique`` does: that hashes, and takes up to 80 times as long."""
    ordered = values.copy()
    ordered.sort()
    fresh = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=fresh[1:])
    return ordered[fresh]


def distinct_rows(rows: I64) -> I64:
    """Return the different rows of a table, rising; ``numpy.unique`` takes many times as long."""
    ordered = rows[np.lexsort(rows.T[::-1])]
    return ordered[run_starts(*ordered.T)]


def is_among(values: npt.NDArray[_N], known: npt.NDArray[_N]) -> Mask:
    """Return which values are among known ones, which rise; ``numpy.isin`` would sort, or hash, these each time."""
    if not len(known):
        return np.zeros(values.shape, np.bool_)
    among: Mask = known[np.minimum(known.searchsorted(values), len(known) - 1)] == values
    return among


def ranges(starts: I64, stops: I64) -> tuple[I64, I64]:
    """Return the numbers of all ranges, one range after the other, and before them which range each is of."""
    lengths = stops - starts
    which = np.repeat(np.arange(len(starts)), lengths)
    ends = np.cumsum(lengths)
    return which, np.arange(int(lengths.sum())) + np.repeat(stops - ends, lengths)


class Segments(NamedTuple):
    """Disjoint rising byte ranges, one array a column, that ``weight`` intervals cover each.

    ``owner`` is the number of one of them and ``origin`` where that one begins.
    """

    start: I64
    end: I64
    weight: I64
    owner: I64
    origin: I64


def weighted_segments(table: I64) -> Segments:
    """Sweep intervals, a row ``(start, end, owner)`` each: however they repeat or overlap, every byte comes once.

    Of several that cover a segment the owner is the one that reaches furthest, the first of equals.
    """
    table = table[table[:, 1] > table[:, 0]]
    if len(table) < 2:  # the L1 table of an image without snapshots, for one
        starts, ends, owners = table.T
        return Segments(starts, ends, np.ones_like(starts), owners, starts)
    starts, ends, owners = table[table[:, 0].argsort(kind="stable")].T
    reach = np.maximum.accumulate(ends)
    further = np.concatenate(([True], reach[1:] > reach[:-1]))
    furthest = np.maximum.accumulate(np.where(further, np.arange(len(starts)), 0))
    places = distinct(np.concatenate((starts, ends)))
    steps = np.bincount(places.searchsorted(starts), minlength=len(places))
    steps -= np.bincount(places.searchsorted(ends), minlength=len(places))
    weight = steps.cumsum()[:-1]
    chosen = furthest[starts.searchsorted(places[:-1], side="right") - 1]
    columns = (places[:-1], places[1:], weight, owners[chosen], starts[chosen])
    covered = weight > 0
    return Segments(*columns) if covered.all() else Segments(*(column[covered] for column in columns))


def merged(starts: U64, stops: U64) -> tuple[U64, U64]:
    """Return runs [start, stop), in any order, as rising ones that neither overlap nor touch."""
    if not bool(((starts[1:] >= starts[:-1]) & (stops[1:] >= stops[:-1])).all()):  # most tables are in order
        order = np.argsort(starts, kind="stable")
        starts, stops = starts[order], np.maximum.accumulate(stops[order])
    fresh = np.concatenate(([True], starts[1:] > stops[:-1]))
    last = np.append(np.flatnonzero(fresh)[1:] - 1, len(starts) - 1)
    return starts[fresh], stops[last]


class DistinctValues:
    """Gathers values, each once; memory grows with the number of different ones."""

    def __init__(self) -> None:
        self._parts: list[U64] = []
        self._waiting = 0

    def add(self, values: U64) -> None:
        """Take in values in any order."""
        self._parts.append(distinct(values))
        self._waiting += len(self._parts[-1])
        if self._waiting > max(_WAITING, len(self._parts[0])):
            self._merge()

    def _merge(self) -> None:
        self._parts, self._waiting = [distinct(np.concatenate(self._parts))], 0

    def result(self) -> U64:
        """Return every value once, rising."""
        if len(self._parts) > 1:
            self._merge()
        return self._parts[0] if self._parts else np.zeros(0, np.uint64)
