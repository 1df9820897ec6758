"""The vocabulary of observations: what was seen, where, and how much it matters.

Nothing here knows how a QCOW2 image is parsed. A finding observes ("cluster 0x50000 is claimed by
L2[3] and by snapshot 2"); the examiner concludes.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from .text import TOOL, Value

SCHEMA_VERSION = 1  # of Report.to_dict(); raised when a reader of an older one would be misled

EVIDENCE_LIMIT = 100  # items listed per finding; the count says how many there were


class Severity(enum.IntEnum):
    """How much a finding matters; ordered, so that thresholds compare."""

    INFO = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4

    @property
    def label(self) -> str:
        """The word shown to people: ``Info``, ``Low``, ``Medium``, ``High`` or ``Critical``."""
        return self.name.capitalize()

    @classmethod
    def parse(cls, text: str) -> Severity:
        """Return the severity called ``text``, in any case; ValueError lists the names."""
        try:
            return cls[text.upper()]
        except KeyError:
            raise ValueError(f"unknown severity {text!r}, choose from {', '.join(s.label for s in cls)}") from None


class Evidence(NamedTuple):
    """One observed value and where it is.

    ``offset`` and ``length`` are bytes in ``file`` (empty: the image itself); ``guest_offset`` is
    bytes in the virtual disk; ``snapshot`` is a snapshot ID, empty for the active state.
    """

    field: str
    value: Value
    offset: int | None = None
    length: int | None = None
    structure: str = ""
    guest_offset: int | None = None
    snapshot: str = ""
    file: str = ""

    def to_dict(self) -> dict[str, Value]:
        """Return the item without its empty parts, for JSON."""
        shown: dict[str, Value] = {"field": self.field, "value": self.value}
        for name in ("offset", "length", "structure", "guest_offset", "snapshot", "file"):
            value = getattr(self, name)
            if value is not None and value != "":
                shown[name] = value
        return shown


@dataclass(frozen=True, slots=True)
class Finding:
    """One observation: a stable code, a severity, and the evidence for it.

    ``count`` is how many items there were, ``evidence`` those that are listed; ``explained_by`` lists
    codes that account for it.
    """

    code: str
    severity: Severity
    title: str
    note: str
    evidence: tuple[Evidence, ...] = ()
    count: int = 0
    confidence: str = "certain"
    explained_by: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "severity": self.severity.label,
            "title": self.title,
            "note": self.note,
            "confidence": self.confidence,
            "scope": "",  # of schema 1; never used
            "explained_by": list(self.explained_by),
            "count": self.count,
            "evidence": [item.to_dict() for item in self.evidence],
        }


T = TypeVar("T")


class BoundedSample(Generic[T]):
    """At most ``limit`` items out of any number, spread over the places they were found in.

    Every place keeps its first items. Where there are more places than room, every second of them is kept, then
    every fourth. Items of no place (``None``), which describe all of them, are dropped last.
    """

    def __init__(self, limit: int = EVIDENCE_LIMIT) -> None:
        self.count = 0
        self._limit = limit
        self._groups: dict[Hashable, list[tuple[int, T]]] = {}
        self._kept = 0
        self._most = limit  # items of the largest group when one was dropped last
        self._places = 0
        self._stride = 1
        self._skipped: Hashable = None

    @property
    def items(self) -> tuple[T, ...]:
        """What was kept, in the order in which it came."""
        chosen = sorted((pair for group in self._groups.values() for pair in group), key=lambda pair: pair[0])
        return tuple(item for _, item in chosen)

    def add(self, item: T, place: Hashable = None) -> None:
        """Take in one item."""
        self.count += 1
        group = self._groups.get(place)
        if group is None:
            if place is not None and self._skips(place):
                return
            group = self._groups[place] = []
        elif self._kept >= self._limit and len(group) + 1 >= self._most:
            return
        group.append((self.count, item))
        self._kept += 1
        if self._kept > self._limit:
            self._drop()

    def remove(self, item: T) -> None:
        """Remove an item, also from the count."""
        for group in self._groups.values():
            pair = next((pair for pair in group if pair[1] is item), None)
            if pair is not None:
                group.remove(pair)
                self.count -= 1
                self._kept -= 1
                return

    def _skips(self, place: Hashable) -> bool:
        if place == self._skipped:
            return True
        self._places += 1
        if (self._places - 1) % self._stride:
            self._skipped = place
            return True
        return False

    def _drop(self) -> None:
        places = [place for place in self._groups if place is not None]
        largest = max((self._groups[place] for place in places), key=len, default=[])
        self._most = max(len(largest), 1)
        if len(largest) < 2 and len(places) < 2:
            largest = self._groups[None]
        if len(largest) > 1:
            largest.pop()
            self._kept -= 1
            return
        for place in places[1::2]:
            del self._groups[place]
        self._stride *= 2
        self._kept = sum(map(len, self._groups.values()))


def place_of(item: Evidence, cluster_size: int) -> Hashable:
    """Return the structure an item was found in: its cluster, or None where it has no offset."""
    if item.offset is None:
        return None
    return item.file, item.structure, item.snapshot, item.offset // max(cluster_size, 1)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one audit saw. Plain data: it pickles, and it never holds an open file.

    ``image`` identifies what was audited (path, size, format facts), ``check`` carries the
    counters of ``qemu-img check --output=json`` where they were computed.
    """

    image: Mapping[str, Any]
    findings: tuple[Finding, ...] = ()
    check: Mapping[str, Any] | None = None
    depth: str = "triage"
    details: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    @property
    def worst(self) -> Severity | None:
        """The highest severity found, None when there is nothing."""
        return max((finding.severity for finding in self.findings), default=None)

    @property
    def by_severity(self) -> Iterator[tuple[Severity, list[Finding]]]:
        """Each severity that was found with its findings, worst first."""
        for severity in sorted(Severity, reverse=True):
            found = [finding for finding in self.findings if finding.severity is severity]
            if found:
                yield severity, found

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings at or above ``severity``, worst first."""
        return tuple(f for f in self.findings if f.severity >= severity)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data; docs/findings.md documents the schema."""
        return {
            "schema": SCHEMA_VERSION,
            "tool": TOOL,
            "depth": self.depth,
            "image": dict(self.image),
            "check": None if self.check is None else dict(self.check),
            "findings": [finding.to_dict() for finding in self.findings],
            "details": dict(self.details),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Return the report that :meth:`to_dict` gave as data, for instance a line of a fleet run."""
        findings = []
        for item in data["findings"]:
            kept = {name: item[name] for name in ("code", "title", "note", "confidence", "count")}
            findings.append(
                Finding(
                    **kept,
                    severity=Severity.parse(item["severity"]),
                    evidence=tuple(Evidence(**evidence) for evidence in item["evidence"]),
                    explained_by=tuple(item["explained_by"]),
                )
            )
        return cls(data["image"], tuple(findings), data["check"], data["depth"], data["details"])

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return :meth:`to_dict` as text; ASCII only, so it is safe on any terminal."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=True)
