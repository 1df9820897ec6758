"""A processor's page tables, walked level by level with numpy.

A processor's registers name the root of a tree of tables in guest-physical memory. Each table is an array
of entries; an entry leads to a table of the next level, or maps a range of virtual addresses (a leaf)::

    root ──> table ──> table ──> leaf: virtual address, physical address, length
         └─> table ──> leaf (a large page)

Nothing here decides anything. The walk reports which tables look as the architecture defines them, which
do not, and which lie where there is no memory; :mod:`.layout_check` draws the conclusions. The work is
bounded: each table is visited once, and at most ``limits.PAGE_TABLES`` of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..census.arrays import distinct
from ..limits import PAGE_TABLES
from .model import Cpu

_HIGHEST: Final = 1 << 46  # physical addresses above this are taken for damage: QEMU's default is 40 bits

UInt64s = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]
Reader = Callable[[int, int], bytes]
"""Reads guest-physical memory; b"" where no RAM is placed."""


class Root(NamedTuple):
    """Where a tree of page tables starts, and how it is built."""

    cpu: int
    register: str
    address: int
    architecture: str
    shifts: tuple[int, ...]
    """Of every level, root first: the address bits below those that the level's index resolves."""
    root_entries: int
    table_bytes: int
    base: int
    """The virtual address of the first entry, where that is not 0."""
    entry_bytes: int = 8
    device_kinds: tuple[int, ...] = ()
    """aarch64: the attribute indices that mean device memory."""


@dataclass(frozen=True, slots=True)
class Walk:
    """What a walk met. Every array is of unsigned 64-bit integers; one element a table, or a leaf."""

    sound: UInt64s
    """Addresses of tables in which all is as it must be, and something is mapped."""
    broken: UInt64s
    """Addresses of tables that cannot be page tables."""
    lost: UInt64s
    """Addresses of tables that lie where no RAM is placed."""
    virtual: UInt64s
    """Of the mappings of ordinary memory; those marked as a device's are left out."""
    physical: UInt64s
    length: UInt64s
    complete: bool
    """False when there are more tables than may be visited."""


def roots(cpu: Cpu) -> list[Root]:
    """Return the roots of a processor's page tables; none when paging is off, or not understood."""
    if cpu.architecture == "x86":
        return _x86_roots(cpu)
    return _aarch64_roots(cpu) if cpu.architecture == "aarch64" else []


def _x86_roots(cpu: Cpu) -> list[Root]:
    values = cpu.registers
    cr3, cr4, efer = values.get("cr3", 0), values.get("cr4", 0), values.get("efer", 0)
    if not values.get("cr0", 0) >> 31 & 1:
        return []
    if efer >> 10 & 1:
        shifts = (48, 39, 30, 21, 12) if cr4 >> 12 & 1 else (39, 30, 21, 12)
        address = cr3 & 0x000F_FFFF_FFFF_F000
        found = [Root(cpu.index, "cr3", address, "x86", shifts, 512, 4096, 0)]
        if address & 0x1000:  # Linux keeps a process's own tables one page above those of the kernel
            found.append(found[0]._replace(address=address ^ 0x1000))
        return found
    if cr4 >> 5 & 1:
        return [Root(cpu.index, "cr3", cr3 & 0xFFFF_FFE0, "x86", (30, 21, 12), 4, 4096, 0)]
    return [Root(cpu.index, "cr3", cr3 & 0xFFFF_F000, "x86", (22, 12), 1024, 4096, 0, 4)]


def _aarch64_roots(cpu: Cpu) -> list[Root]:
    values = cpu.registers
    if not values.get("sctlr_el1", 0) & 1:
        return []
    tcr = values.get("tcr_el1", 0)
    found = []
    for register, size, granule in (
        ("ttbr1_el1", tcr >> 16 & 63, {1: 14, 2: 12, 3: 16}.get(tcr >> 30 & 3)),
        ("ttbr0_el1", tcr & 63, {0: 12, 1: 16, 2: 14}.get(tcr >> 14 & 3)),
    ):
        bits = 64 - size
        if granule is None or register not in values or not granule < bits <= 52:
            continue
        shifts = tuple(range(granule, bits, granule - 3))[::-1]
        base = (1 << 64) - (1 << bits) if register == "ttbr1_el1" else 0
        address = values[register] & 0x0000_FFFF_FFFF_FFFE
        entries = 1 << (bits - shifts[0])
        mair = values.get("mair_el1", 0)
        devices = tuple(index for index in range(8) if not mair >> (8 * index) & 0xF0) if mair else ()
        found.append(
            Root(cpu.index, register, address, "aarch64", shifts, entries, 1 << granule, base, device_kinds=devices)
        )
    return found


def walk(starts: Sequence[Root], read: Reader) -> Walk:
    """Walk all trees together; a table that several share is visited once."""
    walker = _Walker(read)
    for root in starts:
        walker.tree(root)
    return walker.result()


def translate(root: Root, read: Reader, virtual: int) -> int | None:
    """Return the physical address that a virtual one is mapped to; None when it is not mapped.

    A mapping that the architecture forbids, or that goes through a table where there is no RAM, is none.
    """
    decode = _decode_x86 if root.architecture == "x86" else _decode_aarch64
    table = root.address
    for level, shift in enumerate(root.shifts):
        entries = root.root_entries if level == 0 else root.table_bytes // root.entry_bytes
        index = (virtual - root.base >> shift) & (entries - 1)
        data = read(table + index * root.entry_bytes, root.entry_bytes)
        if len(data) < root.entry_bytes:
            return None
        entry = decode(root, shift, np.array([[int.from_bytes(data, "little")]], np.uint64))
        address = int(entry.address[0, 0])
        if entry.wrong[0, 0] or address >= _HIGHEST:
            return None
        if entry.maps[0, 0]:
            return address | (virtual & ((1 << shift) - 1))
        if not entry.leads[0, 0]:
            return None
        table = address
    return None


class _Walker:
    def __init__(self, read: Reader) -> None:
        self._read = read
        self._seen: set[tuple[int, int]] = set()
        self._sound: list[UInt64s] = []
        self._broken: list[UInt64s] = []
        self._lost: set[int] = set()
        self._leaves: list[tuple[UInt64s, UInt64s, UInt64s]] = []
        self._complete = True

    def result(self) -> Walk:
        leaves = self._leaves or [(_empty(), _empty(), _empty())]
        virtual, physical, length = (np.concatenate(column) for column in zip(*leaves, strict=True))
        return Walk(
            sound=distinct(np.concatenate([_empty(), *self._sound])),
            broken=distinct(np.concatenate([_empty(), *self._broken])),
            lost=np.array(sorted(self._lost), np.uint64),
            virtual=virtual,
            physical=physical,
            length=length,
            complete=self._complete,
        )

    def tree(self, root: Root) -> None:
        tables, bases = np.array([root.address], np.uint64), np.array([root.base], np.uint64)
        for level, shift in enumerate(root.shifts):
            entries = root.root_entries if level == 0 else root.table_bytes // root.entry_bytes
            tables, bases, content = self._load(tables, bases, shift, entries * root.entry_bytes)
            if not len(tables):
                return
            values = np.frombuffer(content, f"<u{root.entry_bytes}").astype(np.uint64).reshape(-1, entries)
            tables, bases = self._level(root, level, tables, bases, values)

    def _load(self, tables: UInt64s, bases: UInt64s, shift: int, size: int) -> tuple[UInt64s, UInt64s, bytes]:
        """Return those of the tables that are there and were not visited, and their bytes one after another."""
        kept, content = [], []
        for number, address in enumerate(tables.tolist()):
            if (address, shift) in self._seen:
                continue
            if len(self._seen) >= PAGE_TABLES:
                self._complete = False
                break
            self._seen.add((address, shift))
            data = self._read(address, size)
            if len(data) == size:
                kept.append(number)
                content.append(data)
            else:
                self._lost.add(address)
        chosen = np.array(kept, np.intp)
        return tables[chosen], bases[chosen], b"".join(content)

    def _level(
        self, root: Root, level: int, tables: UInt64s, bases: UInt64s, values: UInt64s
    ) -> tuple[UInt64s, UInt64s]:
        """Sort the entries ``values`` (tables, entries) of one level; return the tables of the next one."""
        shift = root.shifts[level]
        decode = _decode_x86 if root.architecture == "x86" else _decode_aarch64
        leads, maps, address, wrong, device = decode(root, shift, values)
        broken = (wrong | ((leads | maps) & (address >= np.uint64(_HIGHEST)))).any(axis=1)
        self._broken.append(tables[broken])
        self._sound.append(tables[~broken & (leads | maps).any(axis=1)])
        leads[broken] = maps[broken] = False
        virtual = bases[:, None] + (np.arange(values.shape[1], dtype=np.uint64) << np.uint64(shift))[None, :]
        top = root.shifts[0] + root.root_entries.bit_length() - 1
        if root.architecture == "x86" and root.entry_bytes == 8 and level == 0 and len(root.shifts) > 3:
            virtual |= np.where(virtual >> np.uint64(top - 1) & np.uint64(1), np.uint64((1 << 64) - (1 << top)), 0)
        maps &= ~device
        if maps.any():
            count = int(maps.sum())
            self._leaves.append((virtual[maps], address[maps], np.full(count, 1 << shift, np.uint64)))
        following, first = np.unique(address[leads], return_index=True)
        return following, virtual[leads][first]


class _Entries(NamedTuple):
    """Table entries sorted out: arrays ``(tables, entries)``."""

    leads: Bools
    """To a table of the next level."""
    maps: Bools
    """A range of virtual addresses."""
    address: UInt64s
    wrong: Bools
    """The architecture forbids it."""
    device: Bools
    """Maps what is not ordinary memory."""


def _decode_x86(root: Root, shift: int, values: UInt64s) -> _Entries:
    present = (values & np.uint64(1)) != 0
    large = (values & np.uint64(0x80)) != 0
    pages = np.full(values.shape, shift == 12)
    wrong = np.zeros(values.shape, bool)
    if shift in (21, 30) and not (shift == 30 and len(root.shifts) == 3):
        pages = large
        wrong = present & large & ((values & np.uint64((1 << shift) - (1 << 13))) != 0)
    elif shift == 22:
        pages = large
    elif shift > 30:
        wrong = present & large
    mask = 0x000F_FFFF_FFFF_F000 if root.entry_bytes == 8 else 0xFFFF_F000
    address = values & np.uint64(mask)
    maps = present & pages
    address = np.where(maps, address & np.uint64(mask & ~((1 << shift) - 1)), address)
    return _Entries(present & ~pages, maps, address, wrong, (values & np.uint64(0x10)) != 0)


def _decode_aarch64(root: Root, shift: int, values: UInt64s) -> _Entries:
    kind = values & np.uint64(3)
    last = shift == root.shifts[-1]
    leads = (kind == 3) & (not last)
    maps = (kind == 3) if last else (kind == 1)
    wrong = np.zeros(values.shape, bool) if last or shift <= 36 else kind == 1
    address = values & np.uint64(0x0000_FFFF_FFFF_F000 & ~(root.table_bytes - 1))
    address = np.where(maps, address & np.uint64((1 << 64) - (1 << shift)), address)
    device = np.isin(values >> np.uint64(2) & np.uint64(7), np.array(root.device_kinds, np.uint64))
    return _Entries(leads, maps, address, wrong, device)


def _empty() -> UInt64s:
    return np.empty(0, np.uint64)


class DirectMap(NamedTuple):
    """The part of a kernel's address space in which physical memory appears in order."""

    base: int
    """The virtual address at which physical address 0 appears, or would."""
    ranges: tuple[tuple[int, int], ...]
    """``(address, length)`` of physical memory in it: sorted, joined."""

    def covered(self, address: int, length: int) -> int:
        """Return how many bytes of a range are in the map."""
        end = address + length
        return sum(max(0, min(end, start + size) - max(address, start)) for start, size in self.ranges)


_LEAST = 16 << 20  # bytes of a direct map: the smallest guest has more, and kernel images are mapped alone


def direct_map(tables: Walk) -> DirectMap | None:
    """Return the kernel's direct map, None when the tables have none.

    It is the largest set of mappings in the upper half of the address space with one distance between
    virtual and physical addresses.
    """
    upper = tables.virtual >> np.uint64(63) != 0
    virtual, physical, length = tables.virtual[upper], tables.physical[upper], tables.length[upper]
    if not len(virtual):
        return None
    distances, inverse = np.unique(virtual - physical, return_inverse=True)
    sums = np.bincount(inverse, weights=length.astype(np.float64))
    best = int(sums.argmax())
    if sums[best] < _LEAST or int(distances[best]) & 0x1F_FFFF:
        return None
    chosen = inverse == best
    return DirectMap(int(distances[best]), join(physical[chosen], length[chosen]))


def join(starts: UInt64s, lengths: UInt64s) -> tuple[tuple[int, int], ...]:
    """Return sorted ranges ``(address, length)`` that cover the given ones, neighbours joined."""
    if not len(starts):
        return ()
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate((starts + lengths)[order])
    begins = np.concatenate(([True], starts[1:] > ends[:-1]))
    lasts = np.concatenate((begins[1:], [True]))
    return tuple(zip(starts[begins].tolist(), (ends[lasts] - starts[begins]).tolist(), strict=True))
