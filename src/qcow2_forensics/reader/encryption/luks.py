"""The LUKS1 header, and how a passphrase opens one of its key slots.

Follows the "LUKS On-Disk Format Specification" version 1.2. A slot does not hold the volume key but
an anti-forensic spreading of it, 4000 times as long, encrypted with a key derived from the
passphrase::

    passphrase --PBKDF2--> slot key --decrypt key material--> stripes --merge--> volume key?
                                             volume key --PBKDF2--> digest == the header's: yes
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...errors import FormatError, LimitExceeded, Locked, Unsupported
from ...format.header import SECTOR
from ...limits import Limits
from ...text import cut
from .sectors import HASHES, sector_cipher

MAGIC = b"LUKS\xba\xbe"
SLOTS = 8
STRIPES = 4000  # the only number ever written, and the only one QEMU takes
ACTIVE = 0x00AC71F3
INACTIVE = 0x0000DEAD
_HEAD = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
HEADER_LENGTH = _HEAD.size + SLOTS * _SLOT.size  # 592
MAX_KEY_BYTES = 64  # aes-256 in xts mode has two 32-byte keys, and nothing needs more


class LuksProblem(NamedTuple):
    """One thing wrong with a header; ``offset`` counts from the start of the LUKS header."""

    field: str
    offset: int
    message: str


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One key slot; offsets are bytes from the start of the LUKS header."""

    index: int
    offset: int  # of the slot's own fields
    state: int
    iterations: int
    salt: bytes
    key_material_offset: int
    stripes: int

    @property
    def is_active(self) -> bool:
        return self.state == ACTIVE


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """A LUKS1 header as it is stored, whatever its values; ``problems`` says what is wrong with it."""

    magic: bytes
    version: int
    cipher_name: str
    cipher_mode: str
    hash_spec: str
    payload_offset: int  # bytes; not used inside QCOW2, where sectors count from the file's start
    key_bytes: int
    mk_digest: bytes
    mk_digest_salt: bytes
    mk_digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]
    problems: tuple[LuksProblem, ...] = ()

    def material_bytes(self, slot: KeySlot) -> int:
        """Bytes of key material a slot needs, as whole sectors."""
        return -(-self.key_bytes * slot.stripes // SECTOR) * SECTOR


def parse_luks_header(data: bytes, length: int | None = None) -> LuksHeader:
    """Return the header at the start of ``data``, which needs 592 bytes.

    ``length`` is how long the area is that holds header and key material, for the checks that need
    to know. Raises :class:`FormatError` only when ``data`` is too short.
    """
    if len(data) < HEADER_LENGTH:
        raise FormatError(f"the LUKS header is {len(data)} bytes, {HEADER_LENGTH} are needed", field="luks")
    head = _HEAD.unpack_from(data)
    slots = tuple(_slot(data, index) for index in range(SLOTS))
    header = LuksHeader(
        magic=head[0],
        version=head[1],
        cipher_name=_text(head[2]),
        cipher_mode=_text(head[3]),
        hash_spec=_text(head[4]),
        payload_offset=head[5] * SECTOR,
        key_bytes=head[6],
        mk_digest=head[7],
        mk_digest_salt=head[8],
        mk_digest_iterations=head[9],
        uuid=_text(head[10]),
        slots=slots,
    )
    return replace(header, problems=(*_head_problems(header, data), *_slot_problems(header, length)))


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("latin-1")


def _slot(data: bytes, index: int) -> KeySlot:
    offset = _HEAD.size + index * _SLOT.size
    state, iterations, salt, material, stripes = _SLOT.unpack_from(data, offset)
    return KeySlot(index, offset, state, iterations, salt, material * SECTOR, stripes)


def _head_problems(header: LuksHeader, data: bytes) -> list[LuksProblem]:
    found = []
    if header.magic != MAGIC:
        found.append(LuksProblem("magic", 0, f"magic is {header.magic.hex()}"))
    if header.version != 1:
        found.append(LuksProblem("version", 6, f"version is {header.version}, only 1 is known"))
    for name, offset, size in (("cipher_name", 8, 32), ("cipher_mode", 40, 32), ("hash_spec", 72, 32)):
        if b"\0" not in data[offset : offset + size]:
            found.append(LuksProblem(name, offset, f"{name} has no terminating zero"))
    if not 0 < header.key_bytes <= MAX_KEY_BYTES:
        found.append(LuksProblem("key_bytes", 108, f"key length is {header.key_bytes} bytes"))
    if header.mk_digest_iterations == 0:
        found.append(LuksProblem("mk_digest_iterations", 164, "digest iterations are 0"))
    return found


def _slot_problems(header: LuksHeader, length: int | None) -> list[LuksProblem]:
    found = []
    taken: list[tuple[int, int, str]] = [(0, HEADER_LENGTH, "the header")]
    for slot in header.slots:
        name = f"slot {slot.index}"
        if slot.state not in (ACTIVE, INACTIVE):
            found.append(LuksProblem("state", slot.offset, f"{name}: state is {slot.state:#x}"))
        if slot.is_active and slot.iterations == 0:
            found.append(LuksProblem("iterations", slot.offset + 4, f"{name}: iterations are 0"))
        if slot.stripes != STRIPES:
            found.append(LuksProblem("stripes", slot.offset + 44, f"{name}: {slot.stripes} stripes"))
        start, end = slot.key_material_offset, slot.key_material_offset + header.material_bytes(slot)
        where = slot.offset + 40
        if header.payload_offset and start < header.payload_offset < end:
            found.append(LuksProblem("key_material_offset", where, f"{name}: key material reaches into the payload"))
        if length is not None and end > length:
            found.append(LuksProblem("key_material_offset", where, f"{name}: key material ends outside the area"))
        for other_start, other_end, other in taken:
            if start < other_end and other_start < end:
                found.append(LuksProblem("key_material_offset", where, f"{name}: key material overlaps {other}"))
        taken.append((start, end, f"that of {name}"))
    return found


def recover_key(
    read: Callable[[int, int], bytes], offset: int, length: int, passphrase: bytes, limits: Limits
) -> tuple[LuksHeader, bytes]:
    """Return the header and the volume key; raises :class:`Locked` when no slot takes the passphrase.

    ``offset`` and ``length`` say where the image file holds the header with its key material. An
    unsound slot is passed over while another one opens; if none does, it is reported.
    """
    if length > limits.luks_payload_bytes:
        raise LimitExceeded("LUKS header area", length, limits.luks_payload_bytes, offset=offset)
    header = parse_luks_header(read(offset, min(length, HEADER_LENGTH)))
    _check_head(header, offset, limits)
    hash_name = _hash_name(header.hash_spec)
    sector_cipher(header.cipher_name, header.cipher_mode, bytes(header.key_bytes))  # refuses before minutes of work
    unsound: FormatError | None = None
    rounds = 0  # of PBKDF2, over all slots tried: an image must not cost one attempt for each of eight
    for slot in header.slots:
        if not slot.is_active:
            continue
        try:
            material = _key_material(header, slot, read, offset, length)
            needed = rounds + slot.iterations + header.mk_digest_iterations
            name, at = f"LUKS slot {slot.index} iterations", offset + slot.offset + 4
            _check_iterations(name, slot.iterations, at, limits)
            _check_iterations(f"{name}, with the digest's and those of the slots before,", needed, at, limits)
        except FormatError as error:
            unsound = unsound or error
            continue
        rounds = needed
        key = _open_slot(header, slot, hash_name, material, passphrase)
        if key is not None:
            return header, key
    if unsound is not None:
        raise unsound
    if not any(slot.is_active for slot in header.slots):
        raise Locked("LUKS", "it has no active key slot, nothing can unlock it", is_final=True)
    raise Locked("LUKS", "no key slot accepts this passphrase")


def _check_head(header: LuksHeader, offset: int, limits: Limits) -> None:
    if header.magic != MAGIC or header.version != 1:
        raise FormatError(
            f"no LUKS1 header, its magic is {header.magic.hex()} and its version {header.version}",
            offset=offset,
            field="luks",
        )
    if header.key_bytes > MAX_KEY_BYTES:
        raise LimitExceeded("LUKS key_bytes", header.key_bytes, MAX_KEY_BYTES, offset=offset + 108)
    _check_iterations("LUKS mk_digest_iterations", header.mk_digest_iterations, offset + 164, limits)


def _check_iterations(name: str, value: int, offset: int, limits: Limits) -> None:
    if value == 0:
        raise FormatError(f"{name} is 0", offset=offset, field="iterations")
    if value > limits.luks_iterations:
        raise LimitExceeded(name, value, limits.luks_iterations, offset=offset)


def _hash_name(spec: str) -> str:
    name = spec.lower()
    if name not in HASHES:
        raise Unsupported(f"LUKS hash {cut(spec)}")
    try:
        hashlib.new(name, usedforsecurity=False)
    except ValueError as error:
        raise Unsupported(f"LUKS hash {name}, which this Python's OpenSSL lacks") from error
    return name


def _key_material(
    header: LuksHeader,
    slot: KeySlot,
    read: Callable[[int, int], bytes],
    offset: int,
    length: int,
) -> bytes:
    name = f"LUKS slot {slot.index}"
    if slot.iterations == 0:
        raise FormatError(f"{name} iterations is 0", offset=offset + slot.offset + 4, field="iterations")
    if slot.stripes != STRIPES:  # QEMU takes no other number, and a large one costs minutes
        raise FormatError(
            f"{name} has {slot.stripes} stripes, only {STRIPES} are known",
            offset=offset + slot.offset + 44,
            field="stripes",
        )
    wanted = header.material_bytes(slot)
    if slot.key_material_offset < HEADER_LENGTH or slot.key_material_offset + wanted > length:
        raise FormatError(f"{name} has its key material outside the LUKS area", offset=offset + slot.offset + 40)
    at = offset + slot.key_material_offset
    material = read(at, wanted)
    if len(material) != wanted:
        raise FormatError(f"{name} has its key material past the end of the file", offset=at, field="luks")
    return material


def _open_slot(header: LuksHeader, slot: KeySlot, hash_name: str, material: bytes, passphrase: bytes) -> bytes | None:
    slot_key = hashlib.pbkdf2_hmac(hash_name, passphrase, slot.salt, slot.iterations, header.key_bytes)
    cipher = sector_cipher(header.cipher_name, header.cipher_mode, slot_key)
    # Sector by sector, so that opening an image does not cost the import of numpy.
    sectors = (cipher.decrypt(material[at : at + SECTOR], at // SECTOR) for at in range(0, len(material), SECTOR))
    stripes = b"".join(sectors)
    key = _merge(stripes, header.key_bytes, slot.stripes, hash_name)
    digest = hashlib.pbkdf2_hmac(
        hash_name, key, header.mk_digest_salt, header.mk_digest_iterations, len(header.mk_digest)
    )
    return key if hmac.compare_digest(digest, header.mk_digest) else None


def _merge(stripes: bytes, key_bytes: int, count: int, hash_name: str) -> bytes:
    """Undo the anti-forensic spreading: XOR every stripe in, diffusing with the hash in between."""
    mixed = 0
    for index in range(count):
        mixed ^= int.from_bytes(stripes[index * key_bytes : (index + 1) * key_bytes], "big")
        if index < count - 1:
            mixed = int.from_bytes(_diffuse(mixed.to_bytes(key_bytes, "big"), hash_name), "big")
    return mixed.to_bytes(key_bytes, "big")


def _diffuse(block: bytes, hash_name: str) -> bytes:
    size = hashlib.new(hash_name, usedforsecurity=False).digest_size
    pieces = []
    for index, at in enumerate(range(0, len(block), size)):
        piece = block[at : at + size]
        hashed = hashlib.new(hash_name, struct.pack(">I", index) + piece, usedforsecurity=False).digest()
        pieces.append(hashed[: len(piece)])
    return b"".join(pieces)
