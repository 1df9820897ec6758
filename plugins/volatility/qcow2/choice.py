"""Which state of an image is meant, and the words for the others."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from .common import warn

if TYPE_CHECKING:
    from qcow2_forensics import Image, MemoryChoice, SnapshotEntry


def choose(image: Image, wanted: str | None, title: str) -> MemoryChoice | None:
    """Return the state to analyse, as the core chooses it, with warnings of what else there is."""
    from qcow2_forensics import choose_memory, memory_snapshots

    warn_of_problems(image, title)
    chosen = choose_memory(image, wanted)
    if wanted is not None or chosen is None:
        return chosen
    held = memory_snapshots(image)
    if chosen.snapshot is None:
        warn(
            f"{title}: no snapshot holds memory, but a VM state is still mapped past the end of the disk. It is used; "
            "it is of a snapshot that was applied and deleted, or of a savevm that failed. For the disk give "
            "--qcow2-snapshot disk"
        )
    elif len(held) > 1:
        warn(
            f"{title} holds {len(held)} snapshots with memory: {'; '.join(map(describe, held))}. "
            f"The latest is used, {describe(chosen.snapshot)}. Choose with --qcow2-snapshot ID before the plugin's name"
        )
    return chosen


def warn_of_problems(image: Image, title: str) -> None:
    """Warn of snapshots that may be missing from the list, because their table cannot be read."""
    for problem in image.problems:
        if "snapshots" in problem.blocks:
            warn(f"{title}: {problem.error()}")


def describe(entry: SnapshotEntry) -> str:
    """Return a snapshot in words that are safe on a terminal."""
    from qcow2_forensics.text import printable, quoted, short_date

    when = short_date(entry.date_sec, entry.date_nsec, " UTC")
    return f"{printable(entry.id)} {quoted(printable(entry.name))} of {when}"


def snapshot_date(entry: SnapshotEntry) -> dt.datetime:
    """Return when the host's clock says the snapshot was taken, to the microsecond."""
    from qcow2_forensics.text import snapshot_time

    epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    return epoch + dt.timedelta(microseconds=snapshot_time(entry.date_sec, entry.date_nsec) // 1000)
