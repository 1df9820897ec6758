"""A passphrase and a header become a sector decryptor: legacy AES and LUKS1.

::

    unlock(header, read, crypto_header, passphrase, limits)
      ├── crypt_method 1   key: 16 passphrase bytes, nothing to check it by; sector of the guest offset
      └── crypt_method 2   luks: key slots -> volume key, checked by a digest; sector of the host offset
            -> sectors: the cipher of one 512-byte sector, many at a time

Compressed clusters are stored as they are, also in encrypted images: only whole data sectors come
here. The ciphers themselves are the ``cryptography`` library's, imported when a key is derived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import FormatError, Unsupported
from ...format.header import SECTOR, Crypt, Header
from ...limits import Limits
from .luks import recover_key
from .sectors import SectorCipher, sector_cipher

_NAMES = {Crypt.NONE: "none", Crypt.AES: "legacy AES", Crypt.LUKS: "LUKS"}


@dataclass(frozen=True, slots=True)
class Decryptor:
    """Turns stored sectors into guest sectors; offsets and length are multiples of 512.

    Sectors are numbered by where the guest sees them (method 1), or by where they are stored (method 2): the payload
    offset of a LUKS header plays no part.
    """

    cipher: SectorCipher
    by_guest: bool

    def decrypt(self, data: bytes, host_offset: int, guest_offset: int) -> bytes:
        return self.cipher.decrypt(data, (guest_offset if self.by_guest else host_offset) // SECTOR)


def method_name(header: Header) -> str:
    """Return the words for a header's ``crypt_method``."""
    method = header.crypt_method
    return _NAMES[Crypt(method)] if method in set(Crypt) else f"unknown method {method}"


def unlock(
    header: Header,
    read: Callable[[int, int], bytes],
    crypto_header: tuple[int, int] | None,
    passphrase: str | bytes,
    limits: Limits,
) -> Decryptor:
    """Derive the key and return the decryptor.

    ``read(offset, length)`` reads the image file, ``crypto_header`` is the offset and length of the
    LUKS header in it. Raises :class:`Locked` when the passphrase is wrong (legacy AES cannot tell),
    :class:`FormatError` or :class:`LimitExceeded` when the LUKS header is unsound, and
    :class:`Unsupported` for a cipher, mode or hash that cannot be had here.
    """
    secret = passphrase.encode("utf-8", "surrogateescape") if isinstance(passphrase, str) else passphrase
    if header.crypt_method == Crypt.AES:
        return Decryptor(sector_cipher("aes", "cbc-plain64", secret[:16].ljust(16, b"\0")), by_guest=True)
    if header.crypt_method != Crypt.LUKS:
        raise Unsupported(f"encryption {method_name(header)}")
    if crypto_header is None:
        raise FormatError("LUKS encryption without a LUKS header extension", field="crypt_method")
    luks, key = recover_key(read, *crypto_header, secret, limits)
    return Decryptor(sector_cipher(luks.cipher_name, luks.cipher_mode, key), by_guest=False)
