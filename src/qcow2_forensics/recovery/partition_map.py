"""The sectors that a GUID partition table uses: the rest outside of its partitions is free."""

from __future__ import annotations

from .allocation import FREE, UNKNOWN, USED, PlacedDisk, VolumeMap
from .structures import little_endian

_SECTOR = 512
_FIRST = 34 * _SECTOR
_USED = 6  # sectors at the start: the protective MBR, the header, the first entries
_ENTRIES = 32  # sectors of entries, of which the first hold something


def partition_map(disk: PlacedDisk) -> VolumeMap | None:
    """Return what is in use outside of the partitions; None where there is no such table."""
    head = disk.read(0, _FIRST)
    if head is None or head[_SECTOR : _SECTOR + 8] != b"EFI PART":
        return None
    last = little_endian(head, _SECTOR + 32, 8)
    volume = disk.empty_map(0, _SECTOR, last + 1) if last >= 2 * _ENTRIES else None
    if volume is None:
        return None
    volume.bits[:] = FREE
    volume.bits[:_USED] = USED
    volume.bits[last] = USED
    volume.bits[last - _ENTRIES] = USED
    size = max(128, little_endian(head, _SECTOR + 84, 4))
    for at in range(2 * _SECTOR, _FIRST - size + 1, size):
        if any(head[at : at + 16]):
            first, end = little_endian(head, at + 32, 8), little_endian(head, at + 40, 8)
            volume.bits[first : end + 1] = UNKNOWN
    return volume
