"""A scan of several memories of one machine, in which equal pieces are scanned once.

Snapshots of a machine differ in few places. All memories are walked together, piece by piece; pieces that hold
the same bytes at the same address give the same matches, and are looked at once::

    snapshot 1   |aaaa|bbbb|cccc|      scanned: aaaa bbbb cccc
    snapshot 2   |aaaa|BBBB|cccc|      scanned:      BBBB

A piece is scanned with some bytes before it (for what looks behind) and after it (for what starts in it).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from ..errors import ReadError
from ..limits import KiB, MiB
from .guest_memory import GuestMemory

PIECE: Final = 64 * KiB
BEFORE: Final = 256
AFTER: Final = 4 * KiB  # a match that is longer is found, and cut off there
_BLOCK: Final = 4 * MiB  # read at once; a multiple of PIECE


class Match(NamedTuple):
    """Something found in a memory; ``offset`` is in the bytes that were scanned, or a guest-physical address."""

    offset: int
    label: str
    value: bytes


Finder = Callable[[bytes], Iterable[Match]]


class _Piece(NamedTuple):
    place: int
    end: int
    """Matches that start before it belong to this piece."""
    before: int
    """Bytes that were read before ``place``."""
    data: bytes


def pattern_finder(pattern: re.Pattern[bytes], label: str = "") -> Finder:
    """Return what finds a regular expression."""

    def find(data: bytes) -> Iterator[Match]:
        return (Match(match.start(), label, match[0]) for match in pattern.finditer(data) if match[0])

    return find


def scan_memories(
    memories: Sequence[GuestMemory],
    find: Finder,
    *,
    overlapping: bool = False,
    advance: Callable[[int, int], object] = max,
    unreadable: Callable[[int, ReadError], object] | None = None,
) -> Iterator[tuple[int, Match]]:
    """Yield ``(number of the memory, match)``, piece after piece by guest-physical address, whatever each memory shares with others.

    ``find`` must depend on its bytes alone, and is called with less than 70 KiB. Without ``overlapping`` a match
    that starts inside the one before it is left out, as in a search through all bytes at once. ``advance`` is
    called with the address and the end of the highest memory. ``unreadable`` is called with the number of
    a memory and the error for each block that cannot be read, and goes on; without it the error is raised.
    """
    end = max((memory.size for memory in memories), default=0)
    ranges = [list(memory.valid_ranges()) for memory in memories]
    zeros = [list(memory.zero_ranges(minimum=_BLOCK)) for memory in memories]
    busy = [0] * len(memories)
    known: dict[int, list[Match]] = {}  # of zeros, by their number
    for block in range(0, end, _BLOCK):
        advance(block, end)
        pieces: dict[int, list[tuple[int, _Piece]]] = {}
        for number, memory in enumerate(memories):
            try:
                for piece in _pieces(memory, ranges[number], zeros[number], block):
                    pieces.setdefault(piece.place, []).append((number, piece))
            except ReadError as error:
                if unreadable is None:
                    raise
                unreadable(number, error)
        for place in sorted(pieces):
            done: list[tuple[_Piece, list[Match]]] = []
            for number, piece in pieces[place]:
                matches = next((found for other, found in done if other == piece), None)
                if matches is None:
                    matches = _scan(piece, find, known)
                    done.append((piece, matches))
                for match in matches:
                    busy[number], is_own = _claimed(piece, match, busy[number], overlapping)
                    if is_own:
                        yield number, match._replace(offset=place - piece.before + match.offset)


def _claimed(piece: _Piece, match: Match, busy: int, overlapping: bool) -> tuple[int, bool]:
    """Return up to where a memory is matched now, and whether this match is one to report."""
    address = piece.place - piece.before + match.offset
    end = address + len(match.value)
    if address < piece.place:  # perhaps the rest of a long match that an earlier piece has reported
        return (max(busy, end) if address < busy else busy), False
    is_own = address < piece.end and (overlapping or address >= busy)
    return (max(busy, end) if is_own else busy), is_own


def _scan(piece: _Piece, find: Finder, known: dict[int, list[Match]]) -> list[Match]:
    size = len(piece.data)
    if piece.data.count(0) < size:
        return list(find(piece.data))
    if size not in known:
        known[size] = list(find(piece.data))
    return known[size]


def _pieces(
    memory: GuestMemory, ranges: list[tuple[int, int]], zeros: list[tuple[int, int]], block: int
) -> Iterator[_Piece]:
    """Yield the pieces of a block: on one grid for all memories, cut where a memory has nothing."""
    number = max(0, bisect_right(ranges, (block, 1 << 64)) - 1)
    while number < len(ranges) and ranges[number][0] < block + _BLOCK:
        start, length = ranges[number]
        number += 1
        low, high = max(start, block), min(start + length, block + _BLOCK)
        if low >= high:
            continue
        first, last = max(start, low - BEFORE), min(start + length, high + AFTER)
        content = bytes(last - first) if _inside(zeros, first, last) else memory.read(first, last - first)
        place = low
        while place < high:
            end = min(high, (place // PIECE + 1) * PIECE)
            begin, stop = max(first, place - BEFORE), min(last, end + AFTER)
            yield _Piece(place, end, place - begin, content[begin - first : stop - first])
            place = end


def _inside(ranges: list[tuple[int, int]], start: int, end: int) -> bool:
    number = bisect_right(ranges, (start, 1 << 64)) - 1
    return number >= 0 and end <= sum(ranges[number])
