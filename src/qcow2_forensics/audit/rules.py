"""The registry of rules: one short pure function per finding code.

A rule takes :class:`~qcow2_forensics.audit.facts.Facts` and yields what it saw::

    @rule("QCOW2-DIRTY", Severity.LOW, "image was not closed cleanly",
          note="consistent with a writer that did not close the image, or a copy made while in use",
          when="incompatible feature bit 0 is set", validated=QEMU_MADE)
    def dirty(facts: Facts) -> Iterator[Evidence]:
        if facts.header.incompatible_features & Incompatible.DIRTY:
            yield facts.field("incompatible_features")

Everything a rule yields as :class:`Evidence` becomes one finding of the rule's severity; a rule
that grades by case yields :class:`Finding` made with :func:`variant`. Where a crafted table can make
evidence come by the ten thousand a rule yields functions that make it: few of them are called.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from ..errors import Qcow2Error
from ..findings import EVIDENCE_LIMIT, Evidence, Finding, Severity, capped

if TYPE_CHECKING:
    from .facts import Facts


class Depth(enum.IntEnum):
    """How much of the image an audit reads."""

    TRIAGE = 0  # header, extensions, snapshot table, names: milliseconds
    STANDARD = 1  # every table and refcount
    DEEP = 2  # free space and slack too, and every cluster decoded

    @property
    def label(self) -> str:
        """The word used on the command line and in reports."""
        return self.name.lower()

    @classmethod
    def parse(cls, text: str | Depth) -> Depth:
        """Return the depth called ``text``; ValueError lists the names."""
        if isinstance(text, Depth):
            return text
        try:
            return cls[text.upper()]
        except KeyError:
            raise ValueError(f"unknown depth {text!r}, choose from {', '.join(d.label for d in cls)}") from None


# How a rule was shown to be right.
QEMU_MADE: Final = "QEMU-made"  # on an image whose state QEMU itself produced
CRAFTED: Final = "crafted"  # on an image edited byte by byte
DERIVED: Final = "derived"  # from the format's text alone

Validated = Literal["QEMU-made", "crafted", "derived"]

# What a rule needs to be sound before it runs.
Needs = Literal["header", "geometry", "census"]

Observation = Evidence | Callable[[], Evidence] | Finding
RuleFunction = Callable[["Facts"], Iterable[Observation]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One catalog entry and the function behind it.

    ``when`` says in one sentence what makes it fire, ``harmless`` what innocent cause is known;
    ``explained_by`` lists codes that, when they are in the report too, account for this one.
    """

    code: str
    severity: Severity
    title: str
    note: str
    depth: Depth
    needs: Needs
    validated: Validated
    when: str
    harmless: str
    explained_by: tuple[str, ...]
    section: str
    function: RuleFunction


RULES: dict[str, Rule] = {}


def rule(
    code: str,
    severity: Severity,
    title: str,
    *,
    note: str,
    when: str = "",
    harmless: str = "",
    depth: Depth = Depth.TRIAGE,
    needs: Needs | None = None,
    validated: Validated = CRAFTED,
    explained_by: tuple[str, ...] = (),
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function as the rule of one code.

    ``needs``: ``"header"`` runs on anything with the magic, ``"geometry"`` (the default of triage
    rules) wants a known version and cluster size, ``"census"`` (the default of deeper rules) wants
    version 2 or 3 and tables that can be walked.
    """
    wanted: Needs = needs or ("geometry" if depth is Depth.TRIAGE else "census")

    def register(function: RuleFunction) -> RuleFunction:
        if code in RULES:
            raise ValueError(f"two rules for {code}")
        section = function.__module__.rpartition(".")[2]
        RULES[code] = Rule(
            code, severity, title, note, depth, wanted, validated, when, harmless, explained_by, section, function
        )
        return function

    return register


def variant(
    code: str,
    evidence: Iterable[Evidence],
    *,
    severity: Severity | None = None,
    note: str = "",
    title: str = "",
    confidence: str = "certain",
    scope: str = "",
    count: int | None = None,
) -> Finding:
    """Return a finding of a registered code that differs from its catalog entry in some part.

    ``count`` is for rules that capped their evidence themselves.
    """
    entry = RULES[code]
    kept, seen = capped(evidence)
    return Finding(
        code=code,
        severity=entry.severity if severity is None else severity,
        title=title or entry.title,
        note=note or entry.note,
        evidence=kept,
        count=seen if count is None else count,
        scope=scope,
        confidence=confidence,
    )


FINDINGS_PER_RULE = 1000  # a snapshot table may hold 65,536 entries


def apply(entry: Rule, facts: Facts) -> tuple[list[Finding], Qcow2Error | OSError | None]:
    """Run one rule: its findings, evidence capped, and the error that stopped it, if one did."""
    findings: list[Finding] = []
    kept: list[Evidence] = []
    count = 0
    failure: Qcow2Error | OSError | None = None
    try:
        for item in entry.function(facts):
            if isinstance(item, Finding):
                if len(findings) < FINDINGS_PER_RULE:
                    findings.append(item)
                continue
            count += 1
            if count <= EVIDENCE_LIMIT:
                kept.append(item if isinstance(item, Evidence) else item())
    except (Qcow2Error, OSError) as error:
        failure = error.with_traceback(None)  # what was seen before it still counts; its frames hold arrays
    if kept:
        findings.append(variant(entry.code, kept, count=count))
    return findings, failure


def explain(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings with ``explained_by`` filled in, worst first, in their order otherwise."""
    collected = list(findings)
    present = {finding.code for finding in collected}
    linked = []
    for finding in collected:
        entry = RULES.get(finding.code)
        causes = entry.explained_by if entry else ()
        found = [code for code in causes if code in present and code != finding.code]
        told = tuple(dict.fromkeys((*finding.explained_by, *found)))
        linked.append(dataclasses.replace(finding, explained_by=told))
    linked.sort(key=lambda finding: -finding.severity)
    return tuple(linked)
