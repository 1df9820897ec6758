"""Decompress one cluster: exactly the size asked for, never a byte more.

Both functions take what QEMU takes ("Compressed Clusters Descriptor"): the input may carry
anything after the part that is needed. They raise ``ValueError``; the caller knows which cluster
it was and says so.
"""

from __future__ import annotations

import sys
import zlib

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_WINDOW_LOG_MAX = 27  # libzstd's own default for streaming; clusters need 21 at most
_SKIPPABLE = 0x184D2A50  # to ...5F: magic of skippable frames
_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"


def inflate(data: bytes, size: int) -> bytes:
    """Return the first ``size`` bytes of the raw deflate stream in ``data``.

    One stream only; what it would produce beyond ``size`` is not looked at. The window is the
    full 32 KiB: QEMU decodes longer distances than the 4 KiB it announces.
    """
    try:
        result = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
    except zlib.error as error:
        raise ValueError(f"bad deflate data: {error}") from None
    if len(result) != size:
        raise ValueError(f"the deflate stream gives {len(result)} of {size} bytes")
    return result


def unzstd(data: bytes, size: int) -> bytes:
    """Return ``size`` bytes from the zstd frames in ``data``.

    Frames are decoded until ``size`` is reached, and the frame that reaches it must end there.
    Skippable frames between them are passed over; what follows the last one is ignored.
    """
    pieces: list[bytes] = []
    missing = size
    while missing:
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
