"""A layout against the guest's own page tables: they know where RAM is, and the stream holds them.

Every processor's page tables are walked through the layout. Read through a wrong one, their root lies
nowhere, or what lies there is no page table. The kernel's direct map, where there is one, lists the RAM
that the guest uses.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..limits import PAGE_TABLES, MiB
from ..text import listed
from . import page_tables
from .layout_draft import LayoutDraft, span
from .model import Cpu, Region
from .page_tables import DirectMap, Root, UInt64s, Walk

_LOCAL_APIC: Final = 0xFEE00000  # never RAM: a map that holds it is of all addresses, not of RAM
_LISTED = 8  # ranges named in a sentence
_NOTICED = 2 * MiB  # of RAM that no block answers for; smaller pieces are tables of the firmware


@dataclass(frozen=True, slots=True)
class PageTableEvidence:
    """What the page tables show when they are read through a layout."""

    starts: tuple[Root, ...]
    walk: Walk
    direct: DirectMap | None

    @property
    def bad(self) -> int:
        """Tables that cannot be, or that lie where there is no RAM."""
        return len(self.walk.broken) + len(self.walk.lost)

    @property
    def score(self) -> int:
        """How well the layout fits; more is better."""
        return len(self.walk.sound) - self.bad

    def tables_in(self, address: int, length: int) -> bool:
        """Return whether a sound table was found inside a range."""
        low, high = np.searchsorted(self.walk.sound, np.array([address, address + length], np.uint64))
        return bool(high > low)

    def confirms(self, region: Region, *, order: bool) -> bool:
        """Return whether this shows that a region is RAM; with ``order`` that the right block is there."""
        if self.tables_in(region.address, region.length):
            return True
        direct = self.direct
        return not order and direct is not None and 2 * direct.covered(region.address, region.length) > region.length

    def used(self, address: int, length: int) -> tuple[tuple[int, int], ...]:
        """Return the parts of a range that the guest maps as ordinary memory, but for an identity map."""
        walk, end = self.walk, address + length
        ends = walk.physical + walk.length
        inside = (walk.physical < np.uint64(end)) & (ends > np.uint64(address)) & (walk.physical != walk.virtual)
        low = np.maximum(walk.physical[inside], np.uint64(address))
        high = np.minimum(ends[inside], np.uint64(end))
        return page_tables.join(low, high - low)


class Examiner:
    """Reads page tables through layouts; the processors and the blocks stay the same."""

    def __init__(self, cpus: Sequence[Cpu], read_block: Callable[[str, int, int], bytes]) -> None:
        self._read_block = read_block
        self.cpus = cpus
        self.starts = tuple(
            root
            for cpu in cpus
            if not cpu.runs_nested_guest
            for root in page_tables.roots(cpu)
        )  # fmt: skip

    def examine(self, regions: Iterable[Region]) -> PageTableEvidence | None:
        """Return what the page tables show; None when there are none."""
        if not self.starts:
            return None
        placed = sorted(regions)
        addresses = [region.address for region in placed]

        def read(address: int, length: int) -> bytes:
            number = bisect_right(addresses, address) - 1
            if number < 0 or address + length > placed[number].end:
                return b""
            region = placed[number]
            return self._read_block(region.block, region.block_offset + address - region.address, length)

        walk = page_tables.walk(self.starts, read)
        direct = page_tables.direct_map(walk)
        if direct is not None and direct.covered(_LOCAL_APIC, 4096):
            direct = None
        return PageTableEvidence(self.starts, walk, direct)


def conclude(
    examiner: Examiner, evidence: PageTableEvidence | None, made: LayoutDraft
) -> tuple[list[str], list[tuple[int, int]]]:
    """Record what the check found; return the remaining assumptions, as sentences, and the ranges in doubt."""
    doubts: list[tuple[int, int]] = []
    sentences: list[str] = []
    if evidence is None:
        made.checks.append(_why_not(examiner))
    else:
        made.checks += _account(evidence)
        doubts += _contradictions(evidence, made, sentences)
    regions = sorted(made.regions)
    for assumption in made.assumptions:
        ranges = [item for item in assumption.ranges if not _confirmed(evidence, regions, item, assumption.order)]
        if assumption.order and len(ranges) == 1:
            ranges = []  # the others are in their places, so this one is
        if assumption.ranges and not ranges:
            made.notes.append(f"{assumption.text}; the guest's page tables confirm it")
            continue
        doubts += ranges
        where = f" (in doubt: {_spans(ranges)})" if ranges else ""
        sentences.append(assumption.text + where)
    return sentences, _joined(doubts)


def _confirmed(
    evidence: PageTableEvidence | None, regions: Sequence[Region], item: tuple[int, int], order: bool
) -> bool:
    if evidence is None or evidence.bad:
        return False
    address, length = item
    inside = [region for region in regions if region.address < address + length and address < region.end]
    return bool(inside) and all(evidence.confirms(region, order=order) for region in inside)


def _why_not(examiner: Examiner) -> str:
    if not examiner.cpus:
        return "the stream has no processor registers: the page tables cannot be checked"
    if any(cpu.runs_nested_guest for cpu in examiner.cpus):
        return "the processors run a nested guest: its page tables say nothing about this layout"
    return "no processor has paging enabled: there are no page tables to check the layout with"


def _account(evidence: PageTableEvidence) -> list[str]:
    walk = evidence.walk
    starts = sorted({(root.register, root.address) for root in evidence.starts})
    named = listed([f"{register} {address:#x}" for register, address in starts], 4)
    limit = "" if walk.complete else f"; only the first {PAGE_TABLES} tables were looked at"
    found = f"{len(walk.sound)} page tables from {named}: "
    if evidence.bad:
        found += f"{len(walk.broken)} more cannot be page tables, {len(walk.lost)} lie where no RAM is placed"
    else:
        found += "all are sound and in placed RAM"
    lines = [found + limit]
    if evidence.direct is not None:
        lines.append(f"the kernel's direct map has RAM at {_spans(evidence.direct.ranges)}")
    return lines


def _contradictions(evidence: PageTableEvidence, made: LayoutDraft, sentences: list[str]) -> list[tuple[int, int]]:
    """Return the ranges that the page tables contradict, and note them."""
    doubts = []
    regions = sorted(made.regions)
    if evidence.bad:
        broken = evidence.walk.broken
        for region in regions:
            if not evidence.confirms(region, order=True) or _any_in(broken, region):
                doubts.append((region.address, region.length))
        sentences.append(
            f"the guest's page tables do not fit this layout: {len(evidence.walk.lost)} lie where no RAM is placed, "
            f"{len(broken)} cannot be page tables, {len(evidence.walk.sound)} can (in doubt: {_spans(doubts)})"
        )
    if evidence.direct is not None:
        lacking = [
            item
            for address, length in evidence.direct.ranges
            for item in made.free(address, length)
            if item[1] >= _NOTICED
        ]
        if lacking:
            sentences.append(f"the guest's kernel has RAM where no block was placed: {_spans(lacking)}")
            doubts += lacking
    return doubts


def _any_in(addresses: UInt64s, region: Region) -> bool:
    return bool(((addresses >= np.uint64(region.address)) & (addresses < np.uint64(region.end))).any())


def _spans(ranges: Sequence[tuple[int, int]]) -> str:
    return listed([span(*item) for item in ranges], _LISTED)


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    starts, lengths = (np.array([item[n] for item in ranges], np.uint64) for n in (0, 1))
    return list(page_tables.join(starts, lengths))
