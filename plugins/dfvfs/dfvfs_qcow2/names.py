"""How a snapshot is named in path specifications and shown to people; knows nothing of dfVFS.

A snapshot of an image is the official dfVFS type ENCODED_STREAM over QCOW, with the encoding method

    qcow2-snapshot:<index>:<percent-encoded name>
    qcow2-snapshot:deleted:0x<offset>:<percent-encoded name>
    qcow2-snapshot:recovered:<number>:<confidence>

``index`` counts from 0 in the order of the snapshot table and is the key; of a deleted snapshot it
is the file offset of its former table entry, of a recovered state its number from 1. The name is there
for people, and to notice that the image changed; that of a recovered state is the word for how sure it is. The stock dfVFS and plaso read, print and store such a path specification, and
refuse to open it: they never show the wrong state.

People see positions that count from 1: ``--qcow_snapshots 2`` and ``QCOW2-SNAPSHOT2[...]`` are
index 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from qcow2_forensics import SnapshotEntry
from qcow2_forensics.text import printable

if TYPE_CHECKING:
    from qcow2_forensics.recovery import RecoveredState

PREFIX = "qcow2-snapshot:"
ARCHIVE = "qcow"  # what plaso's --archives calls an image inside another one
DATA_TYPE = "qcow2:snapshot"  # of plaso's events about snapshots
_DELETED, _RECOVERED = "deleted:", "recovered:"
_METHOD = re.compile(r"(?:deleted:0x([0-9a-f]{1,16})|recovered:([0-9]{1,9})|([0-9]{1,9})):(.*)", re.DOTALL)
_ENCODED_STREAM = "ENCODED_STREAM"  # dfVFS's type indicator
_QCOW = "QCOW"
_SHOWN_LOCATION = 256  # characters of an inner image's location
_SHOWN_NAME = 64  # characters of a name inside a display name
_SHOWN_IN_FOLDER = 32  # and inside a folder's name


@dataclass(frozen=True, slots=True)
class SnapshotKey:
    """Which snapshot, or recovered state, a path specification means."""

    place: int  # in the table, from 0; of a deleted one, the file offset of its former entry; else its number
    name: bytes
    deleted: bool = False
    recovered: bool = False

    @classmethod
    def of(cls, entry: SnapshotEntry) -> SnapshotKey:
        """Return the key of an entry; one that is in no table has the index -1."""
        deleted = entry.index < 0
        return cls(entry.offset if deleted else entry.index, entry.name_bytes, deleted)

    @classmethod
    def of_recovered(cls, state: RecoveredState) -> SnapshotKey:
        """Return the key of a recovered state."""
        return cls(state.number, state.confidence.label.encode(), recovered=True)

    @property
    def position(self) -> int | None:
        """The number people see, from 1; None for what is in no table."""
        return None if self.deleted or self.recovered else self.place + 1

    @property
    def encoding_method(self) -> str:
        """The encoding method that stands for the snapshot."""
        place = f"{_DELETED}{self.place:#x}" if self.deleted else str(self.place)
        if self.recovered:
            place = f"{_RECOVERED}{place}"
        return f"{PREFIX}{place}:{quote_from_bytes(self.name, safe='')}"

    def __str__(self) -> str:
        if self.recovered:
            return f"recovered state {self.place} ({printable(self.name)})"
        kind = f"deleted snapshot at {self.place:#x}" if self.deleted else f"snapshot {self.position}"
        return f"{kind} ({printable(self.name, _SHOWN_NAME)})"


def parse_encoding_method(method: str) -> SnapshotKey | None:
    """Return which snapshot an encoding method means; None when it is not one of ours."""
    if not method.startswith(PREFIX):
        return None
    match = _METHOD.fullmatch(method[len(PREFIX) :])
    if match is None:
        return None
    offset, number, index, name = match.groups()
    if number is not None:
        return SnapshotKey(int(number), unquote_to_bytes(name), recovered=True)
    if offset is not None:
        return SnapshotKey(int(offset, 16), unquote_to_bytes(name), deleted=True)
    return SnapshotKey(int(index), unquote_to_bytes(name))


def outwards(path_spec: Any) -> Iterator[Any]:
    """Yield a dfVFS path specification, its parent, and so on to the outermost; nothing for None."""
    while path_spec is not None:
        yield path_spec
        path_spec = path_spec.parent


def key_of(path_spec: Any) -> SnapshotKey | None:
    """Return which snapshot a path specification itself means, None when it is none of ours."""
    is_stream = path_spec.type_indicator == _ENCODED_STREAM
    return parse_encoding_method(path_spec.encoding_method) if is_stream else None


def snapshots_around(path_spec: Any) -> Iterator[tuple[SnapshotKey, Any]]:
    """Yield the snapshots that a dfVFS path specification lies in, innermost first, each with that of its image."""
    for spec in outwards(path_spec):
        key = key_of(spec)
        if key is not None:
            yield key, spec.parent


def qcow_path_specs(path_spec: Any) -> Iterator[Any]:
    """Yield the QCOW path specifications among a path specification and its parents, innermost first."""
    return (spec for spec in outwards(path_spec) if spec.type_indicator == _QCOW)


def snapshot_of(path_spec: Any) -> SnapshotKey | None:
    """Return the innermost snapshot that a dfVFS path specification lies in, None for none."""
    return next((key for key, _ in snapshots_around(path_spec)), None)


def image_name(qcow: Any) -> str:
    """Return the location of an image that is inside another file system or volume; empty for a file of the examiner's."""
    holder = next((spec for spec in outwards(qcow.parent) if getattr(spec, "location", None)), None)
    return str(holder.location) if holder is not None and holder.parent is not None else ""


def labels_of(path_spec: Any) -> str:
    """Return what the display name of a path specification starts with: inner images and snapshots, outermost first.

    ``QCOW2-SNAPSHOT2[during]:``, ``QCOW2-IMAGE[/images/web.qcow2]:QCOW2-SNAPSHOT1[before]:``
    """
    found: list[str] = []
    for spec in outwards(path_spec):
        key = key_of(spec)
        if key is not None:
            found.append(label(key))
        elif spec.type_indicator == _QCOW and (inner := image_name(spec)):
            found.append(f"QCOW2-IMAGE[{printable(inner, _SHOWN_LOCATION)}]")
    return "".join(f"{text}:" for text in reversed(found))


def label(key: SnapshotKey) -> str:
    """Return what display names start with.

    ``QCOW2-SNAPSHOT2[during]``, ``QCOW2-DELETED-0x190000[alpha]`` or ``QCOW2-RECOVERED1[likely]``.
    """
    kind = f"DELETED-{key.place:#x}" if key.deleted else _kind(key).upper()
    return f"QCOW2-{kind}[{printable(key.name, _SHOWN_NAME)}]"


def folder(key: SnapshotKey) -> str:
    """Return a folder name for files exported from a snapshot, safe on every file system."""
    name = key.name.decode("utf-8", "replace")[:_SHOWN_IN_FOLDER]
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)
    return f"qcow2-{_kind(key)}-{safe}"


def _kind(key: SnapshotKey) -> str:
    if key.recovered:
        return f"recovered{key.place}"
    return f"deleted-{key.place:#x}" if key.deleted else f"snapshot{key.position}"
