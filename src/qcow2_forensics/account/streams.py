"""Compressed clusters: which host bytes their streams really take.

A descriptor counts whole sectors, so its last one usually holds the next stream too. Only decoding shows where
a stream ends.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..census import Census
from ..census.arrays import I64, U64, distinct_rows
from ..census.columns import compressed_extents
from ..errors import LimitExceeded
from ..format.codecs import Codec, codec_of
from ..format.entries import compressed_descriptor
from ..format.header import padded
from ..format.image import Image
from ..limits import Budget

START = 1 << 14  # bytes: what beginning a stream costs at least, however small a cluster is


class Decoded(NamedTuple):
    """What decoding every live stream once showed.

    ``used`` are the host bytes (start, end) that streams take, in the order of their starts; ``entries`` has the
    entry of each. A stream that cannot be decoded keeps all that its descriptor covers: those bytes are not residue.
    Streams that begin after the last cluster of the file have no bytes and are left out.
    ``failed`` are the entries that do not give exactly a cluster. ``stopped`` is set where not all were decoded.
    """

    used: list[tuple[int, int]]
    entries: list[int]
    failed: U64
    stopped: LimitExceeded | None

    @classmethod
    def nothing(cls) -> Decoded:
        """Return what no stream shows."""
        return cls([], [], np.empty(0, np.uint64), None)


def decode_all(image: Image, census: Census) -> Decoded:
    """Decode every live stream once, in the order of the file.

    Genuine streams do not overlap, and all of them are decoded, however far they expand. A small file could name
    any number of streams that share bytes or do not decode: those have a budget.
    """
    if image.header.external_data:  # QEMU reads no streams beside a data file
        return Decoded.nothing()
    codec = codec_of(image.header.compression_type)
    size, bits = image.cluster_size, image.header.cluster_bits
    entries = census.compressed_entries
    entries = entries[np.argsort(compressed_extents(entries, image.header)[0], kind="stable")]
    offsets, lengths = compressed_extents(entries, image.header)
    # How many begin in the file, and how many in its clusters, of which the last one may be cut off.
    inside, in_clusters = np.searchsorted(
        offsets, np.asarray([image.file_size, padded(image.file_size, size)], np.uint64)
    )
    lost = entries[:0]
    used: list[tuple[int, int]] = []
    whose: list[int] = []
    failed: list[int] = []
    stopped: LimitExceeded | None = None
    budget = _budget(image)
    taken = 0  # the end of the good streams so far
    last = b""  # the good stream before
    parts_of_last: tuple[tuple[int, int], ...] = ()  # the ranges of it that are taken in
    for entry in entries[:inside].tolist():
        offset, length = compressed_descriptor(entry, bits)
        data = image.read(offset, length)
        cost, fails, parts = length, False, parts_of_last
        if not last or not data.startswith(last):  # else a cluster like the one before
            cost += max(size, START)
            taken_in = _taken_in(codec, data, size)
            fails = taken_in is None
            if taken_in is None:
                failed.append(entry)
                parts = codec.needed(data, size) or ((0, length),)
            else:
                parts = parts_of_last = taken_in
                last = data[: taken_in[-1][1]]
        used += ((offset + start, offset + stop) for start, stop in parts)
        whose += [entry] * len(parts)
        if (fails or offset < taken) and (stopped := _refused(budget, cost)) is not None:
            break
        taken = taken if fails else max(taken, offset + parts[-1][1])
    else:
        lost, cut = entries[inside:], slice(inside, in_clusters)
        whose += entries[cut].tolist()
        used += zip(offsets[cut].tolist(), (offsets + lengths)[cut].tolist(), strict=True)
    return Decoded(used, whose, np.concatenate((np.asarray(failed, np.uint64), lost)), stopped)


def _taken_in(codec: Codec, data: bytes, size: int) -> tuple[tuple[int, int], ...] | None:
    """Return the ranges of a stream that gives exactly a cluster; None for any other."""
    # A codec that does not cut refuses a stream that gives more than a cluster.
    parts = None if codec.cuts else codec.needed(data, size)
    if parts is None:
        found = codec.measure(data, size)
        parts = None if found is None else ((0, found[1]),)
    return parts


class Taken(NamedTuple):
    """Which host bytes some streams take: rows (start, stop).

    ``failed`` are the extents that do not decode, rows (offset, length). ``stopped`` is set where not all were decoded.
    """

    used: I64
    failed: I64
    stopped: LimitExceeded | None


def taken_by(image: Image, offsets: I64, lengths: I64) -> Taken:
    """Return the host bytes that the streams at some extents take; for version 1.

    Those that cannot be decoded, or for which the budget is too small, keep all of their extents.
    """
    codec, budget = codec_of(image.header.compression_type), _budget(image)
    found: list[tuple[int, int]] = []
    failed: list[tuple[int, int]] = []
    stopped: LimitExceeded | None = None
    for offset, length in distinct_rows(np.column_stack((offsets, lengths))).tolist():
        parts: tuple[tuple[int, int], ...] | None = None
        refused = _refused(budget, length + max(image.cluster_size, START))
        if refused is None:
            parts = codec.needed(image.read(offset, length), image.cluster_size)
            failed += [] if parts else [(offset, length)]
        stopped = stopped or refused
        found += ((offset + start, offset + stop) for start, stop in parts or ((0, length),))
    return Taken(np.asarray(found, np.int64).reshape(-1, 2), np.asarray(failed, np.int64).reshape(-1, 2), stopped)


def _budget(image: Image) -> Budget:
    return Budget("decoded bytes of streams that are bad or share bytes", image.file_size, image.limits)


def _refused(budget: Budget, cost: int) -> LimitExceeded | None:
    try:
        budget.spend(cost)
    except LimitExceeded as error:
        return error
    return None
