"""Compressed clusters: how many bytes each stream really takes, and what lies between them.

A descriptor counts whole sectors, so its last one usually holds the next stream too. Only decoding
shows where a stream ends; what no live stream consumes may be an overwritten one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..census import Census
from ..census.columns import compressed_extents
from ..errors import LimitExceeded
from ..format.codecs import Codec, codec_of
from ..format.entries import compressed_descriptor
from ..format.image import Image
from ..limits import FORMER_STREAM_PLACES, Budget
from .host_ranges import piece_of
from .model import Piece

_START = 1 << 14  # bytes: what beginning a stream costs at least, however small a cluster is


class Decoded(NamedTuple):
    """What decoding every live stream once showed.

    ``used`` are the host bytes (start, end) that streams take, rising; one that does not give exactly a
    cluster keeps all of its descriptor: its bytes are not residue. ``failed`` are the entries of those.
    ``stopped`` says that not all were decoded.
    """

    used: list[tuple[int, int]]
    failed: npt.NDArray[np.uint64]
    stopped: LimitExceeded | None


def decode_all(image: Image, census: Census) -> Decoded:
    """Decode every live stream once, in their order in the file.

    Streams that a writer made do not overlap, and however far they expand they are decoded. Of those
    that share bytes, or do not decode, a small file could name any number: they have a budget.
    """
    if image.header.external_data:  # QEMU reads no streams beside a data file
        return Decoded([], np.empty(0, np.uint64), None)
    measure = codec_of(image.header.compression_type).measure
    size, bits = image.cluster_size, image.header.cluster_bits
    entries = census.compressed_entries
    order = np.argsort(compressed_extents(entries, image.header)[0], kind="stable")
    used: list[tuple[int, int]] = []
    failed: list[int] = []
    stopped: LimitExceeded | None = None
    budget = _budget(image)
    taken, last = 0, b""  # the end of the good streams so far, and the bytes of the one before
    for entry in entries[order].tolist():
        offset, length = compressed_descriptor(entry, bits)
        data = image.read(offset, length)
        if not data:
            failed.append(entry)
            used.append((offset, offset + length))
            continue
        cost, end = length, offset + len(last)
        if not last or not data.startswith(last):  # else a cluster like the one before
            found = measure(data, size)
            cost += max(size, _START)
            if found is None:
                failed.append(entry)
                used.append((offset, offset + length))
                if (stopped := _refused(budget, cost)) is not None:
                    break
                continue
            end, last = offset + found[1], data[: found[1]]
        used.append((offset, end))
        if offset < taken and (stopped := _refused(budget, cost)) is not None:
            break
        taken = max(taken, end)
    return Decoded(used, np.asarray(failed, dtype=np.uint64), stopped)


def _budget(image: Image) -> Budget:
    return Budget("decoded bytes of streams that are bad or share bytes", image.file_size, image.limits)


def _refused(budget: Budget, cost: int) -> LimitExceeded | None:
    try:
        budget.spend(cost)
    except LimitExceeded as error:
        return error
    return None


def compressed_slack(image: Image, census: Census, decoded: Decoded | None = None) -> Iterator[Piece]:
    """Yield bytes of host clusters in use for compressed data that no live stream consumes.

    ``looks`` is ``stream`` when something there decompresses to exactly one cluster; ``signature``
    is then the SHA-256 of that cluster. ``decoded`` is what :func:`decode_all` found, if known. Raises
    :class:`LimitExceeded` where that stopped.
    """
    decoded = decoded or decode_all(image, census)
    if decoded.stopped is not None:
        raise decoded.stopped
    codec = codec_of(image.header.compression_type)
    budget = Budget("decoded bytes of former streams that are bad", image.file_size, image.limits)
    for start, stop in _gaps(image, decoded.used):
        yield from _gap(image, start, stop, codec, budget)


def _gaps(image: Image, used: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the unused stretches of the host clusters that hold streams."""
    size = image.cluster_size
    if not used:
        return
    last_end = 0
    for start, stop in used:
        if start > last_end:
            # From the end of one stream to its cluster's end, and from the cluster's start to the next.
            first_end = -(-last_end // size) * size if last_end else 0
            begin = start // size * size
            if not last_end:
                yield begin, start
            elif first_end < begin:
                yield last_end, first_end
                yield begin, start
            else:
                yield last_end, start
        last_end = max(last_end, stop)
    yield last_end, -(-last_end // size) * size


def _gap(image: Image, start: int, stop: int, codec: Codec, budget: Budget) -> Iterator[Piece]:
    data = image.read(start, stop - start)
    if not any(data):
        return
    at = place = 0
    tries, border = FORMER_STREAM_PLACES, image.cluster_size - start % image.cluster_size
    # Streams follow each other: one starts where the gap starts, or where another one ends; after
    # reuse of a part, anywhere. Every byte of a short gap is tried, of a long one the first bytes of each cluster.
    while place < len(data):
        if not tries or place >= border:
            place, tries, border = max(place, border), FORMER_STREAM_PLACES, border + image.cluster_size
            continue
        tries -= 1
        part = data[place:]
        begins = codec.begins(part, image.cluster_size)
        found = codec.measure(part, image.cluster_size) if begins else None
        if found is None:
            if begins:
                budget.spend(max(image.cluster_size, _START))
            place += 1
            continue
        yield from _rest(data[at:place], start + at)
        digest = hashlib.sha256(found[0]).hexdigest()
        piece = piece_of(data[place : place + found[1]], start + place, "compressed-slack")
        if piece is not None:  # a stream has the zeros it begins or ends with
            yield replace(piece, offset=start + place, length=found[1], looks="stream", signature=digest)
        at = place = place + found[1]
    yield from _rest(data[at:], start + at)


def _rest(data: bytes, offset: int) -> Iterator[Piece]:
    piece = piece_of(data, offset, "compressed-slack")
    if piece is not None:
        yield piece
