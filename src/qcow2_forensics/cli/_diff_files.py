"""The file part of ``diff``: lists two states, compares them, and prints what differs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..compare.ranges import Change, Difference
from ..files.changes import (
    Changed,
    FileChange,
    NotCompared,
    Recoverable,
    StateFiles,
    file_changes,
    marked_files,
    not_compared,
    outside_files,
)
from ..files.lines import body_line
from ..files.protocol import NoFileSystem
from ..files.records import Volume
from ..files.spans import Spans
from ..files.volumes import GuestVolumes
from ..render.difference_page import FileRow
from ..text import Column, aligned, printable, short_time
from ..text import size as format_size
from ._files import LONGEST_PATH, record_dict, unread_dict, volume_dict, volume_label, volumes_of
from ._sides import Sides
from .output import Progress


@dataclass
class Files:
    """What differs in files, what could not be compared, and how many changed bytes are in neither."""

    changes: list[Changed]
    volumes: list[Volume]
    unread: list[NotCompared]
    in_unread_volumes: int
    outside: int
    is_incomplete: bool
    notes: list[str]  # what could not be read, safe on a terminal
    is_marked: bool = False  # ranges are what a bitmap marks, of one state
    has_unreadable: bool = False  # some ranges are there because they could not be compared

    @property
    def exit_code(self) -> int:
        """2 where files may differ that are not listed."""
        return 2 if self.is_incomplete or any(item.hides_changes for item in self.unread) else 0

    @property
    def totals(self) -> dict[str, int]:
        """The counts of changed bytes that are in no file that is listed, for JSON."""
        return {
            "bytes_in_no_file": self.outside,
            "bytes_in_unread_volumes": self.in_unread_volumes,
        }

    @property
    def volume_dicts(self) -> list[dict[str, Any]]:
        """The volumes for JSON: those that are read, and those that are not with their changed bytes."""
        read = [{**volume_dict(volume), "read": True} for volume in self.volumes]
        unread = [
            {**unread_dict(item.unread), "read": False, "changed_bytes": item.changed_bytes} for item in self.unread
        ]
        return [*read, *unread]

    @property
    def change_dicts(self) -> Iterator[dict[str, Any]]:
        """The changes for JSON, one after the other."""
        return map(_change_dict, self.changes)

    def json_records(self) -> Iterator[dict[str, Any]]:
        """Yield the volumes and the changes as JSON lines have them."""
        yield from ({"record": "volume", **volume} for volume in self.volume_dicts)
        yield from ({"record": "file", **change} for change in self.change_dicts)

    def gaps(self) -> Iterator[str]:
        """Yield what keeps the list from being complete, in words that are safe on a terminal."""
        for item in self.unread:
            if item.hides_changes:
                where = volume_label(item.unread.volume)
                differ = "differ, or could not be compared, in" if self.has_unreadable else "differ in"
                amount = format_size(item.changed_bytes) if item.changed_bytes else "files may"
                yield f"{amount} {differ} {where}, whose files are not listed"
        if self.is_incomplete:
            yield "parts of the file systems could not be read: files may be missing from the list"

    def text_lines(self) -> Iterator[str]:
        """Yield the lines about files."""
        for item in self.unread:
            if item.changed_bytes or item.hides_changes:
                amount = f"{format_size(item.changed_bytes)} of it in " if item.changed_bytes else ""
                yield f"{amount}{volume_label(item.unread.volume)}: {_unread_reason(item)}"
        if self.outside and (self.changes or self.unread or self.is_marked):
            yield f"{format_size(self.outside)} of it in no file: file system structures or free space"
        in_table = any(change.shown.full_path.endswith("/$MFT") for change in self.changes)
        if self.is_marked and (self.outside or in_table):
            yield "names, times and owners may have been written too: they are in file system structures that are marked"
        if self.changes:
            yield from _table(self.changes)
        elif self.is_marked:
            yield "no file that is listed has blocks in marked ranges"
        elif self.exit_code:
            yield "no files differ where files could be listed"
        else:
            yield "no files differ"

    def page_rows(self) -> Iterator[FileRow]:
        """Yield the changes as rows of the page."""
        for change, cells in zip(self.changes, _rows(self.changes), strict=True):
            digests = zip(("before", "after"), change.sha256, strict=True)
            yield FileRow(cells[0], cells, tuple((state, digest) for state, digest in digests if digest is not None))

    def body_lines(self, before: str, after: str) -> Iterator[str]:
        """Yield the changes as lines of a body file; ``before`` and ``after`` are the labels of the states."""
        for change in self.changes:
            state = before if change.change == FileChange.REMOVED else after
            yield body_line(
                change.shown, f"[{change.change}, {printable(state)}] {printable(change.shown.volume.prefix)}"
            )


def compare_files(args: argparse.Namespace, sides: Sides, found: Sequence[Difference]) -> Files:
    """Return what differs in the files of two states, or which files are in ranges that a bitmap marks."""
    states = [sides.after] if sides.is_marked else [sides.before, sides.after]
    volumes: list[GuestVolumes] = []
    empty: list[NoFileSystem] = []
    for label, path, disk in states:
        try:
            volumes.append(volumes_of(args, disk, f"{path}, state {label}"))
        except NoFileSystem as error:
            volumes.append(GuestVolumes())
            empty.append(error)
    if len(empty) == len(states):
        raise empty[0]
    notes = [str(nothing) for nothing in empty]
    listings: list[StateFiles] = []
    for (label, _, _), each in zip(states, volumes, strict=True):
        with Progress(f"list {label}", 0, unit="names") as progress:
            listings.append(StateFiles(each, progress.advance))
    old, new = listings[0], listings[-1]
    ranges = [(item.offset, item.length) for item in found]
    if sides.is_marked:
        changed = list(marked_files(new, ranges, hashed=args.hash))
    else:
        changed = list(file_changes(old, new, ranges, hashed=args.hash))
    for (label, _, _), each, listing in zip(states, volumes, listings, strict=True):
        for problem in (*each.read_errors, *listing.problems):
            notes.append(f"{printable(label)}: {problem}")
    unread = not_compared(old, new, ranges)
    read = {system.volume.place: system.volume for each in volumes for system in each.systems}
    return Files(
        changed,
        [read[place] for place in sorted(read)],
        unread,
        Spans(ranges).overlap(Spans(span for item in unread for span in item.unread.spans)),
        outside_files(old, new, ranges),
        any(each.is_incomplete for each in volumes),
        notes,
        sides.is_marked,
        any(item.change is Change.UNREADABLE for item in found),
    )


# --- JSON ------------------------------------------------------------------------------------------


def _change_dict(change: Changed) -> dict[str, Any]:
    """Return one change for JSON."""
    record = change.shown
    shown: dict[str, Any] = {
        "change": str(change.change),
        "path": record.full_path,
        "inode": record.inode,
        "volume": volume_dict(record.volume),
        "fields": list(change.fields),
        "changed_bytes": change.changed_bytes,
        "recoverable": None if change.recoverable is None else str(change.recoverable),
    }
    for key, side, digest in zip(("before", "after"), (change.before, change.after), change.sha256, strict=True):
        shown[key] = None if side is None else record_dict(side, digest)
    return {**shown, "note": change.note} if change.note else shown


# --- text ------------------------------------------------------------------------------------------

_COLUMNS = (
    Column("change", "change"),
    Column("path", "path"),
    Column("inode", "inode", right=True),
    Column("size", "size", right=True),
    Column("modified", "modified (UTC)"),
    Column("what", "what"),
)
_LEFT = {Recoverable.YES: "content recoverable", Recoverable.PARTLY: "content partly recoverable"}


def _unread_reason(item: NotCompared) -> str:
    return f"its files are not listed: {item.unread.why}" if item.unread.holds_files else item.unread.why


def _table(changes: Sequence[Changed]) -> Iterator[str]:
    for line, change in zip(aligned(_rows(changes), _COLUMNS), (None, *changes), strict=True):
        yield line
        for name, digest in zip(("before", "after"), change.sha256 if change else (), strict=False):
            if digest is not None:
                yield f"    sha256 {name:6} {digest}"


def _rows(changes: Iterable[Changed]) -> Iterator[tuple[str, ...]]:
    for change in changes:
        record = change.shown
        sizes = [str(side.size) for side in (change.before, change.after) if side is not None]
        gone = change.change in (FileChange.REMOVED, FileChange.DELETED)
        size = str(record.size) if gone else " -> ".join(dict.fromkeys(sizes))
        what = ", ".join(change.fields)
        if "content" in change.fields and change.changed_bytes:
            what = what.replace("content", f"content ({change.changed_bytes} bytes)", 1)
        if change.change == FileChange.MARKED:
            what = f"{change.changed_bytes} bytes in marked ranges"
        if change.recoverable is not None:
            what = _LEFT.get(change.recoverable, "content gone")
        path = printable(record.full_path, LONGEST_PATH)
        if change.change == FileChange.RENAMED and change.before is not None:
            path = f"{printable(change.before.full_path, LONGEST_PATH)} -> {path}"
        shown = printable("; ".join(part for part in (what, change.note) if part))
        yield str(change.change), path, record.address, size, short_time(record.times.modified), shown
