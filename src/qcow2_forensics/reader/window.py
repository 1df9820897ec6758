"""A part of a file as a source of its own: what ``offset`` and ``size`` of a ``json:`` name mean."""

from __future__ import annotations

from ..errors import FormatError
from ..format.source import Source, close_source, source_name
from ..text import cut
from .references import Reference


def part_of(source: Source, reference: Reference) -> Source:
    """Return the part of a file that a reference means: all of it, without an offset and a size."""
    whole = not reference.offset and reference.size is None
    return source if whole else WindowSource(source, reference.offset, reference.size)


class WindowSource:
    """``size`` bytes of a source from ``offset`` on, up to its end when None; closes it with itself."""

    keeps_contract = True

    def __init__(self, source: Source, offset: int, size: int | None) -> None:
        if offset + (size or 0) > source.size:
            raise FormatError(
                f"offset {offset} and size {size or 0} lead past the end of {cut(source_name(source))}",
                offset=source.size,
            )
        self._source = source
        self._offset = offset
        self.size = source.size - offset if size is None else size
        self.name = source_name(source)
        self.file_identity = getattr(source, "identity", None)
        self.identity = None if self.file_identity is None else (self.file_identity, offset, size)

    def read(self, offset: int, length: int, /) -> bytes:
        """Return ``length`` bytes at ``offset``, fewer only at the end."""
        length = min(length, self.size - offset)
        return self._source.read(self._offset + offset, length) if length > 0 else b""

    def close(self) -> None:
        """Close the source."""
        close_source(self._source)

    def __getattr__(self, name: str) -> object:
        """Show where the file is, not what only the whole of it has, such as its descriptor."""
        if name not in ("path", "folder", "path_spec", "location", "single_threaded", "mtime_ns"):
            raise AttributeError(name)
        return getattr(self._source, name)
