"""Which files two states of one disk differ in.

Names are matched by path, then by what stays when a file is renamed. Content is compared by the changed disk ranges
where both states keep it in the same place, and read only where that says nothing. What is reported is what was seen.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from ..errors import reason
from ..text import printable
from .records import FileRecord, Place, Span, Times
from .renames import renames
from .spans import Spans
from .volumes import GuestVolumes, Unread


class FileChange(enum.StrEnum):
    """What became of a file between the first state and the second."""

    ADDED = "added"
    REMOVED = "removed"
    RENAMED = "renamed"
    CONTENT = "content changed"
    METADATA = "metadata changed"
    MARKED = "marked"  # of one state: its blocks, or the record with its content, are in ranges that a bitmap marks
    DELETED = "deleted"  # a deleted entry that the first state does not have, allocated or deleted


class Recoverable(enum.StrEnum):
    """How much of the content of a removed file the second state still holds."""

    YES = "yes"
    PARTLY = "partly"
    NO = "no"


@dataclass(slots=True)
class Changed:
    """One file: its record in each state that has it, and in what they differ.

    ``fields`` names what differs: ``content``, ``path``, ``inode``, ``size``, ``mode``, ``uid``,
    ``gid``, ``link``, ``modified``, ``accessed``, ``changed``, ``created``. ``after`` of a removed
    file is the deleted entry that still has its inode, if there is one. ``changed_bytes`` counts the
    bytes of the changed ranges in its blocks, slack included. ``note`` says why content could not be
    compared.
    """

    change: FileChange
    before: FileRecord | None
    after: FileRecord | None
    fields: tuple[str, ...] = ()
    recoverable: Recoverable | None = None
    note: str = ""
    changed_bytes: int = 0
    sha256: tuple[str | None, str | None] = field(default=(None, None))

    @property
    def shown(self) -> FileRecord:
        """The record to show: of the later state, but of the earlier one for what was removed."""
        record = self.before if self.change is FileChange.REMOVED else self.after or self.before
        if record is None:
            raise ValueError("a change without a record")
        return record


class StateFiles:
    """The volumes of one state and the records of those that are read, listed once."""

    def __init__(self, volumes: GuestVolumes, progress: Callable[[int], None] | None = None) -> None:
        self.systems = {system.volume.place: system for system in volumes.systems}
        self.unread = {item.volume.place: item for item in volumes.unread}
        self.spans = volumes.spans
        hiding = [item for item in volumes.unread if item.may_hold_files]
        self._hiding_places = {item.volume.place for item in hiding}
        self._hiding_spans = Spans(span for item in hiding for span in item.spans)
        self.records: dict[Place, list[FileRecord]] = {}
        for place, system in self.systems.items():
            listed: list[FileRecord] = []
            for record in system.records():
                listed.append(record)
                if progress is not None:
                    progress(1)
            self.records[place] = listed

    @property
    def problems(self) -> list[str]:
        """What could not be listed or read."""
        return [problem for system in self.systems.values() for problem in system.all_problems()]

    @property
    def replaced(self) -> Iterator[Span]:
        """Ranges of the disk in place of which journals are read: bytes may differ there that are equal on the disk."""
        return (span for system in self.systems.values() for span in system.replaced)

    def chunks(self, record: FileRecord) -> Iterator[bytes]:
        """Yield the content of one of the records; raises ``OSError``."""
        return self.systems[record.volume.place].chunks(record)

    def hides_name(self, place: Place, path: str) -> bool:
        """Whether a file may be here under a name, because a folder above it could not be listed; it is counted."""
        return place in self.systems and self.systems[place].hides(path)

    def hides(self, other: StateFiles, place: Place) -> bool:
        """Return whether the files that another state has at a place may be in a volume of this one that is not read.

        That volume may be at the same place, or lie over a part of it, as the whole disk does without its table.
        """
        if place in self.systems:
            return False
        return place in self._hiding_places or self._hiding_spans.overlap(other.spans[place]) > 0


class NotCompared(NamedTuple):
    """A volume whose files are not known in one of the states.

    ``changed_bytes`` counts what differs in it; ``is_read_once`` says that files are known of one state there.
    """

    unread: Unread
    changed_bytes: int
    is_read_once: bool = False

    @property
    def hides_changes(self) -> bool:
        """Whether files may differ here."""
        return self.unread.holds_files and (self.changed_bytes > 0 or self.is_read_once or self.unread.is_elsewhere)


def not_compared(before: StateFiles, after: StateFiles, ranges: Iterable[tuple[int, int]]) -> list[NotCompared]:
    """Return the volumes that could not be compared file by file, in the order of the disk."""
    touched = Spans(ranges)
    found = []
    hidden = dict(_hidden(before, after))
    hidden_spans = Spans(span for spans in hidden.values() for span in spans)
    for place in sorted({*before.unread, *after.unread}):
        items = [state.unread[place] for state in (after, before) if place in state.unread]
        spans = Spans(span for item in items for span in item.spans)
        shown = next((item for item in items if not item.blank), items[0])
        read = [state for state in (before, after) if place in state.systems]
        if not shown.blank or not read:  # what was blank and now has files is compared
            is_read_once = place in hidden or hidden_spans.overlap(spans) > 0
            found.append(NotCompared(shown, touched.overlap(spans), is_read_once))
    return found


def _hidden(before: StateFiles, after: StateFiles) -> Iterator[tuple[Place, Sequence[Span]]]:
    """Yield the volumes whose files are known of one state, and not of the other: they are not compared."""
    for one, other in ((before, after), (after, before)):
        yield from ((place, other.spans[place]) for place in other.systems if one.hides(other, place))


def file_changes(
    before: StateFiles, after: StateFiles, ranges: Iterable[tuple[int, int]], *, hashed: bool = False
) -> Iterator[Changed]:
    """Yield what changed, volume by volume; ``ranges`` are the (offset, length) that differ.

    Volumes whose files are not known in one of the states are left out: see :func:`not_compared`. With ``hashed``
    each change of a file carries the SHA-256 of both versions.
    """
    changed = list(ranges)
    touched = Spans(changed)
    may_differ = Spans((*changed, *before.replaced, *after.replaced))
    for place in sorted({*before.systems, *after.systems} - dict(_hidden(before, after)).keys()):
        pair = _Pair(before, after, place, may_differ)
        for change in pair.changes():
            change.changed_bytes = touched.overlap(Spans(_spans(change.before, change.after)))
            if hashed:
                change.sha256 = pair.hashes(change)
            yield change


def marked_files(state: StateFiles, ranges: Iterable[tuple[int, int]], *, hashed: bool = False) -> Iterator[Changed]:
    """Yield the files and folders in use whose blocks are in ranges that a bitmap marks as written.

    Content that is inside a record of NTFS counts as changed where that record is marked.

    A range that was written may hold parts of several files, and what it held before is not known.
    """
    touched = Spans((*ranges, *state.replaced))
    for place in sorted(state.systems):
        for record in state.records[place]:
            if not record.is_kept:
                continue
            changed_bytes = touched.overlap(Spans((*record.spans, *record.metadata)))
            if changed_bytes:
                digest = _digest(state, record) if hashed else None
                note = "its content is in its file system record" if record.metadata else ""
                yield Changed(FileChange.MARKED, None, record, (), None, note, changed_bytes, (None, digest))


def outside_files(before: StateFiles, after: StateFiles, ranges: Iterable[tuple[int, int]]) -> int:
    """Return how many bytes of the ranges are in no file and no unread volume of either state.

    They are structures of file systems and of the disk, and free space.
    """
    touched = Spans(ranges)
    states = (before, after)
    listed = (record for state in states for records in state.records.values() for record in records)
    files = (span for record in listed if record.is_kept for span in record.spans)
    unread = (span for state in states for item in state.unread.values() for span in item.spans)
    return touched.total - touched.overlap(Spans(chain(files, unread)))


def _spans(*records: FileRecord | None) -> Iterator[Span]:
    for record in records:
        if record is not None:
            yield from record.spans


Key = tuple[str, str, int]  # path and stream, and the inode where one of the states has the path more than once


class _Pair:
    """One partition in both states."""

    def __init__(self, before: StateFiles, after: StateFiles, place: Place, touched: Spans) -> None:
        self._before = before
        self._after = after
        self._place = place
        self._touched = touched
        old, new = before.records.get(place, []), after.records.get(place, [])
        repeated = _repeated(old) | _repeated(new)
        self._old = _allocated(old, repeated)
        self._new = _allocated(new, repeated)
        self._old_deleted = [record for record in old if record.is_deleted]
        self._new_deleted = [record for record in new if record.is_deleted]
        self._in_use = Spans(span for record in new if record.allocated for span in record.spans)

    def changes(self) -> Iterator[Changed]:
        removed = {key: record for key, record in self._old.items() if key not in self._new}
        added = {key: record for key, record in self._new.items() if key not in self._old}
        renamed = dict(renames(removed, added))
        for key, new in self._new.items():
            old = self._old.get(key)
            if old is None:
                source = renamed.get(key)
                if source is None:
                    if not self._before.hides_name(self._place, new.path):
                        yield Changed(FileChange.ADDED, None, new)
                else:
                    fields, note = self._differing(removed[source], new)
                    yield Changed(FileChange.RENAMED, removed[source], new, ("path", *fields), note=note)
                continue
            fields, note = self._differing(old, new)
            if "content" in fields or note:
                yield Changed(FileChange.CONTENT, old, new, fields, note=note)
            elif fields:
                yield Changed(FileChange.METADATA, old, new, fields)
        found_again = set(renamed.values())
        gone = {
            key: old
            for key, old in removed.items()
            if key not in found_again and not self._after.hides_name(self._place, old.path)
        }
        yield from self._removed(gone)
        yield from self._newly_deleted(gone)

    # --- what is gone ------------------------------------------------------------------------

    def _removed(self, gone: dict[Key, FileRecord]) -> Iterator[Changed]:
        left = {_identity(record): record for record in self._new_deleted if not record.in_use}
        for record in gone.values():
            remains = left.get(_identity(record))
            yield Changed(FileChange.REMOVED, record, remains, recoverable=self._still_there(record, remains))

    def _still_there(self, record: FileRecord, remains: FileRecord | None) -> Recoverable | None:
        """How much of a removed file's bytes the second state still holds where they were."""
        if record.type != "r" or not record.size:
            return None
        total = sum(length for _, length in record.spans)
        if total:
            return _share(total - self._touched.overlap(record.spans), total)
        if remains is not None and remains.resident and remains.size == record.size:
            try:
                return Recoverable.NO if self._bytes_differ(record, remains) else Recoverable.YES
            except OSError:
                return None
        return Recoverable.NO if record.resident else None

    def _newly_deleted(self, gone: dict[Key, FileRecord]) -> Iterator[Changed]:
        """Deleted entries of the second state whose files the first state does not have."""
        known = {(record.path, _identity(record)) for record in self._old_deleted}
        reported = {_identity(record) for record in gone.values()}
        inodes = {_identity(record) for record in self._old.values()}
        for record in self._new_deleted:
            identity = _identity(record)
            if (record.path, identity) in known or identity in reported or not record.inode:
                continue
            if self._before.hides_name(self._place, record.path):
                continue
            if identity in inodes and not record.path.startswith("/$OrphanFiles/"):
                continue  # an old name of a file that is still there
            yield Changed(FileChange.DELETED, None, record, recoverable=self._free(record))

    def _free(self, record: FileRecord) -> Recoverable | None:
        """How much of a deleted file's blocks nothing else uses."""
        if record.type not in "r-":
            return None
        if record.in_use or not record.size:
            return Recoverable.NO
        total = sum(length for _, length in record.spans)
        if not total:
            return Recoverable.YES if record.resident else Recoverable.NO
        return _share(total - self._in_use.overlap(record.spans), total)

    # --- what is different ---------------------------------------------------------------------

    def _differing(self, old: FileRecord, new: FileRecord) -> tuple[tuple[str, ...], str]:
        fields: list[str] = []
        note = ""
        try:
            if self._content_differs(old, new):
                fields.append("content")
        except OSError as error:
            note = f"content not compared: {reason(error)}"
        for name in ("type", "inode", "size", "mode", "uid", "gid", "link"):
            if getattr(old, name) != getattr(new, name):
                fields.append(name)
        fields += [name for name in Times._fields if getattr(old.times, name) != getattr(new.times, name)]
        return tuple(fields), note

    def _content_differs(self, old: FileRecord, new: FileRecord) -> bool:
        if old.type != "r" or new.type != "r":
            return old.type != new.type or old.link != new.link
        if old.size != new.size:
            return True
        if not old.size or (old.sparse and new.sparse):
            return False
        placed = old.spans == new.spans and bool(old.spans) and not old.resident and not new.resident
        if placed and not self._touched.overlap(old.spans):
            return False
        return self._bytes_differ(old, new)

    def _bytes_differ(self, old: FileRecord, new: FileRecord) -> bool:
        # Both are read in pieces of the same size, so that differing files end the reading early.
        pairs = zip(self._before.chunks(old), self._after.chunks(new), strict=True)
        return any(left != right for left, right in pairs)

    def hashes(self, change: Changed) -> tuple[str | None, str | None]:
        """Return the SHA-256 of both versions, None for what is not a file or cannot be read."""
        return _digest(self._before, change.before), _digest(self._after, change.after)


def _digest(state: StateFiles, record: FileRecord | None) -> str | None:
    if record is None or record.type != "r":
        return None
    if not record.allocated and (record.in_use or not record.size):
        return None  # another file's content, or none that is still known
    system = state.systems[record.volume.place]
    try:
        return system.sha256(record)
    except OSError as error:
        system.problems.append(printable(f"{record.full_path}: not hashed: {reason(error)}", limit=8192))
        return None


def _allocated(records: Sequence[FileRecord], repeated: set[tuple[str, str]]) -> dict[Key, FileRecord]:
    found: dict[Key, FileRecord] = {}
    for record in records:
        if record.is_kept:
            name = record.path, record.stream
            found.setdefault((*name, record.inode if name in repeated else 0), record)
    return found


def _repeated(records: Sequence[FileRecord]) -> set[tuple[str, str]]:
    """Return the names that more than one file in use has: damage makes some, and letters that no library decodes."""
    seen: dict[tuple[str, str], int] = {}
    found = set()
    for record in records:
        if record.is_kept:
            name = record.path, record.stream
            if seen.setdefault(name, record.inode) != record.inode:
                found.add(name)
    return found


def _identity(record: FileRecord) -> tuple[int, str]:
    return record.inode, record.stream


def _share(left: int, total: int) -> Recoverable:
    return Recoverable.YES if left == total else Recoverable.PARTLY if left else Recoverable.NO
