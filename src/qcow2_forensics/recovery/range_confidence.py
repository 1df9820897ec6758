"""How sure each guest range of any open disk is: recovered, of a deleted snapshot, or as the image lists it."""

from __future__ import annotations

from collections.abc import Iterator

from ..reader.disk import Disk
from ..residue.restricted_source import GuardedSource
from .confidence import Confidence, SureRange
from .state import RecoveredState

_NEWER = "may be newer: no snapshot older than the deleted one holds it, so that the active state could write there"


def confidence_of(disk: Disk) -> Iterator[SureRange]:
    """Yield guest ranges that tile ``disk`` with how sure each is, and why.

    What cannot be read is an error of the read, and not said here.
    """
    if isinstance(disk.rebuilt, RecoveredState):
        yield from disk.rebuilt.ranges(disk)
        return
    source = disk.image.source
    newer = source.may_be_newer if isinstance(source, GuardedSource) else ()
    sure = "the former tables of the snapshot" if isinstance(source, GuardedSource) else "the image's own tables"
    at = 0
    for offset, length in newer:
        end = min(offset + length, disk.size)
        if offset > at:
            yield SureRange(at, min(offset, disk.size) - at, Confidence.CERTAIN, sure)
        if end > offset:
            yield SureRange(offset, end - offset, Confidence.LIKELY, _NEWER)
        at = max(at, end)
    if at < disk.size:
        yield SureRange(at, disk.size - at, Confidence.CERTAIN, sure)
