"""What an audit of an image finds, as sentences for plaso's warnings, and how many of each severity, for the end of a run.

The source's images are audited before the extraction. Images inside them are audited by the workers, whose warnings the
main process finds in the storage file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qcow2_forensics import Severity, reason
from qcow2_forensics.text import plural, printable

from .inspection import audit

if TYPE_CHECKING:
    from qcow2_forensics import Evidence, Finding

PARSER = "qcow2"  # what such a warning has for its parser
_MOST = 1000  # warnings per image: a crafted image could fill the storage file
_ITEMS = 3  # of a finding's evidence, in its warning
_SEVERITIES = {severity.label: severity for severity in Severity}


def audit_sentences(path_spec: Any) -> tuple[list[str], Sequence[Finding] | None]:
    """Return what an audit finds at ``Low`` or above as sentences, and as findings; None where it failed."""
    try:
        found = audit(path_spec).at_least(Severity.LOW)
        sentences = [describe(finding) for finding in found]
    except Exception as error:  # noqa: BLE001 - shown; an audit must not stop the extraction
        why = printable(reason(error), 500)
        return [f"the image could not be audited: {type(error).__name__}: {why}"], None
    more = [plural(len(sentences) - _MOST, "more finding")] if len(sentences) > _MOST else []
    return [*sentences[:_MOST], *more], found


def describe(finding: Finding) -> str:
    """Return a finding as one line, with the first items of its evidence."""
    items = "; ".join(_item(item) for item in finding.evidence[:_ITEMS])
    if items and finding.count > _ITEMS:
        items += f"; and {finding.count - _ITEMS} more"
    words = printable(f"{finding.title}, {finding.note}", 2000)
    text = f"{finding.severity.label} {finding.code}: {words}"
    return f"{text} ({items})" if items else text


def _item(item: Evidence) -> str:
    where = "" if item.offset is None else f" at {item.offset:#x}"
    return f"{printable(item.field)}: {printable(str(item.value), 200)}{where}"


def severities_of(warnings: Iterable[Any]) -> Iterator[tuple[Any, Counter[Severity]]]:
    """Yield the path specification of each image that workers audited, and how many findings of each severity it has.

    ``warnings`` are extraction warnings, of which those with another parser are passed over.
    """
    counts: dict[str, tuple[Any, Counter[Severity]]] = {}
    for warning in warnings:
        label, _, rest = (warning.message or "").partition(" ")
        if warning.parser_chain == PARSER and label in _SEVERITIES and rest.startswith("QCOW2-"):
            known = counts.setdefault(warning.path_spec.comparable, (warning.path_spec, Counter()))
            known[1][_SEVERITIES[label]] += 1
    yield from counts.values()
