"""Which state of an image is meant, and the words for the others."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, NamedTuple

from .common import warn
from .options import DISK

if TYPE_CHECKING:
    from qcow2_forensics import Image, Source
    from qcow2_forensics.format.snapshot_table import SnapshotEntry


class Choice(NamedTuple):
    """A snapshot's memory, or a disk: of a snapshot, or the active one when ``snapshot`` is None.

    ``name`` finds the snapshot again, also one that was deleted or that shares its ID, or a recovered state.
    """

    memory: bool
    snapshot: SnapshotEntry | None
    name: str = ""

    @property
    def is_leftover(self) -> bool:
        """Whether this is a VM state that no snapshot lists any more."""
        return self.memory and self.snapshot is None


LEFTOVER = "leftover"


def recovered(source: Source, wanted: str | None) -> Choice | None:
    """Return the recovered state that is named; None for any other state. The image needs no header."""
    from qcow2_forensics.reader import states

    word = wanted.removeprefix(DISK + ":") if wanted else ""
    rebuilt = states.replaced(source, word)
    return None if rebuilt is None else Choice(rebuilt.is_memory, None, word)


def choose(image: Image, wanted: str | None, title: str) -> Choice | None:
    """Return the state to analyse; None when none was named and no snapshot holds memory.

    ``wanted`` is a snapshot as :mod:`qcow2_forensics.reader.states` reads it, ``leftover``, ``disk`` or ``active`` for the disk as
    it is now, or ``disk:`` and a snapshot for its disk instead of its memory. Raises
    :class:`SnapshotNotFound`, also for a snapshot without memory that was asked for as memory.
    """
    from qcow2_forensics import SnapshotNotFound
    from qcow2_forensics.reader import states
    from qcow2_forensics.reader.opening import latest_vm_state
    from qcow2_forensics.reader.states import find_snapshot, refuse_if_named

    tell_problems(image, title)
    if wanted is None:
        held = [entry for entry in image.snapshots if entry.vm_state_size]
        if not held:
            return _leftover(image, title)
        latest = latest_vm_state(image)
        if len(held) > 1:
            warn(
                f"{title} holds {len(held)} snapshots with memory: {'; '.join(map(describe, held))}. "
                f"The latest is used, {describe(latest)}. Choose with --qcow2-snapshot ID before the plugin's name"
            )
        return Choice(True, latest, lasting_name(image, latest))
    word = wanted.lstrip("=")
    if word == DISK or word.startswith(DISK + ":"):
        refuse_if_named(image, wanted)
        entry = None if word == DISK else find_snapshot(image, word.removeprefix(DISK + ":"))
        return Choice(False, entry, "" if entry is None else lasting_name(image, entry))
    chosen = states.choose(image, wanted)
    if isinstance(chosen, states.Leftover):
        return Choice(True, None, leftover_name(image))
    entry = find_snapshot(image, chosen)
    if entry is None:
        return Choice(False, None)
    if not entry.vm_state_size:
        raise SnapshotNotFound(f"{wanted} with memory", memory_choices(image))
    return Choice(True, entry, lasting_name(image, entry))


def _leftover(image: Image, title: str) -> Choice | None:
    """Return the VM state that the active state maps behind the disk, with a warning; None when there is none."""
    from qcow2_forensics.reader.opening import leftover_vm_state

    if not leftover_vm_state(image):
        return None
    warn(
        f"{title}: no snapshot holds memory, but a VM state is still mapped behind the end of the disk. It is used; "
        "it is of a snapshot that was applied and deleted, or of a savevm that failed. For the disk give "
        "--qcow2-snapshot disk"
    )
    return Choice(True, None, leftover_name(image))


def leftover_name(image: Image) -> str:
    """Return what means the VM state that no snapshot lists, also where a snapshot is called the same."""
    from qcow2_forensics.reader import states

    return states.spelled(states.names_of(image.snapshots), LEFTOVER)


def lasting_name(image: Image, entry: SnapshotEntry) -> str:
    """Return what means this very snapshot in a saved configuration: its ID, or else its place."""
    from qcow2_forensics.reader.states import spellings

    return spellings(image.snapshots)(entry)


def tell_problems(image: Image, title: str) -> None:
    """Warn of snapshots that may be missing from the list, because their table cannot be read."""
    for problem in image.problems:
        if "snapshots" in problem.blocks:
            warn(f"{title}: {problem.error()}")


def memory_choices(image: Image) -> list[str]:
    """Return ``id (name)`` of the snapshots that hold memory."""
    from qcow2_forensics.reader.states import choices

    held = [entry for entry in image.snapshots if entry.vm_state_size]
    return list(choices(image.snapshots, held)) if held else []


def describe(entry: SnapshotEntry) -> str:
    """Return a snapshot in words that are safe on a terminal."""
    from qcow2_forensics.text import date_note, printable, quoted

    note = date_note(entry.date_nsec)
    when = f" of {snapshot_date(entry):%Y-%m-%d %H:%M:%S} UTC" + (f" ({note})" if note else "")
    return f"{printable(entry.id)} {quoted(printable(entry.name))}{when}"


def snapshot_date(entry: SnapshotEntry) -> dt.datetime:
    """Return when the host's clock says the snapshot was taken, to the microsecond."""
    from qcow2_forensics.text import snapshot_time

    epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    return epoch + dt.timedelta(microseconds=snapshot_time(entry.date_sec, entry.date_nsec) // 1000)
