"""A Report as something to read; the only place that formats or escapes.

Each renderer is imported when it is first used: a triage in plain text needs neither the page nor CSV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import at_first_use
from ..findings import Report

if TYPE_CHECKING:
    from .html import render_html
    from .plain import evidence_line, render_text, summary
    from .rows import render_csv, render_json, render_line

FORMATS = ("text", "json", "jsonl", "csv", "html")


def render(report: Report, as_format: str = "text", *, width: int = 100, colour: bool = False) -> str:
    """Return ``report`` as one of :data:`FORMATS`; ValueError lists them."""
    if as_format == "text":
        from .plain import render_text

        return render_text(report, width=width, colour=colour)
    if as_format == "html":
        from .html import render_html

        return render_html(report)
    if as_format not in FORMATS:
        raise ValueError(f"unknown format {as_format!r}, choose from {', '.join(FORMATS)}")
    from . import rows

    if as_format == "csv":
        return rows.render_csv([report])
    return rows.render_json(report) if as_format == "json" else rows.render_line(report)


__all__ = [
    "FORMATS",
    "evidence_line",
    "render",
    "render_csv",
    "render_html",
    "render_json",
    "render_line",
    "render_text",
    "summary",
]

__getattr__ = at_first_use(
    __name__,
    {
        "evidence_line": "plain",
        "render_csv": "rows",
        "render_html": "html",
        "render_json": "rows",
        "render_line": "rows",
        "render_text": "plain",
        "summary": "plain",
    },
)
