"""A report as one self-contained HTML page: no scripts, no requests, prints well, light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from ..findings import BoundedSample, Evidence, Finding, Report, Severity, place_of
from ..text import hexadecimal, html_only, markup, sentence, shown_value
from .account import section as account_section
from .allocation_map import draw_map
from .anchors import Anchors
from .image_facts import check_line, heading
from .next_commands import next_command
from .page import Row, badge, fact_table, page, run_facts, severity_class, table
from .plain import summary
from .state_tree import draw_tree

_ITEMS = 20  # evidence items printed per finding; the JSON has them all
_FOLDED = 8  # findings of one code in a row that are still shown one by one
_LONG_TREE = 40  # states
_COLUMNS = 10  # of a table of folded findings


def render_html(report: Report) -> str:
    """Return the page. Everything from evidence is escaped; the page allows itself no scripts."""
    anchors = Anchors(report)
    parts = [*_head(report), *_figures(report, anchors), *_findings(report, anchors)]
    return page(_title(report), parts, (finding.severity for finding in report.findings))


def _title(report: Report) -> str:
    path = str(report.image.get("path") or "")
    return markup(path.rpartition("/")[2] or path or "image", 200)


def _head(report: Report) -> Iterator[str]:
    yield f"<h1>{_title(report)}</h1>"
    yield f"<p>{markup(heading(report))}</p>"
    checked = check_line(report)
    if checked:
        yield f"<p>Check: {html_only(checked)}</p>"
    yield f"<p>{badge(report.worst, markup(summary(report)))} <span class='quiet'>depth {markup(report.depth)}</span></p>"
    run = report.details.get("run")
    if run:
        yield from run_facts(run)
    rows = []
    for key, value in report.image.items():
        if isinstance(value, (str, int, float, bool)) and value != "":
            shown = shown_value(key, value) if isinstance(value, int) else markup(value)
            rows.append((markup(key.replace("_", " ")), shown))
    unread = [str(name).replace("_", " ") for name in report.image.get("unreadable") or ()]
    if unread:
        rows.append(("unknown", f"{markup(', '.join(unread))}: cannot be read"))
    yield from fact_table(rows)


def _figures(report: Report, anchors: Anchors) -> Iterator[str]:
    picture = report.details.get("map")
    if picture and picture.get("cells"):
        yield f"<section><h2>The file</h2>{draw_map(picture, anchors.squares)}</section>"
    yield from account_section(report.details.get("account") or {})
    lineage = report.details.get("lineage") or {}
    states = lineage.get("states", ())
    if len(states) > 1:
        open_ = "" if len(states) > _LONG_TREE else " open"
        count = len(states) + lineage.get("left_out", 0)
        yield f"<section><h2>States of the disk</h2><details{open_}><summary>{count} states</summary>"
        yield f"<div class='wide'>{draw_tree(lineage, anchors.states)}</div></details>"
        yield (
            "<p class='quiet'>In order of time. The format stores no parents: a line joins each state "
            "to the one it shares most clusters with.</p></section>"
        )


def _findings(report: Report, anchors: Anchors) -> Iterator[str]:
    yield "<h2>Findings</h2>"
    if not report.findings:
        yield "<p>No findings.</p>"
    for severity, found in report.by_severity:
        yield f'<section class="{severity_class(severity)}"><h3>{badge(severity)}</h3>'
        for _, same in groupby(found, key=lambda finding: (finding.code, finding.title)):
            alike = list(same)
            if len(alike) > _FOLDED:
                yield from _folded(alike, report, anchors)
            else:
                for finding in alike:
                    yield from _finding(finding, report, anchors)
        yield "</section>"


def _summary(finding: Finding, number: int = 1) -> str:
    times = f" <span class='quiet'>{number} findings</span>" if number > 1 else ""
    return f"<summary>{sentence(markup(finding.title))} <code>{markup(finding.code)}</code>{times}</summary>"


def _finding(finding: Finding, report: Report, anchors: Anchors) -> Iterator[str]:
    open_ = "" if finding.severity is Severity.INFO else " open"
    yield f'<article class="{severity_class(finding.severity)}" id="{anchors.finding(finding)}"><details{open_}>'
    yield _summary(finding)
    yield from _words(finding, report)
    if finding.evidence:
        size = report.image.get("cluster_size")
        shown: BoundedSample[Evidence] = BoundedSample(_ITEMS)
        for item in finding.evidence:
            shown.add(item, place_of(item, size if isinstance(size, int) else 65536))
        yield from _evidence(shown.items, anchors)
        more = max(finding.count, len(finding.evidence)) - len(shown.items)
        if more > 0:
            yield f"<p class='quiet'>and {more} more</p>"
    yield "</details></article>"


def _words(finding: Finding, report: Report) -> Iterator[str]:
    if finding.note:
        yield f"<p>{markup(finding.note)}</p>"
    if finding.explained_by:
        yield f"<p class='quiet'>Explained by {markup(', '.join(finding.explained_by))}</p>"
    if finding.confidence != "certain":
        yield f"<p class='quiet'>Confidence: {markup(finding.confidence)}</p>"
    command = next_command(finding, str(report.image.get("path") or "IMAGE"), report.depth)
    if command:
        yield f"<p class='next'>Next: <kbd>{html_only(command)}</kbd></p>"


def _folded(findings: Sequence[Finding], report: Report, anchors: Anchors) -> Iterator[str]:
    """Yield many findings of one code as a table with a row each."""
    first = findings[0]
    yield f'<article class="{severity_class(first.severity)}"><details>{_summary(first, len(findings))}'
    yield from _words(first, report)
    fields = list(dict.fromkeys(item.field for finding in findings for item in finding.evidence))[:_COLUMNS]
    rows = (_row(finding, fields, anchors) for finding in findings)
    yield from table([markup(field) for field in fields], rows)
    yield "</details></article>"


def _row(finding: Finding, fields: Sequence[str], anchors: Anchors) -> Row:
    """Return a finding as the first value of each field; what names a state leads to it, else to its place in the file."""
    values = {item.field: item for item in reversed(finding.evidence)}
    cells = []
    for field in fields:
        item = values.get(field)
        if item is None:
            cells.append("")
            continue
        anchor = anchors.state(item) if field in ("id", "name") else ""
        cells.append(_link(anchor or anchors.square(item), html_only(shown_value(field, item.value))))
    return Row(cells, anchor=anchors.finding(finding))


_EVIDENCE_COLUMNS = ("field", "value", "offset", "length", "structure", "guest", "snapshot", "file")
_NARROW = ("field", "offset", "length", "guest", "snapshot")


def _evidence(items: Sequence[Evidence], anchors: Anchors) -> Iterator[str]:
    rows = [_cells(item, anchors) for item in items]
    used = [index for index in range(len(_EVIDENCE_COLUMNS)) if any(row[index] for row in rows)]
    columns = [_EVIDENCE_COLUMNS[index] for index in used]
    yield from table(columns, (Row([row[index] for index in used]) for row in rows), narrow=_NARROW)


def _link(anchor: str, shown: str) -> str:
    return f'<a href="#{anchor}">{shown}</a>' if anchor and shown else shown


def _cells(item: Evidence, anchors: Anchors) -> tuple[str, ...]:
    return (
        markup(item.field),
        html_only(shown_value(item.field, item.value)),  # escaped for a terminal by shown_value already
        _link(anchors.square(item), hexadecimal(item.offset)),
        "" if item.length is None else str(item.length),
        markup(item.structure) if item.structure else "",
        hexadecimal(item.guest_offset),
        _link(anchors.state(item), markup(item.snapshot)) if item.snapshot else "",
        markup(item.file) if item.file else "",
    )
