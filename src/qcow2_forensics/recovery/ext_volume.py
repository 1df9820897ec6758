"""An ext2, ext3 or ext4 file system: the blocks it uses, and what some of its blocks must hold.

Group descriptors say where bitmaps are and, with metadata checksums, which; inodes say where
directories and the journal begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from ..limits import FILE_SYSTEM_GROUPS, INODES_LOOKED_AT
from .allocation import Expected, PlacedDisk, VolumeMap, forget, set_bits
from .structures import little_endian

_64BIT, _META_BG, _CHECKSUM_SEED = 0x80, 0x10, 0x2000
_CHECKSUMS = 0x400
_INODE_UNINIT = 1
_DIRECTORY = 0x4000
_BLOCK_UNINIT = 2
_JOURNAL_INODE = 8
_JOURNAL_STARTS = tuple(b"\xc0\x3b\x39\x98\0\0\0" + version for version in (b"\3", b"\4"))
_EXTENT_MAGIC = 0xF30A


class _Super(NamedTuple):
    start: int
    block: int
    blocks: int
    first: int  # block of the first group
    per_group: int
    inodes_per_group: int
    inode_size: int
    descriptor_size: int
    seed: int | None  # of metadata checksums, None without them

    @property
    def groups(self) -> int:
        return -(-(self.blocks - self.first) // self.per_group)


class _Group(NamedTuple):
    block_bitmap: int
    inode_bitmap: int
    inode_table: int
    flags: int
    unused_inodes: int
    block_bitmap_sum: int
    inode_bitmap_sum: int


def ext_map(disk: PlacedDisk, start: int) -> VolumeMap | None:
    """Return which blocks are in use of the ext file system that starts at ``start``; None where there is none."""
    found = _superblock(disk, start)
    volume = None if found is None else disk.empty_map(start, found.block, found.blocks)
    if found is None or volume is None:
        return None
    tables: list[tuple[int, int]] = []  # inode tables behind the inodes in use: allocated, seldom written
    for number, group in _groups(disk, found):
        first = found.first + number * found.per_group
        count = min(found.per_group, found.blocks - first)
        if group.flags & _BLOCK_UNINIT:
            volume.bits[first : first + count] = 0
        else:
            bitmap = disk.read(start + group.block_bitmap * found.block, found.per_group // 8)
            if bitmap is not None and _is_bitmap(found, group, bitmap):
                set_bits(volume, first, bitmap[: -(-count // 8)])
        used = -(-(found.inodes_per_group - group.unused_inodes) * found.inode_size // found.block)
        whole = -(-found.inodes_per_group * found.inode_size // found.block)
        tables.append((group.inode_table + used, whole - used))
        tables += [(group.block_bitmap, 1), (group.inode_bitmap, 1), (first, _reserved(number, found))]
    forget(volume, tables)
    forget(volume, _journal(disk, found))
    return volume


def ext_expected(disk: PlacedDisk, start: int) -> Iterator[Expected]:
    """Yield what blocks of the file system must hold: bitmaps by their checksums, directories, the journal."""
    found = _superblock(disk, start)
    if found is None or not disk.takes(found.blocks):
        return
    mask = _mask(found)
    inodes = 0
    for number, group in _groups(disk, found):
        if found.seed is not None and not group.flags & _BLOCK_UNINIT:
            yield _bitmap(found, group.block_bitmap, found.per_group, group.block_bitmap_sum, mask, "block bitmap")
        if found.seed is not None and not group.flags & _INODE_UNINIT:
            yield _bitmap(
                found, group.inode_bitmap, found.inodes_per_group, group.inode_bitmap_sum, mask, "inode bitmap"
            )
        used = 0 if group.flags & _INODE_UNINIT else found.inodes_per_group - group.unused_inodes
        inodes += used
        if inodes <= INODES_LOOKED_AT:
            yield from _directories(disk, found, group, number * found.inodes_per_group + 1, used)
    for first, _ in _journal(disk, found):
        yield Expected(start + first * found.block, 8, _JOURNAL_STARTS.__contains__, "ext journal")
        break


def _is_bitmap(found: _Super, group: _Group, bitmap: bytes) -> bool:
    """Whether a block is the bitmap of a group, by its checksum where there are such: a wrong table may be in its place."""
    if found.seed is None or not any(bitmap):
        return any(bitmap)
    return _checksum(found.seed, bitmap) & _mask(found) == group.block_bitmap_sum


def _mask(found: _Super) -> int:
    return 0xFFFF_FFFF if found.descriptor_size >= 64 else 0xFFFF


def _bitmap(found: _Super, block: int, bits: int, recorded: int, mask: int, what: str) -> Expected:
    seed = found.seed or 0

    def matches(data: bytes) -> bool:
        return any(data) and _checksum(seed, data) & mask == recorded

    return Expected(found.start + block * found.block, bits // 8, matches, f"ext {what}")


def _directories(disk: PlacedDisk, found: _Super, group: _Group, first: int, count: int) -> Iterator[Expected]:
    for index in range(0, count, max(1, found.block // found.inode_size)):
        here = min(count - index, max(1, found.block // found.inode_size))
        at = found.start + group.inode_table * found.block + index * found.inode_size
        table = disk.read(at, here * found.inode_size)
        if table is None:
            continue
        for place in range(here):
            inode = table[place * found.inode_size :][:128]
            block = little_endian(inode, 60, 4) | little_endian(inode, 58, 2) << 32
            leaf = (
                little_endian(inode, 40, 2) == _EXTENT_MAGIC
                and little_endian(inode, 42, 2)
                and not little_endian(inode, 46, 2)
            )
            if little_endian(inode, 0, 2) & 0xF000 == _DIRECTORY and leaf and block:
                own = (first + index + place).to_bytes(4, "little") + b"\x0c\0\1\2.\0\0\0"
                yield Expected(found.start + block * found.block, len(own), own.__eq__, "ext directory")


def _seed(superblock: bytes) -> int | None:
    if not little_endian(superblock, 0x64, 4) & _CHECKSUMS:
        return None
    if little_endian(superblock, 0x60, 4) & _CHECKSUM_SEED:
        return little_endian(superblock, 0x270, 4)
    return crc32c(0xFFFF_FFFF, superblock[0x68:0x78])


def crc32c(value: int, data: bytes) -> int:
    """Return the Castagnoli CRC as ext4 uses it: nothing is inverted at the end."""
    for byte in data:
        value = value >> 8 ^ _CRC32C[(value ^ byte) & 0xFF]
    return value


_checksum = lru_cache(maxsize=4096)(crc32c)  # of the bitmaps of a disk that is looked at again


def _crc32c_row(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F6_3B78 if value & 1 else 0)
    return value


_CRC32C = [_crc32c_row(value) for value in range(256)]


def _superblock(disk: PlacedDisk, start: int) -> _Super | None:
    data = disk.read(start + 1024, 1024)
    if data is None or data[0x38:0x3A] != b"\x53\xef":
        return None
    log = little_endian(data, 0x18, 4)
    incompatible = little_endian(data, 0x60, 4)
    blocks = little_endian(data, 4, 4) + (little_endian(data, 0x150, 4) << 32 if incompatible & _64BIT else 0)
    size = little_endian(data, 0xFE, 2) if incompatible & _64BIT else 32
    inode_size = little_endian(data, 0x58, 2) if little_endian(data, 0x4C, 4) else 128
    found = _Super(
        start, 1024 << min(log, 6), blocks, little_endian(data, 0x14, 4), little_endian(data, 0x20, 4), little_endian(data, 0x28, 4),
        inode_size, size, _seed(data),
    )  # fmt: skip
    bits = found.block * 8  # of a bitmap, which is one block
    sound = 256 <= found.per_group <= bits and 0 < found.inodes_per_group <= bits
    sound = sound and 32 <= size <= 1024 and 128 <= inode_size <= found.block
    sound = sound and found.inodes_per_group * inode_size <= found.per_group * found.block
    if not sound or incompatible & _META_BG or not 0 < found.groups <= FILE_SYSTEM_GROUPS:
        return None
    return found


def _groups(disk: PlacedDisk, found: _Super) -> Iterator[tuple[int, _Group]]:
    """Yield the number of a group and its descriptor, as far as they can be read."""
    wide = found.descriptor_size >= 64
    table = disk.read(found.start + (found.first + 1) * found.block, found.groups * found.descriptor_size) or b""

    def field(at: int, low: int, low_size: int, high: int, high_size: int) -> int:
        value = little_endian(table, at + low, low_size)
        return value | (little_endian(table, at + high, high_size) << 8 * low_size if wide else 0)

    for number in range(len(table) // found.descriptor_size):
        at = number * found.descriptor_size
        group = _Group(
            field(at, 0, 4, 0x20, 4), field(at, 4, 4, 0x24, 4), field(at, 8, 4, 0x28, 4), little_endian(table, at + 0x12, 2),
            field(at, 0x1C, 2, 0x32, 2), field(at, 0x18, 2, 0x38, 2), field(at, 0x1A, 2, 0x3A, 2),
        )  # fmt: skip
        if 0 < group.block_bitmap < found.blocks and group.unused_inodes <= found.inodes_per_group:
            yield number, group


def _reserved(number: int, found: _Super) -> int:
    """Return how many blocks at the start of a group may hold copies of the superblock and the descriptors."""
    base = number
    for prime in (3, 5, 7):
        while base > 1 and base % prime == 0 and number % prime == 0:
            base //= prime
        if base == 1:
            return 1 + -(-found.groups * found.descriptor_size // found.block) + 256  # and blocks kept for growth
        base = number
    return 0


def _journal(disk: PlacedDisk, found: _Super) -> Iterator[tuple[int, int]]:
    """Yield the runs of the journal, which is as long as it was made and holds as much as was written."""
    groups = dict(_groups(disk, found))
    if 0 not in groups:
        return
    at = found.start + groups[0].inode_table * found.block + (_JOURNAL_INODE - 1) * found.inode_size
    inode = disk.read(at, 128)
    if inode is None or little_endian(inode, 40, 2) != _EXTENT_MAGIC or little_endian(inode, 46, 2):
        return
    for index in range(min(little_endian(inode, 42, 2), 4)):
        place = 52 + index * 12
        yield (
            little_endian(inode, place + 8, 4) | little_endian(inode, place + 6, 2) << 32,
            little_endian(inode, place + 4, 2),
        )
