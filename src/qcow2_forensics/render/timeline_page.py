"""Dated facts of an image, and of the files in its states, as one page: by day, in order of time.

Takes what ``timeline --format jsonl`` prints, a mapping a line. A fact that several states share is one row that
names them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from ..text import html_only, listed, markup, plural
from .page import Row, page, run_facts, table, warning
from .stylesheet import KINDS

ROWS = 10_000  # facts of the image on the page, and as many of files, the latest; the other formats have all of them
_UNFOLDED = 300  # rows on the whole page that are shown without folding days
_STATES = 4  # named in a row
_DAY = 86_400_000_000  # microseconds
_COLUMNS = ("time (UTC)", "which time", "of what", "states")
_LABELS = {"deleted_snapshot": "deleted snapshot", "qcow1_mtime": "header"}

_TIMES = {
    "Content Modification Time": "modified",
    "Last Access Time": "accessed",
    "Metadata Modification Time": "changed",
    "Creation Time": "created",
}  # of files, in words that fit beside each other


class DatedFact(NamedTuple):
    """One dated fact; those of one kind sort by their message."""

    time: int  # microseconds of the epoch
    kind: str  # one of stylesheet.KINDS
    message: str
    states: tuple[str, ...]
    date: str
    names: tuple[str, ...]  # of the times that are equal


_Key = tuple[int, str, str, str]  # time in microseconds, kind, message, name of the time
_Stated = tuple[str, list[str]]  # date, and the states that have it


def render_timeline(
    events: Iterable[Mapping[str, Any]], image: str, *, run: Mapping[str, Any] | None = None, notes: Sequence[str] = ()
) -> str:
    """Return the page; ``notes`` say what could not be listed and are safe on a terminal."""
    facts, dropped = _gathered(events)
    title = f"Timeline of {markup(image.rpartition('/')[2] or image, 200)}"
    parts = [f"<h1>{title}</h1>", *(run_facts(run) if run else ()), *_head(facts, dropped, notes)]
    folded = len(facts) > _UNFOLDED
    for _, of_day in groupby(facts, key=lambda fact: fact.time // _DAY):
        parts += _section(list(of_day), folded)
    known = {fact.kind for fact in facts}
    return page(title, parts, kinds=[(kind, _LABELS.get(kind, kind)) for kind in KINDS if kind in known])


def _gathered(events: Iterable[Mapping[str, Any]]) -> tuple[list[DatedFact], dict[str, int]]:
    """Return facts in order of time, and how many were left out of the image and of files."""
    found: dict[str, dict[_Key, _Stated]] = {"the image": {}, "files": {}}
    dropped = dict.fromkeys(found, 0)
    for event in events:
        is_file = event["data_type"] == "fs:stat"
        origin = "files" if is_file else "the image"
        kind = "file" if is_file else str(event["data_type"]).partition(":")[2]
        message = str(event["filename"] if is_file else event["message"])
        if event.get("is_allocated") is False:
            message += " (deleted)"
        key = int(event["timestamp"]), kind, message, str(event["timestamp_desc"])
        states = found[origin].setdefault(key, (str(event["datetime"]), []))[1]
        if event["state"] not in states:
            states.append(event["state"])
        if len(found[origin]) > 2 * ROWS:
            dropped[origin] += _thin(found[origin])
    joined: dict[tuple[int, str, str, tuple[str, ...], str], list[str]] = {}
    for origin, facts in found.items():
        dropped[origin] += _thin(facts)
        for (time, kind, message, name), (date, states) in facts.items():
            joined.setdefault((time, kind, message, tuple(states), date), []).append(_TIMES.get(name, name))
    return sorted(DatedFact(*key, tuple(names)) for key, names in joined.items()), dropped


def _thin(facts: dict[_Key, _Stated]) -> int:
    """Drop the earliest facts above :data:`ROWS`; return how many."""
    earliest = sorted(facts)[:-ROWS]
    for key in earliest:
        del facts[key]
    return len(earliest)


def _head(facts: Sequence[DatedFact], dropped: Mapping[str, int], notes: Sequence[str]) -> Iterator[str]:
    yield f"<p>{plural(len(facts), 'dated fact')}. Times of files that are equal share a row, and so do states that agree.</p>"
    earlier = [
        f"{plural(count, 'earlier time')} of {origin}: timeline --format body or jsonl lists all."
        for origin, count in dropped.items()
        if count
    ]
    yield from warning("Not on this page", [*earlier, *map(html_only, notes)])


def _section(facts: Sequence[DatedFact], folded: bool) -> Iterator[str]:
    open_ = "" if folded and all(fact.kind == "file" for fact in facts) else " open"
    yield f"<section><h2>{markup(facts[0].date[:10])}</h2><details{open_}><summary>{plural(len(facts), 'fact')}</summary>"
    yield from table(_COLUMNS, map(_row, facts), narrow=_COLUMNS[:1])
    yield "</details></section>"


def _row(fact: DatedFact) -> Row:
    time = fact.date[11:19] if fact.time % 1_000_000 == 0 else fact.date[11:26]
    named = listed([markup(state, 80) for state in fact.states], _STATES)
    cells = (markup(time), markup(", ".join(fact.names)), markup(fact.message, 8192), named)
    return Row(cells, f"s-{fact.kind}")
