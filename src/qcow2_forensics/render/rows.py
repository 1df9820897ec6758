"""A report as data: JSON, JSON lines (one report a line) and CSV (one evidence item a row)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..findings import Evidence, Finding, Report
from ..text import csv_lines

PICTURES = ("map", "lineage")  # what only the page draws
COLUMNS = (
    "image",
    "code",
    "severity",
    "title",
    "note",
    "confidence",
    "scope",
    "explained_by",
    "count",
    "field",
    "value",
    "file",
    "offset",
    "length",
    "structure",
    "guest_offset",
    "snapshot",
)


def render_json(report: Report) -> str:
    """Return the report as indented JSON, ASCII only."""
    return report.to_json() + "\n"


def without_pictures(report: Report) -> Report:
    """Return the report without its large parts: what only its page shows, and the rows of its account."""
    details = {key: value for key, value in report.details.items() if key not in PICTURES}
    if "account" in details:
        details["account"] = without_rows(details["account"])
    return replace(report, details=details)


def render_line(report: Report) -> str:
    """Return the report as one line of JSON, without the pictures in ``details``."""
    data = without_pictures(report).to_dict()
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")) + "\n"


def without_rows(account: Mapping[str, Any]) -> dict[str, Any]:
    """Return an account without the tables that tile the files: its totals and its remainders stay."""
    files = [{key: value for key, value in file.items() if key != "rows"} for file in account.get("files", ())]
    return {**account, "files": files} if files else dict(account)


def render_csv(reports: Iterable[Report]) -> str:
    """Return a header row and one row per evidence item; a finding without evidence is one row.

    Text that a spreadsheet would run as a formula is quoted with an apostrophe.
    """
    return "".join(csv_lines((row for report in reports for row in _rows(report)), COLUMNS))


def _rows(report: Report) -> Iterator[tuple[object, ...]]:
    image = report.image.get("path")
    for finding in report.findings:
        for item in finding.evidence or (None,):
            yield image, *_finding(finding), *_item(item)


def _finding(finding: Finding) -> tuple[object, ...]:
    return (
        finding.code,
        finding.severity.label,
        finding.title,
        finding.note,
        finding.confidence,
        "",  # scope, a column of schema 1; never used
        " ".join(finding.explained_by),
        finding.count,
    )


def _item(item: Evidence | None) -> tuple[object, ...]:
    if item is None:
        return (None,) * 8
    return (
        item.field,
        item.value,
        item.file,
        item.offset,
        item.length,
        item.structure,
        item.guest_offset,
        item.snapshot,
    )
