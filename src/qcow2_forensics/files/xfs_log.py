"""The log of an XFS file system: whether it ends with an unmount, and so holds nothing that is not at its place.

The log is a ring of blocks of 512 bytes, and the first word of each is the number of times that the ring was gone
through, except in the header of a record, where it follows the magic::

    7 7 7 7 7 7 | 6 6 6 6 6 6 6        the end of the log is where the number goes down
            └─ the last record: a clean one has one operation, an unmount
"""

from __future__ import annotations

from .readers import Reader, whole

_BLOCK = 512
_RECORD = 0xFEEDBABE
_UNMOUNT = 0x20  # flag of an operation
_OF_LOG = 0xAA  # client of an operation
_VERSIONS, _FORMATS = (1, 2), (1, 2, 3)
_SIZE_IN_HEADER = 32 << 10  # bytes of a record that one block of its header describes
_FARTHEST = 2048  # blocks from the end of the log to the header of its last record: four times the largest record


def has_changes(reader: Reader) -> bool:
    """Return whether the log holds changes that may not be at their places.

    Raises ``OSError`` where that cannot be determined, because it is not as a log is written, and ``Qcow2Error``.
    """
    log = _Log(reader)
    end, cycle = log.end()
    for back in range(1, min(_FARTHEST, log.blocks) + 1):
        at = (end - back) % log.blocks
        record = log.read(at)
        if _number(record, 0) == _RECORD:
            if not log.is_own(record, at, cycle):
                raise OSError(f"the record in its block {at} is not one of this log")
            return not _is_unmount(log, at, record, back)
    raise OSError("no record is before its end")


def _is_unmount(log: _Log, at: int, record: bytes, to_end: int) -> bool:
    """Whether a record, ``to_end`` blocks before the end of the log, is that of an unmount."""
    version, length, operations, largest = (_number(record, place) for place in (8, 12, 40, 320))
    headers = max(1, -(-largest // _SIZE_IN_HEADER)) if version & 2 else 1
    operation = log.read((at + headers) % log.blocks)
    is_unmount = operation[8] == _OF_LOG and bool(operation[9] & _UNMOUNT)
    return operations == 1 and headers + -(-length // _BLOCK) == to_end and is_unmount


class _Log:
    def __init__(self, reader: Reader) -> None:
        head = reader.read(0, _BLOCK)
        block, per_group, group_bits = _number(head, 4), _number(head, 84), head[124]
        start, blocks = int.from_bytes(head[48:56], "big"), _number(head, 96)
        if not start:
            raise OSError("it is on another device")
        if not 512 <= block <= 65536 or not 0 < group_bits < 32 or not blocks:
            raise OSError("the superblock does not say where it is")
        group, within = start >> group_bits, start & (1 << group_bits) - 1
        self._reader = reader
        self._uuid = head[32:48]
        self._start = (group * per_group + within) * block
        self.blocks = blocks * block // _BLOCK

    def read(self, number: int) -> bytes:
        return whole(self._reader, self._start + number * _BLOCK, _BLOCK)

    def end(self) -> tuple[int, int]:
        """Return the block after the last record, and the number of the round that it was written in."""
        first, last = self._round(0), self._round(self.blocks - 1)
        if not first:
            raise OSError("nothing was ever written to it, not even by what made the file system")
        if first == last:
            return self.blocks, first
        low, high = 0, self.blocks - 1  # of the first round, and of the one before
        while high - low > 1:
            middle = (low + high) // 2
            if self._round(middle) == first:
                low = middle
            else:
                high = middle
        if not self._round(high) == last == first - 1:
            raise OSError(f"after its block {low} comes none of the round before")
        return high, first

    def is_own(self, record: bytes, at: int, cycle: int) -> bool:
        """Whether the header of a record names its own place, and this file system."""
        placed = (_number(record, 4), _number(record, 16), _number(record, 20)) == (cycle, cycle, at)
        known = _number(record, 8) in _VERSIONS and _number(record, 300) in _FORMATS
        return placed and known and record[304:320] == self._uuid

    def _round(self, number: int) -> int:
        data = self.read(number)
        return _number(data, 4 if _number(data, 0) == _RECORD else 0)


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")
