"""Compressed clusters: how many bytes each stream really takes, and what lies between them.

A descriptor counts whole sectors, so its last one usually holds the next stream too. Only decoding
shows where a stream ends (:mod:`..account.streams`); what no live stream takes may be an overwritten one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

from ..account.streams import START, Decoded
from ..format.codecs import Codec, codec_of
from ..format.image import Image
from ..limits import FORMER_STREAM_PLACES, Budget
from .host_ranges import piece_of
from .model import Piece


def compressed_slack(image: Image, decoded: Decoded) -> Iterator[Piece]:
    """Yield bytes of host clusters in use for compressed data that no live stream takes.

    ``looks`` is ``stream`` when something there decompresses to exactly one cluster; ``signature``
    is then the SHA-256 of that cluster. Raises :class:`LimitExceeded` where not all live streams were decoded.
    """
    if decoded.stopped is not None:
        raise decoded.stopped
    codec = codec_of(image.header.compression_type)
    budget = Budget("decoded bytes of former streams that are bad", image.file_size, image.limits)
    for start, stop in _gaps(image, decoded.used):
        if start >= image.file_size:
            break
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
    # Streams follow each other, so one starts where the gap starts or where another one ends; where a part was
    # reused, anywhere. Every byte of a short gap is tried, of a long one the first bytes of each cluster.
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
                budget.spend(max(image.cluster_size, START))
            place += 1
            continue
        yield from piece_of(data[at:place], start + at, "compressed-slack")
        digest = hashlib.sha256(found[0]).hexdigest()
        for piece in piece_of(data[place : place + found[1]], start + place, "compressed-slack"):
            # a stream has the zeros it begins or ends with
            yield replace(piece, offset=start + place, length=found[1], looks="stream", signature=digest)
        at = place = place + found[1]
    yield from piece_of(data[at:], start + at, "compressed-slack")
