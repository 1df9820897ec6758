"""Reading what the program ``lzop`` wrote, as libvirt has it compress save files.

::

    header   magic, versions, method, level, flags, mode, times, name, checksum       numbers are big-endian
    block    u32 length, u32 stored length, checksums as the flags say, the bytes; as they are when the two are equal
    end      u32 0

The blocks are LZO1X, which ``lzallright`` decodes (MIT licence, wheels; the extra ``lzop``).
"""

from __future__ import annotations

import importlib
import io
import zlib
from typing import BinaryIO, Final

from ..errors import Unsupported
from ..limits import SAVE_FILE_LZOP_BLOCKS, Budget, MiB

_MAGIC: Final = b"\x89LZO\0\r\n\x1a\n"
_MOST_BLOCK = MiB  # bytes of a block; lzop writes 256 KiB, and what one byte of LZO decodes to is bounded by 255
_BYTES_PER_BLOCK = 512  # of a file: 256 KiB of zeros take 1 KiB
_METHODS = (1, 2, 3)  # of compression, all decoded alike
_WITH_LEVEL = 0x0940  # the version from which a header has the least version, the level and the high half of the time
_ADLER, _ADLER_STORED, _EXTRA, _CRC, _CRC_STORED, _FILTER = 0x1, 0x2, 0x40, 0x100, 0x200, 0x800


class DamagedError(Exception):
    """The file is no lzop file, or damaged."""


class LzopReader(io.RawIOBase):
    """The decompressed bytes of an lzop file, block by block; ``size`` is that of the file.

    Raises :class:`DamagedError`, EOFError, and :class:`LimitExceeded` for blocks that hold next to nothing.
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        try:
            self._lzo = importlib.import_module("lzallright")
        except ImportError:
            raise Unsupported("libvirt save file compressed with lzop: install lzallright") from None
        self._stream = stream
        self._blocks = Budget.up_to("blocks of an lzop file", SAVE_FILE_LZOP_BLOCKS + size // _BYTES_PER_BLOCK)
        self._flags: int | None = None
        self._ended = False

    def read(self, size: int = -1, /) -> bytes:  # noqa: ARG002 - as every reader
        """Return the next block, whatever its size; b"" at the end."""
        if self._ended:
            return b""
        if self._flags is None:
            self._flags = self._header()
        length = self._number()
        if not length:
            self._ended = True
            return b""
        self._blocks.spend(1)
        stored = self._number()
        if length > _MOST_BLOCK or not 0 < stored <= length:
            raise DamagedError(f"a block of {length} bytes, stored in {stored}")
        adler = self._number() if self._flags & _ADLER else None
        crc = self._number() if self._flags & _CRC else None
        if stored < length:
            for flag in (_ADLER_STORED, _CRC_STORED):
                if self._flags & flag:
                    self._number()
        data = self._exactly(stored)
        if stored < length:
            try:
                data = bytes(self._lzo.LZOCompressor.decompress(data, length))
            except (self._lzo.LZOError, self._lzo.InputNotConsumed) as error:
                raise DamagedError(f"a block cannot be decoded: {error}") from error
        if (
            len(data) != length
            or (adler is not None and zlib.adler32(data) != adler)
            or (crc is not None and zlib.crc32(data) != crc)
        ):
            raise DamagedError("a block is not what its checksum says")
        return data

    def _header(self) -> int:
        if self._exactly(len(_MAGIC)) != _MAGIC:
            raise DamagedError("no lzop file")
        version = self._number(2)
        self._number(2)
        if version >= _WITH_LEVEL:
            self._number(2)
        method = self._number(1)
        if version >= _WITH_LEVEL:
            self._number(1)
        flags = self._number()
        if method not in _METHODS or flags & (_FILTER | _EXTRA):
            raise Unsupported(f"lzop file of method {method} with flags {flags:#x}")
        for _ in range(3 if version >= _WITH_LEVEL else 2):  # mode and times
            self._number()
        self._exactly(self._number(1))  # the name
        self._number()  # the checksum of the header
        return flags

    def _number(self, size: int = 4) -> int:
        return int.from_bytes(self._exactly(size), "big")

    def _exactly(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError("the file ends inside a block")
        return data
