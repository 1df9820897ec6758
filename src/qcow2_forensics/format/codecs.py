"""The compression types of the format, one row each: number, name, decoder, length prober.

Everything that decodes a compressed cluster asks :func:`codec_of`; a type that has no row is refused
there, whoever asks, and is a problem of the header. A new compression type is one row here and its functions.

Decoders take what QEMU takes ("Compressed Clusters Descriptor"): the input may carry anything after
the part that is needed. They raise ``ValueError``; the caller knows which cluster it was and says so.
"""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any, NamedTuple

from ..errors import Unsupported
from ..limits import ZSTD_FRAMES, ZSTD_SKIPPABLE_FRAMES, KiB
from .header import Compression

_SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1 to 3 of a skippable frame's magic; byte 0 is 0x50 to 0x5f
_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"
_FRAME, _BLOCK = 10, 4  # bytes of a zstd frame's header, and of a block of one repeated byte, up to 128 KiB
_DEFLATE_RATIO = 1032  # a match of 258 bytes takes two bits
_SHORT = 4 * KiB  # bytes that show whether a deflate stream may begin somewhere
_WINDOW_LOG_MAX = 27  # libzstd's own default for streaming; clusters need 21 at most


class Codec(NamedTuple):
    """One compression type.

    ``decode(data, size)`` returns the first ``size`` bytes that the stream in ``data`` gives, or raises
    ``ValueError``. ``measure(data, size)`` returns them and how many bytes of ``data`` the stream takes,
    None where it does not give exactly ``size`` bytes and end there. ``cuts`` says that ``decode``
    takes the beginning of a stream that gives more, as QEMU does. ``begins(data, size)`` says from the first
    bytes whether a stream may begin there. ``best_ratio(size)`` is how many times a cluster can be compressed at most.
    ``needed(data, size)`` returns the ranges of ``data`` that ``decode`` takes in, None where it fails: a stream may
    lack its end, or be longer, or have parts that give nothing.
    """

    number: int
    name: str
    decode: Callable[[bytes, int], bytes]
    measure: Callable[[bytes, int], tuple[bytes, int] | None]
    cuts: bool
    begins: Callable[[bytes, int], bool]
    best_ratio: Callable[[int], int]
    needed: Callable[[bytes, int], tuple[tuple[int, int], ...] | None] = lambda _data, _size: None


def codec_of(compression_type: int) -> Codec:
    """Return the codec of a compression type; raises :class:`Unsupported` for a type that has none."""
    codec = _CODECS.get(compression_type)
    if codec is None:
        raise Unsupported(f"compression type {compression_type}")
    return codec


def known_codecs() -> Collection[Codec]:
    """Return the codecs of all compression types that can be read."""
    return _CODECS.values()


@functools.cache
def _zlib() -> Any:
    """Return the module that inflates: zlib-ng of the "fast" extra, which refuses what zlib refuses, or zlib."""
    try:
        from zlib_ng import zlib_ng
    except ImportError:
        return zlib
    return zlib_ng


@functools.cache
def zstd_module() -> ModuleType:
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


def _measure_deflate(data: bytes, size: int) -> tuple[bytes, int] | None:
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        result = decoder.decompress(data, size)
        if len(result) != size:
            return None
        # The end-of-stream mark may still be unread once the output is full.
        rest = decoder.decompress(decoder.unconsumed_tail, 1)
    except zlib.error:
        return None
    if rest or not decoder.eof:
        return None
    return result, len(data) - len(decoder.unused_data)


def _begins_deflate(data: bytes, size: int) -> bool:
    try:
        inflate(data, min(size, _SHORT))
    except ValueError:
        return False
    return True


def _deflate_ratio(_: int) -> int:
    return _DEFLATE_RATIO


def _needed_deflate(data: bytes, size: int) -> tuple[tuple[int, int], ...] | None:
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        result = decoder.decompress(data, size)
    except zlib.error:
        return None
    rest = len(decoder.unconsumed_tail) + len(decoder.unused_data)
    return ((0, len(data) - rest),) if len(result) == size else None


def unzstd(data: bytes, size: int) -> bytes:
    """Return ``size`` bytes from the zstd frames in ``data``.

    Frames are decoded until ``size`` is reached, and the frame that reaches it must end there.
    Skippable frames between them are passed over; what follows the last one is ignored.
    """
    return _unzstd(data, size)[0]


def _measure_zstd(data: bytes, size: int) -> tuple[bytes, int] | None:
    try:
        content, frames = _unzstd(data, size)
    except ValueError:
        return None
    return content, frames[-1][1] if frames else 0


def _needed_zstd(data: bytes, size: int) -> tuple[tuple[int, int], ...] | None:
    try:
        return tuple(_unzstd(data, size)[1])
    except ValueError:
        return None


def _unzstd(data: bytes, size: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Return ``size`` bytes and the frames of ``data`` that gave them; each is handed over without a copy."""
    zstd = zstd_module()
    view = memoryview(data)
    pieces: list[bytes] = []
    frames: list[tuple[int, int]] = []
    missing, at, skipped = size, 0, 0
    while missing:
        while data[at + 1 : at + 4] == _SKIPPABLE and 0x50 <= data[at] <= 0x5F and at + 8 <= len(data):
            skipped += 1
            if skipped > ZSTD_SKIPPABLE_FRAMES:
                raise ValueError(f"more than {ZSTD_SKIPPABLE_FRAMES} skippable zstd frames")
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if at >= len(data):
            raise ValueError(f"the zstd frames give {size - missing} of {size} bytes")
        if len(pieces) == ZSTD_FRAMES:
            raise ValueError(f"more than {ZSTD_FRAMES} zstd frames")
        try:
            # A frame that does not end is an error for QEMU too, however many bytes it has given by then.
            end = at + zstd.get_frame_size(view[at:])
            decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})
            # One byte more than needed shows a frame that is too long.
            piece = decoder.decompress(view[at:end], missing + 1)
        except zstd.ZstdError as error:
            # The library's own sentences are addressed to who calls it; its reason is their last part.
            raise ValueError(f"bad zstd data: {str(error).rpartition(': ')[2].rstrip('.')}") from None
        if len(piece) > missing or not decoder.eof:
            raise ValueError(f"a zstd frame gives more than {size} bytes")
        pieces.append(piece)
        frames.append((at, end))
        missing -= len(piece)
        at = end
    return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), frames


def _begins_zstd(data: bytes, _: int) -> bool:
    return data[:4] == _FRAME_MAGIC or (data[1:4] == _SKIPPABLE and data[0] & 0xF0 == 0x50)


def _zstd_ratio(size: int) -> int:
    return size // (_FRAME + _BLOCK * -(-size // (128 * KiB)))


_CODECS = {
    codec.number: codec
    for codec in (
        Codec(
            Compression.ZLIB, "zlib", inflate, _measure_deflate, True, _begins_deflate, _deflate_ratio, _needed_deflate
        ),
        Codec(Compression.ZSTD, "zstd", unzstd, _measure_zstd, False, _begins_zstd, _zstd_ratio, _needed_zstd),
    )
}
