"""A Report as something to read; the only place that formats or escapes."""

from __future__ import annotations

from collections.abc import Callable

from ..findings import Report
from .page import render_html
from .table import render_csv, render_json, render_line
from .text import evidence_line, render_text, summary

FORMATS = ("text", "json", "jsonl", "csv", "html")


def render(report: Report, as_format: str = "text", *, width: int = 100, colour: bool = False) -> str:
    """Return ``report`` as one of :data:`FORMATS`; ValueError lists them."""
    renderers: dict[str, Callable[[], str]] = {
        "text": lambda: render_text(report, width=width, colour=colour),
        "json": lambda: render_json(report),
        "jsonl": lambda: render_line(report),
        "csv": lambda: render_csv([report]),
        "html": lambda: render_html(report),
    }
    if as_format not in renderers:
        raise ValueError(f"unknown format {as_format!r}, choose from {', '.join(FORMATS)}")
    return renderers[as_format]()


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
