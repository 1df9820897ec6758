"""Rules about what an encrypted image stores unencrypted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..census import IndexMap, Tables
from ..census.arrays import Places, distinct
from ..census.issues import Item
from ..findings import BoundedSample, Evidence, Severity
from ..format.header import SECTOR
from ..format.image import Image
from ..limits import ENCRYPTED_SAMPLES, KiB
from ..residue import content
from .entry_evidence import item_evidence, of_issues, snapshot_id
from .facts import Facts, subscribes
from .overlap import evenly
from .rules import QEMU_MADE, Chapter, Depth

rule = Chapter(__name__, "Plain text in encrypted images", depth=Depth.STANDARD)

_SAMPLE = 4 * KiB  # bytes looked at of each cluster
_BATCH = 256  # clusters looked at together
_LOW_ENTROPY = 7.0  # bits per byte; 4 KiB of ciphertext have 7.95, a sector of it 7.6


def _host(facts: Facts, item: Item) -> Evidence:
    return item_evidence(facts, item._replace(value=item.host or 0), "host")


rule(
    "QCOW2-PLAINTEXT-COMPRESSED",
    Severity.HIGH,
    "an encrypted image holds compressed clusters",
    note="compressed clusters are stored unencrypted: they can be read without the key",
    when="crypt_method is not 0 and an L2 entry is compressed",
    validated=QEMU_MADE,
)(of_issues("compressed-encrypted", show=_host))


@subscribes(Depth.DEEP, lambda image: image.header.crypt_method != 0)
class StoredClusters:
    """The host offsets of plainly stored clusters."""

    def __init__(self, image: Image, _clusters: IndexMap) -> None:
        self._size, self._end = image.cluster_size, image.file_size
        self._parts: list[Places] = []

    def tables(self, batch: Tables) -> None:
        """Take in a batch of tables."""
        hosts = batch.columns.hosts
        plain = (hosts != 0) & ~batch.columns.bit_zero & (hosts < np.uint64(self._end))
        plain &= (hosts & np.uint64(self._size - 1)) == 0
        self._parts.append(hosts[plain].astype(np.intp))

    def offsets(self) -> Places:
        """Return them, each once, rising."""
        return distinct(np.concatenate(self._parts)) if self._parts else np.empty(0, np.intp)


@rule(
    "QCOW2-PLAINTEXT-CONTENT",
    Severity.MEDIUM,
    "clusters of an encrypted image are not encrypted",
    note="consistent with an edited crypt_method, or with data older than the encryption",
    when="of up to 131,072 clusters that are not zeros, evenly chosen, the first 4 KiB of one have little entropy",
    harmless="sectors of zeros, as in preallocated clusters, are left out",
    depth=Depth.DEEP,
)
def plaintext_content(facts: Facts) -> Iterator[Evidence]:
    if not facts.header.crypt_method or facts.header.external_data or facts.cluster_size < _SAMPLE:
        return
    hosts = facts.census.seen(StoredClusters).offsets()
    found: BoundedSample[tuple[int, float]] = BoundedSample()
    chosen = evenly(hosts[hosts + _SAMPLE <= facts.image.file_size], ENCRYPTED_SAMPLES)
    for first in range(0, len(chosen), _BATCH):
        batch = chosen[first : first + _BATCH]
        data = np.frombuffer(b"".join(facts.read(host, _SAMPLE) for host in batch.tolist()), np.uint8)
        counts = content.histograms(data.reshape(len(batch), -1), np.arange(len(batch)))
        # Sectors are encrypted one by one: those of zeros were never written.
        blank = ~data.reshape(len(batch), -1, SECTOR).any(axis=2)
        counts[:, 0] -= blank.sum(axis=1) * SECTOR
        entropies = content.entropies(counts)
        # A signature of two or three bytes comes up by chance among many clusters of ciphertext.
        for row in np.flatnonzero(counts.any(axis=1) & (entropies < _LOW_ENTROPY)).tolist():
            found.add((int(batch[row]), float(entropies[row])), int(batch[row]))
    mapping = facts.census.referrers({host // facts.cluster_size for host, _ in found.items})
    for host, entropy in found.items:
        named = next(iter(mapping.get(host // facts.cluster_size, ())), None)
        signature = content.signature(facts.read(host, _SAMPLE))
        words = f"entropy {entropy:.2f}" + (f", {signature}" if signature else "")
        guest, snapshot = (None, "") if named is None else (named.guest, snapshot_id(facts, named.tree))
        yield Evidence("content", words, host, _SAMPLE, "data cluster", guest, snapshot)
