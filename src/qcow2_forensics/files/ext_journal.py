"""The journal of ext3 and ext4: blocks that a snapshot of a running guest has there, and not yet at their places.

A kernel writes metadata to the journal first, and to its place up to half a minute later. When it mounts a file
system that was not unmounted, it copies what is only in the journal. Nothing is copied here: the blocks of
the journal are read in place of those that they replace::

    superblock    number and place of the first transaction that may not be in place
    transaction   descriptor  a tag for each block that follows: which block of the file system it is
                  revocation  blocks of earlier transactions that must not be copied
                  commit      without it the transaction never happened

The blocks are a ring. Fast commits, which follow it, are not read.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from ..limits import JOURNAL_BLOCKS, JOURNAL_CONTROL_BYTES, Budget
from ..recovery.ext_volume import crc32c
from .readers import Reader, ReaderOver
from .records import Span

_MAGIC = b"\xc0\x3b\x39\x98"
_DESCRIPTOR, _COMMIT, _SUPERBLOCK_1, _SUPERBLOCK_2, _REVOCATION = 1, 2, 3, 4, 5
_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8  # flags of a tag
_64BIT, _CHECKSUM_2, _CHECKSUM_3, _FAST_COMMIT = 2, 8, 16, 32  # incompatible features
_FAST_COMMIT_BLOCKS = 256  # where the superblock does not say
_KNOWN = 0x3F  # incompatible features that Linux 6.1 knows
_HAS_SUMS = 4  # metadata_csum, in the second byte of a file system's features
_OWN_SUM = 0x3FC  # where a file system's superblock has its checksum
_JOURNAL_SUM = 0xFC  # where that of a journal has it
_HEADER = 12  # magic, type, transaction
_COMMIT_SUM = 16  # where a commit block has its checksum


class Journal(NamedTuple):
    """What is only in a journal: block of the file system -> (offset in the journal, whether its first bytes are the magic).

    ``problem`` says what of the journal was not read.
    """

    blocks: dict[int, tuple[int, bool]]
    transactions: int
    problem: str = ""


def needs_recovery(superblock: bytes) -> bool:
    """Whether a file system (its bytes from 1024) was not unmounted; raises ``OSError`` where that cannot be determined."""
    if superblock[56:58] != b"\x53\xef":
        raise OSError("its superblock is not where it belongs")
    if superblock[0x65] & _HAS_SUMS:
        stored = int.from_bytes(superblock[_OWN_SUM : _OWN_SUM + 4], "little")
        if crc32c(0xFFFF_FFFF, superblock[:_OWN_SUM]) != stored:
            raise OSError("the checksum of its superblock is wrong")
    return bool(superblock[0x60] & 4)


def read_journal(journal: Reader) -> Journal:
    """Return what a journal would write to its file system when that is mounted; raises ``Qcow2Error`` or ``OSError``."""
    head = journal.read(0, 1024)
    magic, kind, _, block, blocks, first, sequence, start = struct.unpack_from(">4s7I", head.ljust(1024, b"\0"))
    if magic != _MAGIC or kind not in (_SUPERBLOCK_1, _SUPERBLOCK_2):
        return Journal({}, 0, "it has no superblock")
    features, fast = struct.unpack_from(">I", head, 40)[0], struct.unpack_from(">I", head, 84)[0]
    if kind == _SUPERBLOCK_1:
        features = 0
    if features & ~_KNOWN or (features & _CHECKSUM_2 and features & _CHECKSUM_3):
        return Journal({}, 0, f"it has features that are not known: {features:#x}")
    if features & (_CHECKSUM_2 | _CHECKSUM_3):
        stored = struct.unpack_from(">I", head, _JOURNAL_SUM)[0]
        if crc32c(0xFFFF_FFFF, head[:_JOURNAL_SUM] + bytes(4) + head[_JOURNAL_SUM + 4 :]) != stored:
            return Journal({}, 0, "the checksum of its superblock is wrong")
    if not start:
        return Journal({}, 0)
    if block not in (1024, 2048, 4096, 8192, 16384, 32768, 65536) or blocks * block > journal.size:
        return Journal({}, 0, f"it claims {blocks} blocks of {block} bytes")
    problem = ""
    if features & _FAST_COMMIT:
        blocks -= fast or _FAST_COMMIT_BLOCKS
        problem = "its fast commits are not read"
    if not 0 < first <= start < blocks:
        return Journal({}, 0, f"it begins at block {start} of {first} to {blocks}")
    ring = _Ring(journal, block, first, blocks, features, head[48:64])
    found = ring.transactions(start, sequence)
    return Journal(found.blocks, found.transactions, problem or found.problem)


class _Ring:
    """The blocks of a journal between the first and the last, which follow each other in a ring."""

    def __init__(self, journal: Reader, block: int, first: int, last: int, features: int, uuid: bytes) -> None:
        self._journal = journal
        self._block = block
        self._first, self._last = first, last
        self._features = features
        self._has_sums = bool(features & (_CHECKSUM_2 | _CHECKSUM_3))
        self._seed = crc32c(0xFFFF_FFFF, uuid)
        self._left = last - first  # blocks that were not looked at: more would be the first ones again
        self._walked = Budget.up_to("blocks of a journal", JOURNAL_BLOCKS)
        self._revocations = Budget.up_to("revocations of a journal", JOURNAL_BLOCKS)
        self._looked_at = Budget.up_to("bytes of descriptors and commits of a journal", JOURNAL_CONTROL_BYTES)

    def transactions(self, start: int, sequence: int) -> Journal:
        """Return what the committed transactions from block ``start`` hold, each block from the last that writes it."""
        blocks: dict[int, tuple[int, int, bool]] = {}
        revoked: dict[int, int] = {}
        done = 0
        at = start
        while True:
            written: list[tuple[int, int, bool]] = []
            dropped: list[int] = []
            end = self._one(at, sequence, written, dropped)
            if end is None:
                break
            blocks |= {number: (sequence, offset, escaped) for number, offset, escaped in written}
            revoked |= dict.fromkeys(dropped, sequence)
            at, sequence, done = end, sequence + 1 & 0xFFFF_FFFF, done + 1
        kept = {
            number: (offset, escaped)
            for number, (written_in, offset, escaped) in blocks.items()
            if not (number in revoked and _is_later(revoked[number], written_in))
        }
        return Journal(kept, done)

    def _one(self, at: int, sequence: int, written: list[tuple[int, int, bool]], dropped: list[int]) -> int | None:
        """Take in one transaction; return the block after it, None where there is no whole one."""
        while self._is_left():
            data = self._journal.read(at * self._block, self._block)
            magic, kind, number = struct.unpack_from(">4sII", data)
            if magic != _MAGIC or number != sequence:
                return None
            self._looked_at.spend(self._block)
            if not self._is_sound(kind, data):
                return None
            at = self._next(at)
            if kind == _COMMIT:
                return at
            if kind == _REVOCATION:
                dropped += self._revoked(data)
            elif kind == _DESCRIPTOR:
                for block, escaped in self._tags(data):
                    if not self._is_left():
                        return None
                    written.append((block, at * self._block, escaped))
                    at = self._next(at)
            else:
                return None
        return None

    def _is_left(self) -> bool:
        """Count a block; return whether there was one left."""
        self._left -= 1
        self._walked.spend(1)
        return self._left >= 0

    def _next(self, at: int) -> int:
        return at + 1 if at + 1 < self._last else self._first

    def _is_sound(self, kind: int, data: bytes) -> bool:
        if not self._has_sums:
            return True
        place = _COMMIT_SUM if kind == _COMMIT else self._block - 4
        stored = int.from_bytes(data[place : place + 4], "big")
        return crc32c(self._seed, data[:place] + bytes(4) + data[place + 4 :]) == stored

    def _tags(self, data: bytes) -> Iterator[tuple[int, bool]]:
        """Yield each tag of a descriptor: a block of the file system, and whether its first bytes are the magic."""
        wide = bool(self._features & _64BIT)
        at, end = _HEADER, self._block - 4 * self._has_sums
        size = 16 if self._features & _CHECKSUM_3 else 12 if wide else 8
        size += 2 if self._features & _CHECKSUM_2 and not self._features & _CHECKSUM_3 else 0
        while at + size <= end:
            if self._features & _CHECKSUM_3:
                low, flags, high = struct.unpack_from(">III", data, at)
            else:
                low, _, flags = struct.unpack_from(">IHH", data, at)
                high = int.from_bytes(data[at + 8 : at + 12], "big") if wide else 0
            yield low | (high << 32 if wide else 0), bool(flags & _ESCAPED)
            at += size if flags & _SAME_UUID else size + 16
            if flags & _LAST:
                return

    def _revoked(self, data: bytes) -> Iterator[int]:
        used = min(int.from_bytes(data[_HEADER : _HEADER + 4], "big"), self._block - 4 * self._has_sums)
        width = 8 if self._features & _64BIT else 4
        for at in range(_HEADER + 4, used - width + 1, width):
            self._revocations.spend(1)
            yield int.from_bytes(data[at : at + width], "big")


def _is_later(revoked: int, written: int) -> bool:
    """Whether a revocation is of the transaction that wrote a block, or of a later one; numbers start again after 2^32."""
    return (revoked - written) & 0xFFFF_FFFF < 1 << 31


class ReplayedReader(ReaderOver):
    """A reader in which blocks of a journal are in place of those that they replace.

    ``start`` is where the file system begins in ``below``.
    """

    def __init__(self, below: Reader, start: int, block: int, journal: Reader, found: Journal) -> None:
        super().__init__(below, below.size)
        self._below = below
        self._start = start
        self._block = block
        self._journal = journal
        self._blocks = found.blocks
        self._sorted = sorted(found.blocks)

    def read(self, offset: int, length: int) -> bytes:
        data = self._below.read(offset, length)
        first = (offset - self._start) // self._block
        index = bisect_left(self._sorted, first)
        last = (offset - self._start + len(data) - 1) // self._block
        if index == len(self._sorted) or self._sorted[index] > last:
            return data
        patched = bytearray(data)
        while index < len(self._sorted) and self._sorted[index] <= last:
            number = self._sorted[index]
            at = self._start + number * self._block - offset  # of the block in what was asked for
            skip = max(0, -at)
            piece = self._of_journal(number)[skip : len(data) - at]
            patched[at + skip : at + skip + len(piece)] = piece
            index += 1
        return bytes(patched)

    def place(self, offset: int, length: int) -> Iterator[Span]:
        yield from self._below.place(offset, length)

    def replaced(self) -> Iterator[Span]:
        """Yield where on the disk the blocks are that the journal replaces."""
        for number in self._sorted:
            yield from self._below.place(self._start + number * self._block, self._block)

    def _of_journal(self, number: int) -> bytes:
        offset, escaped = self._blocks[number]
        data = self._journal.read(offset, self._block)
        return _MAGIC + data[4:] if escaped else data
