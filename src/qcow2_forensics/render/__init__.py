"""A Report as something to read; the only place that formats or escapes.

Each renderer is imported when it is first used: a triage in plain text needs neither the page nor CSV.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..findings import Report

if TYPE_CHECKING:
    from .page import render_html
    from .table import render_csv, render_json, render_line
    from .text import evidence_line, render_text, summary

FORMATS = ("text", "json", "jsonl", "csv", "html")


def render(report: Report, as_format: str = "text", *, width: int = 100, colour: bool = False) -> str:
    """Return ``report`` as one of :data:`FORMATS`; ValueError lists them."""
    if as_format == "text":
        from .text import render_text

        return render_text(report, width=width, colour=colour)
    if as_format == "html":
        from .page import render_html

        return render_html(report)
    if as_format not in FORMATS:
        raise ValueError(f"unknown format {as_format!r}, choose from {', '.join(FORMATS)}")
    from . import table

    if as_format == "csv":
        return table.render_csv([report])
    return table.render_json(report) if as_format == "json" else table.render_line(report)


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

_MODULES = {
    "evidence_line": "text",
    "render_csv": "table",
    "render_html": "page",
    "render_json": "table",
    "render_line": "table",
    "render_text": "text",
    "summary": "text",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
