"""Decodes every compressed cluster once and says which streams do not give exactly one cluster."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from ..census import Tables
from ..codecs import inflate, unzstd
from ..errors import LimitExceeded
from ..findings import Evidence
from ..residue.streams import decoded_limit
from ..structures import COMPRESSED, Compression, compressed_descriptor
from .facts import Facts
from .items import snapshot_id

_REMEMBERED = 1 << 18  # descriptors known to be good, so that a shared stream is decoded once


def undecodable(facts: Facts) -> Iterator[Callable[[], Evidence]]:
    """Yield the compressed entries whose stream is bad, too short, or too long.

    :class:`LimitExceeded` where decoding every stream would take too long.
    """
    if facts.header.external_data:
        return
    known: dict[int, str | None] = {}
    decoded, most = 0, decoded_limit(facts.image)
    for tables in facts.census.tables():
        packed = (tables.entries & np.uint64(COMPRESSED)) != 0
        faults: dict[int, str] = {}
        for entry in np.unique(tables.entries[packed]).tolist():
            if entry not in known:
                if len(known) >= _REMEMBERED:
                    known.clear()
                decoded += facts.cluster_size
                if decoded > most:
                    raise LimitExceeded("decoded bytes of all streams", decoded, most)
                known[entry] = _fault(facts, entry)
            if (fault := known[entry]) is not None:
                faults[entry] = fault
        if faults:
            bad = np.asarray(list(faults), dtype=np.uint64)
            for row, column in tables.where(packed & np.isin(tables.entries, bad)):
                yield partial(_evidence, facts, tables, row, column, faults)


def _evidence(facts: Facts, tables: Tables, row: int, column: int, faults: Mapping[int, str]) -> Evidence:
    snapshot = snapshot_id(facts, int(tables.tree[row]))
    entry, at, guest = (
        int(tables.entries[row, column]),
        tables.entry_offset(row, column),
        tables.guest_offset(row, column),
    )
    host, size = compressed_descriptor(entry, tables.cluster_bits)
    return Evidence(
        f"entry of a stream at {host:#x}, {size} bytes: {faults[entry]}", entry, at, 8, "L2", guest, snapshot
    )


def _fault(facts: Facts, entry: int) -> str | None:
    offset, size = compressed_descriptor(entry, facts.header.cluster_bits)
    stored = facts.read(offset, size)
    cut = f"; {size - len(stored)} bytes lie past the end of the file" if len(stored) < size else ""
    stored = stored.ljust(size, b"\0")
    try:
        if facts.header.compression_type == Compression.ZSTD:
            unzstd(stored, facts.cluster_size)
        else:
            given = _given(stored, facts.cluster_size + 1)
            if given > facts.cluster_size:
                return "the deflate stream gives more than a cluster"  # QEMU keeps the first cluster of it
            if given != facts.cluster_size:
                inflate(stored, facts.cluster_size)  # knows what is wrong, or that only what follows is
    except ValueError as error:
        return f"{error}{cut}"
    return None


def _given(stored: bytes, most: int) -> int:
    """Return how many bytes a deflate stream gives, up to ``most``; -1 when it is bad somewhere."""
    try:
        return len(zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored, most))
    except zlib.error:
        return -1
