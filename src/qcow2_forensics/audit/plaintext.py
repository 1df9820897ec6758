"""Rules about what an encrypted image stores unencrypted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..census import IndexMap, Tables
from ..findings import Evidence, Severity
from ..format.image import Image
from ..limits import KiB
from ..residue import content
from .entry_evidence import snapshot_id
from .facts import Facts, subscribes
from .rules import QEMU_MADE, Chapter, Depth, Graded, graded

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
def plaintext_compressed(facts: Facts) -> Iterator[Graded]:
    issue = facts.census.issues["compressed-encrypted"]
    if issue.count:
        found = [
            Evidence("host", item.host, item.offset, 8, "L2", item.guest, snapshot_id(facts, item.tree))
            for item in issue.items
        ]
        yield graded(found, count=issue.count)


@subscribes(Depth.DEEP, lambda image: image.header.crypt_method != 0)
class SampledClusters:
    """The first 512 host clusters that L2 entries map as plain data: (host offset, guest offset, tree) each, once."""

    def __init__(self, image: Image, _clusters: IndexMap) -> None:
        self._size, self._end = image.cluster_size, image.file_size
        self._known: set[int] = set()
        self.found: list[tuple[int, int, int]] = []

    def tables(self, batch: Tables) -> None:
        """Take in a batch of tables."""
        if len(self.found) >= _SAMPLES:
            return
        hosts = batch.columns.hosts
        plain = (hosts != 0) & ~batch.columns.bit_zero & (hosts < np.uint64(self._end))
        plain &= (hosts & np.uint64(self._size - 1)) == 0
        for row, column in batch.where(plain):
            host = int(hosts[row, column])
            if host not in self._known:
                self._known.add(host)
                self.found.append((host, batch.guest_offset(row, column), int(batch.tree[row])))
                if len(self.found) >= _SAMPLES:
                    return


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
    for host, guest, tree in facts.census.seen(SampledClusters).found:
        data = facts.read(host, min(facts.cluster_size, _SAMPLE))
        if not any(data):
            continue
        seen = content.describe(data)
        # A signature of two or three bytes comes up by chance among many clusters of ciphertext.
        if len(data) >= 4 * KiB and seen.entropy < _LOW_ENTROPY:
            told = f"entropy {seen.entropy:.2f}" + (f", {seen.signature}" if seen.signature else "")
            yield Evidence("content", told, host, len(data), "data cluster", guest, snapshot_id(facts, tree))
