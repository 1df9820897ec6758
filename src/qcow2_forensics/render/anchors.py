"""Links within a page: from evidence to its square of the map and its snapshot, and back to the findings.

Names of anchors are numbers given here; nothing from evidence becomes part of one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from ..findings import Evidence, Finding, Report
from .allocation_map import cells_of, starts_of_squares
from .state_tree import STATES

_SNAPSHOT = "QCOW2-SNAPSHOT"


class Anchors:
    """The anchors of one report: ``f3`` a finding, ``c17`` a square of the map, ``s2`` a state of the tree."""

    def __init__(self, report: Report) -> None:
        picture: Mapping[str, Any] = report.details.get("map") or {}
        lineage: Mapping[str, Any] = report.details.get("lineage") or {}
        self._numbers = {id(finding): number for number, finding in enumerate(report.findings)}
        self._step = int(picture.get("per_cell", 0)) * int(picture.get("cluster_size", 0))
        self._count = len(picture.get("cells", ()))
        self.squares = self._squares(report.findings)
        self._starts: Sequence[int] = starts_of_squares(cells_of(picture), self.squares) if self._count else ()
        states = lineage.get("states", ())
        shown = states[:STATES] if len(states) > 1 else ()
        self._states = {str(state.get("id")): row for row, state in enumerate(shown) if state.get("id")}
        self.states = self._findings_of_states(report.findings)

    def finding(self, finding: Finding) -> str:
        """Return the name of a finding's anchor."""
        return f"f{self._numbers[id(finding)]}"

    def square(self, item: Evidence) -> str:
        """Return the anchor of the square an evidence item lies in, empty where there is no map."""
        cell = self._cell(item)
        return "" if cell is None else f"c{self._starts[bisect_right(self._starts, cell) - 1]}"

    def state(self, item: Evidence) -> str:
        """Return the anchor of the state an evidence item is about, empty where none is drawn."""
        row = self._states.get(item.snapshot) if item.snapshot else None
        return "" if row is None else f"s{row}"

    def _cell(self, item: Evidence) -> int | None:
        if item.offset is None or item.file or not self._step:
            return None
        cell = item.offset // self._step
        return cell if cell < self._count else None

    def _squares(self, findings: Sequence[Finding]) -> dict[int, str]:
        """Return the finding that each cell of the map leads to: the worst one with evidence in it."""
        found: dict[int, str] = {}
        for finding in findings:  # worst first
            for item in finding.evidence:
                cell = self._cell(item)
                if cell is not None:
                    found.setdefault(cell, self.finding(finding))
        return found

    def _findings_of_states(self, findings: Sequence[Finding]) -> dict[int, str]:
        """Return the finding that each state of the tree leads to."""
        found: dict[int, str] = {}
        for finding in sorted(findings, key=lambda finding: finding.code != _SNAPSHOT):
            for item in finding.evidence:
                row = self._states.get(item.snapshot) if item.snapshot else None
                if row is not None:
                    found.setdefault(row, self.finding(finding))
        return found
