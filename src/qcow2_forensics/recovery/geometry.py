"""Cluster size, entry size and compression type of an image whose header is lost, from its tables.

Host offsets in L1 and L2 tables are multiples of the cluster size, and in a table of a dozen clusters or more some
are no multiple of twice that: the most frequent common power of two is the cluster size. Where all
clusters are compressed, it is the size that their streams decode to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..census.arrays import I64, U64, Mask
from ..census.columns import is_packed, named_offsets
from ..format.codecs import known_codecs
from ..format.entries import COMPRESSED, COPIED, L2_RESERVED, ZERO, compressed_descriptor
from ..format.header import SECTOR
from ..format.source import Source
from ..limits import GEOMETRY_SECTORS, GEOMETRY_STREAMS, KiB, MiB
from .metered_source import stored_pieces

CLUSTER_BITS = range(9, 22)
_CHUNK = 8 * MiB
_WORDS = SECTOR // 8
_STRONG = 8  # different host offsets in one sector: their common power of two is the cluster size
_EXTENDED_BITS = 14  # least cluster_bits with extended L2 entries


class FoundGeometry(NamedTuple):
    """What the tables of an image without a header say about it. ``evidence`` is a sentence for a report."""

    cluster_bits: int
    extended_l2: bool
    compression_type: int | None  # None where nothing is compressed
    evidence: str


class _Sectors(NamedTuple):
    """Sectors that may be part of a table: their words (n, 64) and where they are."""

    offsets: I64
    words: U64


def find_geometry(source: Source, *, most: int | None = None) -> FoundGeometry | None:
    """Return the geometry that the tables in ``source`` imply, None where no table is recognised.

    ``most`` bounds the bytes looked at from the start; the whole file by default.
    """
    plain: Counter[int] = Counter()
    extended: Counter[int] = Counter()
    weak: dict[bool, list[int]] = {False: [], True: []}
    streams: list[int] = []
    for sectors in _table_sectors(source, most):
        is_plain = np.zeros(len(sectors.words), np.bool_)
        for is_extended, votes in ((False, plain), (True, extended)):
            bits, count = _common_bits(sectors.words, source.size, extended=is_extended)
            count = np.where(is_plain, 0, count)  # plain entries may pass for extended ones, hardly the other way
            is_plain |= count > 0
            for value in bits[count >= _STRONG].tolist():
                votes[min(int(value), 21)] += 1
            few = bits[(count > 0) & (count < _STRONG)]
            weak[is_extended] += [min(int(value), 21) for value in few.tolist()][:GEOMETRY_SECTORS]
        if len(streams) < GEOMETRY_STREAMS:
            streams += _compressed_entries(sectors.words)[: GEOMETRY_STREAMS - len(streams)]
    decoded = decoded_size(source, streams)
    if decoded is not None:
        bits_, kind = decoded
        return FoundGeometry(bits_, False, kind, f"compressed clusters decode to {1 << bits_} bytes each")
    strong = _winner(plain), _winner(extended)
    if strong[1][1] > strong[0][1] and strong[1][0] >= _EXTENDED_BITS:
        return FoundGeometry(strong[1][0], True, None, f"{strong[1][1]} sectors of extended L2 entries agree")
    if strong[0][1]:
        return FoundGeometry(strong[0][0], False, None, f"{strong[0][1]} sectors of table entries agree")
    if weak[False] or weak[True]:
        bits_ = max(9, min(weak[False] + weak[True]))
        extended_l2 = bool(weak[True]) and bits_ >= _EXTENDED_BITS
        return FoundGeometry(bits_, extended_l2, None, "the few table entries there are imply it")
    return None


def _winner(votes: Counter[int]) -> tuple[int, int]:
    """Return the most frequent value and how often it was found."""
    if not votes:
        return 0, 0
    ((value, count),) = votes.most_common(1)
    return value, count


def _table_sectors(source: Source, most: int | None) -> Iterator[_Sectors]:
    """Yield the sectors in which every word may be a table entry, and one or more is."""
    end = source.size if most is None else min(most, source.size)
    for at, length in stored_pieces(source, _CHUNK, end):
        data = source.read(at, length)
        words = np.frombuffer(data, ">u8", count=len(data) // SECTOR * _WORDS).reshape(-1, _WORDS)
        # Guest data is nearly always ruled out by its first words.
        rows = np.flatnonzero(_possible(words[:, :4].astype(np.uint64), source.size).all(axis=1))
        if len(rows):
            chosen = words[rows].astype(np.uint64)
            kept = _possible(chosen, source.size).all(axis=1) & chosen.any(axis=1)
            if kept.any():
                yield _Sectors(at + rows[kept] * SECTOR, chosen[kept])


def _possible(words: U64, file_size: int) -> Mask:
    """Return which words may be an entry of some table: a standard or extended L2 entry, or an extended bitmap."""
    hosts = named_offsets(words)
    plain = ((words & np.uint64(COMPRESSED | L2_RESERVED)) == 0) & (hosts < np.uint64(file_size))
    plain &= (hosts != 0) | (words <= np.uint64(ZERO))
    stream = (words >> np.uint64(62)) == 1
    low, high = words & np.uint64(0xFFFF_FFFF), words >> np.uint64(32)
    possible: Mask = plain | stream | ((low & high) == 0)
    return possible


def _common_bits(words: U64, file_size: int, *, extended: bool) -> tuple[I64, I64]:
    """Return for each sector the power of two that divides its host offsets, and how many differ; 0 where none."""
    bitmaps = np.zeros(1, np.uint64)
    if extended:
        words, bitmaps = words[:, 0::2], words[:, 1::2]
    hosts = named_offsets(words)
    packed = is_packed(words)
    sound = packed | ((words & np.uint64(L2_RESERVED)) == 0)
    sound &= packed | (hosts < np.uint64(file_size))
    if extended:
        low, high = bitmaps & np.uint64(0xFFFF_FFFF), bitmaps >> np.uint64(32)
        sound &= ((low & high) == 0) & ((words & np.uint64(ZERO)) == 0) & ((hosts != 0) | (low == 0) | packed)
        sound &= np.any(bitmaps, axis=1, keepdims=True)
    hosts = np.where(packed, np.uint64(0), hosts)
    joined = np.bitwise_or.reduce(hosts, axis=1)
    lowest = joined & (~joined + np.uint64(1))
    bits = np.zeros(len(words), np.int64)
    used = lowest != 0
    bits[used] = np.log2(lowest[used].astype(np.float64)).astype(np.int64)
    ordered = np.sort(hosts, axis=1)
    different = ((ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, 1:] != 0)).sum(axis=1) + (ordered[:, 0] != 0)
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != 0)).any(axis=1)
    whole = sound.all(axis=1) & ~repeated
    return np.where(whole, bits, 0), np.where(whole & (bits >= 9), different, 0)


def _compressed_entries(words: U64) -> list[int]:
    """Return compressed entries from sectors that hold several of them."""
    packed = (words >> np.uint64(62)) == 1
    rows = np.flatnonzero(packed.sum(axis=1) >= 1)
    found: list[int] = []
    for row in rows.tolist():
        found += words[row][packed[row]].tolist()[:4]
        if len(found) >= GEOMETRY_STREAMS:
            break
    return found


def decoded_size(source: Source, entries: list[int], least: int = 2) -> tuple[int, int] | None:
    """Return cluster_bits and compression type that decode several compressed entries, None where none does."""
    votes: Counter[tuple[int, int]] = Counter()
    for entry in entries:
        for bits in CLUSTER_BITS:  # frames that follow each other are several clusters
            offset, length = compressed_descriptor(entry & ~COPIED, bits)
            if offset >= source.size or length > 2 << bits:
                continue
            data = source.read(offset, min(length, source.size - offset))
            compression = compression_of(data, 1 << bits)
            if compression is not None:
                votes[bits, compression] += 1
                break
    if not votes:
        return None
    ((found, count),) = votes.most_common(1)
    return found if count >= min(least, len(entries)) else None


def compression_of(data: bytes, size: int) -> int | None:
    """Return the compression type of which ``data`` starts with a stream of exactly ``size`` bytes, None for none."""
    found = (codec for codec in known_codecs() if codec.begins(data, size) and codec.measure(data, size))
    return next((codec.number for codec in found), None)


def compression_type_of(source: Source, entries: list[int], cluster_bits: int) -> int | None:
    """Return the compression type that decodes most of some entries of known cluster size, None where none does."""
    votes: Counter[int] = Counter()
    for entry in entries[:GEOMETRY_STREAMS]:
        offset, length = compressed_descriptor(entry, cluster_bits)
        if offset < source.size:
            data = source.read(offset, min(length, source.size - offset, 4 * MiB + 64 * KiB))
            compression = compression_of(data, 1 << cluster_bits)
            if compression is not None:
                votes[compression] += 1
    return votes.most_common(1)[0][0] if votes else None
