"""The records of the RAM section: which page holds what.

A record is a big-endian word, page address in the high bits and flags in the low ones, then::

    MEM_SIZE 0x04   one entry per block until their sizes add up to the address part
    ZERO     0x02   [block name] one fill byte
    PAGE     0x08   [block name] the page itself
    EOS      0x10   the end of this section's records
    XBZRLE   0x40   [block name] differences to the page as it was sent before
    COMPRESSED 0x100 [block name] the page in zlib
    FLUSH   0x200   nothing

with the block's name only where CONTINUE (0x20) is not set. Records of neighbouring pages that lie
evenly in the stream are joined into one segment ``(block, first page, pages, value)`` while they are
read. ``value`` is the stream offset of the first page's bytes, ``-1 - fill``, or as :mod:`.page_codecs` has it.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from ..errors import LimitExceeded, Unsupported
from ..limits import Limits
from .cursor import WINDOW, Cursor, broken, truncated
from .page_codecs import DELTA, PACKED

ZERO: Final = 0x02
MEM_SIZE: Final = 0x04
PAGE: Final = 0x08
EOS: Final = 0x10
CONTINUE: Final = 0x20
XBZRLE: Final = 0x40
HOOK: Final = 0x80
COMPRESSED: Final = 0x100
FLUSH: Final = 0x200

_STREAK = 13  # equal records before numpy looks ahead: where its fixed cost is paid back
_RECORD = 8 + 1 + 255 + 1  # the longest record without the page: word, name, fill byte
_MAPPED_HEADER = struct.Struct(">IQQQ")  # version, page size, bitmap offset, pages offset
_BITMAP_PIECE = 1 << 16  # bytes of a mapped-ram bitmap looked at together


@dataclass(slots=True)
class RamBlock:
    """A block as MEM_SIZE lists it."""

    name: str
    size: int
    pages: int
    address: int | None = None
    pages_offset: int | None = None


@dataclass(slots=True)
class RamRecords:
    """What the RAM sections hold: fills up while the stream is read."""

    limits: Limits
    page_size: int = 4096
    ignore_shared: bool = False
    mapped_ram: bool = False
    blocks: list[RamBlock] = field(default_factory=list)
    segments: array[int] = field(default_factory=lambda: array("q"))
    """Groups of four: block index, first page, pages, value; in the order of the stream."""
    _numbers: dict[str, int] = field(default_factory=dict)
    _current: int = -1
    _decoded: int = 0
    """Pages that have to be decoded."""
    _most: int = 0
    _steps: npt.NDArray[np.uint64] | None = None

    @property
    def stride(self) -> int:
        """Stream bytes from one page of a segment to the next: the page, and the word before it."""
        return self.page_size if self.mapped_ram else self.page_size + 8

    def parse(self, cursor: Cursor) -> None:
        """Read the records of one section, up to and including its EOS.

        One loop over local names, because this runs once per page where memory is fragmented; what
        is not a page of the current block is left to :meth:`_rare`.
        """
        mask, stride = self.page_size - 1, self.page_size + 8
        shift = mask.bit_length()
        page_continued, zero_continued = PAGE | CONTINUE, ZERO | CONTINUE
        word_at = struct.Struct(">Q").unpack_from
        buffer, base, index = cursor.buffer, cursor.base, cursor.index
        self._most = cursor.most_runs
        first = count = value = streak = 0
        next_page = next_value = -1
        while True:
            if index + _RECORD > len(buffer):
                cursor.base, cursor.index = base, index
                if not cursor.fill(9) and len(cursor.buffer) < 8:
                    self._flush(first, _within(cursor.source.size, count, value, stride), value)
                    raise truncated(cursor.source.size)
                buffer, base, index = cursor.buffer, cursor.base, 0
            (word,) = word_at(buffer, index)
            flags = word & mask
            if flags == page_continued:
                here, step = base + index + 8, stride
            elif flags == zero_continued and index + 8 < len(buffer):
                here, step = -1 - buffer[index + 8], 9
            else:
                self._flush(first, count, value)
                cursor.buffer, cursor.base, cursor.index = buffer, base, index + 8
                started = self._rare(cursor, word, flags)
                if started is None:
                    return
                first, count, value = started
                next_page, next_value, streak = first + 1, value if value < 0 else value + stride, 0
                buffer, base, index = cursor.buffer, cursor.base, cursor.index
                continue
            page = word >> shift
            if count and page == next_page and here == next_value:
                count += 1
                streak += 1
                if streak >= _STREAK:
                    streak = 0
                    more = self._look_ahead(buffer, index, word, step)
                    count += more
                    page += more
                    index += more * step
                    here += more * step if here >= 0 else 0
            else:
                self._flush(first, count, value)
                first, count, value, streak = page, 1, here, 0
            next_page = page + 1
            next_value = here if here < 0 else here + stride
            index += step

    def _rare(self, cursor: Cursor, word: int, flags: int) -> tuple[int, int, int] | None:
        """Take a record that is not a page of the current block.

        Returns the start of a new segment (first page, pages, value), of no pages for a record that
        holds none, and None for the end of the section.
        """
        kind = flags & ~CONTINUE
        if kind in (XBZRLE, COMPRESSED):
            self._encoded(cursor, word // self.page_size, kind, named=not flags & CONTINUE)
            return 0, 0, -1
        cursor.step()
        if flags & CONTINUE and kind in (PAGE, ZERO):
            raise truncated(cursor.source.size)
        if flags == EOS:
            return None
        if kind in (PAGE, ZERO):
            self._current = self._find(cursor.name(), cursor.position)
            first = word // self.page_size
            if kind == ZERO:
                return first, 1, -1 - cursor.uint(1)
            value = cursor.position
            cursor.skip(self.page_size)
            return first, 1, value
        if flags == MEM_SIZE:
            self._sizes(cursor, word ^ flags)
        elif flags != FLUSH:
            if flags & HOOK:
                raise Unsupported("a migration over RDMA")
            raise broken(f"RAM record with unknown flags {flags:#x}", cursor.position - 8)
        return 0, 0, -1

    def _encoded(self, cursor: Cursor, page: int, kind: int, *, named: bool) -> None:
        """Take a page that has to be decoded when it is read; each is a segment of its own."""
        if named:
            self._current = self._find(cursor.name(), cursor.position)
        at = cursor.position
        if kind == XBZRLE:
            if (encoding := cursor.uint(1)) != 1:
                raise broken(f"differences of encoding {encoding}", at)
            length, most, value = cursor.uint(2), self.page_size, DELTA + at
        else:
            length, most, value = cursor.uint(4), 2 * self.page_size, PACKED + at
        if length > most:
            raise broken(f"page of {length} encoded bytes", at)
        if cursor.position + length > cursor.source.size:
            raise truncated(cursor.source.size)
        cursor.skip(length)
        self._decoded += 1
        if self._decoded > cursor.most_decoded:
            raise LimitExceeded("ram_runs", self._decoded, cursor.most_decoded)
        self._most = min(self.limits.ram_runs, self._most + 1)
        self._flush(page, 1, value)

    def _look_ahead(self, buffer: bytes, index: int, word: int, step: int) -> int:
        """Count the records after the one at ``index`` that go on as it does, with numpy.

        No record is trusted that was not looked at: the words (and fill bytes) are compared one
        by one with what they would have to be, only not in Python.
        """
        if self._steps is None:
            self._steps = (np.arange(WINDOW // 9 + 2, dtype=np.uint64) + np.uint64(1)) * np.uint64(self.page_size)
        start = index + step
        most = min((len(buffer) - start - 9) // step + 1, len(self._steps))
        done, width = 0, 64
        while done < most:
            width = min(width, most - done)
            at = start + done * step
            words = np.ndarray((width,), dtype=">u8", buffer=buffer, offset=at, strides=(step,))
            differs = words != self._steps[done : done + width] + np.uint64(word)
            if step == 9:
                fills = np.ndarray((width,), dtype=np.uint8, buffer=buffer, offset=at + 8, strides=(9,))
                differs |= fills != buffer[index + 8]
            stop = int(differs.argmax())
            if differs[stop]:
                return done + stop
            done += width
            width *= 16
        return done

    def _flush(self, first: int, count: int, value: int) -> None:
        if not count:
            return
        if self._current < 0:
            raise broken("RAM record before its block is named", max(value, 0))
        block = self.blocks[self._current]
        if first + count > block.pages:
            raise broken(f"page {first + count - 1:#x} of a block of {block.pages:#x} pages", max(value, 0))
        if len(self.segments) >= 4 * self._most:
            raise LimitExceeded("ram_runs", self._most + 1, self._most)
        self.segments.extend((self._current, first, count, value))

    def _find(self, name: str, position: int) -> int:
        number = self._numbers.get(name)
        if number is None:
            raise broken("page of a RAM block that was not announced", position)
        return number

    def _sizes(self, cursor: Cursor, total: int) -> None:
        """Read the list of blocks, which ends where their sizes add up to ``total``."""
        if total > self.limits.guest_memory_bytes:
            raise LimitExceeded("guest_memory_bytes", total, self.limits.guest_memory_bytes)
        if self.blocks:
            raise broken("second list of RAM blocks", cursor.position)
        listed = 0
        while listed < total:
            if len(self.blocks) >= self.limits.ram_blocks:
                raise LimitExceeded("ram_blocks", len(self.blocks) + 1, self.limits.ram_blocks)
            position = cursor.position
            name = cursor.name()
            size = cursor.uint(8)
            listed += size
            if listed > total or name in self._numbers:
                raise broken("RAM block list that contradicts itself", position)
            block = RamBlock(name, size, -(-size // self.page_size))
            if self.ignore_shared:
                block.address = cursor.uint(8)
            self._numbers[name] = len(self.blocks)
            self.blocks.append(block)
            if self.mapped_ram:
                self._mapped_block(cursor, block)

    def _mapped_block(self, cursor: Cursor, block: RamBlock) -> None:
        """Read a mapped-ram block: fixed places for its pages, a bitmap says which are not zero.

        The offsets count from the start of the file, not of the stream.
        """
        at = cursor.position
        start = int(getattr(cursor.source, "start", 0))
        version, page_size, bitmap, pages = _MAPPED_HEADER.unpack(cursor.take(_MAPPED_HEADER.size))
        if version != 1:
            raise Unsupported(f"mapped-ram version {version}")
        if page_size != self.page_size:
            raise broken(f"mapped-ram pages of {page_size} bytes", at)
        bitmap -= start
        pages -= start
        words = -(-block.pages // 64)
        if bitmap < cursor.position or pages < bitmap + 8 * words:
            raise broken("mapped-ram block that overlaps itself", at)
        block.pages_offset = pages
        self._current = len(self.blocks) - 1
        done = 0
        while done < block.pages:
            length = min(_BITMAP_PIECE, 8 * (-(-(block.pages - done) // 64)))
            where = bitmap + done // 8
            if where + length > cursor.source.size:
                raise truncated(cursor.source.size)
            data = cursor.read(where, length)
            bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")[: block.pages - done]
            edges = np.flatnonzero(np.diff(bits)) + 1
            for begin, end in zip([0, *edges.tolist()], [*edges.tolist(), len(bits)], strict=True):
                first = done + begin
                if bits[begin] and pages + (done + end) * self.page_size > cursor.source.size:
                    raise truncated(cursor.source.size)
                self._flush(first, end - begin, pages + first * self.page_size if bits[begin] else -1)
            done += len(bits)
        cursor.jump(pages + block.size)


def _within(size: int, count: int, value: int, stride: int) -> int:
    """Return how many of a segment's pages are whole in a stream of ``size`` bytes."""
    if value < 0:
        return count
    return max(0, min(count, (size - value + 8) // stride))
