"""Guest memory as an ELF core file, as QEMU's own dump-guest-memory lays it out: for crash and drgn.

::

    ELF header | program headers: one for the notes, one for each range of RAM | notes | RAM

The notes are the registers of each processor (NT_PRSTATUS, and QEMU's own form of them) and VMCOREINFO, in which a
Linux kernel says where it is and how it was built. The kernel keeps that note in its memory, ready for a crash dump.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from ..errors import Unsupported
from ..limits import VMCOREINFO_BYTES, MiB
from ..reader.writer import Writer
from .dump import need_regions, write_ranges
from .guest_memory import GuestMemory
from .model import Cpu

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_CORE, _LOAD, _NOTES = 4, 1, 4
_MACHINES = {"x86": 62, "aarch64": 183}
_MOST_RANGES: Final = 0xFFF0  # program headers that an ELF header can count
_PAGE = 4096

_PRSTATUS = 1
_X86_ORDER = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_ARM_ORDER = (*(f"x{number}" for number in range(31)), "sp_el1", "pc", "pstate")
_QEMU_WORDS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *(f"r{number}" for number in range(8, 16)),
    *("rip", "rflags"),
)
_QEMU_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr", "gdt", "idt")
_QEMU_SIZE = 440

_VMCOREINFO = b"VMCOREINFO\0"


def write_elf(memory: GuestMemory, writer: Writer) -> None:
    """Write an ELF core file. Raises :class:`Unsupported` for an architecture that has none here."""
    need_regions(memory)
    machine = _MACHINES.get(memory.architecture)
    if machine is None:
        raise Unsupported(f"an ELF core file of architecture {memory.architecture or 'unknown'!r}")
    ranges = list(memory.valid_ranges())
    if len(ranges) > _MOST_RANGES:
        ranges = [(region.address, region.length) for region in memory.regions]  # zeros where nothing was recorded
    notes = b"".join(_processor(cpu) for cpu in memory.cpus) + vmcoreinfo(memory)
    count = len(ranges) + 1
    at = _HEADER.size + count * _PROGRAM.size
    start = -(-(at + len(notes)) // _PAGE) * _PAGE
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head = _HEADER.pack(ident, _CORE, machine, 1, 0, _HEADER.size, 0, 0, _HEADER.size, _PROGRAM.size, count, 0, 0, 0)
    head += _PROGRAM.pack(_NOTES, 0, at, 0, 0, len(notes), len(notes), 0)
    place = start
    for address, length in ranges:
        head += _PROGRAM.pack(_LOAD, 0, place, 0, address, length, length, 0)
        place += length
    writer.data((head + notes).ljust(start, b"\0"))
    write_ranges(memory, ranges, writer)


def vmcoreinfo(memory: GuestMemory) -> bytes:
    """Return the note in which a Linux kernel describes itself, as it lies in memory; b"" when there is none."""
    for chunk in memory.chunks(4 * MiB, _PAGE, elide=True):
        data = memory.read(chunk.address, chunk.length)
        at = data.find(_VMCOREINFO)
        while at >= 0:
            note = _note_at(memory, chunk.address + at - _NOTE.size)
            if note:
                return note
            at = data.find(_VMCOREINFO, at + 1)
    return b""


def _note_at(memory: GuestMemory, address: int) -> bytes:
    """Return the whole note at an address, b"" when what is there is none."""
    if address < 0 or not memory.is_valid(address, _NOTE.size):
        return b""
    name, content, _ = _NOTE.unpack(memory.read(address, _NOTE.size))
    size = _NOTE.size + _aligned(name) + _aligned(content)
    if name != len(_VMCOREINFO) or not 0 < content <= VMCOREINFO_BYTES or not memory.is_valid(address, size):
        return b""
    note = memory.read(address, size)
    return note if note[_NOTE.size + _aligned(name) :].startswith(b"OSRELEASE=") else b""


def _processor(cpu: Cpu) -> bytes:
    values = cpu.registers
    order = _X86_ORDER if cpu.architecture == "x86" else _ARM_ORDER
    status = bytearray(112)
    status[32:36] = (cpu.index + 1).to_bytes(4, "little")  # in place of a process ID
    status += b"".join(_word(values.get(name, 0)) for name in order) + bytes(8)
    notes = _note(b"CORE\0", _PRSTATUS, bytes(status))
    return notes + _note(b"QEMU\0", 0, _qemu(values)) if cpu.architecture == "x86" else notes


def _qemu(values: Mapping[str, int]) -> bytes:
    """Return the processor as QEMU's dumps have it: words, ten segments, five control registers."""
    state = struct.pack("<II", 1, _QEMU_SIZE) + b"".join(_word(values.get(name, 0)) for name in _QEMU_WORDS)
    for name in _QEMU_SEGMENTS:
        selector, limit = (values.get(key, 0) & 0xFFFFFFFF for key in (name, f"{name}_limit"))
        state += struct.pack("<IIIIQ", selector, limit, 0, 0, values.get(f"{name}_base", 0))
    return state + b"".join(
        _word(values.get(name, 0)) for name in ("cr0", "cr1", "cr2", "cr3", "cr4", "kernel_gs_base")
    )


def _note(name: bytes, kind: int, content: bytes) -> bytes:
    padded = content.ljust(_aligned(len(content)), b"\0")
    return _NOTE.pack(len(name), len(content), kind) + name.ljust(_aligned(len(name)), b"\0") + padded


def _aligned(length: int) -> int:
    return -(-length // 4) * 4


def _word(value: int) -> bytes:
    return (value & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")
