"""A passphrase and a header become a sector decryptor (LUKS1 and legacy AES)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .errors import Unsupported
from .limits import Limits
from .structures import Header


class Decryptor(Protocol):
    """Turns stored sectors into guest sectors; offsets and length are multiples of 512."""

    def decrypt(self, data: bytes, host_offset: int, guest_offset: int) -> bytes: ...


def unlock(
    header: Header,
    read: Callable[[int, int], bytes],
    crypto_header: tuple[int, int] | None,
    passphrase: str | bytes,
    limits: Limits,
) -> Decryptor:
    """Derive the key; raises :class:`Locked` when the passphrase is wrong."""
    raise Unsupported("encrypted images")
