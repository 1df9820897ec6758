"""Changes that know the format: fields, entries, flags, cluster numbers, cuts and appendices.

A plain bit flipper rarely gets past the header; this one aims at what readers trust. Everything
comes from the random generator it is given, so a seed repeats a case exactly.
"""

from __future__ import annotations

import random
import struct
from typing import NamedTuple

from qcow2_forensics.errors import Qcow2Error
from qcow2_forensics.format.entries import OFFSET_MASK, parse_entries
from qcow2_forensics.format.image import Image
from qcow2_forensics.format.source import BytesSource

_NUMBERS = (0, 1, 2, 7, 8, 255, 511, 512, 513, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_WIDE = (1 << 62, 1 << 63, (1 << 63) - 1, (1 << 64) - 1, 1 << 40, (1 << 56) - 512, 1 << 55)
_TEXTS = (
    b"\x1b]0;x\x07",
    b"\x1b[2J",
    b"=1+1",
    b"@x",
    b"<script>",
    b"a\nb\r\t",
    b"\xff\xfe\x80",
    b"\xe2\x80\xae",  # right-to-left override
    b"a\0b",
    b"../../../etc/passwd",
    b"/etc/passwd",
    b"json:{}",
    b"nbd://x/y",
    b"/dev/zero",
    b"%s%n",
    b"a|b",
    b"fuzzed.qcow2",
)


class Spot(NamedTuple):
    """A place worth changing: ``size`` bytes at ``offset`` that readers take for a number, or a name."""

    kind: str
    offset: int
    size: int


def spots(data: bytes) -> list[Spot]:
    """Return the places of an image that hold numbers readers trust."""
    found: list[Spot] = []
    try:
        image = Image(BytesSource(data))
    except Qcow2Error:
        return [Spot("byte", at, 1) for at in range(min(128, len(data)))]
    header = image.header
    found += [Spot("header", field.offset, field.length) for field in header.fields[1:]] * 3
    found += _names(image)
    for extension in image.extensions:
        found += [Spot("extension", extension.offset, 4), Spot("extension", extension.offset + 4, 4)]
        found += [Spot("extension", extension.offset + 8 + at, 8) for at in range(0, min(extension.length, 24), 8)]
    if header.version == 1:
        found += _table(data, "l1", header.l1_table_offset, header.l1_size)
        return found
    found += _table(data, "l1", header.l1_table_offset, header.l1_size)
    for offset in _pointers(data, header.l1_table_offset, header.l1_size):
        found += _table(data, "l2", offset, image.cluster_size // 8)
    table_entries = header.refcount_table_clusters * image.cluster_size // 8
    found += _table(data, "reftable", header.refcount_table_offset, table_entries)
    for offset in _pointers(data, header.refcount_table_offset, table_entries):
        width = max(1, header.refcount_bits // 8)
        found += [Spot("refcount", offset + at * width, width) for at in range(32)]
    for entry in image.snapshots:
        for at, size in (
            (0, 8),
            (8, 4),
            (12, 2),
            (14, 2),
            (16, 4),
            (20, 4),
            (24, 8),
            (32, 4),
            (36, 4),
            (40, 8),
            (48, 8),
        ):
            found.append(Spot("snapshot", entry.offset + at, size))
        found += _table(data, "snapshot l1", entry.l1_table_offset, entry.l1_size)
    for bitmap in image.bitmaps:
        found += [
            Spot("bitmap", bitmap.offset + at, size)
            for at, size in ((0, 8), (8, 4), (12, 4), (16, 1), (17, 1), (18, 2), (20, 4))
        ]
        found += _table(data, "bitmap table", bitmap.table_offset, bitmap.table_size)
    if image.crypto_header is not None:
        base = image.crypto_header[0]
        found += [Spot("luks", base + at, 4) for at in range(104, 592, 8)]
    at = data.find(b"QEVM")
    if at >= 0:
        found += [Spot("vm state", at + step, random.choice((1, 2, 4, 8))) for step in range(0, 4096, 3)]
    return [spot for spot in found if spot.offset + spot.size <= len(data)]


def _names(image: Image) -> list[Spot]:
    """Spots of the texts an image holds."""
    header = image.header
    places = [(header.backing_file_offset, header.backing_file_size)]
    places += [(extension.offset + 8, extension.length) for extension in image.extensions]
    for entry in image.snapshots:
        start = entry.offset + 40 + len(entry.extra)
        places += [(start, len(entry.id_bytes)), (start + len(entry.id_bytes), len(entry.name_bytes))]
    for bitmap in image.bitmaps:
        places.append((bitmap.offset + 24 + len(bitmap.extra), len(bitmap.name_bytes)))
    return [Spot("text", offset, size) for offset, size in places if offset and 0 < size < 4096]


def _table(data: bytes, kind: str, offset: int, count: int) -> list[Spot]:
    """Spots of the entries in use, and of a few that are not."""
    found, spare = [], 4
    for index in range(min(count, 4096)):
        at = offset + index * 8
        if at + 8 > len(data):
            break
        if any(data[at : at + 8]):
            found.append(Spot(kind, at, 8))
        elif spare:
            spare -= 1
            found.append(Spot(kind, at, 8))
    return found


def _pointers(data: bytes, offset: int, count: int) -> list[int]:
    entries = data[offset : offset + min(count, 64) * 8]
    return [word & OFFSET_MASK for word in parse_entries(entries[: len(entries) // 8 * 8]) if word][:4]


class Mutator:
    """Mutates one base image; ``describe`` of the last mutation says what was done."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._spots = spots(data)
        self._kinds = sorted({spot.kind for spot in self._spots})

    def mutate(self, rng: random.Random) -> tuple[bytes, list[str]]:
        """Return a changed copy and what was changed."""
        data = bytearray(self._data)
        done = [self._once(rng, data) for _ in range(rng.choice((1, 1, 1, 2, 3, 5)))]
        return bytes(data), done

    def _once(self, rng: random.Random, data: bytearray) -> str:
        action = rng.random()
        if action < 0.06:
            keep = rng.choice(
                (rng.randrange(1, len(data) + 1), len(data) & ~0xFFFF, len(data) - rng.randrange(1, 70000))
            )
            del data[max(4, keep) :]
            return f"cut at {len(data)}"
        if action < 0.09:
            data.extend(rng.randbytes(rng.choice((1, 511, 512, 65536))))
            return "appended"
        if action < 0.16:
            at = rng.randrange(len(data))
            data[at] ^= 1 << rng.randrange(8)
            return f"bit at {at:#x}"
        kind = rng.choice(self._kinds)
        spot = rng.choice([spot for spot in self._spots if spot.kind == kind])
        if spot.offset + spot.size > len(data):
            return "nothing"
        if spot.kind == "text":
            text = rng.choice(_TEXTS)[: spot.size]
            data[spot.offset : spot.offset + len(text)] = text
            return f"text at {spot.offset:#x}: {text!r}"
        old = int.from_bytes(data[spot.offset : spot.offset + spot.size], "big")
        new = self._value(rng, old, spot, data) & ((1 << (8 * spot.size)) - 1)
        data[spot.offset : spot.offset + spot.size] = new.to_bytes(spot.size, "big")
        return f"{spot.kind} at {spot.offset:#x}: {old:#x} -> {new:#x}"

    def _value(self, rng: random.Random, old: int, spot: Spot, data: bytearray) -> int:
        other = rng.choice(self._spots)
        choices = (
            lambda: old ^ (1 << rng.randrange(8 * spot.size)),
            lambda: rng.choice(_NUMBERS),
            lambda: rng.choice(_WIDE),
            lambda: old + rng.choice((-512, 512, -1, 1, 65536, -65536)),
            lambda: int.from_bytes(data[other.offset : other.offset + spot.size].ljust(spot.size, b"\0"), "big"),
            lambda: (
                (rng.randrange(0, len(data) + 131072) & ~0x1FF) | (rng.getrandbits(2) << 62 if spot.size == 8 else 0)
            ),
            lambda: old ^ rng.choice((1, 1 << 62, 1 << 63)),
            lambda: struct.unpack(">Q", rng.randbytes(8))[0],
        )
        return rng.choice(choices)()
