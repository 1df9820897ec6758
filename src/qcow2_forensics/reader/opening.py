"""Images become disks: snapshots chosen, keys derived, data and backing files found and opened."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ..errors import Qcow2Error, SnapshotNotFound
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..format.source import PathOrSource, as_source
from ..limits import DEFAULT_LIMITS, Limits
from ..text import cut
from .chain import MissingPolicy, Opener, Passphrase, close_source, derive
from .disk import Disk, EofPolicy
from .vm_state import LEFTOVER, VmState, has_leftover, leftover_offset

if TYPE_CHECKING:
    from .resolver import Resolver

SnapshotName = str | int | SnapshotEntry | None

__all__ = [
    "MissingPolicy",
    "Passphrase",
    "find_snapshot",
    "latest_vm_state",
    "leftover_vm_state",
    "open_disk",
    "open_image",
    "open_vm_state",
]

# Further ways to name a snapshot, by prefix: "deleted:3" asks the function under "deleted".
SNAPSHOT_SELECTORS: dict[str, Callable[[Image, str], SnapshotEntry]] = {}
_SELECTOR_MODULES = {"deleted": "residue"}  # above this one: each adds its selector when imported


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
) -> Disk:
    """Open the guest's disk as it is now, or as it was at ``snapshot``.

    ``snapshot`` is an ID or a name (an ID wins), ``"index:N"`` for the table index, or an entry.
    ``passphrase`` is tried on every encrypted layer; without it such layers open locked and
    their reads raise :class:`Locked`. ``eof="zeros"`` reads what lies past the end of a file as
    zeros, as QEMU does, and counts it. ``missing`` says what a backing file that cannot be found
    or followed means: an error now, an error for each read that needs it, or zeros.
    ``follow=False`` opens this file alone: what it does not hold reads as zeros.
    """
    opener = Opener(resolver, limits, passphrase, eof, missing, follow)
    source = as_source(origin)
    with ExitStack() as undo:
        if source is not origin:
            undo.callback(close_source, source)
        image = Image(source, limits=limits, owns_source=source is not origin)
        disk = opener.disk(image, source, find_snapshot(image, snapshot))
        disk.notes = tuple(opener.notes)
        undo.pop_all()
        return disk


def open_vm_state(
    origin: PathOrSource,
    snapshot: SnapshotName = None,
    passphrase: Passphrase = None,
    limits: Limits = DEFAULT_LIMITS,
    *,
    eof: EofPolicy = "strict",
) -> VmState:
    """Open the VM state of a snapshot, of the latest that holds one when None.

    ``"leftover"`` is what the active state still maps behind the disk, though no snapshot lists it.
    Neither backing nor data files are needed: QEMU stores VM state in the image itself.
    """
    image = Image(origin, limits=limits)
    with ExitStack() as undo:
        undo.callback(image.close)
        leftover = snapshot == LEFTOVER and not _is_listed(image, LEFTOVER)
        entry = None if leftover else find_snapshot(image, snapshot) or latest_vm_state(image)
        disk = Disk(
            image,
            snapshot=entry,
            decryptor=derive(image, passphrase) if passphrase is not None else None,
            eof=eof,
            unlocker=lambda key: derive(image, key),
        )
        if leftover and not has_leftover(disk):
            raise SnapshotNotFound(LEFTOVER, snapshot_choices(image, []))
        state = VmState(disk, leftover=leftover)
        undo.pop_all()
        return state


def leftover_vm_state(image: Image) -> int | None:
    """Return the host offset of the VM state that the active state maps behind the disk.

    None where there is none, or where the tables that lead to it cannot be read.
    """
    try:
        disk = Disk(image)
        return leftover_offset(disk) if has_leftover(disk) else None
    except Qcow2Error:
        return None


def _is_listed(image: Image, text: str) -> bool:
    return any(text in (entry.id, entry.name) for entry in image.snapshots)


def find_snapshot(image: Image, wanted: SnapshotName) -> SnapshotEntry | None:
    """Return the snapshot ``wanted`` names, None for None; raises :class:`SnapshotNotFound`."""
    if wanted is None or (isinstance(wanted, SnapshotEntry) and wanted.index >= 0):
        return wanted
    if isinstance(wanted, SnapshotEntry):  # of no table: what it no longer owns must be refused
        return _selector("deleted")(image, f"{wanted.offset:#x}")
    text = str(wanted)
    prefix, _, rest = text.partition(":")
    by_id = [entry for entry in image.snapshots if entry.id == text]
    found = by_id or [entry for entry in image.snapshots if entry.name == text]
    if not found and (prefix in _SELECTOR_MODULES or prefix in SNAPSHOT_SELECTORS):
        return _selector(prefix)(image, rest)
    if not found and prefix == "index" and rest.isdecimal():
        found = [entry for entry in image.snapshots if entry.index == int(rest)]
    if len(found) == 1:
        return found[0]
    if not found:
        image.require("snapshots")  # perhaps it is in the part of the table that cannot be read
    raise SnapshotNotFound(text, snapshot_choices(image, found), ambiguous=bool(found))


def _selector(prefix: str) -> Callable[[Image, str], SnapshotEntry]:
    if prefix in _SELECTOR_MODULES:
        importlib.import_module(f"qcow2_forensics.{_SELECTOR_MODULES[prefix]}")
    return SNAPSHOT_SELECTORS[prefix]


def snapshot_choices(image: Image, entries: list[SnapshotEntry]) -> Iterator[str]:
    """Yield ``id (name)`` of the given snapshots, of all when none are given; index for equal IDs."""
    ids = Counter(entry.id for entry in image.snapshots)
    for entry in entries or image.snapshots:
        key = cut(entry.id) if ids[entry.id] == 1 else f"index:{entry.index}"
        yield f"{key} ({cut(entry.name)})"


def latest_vm_state(image: Image) -> SnapshotEntry:
    """Return the snapshot with VM state that was taken last, by its date, then by its place."""
    held = [entry for entry in image.snapshots if entry.vm_state_size]
    if not held:
        image.require("snapshots")
        raise SnapshotNotFound("with VM state", snapshot_choices(image, []))
    return max(held, key=lambda entry: (entry.date_sec, entry.date_nsec, entry.index))
