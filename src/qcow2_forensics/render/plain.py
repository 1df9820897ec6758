"""A report for people: grouped by severity, as wide as the terminal, one screen when all is well."""

from __future__ import annotations

from collections.abc import Iterator

from ..findings import Evidence, Finding, Report, Severity
from ..text import hexadecimal, plural, sentence, shown_value, size, text, wrap
from .account import lines as account_lines
from .image_facts import check_line, heading, name

ITEMS = 5  # evidence items shown per finding; -v shows all that were kept
_COLOURS = {
    Severity.CRITICAL: "\x1b[1;37;41m",
    Severity.HIGH: "\x1b[1;31m",
    Severity.MEDIUM: "\x1b[33m",
    Severity.LOW: "\x1b[36m",
    Severity.INFO: "\x1b[2m",
}
_PLAIN = "\x1b[0m"


def render_text(report: Report, *, width: int = 100, colour: bool = False, items: int = ITEMS) -> str:
    """Return the report as text; nothing from evidence can reach the terminal unescaped.

    ``items`` is how many evidence items each finding shows; Info findings are one line each
    unless ``items`` is above the default.
    """
    lines = [*wrap(name(report), width), *wrap(heading(report), width, "  ")]
    checked = check_line(report)
    if checked:
        lines += wrap(f"check: {checked}", width, "  ")
    lines += [f"  {summary(report)} (depth {text(report.depth, 20)})"]
    for severity, found in report.by_severity:
        lines += ["", _paint(severity.label.upper(), severity, colour)]
        previous = ""
        for finding in found:
            lines += _finding(finding, width, items, colour, note=finding.note != previous)
            previous = finding.note
    account = report.details.get("account")
    if account:
        lines += ["", *account_lines(account, width)]
    if items <= ITEMS and any(_unseen(finding, items) for finding in report.findings):
        lines += ["", "-v shows more of the evidence, --format json all that was kept."]
    unexamined = report.details.get("unexamined_bytes")
    if isinstance(unexamined, int):
        words = f"Not read: {size(unexamined)} that nothing refers to, where deleted snapshots and old data may be. --depth deep reads it."
        lines += ["", *wrap(words, width)]
    return "\n".join(lines) + "\n"


def summary(report: Report) -> str:
    """Return how many findings there are of each severity, worst first."""
    counts = [f"{len(found)} {severity.label}" for severity, found in report.by_severity]
    return ", ".join(counts) or "no findings"


def _paint(shown: str, severity: Severity, colour: bool) -> str:
    return f"{_COLOURS[severity]}{shown}{_PLAIN}" if colour else shown


def _finding(finding: Finding, width: int, items: int, colour: bool, *, note: bool) -> Iterator[str]:
    first, *rest = wrap(f"{finding.code}  {sentence(text(finding.title))}", width - 2, "  ")
    if colour:
        first = first.replace(finding.code, _paint(finding.code, finding.severity, True), 1)
    yield first
    yield from (f"  {line}" for line in rest)
    if finding.severity is Severity.INFO and items <= ITEMS:
        return
    if finding.note and note:
        yield from wrap(text(finding.note), width, "      ")
    if finding.explained_by:
        yield from wrap(f"explained by {', '.join(map(text, finding.explained_by))}", width, "      ")
    if finding.confidence != "certain":
        yield f"      confidence: {text(finding.confidence, 40)}"
    for item in finding.evidence[:items]:
        yield from wrap(evidence_line(item), width, "        ")
    unseen = _unseen(finding, items)
    if unseen:
        yield f"        and {unseen} more"


def _unseen(finding: Finding, items: int) -> int:
    return max(finding.count, len(finding.evidence)) - min(items, len(finding.evidence))


def evidence_line(item: Evidence) -> str:
    """Return one evidence item: ``field = value  (at 0x123, 8 bytes, structure, guest 0x0)``."""
    places = []
    if item.offset is not None:
        places.append(f"at {hexadecimal(item.offset)}")
    if item.length:
        places.append(plural(item.length, "byte"))
    if item.structure:
        places.append(text(item.structure, 100))
    if item.guest_offset is not None:
        places.append(f"guest {hexadecimal(item.guest_offset)}")
    if item.snapshot:
        places.append(f"snapshot {text(item.snapshot, 100)}")
    if item.file:
        places.append(text(item.file, 300))
    words = text(item.field, 200)
    if item.value is not None:
        words += f" = {shown_value(item.field, item.value)}"
    return f"{words}  ({', '.join(places)})" if places else words
