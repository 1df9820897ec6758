"""What a back-end provides for one volume: its records, and the bytes of each.

Listing goes on where it can: what could not be read is a sentence in ``problems``, as is what a log held. Reading content
does not: it raises ``OSError`` rather than give bytes that the disk does not hold.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

from ..errors import reason
from ..limits import FILE_SYSTEM_ENTRIES, FOLDER_DEPTH
from ..text import plural, printable
from .readers import Reader
from .records import FileRecord, Span, Volume
from .spans import Spans

CHUNK = 1 << 20  # of file content read at a time


class NoFileSystem(OSError):
    """No file system was found in any partition, nor on the whole disk."""

    @classmethod
    def found_in(cls, name: str, looked_at: Sequence[str], errors: Sequence[str]) -> NoFileSystem:
        """Return the error for a disk, with the partitions that were looked at and the first of the read errors."""
        where = f"; looked at {', '.join(looked_at)}" if looked_at else ""
        why = f"; {errors[0]}" if errors else ""
        return cls(f"no file system was found in {printable(name)}{where}{why}")


class Visits:
    """Bounds a walk through folders that several names lead to.

    A healthy folder has one name in use, and perhaps a deleted one. Crafted ones share folders, so that a few
    of them make paths without end. Names below a folder that was listed before may be no more than
    those listed for the first time, and some.
    """

    _SPARE = 10_000  # names listed again, however few there are

    def __init__(self) -> None:
        self._entered: set[int] = set()
        self._first = self._again = 0
        self.is_cut = False  # whether the bound was reached

    def count(self, again: bool) -> None:
        """Count a name; ``again`` below a folder that was listed before."""
        self._again += again
        self._first += not again

    def enter(self, inode: int, again: bool) -> bool:
        """Enter a folder; return whether what is in it is listed again."""
        again = again or inode in self._entered
        self._entered.add(inode)
        return again

    def is_exhausted(self, inode: int, again: bool) -> bool:
        """Whether a folder must not be entered any more."""
        return (again or inode in self._entered) and self._again > self._first + self._SPARE


class Log(NamedTuple):
    """What the log of a file system holds that is not at its place; ``sentence`` says so to the user.

    ``reader`` shows the file system with these changes, and ``replaced`` is where they belong on the disk. Without a
    reader they are not known, and ``is_incomplete``: names that are in use may be missing.
    """

    sentence: str
    is_incomplete: bool = False
    reader: Reader | None = None
    replaced: tuple[Span, ...] = ()


class FileSystem(ABC):
    """The file system of one volume in one state.

    ``errors`` and ``unreadable`` are the record of what could not be read of its disk, as a :class:`Reader` has it.
    """

    failures: ClassVar[tuple[type[Exception], ...]]  # what the library raises

    def __init__(self, volume: Volume, errors: Sequence[str], unreadable: Sequence[tuple[int, int]]) -> None:
        self.volume = volume
        self._errors = errors
        self._unreadable = unreadable
        self._visits = Visits()
        self.problems: list[str] = []
        self.is_incomplete = False  # names that are in use may be missing from the listing
        self.replaced: tuple[Span, ...] = ()  # of the disk, in place of which its journal is read
        self._unlisted: set[str] = set()  # folders in use whose names are not all known, without the slash at the end
        self._not_compared = 0

    def take_log(self, log: Log | None) -> None:
        """Keep what is known of the log of the file system."""
        if log is not None:
            self.problems.append(printable(f"{self.volume.prefix or 'the whole disk'}: {log.sentence}", limit=8192))
            self.is_incomplete |= log.is_incomplete
            self.replaced = log.replaced

    def note_problem(self, path: str, error: BaseException, *, deleted: bool = False) -> None:
        """Note what could not be listed; a ``deleted`` entry does not make the list of its folder incomplete."""
        if not deleted:
            self.is_incomplete = True
            self._unlisted.add(path.rstrip("/"))
        self.problems.append(printable(f"{self.volume.prefix}{path}: {first_line(error)}", limit=8192))

    def hides(self, path: str) -> bool:
        """Return whether a folder above a path could not be listed: the path is then counted as not compared."""
        places = (at for at, letter in enumerate(path) if letter == "/") if self._unlisted else ()
        hidden = any(path[:at] in self._unlisted for at in places)
        self._not_compared += hidden
        return hidden

    def all_problems(self) -> list[str]:
        """Return the problems, and how many names of another state were not compared."""
        if not self._not_compared:
            return self.problems
        names = plural(self._not_compared, "name")
        where = self.volume.prefix or "the whole disk"
        return [
            *self.problems,
            f"{printable(where)}: {names} of the other state not compared, in folders that are not listed",
        ]

    # --- listing -----------------------------------------------------------------------------

    def records(self, *, names: bool = False) -> Iterator[FileRecord]:
        """Yield every name, parents before children.

        With ``names`` also a record for each NTFS name attribute, for the times it holds.
        """
        self._visits = Visits()
        wanted = (record for record in self._listed() if names or not record.of_name)
        for count, record in enumerate(wanted):
            if count >= FILE_SYSTEM_ENTRIES:
                why = RecursionError(f"more than {FILE_SYSTEM_ENTRIES} entries: the rest is not listed")
                self.note_problem("/", why)
                return
            yield record

    @abstractmethod
    def _listed(self) -> Iterator[FileRecord]:
        """Yield every name, and every NTFS name attribute, parents before children."""

    def _is_too_deep(self, path: str, above: Sequence[int]) -> bool:
        """Whether a folder has too many ``above`` it to be listed, which is noted."""
        if len(above) <= FOLDER_DEPTH:
            return False
        self.note_problem(path, RecursionError(f"deeper than {FOLDER_DEPTH} directories"))
        return True

    def _is_listed_enough(self, path: str, inode: int, again: bool) -> bool:
        """Whether a folder must not be listed any more; noted where that is so for the first time."""
        if not self._visits.is_exhausted(inode, again):
            return False
        if not self._visits.is_cut:
            self._visits.is_cut = True
            why = "folders listed before have further names: what is in them is not listed again from here on"
            self.note_problem(path, OSError(why))
        return True

    # --- content -----------------------------------------------------------------------------

    def chunks(self, record: FileRecord) -> Iterator[bytes]:
        """Yield the content of a record, all of it, in pieces of one size; raises ``OSError``."""
        failed = len(self._unreadable)
        try:
            read = self._opened(record)
            done = 0
            while done < record.size:
                data = read(done, min(CHUNK, record.size - done))
                if not data:
                    raise OSError(f"the content ends at {done} of {record.size} bytes")
                if len(self._unreadable) > failed or self._holds_zeros(record):
                    raise OSError(f"part of the content cannot be read: {self._errors[-1]}")
                yield data
                done += len(data)
        except self.failures as error:
            raise OSError(first_line(error)) from error

    @abstractmethod
    def _opened(self, record: FileRecord) -> Callable[[int, int], bytes]:
        """Return what reads the content of a record: ``read(offset, length)``."""

    def _holds_zeros(self, record: FileRecord) -> bool:
        """Whether zeros were read in place of unreadable sectors of a record's content."""
        return bool(self._unreadable) and Spans(self._unreadable).overlap(record.spans) > 0

    def sha256(self, record: FileRecord) -> str:
        """Return the SHA-256 of the content in hex; raises ``OSError``."""
        digest = hashlib.sha256()
        for data in self.chunks(record):
            digest.update(data)
        return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, else its kind; not escaped."""
    return (reason(error) or type(error).__name__).splitlines()[0]
