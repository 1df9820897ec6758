"""One file's metadata, read leniently and lazily.

An :class:`Image` opens anything that starts with the magic. What is wrong with it is data: see
:attr:`Image.problems`. Nothing but the header cluster is read until it is asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import cached_property

from ..errors import FormatError, NotQcow2
from ..limits import DEFAULT_LIMITS, KiB, Limits
from ..text import cut, decoded, printable
from .bitmap_directory import BitmapEntry, read_bitmap_directory
from .entries import parse_entries
from .extensions import CRYPTO_EXTENSION, Extension, ExtensionType, read_extensions
from .header import MAGIC, SECTOR, Autoclear, Crypt, FeatureName, Header, parse_feature_names, parse_header
from .header_rules import BACKING, BACKING_NAME, BITMAPS, DISK, EXTENSIONS, SNAPSHOTS, Problem, header_problems
from .other_files import described
from .snapshot_table import SnapshotEntry, read_snapshot_table
from .source import ClosedOnError, Closing, PathOrSource, Source, as_source, close_source, source_name

_FIRST_READ = 4 * KiB  # header, extensions and name of nearly every image


class Image(Closing):
    """One QCOW version 1, 2 or 3 file as it is on disk.

    Raises :class:`NotQcow2` when the magic is missing; nothing else about the content raises here.
    Owns ``source`` when ``owns_source``: then :meth:`close` closes it.
    """

    def __init__(
        self, origin: PathOrSource, *, name: str = "", limits: Limits = DEFAULT_LIMITS, owns_source: bool | None = None
    ) -> None:
        self.source: Source = as_source(origin)
        self._owns_source = self.source is not origin if owns_source is None else owns_source
        self.name = name or source_name(self.source)
        self.limits = limits
        self.file_size = self.source.size
        with ClosedOnError(self):
            head = self.source.read(0, _FIRST_READ)
            if len(head) < 8 or head[:4] != MAGIC:
                what = f"is not a QCOW image ({described(head)})" if head else "is empty"
                raise NotQcow2(f"{cut(self.name)} {what}")
            self.header: Header = parse_header(head)

    # --- bytes -------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """Return host bytes, fewer only at the end of the file."""
        if offset >= self.file_size or length <= 0:
            return b""
        return self.source.read(offset, min(length, self.file_size - offset))

    def read_exactly(self, offset: int, length: int, structure: str) -> bytes:
        """Return exactly ``length`` host bytes, or raise naming the structure that is cut off."""
        if offset + length > self.file_size:
            raise FormatError(
                f"{structure} reaches past the end of the file at {self.file_size:#x}", offset=offset, field=structure
            )
        return self.source.read(offset, length)

    def table(self, offset: int, count: int, structure: str) -> array[int]:
        """Return ``count`` 64-bit entries at a host offset; the caller has checked ``count``."""
        return parse_entries(self.read_exactly(offset, count * 8, structure))

    # --- header cluster ------------------------------------------------------------------------

    @property
    def cluster_size(self) -> int:
        """Bytes per cluster; only meaningful when no problem concerns ``cluster_bits``."""
        return self.header.cluster_size

    @property
    def disk_size(self) -> int:
        """Bytes of the active state, whole sectors as QEMU exposes them."""
        return self.header.size // SECTOR * SECTOR

    @cached_property
    def _walk(self) -> tuple[tuple[Extension, ...], tuple[Problem, ...]]:
        return read_extensions(self)

    @property
    def extensions(self) -> tuple[Extension, ...]:
        """The header extensions in file order, END left out."""
        return self._walk[0]

    def extension(self, kind: ExtensionType) -> Extension | None:
        """Return the extension of a type; the last one wins, as in QEMU."""
        return next((item for item in reversed(self.extensions) if item.type == kind), None)

    @cached_property
    def feature_names(self) -> list[FeatureName]:
        """The rows of the feature name table."""
        extension = self.extension(ExtensionType.FEATURE_NAMES)
        return parse_feature_names(extension.data) if extension else []

    @cached_property
    def has_geometry(self) -> bool:
        """Whether version and cluster size are known ones, so that offsets mean something."""
        low, high = (9, 16) if self.header.version == 1 else (9, 21)
        return self.header.version in (1, 2, 3) and low <= self.header.cluster_bits <= high

    @property
    def encryption(self) -> str:
        """The name of the encryption method, its number when it is unknown; "" when there is none."""
        method = self.header.crypt_method
        return "" if not method else Crypt(method).name if method in tuple(Crypt) else str(method)

    @cached_property
    def backing_name_bytes(self) -> bytes:
        """The backing file name as stored, cut at the first NUL; empty when there is none."""
        header = self.header
        if not header.backing_file_offset or header.backing_file_size > self.limits.name_bytes:
            return b""
        return self.read(header.backing_file_offset, header.backing_file_size).split(b"\0", 1)[0]

    @property
    def backing_name(self) -> str | None:
        """The effective backing file name; undecodable bytes become lone surrogates."""
        return decoded(self.backing_name_bytes) or None

    @property
    def backing_format(self) -> str | None:
        """The recorded format of the backing file, None when it must be probed."""
        return self._text_of(ExtensionType.BACKING_FORMAT)

    @property
    def data_file_name(self) -> str | None:
        """The name of the external data file, cut at the first NUL; None when none is recorded."""
        return self._text_of(ExtensionType.DATA_FILE)

    def _text_of(self, kind: ExtensionType) -> str | None:
        extension = self.extension(kind)
        return None if extension is None else decoded(extension.data.split(b"\0", 1)[0]) or None

    @property
    def crypto_header(self) -> tuple[int, int] | None:
        """Host offset and length in bytes of the LUKS header, None without a valid extension."""
        extension = self.extension(ExtensionType.CRYPTO)
        if extension is None or extension.length != CRYPTO_EXTENSION.size:
            return None
        offset, length = CRYPTO_EXTENSION.unpack(extension.data)
        return int(offset), int(length)

    # --- snapshots and bitmaps -----------------------------------------------------------------

    @cached_property
    def _snapshot_table(self) -> tuple[tuple[SnapshotEntry, ...], tuple[Problem, ...]]:
        return read_snapshot_table(self)

    @property
    def snapshots(self) -> tuple[SnapshotEntry, ...]:
        """The entries of the snapshot table that could be parsed, in table order."""
        return self._snapshot_table[0]

    @cached_property
    def _bitmap_directory(self) -> tuple[tuple[BitmapEntry, ...], tuple[Problem, ...]]:
        return read_bitmap_directory(self)

    @property
    def bitmaps(self) -> tuple[BitmapEntry, ...]:
        """The persistent bitmaps of the directory, also stale ones (see :attr:`bitmaps_current`)."""
        return self._bitmap_directory[0]

    @property
    def bitmaps_current(self) -> bool:
        """Whether the autoclear bit says that the bitmaps are consistent."""
        return bool(self.header.autoclear_features & Autoclear.BITMAPS)

    # --- problems ------------------------------------------------------------------------------

    @cached_property
    def header_problems(self) -> tuple[Problem, ...]:
        """What is wrong with the header and its extensions; cheap, read at open."""
        return tuple(self._header_problems())

    def _header_problems(self) -> Iterator[Problem]:
        problems = list(header_problems(self.header, self.limits, []))
        if any(
            problem.blocks and problem.field in ("version", "cluster_bits", "header_length") for problem in problems
        ):
            yield from problems  # where extensions start and end is unknown
            return
        yield from header_problems(self.header, self.limits, self.feature_names) if problems else problems
        yield from self._walk[1]
        yield from self._reference_problems()

    def _reference_problems(self) -> Iterator[Problem]:
        header = self.header
        if header.crypt_method == Crypt.LUKS and self.extension(ExtensionType.CRYPTO) is None:
            yield Problem(
                "QCOW2-CRYPTO-HEADER-INVALID",
                "LUKS encryption without a LUKS header extension",
                "crypt_method",
                header.crypt_method,
                header.offset_of("crypt_method"),
                frozenset({DISK}),
            )
        end = header.backing_file_offset + header.backing_file_size
        if header.backing_file_offset and header.backing_file_size and self.file_size < end <= header.cluster_size:
            yield Problem(
                "QCOW2-HEADER-INVALID",
                f"the {BACKING_NAME} reaches past the end of the file",
                BACKING_NAME,
                header.backing_file_offset,
                header.offset_of("backing_file_offset"),
                frozenset({DISK, BACKING}),
            )

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything wrong with header, extensions, snapshot table and bitmap directory, in this order."""
        problems = self.header_problems
        if any(DISK in problem.blocks and problem.field in ("version", "cluster_bits") for problem in problems):
            return problems
        return problems + self._snapshot_table[1] + self._bitmap_directory[1]

    def require(self, *parts: str) -> None:
        """Raise the first problem that makes one of ``parts`` unsound to read."""
        problem = self.unreadable(*parts)
        if problem is not None:
            raise problem.error()

    def unreadable(self, *parts: str) -> Problem | None:
        """Return the first problem that makes one of ``parts`` unsound to read, None where they can be read.

        Ask it before saying that there are no ``"snapshots"`` or no ``"bitmaps"``.
        """
        wanted = set(parts)
        known = self.header_problems
        if any(part.startswith(SNAPSHOTS[:-1]) for part in wanted):
            known += self._snapshot_table[1]
        if BITMAPS in wanted:
            known += self._bitmap_directory[1]
        for problem in known:
            if problem.blocks & wanted:
                return problem
        return None

    @property
    def unreadable_facts(self) -> tuple[str, ...]:
        """The names of facts and tables that are unknown and not absent: None or 0 would be taken for "none"."""
        parts = [name for name in (SNAPSHOTS, BITMAPS) if self.unreadable(name)]
        if self.unreadable(BACKING):
            parts.append("backing_file")
        if self.unreadable(EXTENSIONS):
            if self.header.backing_file_offset and self.extension(ExtensionType.BACKING_FORMAT) is None:
                parts.append("backing_format")
            if self.header.external_data and self.extension(ExtensionType.DATA_FILE) is None:
                parts.append("data_file")
        header = self.header
        if header.l1_table_offset + header.l1_size * 8 > self.file_size:
            parts.append("l1_table")
        if header.refcount_table_offset + header.refcount_table_clusters * header.cluster_size > self.file_size:
            parts.append("refcount_table")
        return tuple(parts)

    # --- life ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the source if this image opened it; closing twice is fine."""
        if self._owns_source:
            close_source(self.source)

    def __repr__(self) -> str:
        return f"<Image {printable(self.name)} version {self.header.version}>"
