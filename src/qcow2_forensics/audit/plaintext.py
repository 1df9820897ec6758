"""Rules about what an encrypted image stores unencrypted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..findings import Evidence, Severity
from ..format.entries import COMPRESSED, OFFSET_MASK, ZERO, compressed_descriptor
from ..limits import KiB
from ..residue import content
from .entry_evidence import snapshot_id
from .facts import Facts
from .rules import QEMU_MADE, Chapter, Depth

rule = Chapter(__name__, "Plain text in encrypted images")

_SAMPLE = 64 * KiB  # of each cluster looked at
_SAMPLES = 512  # clusters looked at
_LOW_ENTROPY = 7.0  # bits per byte; 4 KiB of ciphertext have 7.95


@rule(
    "QCOW2-PLAINTEXT-COMPRESSED",
    Severity.HIGH,
    "an encrypted image holds compressed clusters",
    note="compressed clusters are stored unencrypted: they can be read without the key",
    when="crypt_method is not 0 and an L2 entry is compressed",
    depth=Depth.STANDARD,
    validated=QEMU_MADE,
)
def plaintext_compressed(facts: Facts) -> Iterator[Evidence]:
    if not facts.header.crypt_method:
        return
    for batch in facts.census.tables():
        for row, column in batch.where((batch.entries & np.uint64(COMPRESSED)) != 0):
            host, _ = compressed_descriptor(int(batch.entries[row, column]), facts.header.cluster_bits)
            at, guest = batch.entry_offset(row, column), batch.guest_offset(row, column)
            yield Evidence("host", host, at, 8, "L2", guest, snapshot_id(facts, int(batch.tree[row])))


@rule(
    "QCOW2-PLAINTEXT-CONTENT",
    Severity.MEDIUM,
    "clusters of an encrypted image are not encrypted",
    note="consistent with an edited crypt_method, or with data older than the encryption",
    when="of sampled clusters that are not zeros, one starts with a known signature or has little entropy",
    harmless="clusters of zeros and preallocated ones are left out",
    depth=Depth.DEEP,
    needs="census",
)
def plaintext_content(facts: Facts) -> Iterator[Evidence]:
    if not facts.header.crypt_method or facts.header.external_data:
        return
    for host, guest, snapshot in _mapped(facts):
        data = facts.read(host, min(facts.cluster_size, _SAMPLE))
        if not any(data):
            continue
        seen = content.describe(data)
        # A signature of two or three bytes comes up by chance among many clusters of ciphertext.
        if len(data) >= 4 * KiB and seen.entropy < _LOW_ENTROPY:
            told = f"entropy {seen.entropy:.2f}" + (f", {seen.signature}" if seen.signature else "")
            yield Evidence("content", told, host, len(data), "data cluster", guest, snapshot)


def _mapped(facts: Facts) -> Iterator[tuple[int, int, str]]:
    """Yield (host offset, guest offset, snapshot) of up to 512 plainly stored clusters, each once."""
    seen: set[int] = set()
    skipped = COMPRESSED | ZERO
    for batch in facts.census.tables():
        plain = ((batch.entries & np.uint64(skipped)) == 0) & ((batch.entries & np.uint64(OFFSET_MASK)) != 0)
        for row, column in batch.where(plain):
            host = int(batch.entries[row, column]) & OFFSET_MASK
            if host % facts.cluster_size == 0 and host < facts.image.file_size and host not in seen:
                yield host, batch.guest_offset(row, column), snapshot_id(facts, int(batch.tree[row]))
                seen.add(host)
                if len(seen) >= _SAMPLES:
                    return
