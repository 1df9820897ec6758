"""The states of the disk as a picture: backing file, snapshots in order, and the active state.

Takes the ``lineage`` entry of a report's details: ``{"states": [...], "left_out": 0}`` in order of time, each
``{"kind": "backing" | "snapshot" | "deleted" | "active", "id", "name", "date", "note", "parent"}``
where ``parent`` is the index of the state it shares most with, or None. QCOW2 stores no parents;
the tree is inferred and the page says so. ``left_out`` counts earlier snapshots that are not among the states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..text import markup, plural

_ROW = 44
_COLUMN = 26
_RADIUS = 7
_BEND = 10  # of a line that leaves for another column
_WIDTH = 900
_LANES = 12  # columns; branches beyond them share the last
STATES = 200  # drawn; a longer history is cut with a note


def draw_tree(data: Mapping[str, Any], links: Mapping[int, str]) -> str:
    """Return the figure: one row per state, branches in columns of their own.

    ``links`` are the anchors that rows lead to; every row has the anchor ``s`` and its number.
    """
    states: Sequence[Mapping[str, Any]] = data["states"][:STATES]
    lanes = _lanes(states)
    height = max(len(states), 1) * _ROW
    labels = _x(max(lanes, default=0)) + 18
    parts = [f'<svg class="tree" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="States of the disk">']
    parts += _edges(states, lanes)
    for row, state in enumerate(states):
        parts += _node(state, row, lanes[row], labels, links.get(row))
    parts.append("</svg>")
    more = len(data["states"]) - len(states) + data.get("left_out", 0)
    if more:
        parts.append(f"<p class='quiet'>and {plural(more, 'more state')}</p>")
    return "\n".join(parts)


def _parent(state: Mapping[str, Any], row: int) -> int | None:
    parent = state.get("parent")
    return parent if isinstance(parent, int) and 0 <= parent < row else None


def _lanes(states: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return each state's column: its parent's for the first child, a new one for every branch."""
    lanes: list[int] = []
    continued: set[int] = set()
    for row, state in enumerate(states):
        parent = _parent(state, row)
        if parent is not None and parent not in continued:
            continued.add(parent)
            lanes.append(lanes[parent])
        else:
            lanes.append(min(max(lanes) + 1, _LANES) if lanes else 0)
    return lanes


def _edges(states: Sequence[Mapping[str, Any]], lanes: Sequence[int]) -> Iterator[str]:
    for row, state in enumerate(states):
        parent = _parent(state, row)
        if parent is None:
            continue
        x1, y1, x2, y2 = _x(lanes[parent]), _y(parent), _x(lanes[row]), _y(row)
        if x1 == x2:
            path = f"M{x1} {y1} V{y2}"
        else:  # out to the side first, so that the line passes no state it does not come from
            path = f"M{x1} {y1} H{x2 - _BEND} Q{x2} {y1} {x2} {y1 + _BEND} V{y2}"
        yield f'<path class="edge" d="{path}"/>'


def _x(lane: int) -> int:
    return 20 + lane * _COLUMN


def _y(row: int) -> int:
    return row * _ROW + _ROW // 2


def _node(state: Mapping[str, Any], row: int, lane: int, labels: int, target: str | None) -> Iterator[str]:
    y = _y(row)
    kind = str(state.get("kind", "snapshot"))
    shape = kind if kind in {"backing", "snapshot", "deleted", "active"} else "snapshot"
    label = " ".join(markup(state[key], 80) for key in ("id", "name") if state.get(key))
    quiet = " · ".join(markup(state[key], 160) for key in ("date", "note") if state.get(key))
    opening, closing = (f'<a href="#{target}">', "</a>") if target else ("", "")
    yield f'<g id="s{row}">{opening}'
    yield f'<circle class="n-{shape}" cx="{_x(lane)}" cy="{y}" r="{_RADIUS}"/>'
    yield f'<text x="{labels}" y="{y - 1}" class="name">{label or markup(kind)}</text>'
    yield f'<text x="{labels}" y="{y + 13}" class="quiet">{quiet}</text>{closing}</g>'
