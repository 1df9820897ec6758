"""Which guest ranges differ between two states."""

from .ranges import Change, Difference, compare, possible_differences

__all__ = ["Change", "Difference", "compare", "possible_differences"]
