"""The registry of rules: one short pure function per finding code.

A chapter of the catalog is a module; its rules take :class:`~qcow2_forensics.audit.facts.Facts` and
yield what they saw::

    rule = Chapter(__name__, "Header, extensions and the tables they name")

    @rule("QCOW2-DIRTY", Severity.LOW, "image was not closed cleanly",
          note="consistent with a writer that did not close the image, or a copy made while in use",
          when="incompatible feature bit 0 is set", validated=QEMU_MADE)
    def dirty(facts: Facts) -> Iterator[Evidence]:
        if facts.header.incompatible_features & Incompatible.DIRTY:
            yield facts.field("incompatible_features")

Everything a rule yields as :class:`Evidence` becomes one finding of the rule's code and severity. A rule
whose severity or title depends on the case yields a :class:`OneFinding` for each. A rule never names its own code.
Where a crafted table can make evidence come by the ten thousand, a rule yields :class:`Deferred`
evidence: only what is kept is made.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from ..errors import Qcow2Error
from ..findings import EVIDENCE_LIMIT, BoundedSample, Evidence, Finding, Severity, place_of
from ..limits import FINDINGS_PER_RULE

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
Needs = Literal["header", "geometry", "tables", "census"]


class Deferred(NamedTuple):
    """Evidence that is made only if it is kept; ``place`` is the structure it was found in.

    ``stands_for`` counts the items of which only this one is given.
    """

    make: Callable[[], Evidence]
    place: int | str | None = None
    stands_for: int = 1


@dataclass(frozen=True, slots=True)
class OneFinding:
    """Evidence for a finding of its own; what is not given is as in the rule's entry.

    ``count`` is for rules that saw more than they list.
    """

    evidence: Iterable[Evidence]
    _: KW_ONLY
    severity: Severity | None = None
    title: str = ""
    note: str = ""
    confidence: str = "certain"
    count: int | None = None


Observation = Evidence | Deferred | OneFinding
RuleFunction = Callable[["Facts"], Iterable[Observation]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One catalog entry and its function.

    ``when`` says in one sentence what triggers it, ``harmless`` which innocent cause is known;
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
CHAPTERS: dict[str, str] = {}  # titles by section


class Chapter:
    """One chapter of the catalog; calling it registers a rule."""

    def __init__(self, module: str, title: str, *, depth: Depth = Depth.TRIAGE) -> None:
        self.section = module.rpartition(".")[2]
        self.depth = depth  # of its rules, where they have none of their own
        CHAPTERS[self.section] = title

    def __call__(
        self,
        code: str,
        severity: Severity,
        title: str,
        *,
        note: str,
        when: str = "",
        harmless: str = "",
        depth: Depth | None = None,
        needs: Needs | None = None,
        validated: Validated = CRAFTED,
        explained_by: tuple[str, ...] = (),
    ) -> Callable[[RuleFunction], RuleFunction]:
        """Register a function as the rule of one code.

        ``needs``: ``"header"`` runs on anything with the magic, ``"geometry"`` (the default of triage
        rules) wants a known version and cluster size, ``"census"`` (the default of deeper rules) wants
        version 2 or 3 and tables that can be walked, ``"tables"`` the same or version 1.
        """
        depth = self.depth if depth is None else depth
        wanted: Needs = needs or ("geometry" if depth is Depth.TRIAGE else "census")

        def register(function: RuleFunction) -> RuleFunction:
            if code in RULES:
                raise ValueError(f"two rules for {code}")
            RULES[code] = Rule(
                code,
                severity,
                title,
                note,
                depth,
                wanted,
                validated,
                when,
                harmless,
                explained_by,
                self.section,
                function,
            )
            return function

        return register


def of_fields(condition: Callable[[Facts], object], *names: str) -> RuleFunction:
    """Return a rule that shows header fields where a condition on the image holds."""

    def function(facts: Facts) -> Iterable[Evidence]:
        return [facts.field(name) for name in names] if condition(facts) else []

    return function


class Outcome(NamedTuple):
    """What one rule gave: findings, how many more there were, and the error that stopped it."""

    findings: list[Finding]
    dropped: int
    failure: Qcow2Error | OSError | None


_NOTHING = Outcome([], 0, None)  # what most rules give


def apply(entry: Rule, facts: Facts) -> Outcome:
    """Run one rule; of too many findings the worst are kept, of evidence a selection spread over structures."""
    findings: defaultdict[Severity, list[Finding]] = defaultdict(list)
    kept: BoundedSample[Evidence | Deferred] = BoundedSample()
    failure: Qcow2Error | OSError | None = None
    total = 0
    try:
        for item in entry.function(facts):
            if isinstance(item, OneFinding):
                total += 1
                severity = entry.severity if item.severity is None else item.severity
                if len(findings[severity]) < FINDINGS_PER_RULE:
                    findings[severity].append(_finding(entry, item, facts.cluster_size))
            else:
                place = place_of(item, facts.cluster_size) if isinstance(item, Evidence) else item.place
                kept.add(item, place)
                kept.count += item.stands_for - 1 if isinstance(item, Deferred) else 0
    except (Qcow2Error, OSError) as error:
        failure = error.with_traceback(None)  # what was seen before it still counts; its frames hold arrays
    if not findings and not kept.count and failure is None:
        return _NOTHING
    worst_first = sorted(findings, reverse=True)
    listed = [finding for severity in worst_first for finding in findings[severity]][:FINDINGS_PER_RULE]
    if kept.count:
        try:
            evidence = [item if isinstance(item, Evidence) else item.make() for item in kept.items]
        except (Qcow2Error, OSError) as error:
            failure, evidence = error.with_traceback(None), [item for item in kept.items if isinstance(item, Evidence)]
        listed.append(_finding(entry, OneFinding(evidence, count=kept.count), facts.cluster_size))
    return Outcome(listed, total - min(total, FINDINGS_PER_RULE), failure)


def _finding(entry: Rule, item: OneFinding, cluster_size: int) -> Finding:
    rest = iter(item.evidence)
    evidence = tuple(islice(rest, EVIDENCE_LIMIT + 1))
    count = len(evidence)
    if count > EVIDENCE_LIMIT:
        kept: BoundedSample[Evidence] = BoundedSample()
        for one in chain(evidence, rest):
            kept.add(one, place_of(one, cluster_size))
        evidence, count = kept.items, kept.count
    return Finding(
        code=entry.code,
        severity=entry.severity if item.severity is None else item.severity,
        title=item.title or entry.title,
        note=item.note or entry.note,
        evidence=evidence,
        count=count if item.count is None else item.count,
        confidence=item.confidence,
    )


def explain(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings with ``explained_by`` filled in, worst first; of equals, those that others explain come last."""
    collected = list(findings)
    present = {finding.code for finding in collected}
    linked = []
    for finding in collected:
        entry = RULES.get(finding.code)
        causes = entry.explained_by if entry else ()
        found = tuple(dict.fromkeys(code for code in causes if code in present))
        linked.append(dataclasses.replace(finding, explained_by=found) if found else finding)
    linked.sort(key=lambda finding: (-finding.severity, bool(finding.explained_by)))
    return tuple(linked)
