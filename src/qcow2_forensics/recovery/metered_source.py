"""A source whose reads are counted: what looking for lost states may cost, however crafted tables share clusters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..format.source import FileSource, Source
from ..limits import DEFAULT_LIMITS, RECOVERY_READS_OF_EACH_BYTE, Budget, KiB
from ..reader.host_holes import host_runs

_CALL = 8 * KiB  # what one read costs beside its bytes: looking at a table of 512 bytes takes longer than reading it


class MeteredSource:
    """``source`` with one budget for all its reads; a read past it raises :class:`LimitExceeded`.

    Everything else about the source (its path, its identity, how it is closed) is its own.
    """

    keeps_contract = True

    def __init__(self, source: Source) -> None:
        self.unmetered = source
        most = RECOVERY_READS_OF_EACH_BYTE * source.size + DEFAULT_LIMITS.work_spare
        self._budget = Budget.up_to("bytes read to recover states", most)

    @property
    def size(self) -> int:
        return self.unmetered.size

    def read(self, offset: int, length: int, /) -> bytes:
        """Return bytes as the source does."""
        self._budget.spend(_CALL + max(0, min(length, self.size - offset)))
        return self.unmetered.read(offset, length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unmetered, name)


def stored_pieces(source: Source, size: int, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of pieces of a file, each at a multiple of ``size``, without those that are holes."""
    end = source.size if end is None else min(end, source.size)
    file = source.unmetered if isinstance(source, MeteredSource) else source
    if not isinstance(file, FileSource):  # a wrapper shows its own bytes, whatever the file below has there
        yield from ((at, min(size, end - at)) for at in range(0, end, size))
        return
    done = 0
    for run in host_runs(file, 0, end):
        if not run.is_hole:
            for at in range(max(done, run.offset // size * size), run.offset + run.length, size):
                done = at + size
                yield at, min(size, end - at)
