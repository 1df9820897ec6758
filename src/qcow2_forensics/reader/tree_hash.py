"""The SHA-256 tree hash: hashes of each MiB, combined in pairs, so that a hole costs next to nothing.

SHA-256 itself runs through every byte, zeros included. In a tree the hash of so many MiB of zeros, at a
place that is a multiple of it, is always the same, one for each power of two. The tree is the one of
Amazon S3 Glacier, for which there are other programs::

    leaves      SHA-256 of each MiB; the last may be shorter
    above       SHA-256 of two neighbours' hashes; one without a neighbour moves up as it is
"""

from __future__ import annotations

import hashlib
from typing import Any

from ..limits import MiB

_LEAF = MiB


def _combined(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(left + right).digest()


class TreeHash:
    """Takes bytes and zeros one after the other; :meth:`hexdigest` is the tree hash of what was taken so far."""

    def __init__(self) -> None:
        # Complete subtrees from the left, each larger than the next: (leaves as a power of two, hash).
        self._subtrees: list[tuple[int, bytes]] = []
        self._leaves = 0
        self._leaf: Any = hashlib.sha256()
        self._in_leaf = 0
        self._blank = [hashlib.sha256(bytes(_LEAF)).digest()]  # of 1, 2, 4 and so on leaves of zeros

    def update(self, data: bytes) -> None:
        """Append bytes."""
        view = memoryview(data)
        while view:
            piece = view[: _LEAF - self._in_leaf]
            self._leaf.update(piece)
            self._in_leaf += len(piece)
            if self._in_leaf == _LEAF:
                self._add(0, self._leaf.digest())
                self._leaf, self._in_leaf = hashlib.sha256(), 0
            view = view[len(piece) :]

    def zeros(self, length: int) -> None:
        """Append zeros."""
        if self._in_leaf:
            rest = min(length, _LEAF - self._in_leaf)
            self.update(bytes(rest))
            length -= rest
        leaves, rest = divmod(length, _LEAF)
        while leaves:
            level = leaves.bit_length() - 1
            if self._leaves:  # a subtree begins at a multiple of its size
                level = min(level, (self._leaves & -self._leaves).bit_length() - 1)
            while len(self._blank) <= level:
                self._blank.append(_combined(self._blank[-1], self._blank[-1]))
            self._add(level, self._blank[level])
            leaves -= 1 << level
        self.update(bytes(rest))

    def hexdigest(self) -> str:
        """Return the root's hash, in hex."""
        parts = [digest for _, digest in self._subtrees]
        if self._in_leaf or not parts:
            parts.append(self._leaf.digest())
        root = parts.pop()
        while parts:
            root = _combined(parts.pop(), root)
        return root.hex()

    def _add(self, level: int, digest: bytes) -> None:
        self._leaves += 1 << level
        while self._subtrees and self._subtrees[-1][0] == level:
            digest = _combined(self._subtrees.pop()[1], digest)
            level += 1
        self._subtrees.append((level, digest))
