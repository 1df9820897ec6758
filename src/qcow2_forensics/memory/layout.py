"""Which RAM block lies at which guest-physical address: decided from evidence, checked by evidence.

::

    given_layout   what the examiner states comes first
    modules        then what states its own address: libvirt, virtio-mem, NVDIMM in the SRAT
    system_ram     then the machine's own RAM: CMOS, SRAT, DSDT, and a table of machine types
    layout_check   the page tables of the guest choose where those leave a choice
    modules        then the modules, where the page tables have RAM that nothing else accounts for
    layout_check   and the page tables are held against the whole

What was used, what had to be assumed and which addresses are in doubt is part of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from ..limits import SWAPPED_NODES
from ..text import quoted
from . import modules, system_ram
from .acpi_tables import Affinity, memory_affinities, pci_windows, read_tables
from .given_layout import Given, apply
from .layout_check import Examiner, PageTableEvidence, conclude
from .layout_draft import FOUR_GIB, LayoutDraft, tile
from .model import Block, Layout, Region
from .system_ram import Order, RamEvidence

_LEFT_OUT = 64 << 20  # of RAM at the top of the part below 4 GiB, that the firmware keeps to itself


def place(facts: RamEvidence, given: Given = ()) -> tuple[str, Layout, tuple[Region, ...]]:
    """Return the architecture, how the layout was decided, and the regions in order of address."""
    made = LayoutDraft()
    examiner = Examiner(facts.cpus, facts.read_block)
    apply(given, facts.blocks, made)
    tables = read_tables(facts.blocks, facts.read_block)
    ranges = memory_affinities(tables)
    if ranges:
        made.notes.append(f"the SRAT names {len(ranges)} memory ranges")
    found = [block for block in system_ram.candidates(facts, made) if not _given_whole(block, made)]
    architecture, base = system_ram.architecture(facts)
    modules.exact(found, ranges, facts, made)
    placed, stated = {region.block for region in made.regions}, {item.block for item in given}
    found = [block for block in found if block.name not in placed or block.name in stated]
    waiting_names = {block.name for block in found}
    whole = any(item.block in system_ram.DEFAULT_NAMES and item.block not in waiting_names for item in given)
    order = Order([]) if whole else system_ram.system_blocks(found, ranges, facts, made)
    if not whole and (not order.blocks or (not architecture and not ranges)):
        if not made.regions:
            made.notes.append(f"machine type {quoted(facts.machine)} is not known, no block is placed")
        return _result(architecture, facts.blocks, examiner, examiner.examine(made.regions), made)
    if order.blocks:
        _Machine(facts, ranges, pci_windows(tables), order, examiner, made).place(architecture, base)
    evidence = examiner.examine(made.regions)
    own_blocks = set(order.blocks)
    waiting = [block for block in found if block not in own_blocks]
    if waiting:
        own = {block.name for block in order.blocks} or set(system_ram.DEFAULT_NAMES)
        end = max((region.end for region in made.regions if region.block in own), default=0)
        _modules(waiting, ranges, end, facts, evidence, made)
        evidence = examiner.examine(made.regions)
    system_ram.covered_by_srat(made.regions, ranges, made)
    return _result(architecture, facts.blocks, examiner, evidence, made)


def _given_whole(block: Block, made: LayoutDraft) -> bool:
    return sum(region.length for region in made.regions if region.block == block.name) == block.size


def _modules(
    waiting: list[Block],
    ranges: Sequence[Affinity],
    end: int,
    facts: RamEvidence,
    evidence: PageTableEvidence | None,
    made: LayoutDraft,
) -> None:
    windows = modules.windows_for(waiting, ranges, end, facts, made)
    if not windows:
        return
    shown: list[tuple[int, int]] = []
    whole = evidence is not None and evidence.direct is not None
    if evidence is not None:
        for address, length in windows:
            if evidence.direct is None:
                shown += evidence.used(address, length)
            else:
                for start, size in evidence.direct.ranges:
                    low, high = max(start, address), min(start + size, address + length)
                    shown += [(low, high - low)] if low < high else []
    modules.place_modules(waiting, windows, shown, whole, made)


class _Machine:
    """Places the machine's own RAM, trying what the evidence leaves open against the page tables."""

    def __init__(
        self,
        facts: RamEvidence,
        ranges: Sequence[Affinity],
        windows: Sequence[tuple[int, int]],
        order: Order,
        examiner: Examiner,
        made: LayoutDraft,
    ) -> None:
        self._facts = facts
        self._ranges = ranges
        self._windows = windows
        self._order = order
        self._examiner = examiner
        self._made = made
        self._blocks = list(order.blocks)

    def place(self, architecture: str, base: int) -> None:
        """Decide and place the regions."""
        made = self._made
        total = sum(block.size for block in self._blocks)
        if architecture == "x86":
            system_ram.split(self._facts, total, self._ranges, made)
            others = system_ram.base_above(self._facts, self._ranges, self._windows, made)
            reason = {"cmos": "CMOS", "srat": "the SRAT"}.get(made.method, "the table of machine types")
            self._choose_base(others)
            self._choose_split(total)
            spans = self._spans()
        else:
            made.method = "machine" if architecture else "srat"
            if not architecture:
                base = min(item.base for item in self._ranges)
            reason = f"RAM starts at {base:#x} on this machine type" if architecture else "the SRAT's lowest address"
            made.notes.append(f"RAM starts at {base:#x} on machine type {quoted(self._facts.machine)}")
            spans = [(base, total)]
            made.above = total
        self._choose_order(spans)
        regions = tile(self._blocks, spans)
        if self._order.unsure:
            sizes = [block.size for block in self._blocks[self._order.kept :]]
            loose = {
                block.name
                for block in self._blocks[self._order.kept :]
                if self._order.any_size or sizes.count(block.size) > 1
            }
            made.assume(
                self._order.unsure,
                [(region.address, region.length) for region in regions if region.block in loose],
                order=True,
            )
        stated = list(made.regions)
        for region in regions:
            for part in self._left(region, stated):
                made.put(part, reason if region.address < FOUR_GIB else self._reason_above(reason))

    def _left(self, region: Region, stated: Sequence[Region]) -> Iterator[Region]:
        """Yield the parts of a region whose bytes and addresses are not taken by what the examiner stated."""
        taken = sorted(other.block_offset for other in stated if other.block == region.block)
        length = min([region.length, *(start - region.block_offset for start in taken)])
        if length > 0:
            for address, size in self._made.free(region.address, length):
                yield Region(address, size, region.block, region.block_offset + address - region.address)

    def _reason_above(self, reason: str) -> str:
        base = self._made.above_base
        return reason if base == FOUR_GIB or self._made.below == 0 else f"{reason}, above 4 GiB from {base:#x}"

    def _spans(self) -> list[tuple[int, int]]:
        return [(0, self._made.below), (self._made.above_base, self._made.above)]

    def _evidence(self, spans: Sequence[tuple[int, int]]) -> PageTableEvidence | None:
        return self._examiner.examine([*self._made.regions, *tile(self._blocks, spans)])

    def _choose_base(self, others: Sequence[int]) -> None:
        """Take another start of the RAM above 4 GiB when the page tables fit it better."""
        made = self._made
        best = self._evidence(self._spans()) if others else None
        if best is None or (not best.bad and best.tables_in(made.above_base, made.above)):
            return
        for base in others:
            evidence = self._evidence([(0, made.below), (base, made.above)])
            if evidence is not None and evidence.score > best.score:
                best = evidence
                made.assumptions[:] = [
                    item for item in made.assumptions if (made.above_base, made.above) not in item.ranges
                ]
                made.above_base = base
                made.notes.append(f"the page tables fit RAM above 4 GiB that starts at {base:#x}")

    def _choose_split(self, total: int) -> None:
        """Take the split from the kernel's direct map when only a table of machine types decided it."""
        made = self._made
        evidence = self._evidence(self._spans()) if made.method == "machine" else None
        if evidence is None or evidence.direct is None:
            return
        fixed = [region.address for region in made.regions]
        limit = min((address for address in fixed if address >= made.above_base), default=1 << 62)
        low = max((a + n for a, n in evidence.direct.ranges if a < FOUR_GIB), default=0)
        high = max((a + n for a, n in evidence.direct.ranges if made.above_base <= a < limit), default=made.above_base)
        below = total - (high - made.above_base)
        if below != made.below and low <= below <= low + _LEFT_OUT and below <= FOUR_GIB:
            made.below, made.above = below, total - below
            made.assumptions[:] = [item for item in made.assumptions if "to be split" not in item.text]
            made.notes.append(f"the kernel's direct map has {below:#x} bytes below 4 GiB, which adds up")

    def _choose_order(self, spans: Sequence[tuple[int, int]]) -> None:
        """Swap blocks of one size while the page tables fit better for it."""
        if not self._order.unsure or len(self._blocks) > SWAPPED_NODES:
            return
        best = self._evidence(spans)
        if best is None:
            return
        swapped, improved = False, True
        while improved:
            improved = False
            for one, other in list(self._pairs()):
                self._swap(one, other)
                evidence = self._evidence(spans)
                if evidence is not None and evidence.score > best.score:
                    best, improved, swapped = evidence, True, True
                else:
                    self._swap(one, other)
        if swapped:
            self._made.notes.append("the order of the blocks is the one that the page tables fit best")

    def _pairs(self) -> Iterator[tuple[int, int]]:
        for one, other in combinations(range(self._order.kept, len(self._blocks)), 2):
            if self._order.any_size or self._blocks[one].size == self._blocks[other].size:
                yield one, other

    def _swap(self, one: int, other: int) -> None:
        blocks = self._blocks
        blocks[one], blocks[other] = blocks[other], blocks[one]


def _result(
    architecture: str,
    blocks: Sequence[Block],
    examiner: Examiner,
    evidence: PageTableEvidence | None,
    made: LayoutDraft,
) -> tuple[str, Layout, tuple[Region, ...]]:
    assumptions, doubts = conclude(examiner, evidence, made)
    regions = tuple(sorted(made.regions))
    placed = {region.block for region in regions}
    layout = Layout(
        method=made.method,
        order=made.order,
        below_4g=made.below,
        above_4g=made.above,
        notes=tuple(made.notes),
        assumptions=tuple(assumptions),
        unplaced=tuple(block.name for block in blocks if block.name not in placed),
        reasons=tuple(made.reasons[region] for region in regions),
        checks=tuple(made.checks),
        doubts=tuple(doubts),
    )
    return architecture, layout, regions
