"""What a piece of residue is; nothing here needs numpy, so triage can use it."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = (
    "free",
    "leaked",
    "trailing",
    "zero-flagged",
    "subcluster",
    "compressed-slack",
    "header-slack",
    "header-padding",
    "l1-slack",
    "table-slack",
    "beyond-disk",
    "unmapped",
    "name-slack",
    "unread-field",
    "entry-slack",
    "luks-slack",
    "state-tail",
    "unaccounted",
)  # of pieces, in the words of docs/residue.md


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of bytes nothing points at, of one kind and one appearance.

    ``kind`` says why it is residue (one of :data:`KINDS`), ``looks`` what it looks like: ``data``, ``text``, ``stream``,
    ``l1``, ``l2``, ``refcount-table``, ``refcounts``, ``snapshot-table``, ``bitmap-directory`` or ``vm-state``. Offsets are
    in ``file`` ("" is the image itself).
    """

    offset: int
    length: int
    kind: str
    looks: str
    nonzero: int
    entropy: float
    signature: str = ""
    first: str = ""  # the first 16 bytes in hexadecimal
    guest_offset: int | None = None
    snapshot: str = ""
    file: str = ""
    entries: int = 0  # of a table
    intact: int = 0  # of its first targets: nothing live uses them and they hold bytes
    zero_only: bool = False  # an L2 table of zero flags alone
