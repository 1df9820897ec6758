"""Many sectors at a time, with numpy: the block cipher runs once over all of them.

The only module of the read path that imports numpy; :mod:`.sectors` imports it at the first long
read of an encrypted image, and does without where numpy is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from ..structures import SECTOR

_Words = npt.NDArray[np.uint64]
_WORD = "<u8"
_PIECE = 512 * SECTOR  # one piece with its tweaks stays in the second-level cache
_POWERS = np.arange(SECTOR // 16, dtype=_WORD)  # block i of a sector has its tweak times x^i
_REST = np.uint64(64) - _POWERS


def xts_decrypt(ecb_decrypt: Callable[[bytes | memoryview], bytes], tweaks: bytes, data: bytes) -> bytes:
    """Return plain sectors; ``tweaks`` holds each sector's first tweak, 16 bytes."""
    return b"".join(_xts_pieces(ecb_decrypt, tweaks, data))


def _xts_pieces(ecb_decrypt: Callable[[bytes | memoryview], bytes], tweaks: bytes, data: bytes) -> Iterator[memoryview]:
    words = np.frombuffer(data, _WORD)
    first = np.frombuffer(tweaks, _WORD).reshape(-1, 2)
    sectors = _PIECE // SECTOR
    for index in range(0, len(first), sectors):
        masks = _all_tweaks(first[index : index + sectors])
        stored = words[index * SECTOR // 8 :][: len(masks)]
        plain = np.frombuffer(ecb_decrypt((stored ^ masks).view(np.uint8).data), _WORD)
        np.bitwise_xor(plain, masks, out=masks)
        yield masks.data


def _all_tweaks(first: _Words) -> _Words:
    """Return the tweaks of every block of some sectors: the first of each, times x^0 to x^31.

    A tweak is a polynomial of 128 bits, low word first. Times x^i shifts it left by i; the bits
    shifted out, ``over``, come back times x^7 + x^2 + x + 1. They are fewer than 32, so once is enough.
    """
    low, high = first[:, :1], first[:, 1:]
    tweaks = np.empty((len(first), SECTOR // 16, 2), _WORD)
    over = high >> _REST
    back = over << np.uint64(7)
    back ^= over
    over <<= np.uint64(1)
    back ^= over
    over <<= np.uint64(1)
    back ^= over
    np.bitwise_xor(low << _POWERS, back, out=tweaks[:, :, 0])
    np.bitwise_or(high << _POWERS, low >> _REST, out=tweaks[:, :, 1])
    return tweaks.reshape(-1)


def cbc_decrypt(ecb_decrypt: Callable[[bytes | memoryview], bytes], ivs: bytes, data: bytes) -> bytes:
    """Return plain sectors; ``ivs`` holds each sector's vector, one cipher block long."""
    sectors = len(data) // SECTOR
    block = len(ivs) // sectors
    previous = np.empty((sectors, SECTOR), np.uint8)
    previous[:, :block] = np.frombuffer(ivs, np.uint8).reshape(sectors, block)
    previous[:, block:] = np.frombuffer(data, np.uint8).reshape(sectors, SECTOR)[:, :-block]
    chained: _Words = previous.reshape(-1).view(_WORD)
    return (np.frombuffer(ecb_decrypt(data), _WORD) ^ chained).tobytes()
