"""Memory that was plugged into a machine: modules (DIMM, NVDIMM) and virtio-mem devices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from ..limits import GiB, KiB, MiB
from ..text import printable
from .records import Block, Region
from .srat import Affinity

FOUR_GIB: Final = 4 * GiB
_ALIGN = 2 * MiB  # what QEMU aligns a module to
_SMALLEST_UNIT = 64 * KiB  # of virtio-mem: a page of the host at least
_SEARCHED = 1 << 20  # bytes of a device section looked at


@dataclass(slots=True)
class Decision:
    """A layout while it is being decided."""

    method: str = "none"
    order: str = "single"
    below: int = 0
    above: int = 0
    above_base: int = FOUR_GIB
    notes: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)


def natural(block: Block) -> list[tuple[int, str]]:
    """Sort ``node10`` after ``node9``."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", block.name)
    return [(int(part), "") if part[0] in "0123456789" else (-1, part) for part in parts]


def plugged(
    left: Sequence[Block], ranges: Sequence[Affinity], end: int, described: bool, made: Decision
) -> list[Region]:
    """Place modules: non-volatile ones where the SRAT has them, others into its hot-plug window.

    ``described`` says that the machine would have made an SRAT with a window, had it room for modules.
    ``end`` is where the rest of RAM ends.
    """
    regions = []
    fixed = [item for item in ranges if item.fixed]
    waiting = []
    for block in left:
        exact = next((item for item in fixed if item.length <= block.size < item.length + 2 * MiB), None)
        if exact is None:
            waiting.append(block)
            continue
        fixed.remove(exact)
        regions.append(Region(exact.base, exact.length, block.name, 0))
        made.notes.append(f"module {printable(block.name)!r} lies where the SRAT has it, at {exact.base:#x}")
    if not waiting:
        return regions
    windows = [item for item in ranges if item.hotplug and not item.fixed]
    if windows:
        address, room = windows[0].base, sum(item.length for item in windows)
        made.notes.append(f"the hot-plug window of the SRAT starts at {address:#x}")
    elif described or ranges:
        names = ", ".join(repr(printable(block.name)) for block in waiting)
        made.notes.append(f"the machine has no room for modules, so {names} must be a device's memory")
        return regions
    else:
        address, room = -(-max(end, FOUR_GIB) // GiB) * GiB, 1 << 60
        made.assumptions.append(f"no hot-plug window is described; it is taken to start at {address:#x}")
    if len({block.size for block in waiting}) > 1:  # the stream has blocks of one size in the order they were made
        waiting.sort(key=natural)
        made.assumptions.append("memory modules are taken to lie in the order of their names")
    elif len(waiting) > 1:
        made.assumptions.append("memory modules are taken to lie in the order they were made")
    for block in waiting:
        if block.size <= room:
            regions.append(Region(address, block.size, block.name, 0))
            made.notes.append(
                f"module {printable(block.name)!r} is placed at {address:#x}, the next place in the window"
            )
            step = -(-block.size // _ALIGN) * _ALIGN
            address, room = address + step, room - step
    return regions


def virtio_mem(blocks: Sequence[Block], bodies: Sequence[tuple[str, bytes]], made: Decision) -> list[Region]:
    """Place virtio-mem blocks: their devices write address, size and unit one after the other.

    Block and device carry the same path in front of their names.
    """
    regions: list[Region] = []
    for name, body in bodies:
        path = name.rpartition("/")[0] + "/"
        block = next((block for block in blocks if len(path) > 1 and block.name.startswith(path)), None)
        if block is None or any(region.block == block.name for region in regions):
            continue
        address = _before_size(body[:_SEARCHED], block.size)
        if address is not None:
            regions.append(Region(address, block.size, block.name, 0))
            made.notes.append(f"virtio-mem block {printable(block.name)!r} tells its address, {address:#x}")
    return regions


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
