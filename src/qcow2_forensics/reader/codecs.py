"""Decompress one cluster: exactly the size asked for, never a byte more.

Both functions take what QEMU takes ("Compressed Clusters Descriptor"): the input may carry
anything after the part that is needed. They raise ``ValueError``; the caller knows which cluster
it was and says so.
"""

from __future__ import annotations

import functools
import sys
import zlib
from types import ModuleType
from typing import Any

_MAX_FRAMES = 256  # per cluster: writers make one, and each costs a decoder and a copy of what follows
_SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1 to 3 of a skippable frame's magic; byte 0 is 0x50 to 0x5f
_WINDOW_LOG_MAX = 27  # libzstd's own default for streaming; clusters need 21 at most


@functools.cache
def _zlib() -> Any:
    """Return the module that inflates: zlib-ng of the "fast" extra, which refuses what zlib refuses, or zlib."""
    try:
        from zlib_ng import zlib_ng
    except ImportError:
        return zlib
    return zlib_ng


@functools.cache
def _zstd() -> ModuleType:
    """Return the zstd module; imported for the first cluster, because most images have none."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def inflate(data: bytes, size: int) -> bytes:
    """Return the first ``size`` bytes of the raw deflate stream in ``data``.

    One stream only; what it would produce beyond ``size`` is not looked at. The window is the
    full 32 KiB: QEMU decodes longer distances than the 4 KiB it announces.
    """
    library = _zlib()
    try:
        result: bytes = library.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
    except library.error as error:
        raise ValueError(f"bad deflate data: {error}") from None
    if len(result) != size:
        raise ValueError(f"the deflate stream gives {len(result)} of {size} bytes")
    return result


def unzstd(data: bytes, size: int) -> bytes:
    """Return ``size`` bytes from the zstd frames in ``data``.

    Frames are decoded until ``size`` is reached, and the frame that reaches it must end there.
    Skippable frames between them are passed over; what follows the last one is ignored. More than
    256 frames are refused: no writer makes them, and decoding them is slow.
    """
    zstd = _zstd()
    pieces: list[bytes] = []
    missing = size
    while missing:
        data = _past_skippable(data)
        if len(pieces) == _MAX_FRAMES:
            raise ValueError(f"more than {_MAX_FRAMES} zstd frames")
        if not data:
            raise ValueError(f"the zstd frames give {size - missing} of {size} bytes")
        decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})
        try:
            # One byte more than needed shows a frame that is too long.
            piece = decoder.decompress(data, missing + 1)
        except zstd.ZstdError as error:
            raise ValueError(f"bad zstd data: {error}") from None
        if len(piece) > missing:
            raise ValueError(f"a zstd frame gives more than {size} bytes")
        pieces.append(piece)
        missing -= len(piece)
        if not decoder.eof:
            raise ValueError(f"a zstd frame is cut off after {size - missing} of {size} bytes")
        data = decoder.unused_data
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _past_skippable(data: bytes) -> bytes:
    """Return ``data`` without the skippable frames it starts with: a head of 8 bytes, then as many as that says."""
    at = 0
    while data[at + 1 : at + 4] == _SKIPPABLE and 0x50 <= data[at] <= 0x5F and at + 8 <= len(data):
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
    return data[at:] if at else data
