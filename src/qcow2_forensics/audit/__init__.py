"""Facts in, findings out: what an examiner needs to know about an image, and where it is.

::

    report = audit("disk.qcow2")                  # tables and refcounts
    report = audit("disk.qcow2", depth="deep")    # free space and slack too

Nothing in the evidence makes it raise: an unreadable image is a report with a finding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

from ..errors import FormatError, NotQcow2, Qcow2Error, ReadError, reason
from ..findings import Evidence, Finding, Report, Severity
from ..format.image import Image
from ..format.source import PathOrSource, source_name
from ..limits import DEFAULT_LIMITS, FINDINGS_PER_RULE, Limits
from ..reader.opening import Passphrase
from ..reader.resolver import Resolver
from .facts import Facts
from .reference_names import files_followed
from .rules import RULES, Depth, Rule, apply, explain
from .subject import identity, path_of, unopened

UNREADABLE = "QCOW2-UNREADABLE"
INCOMPLETE = "QCOW2-AUDIT-INCOMPLETE"
LIMITED = "QCOW2-AUDIT-LIMITED"


# Rule modules in the order of the catalog. Those of triage import no numpy: start-up is most of its cost.
_MODULES = {
    "header": Depth.TRIAGE,
    "integrity": Depth.STANDARD,
    "lost_tables": Depth.STANDARD,
    "contradicted_geometry": Depth.STANDARD,
    "overlap": Depth.STANDARD,
    "residual": Depth.DEEP,
    "hidden": Depth.STANDARD,
    "slack": Depth.TRIAGE,
    "history": Depth.TRIAGE,
    "provenance": Depth.TRIAGE,
    "encryption": Depth.TRIAGE,
    "plaintext": Depth.STANDARD,
    "references": Depth.TRIAGE,
    "hostility": Depth.TRIAGE,
    "expansion": Depth.STANDARD,
    "account": Depth.STANDARD,
}


@cache
def catalog(depth: Depth = Depth.DEEP) -> dict[str, Rule]:
    """Return every rule up to a depth by its code, in the order of the catalog; each call returns the same dictionary."""
    for name, needed in _MODULES.items():  # importing a rule module registers its rules
        if needed <= depth:
            import_module(f"{__name__}.{name}")
    places = {name: place for place, name in enumerate(_MODULES)}
    ordered = sorted(RULES.values(), key=lambda rule: places.get(rule.section, len(places)))
    return {rule.code: rule for rule in ordered if rule.depth <= depth}


def audit(
    origin: PathOrSource | Image,
    depth: str | Depth = "standard",
    passphrase: Passphrase = None,  # noqa: ARG001 - a public name, and the third by place
    resolver: Resolver | None = None,
    limits: Limits = DEFAULT_LIMITS,
    *,
    pictures: bool = False,
) -> Report:
    """Return everything one audit saw of an image; never raises for bad evidence.

    ``depth`` is ``"triage"`` (header, extensions, snapshots, names), ``"standard"`` (all tables)
    or ``"deep"`` (free space, slack, every cluster decoded). ``resolver`` says which files named
    by the image may be looked at. ``passphrase`` is accepted and not used: no rule decrypts. ``pictures`` adds
    the map of the host file and the tree of states to ``Report.details``, for the page.
    """
    wanted = Depth.parse(depth)
    rules = catalog(wanted)
    path = path_of(origin)
    name = str(path) if path is not None else origin.name if isinstance(origin, Image) else source_name(origin)
    try:
        image = origin if isinstance(origin, Image) else Image(origin, limits=limits)
    except (Qcow2Error, OSError) as error:
        return Report(unopened(name, path), (_unreadable(error, path),), depth=wanted.label)
    try:
        facts = Facts(image, path=path, depth=wanted, resolver=resolver, limits=limits)
        findings = explain(_findings(rules, facts))
        counted = wanted >= Depth.STANDARD and facts.has_census and facts.census_error is None
        check = facts.census.check if counted else None
        details = _pictures(facts) if pictures and wanted >= Depth.STANDARD else {}
        if counted and wanted < Depth.DEEP:
            details |= _unexamined(facts)
        if wanted >= Depth.STANDARD:
            details["account"] = _account(facts)
        followed = files_followed(facts)
        if followed:
            details["files"] = followed
        if check is not None:  # then the header and its extensions can be read
            refused = next((problem.message for problem in image.problems if problem.stops_qemu), None)
            if refused is not None:
                details["not_opened_by_qemu"] = refused
        return Report(identity(facts, name), findings, check, wanted.label, details)
    finally:
        if not isinstance(origin, Image):
            image.close()


def audit_path(path: str | os.PathLike[str], depth: str = "standard") -> Report:
    """Audit one file by name: a plain function of plain values, for worker pools."""
    return audit(path, depth)


def _unexamined(facts: Facts) -> dict[str, Any]:
    """Return how much of the file only a deep audit reads, empty where that is nothing."""
    unclaimed = facts.census.unclaimed_bytes
    return {"unexamined_bytes": unclaimed} if unclaimed else {}


def _pictures(facts: Facts) -> dict[str, Any]:
    from .figures import details

    try:
        return details(facts)
    except (Qcow2Error, OSError) as error:
        return {"pictures": f"could not be drawn: {reason(error)}"}


def _account(facts: Facts) -> dict[str, Any]:
    from .account import details

    return details(facts)


def _findings(rules: dict[str, Rule], facts: Facts) -> Iterator[Finding]:
    failures: list[Evidence] = []
    chosen = [entry for entry in rules.values() if entry.depth <= facts.depth and _sound(entry, facts)]
    walked = [entry for entry in chosen if entry.needs in ("census", "tables")] if facts.has_census else []
    if walked and facts.census_error is not None:
        failures.append(_failure("every rule that needs a census", facts.census_error))
        chosen = [entry for entry in chosen if entry not in walked]
    for entry in chosen:
        outcome = apply(entry, facts)
        yield from outcome.findings
        if outcome.dropped:
            facts.leave_out(f"findings {entry.code}, above {FINDINGS_PER_RULE}", outcome.dropped)
        if outcome.failure is not None:
            failures.append(_failure(entry.code, outcome.failure))
    if failures:
        yield Finding(
            INCOMPLETE,
            Severity.MEDIUM,
            "some rules could not finish",
            "what these rules would have reported is not known: consistent with damaged metadata or unreadable media",
            tuple(failures),
            len(failures),
        )
    left_out = tuple(facts.left_out)
    if left_out:
        yield Finding(
            LIMITED,
            Severity.MEDIUM,
            "some of what was found is not in this report",
            "the image holds more than the audit lists or follows: consistent with a very long history, or with decoys",
            left_out,
            len(left_out),
        )


def _sound(entry: Rule, facts: Facts) -> bool:
    if entry.needs in ("geometry", "tables"):
        return facts.image.has_geometry
    return entry.needs == "header" or facts.has_census


def _failure(code: str, error: Qcow2Error | OSError) -> Evidence:
    offset = error.offset if isinstance(error, (FormatError, ReadError)) else None
    words = reason(error)
    if not isinstance(error, Qcow2Error) and error.filename and error.strerror:
        words = f"{error.filename}: {error.strerror}"  # without Python's "[Errno 2]"
    return Evidence(code, words, offset)


def _unreadable(error: Qcow2Error | OSError, path: str | os.PathLike[str] | None) -> Finding:
    what = "the file is not a QCOW image" if isinstance(error, NotQcow2) else "the file could not be read"
    note = "nothing in it was examined"
    evidence = [_failure("error", error)]
    if isinstance(error, NotQcow2) and path is not None:
        from ..reader.raw_data import to_open_instead

        instead = to_open_instead(os.fspath(path))
        evidence += [Evidence("data file", instead)] if instead else []
    return Finding(UNREADABLE, Severity.HIGH, what, note, tuple(evidence), len(evidence))
