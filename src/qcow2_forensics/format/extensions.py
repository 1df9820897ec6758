"""The header extensions ("Header extensions"): their types and contents, and the walk over them.

Lengths are checked against the file and the limits before anything is read; what is wrong comes
back as problems beside what could be parsed.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from ..limits import Limits
from .header import Crypt, Header, padded
from .header_rules import BITMAPS, DISK, EXTENSIONS, Problem

_MAX_FORMAT_NAME = 15  # bytes, what QEMU accepts


class ExtensionType(enum.IntEnum):
    """Known header extension types."""

    END = 0x00000000
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPTO = 0x0537BE77
    DATA_FILE = 0x44415441


class Extension(NamedTuple):
    """One header extension; ``offset`` is that of its 8-byte head, ``data`` is without padding."""

    type: int
    offset: int
    data: bytes

    @property
    def length(self) -> int:
        return len(self.data)

    @property
    def data_offset(self) -> int:
        return self.offset + 8


CRYPTO_EXTENSION = struct.Struct(">QQ")  # offset and length in bytes of the LUKS header


class BitmapsExtension(NamedTuple):
    """The bitmaps extension (24 bytes): count, reserved word, directory size and offset in bytes."""

    nb_bitmaps: int
    reserved: int
    directory_size: int
    directory_offset: int


BITMAPS_EXTENSION = struct.Struct(">IIQQ")


def parse_bitmaps_extension(data: bytes) -> BitmapsExtension:
    """Return the fields of a bitmaps extension; ``data`` must be 24 bytes."""
    return BitmapsExtension(*BITMAPS_EXTENSION.unpack(data))


class Metadata(Protocol):
    """What these readers need of an image."""

    header: Header
    limits: Limits
    file_size: int

    def read(self, offset: int, length: int) -> bytes: ...

    def extension(self, kind: ExtensionType) -> Extension | None: ...


def read_extensions(image: Metadata) -> tuple[tuple[Extension, ...], tuple[Problem, ...]]:
    """Walk the header extension area ("Header extensions"); bytes past the file end are zeros."""
    header = image.header
    if header.version == 1 or not 9 <= header.cluster_bits <= 21:
        return (), ()
    end = header.backing_file_offset or header.cluster_size
    end = min(end, header.cluster_size)
    area = image.read(0, end).ljust(end, b"\0") if header.header_length < end else b""
    found: list[Extension] = []
    problems: list[Problem] = []
    at = header.header_length
    while at + 8 <= len(area):
        kind = int.from_bytes(area[at : at + 4], "big")
        length = int.from_bytes(area[at + 4 : at + 8], "big")
        if length > end - at - 8:
            # QEMU refuses an end mark with such a length too, but nothing depends on that length.
            parts = () if kind == ExtensionType.END else _unread(found)
            problems.append(_extension_problem(at, kind, length, "reaches past the header extension area", *parts))
            break
        if kind == ExtensionType.END:
            break
        if len(found) == image.limits.header_extensions:
            problems.append(_too_many_extensions(at, image.limits.header_extensions, _unread(found)))
            break
        extension = Extension(kind, at, area[at + 8 : at + 8 + length])
        found.append(extension)
        problems.extend(_extension_rules(header, extension))
        at += 8 + padded(length)
    return tuple(found), tuple(problems)


def _unread(found: list[Extension]) -> tuple[str, ...]:
    """Return what is unknown where the walk ends early, after ``found``."""
    has_bitmaps = any(item.type == ExtensionType.BITMAPS for item in found)
    return (DISK, EXTENSIONS) if has_bitmaps else (DISK, EXTENSIONS, BITMAPS)


def _extension_problem(at: int, kind: int, length: int, what: str, *blocks: str) -> Problem:
    message = f"header extension {kind:#010x} of {length} bytes {what}"
    return Problem("QCOW2-EXTENSION-INVALID", message, "extension", kind, at, frozenset(blocks))


def _too_many_extensions(at: int, limit: int, parts: tuple[str, ...]) -> Problem:
    message = f"there are more than {limit} header extensions"
    return Problem("QCOW2-EXTENSION-INVALID", message, "header extensions", limit + 1, at, frozenset(parts), limit)


def _extension_rules(header: Header, extension: Extension) -> Iterator[Problem]:
    kind, at, length = extension.type, extension.offset, extension.length
    if kind == ExtensionType.BACKING_FORMAT and length > _MAX_FORMAT_NAME:
        yield _extension_problem(at, kind, length, "is longer than a format name", DISK)
    elif kind == ExtensionType.CRYPTO:
        if header.crypt_method != Crypt.LUKS:
            yield _extension_problem(at, kind, length, "names a LUKS header, but the image is not LUKS", DISK)
        elif length != CRYPTO_EXTENSION.size:
            yield _extension_problem(at, kind, length, "does not have 16 bytes", DISK)
        elif CRYPTO_EXTENSION.unpack(extension.data)[0] % header.cluster_size:
            yield _extension_problem(at, kind, length, "names an unaligned LUKS header", DISK)
    elif kind == ExtensionType.BITMAPS and length != BITMAPS_EXTENSION.size:
        yield _extension_problem(at, kind, length, "does not have 24 bytes", BITMAPS)
