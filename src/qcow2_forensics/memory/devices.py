"""The device sections after RAM, and the registers of each processor.

A device's bytes do not say how long they are. Streams since machine types 2.2 end with a JSON text
that describes every device field by field; with it each section is walked exactly, and the footer
after it checked. In streams without one only the sections whose footers can be found are listed.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..format.source import Source
from ..limits import ARM_REGISTERS, DESCRIPTION_BYTES_PER_STRUCTURE, DESCRIPTION_CANDIDATES, DESCRIPTION_DEPTH, Limits
from ..text import decoded
from .model import Cpu, Device
from .sections import FOOTER, FULL

_DESCRIPTION = re.compile(rb'\x7e....\x00\x06(....)\{"', re.DOTALL)

_X86_WORDS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *(f"r{number}" for number in range(8, 16)),
)
_X86_FIELDS = {
    "env.eip": "rip",
    "env.eflags": "rflags",
    "env.cr[0]": "cr0",
    "env.cr[2]": "cr2",
    "env.cr[3]": "cr3",
    "env.cr[4]": "cr4",
    "env.efer": "efer",
    "env.star": "star",
    "env.lstar": "lstar",
    "env.cstar": "cstar",
    "env.fmask": "fmask",
    "env.kernelgsbase": "kernel_gs_base",
    "env.sysenter_cs": "sysenter_cs",
    "env.sysenter_esp": "sysenter_esp",
    "env.sysenter_eip": "sysenter_eip",
    "env.smbase": "smbase",
    "env.tsc": "tsc",
    "env.hflags": "hflags",  # QEMU's own: among others, whether a nested guest runs
}
_X86_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
_X86_TABLES = {"env.ldt": "ldt", "env.tr": "tr", "env.gdt": "gdt", "env.idt": "idt"}

# Arm system registers by (op0, op1, CRn, CRm, op2), as the architecture manual encodes them.
_ARM_SYSTEM = {
    (3, 0, 1, 0, 0): "sctlr_el1",
    (3, 0, 2, 0, 0): "ttbr0_el1",
    (3, 0, 2, 0, 1): "ttbr1_el1",
    (3, 0, 2, 0, 2): "tcr_el1",
    (3, 0, 5, 2, 0): "esr_el1",
    (3, 0, 6, 0, 0): "far_el1",
    (3, 0, 10, 2, 0): "mair_el1",
    (3, 0, 12, 0, 0): "vbar_el1",
    (3, 0, 13, 0, 1): "contextidr_el1",
    (3, 0, 13, 0, 4): "tpidr_el1",
    (3, 3, 13, 0, 2): "tpidr_el0",
}


class Field(NamedTuple):
    """One described field: ``elements`` values of ``size`` bytes each, as they lie in the stream."""

    name: str
    offset: int
    size: int
    elements: int


class DeviceStates:
    """Everything after RAM, read once: at most ``limits.device_state_bytes``."""

    def __init__(self, source: Source, offset: int, limits: Limits) -> None:
        self.offset = offset
        wanted = min(limits.device_state_bytes, max(0, source.size - offset))
        self.data = source.read(offset, wanted) if wanted else b""
        self.notes: list[str] = []
        self._described = self._description(limits)
        if not self._described and source.size - offset > wanted:
            self.notes.append(f"only the first {wanted} bytes of the devices were read, which is the limit")
        self.devices = tuple(self._walk())

    def body(self, device: Device) -> bytes:
        """Return the bytes of one device section."""
        start = device.offset - self.offset
        return self.data[start : start + device.length]

    def bodies(self, words: str) -> list[tuple[str, bytes]]:
        """Return names and bytes of the sections whose names hold ``words``."""
        return [(device.name, self.body(device)) for device in self.devices if words in device.name]

    def clock_ram(self) -> bytes | None:
        """Return the 128 bytes of CMOS from the RTC section; it starts with them, whatever its age."""
        for device in self.devices:
            if device.name == "mc146818rtc":
                return self.body(device)[:128] if device.length >= 128 else None
        found = re.search(rb"\x04....\x0bmc146818rtc\x00{4}\x00\x00\x00.", self.data, re.DOTALL)
        cmos = self.data[found.end() : found.end() + 128] if found else b""
        return cmos if len(cmos) == 128 else None

    def cpus(self) -> tuple[Cpu, ...]:
        """Return the registers of every processor that is described."""
        found = []
        for device, description in zip(self.devices, self._described, strict=False):
            if device.name != "cpu":
                continue
            fields = {item.name: item for item in _fields(description)}
            body = self.body(device)
            if "env.cr[3]" in fields:
                found.append(Cpu(device.instance, "x86", _x86(fields, body)))
            elif "env.xregs" in fields:
                found.append(Cpu(device.instance, "aarch64", _aarch64(fields, body)))
        return tuple(found)

    def _description(self, limits: Limits) -> list[dict[str, Any]]:
        """Return the described devices, empty when there is no readable description; a note says why."""
        too_long = 0
        count = 0
        candidates: deque[re.Match[bytes]] = deque(maxlen=DESCRIPTION_CANDIDATES)
        for match in _DESCRIPTION.finditer(self.data):
            candidates.append(match)
            count += 1
        for found in reversed(candidates):
            length = int.from_bytes(found[1], "big")
            start = found.end() - 2
            if start + length > len(self.data):
                continue
            text = self.data[start : start + min(length, limits.device_description_bytes)]
            if length == len(text) and text[-1:] != b"}":
                continue
            structures = text.count(b"{") + text.count(b"[")
            if length > len(text) or structures > limits.device_description_bytes // DESCRIPTION_BYTES_PER_STRUCTURE:
                too_long = length
                continue
            try:
                devices = json.loads(text)["devices"]
                if isinstance(devices, list) and all(isinstance(device, dict) for device in devices):
                    return devices
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        if too_long:
            self.notes.append(f"the description of the devices, {too_long} bytes, is over the limit and was not read")
        elif count > DESCRIPTION_CANDIDATES:
            self.notes.append(
                f"{count} texts look like the description of the devices; the last {DESCRIPTION_CANDIDATES} are not, "
                "and the search was given up: no devices and no registers"
            )
        return []

    def _walk(self) -> Iterator[Device]:
        """Walk the sections in step with their descriptions, stopping at the first disagreement."""
        data, at = self.data, 0
        for description in self._described:
            if at + 6 > len(data) or data[at] != FULL:
                return
            number = data[at + 1 : at + 5]
            body = at + 6 + data[at + 5] + 8
            name = decoded(data[at + 6 : body - 8])
            instance = int.from_bytes(data[body - 8 : body - 4], "big")
            version = int.from_bytes(data[body - 4 : body], "big")
            end = body + _length(description)
            if name != description.get("name") or data[end : end + 5] != bytes([FOOTER]) + number:
                return
            yield Device(name, instance, version, self.offset + body, end - body)
            at = end + 5


def _length(description: Mapping[str, Any]) -> int:
    """Return how many bytes a described structure takes, -1 when the description is nonsense."""
    try:
        return _end(description, 0, 0)
    except (KeyError, TypeError, ValueError):
        return -1


def _end(description: Mapping[str, Any], offset: int, depth: int) -> int:
    for item in description.get("fields", ()):
        offset += _count(item["size"]) * _count(item.get("array_len", 1))
    if depth > DESCRIPTION_DEPTH:
        raise ValueError("nested too deep")
    for part in description.get("subsections", ()):
        offset = _end(part, offset + 2 + len(str(part["vmsd_name"]).encode()) + 4, depth + 1)
    return offset


def _count(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 40:
        raise ValueError("not a size")
    return value


def _fields(description: Mapping[str, Any]) -> Iterator[Field]:
    """Yield the top-level fields with their places in the body; the walk has checked the sizes."""
    offset = 0
    for item in description.get("fields", ()):
        size, count = _count(item["size"]), _count(item.get("array_len", 1))
        yield Field(str(item.get("name", "")), offset, size, count)
        offset += size * count


def _value(field: Field, body: bytes, number: int = 0) -> int:
    start = field.offset + number * field.size
    return int.from_bytes(body[start : start + min(field.size, 8)], "big")


def _x86(fields: Mapping[str, Field], body: bytes) -> dict[str, int]:
    registers = {}
    if words := fields.get("env.regs"):
        registers.update({name: _value(words, body, n) for n, name in enumerate(_X86_WORDS[: words.elements])})
    registers.update({name: _value(fields[field], body) for field, name in _X86_FIELDS.items() if field in fields})
    if segments := fields.get("env.segs"):
        for number, name in enumerate(_X86_SEGMENTS[: segments.elements]):
            registers.update(_segment(name, body, segments.offset + number * segments.size, segments.size))
    for field, name in _X86_TABLES.items():
        if field in fields:
            registers.update(_segment(name, body, fields[field].offset, fields[field].size))
    if debug := fields.get("env.dr"):
        registers.update({f"dr{n}": _value(debug, body, n) for n in range(min(debug.elements, 8))})
    return registers


def _segment(name: str, body: bytes, offset: int, size: int) -> dict[str, int]:
    """Selector, base, limit and flags: 32 bits each, but for the base, which takes what is left."""
    wide = min(max(size - 12, 0), 8)
    return {
        name: int.from_bytes(body[offset : offset + 4], "big"),
        f"{name}_base": int.from_bytes(body[offset + 4 : offset + 4 + wide], "big"),
        f"{name}_limit": int.from_bytes(body[offset + 4 + wide : offset + 8 + wide], "big"),
    }


def _aarch64(fields: Mapping[str, Field], body: bytes) -> dict[str, int]:
    general = fields["env.xregs"]
    registers = {f"x{n}": _value(general, body, n) for n in range(min(general.elements, 31))}
    for field, name in (("env.pc", "pc"), ("cpsr", "pstate")):
        if field in fields:
            registers[name] = _value(fields[field], body)
    for level in ("elr_el", "sp_el"):
        if item := fields.get(f"env.{level}"):
            registers.update({f"{level}{n}": _value(item, body, n) for n in range(min(item.elements, 4))})
    keys, values = fields.get("cpreg_vmstate_indexes"), fields.get("cpreg_vmstate_values")
    if keys and values:
        for number in range(min(keys.elements, values.elements, ARM_REGISTERS)):
            if system := _arm_name(_value(keys, body, number)):
                registers[system] = _value(values, body, number)
    return registers


def _arm_name(key: int) -> str | None:
    """Name a system register from its 64-bit key: class 0x13 above five packed encoding fields."""
    if key >> 16 & 0xFFF != 0x013:
        return None
    return _ARM_SYSTEM.get((key >> 14 & 3, key >> 11 & 7, key >> 7 & 15, key >> 3 & 15, key & 7))
