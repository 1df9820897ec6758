"""Finding the migration stream inside the files that carry one."""

from __future__ import annotations

import os

from ..limits import DEFAULT_LIMITS, Limits
from ..source import PathOrSource, Source


class StreamWindow:
    """A stream that starts inside another source; ``start`` is where.

    Mapped-ram streams name positions in the whole file, so the window has to be known.
    """

    def __init__(self, source: Source, start: int, size: int) -> None:
        self.source = source
        self.start = start
        self.size = size
        self.name = str(getattr(source, "name", ""))

    def read(self, offset: int, length: int, /) -> bytes:
        """Return bytes of the stream, short only at its end."""
        return self.source.read(self.start + offset, max(0, min(length, self.size - offset)))


def find_stream(
    origin: PathOrSource, *, cache_dir: str | os.PathLike[str] | None = None, limits: Limits = DEFAULT_LIMITS
) -> Source | None:
    """Return the migration stream in a file: bare, libvirt save file, padded state volume; None for anything else.

    A compressed libvirt file (gzip, bzip2, xz, zstd) is decompressed once into ``cache_dir``, or into an
    unnamed temporary file when it is None. lzop raises :class:`Unsupported`, damage :class:`FormatError`.
    """
    raise NotImplementedError
