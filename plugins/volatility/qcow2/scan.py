"""The plugin ``qcow2.scan.Scan``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from volatility3.framework import interfaces
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints

from . import common
from .evidence import EvidencePlugin, FoundStream, Row
from .options import optional_flag, optional_text

if TYPE_CHECKING:
    from qcow2_forensics import Finder, GuestMemory, Match

_SHOWN = 128  # bytes of a match
_SHORTEST = 6  # characters of a string, by default
_PRINTABLE = rb"[\x20-\x7e\t]"


class Scan(EvidencePlugin):
    """Searches the memory of every snapshot for a pattern, YARA rules or strings; what snapshots share is scanned once.

    A row has the snapshot, the guest-physical address and what was found. A search looks at pieces of 64 KiB of physical
    memory: that is where a YARA condition over several strings is decided, and longer matches are cut off.
    """

    hidden = False
    columns = (
        ("ID", str),
        ("Snapshot", str),
        ("Address", format_hints.Hex),
        ("Rule", str),
        ("Text", str),
        ("Bytes", bytes),
    )

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        return [
            *super().get_requirements(),
            optional_text("pattern", "Regular expression over bytes"),
            optional_text("yara_string", "Yara rules (as a string)"),
            requirements.URIRequirement(name="yara_file", description="Yara rules (as a file)", optional=True),
            requirements.URIRequirement(
                name="yara_compiled_file", description="Yara compiled rules (as a file)", optional=True
            ),
            optional_flag("insensitive", "Search without regard to case"),
            optional_flag("wide", "Search in 16-bit characters too"),
            optional_flag("strings", "Show all strings of printable characters"),
            requirements.IntRequirement(
                name="shortest", description="Characters of the shortest string", optional=True, default=_SHORTEST
            ),
        ]

    def _rows(self) -> Iterator[Row]:
        from qcow2_forensics import Qcow2Error, scan_memories
        from qcow2_forensics.text import printable

        find, overlapping = self._finder()
        streams: list[FoundStream] = []
        memories: list[GuestMemory] = []
        for stream in self.streams():
            try:
                memories.append(stream.memory())
                streams.append(stream)
            except Qcow2Error as error:
                common.warn(f"{_name(stream)[1]} is left out: {error}")
        names = [_name(stream) for stream in streams]

        def advance(address: int, end: int) -> None:
            self._progress_callback(100 * address / max(end, 1), f"Searching {len(memories)} memories")

        def unreadable(number: int, error: Exception) -> None:
            common.warn(f"{names[number][1]}: not searched: {error}")

        for number, match in scan_memories(
            memories, find, overlapping=overlapping, advance=advance, unreadable=unreadable
        ):
            shown = printable(match.value[:_SHOWN].decode("latin-1"))
            yield (
                0,
                (*names[number], format_hints.Hex(match.offset), printable(match.label), shown, match.value[:_SHOWN]),
            )

    def _finder(self) -> tuple[Finder, bool]:
        """Return what searches bytes, and whether its matches may overlap."""
        from qcow2_forensics import Qcow2Error, pattern_finder

        pattern, strings = self.config.get("pattern", None), self.config.get("strings", False)
        yara = any(self.config.get(name, None) for name in ("yara_string", "yara_file", "yara_compiled_file"))
        if bool(pattern) + bool(strings) + yara != 1:
            raise Qcow2Error("give one of --pattern, --yara-string, --yara-file, --yara-compiled-file and --strings")
        if yara:
            return _yara_finder(self.config), True
        flags = re.IGNORECASE if self.config.get("insensitive", False) else 0
        if strings:
            count = max(1, int(self.config.get("shortest", None) or _SHORTEST))
            expression, label = rb"%b{%d,}" % (_PRINTABLE, count), "string"
            if self.config.get("wide", False):
                expression = rb"(?:%b\0){%d,}|%b" % (_PRINTABLE, count, expression)
        else:
            expression, label = str(pattern).encode("utf-8", "surrogateescape"), "pattern"
        try:
            return pattern_finder(re.compile(expression, flags), label), False
        except re.error as error:
            raise Qcow2Error(f"no regular expression: {error}") from error


def _name(stream: FoundStream) -> tuple[str, str]:
    """Return ID and name of a stream's snapshot, for a column."""
    from qcow2_forensics.text import printable

    if stream.snapshot is None:
        return "-", stream.label or "-"
    return printable(stream.snapshot.id), printable(stream.snapshot.name)


def _yara_finder(config: Any) -> Finder:
    """Return what finds YARA rules, as Volatility's own plugin compiles them."""
    from qcow2_forensics import Match, Qcow2Error

    try:
        from volatility3.plugins import yarascan
    except ImportError as error:
        raise Qcow2Error("YARA rules need yara-x or yara-python") from error
    try:
        scanner = yarascan.YaraScanner(rules=yarascan.YaraScan.process_yara_options(dict(config)))
    except Exception as error:  # the two libraries raise their own kinds, which are not to be imported here
        raise Qcow2Error(f"the YARA rules cannot be used: {error}") from error

    def find(data: bytes) -> Iterator[Match]:
        for offset, rule, component, value in scanner(data, 0):
            yield Match(offset, f"{rule} {component}", bytes(value))

    return find
