"""How sure a recovered guest range is, in three words that mean the same everywhere."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Confidence(enum.IntEnum):
    """How sure it is that a guest range of a recovered state holds what the guest saw; ordered.

    ``CERTAIN``: a structure of the image says so and another one agrees. ``LIKELY``: one structure or
    the content says so. ``GUESS``: it follows from the order of clusters in the file alone.
    """

    GUESS = 0
    LIKELY = 1
    CERTAIN = 2

    @property
    def label(self) -> str:
        """The word shown to people and written to JSON."""
        return self.name.lower()


class SureRange(NamedTuple):
    """``length`` guest bytes from ``offset`` on, how sure they are, and why in a few words."""

    offset: int
    length: int
    confidence: Confidence
    reason: str
