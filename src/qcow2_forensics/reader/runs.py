"""Runs: what a guest range is made of, as the tables describe it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from ..errors import Qcow2Error

L1_PAGE = 8192  # L1 entries read and kept together


class Kind(enum.IntEnum):
    """What a run of guest bytes is."""

    DATA = 0  # stored at host_offset
    ZERO = 1  # reads as zeros, whatever a backing file holds
    HOLE = 2  # not in this image: the backing file's bytes, or zeros without one
    COMPRESSED = 3  # (part of) one compressed cluster
    MISSING = 4  # extents only: would come from a backing file that is not here; reading it raises


class Run(NamedTuple):
    """``length`` guest bytes at ``offset`` of one kind.

    ``host_offset`` is that of the first byte for DATA, of preallocated space under ZERO and HOLE
    (None without), and of the stream for COMPRESSED, whose ``size`` bytes hold it at most.
    """

    offset: int
    length: int
    kind: Kind
    host_offset: int | None = None
    size: int = 0


T = TypeVar("T")


def joined(items: Iterable[T], join: Callable[[T, T], T | None]) -> Iterator[T]:
    """Yield items, two neighbours as one where ``join`` returns one; the items before an error come before it."""
    pending: T | None = None
    try:
        for item in items:
            both = None if pending is None else join(pending, item)
            if both is not None:
                pending = both
                continue
            if pending is not None:
                yield pending
            pending = item
    except Qcow2Error:
        if pending is not None:
            yield pending
        raise
    if pending is not None:
        yield pending


def coalesced(pieces: Iterable[Run]) -> Iterator[Run]:
    """Yield the same runs, neighbours that continue each other joined; the runs before a fault come before its error."""
    return joined(pieces, _continued)


def _continued(first: Run, second: Run) -> Run | None:
    """Return two neighbouring runs as one: of the same kind, with host bytes that follow each other."""
    if first.kind != second.kind or first.kind == Kind.COMPRESSED:
        return None
    follows = None if first.host_offset is None else first.host_offset + first.length
    if second.host_offset != follows:
        return None
    return Run(first.offset, first.length + second.length, first.kind, first.host_offset)
