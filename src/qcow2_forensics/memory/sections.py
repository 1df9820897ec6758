"""The sections of a QEMU migration stream, up to the first device.

::

    "QEVM" version 3
    07 configuration   machine type, then 05 subsections
    08 command         code, length, payload
    01 start           id, name, instance, version, body, [7e id]
    02 part, 03 end    id, body, [7e id]
    04 full            a device: the first after RAM has ended is where we stop; a background snapshot
                       writes no end of RAM, there it is the first after a part of RAM
    00 end of stream
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ..errors import LimitExceeded, Unsupported
from ..format.source import Source
from ..limits import EARLY_DEVICE_BYTES, EARLY_DEVICES, STREAM_NOTES, Limits
from ..text import decoded, quoted
from .cursor import Cursor, Truncated, broken
from .pages import RamRecords

MAGIC: Final = b"QEVM"
VERSION: Final = 3
END, START, PART, LAST, FULL = 0x00, 0x01, 0x02, 0x03, 0x04
SUBSECTION, DESCRIPTION, CONFIGURATION, COMMAND, FOOTER = 0x05, 0x06, 0x07, 0x08, 0x7E

_SKIP = 1 << 16  # bytes searched at once for the end of a section nobody describes
_BLOCK_MIGRATION_BYTES = 1 << 20  # disk bytes in one record of the "block" section


@dataclass(slots=True)
class Stream:
    """What the sections say: RAM records, and where the devices begin."""

    ram: RamRecords
    machine: str = ""
    capabilities: tuple[str, ...] = ()
    devices_offset: int = 0
    early: list[tuple[str, bytes]] = field(default_factory=list)
    """Devices that were written before RAM, by name: virtio-mem, since QEMU 8."""
    complete: bool = True
    notes: list[str] = field(default_factory=list)


def read_stream(source: Source, limits: Limits, *, allow_truncated: bool = False) -> Stream:
    """Read the stream up to its first device section."""
    walker = _Walker(source, limits)
    try:
        walker.walk()
    except Truncated:
        if not allow_truncated or not walker.stream.ram.blocks:
            raise
        walker.stream.complete = False
    if not walker.stream.ram.blocks:
        raise broken("no RAM section before the end", walker.cursor.position)
    return walker.stream


class _Walker:
    def __init__(self, source: Source, limits: Limits) -> None:
        self.cursor = Cursor(source, limits)
        self.limits = limits
        self.stream = Stream(RamRecords(limits))
        self._names: dict[int, str] = {}
        self._ram_ended = False
        self._ram_parts = False
        self._has_footers = False

    def walk(self) -> None:
        cursor = self.cursor
        if cursor.take(4) != MAGIC:
            raise broken("no QEVM magic", 0)
        if (version := cursor.uint(4)) != VERSION:
            raise Unsupported(f"migration stream version {version}")
        while not self._section():
            pass

    def _section(self) -> bool:
        """Read one section; return whether RAM is complete and its devices begin here."""
        cursor = self.cursor
        cursor.step()
        at = cursor.position
        kind = cursor.uint(1)
        if kind == CONFIGURATION:
            self._configuration()
        elif kind == COMMAND:
            cursor.skip(2)
            cursor.skip(cursor.uint(2))
        elif kind in (END, FULL) and self._ram_ended:
            self.stream.devices_offset = at
            return True
        elif kind == FULL and self._ram_parts and int.from_bytes(cursor.read(at + 1, 4), "big") not in self._names:
            self.stream.notes.append("the RAM has no end of its own, as a background snapshot leaves it")
            self.stream.devices_offset = at
            return True
        elif kind in (START, FULL):
            number = cursor.uint(4)
            if number in self._names:  # else a part whose type is damaged would be passed, its pages with it
                raise broken(f"section {number} begins twice", at)
            name = cursor.name()
            cursor.take(8)  # instance and version
            if kind == FULL:
                self._early_device(number, name)
            else:
                self._names[number] = name
                self._body(number, name)
        elif kind in (PART, LAST):
            number = cursor.uint(4)
            if number not in self._names:
                raise broken(f"part of unknown section {number}", at)
            self._body(number, self._names[number])
            self._ram_parts |= self._names[number] == "ram"
            self._ram_ended |= kind == LAST and self._names[number] == "ram"
        else:
            raise broken("end before that of the RAM" if kind == END else f"unknown section type {kind:#x}", at)
        return False

    def _configuration(self) -> None:
        cursor, ram = self.cursor, self.stream.ram
        if (length := cursor.uint(4)) > self.limits.stream_name_bytes:
            raise LimitExceeded("stream_name_bytes", length, self.limits.stream_name_bytes)
        self.stream.machine = decoded(cursor.take(length))
        while cursor.peek() == SUBSECTION:
            at = cursor.position
            cursor.skip(1)
            name = cursor.name()
            cursor.skip(4)
            if name == "configuration/target-page-bits":
                bits = cursor.uint(4)
                if not 10 <= bits <= 16:
                    raise broken(f"{bits} target page bits", at)
                ram.page_size = 1 << bits
            elif name == "configuration/capabilities":
                if (count := cursor.uint(4)) > 256:
                    raise broken(f"{count} capabilities", at)
                self.stream.capabilities = tuple(cursor.name() for _ in range(count))
                ram.ignore_shared = "x-ignore-shared" in self.stream.capabilities
                ram.mapped_ram = "mapped-ram" in self.stream.capabilities
            elif name == "configuration/uuid":
                cursor.skip(16)
            else:
                raise Unsupported(f"migration stream subsection {quoted(name)}")

    def _body(self, number: int, name: str) -> None:
        cursor = self.cursor
        if name == "ram":
            self.stream.ram.parse(cursor)
        elif name == "pbs-state":
            cursor.skip(cursor.uint(8))
        elif name == "block":
            self._block_migration()
        elif name == "dirty-bitmap" and cursor.peek() == 0x01:  # nothing but its end
            cursor.skip(1)
        else:
            self._skip_to_footer(number, name)
            return
        at, follows = cursor.position, cursor.peek()
        if follows == FOOTER:
            cursor.skip(1)
            if cursor.uint(4) != number:
                raise broken(f"footer that is not of section {number}", at)
            self._has_footers = True
        elif self._has_footers and follows >= 0:  # machine types before 2.4 write none at all
            raise broken(f"no footer after section {number}", at)

    def _block_migration(self) -> None:
        """Skip disk content that an old "migrate -b" put between the RAM sections."""
        cursor = self.cursor
        while True:
            cursor.step()
            at = cursor.position
            flags = cursor.uint(8) & 0x1FF
            if flags == 0x02:
                return
            if flags & 0x01:
                cursor.name()
                cursor.skip(0 if flags & 0x08 else _BLOCK_MIGRATION_BYTES)
            elif flags != 0x04:
                raise broken(f"disk record with unknown flags {flags:#x}", at)

    def _early_device(self, number: int, name: str) -> None:
        """Keep a device that had to be known before RAM."""
        begin = self.cursor.position
        self._skip_to_footer(number, name)
        if len(self.stream.early) < EARLY_DEVICES:
            length = min(self.cursor.position - 5 - begin, EARLY_DEVICE_BYTES)
            self.stream.early.append((name, self.cursor.read(begin, length)))

    def _skip_to_footer(self, number: int, name: str) -> None:
        """Pass a section of unknown content: its footer names it, and a section type follows."""
        cursor = self.cursor
        footer = bytes([FOOTER]) + number.to_bytes(4, "big")
        begin = cursor.position
        stop = min(cursor.source.size, begin + self.limits.device_state_bytes)
        at = begin
        while at < stop:
            data = cursor.read(at, _SKIP)
            found = data.find(footer)
            while found >= 0:
                cursor.step()
                after = data[found + 5 : found + 6] or cursor.read(at + found + 5, 1)
                if after and after[0] in (END, START, PART, LAST, FULL, COMMAND):
                    if len(self.stream.notes) < STREAM_NOTES:
                        self.stream.notes.append(f"section {quoted(name)} was passed by its footer")
                    cursor.jump(at + found + 5)
                    return
                found = data.find(footer, found + 1)
            at += max(1, len(data) - 4)
        raise Unsupported(f"migration stream section {quoted(name)}")
