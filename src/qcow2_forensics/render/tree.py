"""The states of the disk as a picture: backing file, snapshots in order, and the active state.

Takes the ``lineage`` entry of a report's details: ``{"states": [...]}`` in order of time, each
``{"kind": "backing" | "snapshot" | "deleted" | "active", "id", "name", "date", "note", "parent"}``
where ``parent`` is the index of the state it shares most with, or None. QCOW2 stores no parents;
the tree is inferred and the page says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .escape import markup

_ROW = 44
_COLUMN = 26
_RADIUS = 7
STATES = 200  # drawn; a longer history is cut with a note


def draw_tree(data: Mapping[str, Any]) -> str:
    """Return the figure: one line per state, children to the right of what they grew from."""
    states: Sequence[Mapping[str, Any]] = data["states"][:STATES]
    depths = _depths(states)
    width = 900
    height = max(len(states), 1) * _ROW
    parts = [f'<svg class="tree" viewBox="0 0 {width} {height}" role="img" aria-label="States of the disk">']
    parts += _edges(states, depths)
    for row, state in enumerate(states):
        parts += _node(state, row, depths[row])
    parts.append("</svg>")
    if len(data["states"]) > STATES:
        parts.append(f"<p class='quiet'>and {len(data['states']) - STATES} more states</p>")
    return "\n".join(parts)


def _depths(states: Sequence[Mapping[str, Any]]) -> list[int]:
    depths: list[int] = []
    for row, state in enumerate(states):
        parent = state.get("parent")
        # A chain stays in one column; a branch (the parent already has a child) moves right.
        if not isinstance(parent, int) or not 0 <= parent < row:
            depths.append(0)
            continue
        branched = any(states[other].get("parent") == parent for other in range(row))
        depths.append(min(depths[parent] + (1 if branched else 0), 12))
    return depths


def _edges(states: Sequence[Mapping[str, Any]], depths: Sequence[int]) -> Iterator[str]:
    for row, state in enumerate(states):
        parent = state.get("parent")
        if isinstance(parent, int) and 0 <= parent < row:
            x1, y1 = _centre(parent, depths[parent])
            x2, y2 = _centre(row, depths[row])
            yield f'<path class="edge" d="M{x1} {y1} V{y2 - _RADIUS * 2} Q{x1} {y2} {x2} {y2}"/>'


def _centre(row: int, depth: int) -> tuple[int, int]:
    return 20 + depth * _COLUMN, row * _ROW + _ROW // 2


def _node(state: Mapping[str, Any], row: int, depth: int) -> Iterator[str]:
    x, y = _centre(row, depth)
    kind = str(state.get("kind", "snapshot"))
    shape = kind if kind in {"backing", "snapshot", "deleted", "active"} else "snapshot"
    label = " ".join(markup(state[key], 80) for key in ("id", "name") if state.get(key))
    quiet = " · ".join(markup(state[key], 160) for key in ("date", "note") if state.get(key))
    yield f'<circle class="n-{shape}" cx="{x}" cy="{y}" r="{_RADIUS}"/>'
    yield f'<text x="{x + 16}" y="{y - 1}" class="name">{label or markup(kind)}</text>'
    yield f'<text x="{x + 16}" y="{y + 13}" class="quiet">{quiet}</text>'
