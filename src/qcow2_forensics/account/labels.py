"""What a byte of a file can be: part of a structure, shown to a guest, or a remainder, each with an owner."""

from __future__ import annotations

import enum
from typing import NamedTuple

KEY_MATERIAL = "key material"  # of an inactive key slot, as the owner of a remainder


class ByteKind(enum.Enum):
    """What bytes are that something accounts for."""

    HEADER = "header field"
    EXTENSION = "header extension"
    BACKING_NAME = "backing file name"
    L1 = "L1 entries"
    L2 = "L2 entries"
    REFCOUNT_TABLE = "refcount table"
    REFCOUNT_BLOCK = "refcounts"
    SNAPSHOT_TABLE = "snapshot table"
    BITMAP_DIRECTORY = "bitmap directory"
    BITMAP_TABLE = "bitmap table"
    BITMAP_DATA = "bitmap bits"
    LUKS_HEADER = "LUKS header"
    KEY_MATERIAL = "LUKS key material"
    DATA = "guest data"
    COMPRESSED = "compressed data"
    VM_STATE = "VM state"
    DATA_OR_VM_STATE = "guest data or VM state"  # of a snapshot; which of the two only reading its tables tells


class Place(enum.Enum):
    """Where bytes are that nothing accounts for."""

    HEADER_SLACK = "after the header"
    HEADER_PADDING = "padding of the header"
    NAME_SLACK = "after the end of a name"
    UNUSED_FIELD = "field that nothing reads"
    UNUSED_EXTENSION = "header extension that nothing reads"
    L1_SLACK = "after an L1 table"
    TABLE_SLACK = "after a table"
    TABLE_PADDING = "padding between table entries"
    UNKNOWN_EXTRA = "extra data of unknown meaning"
    ENTRIES_PAST_END = "table entries past the end of the disk"
    REFCOUNTS_PAST_END = "refcounts past the end of the file"
    BITS_PAST_END = "bitmap bits past the end of the disk"
    LUKS_GAP = "between LUKS header and key material"
    LUKS_SLOT = "inactive key slot"
    PAST_STATE_END = "past the end of the state"
    ZERO_FLAGGED = "marked as zeros"
    SUBCLUSTER = "unallocated subclusters"
    COMPRESSED_SLACK = "between compressed clusters"
    FREE = "free"
    LEAKED = "leaked"
    TRAILING = "after the last cluster in use"
    UNMAPPED = "not mapped"
    NOT_WALKED = "not examined: the tables cannot be walked"


class Label(NamedTuple):
    """What a run of bytes is, and whose."""

    what: ByteKind | Place
    owner: str = ""

    @property
    def is_remainder(self) -> bool:
        return isinstance(self.what, Place)


class Labels:
    """Numbers labels, so that runs of bytes are arrays."""

    def __init__(self) -> None:
        self._numbers: dict[Label, int] = {}
        self.all: list[Label] = []

    def number(self, what: ByteKind | Place, owner: str = "") -> int:
        """Return the number of a label."""
        label = Label(what, owner)
        found = self._numbers.get(label)
        if found is None:
            found = self._numbers[label] = len(self.all)
            self.all.append(label)
        return found
