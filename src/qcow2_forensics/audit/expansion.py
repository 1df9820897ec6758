"""Rules about images that expand without end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..census import Owner
from ..census.columns import compressed_extents
from ..findings import Evidence, Severity
from ..format.entries import COPIED
from ..limits import MiB
from .facts import Facts
from .rules import QEMU_MADE, Chapter, Depth

rule = Chapter(__name__, "Expansion")


@rule(
    "QCOW2-AMPLIFICATION",
    Severity.HIGH,
    "few stored clusters are mapped very many times",
    note="reading the disk expands the file many times over: consistent with a decompression or parser-time bomb; "
    "QEMU never maps one stored cluster twice within a state",
    when="one state maps at least 1,000 clusters, and a hundred times as many as are stored",
    depth=Depth.STANDARD,
)
def amplification(facts: Facts) -> Iterator[Evidence]:
    census = facts.census
    if facts.header.external_data or census.allocated < 1000 or census.allocated <= 100 * census.owned(Owner.DATA):
        return  # with a data file every cluster stands at its own guest offset, or is reported for it
    mapped = 0
    unique: list[np.ndarray] = []
    for batch in facts.census.tables():
        slots = batch.active.astype(np.int64)
        per_table = (batch.columns.hosts != 0) | batch.columns.compressed
        counts = per_table.sum(axis=1).astype(np.int64)
        mapped += int((counts * slots).sum())
        unique.append(np.unique(batch.entries[per_table & (slots > 0)[:, None]] & ~np.uint64(COPIED)))
    stored = len(np.unique(np.concatenate(unique))) if unique else 0
    if mapped >= 1000 and mapped > 100 * stored:
        yield Evidence("clusters_mapped", mapped, structure="active state")
        yield Evidence("clusters_stored", stored, structure="active state")
        yield Evidence("guest_bytes", mapped << facts.header.cluster_bits)


@rule(
    "QCOW2-COMPRESSION-BOMB",
    Severity.MEDIUM,
    "compressed clusters expand very far",
    note="consistent with a disk full of zeros that was compressed as data, or with a bomb",
    when="at least 64 MiB are stored compressed, more than 500 times",
    harmless="disks full of zeros compress a thousand times; QEMU's convert leaves zeros out",
    depth=Depth.STANDARD,
    validated=QEMU_MADE,
)
def compression_bomb(facts: Facts) -> Iterator[Evidence]:
    bits = facts.header.cluster_bits
    if facts.census.compressed << bits < 64 * MiB:
        return
    unique = facts.census.compressed_entries
    guest = len(unique) << bits
    if guest < 64 * MiB:
        return
    starts, lengths = compressed_extents(unique, facts.header)
    stored = _union(starts, starts + lengths)
    if guest > 500 * max(stored, 1):
        yield Evidence("compressed_guest_bytes", guest)
        yield Evidence("compressed_host_bytes", stored)


def _union(starts: np.ndarray, ends: np.ndarray) -> int:
    """Return how many bytes the ranges cover together."""
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order].astype(np.int64), np.maximum.accumulate(ends[order].astype(np.int64))
    before = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
    return int((ends - np.maximum(starts, before)).clip(min=0).sum())
