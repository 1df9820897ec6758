"""An NTFS volume: the clusters it uses, and what some of them must hold, by its Master File Table.

The records of the table name the runs of every file. All of them together are what is in use, also where
the bitmap file is in a part of the disk that is not placed yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..limits import FILE_RECORD_RUNS, FILE_RECORDS_LOOKED_AT
from .allocation import FREE, UNKNOWN, USED, Expected, PlacedDisk, VolumeMap, set_bits
from .structures import little_endian

_MFT, _MIRROR, _ATTRIBUTES, _BITMAP, _UPCASE = 0, 1, 4, 6, 10
_DATA, _INDEX = 0x80, 0xA0
_PIECE = 1 << 20

_STARTS_WITH = {  # system files whose content is the same on every volume
    _ATTRIBUTES: ("$STANDARD".encode("utf-16-le"), "NTFS attribute definitions"),
    _UPCASE: (bytes(1).join((b"\0", b"\1", b"\2", b"\3")), "NTFS upper case table"),
}


class _Volume(NamedTuple):
    start: int
    cluster: int
    clusters: int
    record: int
    mft: int  # its first cluster


def ntfs_map(disk: PlacedDisk, start: int) -> VolumeMap | None:
    """Return which clusters are in use of the NTFS volume that starts at ``start``; None where there is none."""
    found = _volume(disk, start)
    volume = None if found is None else disk.empty_map(start, found.cluster, found.clusters)
    if found is None or volume is None:
        return None
    records = 0
    whole = True
    left = 2 * found.clusters  # that runs may take: those of different files never overlap
    for _, record in _records(disk, found):
        if record is None:
            whole = False
            continue
        records += 1
        for lcn, count in all_runs(record):
            left -= count
            if left < 0:
                return None
            volume.bits[lcn : lcn + count] = USED
    if whole and records:
        volume.bits[volume.bits == UNKNOWN] = FREE
    _take_bitmap(disk, found, volume)
    return volume


def _take_bitmap(disk: PlacedDisk, found: _Volume, volume: VolumeMap) -> None:
    """Take what the bitmap file says, as far as it is placed."""
    first = disk.read(found.start + found.mft * found.cluster + _BITMAP * found.record, found.record)
    at = 0  # in the bitmap
    for lcn, count in data_runs(with_fixups(first or b"")):
        for done in range(0, min(count * found.cluster, -(-found.clusters // 8) - at), _PIECE):
            length = min(_PIECE, count * found.cluster - done)
            bitmap = disk.read(found.start + lcn * found.cluster + done, length)
            if bitmap is not None and _agrees(volume, at * 8, bitmap):
                set_bits(volume, at * 8, bitmap)
            at += length


def _agrees(volume: VolumeMap, first: int, bitmap: bytes) -> bool:
    """Whether a bitmap has what the runs of files use: what was read may be something else."""
    known = volume.bits[first : first + len(bitmap) * 8]
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")[: len(known)]
    return bool(len(known)) and bool(bits[known == USED].all()) and bool(bits.any())


def ntfs_expected(disk: PlacedDisk, start: int) -> Iterator[Expected]:
    """Yield what clusters of the volume must hold: records by number, index blocks of folders, system files."""
    found = _volume(disk, start)
    if found is None:
        return
    head = disk.read(start + found.mft * found.cluster, found.record)
    number = 0
    for lcn, count in data_runs(with_fixups(head or b"")):
        own = number.to_bytes(4, "little")
        yield Expected(
            start + lcn * found.cluster,
            48,
            lambda data, own=own: data[:4] == b"FILE" and data[44:48] == own,  # type: ignore[misc]
            "NTFS file record",
        )
        number += count * found.cluster // found.record
    for number, record in _records(disk, found):
        if record is None:
            continue
        for lcn, _ in data_runs(record) if number in (_MIRROR, *_STARTS_WITH) else ():
            content, what = _STARTS_WITH.get(number, ((head or b"")[:8], "NTFS mirror of the file table"))
            yield Expected(start + lcn * found.cluster, len(content), content.__eq__, what)
            break
        vcn = 0
        for lcn, count in data_runs(record, _INDEX):
            own = vcn.to_bytes(8, "little")
            yield Expected(
                start + lcn * found.cluster,
                96,
                lambda data, own=own, number=number: _is_index_of(data, own, number),  # type: ignore[misc]
                "NTFS folder",
            )
            vcn += count


def _is_index_of(block: bytes, vcn: bytes, number: int) -> bool:
    """Whether an index block is the one with a VCN of the folder with a number, by its first name."""
    entry = 24 + little_endian(block, 24, 4)
    parent = int.from_bytes(block[entry + 16 : entry + 22], "little")
    return block[:4] == b"INDX" and block[16:24] == vcn and parent == number


def _volume(disk: PlacedDisk, start: int) -> _Volume | None:
    boot = disk.read(start, 512)
    if boot is None or boot[3:11] != b"NTFS    ":
        return None
    sector, per_cluster = little_endian(boot, 11, 2), boot[13]
    cluster = sector * (per_cluster if per_cluster <= 128 else 1 << 256 - per_cluster)
    size = int.from_bytes(boot[64:65], "little", signed=True)
    record = 1 << -size if -31 < size < 0 else size * cluster
    if not (512 <= cluster <= 2 << 20 and record in (1024, 2048, 4096)):
        return None
    return _Volume(start, cluster, little_endian(boot, 40, 8) * sector // cluster, record, little_endian(boot, 48, 8))


def _records(disk: PlacedDisk, found: _Volume) -> Iterator[tuple[int, bytes | None]]:
    """Yield the number of each file record and the record, None where it is not placed; free ones are left out."""
    head = disk.read(found.start + found.mft * found.cluster, found.record)
    number = 0
    for lcn, count in data_runs(with_fixups(head or b"")):
        for done in range(0, count * found.cluster, _PIECE):
            length = min(_PIECE, count * found.cluster - done)
            table = disk.read(found.start + lcn * found.cluster + done, length)
            if table is None:
                yield number, None
            for at in range(0, length if table is not None else 0, found.record):
                record = with_fixups(table[at : at + found.record]) if table is not None else b""
                if record and record[22] & 1:
                    yield number + at // found.record, record
            number += length // found.record
            if number > FILE_RECORDS_LOOKED_AT:
                yield number, None
                return


def with_fixups(record: bytes) -> bytes:
    """Return a record with the last two bytes of its sectors put back; empty where they do not agree."""
    place, count = little_endian(record, 4, 2), little_endian(record, 6, 2)
    if record[:4] not in (b"FILE", b"INDX") or place + 2 * count > len(record) or count != len(record) // 512 + 1:
        return b""
    data = bytearray(record)
    for sector in range(1, count):
        end = sector * 512
        if data[end - 2 : end] != record[place : place + 2]:
            return b""
        data[end - 2 : end] = record[place + 2 * sector : place + 2 * sector + 2]
    return bytes(data)


def data_runs(record: bytes, kind: int = _DATA) -> Iterator[tuple[int, int]]:
    """Yield (first cluster, count) of the first attribute of a kind, in the order of the file; holes are left out."""
    for found, runs in _attributes(record):
        if found == kind:
            yield from _runs(runs)
            return


def all_runs(record: bytes) -> Iterator[tuple[int, int]]:
    """Yield (first cluster, count) of every attribute that has clusters."""
    for _, runs in _attributes(record):
        yield from _runs(runs)


def _attributes(record: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the type and the packed runs of each attribute that has clusters."""
    at = little_endian(record, 20, 2)
    while 0 < at < len(record) - 8:
        found, length = little_endian(record, at, 4), little_endian(record, at + 4, 4)
        if found == 0xFFFF_FFFF or length < 24 or at + length > len(record):
            return
        if record[at + 8]:
            yield found, record[at + little_endian(record, at + 32, 2) : at + length]
        at += length


def _runs(data: bytes) -> Iterator[tuple[int, int]]:
    at, lcn = 0, 0
    for _ in range(FILE_RECORD_RUNS):
        if at >= len(data) or not data[at]:
            return
        lengths, offsets = data[at] & 15, data[at] >> 4
        count = little_endian(data, at + 1, lengths)
        change = int.from_bytes(data[at + 1 + lengths : at + 1 + lengths + offsets], "little", signed=True)
        at += 1 + lengths + offsets
        lcn += change
        if offsets and lcn >= 0 and 0 < count < 1 << 40:
            yield lcn, count
