"""The times of files as a file system stores them, where The Sleuth Kit shows those of 1970 to 2105 only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .ext_inodes import ExtInodes
from .ntfs_records import standard_times
from .protocol import first_line
from .records import SECOND, Times

_NAMES = ("mtime", "atime", "ctime", "crtime")


class StoredTimes:
    """Looks up times in a file system of a ``kind`` that begins at ``start`` of an image, an ``Img_Info`` of pytsk3.

    What cannot be looked up is shown as The Sleuth Kit has it, and the first reason is given to ``doubt``.
    """

    def __init__(self, image: Any, start: int, kind: str, doubt: Callable[[OSError], None]) -> None:
        self._image = image
        self._start = start
        self._kind = kind
        self._doubt = doubt
        self._inodes: ExtInodes | None = None
        self._is_doubtful = False

    def of(self, entry: Any, attributes: Sequence[Any]) -> Times:
        """Return the times of a file, a ``File`` of pytsk3 with metadata."""
        meta = entry.info.meta
        seconds = [int(getattr(meta, name)) for name in _NAMES]
        nanoseconds = [int(getattr(meta, f"{name}_nano")) for name in _NAMES]
        shown = Times(*(at * SECOND + fraction for at, fraction in zip(seconds, nanoseconds, strict=True)))
        try:
            stored = self._stored(entry, attributes)
            if stored is None:
                return shown
            if not all(map(_agree, seconds, stored)):
                raise OSError("its times are not where they belong")
        except (OSError, RuntimeError) as error:
            if not self._is_doubtful:
                self._is_doubtful = True
                why = f"dates before 1970 and after 2038 may be missing or wrong: {first_line(error)}"
                self._doubt(OSError(why))
            return shown
        return stored

    def _stored(self, entry: Any, attributes: Sequence[Any]) -> Times | None:
        if self._kind == "ntfs":
            return standard_times(entry, attributes)
        if not self._kind.startswith("ext"):
            return None
        if self._inodes is None:
            self._inodes = ExtInodes(self._image, self._start)
        stored = self._inodes.times(int(entry.info.meta.addr))
        return stored if stored is None or self._kind == "ext4" else stored._replace(created=0)


def _agree(seconds: int, stored: int) -> bool:
    """Whether a time as The Sleuth Kit shows it may be a stored one: the same 32 bits, or none shown."""
    return not seconds or (seconds - stored // SECOND) % (1 << 32) == 0
