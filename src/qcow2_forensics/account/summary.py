"""What an account adds up to: bytes by label, a table that tiles the file in few rows, remainders that are not zeros."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..census.arrays import I64
from ..limits import ACCOUNT_REMAINDERS, ACCOUNT_ROWS
from .labels import Label
from .tiling import Tile

VARIOUS = "several, joined"


class AccountRow(NamedTuple):
    """One row of the table: ``label`` is -1 for several that were joined, ``claims`` above 1 is an overlap."""

    start: int
    stop: int
    label: int
    claims: int
    nonzero: int

    @property
    def is_notable(self) -> bool:
        """Whether it is an overlap, or a remainder that is not zeros."""
        return self.claims > 1 or self.nonzero > 0

    def goes_on_in(self, other: AccountRow) -> bool:
        """Whether the next row is only more of this one."""
        alike = (self.label, self.claims) == (other.label, other.claims)
        return alike and (self.nonzero > 0) == (other.nonzero > 0)


class AccountSummary:
    """Takes in the tiles of one file and keeps what a report shows. ``file`` is "" for the image itself."""

    def __init__(self, labels: list[Label], *, file: str = "", exact: bool) -> None:
        self.labels = labels
        self.file = file
        self.exact = exact
        self.size = 0
        self.rows: list[AccountRow] = []
        self.joined = 0  # rows that are not in the table by themselves
        self.overlapping = 0  # bytes
        self.remainders: list[AccountRow] = []  # not zeros
        self.remainder_count = 0
        self._lengths = np.zeros(0, np.int64)
        self._nonzero = np.zeros(0, np.int64)

    def add(self, tiled: Tile) -> None:
        """Take in the next window."""
        self.size = int(tiled.stop[-1])
        lengths = tiled.stop - tiled.start
        self._lengths = _added(self._lengths, tiled.label, lengths, len(self.labels))
        self._nonzero = _added(self._nonzero, tiled.label, np.maximum(tiled.nonzero, 0), len(self.labels))
        self.overlapping += int(lengths[tiled.claims > 1].sum())
        found = np.flatnonzero(tiled.nonzero > 0)
        self.remainder_count += len(found)
        self.remainders += _rows(tiled, found[: max(0, ACCOUNT_REMAINDERS - len(self.remainders))])
        for first in range(0, len(tiled.start), ACCOUNT_ROWS):
            rows = _rows(tiled, np.arange(first, min(first + ACCOUNT_ROWS, len(tiled.start))))
            if self.rows and self.rows[-1].goes_on_in(rows[0]):
                last, head = self.rows[-1], rows.pop(0)
                self.rows[-1] = last._replace(stop=head.stop, nonzero=last.nonzero + max(head.nonzero, 0))
            self.rows += rows
            if len(self.rows) > ACCOUNT_ROWS:
                self._join()

    def _join(self) -> None:
        """Join what lies between notable rows; where that is not enough, everything after the first rows."""
        kept: list[AccountRow] = []
        for row in self.rows:
            if kept and not row.is_notable and not kept[-1].is_notable:
                self._absorb(kept, row)
            else:
                kept.append(row)
        most = ACCOUNT_ROWS // 2
        for row in kept[most:]:
            self._absorb(kept, row, most - 1)
        self.rows = kept[:most]

    def _absorb(self, kept: list[AccountRow], row: AccountRow, place: int = -1) -> None:
        last = kept[place]
        self.joined += 1 + (last.label >= 0)
        kept[place] = AccountRow(last.start, row.stop, -1, 1, max(last.nonzero, 0) + max(row.nonzero, 0))

    @property
    def nonzero(self) -> int:
        """How many bytes of remainders are not zero."""
        return int(self._nonzero.sum())

    @property
    def totals(self) -> list[tuple[Label, int, int]]:
        """Labels with their bytes and how many of them are remainders that are not zero; structures first."""
        found = [
            (label, int(length), int(nonzero))
            for label, length, nonzero in zip(self.labels, self._lengths.tolist(), self._nonzero.tolist(), strict=False)
            if length
        ]
        return sorted(found, key=lambda item: item[0].is_remainder)

    def to_dict(self) -> dict[str, Any]:
        """Return the account of the file for JSON."""
        return {
            "file": self.file,
            "size": self.size,
            "exact": self.exact,
            "unaccounted_bytes": self.nonzero if self.exact else None,
            "unaccounted_runs": self.remainder_count if self.exact else None,
            "overlapping_bytes": self.overlapping,
            "totals": [self._total(*total) for total in self.totals],
            "rows": [self._row(row) for row in self.rows],
            "rows_joined": self.joined,
            "remainders": [self._row(row) for row in self.remainders],
        }

    def _total(self, label: Label, length: int, nonzero: int) -> dict[str, Any]:
        shown: dict[str, Any] = {"what": label.what.value, "owner": label.owner, "remainder": label.is_remainder}
        shown["bytes"] = length
        if label.is_remainder and self.exact:
            shown["nonzero"] = nonzero
        return shown

    def _row(self, row: AccountRow) -> dict[str, Any]:
        shown: dict[str, Any] = {"offset": row.start, "length": row.stop - row.start}
        if row.label < 0:
            shown["what"] = VARIOUS
        else:
            label = self.labels[row.label]
            shown["what"] = label.what.value
            if label.owner:
                shown["owner"] = label.owner
            shown["remainder"] = label.is_remainder and row.claims == 0
        if row.claims > 1:
            shown["claims"] = row.claims
        if row.nonzero >= 0:
            shown["nonzero"] = row.nonzero
        return shown


def _added(sums: I64, labels: I64, values: I64, count: int) -> I64:
    """Return the sums by label with some values added; there may be more labels by now."""
    found = np.zeros(count, np.int64)
    found[: len(sums)] = sums
    np.add.at(found, labels, values)
    return found


def _rows(tiled: Tile, places: np.ndarray) -> list[AccountRow]:
    columns = (column[places].tolist() for column in tiled)
    return [AccountRow(*values) for values in zip(*columns, strict=True)]
