"""Which guest ranges differ between two states."""

from .ranges import Change, Difference, compare

__all__ = ["Change", "Difference", "compare"]
