"""Ciphers of 512-byte sectors, each numbered, many decrypted per call.

A mode such as ``xts-plain64`` or ``cbc-essiv:sha256`` names a block mode and how a sector's number
becomes its initialisation vector. What the modes share is that vector, so it is made for all
sectors of a call at once::

    sector numbers --ivs()--> one vector per sector --mode--> plain sectors

Long calls go through :mod:`.bulk`, which needs numpy and is imported at the first of them; short
ones, and all of them where numpy is absent, take one context of ``cryptography`` per sector.
"""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ...errors import FormatError, Unsupported
from ...format.header import SECTOR
from ...text import cut

if TYPE_CHECKING:
    from types import ModuleType

_KEY_BYTES = {"aes": (16, 24, 32), "cast5": (16,)}
_OTHER_CIPHERS = ("serpent", "twofish")  # QEMU has them; no library with wheels does, see docs/validation.md
# Bytes of each digest.
HASHES = {"md5": 16, "sha1": 20, "sha224": 28, "sha256": 32, "sha384": 48, "sha512": 64, "ripemd160": 20}
_BULK_SECTORS = 8  # from here on numpy is faster than one context per sector; measured


def sector_cipher(cipher_name: str, cipher_mode: str, key: bytes) -> SectorCipher:
    """Return the cipher of a LUKS header's names, such as ``aes`` and ``xts-plain64``.

    Raises :class:`Unsupported` naming what cannot be had, and :class:`FormatError` when the key's
    length does not fit the cipher.
    """
    mode, _, generator = cipher_mode.partition("-")
    make = _MODES.get(mode)
    if cipher_name not in _KEY_BYTES or make is None or (mode == "xts" and cipher_name != "aes"):
        how = "; qemu-img convert decrypts it" if cipher_name in _OTHER_CIPHERS else ""
        raise Unsupported(f"cipher {cut(cipher_name)} in mode {cut(cipher_mode)}{how}")
    sizes = _KEY_BYTES[cipher_name]
    halves = 2 if mode == "xts" else 1
    if len(key) not in [halves * size for size in sizes]:
        raise FormatError(f"a key of {len(key)} bytes does not fit {cipher_name}-{mode}", field="key_bytes")
    block = _BlockCipher(cipher_name, key[: len(key) // halves])
    ivs = _no_ivs if mode == "ecb" else _iv_generator(generator, cipher_name, key, block.size)
    return make(block, key, ivs)


class _BlockCipher:
    """One block cipher with its key, as contexts of the ``cryptography`` library."""

    def __init__(self, name: str, key: bytes) -> None:
        library = _library()
        self.modes = library.modes
        self._context = library.Cipher
        self._algorithm = library.ciphers[name](key)
        self.size: int = self._algorithm.block_size // 8

    def decryptor(self, mode: Any) -> Any:
        return self._context(self._algorithm, mode).decryptor()

    def ecb_decrypt(self, data: bytes) -> bytes:
        plain: bytes = self.decryptor(self.modes.ECB()).update(data)
        return plain

    def ecb_encrypt(self, data: bytes) -> bytes:
        stored: bytes = self._context(self._algorithm, self.modes.ECB()).encryptor().update(data)
        return stored


@cache
def _library() -> SimpleNamespace:
    """Return what is used of ``cryptography``; its ciphers have no common home across versions."""
    try:
        from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5
        from cryptography.hazmat.primitives.ciphers import Cipher, modes
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
    except ImportError as error:
        feature = "encrypted images without the cryptography library: pip install 'qcow2-forensics[luks]'"
        raise Unsupported(feature) from error
    return SimpleNamespace(Cipher=Cipher, modes=modes, ciphers={"aes": AES, "cast5": CAST5})


# --- from sector numbers to vectors ------------------------------------------------------------

_Ivs = Callable[[int, int], bytes]  # (first sector, count) -> that many vectors, joined


def _iv_generator(name: str, cipher_name: str, key: bytes, block: int) -> _Ivs:
    generator, _, hash_name = name.partition(":")
    if generator == "plain64":
        return lambda first, count: _numbers(first, count, block, (1 << 64) - 1)
    if generator == "plain":  # wraps at 2 TiB
        return lambda first, count: _numbers(first, count, block, (1 << 32) - 1)
    if generator == "essiv" and hash_name in HASHES:
        if HASHES[hash_name] not in _KEY_BYTES[cipher_name]:
            raise Unsupported(f"essiv:{hash_name} with {cipher_name}: no such key length")
        salted = _BlockCipher(cipher_name, hashlib.new(hash_name, key, usedforsecurity=False).digest())
        return lambda first, count: salted.ecb_encrypt(_numbers(first, count, block, (1 << 64) - 1))
    raise Unsupported(f"IV generator {cut(name) or 'none'}")


def _no_ivs(first: int, count: int) -> bytes:  # noqa: ARG001 - ecb ignores the sectors' numbers
    return b""


def _numbers(first: int, count: int, block: int, mask: int) -> bytes:
    """Return little-endian sector numbers, each padded with zeros to the block size."""
    if count < _BULK_SECTORS:
        return b"".join((number & mask).to_bytes(block, "little") for number in range(first, first + count))
    vectors = array("Q", bytes(block * count))
    vectors[:: block // 8] = array("Q", [number & mask for number in range(first, first + count)])
    if sys.byteorder == "big":
        vectors.byteswap()
    return vectors.tobytes()


# --- the modes ---------------------------------------------------------------------------------


class SectorCipher(ABC):
    """A block mode with its cipher, and what makes the vectors of sectors."""

    def __init__(self, block: _BlockCipher, key: bytes, ivs: _Ivs) -> None:  # noqa: ARG002 - xts alone has two keys
        self._block = block
        self._ivs = ivs

    @abstractmethod
    def decrypt(self, data: bytes, first_sector: int) -> bytes:
        """Return consecutive plain sectors; ``data`` is a multiple of 512 bytes."""


class _Ecb(SectorCipher):
    """No vector: equal blocks look equal."""

    def decrypt(self, data: bytes, first_sector: int) -> bytes:  # noqa: ARG002 - ecb ignores the number
        return self._block.ecb_decrypt(data)


class _Cbc(SectorCipher):
    """Each block is chained to the stored one before it, the first to the vector."""

    def decrypt(self, data: bytes, first_sector: int) -> bytes:
        count = len(data) // SECTOR
        ivs = self._ivs(first_sector, count)
        bulk = _bulk() if count >= _BULK_SECTORS else None
        if bulk is not None:
            plain: bytes = bulk.cbc_decrypt(self._block.ecb_decrypt, ivs, data)
            return plain
        return _by_sector(self._block, self._block.modes.CBC, ivs, data)


class _Ctr(SectorCipher):
    """A stream: the vector is the big-endian counter of the sector's first block."""

    def decrypt(self, data: bytes, first_sector: int) -> bytes:
        ivs = self._ivs(first_sector, len(data) // SECTOR)
        # Counted here, because OpenSSL has cast5 in ecb and cbc only.
        stream = self._block.ecb_encrypt(b"".join(self._counters(ivs)))
        mixed = int.from_bytes(data, "little") ^ int.from_bytes(stream, "little")
        return mixed.to_bytes(len(data), "little")

    def _counters(self, ivs: bytes) -> Iterator[bytes]:
        size = self._block.size
        for at in range(0, len(ivs), size):
            first = int.from_bytes(ivs[at : at + size], "big")
            for counter in range(first, first + SECTOR // size):
                yield (counter & ((1 << 8 * size) - 1)).to_bytes(size, "big")


class _Xts(SectorCipher):
    """Each block is masked before and after with a tweak: the encrypted vector, doubled per block."""

    def __init__(self, block: _BlockCipher, key: bytes, ivs: _Ivs) -> None:
        super().__init__(block, key, ivs)
        half = len(key) // 2
        self._tweak = _BlockCipher("aes", key[half:])
        # OpenSSL has no aes-192 in this mode, though LUKS allows it; the bulk way needs no such mode.
        self._whole = None if half == 24 else _BlockCipher("aes", key)

    def decrypt(self, data: bytes, first_sector: int) -> bytes:
        count = len(data) // SECTOR
        ivs = self._ivs(first_sector, count)
        bulk = _bulk() if count >= _BULK_SECTORS or self._whole is None else None
        if bulk is not None:
            context = self._block.decryptor(self._block.modes.ECB())
            plain: bytes = bulk.xts_decrypt(context, self._tweak.ecb_encrypt(ivs), data)
            return plain
        if self._whole is None:
            raise Unsupported("aes-192 in mode xts without numpy")
        return _by_sector(self._whole, self._block.modes.XTS, ivs, data)


_MODES: dict[str, type[SectorCipher]] = {
    "xts": _Xts,
    "cbc": _Cbc,
    "ctr": _Ctr,
    "ecb": _Ecb,
}


def _by_sector(block: _BlockCipher, mode: Any, ivs: bytes, data: bytes) -> bytes:
    size = block.size
    return b"".join(
        block.decryptor(mode(ivs[index * size : (index + 1) * size])).update(
            data[index * SECTOR : (index + 1) * SECTOR]
        )
        for index in range(len(data) // SECTOR)
    )


@cache
def _bulk() -> ModuleType | None:
    try:
        from . import bulk
    except ImportError:  # numpy is absent, as in frozen tools: slower, never different
        return None
    return bulk
