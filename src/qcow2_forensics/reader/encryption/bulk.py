"""Many sectors at a time, with numpy: the block cipher runs once over all of them.

The only module of the read path that imports numpy; :mod:`.sectors` imports it at the first long
read of an encrypted image, and does without where numpy is absent.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...format.header import SECTOR

_Words = npt.NDArray[np.uint64]
_WORD = "<u8"
_BLOCKS = SECTOR // 16
_SECTORS = 128  # per piece: 64 KiB with its scratch stays in the cache, and below malloc's mmap threshold
_POWERS = np.arange(_BLOCKS, dtype=_WORD)  # block i of a sector has its tweak times x^i
_REST = np.uint64(64) - _POWERS


class Context(Protocol):
    """A cipher context of the ``cryptography`` library, in ecb mode."""

    def update_into(self, data: memoryview, buf: bytearray) -> int: ...


def xts_decrypt(context: Context, tweaks: bytes, data: bytes) -> bytes:
    """Return plain sectors; ``tweaks`` holds each sector's first tweak, 16 bytes."""
    words = np.frombuffer(data, _WORD).reshape(-1, SECTOR // 8)
    first = np.frombuffer(tweaks, _WORD).reshape(-1, 2)
    scratch = _Scratch(min(_SECTORS, len(first)))
    plain = io.BytesIO()  # hands its buffer over without a copy
    for index in range(0, len(first), _SECTORS):
        stored = words[index : index + _SECTORS]
        mixed = scratch.mixed[: len(stored)]
        masks = scratch.tweaks_of(first[index : index + _SECTORS])
        np.bitwise_xor(stored, masks, out=mixed)
        context.update_into(mixed.data.cast("B"), scratch.output)
        np.bitwise_xor(scratch.decrypted[: len(stored)], masks, out=mixed)
        plain.write(mixed.data)
    return plain.getvalue()


class _Scratch:
    """Arrays of one call, used again for every piece of it."""

    def __init__(self, sectors: int) -> None:
        self.mixed = np.empty((sectors, SECTOR // 8), _WORD)
        self.output = bytearray(sectors * SECTOR + 15)  # the library asks for a block more than it writes
        self.decrypted = np.frombuffer(self.output, _WORD, sectors * SECTOR // 8).reshape(sectors, -1)
        self._tweaks = np.empty((sectors, _BLOCKS, 2), _WORD)
        self._over = np.empty((sectors, _BLOCKS), _WORD)
        self._back = np.empty((sectors, _BLOCKS), _WORD)

    def tweaks_of(self, first: _Words) -> _Words:
        """Return the tweaks of every block of some sectors: the first of each, times x^0 to x^31.

        A tweak is a polynomial of 128 bits, low word first. Times x^i shifts it left by i; the bits
        shifted out, ``over``, come back times x^7 + x^2 + x + 1: fewer than 32 bits, so once is enough.
        """
        count = len(first)
        low, high = first[:, :1], first[:, 1:]
        tweaks, over, back = self._tweaks[:count], self._over[:count], self._back[:count]
        np.right_shift(high, _REST, out=over)
        np.left_shift(over, np.uint64(7), out=back)
        back ^= over
        over <<= np.uint64(1)
        back ^= over
        over <<= np.uint64(1)
        back ^= over
        np.left_shift(low, _POWERS, out=over)
        np.bitwise_xor(over, back, out=tweaks[:, :, 0])
        np.left_shift(high, _POWERS, out=over)
        np.right_shift(low, _REST, out=back)
        np.bitwise_or(over, back, out=tweaks[:, :, 1])
        return tweaks.reshape(count, -1)


def cbc_decrypt(ecb_decrypt: Callable[[bytes], bytes], ivs: bytes, data: bytes) -> bytes:
    """Return plain sectors; ``ivs`` holds each sector's vector, one cipher block long."""
    vectors = np.frombuffer(ivs, np.uint8).reshape(len(data) // SECTOR, -1)
    sectors = np.frombuffer(data, np.uint8).reshape(-1, SECTOR)
    block = vectors.shape[1]
    previous = np.empty((min(_SECTORS, len(sectors)), SECTOR), np.uint8)
    plain = io.BytesIO()
    for index in range(0, len(sectors), _SECTORS):
        stored = sectors[index : index + _SECTORS]
        chained = previous[: len(stored)]
        chained[:, :block] = vectors[index : index + _SECTORS]
        chained[:, block:] = stored[:, :-block]
        decrypted = ecb_decrypt(data[index * SECTOR : (index + _SECTORS) * SECTOR])
        mixed = chained.reshape(-1).view(_WORD)
        mixed ^= np.frombuffer(decrypted, _WORD)
        plain.write(mixed.data)
    return plain.getvalue()
