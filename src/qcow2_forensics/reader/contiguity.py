"""How far table entries continue each other: a question put to every L2 table, answered at the speed of C."""

from __future__ import annotations

import sys
from array import array

_WIDEST = 8192  # entries looked at in one go: a slice of an L2 table


def sequence_end(entries: array[int], index: int, stop: int, step: int) -> int:
    """Return the first index from ``index`` on whose entry is not ``step`` above the one before it, at most ``stop``.

    ``step`` is small enough for a run not to leave 64 bits.
    """
    expected = entries[index - 1] + step
    near = min(stop, index + 4)
    while index < near:
        if entries[index] != expected:
            return index
        expected += step
        index += 1
    width = 16  # grows, so that short runs cost little and long ones are found at the speed of C
    if index < stop and entries[stop - 1] == expected + (stop - 1 - index) * step:
        width = stop - index  # most likely all of them
    while index < stop:
        width = min(width, stop - index, _WIDEST)
        if _is_steady(entries, index, width, step):
            index += width
            width *= 4
        elif width == 1:
            break
        else:
            width = -(-width // 4)
    return index


def _is_steady(entries: array[int], index: int, width: int, step: int) -> bool:
    """Whether each of ``width`` entries is ``step`` above the one before it."""
    if not step:
        return entries[index : index + width] == array("Q", [entries[index - 1]]) * width
    # As one long number each: subtracting all entries at once is ten times faster than counting up.
    # The first entry is the lowest digit, so the first that differs shows, whatever follows it.
    return _number(entries[index : index + width]) - _number(entries[index - 1 : index + width - 1]) == step * (
        _ONES >> 64 * (_WIDEST - width)
    )


def _number(entries: array[int]) -> int:
    return int.from_bytes(entries if sys.byteorder == "little" else entries[::-1], sys.byteorder)


_ONES = _number(array("Q", [1]) * _WIDEST)
