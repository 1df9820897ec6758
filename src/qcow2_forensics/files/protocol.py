"""What a back-end gives of one volume: its records, and the bytes of each.

Listing goes on where it can: what could not be read is a sentence in ``problems``. Reading content
does not: it raises ``OSError`` rather than give bytes that the disk does not hold.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

from .records import FileRecord, Volume

ENTRIES_LISTED = 20_000_000  # records of one file system; more is a damaged file system


class NoFileSystem(OSError):
    """No file system was found in any partition, nor on the whole disk."""


class FileSystem(ABC):
    """The file system of one volume in one state."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.problems: list[str] = []
        self.is_incomplete = False  # names that are in use may be missing from the listing

    @abstractmethod
    def records(self, *, names: bool = False) -> Iterator[FileRecord]:
        """Yield every name, parents before children.

        With ``names`` also a record for each NTFS name attribute, for the times it holds.
        """

    @abstractmethod
    def chunks(self, record: FileRecord) -> Iterator[bytes]:
        """Yield the content of a record, all of it, in pieces of one size; raises ``OSError``."""

    def sha256(self, record: FileRecord) -> str:
        """Return the SHA-256 of the content in hex; raises ``OSError``."""
        digest = hashlib.sha256()
        for data in self.chunks(record):
            digest.update(data)
        return digest.hexdigest()
