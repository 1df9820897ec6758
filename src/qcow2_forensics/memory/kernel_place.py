"""Where a Linux kernel lies in memory, from the registers of the processors that run it.

An x86-64 processor keeps the address at which system calls enter the kernel (LSTAR) and a table of the addresses
at which exceptions enter it (the IDT). Compared with the same addresses in a symbol file they give the random
shift of the kernel (KASLR), and the page tables give its guest-physical address::

    virtual shift    LSTAR - address of entry_SYSCALL_64 in the symbol file
    physical shift   the guest-physical address of LSTAR - where a kernel that is not shifted has it

Nothing is searched for. The kernel's banner must lie where the shifts put it, otherwise there is no answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from ..limits import GiB
from . import page_tables
from .guest_memory import GuestMemory
from .page_tables import Root

_IMAGE: Final = 0xFFFF_FFFF_8000_0000  # where Linux maps physical address 0 of a kernel that is not shifted
_PAGE_FAULT = 14  # its number in the table of exceptions
_DESCRIPTOR = 16  # bytes of one entry of that table

_ENTRY_SYMBOLS: Final = {
    "lstar": ("entry_SYSCALL_64", "system_call"),
    "idt": ("asm_exc_page_fault", "page_fault"),
}
_TOP_TABLES = ("init_top_pgt", "init_level4_pgt")
_BANNER = "linux_banner"
SYMBOLS: Final = (*(name for names in _ENTRY_SYMBOLS.values() for name in names), *_TOP_TABLES, _BANNER)
"""The symbols whose addresses :func:`place_linux` can use."""


class Entry(NamedTuple):
    """Where a processor enters the kernel: a virtual address and its guest-physical address."""

    register: str
    """"lstar", or "idt" for the handler of page faults."""
    virtual: int
    physical: int
    root: Root
    """The page tables by which it was translated."""


@dataclass(frozen=True, slots=True)
class LinuxPlace:
    """Where a kernel lies, compared with the addresses in its symbol file."""

    virtual_shift: int
    physical_shift: int
    page_table: int
    """The guest-physical address of the kernel's own top page table."""
    levels: int
    """Levels of page tables: 4, or 5 with LA57."""


def entries(memory: GuestMemory) -> Iterator[Entry]:
    """Yield where the processors enter the kernel; none for those without 64-bit paging or with a nested guest running."""
    read = _reader(memory)
    for cpu in memory.cpus:
        if cpu.runs_nested_guest:
            continue
        for root in page_tables.roots(cpu):
            if root.architecture != "x86" or len(root.shifts) < 4:
                continue
            for register, virtual in (
                ("lstar", cpu.registers.get("lstar", 0)),
                ("idt", _page_fault_handler(root, cpu.registers.get("idt_base", 0), read)),
            ):
                physical = page_tables.translate(root, read, virtual) if virtual else None
                if physical is not None:
                    yield Entry(register, virtual, physical, root)


def place_linux(memory: GuestMemory, symbols: Mapping[str, int], banner: bytes) -> LinuxPlace | None:
    """Return where the kernel with these symbols and this banner lies; None when the registers do not show it.

    ``symbols`` are addresses from the kernel's symbol file, of those of :data:`SYMBOLS` that it has.
    """
    read = _reader(memory)
    top = next((symbols[name] for name in _TOP_TABLES if name in symbols), None)
    if top is None or _BANNER not in symbols:
        return None
    text = symbols[_BANNER]
    for entry in entries(memory):
        for name in _ENTRY_SYMBOLS[entry.register]:
            if name not in symbols:
                continue
            virtual = entry.virtual - symbols[name]
            physical = entry.physical - (symbols[name] - _IMAGE)
            if not 0 <= virtual < GiB or virtual % 4096 or physical % 4096:
                continue
            table, place = top - _IMAGE + physical, text - _IMAGE + physical
            own = entry.root._replace(address=table)
            if (
                read(place, len(banner)) == banner
                and page_tables.translate(own, read, text + virtual) == place
                and page_tables.translate(entry.root, read, text + virtual) == place
            ):
                return LinuxPlace(virtual, physical, table, len(own.shifts))
    return None


def _reader(memory: GuestMemory) -> page_tables.Reader:
    return lambda address, length: memory.read(address, length) if memory.is_valid(address, length) else b""


def _page_fault_handler(root: Root, table: int, read: page_tables.Reader) -> int:
    """Return the address of the handler of page faults, 0 when the table of exceptions cannot be read."""
    place = page_tables.translate(root, read, table + _PAGE_FAULT * _DESCRIPTOR) if table else None
    data = read(place, _DESCRIPTOR) if place is not None else b""
    if len(data) < _DESCRIPTOR:
        return 0
    return int.from_bytes(data[0:2] + data[6:8] + data[8:12], "little")
