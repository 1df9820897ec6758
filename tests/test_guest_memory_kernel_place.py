"""Where a Linux kernel lies, from registers and page tables that are written here."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pytest

from qcow2_forensics.memory import page_tables, place_linux
from qcow2_forensics.memory.model import Cpu

MiB = 1 << 20
IMAGE = 0xFFFFFFFF80000000
BANNER = b"Linux version 6.1.0 (a@b) (gcc) #1 SMP\n"
SYMBOLS = {
    "linux_banner": 0xFFFFFFFF81200040,
    "entry_SYSCALL_64": 0xFFFFFFFF81000080,
    "asm_exc_page_fault": 0xFFFFFFFF81000C00,
    "init_top_pgt": 0xFFFFFFFF81601000,
}
VIRTUAL, PHYSICAL = 0x12400000, 0x200000  # shifts
IDT = 0xFFFFFE0000000000
_IDT_PAGE = 0x5000


@dataclass
class Memory:
    """What the search asks of a guest's memory."""

    content: bytearray
    cpus: tuple[Cpu, ...]

    def is_valid(self, address: int, length: int = 1) -> bool:
        return address >= 0 and address + length <= len(self.content)

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.content[address : address + length])


def guest(levels: int = 4, *, lstar: bool = True) -> Any:
    """A guest with a kernel of 8 MiB in 2 MiB pages, and a table of exceptions in a page of 4 KiB."""
    content = bytearray(28 * MiB)
    top = SYMBOLS["init_top_pgt"] - IMAGE + PHYSICAL
    free = iter(range(0x10000, 0x80000, 4096))

    def enter(virtual: int, physical: int, last: int) -> None:
        table = top
        for level in range(levels - 1, last - 1, -1):
            place = table + 8 * (virtual >> (12 + 9 * level) & 511)
            found = int.from_bytes(content[place : place + 8], "little")
            if level == last:
                found = physical | (0x83 if last else 3)
            elif not found:
                found = next(free) | 3
            content[place : place + 8] = found.to_bytes(8, "little")
            table = found & ~0xFFF

    for at in range(0, 8 * MiB, 2 * MiB):
        enter(IMAGE + 16 * MiB + VIRTUAL + at, 16 * MiB + PHYSICAL + at, 1)
    enter(IDT, _IDT_PAGE, 0)
    handler = SYMBOLS["asm_exc_page_fault"] + VIRTUAL
    gate = handler.to_bytes(8, "little")
    content[_IDT_PAGE + 14 * 16 : _IDT_PAGE + 15 * 16] = gate[:2] + b"\x10\0\0\x8e" + gate[2:8] + bytes(4)
    place = SYMBOLS["linux_banner"] - IMAGE + PHYSICAL
    content[place : place + len(BANNER)] = BANNER
    registers = {
        "cr0": 1 << 31 | 1,
        "cr3": top,
        "cr4": 1 << 5 | (levels == 5) << 12,
        "efer": 1 << 10,
        "idt_base": IDT,
        "lstar": SYMBOLS["entry_SYSCALL_64"] + VIRTUAL if lstar else 0,
    }
    return Memory(content, (Cpu(0, "x86", MappingProxyType(registers)),))


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("lstar", [True, False], ids=["lstar", "idt"])
def test_registers_give_both_shifts_and_the_top_page_table(levels: int, lstar: bool) -> None:
    found = place_linux(guest(levels, lstar=lstar), SYMBOLS, BANNER)
    assert found is not None
    assert (found.virtual_shift, found.physical_shift, found.levels) == (VIRTUAL, PHYSICAL, levels)
    assert found.page_table == SYMBOLS["init_top_pgt"] - IMAGE + PHYSICAL


def test_another_banner_at_that_place_is_no_answer() -> None:
    assert place_linux(guest(), SYMBOLS, BANNER.replace(b"6.1.0", b"6.1.1")) is None


def test_symbols_of_another_build_are_no_answer() -> None:
    moved = {name: address + 0x1000 * (name == "linux_banner") for name, address in SYMBOLS.items()}
    assert place_linux(guest(), moved, BANNER) is None
    assert place_linux(guest(), {}, BANNER) is None


def test_registers_of_a_nested_guest_say_nothing_of_the_kernel() -> None:
    memory = guest()
    (cpu,) = memory.cpus
    memory.cpus = (replace(cpu, registers={**cpu.registers, "hflags": 1 << 21}),)
    assert memory.cpus[0].runs_nested_guest
    assert place_linux(memory, SYMBOLS, BANNER) is None


def test_a_processor_without_paging_is_no_answer() -> None:
    memory = guest()
    (cpu,) = memory.cpus
    memory.cpus = (replace(cpu, registers={**cpu.registers, "cr0": 1}),)
    assert place_linux(memory, SYMBOLS, BANNER) is None


@pytest.mark.slow
def test_random_registers_and_tables_end_in_an_answer_or_in_none() -> None:
    source = random.Random(3)
    for _ in range(40):
        memory = guest(source.choice([4, 5]))
        for _ in range(40):
            place = source.choice([source.randrange(0x80000), source.randrange(18 * MiB, 28 * MiB)])
            memory.content[place] ^= 1 << source.randrange(8)
        (cpu,) = memory.cpus
        name = source.choice(list(cpu.registers))
        memory.cpus = (replace(cpu, registers={**cpu.registers, name: source.getrandbits(64)}),)
        found = place_linux(memory, SYMBOLS, BANNER)
        assert found is None or found.virtual_shift < 1 << 30


@pytest.mark.parametrize("levels", [4, 5])
def test_one_address_is_translated_as_the_walk_over_all_tables_does(levels: int) -> None:
    memory = guest(levels)
    (root, *_) = page_tables.roots(memory.cpus[0])
    walk = page_tables.walk([root], memory.read)
    for virtual, physical, length in zip(*map(list, (walk.virtual, walk.physical, walk.length)), strict=True):
        for at in (0, int(length) - 1):
            assert page_tables.translate(root, memory.read, int(virtual) + at) == int(physical) + at
        assert page_tables.translate(root, memory.read, int(virtual) + (1 << 40)) is None
