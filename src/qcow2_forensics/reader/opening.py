"""Images become disks: snapshots chosen, keys derived, data and backing files found and opened."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ..errors import Qcow2Error, SnapshotNotFound
from ..format.header_rules import DISK
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..format.source import PathOrSource, as_source, close_source
from ..limits import DEFAULT_LIMITS, Limits
from ..text import cut
from .chain import MissingPolicy, Opener, note, unlocked
from .disk import Disk, EofPolicy
from .passphrases import Passphrase
from .states import LEFTOVER, Leftover, Rebuilt, SnapshotName, assuming, choices, choose, find_snapshot, replaced

if TYPE_CHECKING:
    from .resolver import Resolver
    from .vm_state import VmState

__all__ = [
    "MissingPolicy",
    "Passphrase",
    "SnapshotName",
    "find_snapshot",
    "latest_vm_state",
    "leftover_vm_state",
    "memory_snapshots",
    "open_disk",
    "open_image",
    "open_vm_state",
    "when_taken",
]


def open_image(origin: PathOrSource, *, limits: Limits = DEFAULT_LIMITS) -> Image:
    """Open the metadata of one file, leniently; raises :class:`NotQcow2` and OSError only."""
    return Image(origin, limits=limits)


def open_disk(
    origin: PathOrSource,
    snapshot: SnapshotName = None,
    passphrase: Passphrase = None,
    resolver: Resolver | None = None,
    limits: Limits = DEFAULT_LIMITS,
    *,
    eof: EofPolicy = "strict",
    missing: MissingPolicy = "refuse",
    follow: bool = True,
    assume: Mapping[str, str] | None = None,
    virtual_size: int | None = None,
) -> Disk:
    """Open the guest's disk as it is now, or as it was at ``snapshot``.

    ``snapshot`` is an entry, or a text as :mod:`.states` reads it: an ID or a name, ``"active"``,
    ``"index:N"`` for the place in the table, ``"deleted:X"``.
    ``passphrase`` is tried on every encrypted layer: one, several, or a function of the layer's
    name that returns them; without it such layers open locked and their reads raise
    :class:`Locked`. ``eof="zeros"`` reads what lies past the end of a file as
    zeros, as QEMU does, and counts it. ``missing`` says what a backing file that cannot be found
    or followed means: an error now, an error for each read that needs it, or zeros.
    ``follow=False`` opens this file alone: what it does not hold reads as zeros.
    ``assume`` reads the image as if its header had other fields, as ``{"compression": "zstd"}``.
    ``"recovered:N"`` is a state put together from what is left of a damaged image; ``virtual_size`` in bytes
    is used where nothing in the file gives the size of its disk.
    """
    opener = Opener(resolver, limits, eof, missing, follow)
    with ExitStack() as undo:
        image, rebuilt = _image(origin, snapshot, limits, assume, undo, virtual_size)
        if rebuilt is not None:
            if rebuilt.is_memory:
                raise Qcow2Error(f"{rebuilt.label} is memory alone, it has no disk")
            snapshot = None
        disk = opener.disk(image, image.source, find_snapshot(image, snapshot))
        undo.callback(disk.close)
        _note_recovered(disk, rebuilt)
        newer = sum(length for _, length in getattr(image.source, "may_be_newer", ()))
        if newer:  # a deleted snapshot: its clusters were the active state's to write
            note(disk, f"{cut(disk.name)}: {newer} bytes of this deleted snapshot may be newer than it", doubt=True)
        if passphrase is not None:
            disk.unlock(passphrase)
        undo.pop_all()
        return disk


def open_vm_state(
    origin: PathOrSource,
    snapshot: SnapshotName = None,
    passphrase: Passphrase = None,
    limits: Limits = DEFAULT_LIMITS,
    *,
    eof: EofPolicy = "strict",
    assume: Mapping[str, str] | None = None,
) -> VmState:
    """Open the VM state of a snapshot, of the latest that holds one when None.

    ``"leftover"`` is what the active state still maps past the end of the disk, though no snapshot lists it,
    ``"recovered:N"`` one that nothing maps any more.
    Neither backing nor data files are needed: QEMU stores VM state in the image itself. ``assume`` as in :func:`open_disk`.
    """
    from .vm_state import VmState, has_leftover  # here: reading a disk needs none of it

    with ExitStack() as undo:
        image, rebuilt = _image(origin, snapshot, limits, assume, undo)
        if rebuilt is not None:
            if not rebuilt.is_memory:
                raise Qcow2Error(f"{rebuilt.label} is a disk, it holds no memory")
            snapshot = Leftover()
        chosen = choose(image, snapshot)
        leftover = isinstance(chosen, Leftover)
        entry = None if leftover else latest_vm_state(image) if snapshot is None else find_snapshot(image, chosen)
        disk = Disk(
            image,
            snapshot=entry,
            eof=eof,
            unlocker=unlocked,
        )
        _note_recovered(disk, rebuilt)
        if passphrase is not None:
            disk.unlock(passphrase)
        if leftover and not has_leftover(disk):
            raise SnapshotNotFound(LEFTOVER, choices(image.snapshots))
        state = VmState(disk, leftover=leftover)
        undo.pop_all()
        return state


def _image(
    origin: PathOrSource,
    wanted: SnapshotName,
    limits: Limits,
    assume: Mapping[str, str] | None,
    undo: ExitStack,
    virtual_size: int | None = None,
) -> tuple[Image, Rebuilt | None]:
    """Open an image, or the recovered state that replaces its header and tables; ``undo`` closes the file if it was opened here."""
    source = as_source(origin)
    owned = source is not origin
    if owned:
        undo.callback(close_source, source)
    source = assuming(source, assume or {})
    rebuilt = replaced(source, wanted, virtual_size)
    if rebuilt is not None:
        source = rebuilt.over(source)
    return Image(source, limits=limits, owns_source=owned), rebuilt


def _note_recovered(disk: Disk, rebuilt: Rebuilt | None) -> None:
    if rebuilt is not None:
        disk.rebuilt = rebuilt
        note(disk, f"{cut(disk.name)}: {rebuilt.warning}", doubt=True)


def leftover_vm_state(image: Image) -> int | None:
    """Return the host offset of the VM state that the active state maps past the end of the disk.

    None where there is none, or where the tables that lead to it cannot be read.
    """
    from .vm_state import has_leftover, leftover_offset, leftover_start  # here: reading a disk needs none of it

    header = image.header
    try:
        image.require(DISK)
        if header.l1_size * header.l2_span <= leftover_start(image):
            return None  # the L1 table ends with the disk
        disk = Disk(image)
        return leftover_offset(disk) if has_leftover(disk) else None
    except Qcow2Error:
        return None


def latest_vm_state(image: Image) -> SnapshotEntry:
    """Return the snapshot with VM state that was taken last, by its date, then by its place."""
    held = memory_snapshots(image)
    if not held:
        image.require("snapshots")
        raise SnapshotNotFound("", choices(image.snapshots), lack="no snapshot holds memory; the image holds")
    return max(held, key=when_taken)


def memory_snapshots(image: Image) -> list[SnapshotEntry]:
    """Return the snapshots that hold memory, in the order of the table."""
    return [entry for entry in image.snapshots if entry.vm_state_size]


def when_taken(entry: SnapshotEntry) -> tuple[int, int, int]:
    """Return what sorts snapshots by their date, and those of one date by their place."""
    return entry.date_sec, entry.date_nsec, entry.index
