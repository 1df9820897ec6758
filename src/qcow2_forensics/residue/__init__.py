"""Bytes nothing points at: leaked and free clusters, former tables, slack, hidden and deleted data.

::

    with residue("disk.qcow2") as found:
        for piece in found.pieces():          # runs: offset, length, kind, what it looks like
            found.open(piece).read()          # and streams
        found.deleted_snapshots()             # former states that can still be opened
    open_disk("disk.qcow2", snapshot="deleted:2")

Importing this package teaches :func:`~qcow2_forensics.open_disk` the ``deleted:`` selector.
"""

from __future__ import annotations

from ..chain import SNAPSHOT_SELECTORS
from .collect import Residue, deleted_snapshots, open_deleted, residue, select_deleted
from .deleted import DeletedSnapshot
from .scan import Piece

SNAPSHOT_SELECTORS.setdefault("deleted", select_deleted)

__all__ = ["DeletedSnapshot", "Piece", "Residue", "deleted_snapshots", "open_deleted", "residue"]
