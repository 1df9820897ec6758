"""The RAM that a machine starts with: which blocks, in which order, and how x86 splits it below 4 GiB.

The split of x86 memory at the PCI hole is written in CMOS by the machine itself; the order of NUMA
nodes is in the SRAT that QEMU made for the guest. Both can be absent or overwritten by the guest,
so each is used only when its numbers add up to the RAM that the stream lists; a table of machine
types is the last resort.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from ..limits import GiB, KiB, MiB
from ..text import quoted
from .acpi_tables import Affinity
from .layout_draft import FOUR_GIB, LayoutDraft, natural, span
from .model import Block, Cpu, Region

DEFAULT_NAMES: Final = ("pc.ram", "microvm.ram", "mach-virt.ram")
_HOLE = 0xA0000, 0x100000  # QEMU leaves this out of node 0 in the SRAT
_RESET_VECTOR = re.compile(rb"\xea....\d\d/\d\d/\d\d", re.DOTALL)
_UNIT = 64 * KiB  # in which CMOS counts; what is left over is in the last part of RAM
_TIB: Final = 1 << 40
_CMOS_WRAPS = 1 << 40  # CMOS has three bytes for units above 4 GiB
_RELOCATED = 900 * GiB  # from about here QEMU keeps an AMD guest's RAM clear of the HyperTransport hole
_RELOCATES = (7, 1)  # the first machine types that do

# Where RAM starts on machines that are not PCs.
_BASES = (
    (re.compile(r"virt-\d"), "aarch64", GiB),
    (re.compile(r"virt-rhel"), "aarch64", GiB),
    (re.compile(r"sbsa-ref"), "aarch64", _TIB),
)
# Device and firmware blocks carry a path; old machine types give backends one too.
_PATH = re.compile(r"(?!/objects/).*/.*")
_NOT_RAM = re.compile(
    r"(pc|isa)[.-](bios|rom)|vga\.vram|qxl\..*|.*\.(vram|rom|vgavram|bios|flash\d*|mrom)"
    r"|virt\.flash\d|system\.flash\d|kvmvapic|efi-.*"
)
_DEVICES = re.compile(r"tpm-(ppi|crb-cmd)|.*\.secure-ram|erst\S*")
_SMALLEST_MODULE = MiB


class RamEvidence(NamedTuple):
    """What a stream offers as evidence."""

    machine: str
    blocks: Sequence[Block]
    cmos: bytes | None
    read_block: Callable[[str, int, int], bytes]
    cpus: Sequence[Cpu] = ()
    bodies: Sequence[tuple[str, bytes]] = ()
    """Device sections that hold virtio-mem: name and bytes."""
    modules: Mapping[str, int] = {}
    """Addresses of modules by the names of their blocks, as a libvirt domain states them."""


def candidates(facts: RamEvidence, made: LayoutDraft) -> list[Block]:
    """Return the blocks that can be RAM: the machine's own, or a module's."""
    found = []
    split = cmos_split(facts.cmos)
    named = any(block.name in DEFAULT_NAMES for block in facts.blocks)
    largest = max((block.size for block in facts.blocks if not _PATH.fullmatch(block.name)), default=0)
    for block in facts.blocks:
        if not block.size or _PATH.fullmatch(block.name):
            continue
        if _NOT_RAM.fullmatch(block.name):
            if named or split is None or not 0 <= block.size - sum(split) < _UNIT:
                continue
            made.notes.append(f"block {quoted(block.name)} is RAM whatever its name: CMOS has its size")
        elif _DEVICES.fullmatch(block.name):
            made.notes.append(f"block {quoted(block.name)} is a device's memory by its name")
            continue
        elif block.size < _SMALLEST_MODULE <= largest:
            made.assume(f"block {quoted(block.name)} of {block.size} bytes is taken for a device's memory")
            continue
        found.append(block)
    return found


def architecture(facts: RamEvidence) -> tuple[str, int]:
    """Return the architecture and where its RAM starts."""
    machine, blocks = facts.machine, facts.blocks
    for pattern, name, base in _BASES:
        if pattern.match(machine):
            return name, base
    if any(block.name == "mach-virt.ram" for block in blocks):
        return "aarch64", GiB
    if any(block.name.startswith("riscv_virt_board") for block in blocks):
        return "riscv", 2 * GiB
    hint = facts.cpus[0].architecture if facts.cpus else ""
    pc = re.match(r"pc|q35|microvm|rhel|isapc|xenfv", machine) or any(block.name == "pc.bios" for block in blocks)
    if facts.cmos is not None or pc or hint == "x86":
        return "x86", 0
    return hint, 0


class Order(NamedTuple):
    """The blocks a machine started with, in the order of their addresses."""

    blocks: list[Block]
    unsure: str = ""
    """What was assumed about blocks that could change places, "" when nothing was."""
    kept: int = 0
    """How many blocks at the start are in their places for certain."""
    any_size: bool = False
    """Whether blocks of different sizes could change places too."""


def system_blocks(found: list[Block], ranges: Sequence[Affinity], facts: RamEvidence, made: LayoutDraft) -> Order:
    """Choose the blocks the machine started with, in the order of their addresses."""
    named = [block for block in found if block.name in DEFAULT_NAMES]
    if len(named) == 1:
        made.notes.append(f"block {quoted(named[0].name)} is the machine's RAM by its name")
        return Order(named)
    if len(found) == 1:
        made.notes.append(f"block {quoted(found[0].name)} is the only one that can be RAM")
        return Order(found)
    if offsets := _by_offsets(found):
        made.order = "offsets"
        made.notes.append("the stream states where each block lies")
        return Order(offsets)
    if ordered := _by_nodes(found, ranges, facts, made):
        made.order = "srat"
        return ordered
    wanted = cmos_split(facts.cmos)
    for block in found:
        if wanted and 0 <= block.size - sum(wanted) < _UNIT:
            made.notes.append(f"block {quoted(block.name)} has the size that CMOS states")
            return Order([block])
    if not found:
        return Order([])
    made.order = "names"
    return Order(sorted(found, key=natural), "blocks are taken to lie in the order of their names", any_size=True)


def _by_offsets(found: list[Block]) -> list[Block]:
    """Order by the offsets of an x-ignore-shared stream, when they tile one container."""
    known = sorted(((block.address, block) for block in found if block.address is not None), key=lambda p: p[0])
    position = 0
    for address, block in known:
        if address != position:
            return []
        position += block.size
    return [block for _, block in known] if len(known) == len(found) else []


def _by_nodes(found: list[Block], ranges: Sequence[Affinity], facts: RamEvidence, made: LayoutDraft) -> Order | None:
    """Give every NUMA node the block of its size, nodes in order; None when the sizes do not match.

    The stream lists blocks by size, and those of one size in the order they were made.
    """
    nodes: dict[int, int] = {}
    for item in ranges:
        if not item.hotplug and not item.fixed:
            nodes[item.node] = nodes.get(item.node, 0) + item.length
    left = list(found)
    chosen: list[Block] = []
    unsure, kept = False, 0
    for number, (_, size) in enumerate(sorted(nodes.items())):
        wanted = {size, size + _HOLE[1] - _HOLE[0]} if number == 0 else {size}
        fits = [block for block in left if block.size in wanted]
        if not fits:
            return None
        if number == 0 and len(fits) > 1:
            shadowed = [block for block in fits if _holds_firmware(block, facts)]
            if len(shadowed) == 1:
                fits = shadowed
                kept = 1
                made.notes.append(f"block {quoted(fits[0].name)} holds the firmware's copy below 1 MiB")
        unsure |= len(fits) > 1
        chosen.append(fits[0])
        left.remove(fits[0])
    if not chosen:
        return None
    made.notes.append("blocks are matched to the nodes of the SRAT by their sizes")
    return Order(chosen, "blocks of one size are taken to lie in the order they were made" if unsure else "", kept)


def _holds_firmware(block: Block, facts: RamEvidence) -> bool:
    """Return whether a PC's reset jump and the date after it are 16 bytes below 1 MiB of the block."""
    if block.size < _HOLE[1]:
        return False
    return _RESET_VECTOR.match(facts.read_block(block.name, _HOLE[1] - 16, 16)) is not None


def cmos_split(cmos: bytes | None) -> tuple[int, int] | None:
    """Return the bytes below and above 4 GiB that the machine wrote into CMOS, each rounded down to its unit."""
    if cmos is None:
        return None
    above_16m = int.from_bytes(cmos[0x34:0x36], "little")
    low = 16 * MiB + _UNIT * above_16m if above_16m else MiB + KiB * int.from_bytes(cmos[0x30:0x32], "little")
    return low, _UNIT * int.from_bytes(cmos[0x5B:0x5E], "little")


def split(facts: RamEvidence, total: int, ranges: Sequence[Affinity], made: LayoutDraft) -> None:
    """Decide how much of x86 RAM lies below the PCI hole."""
    machine, wanted = facts.machine, cmos_split(facts.cmos)
    if wanted and wanted[0] <= total and wanted[0] < FOUR_GIB and (total - sum(wanted)) % _CMOS_WRAPS < _UNIT:
        made.method = "cmos"
        made.below = wanted[0] if wanted[1] or total - wanted[0] >= _UNIT else total
        made.above = total - made.below
        made.notes.append(f"CMOS states {made.below:#x} bytes below 4 GiB and {made.above:#x} above, which adds up")
        if machine and made.below != (usual := min(total, _table(machine, total))):
            made.notes.append(
                f"that is not the {usual:#x} of the machine type: max-ram-below-4g, or the guest wrote CMOS"
            )
        return
    fixed = [item for item in ranges if not item.hotplug and not item.fixed]
    low = max((item.base + item.length for item in fixed if item.base < FOUR_GIB), default=0)
    if low and low + sum(item.length for item in fixed if item.base >= FOUR_GIB) == total:
        made.method, made.below, made.above = "srat", low, total - low
        made.notes.append(f"the SRAT has {low:#x} bytes of RAM below 4 GiB, which adds up")
        return
    made.method = "machine"
    made.below = min(total, _table(machine, total))
    made.above = total - made.below
    why = "holds no memory sizes" if wanted is None else "does not add up to the RAM of the stream"
    made.notes.append(f"CMOS {why}; the table of machine types has {made.below:#x} bytes below 4 GiB")
    sure = min(made.below, GiB)  # the part that no machine in use puts above 4 GiB
    doubtful = [(sure, made.below - sure), (made.above_base, made.above)]
    made.assume("RAM is taken to be split as the machine type does by default", [item for item in doubtful if item[1]])


def base_above(
    facts: RamEvidence, ranges: Sequence[Affinity], windows: Sequence[tuple[int, int]], made: LayoutDraft
) -> tuple[int, ...]:
    """Decide where the RAM above 4 GiB starts, and return the other places where it may.

    QEMU moves it to 1 TiB for AMD processors when the addresses in use would reach the HyperTransport hole.
    The SRAT states it; where there is none, PCI devices are put right after it, rounded up to 1 GiB.
    """
    high = [item.base for item in ranges if item.base >= FOUR_GIB and not item.hotplug and not item.fixed]
    if high:
        if min(high) != FOUR_GIB:
            made.above_base = min(high)
            made.notes.append(f"the SRAT puts the RAM above 4 GiB at {made.above_base:#x}")
        return ()
    first = min((address for address, _ in windows), default=0)
    near, far = (-(-(base + made.above) // GiB) * GiB for base in (FOUR_GIB, _TIB))
    if first and first < far:
        return ()
    if first == far:
        made.above_base = _TIB
        made.notes.append(f"the PCI window of the DSDT starts at {first:#x}, right after RAM above 4 GiB at 1 TiB")
        return (FOUR_GIB,)
    if first == near or version(facts.machine) < _RELOCATES or not made.above:
        return ()
    if made.above + made.below > _RELOCATED or first:
        why = f"the PCI window at {first:#x} allows both" if first else "with an AMD processor it may at 1 TiB"
        made.assume(f"RAM above 4 GiB is taken to start there; {why}", [(FOUR_GIB, made.above)])
    return (_TIB,)


def _table(machine: str, total: int) -> int:
    """Return the bytes below the PCI hole that a machine type leaves by default."""
    modern = version(machine) >= (2, 0) or machine.startswith("rhel")
    if "microvm" in machine:
        return 3 * GiB
    if "q35" in machine:
        large = 0xB0000000
        return total if total < large else (2 * GiB if modern else large)
    large = 0xE0000000
    return total if total < large else (3 * GiB if modern else large)


def version(machine: str) -> tuple[int, int]:
    """Return the version in a machine type's name; vendors that name releases differently are modern."""
    found = re.search(r"([0-9]{1,3})\.([0-9]{1,3})", machine)
    return (int(found[1]), int(found[2])) if found else (99, 0)


def covered_by_srat(regions: Sequence[Region], ranges: Sequence[Affinity], made: LayoutDraft) -> None:
    """Compare the result with the SRAT, which knows every address but not the blocks."""
    fixed = [item for item in ranges if not item.hotplug]
    if not fixed or not regions:
        return
    missing = []
    for item in fixed:
        end = item.base + item.length
        covered = sum(max(0, min(region.end, end) - max(region.address, item.base)) for region in regions)
        if covered != item.length and item.base >= _HOLE[1]:
            missing.append(item)
    if missing:
        made.assume(
            "the SRAT has RAM where no block was placed: "
            + ", ".join(span(item.base, item.length) for item in missing[:8])
        )
    else:
        made.notes.append("every range of the SRAT is covered")
