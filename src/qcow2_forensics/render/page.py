"""The frame of every page: one self-contained document without scripts or requests, with filters.

The filters are check boxes in front of everything they hide; the style sheet does the rest. What a filter
``x`` hides has the class ``s-x``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..findings import Severity
from ..text import TOOL, markup
from .stylesheet import CSS

_FOOTER = (
    f"Made by {TOOL}. Offsets are bytes from the start of the file, in hexadecimal; guest offsets are "
    "bytes from the start of the guest's disk. Times are UTC; those of snapshots are by the clock of the host that took them."
)


def page(
    title: str, parts: Iterable[str], severities: Iterable[Severity] = (), *, kinds: Iterable[tuple[str, str]] = ()
) -> str:
    """Return a page of parts that are HTML already.

    ``severities`` are those that can be hidden; ``kinds`` are further filters, each its key in
    :data:`.stylesheet.KINDS` and its label as HTML.
    """
    filters = [(severity.label.lower(), severity.label) for severity in sorted(set(severities), reverse=True)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{title}</title>",
            f"<style>{CSS}</style></head><body>",
            *_filters([*filters, *kinds]),
            "<main>",
            *parts,
            "</main>",
            f"<footer class='quiet'>{_FOOTER}</footer>",
            "</body></html>",
            "",
        ]
    )


def _filters(filters: Sequence[tuple[str, str]]) -> Iterator[str]:
    if len(filters) < 2:
        return
    yield "<div class='filters quiet' aria-hidden='true'>Show</div>"
    for name, label in filters:
        yield f"<input type='checkbox' class='filter' id='show-{name}' checked/><label for='show-{name}'>{label}</label>"


def run_facts(run: Mapping[str, Any]) -> Iterator[str]:
    """Yield the facts of a run for a case file: who, when, with what, on which files."""
    keys = ("case", "examiner", "note", "started", "finished", "command", "tool", "libraries", "system")
    rows = [(key, markup(run[key], 4096)) for key in keys if run.get(key)]
    for file in run.get("files", ()):
        shown = markup(file["path"], 4096)
        if file.get("sha256"):
            shown += f"<br/>SHA-256 <span class='hash'>{markup(file['sha256'])}</span>"
        if file.get("error"):
            shown += f"<br/>no SHA-256: {markup(file['error'], 500)}"
        rows.append(("file", shown))
    yield from fact_table(rows)


def fact_table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield a table of two columns, what each fact is and the fact; both are HTML already."""
    yield "<table class='facts'>"
    yield from (f"<tr><th>{what}</th><td>{fact}</td></tr>" for what, fact in rows)
    yield "</table>"


class Row(NamedTuple):
    """One row of a table, in HTML; a filter hides its class, and links lead to its anchor."""

    cells: Sequence[str]
    css_class: str = ""
    anchor: str = ""


def table(
    headings: Sequence[str], rows: Iterable[Row], *, narrow: Iterable[str] = (), wide: Iterable[str] = ()
) -> Iterator[str]:
    """Yield a table that becomes stacked rows on a narrow screen; headings are HTML already.

    The columns ``narrow`` are never broken, those that are ``wide`` have room for a path.
    """
    classes = dict.fromkeys(narrow, " class='n'") | dict.fromkeys(wide, " class='w'")
    yield "<div class='scroll'><table><thead><tr>"
    yield "".join(f"<th>{heading}</th>" for heading in headings) + "</tr></thead><tbody>"
    for row in rows:
        css_class = f' class="{row.css_class}"' if row.css_class else ""
        anchor = f' id="{row.anchor}"' if row.anchor else ""
        shown = zip(headings, row.cells, strict=True)
        cells = "".join(f"<td data-l='{heading}'{classes.get(heading, '')}>{cell}</td>" for heading, cell in shown)
        yield f"<tr{css_class}{anchor}>{cells}</tr>"
    yield "</tbody></table></div>"


def warning(title: str, sentences: Iterable[str]) -> Iterator[str]:
    """Yield a section that stands out, with a list of sentences; nothing where there is none. All are HTML already."""
    items = [f"<li>{sentence}</li>" for sentence in sentences]
    if items:
        yield f"<section class='warning'><h2>{title}</h2><ul>"
        yield from items
        yield "</ul></section>"


def badge(severity: Severity | None, words: str = "") -> str:
    """Return a severity as a coloured label."""
    shown = words or (severity.label if severity is not None else "None")
    return f'<span class="badge {severity_class(severity)}">{shown}</span>'


def severity_class(severity: Severity | None) -> str:
    """Return the class of what has a severity, or none; its filter hides it."""
    return "s-none" if severity is None else f"s-{severity.label.lower()}"
