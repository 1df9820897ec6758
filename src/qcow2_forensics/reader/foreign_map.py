"""Where VHD and VMDK files store their guest ranges: the allocation tables of the two, read for maps and holes.

The libraries that read such files do not say what is unallocated. Only dynamic VHD and plain sparse VMDK
files have a map here, the ones for which QEMU has one too; of others all is taken for data.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator

from ..errors import FormatError, Qcow2Error
from ..format.source import Source, source_name
from ..text import cut
from .runs import Kind, Run, coalesced

_SECTOR = 512
_TABLE_ENTRIES = 8192  # of a block allocation table, read at a time
_VHD_HEADER = struct.Struct(">8sQQIII")  # cookie, data offset, table offset, version, table entries, block size
_VHD_UNALLOCATED = 0xFFFFFFFF
_VMDK_HEADER = struct.Struct("<4sIIQQQQIQQ")
_VMDK_COMPRESSED = 1 << 16  # of the flags: grains have heads and sizes of their own
_VMDK_AT_END = (1 << 64) - 1  # the grain directory is named by a footer


def foreign_map(kind: str, source: Source, size: int) -> ForeignMap | None:
    """Return the map of a file by QEMU's name of its format, None where there is none to be had."""
    try:
        if kind == "vpc":
            return _vhd(source, size)
        if kind == "vmdk":
            return _vmdk(source, size)
    except (Qcow2Error, struct.error):
        pass  # the library decides whether such a file can be read
    return None


def _whole(source: Source, offset: int, length: int) -> bytes:
    """Return a part of an allocation table; what is cut off is an error, never taken for holes."""
    data = source.read(offset, length)
    if len(data) < length:
        name = cut(source_name(source))
        raise FormatError(f"an allocation table of {name} is cut off", offset=offset, field="allocation table")
    return data


class ForeignMap(ABC):
    """What a guest range consists of: blocks of one size, each found through a 32-bit entry.

    A subclass says where the entries are.
    """

    block_size: int
    zeros: Kind

    @abstractmethod
    def entries(self, first: int) -> tuple[int, list[int | None]]:
        """Return host offsets from block ``first`` on, None for what is not stored, and the number of the first."""

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """Yield the runs that tile a range, coalesced."""
        return coalesced(self._blocks(offset, length))

    def _blocks(self, offset: int, length: int) -> Iterator[Run]:
        end, size = offset + length, self.block_size
        first, known = 0, list[int | None]()
        while offset < end:
            number, inside = divmod(offset, size)
            if not first <= number < first + len(known):
                first, known = self.entries(number)
            block = known[number - first]
            host = None if block is None else block + inside
            kind = self.zeros if host is None else Kind.DATA
            count = min(end - offset, size - inside)
            yield Run(offset, count, kind, host)
            offset += count


class _Vhd(ForeignMap):
    """A dynamic VHD: one table, and before each block a bitmap that QEMU does not look at."""

    zeros = Kind.ZERO

    def __init__(self, source: Source, table: int, count: int, block_size: int) -> None:
        self._source, self._table, self._count = source, table, count
        self.block_size = block_size
        self._bitmap = -(-block_size // (8 * _SECTOR) // _SECTOR) * _SECTOR

    def entries(self, first: int) -> tuple[int, list[int | None]]:
        count = max(1, min(_TABLE_ENTRIES, self._count - first))
        words = struct.unpack(f">{count}I", _whole(self._source, self._table + 4 * first, 4 * count))
        return first, [None if word == _VHD_UNALLOCATED else word * _SECTOR + self._bitmap for word in words]


def _vhd(source: Source, size: int) -> _Vhd | None:
    footer = source.read(0, _SECTOR)
    if footer[:8] != b"conectix" or footer[60:64] != b"\0\0\0\3":
        return None
    at = int.from_bytes(footer[16:24], "big")
    cookie, _, table, _, count, block_size = _VHD_HEADER.unpack(source.read(at, _VHD_HEADER.size))
    if cookie != b"cxsparse" or block_size < _SECTOR or block_size % _SECTOR or count * block_size < size:
        return None
    return _Vhd(source, table, count, block_size)


class _Vmdk(ForeignMap):
    """A sparse VMDK: a directory of tables of grains."""

    zeros = Kind.HOLE

    def __init__(self, source: Source, directory: int, per_table: int, grain: int) -> None:
        self._source, self._directory, self._per_table = source, directory, per_table
        self.block_size = grain

    def entries(self, first: int) -> tuple[int, list[int | None]]:
        number = first // self._per_table
        place = int.from_bytes(_whole(self._source, self._directory + 4 * number, 4), "little") * _SECTOR
        size = 4 * self._per_table
        words = struct.unpack(f"<{self._per_table}I", _whole(self._source, place, size) if place else bytes(size))
        return number * self._per_table, [word * _SECTOR if word else None for word in words]


def _vmdk(source: Source, size: int) -> _Vmdk | None:
    head = _VMDK_HEADER.unpack(source.read(0, _VMDK_HEADER.size))
    magic, _, flags, capacity, grain, _, _, per_table, _, directory = head
    sound = 0 < per_table <= _TABLE_ENTRIES and 0 < grain <= 1 << 20 and capacity * _SECTOR >= size
    if magic != b"KDMV" or flags & _VMDK_COMPRESSED or directory in (0, _VMDK_AT_END) or not sound:
        return None
    return _Vmdk(source, directory * _SECTOR, per_table, grain * _SECTOR)
