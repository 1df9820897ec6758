"""Memory that was plugged into a machine: modules (DIMM, NVDIMM) and virtio-mem devices.

What states its own address is placed first. The rest goes where the guest's page tables show RAM that
nothing else accounts for, and only then where QEMU would put it: the first free place of its window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from ..limits import MODULE_DEVICES, MODULE_LAYOUTS, MODULE_SECTION_BYTES, MODULES, GiB, KiB, MiB
from ..text import plural, quoted
from .acpi_tables import Affinity
from .layout_draft import FOUR_GIB, LayoutDraft, natural, span
from .model import Block, Region
from .system_ram import RamEvidence, version

_ALIGN = 2 * MiB  # what QEMU aligns a module to
_SMALLEST_UNIT = 64 * KiB  # of virtio-mem: a page of the host at least
_SILENT_MODULES = (2, 10)  # the last machine types that may plug modules without an SRAT
_ENDLESS: Final = 1 << 50

Ranges = Sequence[tuple[int, int]]


def exact(found: Sequence[Block], ranges: Sequence[Affinity], facts: RamEvidence, made: LayoutDraft) -> None:
    """Place what states its own address: as libvirt does, as a virtio-mem device does, and as the SRAT has NVDIMMs."""
    for block in found:
        if (address := facts.modules.get(block.name)) is not None and _waits(block, made):
            made.put(Region(address, block.size, block.name, 0), "the libvirt domain states the address")
    _virtio_mem(facts, made)
    fixed = [item for item in ranges if item.fixed]
    for block in found:
        item = next((item for item in fixed if item.length <= block.size < item.length + 2 * MiB), None)
        if item is not None and _waits(block, made):
            fixed.remove(item)
            made.put(Region(item.base, item.length, block.name, 0), "the SRAT has a non-volatile module here")


def _waits(block: Block, made: LayoutDraft) -> bool:
    return all(region.block != block.name for region in made.regions)


def windows_for(
    waiting: Sequence[Block], ranges: Sequence[Affinity], end: int, facts: RamEvidence, made: LayoutDraft
) -> list[tuple[int, int]]:
    """Return the ranges in which modules can be, less what is taken; [] when the machine has no room for any.

    ``end`` is where the machine's own RAM ends.
    """
    hot = [(item.base, item.length) for item in ranges if item.hotplug and not item.fixed]
    if hot:
        address, room = hot[0][0], sum(length for _, length in hot)
        made.notes.append(f"the window for modules in the SRAT starts at {address:#x}")
    elif version(facts.machine) > _SILENT_MODULES or ranges:
        names = ", ".join(quoted(block.name) for block in waiting)
        made.notes.append(f"the machine has no room for modules, so {names} must be a device's memory")
        return []
    else:
        address, room = -(-max(end, FOUR_GIB) // GiB) * GiB, _ENDLESS
        made.assume(f"no window for modules is described; it is taken to start at {address:#x}")
    return made.free(address, room)


def place_modules(waiting: Sequence[Block], windows: Ranges, shown: Ranges, whole: bool, made: LayoutDraft) -> None:
    """Place modules of unknown address inside ``windows``.

    ``shown`` are ranges of the windows in which the guest's page tables have RAM; ``whole`` says that they show all of it.
    """
    if len(waiting) > MODULES:
        made.assume(
            f"{plural(len(waiting) - MODULES, 'block is', 'blocks are')} not placed: no machine has more than {MODULES} modules"
        )
        waiting = waiting[:MODULES]
    modules = sorted(waiting, key=natural) if len({block.size for block in waiting}) > 1 else list(waiting)
    if whole and modules and sum(block.size for block in modules) == sum(length for _, length in shown):
        ways = list(islice(_ways(modules, list(shown)), MODULE_LAYOUTS))
        if ways:
            for region in ways[0]:
                made.put(region, "the guest's page tables have RAM here, and nothing else fits")
            if len(ways) > 1:
                taken = [(region.address, region.length) for region in ways[0]]
                made.assume("modules are taken to lie in the order they were made", taken, order=True)
            return
    placed = []
    free = list(windows)
    for block in modules:
        place = _first_fit(block, free, shown)
        if place is None:
            made.assume(f"module {quoted(block.name)} is not placed: there is no room for it")
        elif made.put(place, "the first free place of the window for modules"):
            placed.append(place)
        free = made.free(windows[0][0], windows[-1][0] + windows[-1][1] - windows[0][0])
    taken = [(region.address, region.length) for region in placed]
    window = span(windows[0][0], windows[-1][0] + windows[-1][1] - windows[0][0]) if windows else ""
    for region in placed:
        name, where = quoted(region.block), span(region.address, region.length)
        made.assume(
            f"module {name} is taken to lie at {where}, the first free place of the window; "
            f"a module plugged after another was unplugged may lie elsewhere in {window}",
            [(region.address, region.length)],
        )
    if len(placed) > 1:
        how = "of their names" if len({region.length for region in placed}) > 1 else "they were made"
        made.assume(f"memory modules are taken to lie in the order {how}", taken, order=True)


def _first_fit(block: Block, free: Ranges, shown: Ranges) -> Region | None:
    """Return the first free place of a block, one in which the page tables show RAM before any other."""
    starts = [-(-address // _ALIGN) * _ALIGN for address, _ in free]
    places = [
        start for start, (address, length) in zip(starts, free, strict=True) if start + block.size <= address + length
    ]
    if not places:
        return None
    for place in places:
        if any(address < place + block.size and place < address + length for address, length in shown):
            return Region(place, block.size, block.name, 0)
    for address, length in shown:  # the page tables have RAM further up: as far down as still covers it
        for start, room in free:
            low = max(start, (address + length - block.size) // _ALIGN * _ALIGN)
            if low <= address < low + block.size <= start + room:
                return Region(low, block.size, block.name, 0)
    return Region(places[0], block.size, block.name, 0)


def _ways(modules: list[Block], ranges: list[tuple[int, int]]) -> Iterator[tuple[Region, ...]]:
    """Yield the ways to fill the ranges with the modules exactly, each in the order of its addresses."""
    if not ranges:
        if not modules:
            yield ()
        return
    (address, length), rest = ranges[0], ranges[1:]
    for number, block in enumerate(modules):
        if block.size > length:
            continue
        left = [*modules[:number], *modules[number + 1 :]]
        following = rest if block.size == length else [(address + block.size, length - block.size), *rest]
        for way in _ways(left, following):
            yield (Region(address, block.size, block.name, 0), *way)


def _virtio_mem(facts: RamEvidence, made: LayoutDraft) -> None:
    """Place virtio-mem blocks: their devices write address, size and unit one after the other.

    Block and device carry the same path in front of their names.
    """
    by_path: dict[str, Block] = {}
    for block in facts.blocks:
        by_path.setdefault(block.name.rpartition("/")[0], block)
    for name, body in islice(facts.bodies, MODULE_DEVICES):
        path = name.rpartition("/")[0]
        block_found = by_path.get(path) if path else None
        if block_found is None or not _waits(block_found, made):
            continue
        address = _before_size(body[:MODULE_SECTION_BYTES], block_found.size)
        if address is not None:
            made.put(Region(address, block_found.size, block_found.name, 0), "its virtio-mem device states the address")


def _before_size(body: bytes, size: int) -> int | None:
    wanted = size.to_bytes(8, "big")
    at = body.find(wanted, 8)
    while at >= 0:
        address = int.from_bytes(body[at - 8 : at], "big")
        unit = int.from_bytes(body[at + 8 : at + 16], "big")
        if unit >= _SMALLEST_UNIT and unit & (unit - 1) == 0 and address and address % unit == 0:
            return address
        at = body.find(wanted, at + 1)
    return None
