"""Which state of an image is meant where memory is wanted: a snapshot's memory, one that no snapshot lists, or a disk.

::

    nothing named       the latest snapshot with memory, or else a VM state that is still mapped past the end of the disk
    a state             as :mod:`.states` reads it; a snapshot must hold memory
    disk, disk:STATE    the virtual disk itself, as it is now or as it was
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from ..errors import SnapshotNotFound
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..format.source import Source
from ..text import quoted
from . import states
from .opening import latest_vm_state, leftover_vm_state, memory_snapshots, when_taken

DISK: Final = "disk"


class MemoryChoice(NamedTuple):
    """A memory, or a disk: of a snapshot, or else of a state that no snapshot lists, or the active one.

    ``name`` is how to choose this state again: a snapshot by its ID or else its place, a recovered state by its name,
    "" for the active disk.
    """

    is_memory: bool
    snapshot: SnapshotEntry | None
    name: str = ""

    @property
    def is_unlisted(self) -> bool:
        """Whether this is a memory that no snapshot lists."""
        return self.is_memory and self.snapshot is None


def leftover_name(image: Image) -> str:
    """Return how to choose the VM state past the end of the disk that no snapshot lists, also where a snapshot has that name."""
    return states.spelled(states.names_of(image.snapshots), states.LEFTOVER)


def recovered_memory(source: Source, wanted: str | None, virtual_size: int | None = None) -> MemoryChoice | None:
    """Return the recovered state that is named; None for any other state. The image needs no header."""
    word = wanted.removeprefix(f"{DISK}:") if wanted else ""
    rebuilt = states.replaced(source, word, virtual_size)
    return None if rebuilt is None else MemoryChoice(rebuilt.is_memory, None, word)


def choose_memory(image: Image, wanted: str | None) -> MemoryChoice | None:
    """Return the state to analyse; None when none was named and there is no memory.

    Raises :class:`SnapshotNotFound`, also for a snapshot without memory that was asked for as memory.
    """
    held = memory_snapshots(image)
    if wanted is None:
        if held:
            latest = latest_vm_state(image)
            return MemoryChoice(True, latest, _name(image, latest))
        return MemoryChoice(True, None, leftover_name(image)) if leftover_vm_state(image) is not None else None
    word = wanted.lstrip("=")
    if word == DISK or word.startswith(f"{DISK}:"):
        states.refuse_if_named(image, wanted)
        entry = None if word == DISK else states.find_snapshot(image, word.removeprefix(f"{DISK}:"))
        return MemoryChoice(False, entry, "" if entry is None else _name(image, entry))
    chosen = states.choose(image, wanted)
    if isinstance(chosen, states.Leftover):
        return MemoryChoice(True, None, leftover_name(image))
    entry = states.find_snapshot(image, chosen)
    if entry is None:
        return MemoryChoice(False, None)
    if not entry.vm_state_size:
        raise SnapshotNotFound(
            wanted, _choices(image, held), lack=f"the state {quoted(wanted)} holds no memory; snapshots that do"
        )
    return MemoryChoice(True, entry, _name(image, entry))


def memory_before(image: Image, later: SnapshotEntry | None, wanted: str | None) -> SnapshotEntry:
    """Return the snapshot with memory that is named, or else the latest one taken before ``later``.

    Raises :class:`SnapshotNotFound`.
    """
    held = memory_snapshots(image)
    entry: SnapshotEntry | None
    if wanted:
        entry = states.find_snapshot(image, wanted)
    else:
        before = [item for item in held if later is not None and when_taken(item) < when_taken(later)]
        entry = max(before, key=when_taken, default=None)
    if entry is None or not entry.vm_state_size:
        lack = f"the state {quoted(wanted)} holds no memory" if wanted else "no earlier snapshot holds memory"
        raise SnapshotNotFound(wanted or "", _choices(image, held), lack=f"{lack}; snapshots that do")
    return entry


def _name(image: Image, entry: SnapshotEntry) -> str:
    return states.spellings(image.snapshots)(entry)


def _choices(image: Image, held: Sequence[SnapshotEntry]) -> list[str]:
    return list(states.choices(image.snapshots, held)) if held else []
