"""One recovered state: a disk over a file with rebuilt tables, and how sure each of its ranges is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..format.source import PathOrSource, Source
from ..reader.disk import Disk
from ..reader.mapping import Kind
from ..reader.opening import open_disk
from ..reader.runs import joined
from ..reader.states import Rebuilt
from ..reader.window import WindowSource
from .confidence import Confidence, SureRange
from .patched_source import Patch, PatchedSource
from .placement import Placement

END_OF_DATA = "the end of the last mapped cluster"  # where the size of a disk comes from if nothing gives it
_STATE_THE_SIZE = (
    "nothing gives the size of the disk: where it is known state it with --virtual-size (vol: --qcow2-virtual-size, "
    "plaso: --qcow_virtual_size, elsewhere QCOW2_VIRTUAL_SIZE)"
)


@dataclass(frozen=True)
class RecoveredState(Rebuilt):
    """One state put together from what is left. ``number`` chooses it: ``recovered:1`` is the best.

    ``size`` is in bytes; ``size_from`` says where it comes from. ``placements`` are the L1 slots in
    use with how sure they are; ``backing_unknown`` is set where a lost header may have named a backing file.
    ``origin`` is the file it was found in, ``start`` where in it the image begins, ``patches`` are the header
    fields and tables that are rebuilt. ``unplaced`` are the host offsets of L2 tables in use that are read nowhere, for
    nothing says where they belong; another state has them in the order of the file. Where the search was given up
    (``is_search_complete`` is False, ``notes`` say why) the file may hold more states. States are plain data and hold no file open.
    """

    number: int
    what: str
    size: int
    size_from: str
    cluster_size: int
    placements: tuple[Placement, ...]
    backing_unknown: bool
    notes: tuple[str, ...] = ()
    patches: tuple[Patch, ...] = field(repr=False, default=())
    start: int = 0
    is_memory: bool = False
    unplaced: tuple[int, ...] = ()
    is_search_complete: bool = True
    origin: PathOrSource | None = field(repr=False, default=None)

    @property
    def label(self) -> str:
        """What to call it in listings."""
        return f"recovered:{self.number}"

    @property
    def confidence(self) -> Confidence:
        """How sure the least sure of its placed ranges is; a guess where there is none."""
        return min((placed.confidence for placed in self.placements), default=Confidence.GUESS)

    @property
    def is_size_guessed(self) -> bool:
        """Whether nothing in the file gives the size of the disk."""
        return self.size_from.startswith(END_OF_DATA)

    def tables_by_confidence(self) -> dict[Confidence, int]:
        """Return how many L2 tables are placed with each confidence, the surest first."""
        counts = Counter(placed.confidence for placed in self.placements)
        return {level: counts[level] for level in sorted(Confidence, reverse=True)}

    @property
    def warning(self) -> str:
        """What it was put together from and how sure that is, for whoever opens it."""
        counts = ", ".join(f"{count} {level.label}" for level, count in self.tables_by_confidence().items() if count)
        left = f"; {len(self.unplaced)} without a known place are left out" if self.unplaced else ""
        made = f"{self.label} was put together from what is left ({self.what}); its L2 tables: {counts or 'none'}{left}"
        return f"{made}; {_STATE_THE_SIZE}" if self.is_size_guessed else made

    def over(self, source: Source) -> Source:
        """Return the bytes of an image whose active state is this one; ``source`` is the file it was found in."""
        if self.start:
            return WindowSource(source, self.start, None)
        return PatchedSource(source, self.patches) if self.patches else source

    def open(self, **options: Any) -> Disk:
        """Return the state as a disk; ``options`` are those of :func:`qcow2_forensics.open_disk`."""
        if self.origin is None:
            raise ValueError(f"{self.label} is of no file that is known")
        return open_disk(self.origin, self, **options)

    def ranges(self, disk: Disk) -> Iterator[SureRange]:
        """Return guest ranges that tile ``disk``, opened from this state, with how sure each is."""
        return joined(self._ranges(disk), _as_one)

    def _ranges(self, disk: Disk) -> Iterator[SureRange]:
        span = disk.image.header.l2_span
        sure = {placed.slot: placed for placed in self.placements}
        for offset, length, kind in _by_slot(disk, span):
            placed = sure.get(offset // span)
            if placed is None:
                confidence, reason = Confidence.GUESS, "no L2 table was found for it"
            elif kind == Kind.HOLE and self.backing_unknown:
                confidence = min(placed.confidence, Confidence.LIKELY)
                reason = "unallocated; the lost header may have named a backing file"
            else:
                confidence, reason = placed.confidence, placed.reason
            yield SureRange(offset, length, confidence, reason)


def _as_one(first: SureRange, second: SureRange) -> SureRange | None:
    return first._replace(length=first.length + second.length) if first[2:] == second[2:] else None


def _by_slot(disk: Disk, span: int) -> Iterator[tuple[int, int, Kind]]:
    """Yield the extents of a disk, cut where one L2 table ends and the next begins."""
    for extent in disk.extents():
        offset, end = extent.offset, extent.offset + extent.length
        while offset < end:
            stop = min(end, (offset // span + 1) * span)
            yield offset, stop - offset, extent.kind
            offset = stop
