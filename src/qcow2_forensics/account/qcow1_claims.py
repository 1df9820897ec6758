"""The account of a version 1 image: it has no refcounts, and its entries are all there is to know."""

from __future__ import annotations

import numpy as np

from ..census.claimed_clusters import merged
from ..census.columns import I64, Columns, big_endian, compressed_extents
from ..format.image import Image
from ..limits import Budget
from .labels import Kind, Labels, Place
from .spans import Spans
from .streams import taken_by

_CHUNK = 1 << 16  # L1 entries handled at once


def claim_qcow1(image: Image, labels: Labels, claims: Spans, hints: Spans, *, decode: bool) -> bool:
    """Claim the tables and clusters of a version 1 image; False where there are more tables than the file has room for.

    With ``decode`` compressed clusters claim the bytes that their streams take, else what their entries say.
    """
    header = image.header
    size, span, width = header.cluster_size, header.l2_span, header.l2_entries * 8
    l1_label, l2_label = labels.number(Kind.L1, "active state"), labels.number(Kind.L2, "active state")
    data_label, packed = labels.number(Kind.DATA, "active state"), labels.number(Kind.COMPRESSED)
    past, state_end = labels.number(Place.ENTRIES_PAST_END, "L2 tables"), labels.number(Place.PAST_STATE_END)
    needed = -(-image.disk_size // span)
    start = header.l1_table_offset
    hints.add(labels.number(Place.HEADER_SLACK), header.header_length, start)
    claims.add(l1_label, start, start + needed * 8)
    hints.add(labels.number(Place.ENTRIES_PAST_END, "L1 table"), start + needed * 8, start + header.l1_size * 8)
    budget = Budget("bytes of L2 tables", image.file_size, image.limits)
    data: list[I64] = []
    streams: list[I64] = []
    for first in range(0, min(needed, max(0, image.file_size - start) // 8), _CHUNK):
        words = big_endian(image.read(start + first * 8, min(_CHUNK, needed - first) * 8))
        for slot in np.flatnonzero(words).tolist():
            offset = int(words[slot])
            if offset >= image.file_size:
                continue
            if budget.left < width:
                return False
            budget.spend(width)
            columns = Columns.of(big_endian(image.read(offset, width).ljust(width, b"\0")), header)
            inside = image.disk_size - (first + slot) * span
            meant = min(header.l2_entries, -(-inside // size))
            claims.add(l2_label, offset, offset + meant * 8)
            hints.add(past, offset + meant * 8, offset + width)
            places = np.flatnonzero(columns.hosts[:meant])
            hosts = columns.hosts[places].astype(np.int64)
            data.append(np.column_stack((hosts, hosts + np.minimum(size, inside - places * size))))
            hints.add_many(state_end, hosts + np.minimum(size, inside - places * size), hosts + size)
            offsets, lengths = compressed_extents(columns.entries[:meant][columns.compressed[:meant]], header)
            streams.append(np.column_stack((offsets, offsets + lengths)).astype(np.int64))
    extents = np.concatenate([*streams, np.empty((0, 2), np.int64)])
    if decode:
        hints.add_many(labels.number(Place.COMPRESSED_SLACK), extents[:, 0], extents[:, 1])
        extents = taken_by(image, extents[:, 0], extents[:, 1] - extents[:, 0])
    for label, parts in ((data_label, data), (packed, [extents])):
        rows = np.concatenate([*parts, np.empty((0, 2), np.int64)])
        rows = rows[(rows[:, 0] < image.file_size) & (rows[:, 0] >= 0)]
        if len(rows):
            starts, stops = merged(rows[:, 0].astype(np.uint64), rows[:, 1].astype(np.uint64))
            claims.add_many(label, starts, stops)
    return True
