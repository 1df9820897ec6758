"""Which RAM block answers for which guest-physical address, decided from evidence.

The split of x86 memory at the PCI hole is written in CMOS by the machine itself; the order of NUMA
nodes is in the SRAT that QEMU made for the guest. Both can be absent or overwritten by the guest,
so each is used only when its numbers add up to the RAM that the stream lists; a table of machine
types is the last resort. What was used, and what had to be assumed, is part of the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from ..limits import GiB, KiB, MiB
from ..text import printable
from .hotplug import Decision, natural, plugged, virtio_mem
from .records import Block, Layout, Region
from .srat import Affinity, memory_affinities

FOUR_GIB: Final = 4 * GiB
_DEFAULT_NAMES = ("pc.ram", "microvm.ram", "mach-virt.ram")
_HOLE = 0xA0000, 0x100000  # QEMU leaves this out of node 0 in the SRAT
_RESET_VECTOR = re.compile(rb"\xea....\d\d/\d\d/\d\d", re.DOTALL)
_SILENT_MODULES = (2, 10)  # the last machine types that may plug modules without an SRAT
_RELOCATED = 900 * GiB  # from about here QEMU keeps an AMD guest's RAM clear of the HyperTransport hole
_ADDRESSES = 1 << 52  # the guest-physical address space of x86-64 and aarch64

# Where RAM starts on machines that are not PCs.
_BASES = (
    (re.compile(r"virt-\d"), "aarch64", GiB),
    (re.compile(r"virt-rhel"), "aarch64", GiB),
    (re.compile(r"sbsa-ref"), "aarch64", 1 << 40),
)
_NOT_RAM = re.compile(
    r"(?!/objects/).*/.*"  # device and firmware blocks carry a path; old machine types give backends one too
    r"|(pc|isa)[.-](bios|rom)|vga\.vram|qxl\..*|.*\.(vram|rom|vgavram|bios|flash\d*|mrom)"
    r"|virt\.flash\d|system\.flash\d|kvmvapic|efi-.*"
)


class Facts(NamedTuple):
    """What a stream offers as evidence."""

    machine: str
    blocks: Sequence[Block]
    cmos: bytes | None
    read_block: Callable[[str, int, int], bytes]
    architecture: str = ""
    """What the processors in the stream are, "" when it has none."""
    bodies: Sequence[tuple[str, bytes]] = ()
    """Device sections that hold virtio-mem: name and bytes."""


def place(facts: Facts) -> tuple[str, Layout, tuple[Region, ...]]:
    """Return the architecture, how the layout was decided, and the regions in order of address."""
    machine, blocks, made = facts.machine, facts.blocks, Decision()
    ranges = memory_affinities(blocks, facts.read_block)
    if ranges:
        made.notes.append(f"the SRAT names {len(ranges)} memory ranges")
    candidates = [block for block in blocks if block.size and not _NOT_RAM.fullmatch(block.name)]
    system = _system_blocks(candidates, ranges, facts, made)
    total = sum(block.size for block in system)
    architecture, base = _architecture(facts)
    if not system or (not architecture and not ranges):
        made.notes.append(f"machine type {printable(machine)!r} is not known, no block is placed")
        return architecture, _layout(made, blocks, ()), ()
    if architecture == "x86":
        _split(machine, total, facts.cmos, ranges, made)
        spans = [(0, made.below), (made.above_base, made.above)]
    else:
        made.method = "machine" if architecture else "srat"
        if architecture:
            made.notes.append(f"RAM starts at {base:#x} on machine type {printable(machine)!r}")
        else:
            base = min(item.base for item in ranges)
            made.notes.append(f"RAM starts at {base:#x}, the lowest address of the SRAT")
        spans = [(base, total)]
        made.above = total
    regions = _tile(system, spans)
    end = max(region.end for region in regions)
    left = [block for block in candidates if block not in system]
    regions += plugged(left, ranges, end, _version(machine) > _SILENT_MODULES, made)
    regions += virtio_mem(blocks, facts.bodies, made)
    regions = _apart(regions, made)
    _check(regions, ranges, made)
    return architecture, _layout(made, blocks, regions), tuple(regions)


def _layout(made: Decision, blocks: Sequence[Block], regions: Sequence[Region]) -> Layout:
    placed = {region.block for region in regions}
    return Layout(
        method=made.method,
        order=made.order,
        below_4g=made.below,
        above_4g=made.above,
        notes=tuple(made.notes),
        assumptions=tuple(made.assumptions),
        unplaced=tuple(block.name for block in blocks if block.name not in placed),
    )


def _architecture(facts: Facts) -> tuple[str, int]:
    """Return the architecture and where its RAM starts."""
    machine, blocks = facts.machine, facts.blocks
    for pattern, name, base in _BASES:
        if pattern.match(machine):
            return name, base
    if any(block.name == "mach-virt.ram" for block in blocks):
        return "aarch64", GiB
    if any(block.name.startswith("riscv_virt_board") for block in blocks):
        return "riscv", 2 * GiB
    pc = re.match(r"pc|q35|microvm|rhel|isapc|xenfv", machine) or any(block.name == "pc.bios" for block in blocks)
    if facts.cmos is not None or pc or facts.architecture == "x86":
        return "x86", 0
    return facts.architecture, 0


def _system_blocks(candidates: list[Block], ranges: Sequence[Affinity], facts: Facts, made: Decision) -> list[Block]:
    """Choose the blocks the machine started with, in the order of their addresses."""
    named = [block for block in candidates if block.name in _DEFAULT_NAMES]
    if len(named) == 1:
        made.notes.append(f"block {named[0].name!r} is the machine's RAM by its name")
        return named
    if len(candidates) == 1:
        made.notes.append(f"block {printable(candidates[0].name)!r} is the only one that can be RAM")
        return candidates
    if offsets := _by_offsets(candidates):
        made.order = "offsets"
        made.notes.append("the stream tells where each block lies")
        return offsets
    if ordered := _by_nodes(candidates, ranges, facts, made):
        made.order = "srat"
        return ordered
    wanted = _cmos_split(facts.cmos)
    for block in candidates:
        if wanted and block.size == sum(wanted):
            made.notes.append(f"block {printable(block.name)!r} has the size that CMOS tells")
            return [block]
    if candidates:
        made.order = "names"
        made.assumptions.append("blocks are taken to lie in the order of their names")
    return sorted(candidates, key=natural)


def _by_offsets(candidates: list[Block]) -> list[Block]:
    """Order by the offsets of an x-ignore-shared stream, when they tile one container."""
    known = sorted(((block.address, block) for block in candidates if block.address is not None), key=lambda p: p[0])
    position = 0
    for address, block in known:
        if address != position:
            return []
        position += block.size
    return [block for _, block in known] if len(known) == len(candidates) else []


def _by_nodes(candidates: list[Block], ranges: Sequence[Affinity], facts: Facts, made: Decision) -> list[Block]:
    """Give every NUMA node the block of its size, nodes in order; empty when the sizes do not match.

    The stream lists blocks by size, and those of one size in the order they were made.
    """
    nodes: dict[int, int] = {}
    for item in ranges:
        if not item.hotplug and not item.fixed:
            nodes[item.node] = nodes.get(item.node, 0) + item.length
    left = list(candidates)
    chosen: list[Block] = []
    unsure = False
    for number, (_, size) in enumerate(sorted(nodes.items())):
        wanted = {size, size + _HOLE[1] - _HOLE[0]} if number == 0 else {size}
        fits = [block for block in left if block.size in wanted]
        if not fits:
            return []
        if number == 0 and len(fits) > 1:
            shadowed = [block for block in fits if _holds_firmware(block, facts)]
            if len(shadowed) == 1:
                fits = shadowed
                made.notes.append(f"block {printable(fits[0].name)!r} holds the firmware's copy below 1 MiB")
        unsure |= len(fits) > 1
        chosen.append(fits[0])
        left.remove(fits[0])
    if chosen:
        made.notes.append("blocks are matched to the nodes of the SRAT by their sizes")
    if unsure:
        made.assumptions.append("blocks of one size are taken to lie in the order they were made")
    return chosen


def _holds_firmware(block: Block, facts: Facts) -> bool:
    """Tell whether a PC's reset jump and the date after it stand 16 bytes below 1 MiB of the block."""
    if block.size < _HOLE[1]:
        return False
    return _RESET_VECTOR.match(facts.read_block(block.name, _HOLE[1] - 16, 16)) is not None


def _cmos_split(cmos: bytes | None) -> tuple[int, int] | None:
    """Return the bytes below and above 4 GiB that the machine wrote into CMOS."""
    if cmos is None:
        return None
    above_16m = int.from_bytes(cmos[0x34:0x36], "little")
    low = 16 * MiB + 64 * KiB * above_16m if above_16m else MiB + KiB * int.from_bytes(cmos[0x30:0x32], "little")
    return low, 64 * KiB * int.from_bytes(cmos[0x5B:0x5E], "little")


def _split(machine: str, total: int, cmos: bytes | None, ranges: Sequence[Affinity], made: Decision) -> None:
    """Decide how much of x86 RAM lies below the PCI hole."""
    split = _cmos_split(cmos)
    if split and split[0] <= total and split[0] < FOUR_GIB and (total - sum(split)) % (1 << 40) == 0:
        made.method = "cmos"
        made.below, made.above = split[0], total - split[0]
        made.notes.append(f"CMOS tells {made.below:#x} bytes below 4 GiB and {made.above:#x} above, which adds up")
        if machine and made.below != (usual := min(total, _table(machine, total))):
            made.notes.append(
                f"that is not the {usual:#x} of the machine type: max-ram-below-4g, or the guest wrote CMOS"
            )
    else:
        made.method = "machine"
        made.below = min(total, _table(machine, total))
        made.above = total - made.below
        why = "holds no memory sizes" if split is None else "does not add up to the RAM of the stream"
        made.notes.append(f"CMOS {why}; the table of machine types tells {made.below:#x} bytes below 4 GiB")
    high = [item.base for item in ranges if item.base >= FOUR_GIB and not item.hotplug and not item.fixed]
    if made.above and high and min(high) != FOUR_GIB:
        made.above_base = min(high)
        made.notes.append(f"the SRAT puts the RAM above 4 GiB at {made.above_base:#x}")
    elif not high and total > _RELOCATED:
        made.assumptions.append("RAM above 4 GiB is taken to start there; with an AMD processor it may at 1 TiB")


def _table(machine: str, total: int) -> int:
    """Return the bytes below the PCI hole that a machine type leaves by default."""
    modern = _version(machine) >= (2, 0) or machine.startswith("rhel")
    if "microvm" in machine:
        return 3 * GiB
    if "q35" in machine:
        large = 0xB0000000
        return total if total < large else (2 * GiB if modern else large)
    large = 0xE0000000
    return total if total < large else (3 * GiB if modern else large)


def _version(machine: str) -> tuple[int, int]:
    """Return the version in a machine type's name; vendors that name releases differently are modern."""
    found = re.search(r"([0-9]{1,3})\.([0-9]{1,3})", machine)
    return (int(found[1]), int(found[2])) if found else (99, 0)


def _tile(blocks: Sequence[Block], spans: Sequence[tuple[int, int]]) -> list[Region]:
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


def _apart(regions: Sequence[Region], made: Decision) -> list[Region]:
    """Sort by address, leaving out what a nonsensical SRAT puts on top of other RAM or nowhere."""
    kept: list[Region] = []
    for region in sorted(regions):
        if region.address < (kept[-1].end if kept else 0) or region.end > _ADDRESSES:
            made.assumptions.append(f"block {printable(region.block)!r} is not placed at {region.address:#x}: no room")
        else:
            kept.append(region)
    return kept


def _check(regions: Sequence[Region], ranges: Sequence[Affinity], made: Decision) -> None:
    """Hold the result against the SRAT, which knows every address but not the blocks."""
    fixed = [item for item in ranges if not item.hotplug]
    if not fixed or not regions:
        return
    for item in fixed:
        covered = sum(
            max(0, min(region.end, item.base + item.length) - max(region.address, item.base)) for region in regions
        )
        if covered != item.length and item.base >= _HOLE[1]:
            made.assumptions.append(f"the SRAT has RAM at {item.base:#x} where no block was placed")
            return
    made.notes.append("every range of the SRAT is covered")
