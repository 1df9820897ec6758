"""How a snapshot is named in path specifications and shown to people; knows nothing of dfVFS.

A snapshot of an image is the official dfVFS type ENCODED_STREAM over QCOW, with the encoding method

    qcow2-snapshot:<index>:<percent-encoded name>

``index`` counts from 0 in the order of the snapshot table and is the key; the name is there for
people, and to notice that the table changed. The stock dfVFS and plaso read, print and store such
a path specification, and refuse to open it: they never show the wrong state.

People see positions that count from 1: ``--qcow_snapshots 2`` and ``QCOW2-SNAPSHOT2[...]`` are
index 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from qcow2_forensics.errors import printable

PREFIX = "qcow2-snapshot:"
_ENCODED_STREAM = "ENCODED_STREAM"  # dfVFS's type indicator
_SHOWN_NAME = 64  # characters of a name inside a display name
_SHOWN_IN_FOLDER = 32  # and inside a folder's name


@dataclass(frozen=True, slots=True)
class SnapshotKey:
    """Which snapshot a path specification means."""

    index: int  # from 0, in table order
    name: bytes

    @property
    def position(self) -> int:
        """The number people see, from 1."""
        return self.index + 1


def encoding_method(index: int, name: bytes) -> str:
    """Return the encoding method that stands for a snapshot."""
    return f"{PREFIX}{index}:{quote_from_bytes(name, safe='')}"


def parse_encoding_method(method: str) -> SnapshotKey | None:
    """Return which snapshot an encoding method means; None when it is not one of ours."""
    if not method.startswith(PREFIX):
        return None
    index, colon, name = method[len(PREFIX) :].partition(":")
    if not colon or not index.isascii() or not index.isdigit() or len(index) > 9:
        return None
    return SnapshotKey(int(index), unquote_to_bytes(name))


def snapshot_of(path_spec: Any) -> SnapshotKey | None:
    """Return the innermost snapshot that a dfVFS path specification lies in, None for none."""
    while path_spec is not None:
        if path_spec.type_indicator == _ENCODED_STREAM:
            key = parse_encoding_method(path_spec.encoding_method)
            if key is not None:
                return key
        path_spec = path_spec.parent
    return None


def label(key: SnapshotKey) -> str:
    """Return what display names start with, such as ``QCOW2-SNAPSHOT2[during-incident]``."""
    return f"QCOW2-SNAPSHOT{key.position}[{printable(key.name, _SHOWN_NAME)}]"


def folder(key: SnapshotKey) -> str:
    """Return a folder name for files exported from a snapshot, safe on every file system."""
    name = key.name.decode("utf-8", "replace")[:_SHOWN_IN_FOLDER]
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)
    return f"qcow2-snapshot{key.position}-{safe}"
