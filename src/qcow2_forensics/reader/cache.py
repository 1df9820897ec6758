"""A bounded cache without a lock, so that a fork can never inherit one that is held."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Fifo(Generic[K, V]):
    """First in, first out. ``entries`` is the dictionary itself, for hot paths that only look up.

    Threads may race to add the same key: the work is done twice, the answer is the same.
    """

    def __init__(self, kept: int) -> None:
        self.entries: dict[K, V] = {}
        self._order: deque[K] = deque()
        self._kept = kept

    def add(self, key: K, value: V) -> None:
        """Keep ``value``, dropping the oldest entry when there are too many."""
        if key not in self.entries:
            self._order.append(key)
        self.entries[key] = value
        while len(self._order) > self._kept:
            try:
                self.entries.pop(self._order.popleft(), None)
            except IndexError:  # another thread emptied it
                break
        if len(self.entries) > 2 * self._kept:  # entries that races left out of the order
            self.clear()

    def take(self, key: K) -> V | None:
        """Remove and return an entry, None when it is not there."""
        return self.entries.pop(key, None)

    def clear(self) -> None:
        """Drop everything."""
        self.entries.clear()
        self._order.clear()
