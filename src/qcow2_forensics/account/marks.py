"""What ranges of a file are claimed to be, and where its remainders lie.

A label of a :class:`~.labels.ByteKind` claims bytes. One of a :class:`~.labels.Place` is a hint: it says what the bytes are
where nothing claims them.
"""

from __future__ import annotations

from ..census.arrays import I64, U64
from .labels import ByteKind, Label, Labels, Place
from .tiling import LabelledRanges


class Marks:
    """The labels of one file, and the ranges they are given to."""

    def __init__(self) -> None:
        self._labels = Labels()
        self._claims = LabelledRanges()
        self._hints = LabelledRanges()

    @property
    def labels(self) -> list[Label]:
        """All labels, by their numbers."""
        return self._labels.all

    def label(self, what: ByteKind | Place, owner: str = "") -> int:
        """Return the number of a label."""
        return self._labels.number(what, owner)

    def add(self, label: int, start: int, stop: int) -> None:
        """Give a range its label; an empty one is none."""
        self._spans(label).add(label, start, stop)

    def add_many(self, label: int, starts: U64 | I64, stops: U64 | I64) -> None:
        """Give ranges, in arrays, their label; empty ones are none."""
        self._spans(label).add_many(label, starts, stops)

    def add_name(self, label: int, owner: str, name: bytes, offset: int) -> None:
        """Claim a name at a file offset up to its NUL; the rest of its field is a remainder."""
        end = offset + (len(name) if b"\0" not in name else name.index(b"\0"))
        self.add(label, offset, end)
        self.add(self.label(Place.NAME_SLACK, owner), end, offset + len(name))

    def _spans(self, label: int) -> LabelledRanges:
        return self._hints if self.labels[label].is_remainder else self._claims

    def claims(self, end: int) -> I64:
        """Return the claims as rows, as :meth:`.tiling.LabelledRanges.rows` does."""
        return self._claims.rows(end)

    def hints(self, end: int) -> I64:
        """Return the hints as rows."""
        return self._hints.rows(end)
