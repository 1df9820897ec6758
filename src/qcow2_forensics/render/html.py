"""A report as one self-contained HTML page: no scripts, no requests, prints well, light and dark."""

from __future__ import annotations

from collections.abc import Iterator

from ..findings import TOOL, Evidence, Finding, Report, Severity
from ..text import hexadecimal, html_only, markup, sentence, shown_value
from .allocation_map import draw_map
from .plain import summary
from .state_tree import draw_tree
from .stylesheet import CSS
from .summary import check_line, heading

_FOOTER = (
    f"Made by {TOOL}. Offsets are bytes from the start of the file, in hexadecimal; guest offsets are "
    "bytes from the start of the guest's disk. Times are UTC; those of snapshots are by the clock of the host that took them."
)
ITEMS = 20  # evidence items printed per finding; the JSON has them all


def render_html(report: Report, *, items: int = ITEMS) -> str:
    """Return the page. Everything from evidence is escaped; the page allows itself no scripts."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{_title(report)}</title>",
            f"<style>{CSS}</style></head><body>",
            *_head(report),
            *_figures(report),
            *_findings(report, items),
            f"<footer class='quiet'>{_FOOTER}</footer>",
            "</body></html>",
            "",
        ]
    )


def _title(report: Report) -> str:
    path = str(report.image.get("path") or "")
    return markup(report.image.get("name") or path.rpartition("/")[2] or path or "image", 200)


def _head(report: Report) -> Iterator[str]:
    worst = report.worst
    yield f"<h1>{_title(report)}</h1>"
    yield f"<p>{markup(heading(report))}</p>"
    checked = check_line(report)
    if checked:
        yield f"<p>Check: {html_only(checked)}</p>"
    badge = "none" if worst is None else worst.label.lower()
    yield f'<p><span class="badge s-{badge}">{markup(summary(report))}</span>'
    yield f" <span class='quiet'>depth {markup(report.depth)}</span></p>"
    yield "<table class='facts'>"
    for key, value in report.image.items():
        if isinstance(value, (str, int, float, bool)) and value != "":
            shown = shown_value(key, value) if isinstance(value, int) else markup(value)
            yield f"<tr><th>{markup(key.replace('_', ' '))}</th><td>{shown}</td></tr>"
    yield "</table>"


def _figures(report: Report) -> Iterator[str]:
    picture = report.details.get("map")
    if picture and picture.get("cells"):
        yield f"<section><h2>The file</h2>{draw_map(picture)}</section>"
    lineage = report.details.get("lineage")
    if lineage and len(lineage.get("states", ())) > 1:
        yield f"<section><h2>States of the disk</h2>{draw_tree(lineage)}"
        yield (
            "<p class='quiet'>In order of time. The format stores no parents: a line joins each state "
            "to the one it shares most clusters with.</p></section>"
        )


def _findings(report: Report, items: int) -> Iterator[str]:
    yield "<h2>Findings</h2>"
    if not report.findings:
        yield "<p>No findings.</p>"
    for severity in sorted(Severity, reverse=True):
        group = [finding for finding in report.findings if finding.severity is severity]
        if group:
            yield f'<h3><span class="badge s-{severity.label.lower()}">{severity.label}</span></h3>'
            for finding in group:
                yield from _finding(finding, items)


def _finding(finding: Finding, items: int) -> Iterator[str]:
    yield f'<article class="s-{finding.severity.label.lower()}">'
    yield f"<h4>{sentence(markup(finding.title))} <code>{markup(finding.code)}</code></h4>"
    if finding.note:
        yield f"<p>{markup(finding.note)}</p>"
    if finding.explained_by:
        yield f"<p class='quiet'>Explained by {markup(', '.join(finding.explained_by))}</p>"
    if finding.confidence != "certain":
        yield f"<p class='quiet'>Confidence: {markup(finding.confidence)}</p>"
    if finding.evidence:
        yield from _evidence(finding.evidence[:items])
        more = max(finding.count, len(finding.evidence)) - min(items, len(finding.evidence))
        if more > 0:
            yield f"<p class='quiet'>and {more} more</p>"
    yield "</article>"


_EVIDENCE_COLUMNS = ("field", "value", "offset", "length", "structure", "guest", "snapshot", "file")


def _evidence(items: tuple[Evidence, ...]) -> Iterator[str]:
    rows = [_cells(item) for item in items]
    used = [index for index in range(len(_EVIDENCE_COLUMNS)) if any(row[index] for row in rows)]
    yield "<div class='scroll'><table><thead><tr>"
    yield "".join(f"<th>{_EVIDENCE_COLUMNS[index]}</th>" for index in used) + "</tr></thead><tbody>"
    for row in rows:
        yield "<tr>" + "".join(f"<td{_class(index)}>{row[index]}</td>" for index in used) + "</tr>"
    yield "</tbody></table></div>"


def _class(index: int) -> str:
    return "" if _EVIDENCE_COLUMNS[index] in ("value", "structure", "file") else ' class="n"'


def _cells(item: Evidence) -> tuple[str, ...]:
    return (
        markup(item.field),
        # Already escaped for a terminal by shown_value; a second pass would double its backslashes.
        html_only(shown_value(item.field, item.value)),
        hexadecimal(item.offset),
        "" if item.length is None else str(item.length),
        markup(item.structure) if item.structure else "",
        hexadecimal(item.guest_offset),
        markup(item.snapshot) if item.snapshot else "",
        markup(item.file) if item.file else "",
    )
