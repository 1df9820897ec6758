"""What the LUKS header of an image holds: fields, key slots, and key material of the slots in use."""

from __future__ import annotations

from ..errors import FormatError
from ..format.image import Image
from ..reader.encryption.luks import HEADER_LENGTH, parse_luks_header
from .labels import KEY_MATERIAL, ByteKind, Place
from .marks import Marks

_TEXTS = ((8, 32), (40, 32), (72, 32), (168, 40))  # cipher, mode, hash, UUID: offset and length of their fields
_NUMBERS = ((0, 8), (104, 64))  # magic and version; payload offset, key length, digest with salt and iterations


def claim_luks(image: Image, marks: Marks) -> None:
    """Claim the LUKS header that the encryption extension of a LUKS image names."""
    place = image.crypto_header
    if place is None:
        return
    offset, length = place
    data = image.read(offset, min(length, HEADER_LENGTH))
    try:
        header = parse_luks_header(data, length)
    except FormatError:
        return
    label, material = marks.label(ByteKind.LUKS_HEADER), marks.label(ByteKind.KEY_MATERIAL)
    inactive, unused = marks.label(Place.LUKS_SLOT), marks.label(Place.LUKS_SLOT, KEY_MATERIAL)
    end = offset + length
    for at, size in _NUMBERS:
        marks.add(label, offset + at, offset + at + size)
    for at, size in _TEXTS:
        marks.add_name(label, "LUKS header", data[at : at + size], offset + at)
    for slot in header.slots:
        at = offset + slot.offset
        marks.add(label, at, at + 4)
        marks.add(label, at + 40, at + 48)  # where its key material is, and in how many stripes
        start = offset + slot.key_material_offset
        key = min(start + header.key_bytes * slot.stripes, end)
        if slot.is_active:
            marks.add(label, at + 4, at + 40)
            marks.add(material, start, key)
        else:
            marks.add(inactive, at + 4, at + 40)
            marks.add(unused, start, min(start + header.material_bytes(slot), end))
