"""Bytes nothing points at: leaked and free clusters, former tables, slack, hidden and deleted data.

::

    with residue("disk.qcow2") as found:
        for piece in found.pieces():          # runs: offset, length, kind, what it looks like
            found.open(piece).read()          # and streams
        found.deleted_snapshots()             # snapshots that no table lists, many of which can be opened
        write(found, Path("residue"))         # a folder: every piece, and an index
    open_disk("disk.qcow2", snapshot="deleted:2")

``reader.states`` asks :func:`select_deleted` here what ``deleted:X`` means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import at_first_use
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from .model import Piece

if TYPE_CHECKING:
    from .inventory import Residue, deleted_snapshots, open_deleted, residue
    from .output import write
    from .snapshot_entries import DeletedSnapshot, choose_deleted


def select_deleted(image: Image, wanted: str) -> SnapshotEntry:
    """Return what ``deleted:`` means in :mod:`.reader.states`: the entry of a deleted snapshot."""
    from . import inventory

    return inventory.select_deleted(image, wanted)


__all__ = [
    "DeletedSnapshot",
    "Piece",
    "Residue",
    "choose_deleted",
    "deleted_snapshots",
    "open_deleted",
    "residue",
    "write",
]

# What needs the census and numpy is loaded on first use: triage needs only header slack.
__getattr__ = at_first_use(
    __name__,
    {
        "DeletedSnapshot": "snapshot_entries",
        "Residue": "inventory",
        "choose_deleted": "snapshot_entries",
        "deleted_snapshots": "inventory",
        "open_deleted": "inventory",
        "residue": "inventory",
        "write": "output",
    },
)
