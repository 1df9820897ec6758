"""Bytes inside clusters that are in use: after the header, after tables, and past the disk's end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..format.extensions import BITMAPS_EXTENSION, ExtensionType, parse_bitmaps_extension
from ..format.header import V2_HEADER_LENGTH, V2_LEFTOVER, padded
from ..format.image import Image
from .host_ranges import piece_of
from .model import Piece


def header_slack(image: Image) -> Iterator[Piece]:
    """Yield what is in the header cluster where nothing belongs: after the END extension, after the backing file name."""
    header = image.header
    if header.version == 1 or not 9 <= header.cluster_bits <= 21:
        return
    end = _extensions_end(image)
    if end is None:
        return
    gaps = []
    name_at = header.backing_file_offset
    if name_at and end <= name_at <= header.cluster_size:
        gaps = [(end, name_at), (name_at + header.backing_file_size, header.cluster_size)]
    elif not name_at:
        gaps = [(end, header.cluster_size)]
    for start, stop in gaps:
        data = image.read(start, stop - start) if stop > start else b""
        if header.version == 2:
            data = _without_leftover(data, start)
        yield from piece_of(data, start, "header-slack")


def _without_leftover(data: bytes, start: int) -> bytes:
    at, known = V2_LEFTOVER
    at -= start
    if at >= 0 and data[at : at + len(known)] == known:
        return data[:at] + bytes(len(known)) + data[at + len(known) :]
    return data


def _extensions_end(image: Image) -> int | None:
    """Return where the extension area ends; None when an extension overruns it."""
    header = image.header
    at = header.header_length
    if not V2_HEADER_LENGTH <= at <= header.cluster_size:
        return None
    if image.extensions:
        last = image.extensions[-1]
        at = last.offset + 8 + padded(last.length)
    if any(problem.code == "QCOW2-EXTENSION-INVALID" and problem.offset == at for problem in image.problems):
        return None
    end = header.backing_file_offset or header.cluster_size
    head = image.read(at, 8)
    # An END marker is eight bytes; without one the area simply runs out.
    return at + 8 if at + 8 <= end and head[:4] == bytes(4) else min(at, end)


def header_padding(image: Image) -> Iterator[Piece]:
    """Yield what is in the header's own padding, after the known fields, and after extensions."""
    header = image.header
    if header.version < 3 or header.header_length > header.cluster_size or not 9 <= header.cluster_bits <= 21:
        return
    areas = []
    if header.header_length > 105:
        areas.append((105, header.header_length))
    for extension in image.extensions:
        start = extension.offset + 8 + extension.length
        areas.append((start, extension.offset + 8 + padded(extension.length)))
    for start, stop in areas:
        yield from piece_of(image.read(start, stop - start), start, "header-padding")


def l1_slack(image: Image) -> Iterator[Piece]:
    """Yield what follows each L1 table in its last cluster."""
    header = image.header
    if header.version == 1:
        return
    tables = [(header.l1_table_offset, header.l1_size * 8, "")]
    tables += [(entry.l1_table_offset, entry.l1_size * 8, entry.id) for entry in image.snapshots]
    for start, length, snapshot in _tails(image, tables):
        yield from piece_of(image.read(start, length), start, "l1-slack", snapshot)


def table_slack(image: Image) -> Iterator[Piece]:
    """Yield what follows the snapshot table, the bitmap directory and the bitmap tables."""
    for start, length in table_tails(image):
        yield from piece_of(image.read(start, length), start, "table-slack")


def table_tails(image: Image) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) from the end of such tables to the end of their last cluster."""
    if image.header.version == 1:
        return
    tables = []
    if image.snapshots and len(image.snapshots) == image.header.nb_snapshots:
        last = image.snapshots[-1]
        start = image.header.snapshots_offset
        tables.append((start, last.offset + last.length - start, ""))
    extension = image.extension(ExtensionType.BITMAPS)
    if extension is not None and image.bitmaps_current and extension.length == BITMAPS_EXTENSION.size:
        facts = parse_bitmaps_extension(extension.data)
        tables.append((facts.directory_offset, facts.directory_size, ""))
        tables += [(bitmap.table_offset, bitmap.table_size * 8, "") for bitmap in image.bitmaps]
    for start, length, _ in _tails(image, tables):
        yield start, length


def _tails(image: Image, tables: Iterable[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """Yield (offset, length, whose) of what follows tables, given as (offset, length, whose), in their last clusters.

    Of several that end in one cluster only what follows the furthest of them is after a table.
    """
    furthest: dict[int, tuple[int, str]] = {}  # by the end of the last cluster
    for offset, length, owner in tables:
        start = offset + length
        stop = padded(start, image.cluster_size)
        if offset and offset % image.cluster_size == 0 and length and start > furthest.get(stop, (0, ""))[0]:
            furthest[stop] = start, owner
    for stop, (start, owner) in furthest.items():
        if start < min(stop, image.file_size):
            yield start, stop - start, owner
