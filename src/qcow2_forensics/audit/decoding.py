"""Decodes every compressed cluster once and says which streams do not give exactly one cluster."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from ..census import Tables
from ..codecs import inflate, unzstd
from ..findings import Evidence
from ..structures import COMPRESSED, Compression, compressed_descriptor
from .facts import Facts
from .items import snapshot_id

_REMEMBERED = 1 << 18  # descriptors known to be good, so that a shared stream is decoded once


def undecodable(facts: Facts) -> Iterator[Evidence]:
    """Yield the compressed entries whose stream is bad, too short, or too long."""
    if facts.header.external_data:
        return
    known: dict[int, str | None] = {}
    for tables in facts.census.tables():
        for row, column in tables.where((tables.entries & np.uint64(COMPRESSED)) != 0):
            entry = int(tables.entries[row, column])
            if entry not in known:
                if len(known) >= _REMEMBERED:
                    known.clear()
                known[entry] = _fault(facts, entry)
            fault = known[entry]
            if fault is not None:
                yield _evidence(facts, tables, row, column, fault)


def _evidence(facts: Facts, tables: Tables, row: int, column: int, fault: str) -> Evidence:
    snapshot = snapshot_id(facts, int(tables.tree[row]))
    entry, at, guest = (
        int(tables.entries[row, column]),
        tables.entry_offset(row, column),
        tables.guest_offset(row, column),
    )
    host, size = compressed_descriptor(entry, tables.cluster_bits)
    return Evidence(f"entry of a stream at {host:#x}, {size} bytes: {fault}", entry, at, 8, "L2", guest, snapshot)


def _fault(facts: Facts, entry: int) -> str | None:
    offset, size = compressed_descriptor(entry, facts.header.cluster_bits)
    stored = facts.read(offset, size)
    cut = f"; {size - len(stored)} bytes lie past the end of the file" if len(stored) < size else ""
    stored = stored.ljust(size, b"\0")
    try:
        if facts.header.compression_type == Compression.ZSTD:
            unzstd(stored, facts.cluster_size)
        else:
            inflate(stored, facts.cluster_size)
            if _overlong(stored, facts.cluster_size):
                return "the deflate stream gives more than a cluster"
    except ValueError as error:
        return f"{error}{cut}"
    return None


def _overlong(stored: bytes, size: int) -> bool:
    """Whether a deflate stream goes on past one cluster; QEMU keeps the first cluster of it."""
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        return len(decoder.decompress(stored, size + 1)) > size
    except zlib.error:
        return False  # what follows a whole cluster is not looked at by readers
