"""Rules about images that expand without end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..census import Owner
from ..census.arrays import distinct, merged
from ..census.columns import compressed_extents, without_copied
from ..errors import Qcow2Error
from ..findings import Evidence, Severity
from ..format.codecs import codec_of
from ..format.entries import compressed_descriptor
from ..limits import SAMPLED_CONTENT, MiB
from .facts import Facts
from .overlap import evenly
from .rules import QEMU_MADE, Chapter, Depth, OneFinding

rule = Chapter(__name__, "Expansion", depth=Depth.STANDARD)

_ARCHIVES = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\3\4", "ZIP"),
    (b"QFI\xfb", "QCOW2"),
)


@rule(
    "QCOW2-AMPLIFICATION",
    Severity.HIGH,
    "few stored clusters are mapped very many times",
    note="reading the disk expands the file many times over: consistent with a decompression or parser-time bomb; "
    "QEMU never maps one stored cluster twice within a state",
    when="one state maps at least 1,000 clusters, and a hundred times as many as are stored",
)
def amplification(facts: Facts) -> Iterator[Evidence]:
    census = facts.census
    if facts.header.external_data or census.allocated < 1000 or census.allocated <= 100 * census.owned(Owner.DATA):
        return  # with a data file every cluster is at its own guest offset, or is reported for it
    mapped = 0
    unique: list[np.ndarray] = []
    for batch in facts.census.tables():
        slots = batch.active.astype(np.int64)
        per_table = (batch.columns.hosts != 0) | batch.columns.compressed
        counts = per_table.sum(axis=1).astype(np.int64)
        mapped += int((counts * slots).sum())
        unique.append(distinct(without_copied(batch.entries[per_table & (slots > 0)[:, None]])))
    stored = len(distinct(np.concatenate(unique))) if unique else 0
    if mapped >= 1000 and mapped > 100 * stored:
        yield Evidence("clusters_mapped", mapped, structure="active state")
        yield Evidence("clusters_stored", stored, structure="active state")
        yield Evidence("guest_bytes", mapped << facts.header.cluster_bits)


@rule(
    "QCOW2-COMPRESSION-BOMB",
    Severity.MEDIUM,
    "compressed clusters expand very far",
    note="consistent with an image made to exhaust whatever expands it",
    when="at least 64 MiB are stored compressed, in fewer bytes than their codec can make of any content (streams share "
    "bytes), or are compressed more than 500 times and begin as compressed files; Low above 500 times otherwise",
    harmless="disks full of zeros or of one pattern compress a thousand times (Low)",
    validated=QEMU_MADE,
)
def compression_bomb(facts: Facts) -> Iterator[OneFinding]:
    bits = facts.header.cluster_bits
    if facts.census.compressed << bits < 64 * MiB:
        return
    unique = facts.census.compressed_entries
    guest = len(unique) << bits
    if guest < 64 * MiB:
        return
    starts, lengths = compressed_extents(unique, facts.header)
    first, end = merged(starts, starts + lengths)
    stored = int((end - first).sum())
    ratio = guest // max(stored, 1)
    if ratio <= 500:
        return
    evidence = [
        Evidence("compressed_guest_bytes", guest),
        Evidence("compressed_host_bytes", stored),
        Evidence("ratio", ratio),
    ]
    nested = _nested(facts, unique)
    if nested:
        evidence.append(Evidence("content_starts_as", nested))
    best = codec_of(facts.header.compression_type).best_ratio(facts.cluster_size)
    yield OneFinding(evidence, severity=None if nested or ratio > best else Severity.LOW)


def _nested(facts: Facts, entries: np.ndarray) -> str:
    """Return the signature of compressed files that clusters begin with, empty for none.

    Up to a limit all clusters are looked at; of more as many, evenly spread.
    """
    for entry in evenly(entries, SAMPLED_CONTENT // facts.cluster_size).tolist():
        host, length = compressed_descriptor(entry, facts.header.cluster_bits)
        try:
            data = codec_of(facts.header.compression_type).decode(facts.read(host, length), facts.cluster_size)
        except (ValueError, Qcow2Error):
            continue
        found = next((name for magic, name in _ARCHIVES if data.startswith(magic)), "")
        if found:
            return found
    return ""
