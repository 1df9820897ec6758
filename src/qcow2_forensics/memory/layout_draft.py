"""A layout while it is being decided: where each block goes, why, and what has not been shown."""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Final, NamedTuple

from ..limits import GiB
from ..text import quoted
from .model import Block, Region

FOUR_GIB: Final = 4 * GiB
ADDRESSES: Final = 1 << 52  # the guest-physical address space of x86-64 and aarch64


class Assumption(NamedTuple):
    """Something that the stream does not show, and the addresses that are wrong if it does not hold."""

    text: str
    ranges: tuple[tuple[int, int], ...] = ()
    """``(address, length)``; () for every region that nothing confirms."""
    order: bool = False
    """Whether it is about which block lies where, and not only about where there is RAM."""


@dataclass(slots=True)
class LayoutDraft:
    """Everything decided so far."""

    method: str = "none"
    order: str = "single"
    below: int = 0
    above: int = 0
    above_base: int = FOUR_GIB
    notes: list[str] = field(default_factory=list)
    assumptions: list[Assumption] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    """Not sorted: the certain ones come first, and later ones give way to them."""
    reasons: dict[Region, str] = field(default_factory=dict)
    _sorted: list[Region] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)

    def assume(self, text: str, ranges: Iterable[tuple[int, int]] = (), *, order: bool = False) -> None:
        """Record what has to be assumed about some addresses."""
        self.assumptions.append(Assumption(text, tuple(ranges), order))

    def put(self, region: Region, reason: str) -> bool:
        """Place a region unless something else is there already; return whether it was placed."""
        if region.end > ADDRESSES or any(True for _ in self._overlapping(region.address, region.end)):
            self.assume(f"block {quoted(region.block)} is not placed at {region.address:#x}: no room")
            return False
        self.regions.append(region)
        insort(self._sorted, region)
        self.reasons[region] = reason
        return True

    def _overlapping(self, address: int, end: int) -> Iterator[Region]:
        """Yield the regions with bytes in a range, in order; no two regions overlap."""
        at = max(0, bisect_left(self._sorted, address, key=itemgetter(0)) - 1)
        while at < len(self._sorted) and self._sorted[at].address < end:
            if address < self._sorted[at].end:
                yield self._sorted[at]
            at += 1

    def free(self, address: int, length: int) -> list[tuple[int, int]]:
        """Return the parts ``(address, length)`` of a range in which nothing is placed, in order."""
        end, parts = address + length, []
        for region in self._overlapping(address, end):
            if region.address > address:
                parts.append((address, region.address - address))
            address = max(address, region.end)
        if address < end:
            parts.append((address, end - address))
        return parts


def tile(blocks: Sequence[Block], spans: Sequence[tuple[int, int]]) -> list[Region]:
    """Lay the blocks end to end into the spans ``(address, length)``."""
    regions = []
    queue = [(address, length) for address, length in spans if length]
    for block in blocks:
        offset = 0
        while offset < block.size and queue:
            address, length = queue.pop(0)
            part = min(length, block.size - offset)
            regions.append(Region(address, part, block.name, offset))
            offset += part
            if part < length:
                queue.insert(0, (address + part, length - part))
    return regions


def natural(block: Block) -> list[tuple[int, str]]:
    """Return a sort key that puts ``node10`` after ``node9``."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", block.name)
    return [(int(part), "") if part[0] in "0123456789" else (-1, part) for part in parts]


def span(address: int, length: int) -> str:
    """Return a range of addresses as text."""
    return f"{address:#x}-{address + length - 1:#x}"
