"""The frame of a page: one self-contained document without scripts or requests, with filters by severity.

The filters are check boxes in front of everything they hide; the style sheet does the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..findings import TOOL, Severity
from .stylesheet import CSS

_FOOTER = (
    f"Made by {TOOL}. Offsets are bytes from the start of the file, in hexadecimal; guest offsets are "
    "bytes from the start of the guest's disk. Times are UTC; those of snapshots are by the clock of the host that took them."
)


def page(title: str, parts: Iterable[str], severities: Iterable[Severity] = ()) -> str:
    """Return a page of parts that are HTML already; ``severities`` are those that can be hidden."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{title}</title>",
            f"<style>{CSS}</style></head><body>",
            *_filters(sorted(set(severities), reverse=True)),
            "<main>",
            *parts,
            "</main>",
            f"<footer class='quiet'>{_FOOTER}</footer>",
            "</body></html>",
            "",
        ]
    )


def _filters(severities: list[Severity]) -> Iterator[str]:
    if len(severities) < 2:
        return
    yield "<div class='filters quiet' aria-hidden='true'>Show</div>"
    for severity in severities:
        name = severity.label.lower()
        yield f"<input type='checkbox' class='filter' id='show-{name}' checked/><label for='show-{name}'>{severity.label}</label>"


def badge(severity: Severity | None, words: str = "") -> str:
    """Return a severity as a coloured label."""
    name = "none" if severity is None else severity.label.lower()
    return f'<span class="badge s-{name}">{words or (severity.label if severity is not None else "None")}</span>'
