"""What ``diff`` and ``timeline`` share: states by name, dates, and records as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from ..format.snapshot_table import SnapshotEntry
from ..text import printable

if TYPE_CHECKING:
    from ..files.records import FileRecord

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = 1_000_000_000  # nanoseconds


def state_labels(entries: Iterable[SnapshotEntry]) -> Callable[[SnapshotEntry | None], str]:
    """Return what says how to call a state: by its name, with the ID where several snapshots share the name."""
    names = Counter(entry.name or entry.id for entry in entries)

    def label(entry: SnapshotEntry | None) -> str:
        if entry is None:
            return "active"
        name = entry.name or entry.id
        return printable(f"{name} (ID {entry.id})" if names[name] > 1 or name == "active" else name)

    return label


def iso_time(nanoseconds: int) -> str | None:
    """Return a time as RFC 3339 in UTC, None for none or one that no calendar holds."""
    if not nanoseconds:
        return None
    try:
        return (_EPOCH + timedelta(microseconds=nanoseconds // 1000)).isoformat(timespec="microseconds")
    except OverflowError:
        return None


def short_time(nanoseconds: int) -> str:
    """Return a time for people: UTC, to the second."""
    shown = iso_time(nanoseconds)
    return shown[:19].replace("T", " ") if shown else "-"


def record_dict(record: FileRecord, sha256: str | None = None) -> dict[str, Any]:
    """Return a record for JSON; text from the file system is escaped."""
    times = record.times
    shown: dict[str, Any] = {
        "path": printable(record.full_path, limit=8192),
        "inode": record.inode,
        "address": record.address,
        "type": record.type,
        "allocated": record.allocated,
        "size": record.size,
        "mode": record.mode,
        "uid": record.uid,
        "gid": record.gid,
        "modified": iso_time(times.modified),
        "accessed": iso_time(times.accessed),
        "changed": iso_time(times.changed),
        "created": iso_time(times.created),
    }
    if record.link:
        shown["link"] = printable(record.link)
    if sha256 is not None:
        shown["sha256"] = sha256
    return shown
