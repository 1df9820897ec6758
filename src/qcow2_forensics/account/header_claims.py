"""What the header cluster holds: fields, extensions and names, each up to the end of what it means."""

from __future__ import annotations

from collections.abc import Iterator

from ..format.extensions import BITMAPS_EXTENSION, CRYPTO_EXTENSION, Extension, ExtensionType
from ..format.header import FEATURE_ROW, V2_LEFTOVER, V3_HEADER_LENGTH, Crypt, Header, padded
from ..format.image import Image
from .labels import ByteKind, Place
from .marks import Marks

_NAMES = {
    ExtensionType.BACKING_FORMAT: "backing format",
    ExtensionType.FEATURE_NAMES: "feature names",
    ExtensionType.BITMAPS: "bitmaps",
    ExtensionType.CRYPTO: "encryption header",
    ExtensionType.DATA_FILE: "data file name",
}


def claim_header(image: Image, marks: Marks) -> None:
    """Claim the header of any version with its extensions and the backing file name."""
    header = image.header
    unread_fields = _unread_fields(header)
    for field in header.fields:
        what = Place.UNUSED_FIELD if field.name in unread_fields else ByteKind.HEADER
        marks.add(marks.label(what, field.name), field.offset, field.offset + field.length)
    at, left = V2_LEFTOVER
    if header.version == 2 and image.read(at, len(left)) == left:
        marks.add(marks.label(ByteKind.HEADER, "left by old versions of QEMU"), at, at + len(left))
    if header.version >= 3:
        marks.add(marks.label(Place.HEADER_PADDING), V3_HEADER_LENGTH, header.header_length)
    _claim_extensions(image, marks)
    _claim_backing_name(image, marks)


def _unread_fields(header: Header) -> set[str]:
    """Return the fields that no reader looks at, given the values of others."""
    unread = {"mtime"}
    if not header.backing_file_offset:
        unread.add("backing_file_size")
    if header.version == 1 and not header.backing_file_size:  # later versions have extensions up to there
        unread.add("backing_file_offset")
    return unread


def _claim_backing_name(image: Image, marks: Marks) -> None:
    header = image.header
    offset, length = header.backing_file_offset, header.backing_file_size
    if offset and length <= image.limits.name_bytes:
        label = marks.label(ByteKind.BACKING_NAME)
        marks.add_name(label, "backing file name", image.read(offset, length), offset)


def _claim_extensions(image: Image, marks: Marks) -> None:
    header = image.header
    at = header.header_length
    for extension in image.extensions:
        name = _NAMES.get(extension.type, f"{extension.type:#010x}")  # type: ignore[call-overload]
        label = marks.label(ByteKind.EXTENSION, name)
        start, end = extension.data_offset, extension.data_offset + extension.length
        marks.add(label, extension.offset, start)
        marks.add(marks.label(Place.HEADER_PADDING, name), end, start + padded(extension.length))
        if not _is_read(image, extension):
            marks.add(marks.label(Place.UNUSED_EXTENSION, name), start, end)
        elif extension.type in (ExtensionType.BACKING_FORMAT, ExtensionType.DATA_FILE):
            marks.add_name(label, name, extension.data, start)
        elif extension.type == ExtensionType.FEATURE_NAMES:
            for row, offset in _rows(extension):
                marks.add(label, offset, offset + 2)
                marks.add_name(label, name, row[2:], offset + 2)
            marks.add(marks.label(Place.NAME_SLACK, name), end - extension.length % FEATURE_ROW, end)
        else:
            marks.add(label, start, end)
        at = start + padded(extension.length)
    stop = min(header.backing_file_offset or header.cluster_size, header.cluster_size)
    if header.version != 1 and at + 8 <= stop and image.read(at, 8) == bytes(8):
        marks.add(marks.label(ByteKind.EXTENSION, "end of the extensions"), at, at + 8)


def _rows(extension: Extension) -> Iterator[tuple[bytes, int]]:
    for at in range(0, extension.length - FEATURE_ROW + 1, FEATURE_ROW):
        yield extension.data[at : at + FEATURE_ROW], extension.data_offset + at


def _is_read(image: Image, extension: Extension) -> bool:
    """Whether anything reads the content of an extension; of several of one type only the last counts."""
    if image.extension(extension.type) is not extension:  # type: ignore[arg-type]
        return False
    if extension.type == ExtensionType.BITMAPS:
        return image.bitmaps_current and extension.length == BITMAPS_EXTENSION.size
    if extension.type == ExtensionType.CRYPTO:
        return image.header.crypt_method == Crypt.LUKS and extension.length == CRYPTO_EXTENSION.size
    if extension.type == ExtensionType.DATA_FILE:
        return image.header.external_data
    return extension.type in (ExtensionType.BACKING_FORMAT, ExtensionType.FEATURE_NAMES)
