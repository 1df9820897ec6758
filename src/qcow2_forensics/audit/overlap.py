"""What a consistency check does not look at: overlaps, aliases, and where the file ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..census import GUEST_DATA, METADATA, Owner, structure_of
from ..census.arrays import ranges
from ..findings import EVIDENCE_LIMIT, BoundedSample, Evidence, Severity
from ..format.entries import end_of_data, is_compressed, stored_extent
from .applied_vm_state import applied_vm_state
from .entry_evidence import entry_evidence, item_evidence, referrer_evidence, snapshot_id
from .facts import Facts
from .rules import QEMU_MADE, Chapter, Depth, OneFinding

rule = Chapter(__name__, "Overlaps, aliases and ends", depth=Depth.STANDARD)

Number = TypeVar("Number", bound=np.integer)


@rule(
    "QCOW2-DATA-OVER-METADATA",
    Severity.CRITICAL,
    "guest data overlaps the metadata of the image",
    note=(
        "the guest can read or overwrite metadata of the image: consistent with a crafted image, or with damage by a "
        "faulty allocator"
    ),
    when="a mapped cluster, compressed or not, intersects the header, a table or a LUKS header",
    explained_by=("QCOW2-L2-TABLE-LOST",),
)
def data_over_metadata(facts: Facts) -> Iterator[OneFinding]:
    census = facts.census
    clusters, count = _clusters_owned_by(facts, int(GUEST_DATA), int(METADATA))
    if not count:
        return
    found = []
    mapping = census.referrers(set(clusters))
    for cluster in clusters:
        host = cluster * census.cluster_size
        words = f"refcount of host cluster {host:#x}, claimed by {structure_of(census.owner(host))}"
        found.append(Evidence(words, census.refcount(host), host, census.cluster_size, "host cluster"))
        found += [referrer_evidence(facts, item) for item in mapping.get(cluster, ())[:3]]
    yield OneFinding(found, count=count)


def _clusters_owned_by(facts: Facts, *masks: int) -> tuple[list[int], int]:
    """Return host clusters that have an owner in each mask, spread over the file, and how many there are."""
    found: BoundedSample[int] = BoundedSample()
    count = 0
    for starts, stops, owners in facts.census.owner_runs():
        chosen = np.ones(len(owners), dtype=np.bool_)
        for mask in masks:
            chosen &= (owners & np.uint16(mask)) != 0
        _, hits = ranges(starts[chosen], stops[chosen])
        count += len(hits)
        for cluster in evenly(hits).tolist():
            found.add(cluster, cluster)
    return list(found.items), count


def evenly(places: npt.NDArray[Number], most: int = EVIDENCE_LIMIT) -> npt.NDArray[Number]:
    """Return at most ``most`` of some places, at equal distances."""
    return places if len(places) <= most else places[np.linspace(0, len(places) - 1, most).astype(np.intp)]


# --- metadata against metadata -------------------------------------------------------------------


@rule(
    "QCOW2-METADATA-OVERLAP",
    Severity.CRITICAL,
    "metadata structures overlap",
    note="consistent with a crafted or corrupted image: QEMU never stores two structures in one place",
    when="the byte ranges of two metadata structures intersect; an L2 table shared by states is one structure",
)
def metadata_overlap(facts: Facts) -> Iterator[OneFinding]:
    found, count = _overlaps(facts)
    if count:
        yield OneFinding(found, count=count)


def _overlaps(facts: Facts) -> tuple[list[Evidence], int]:
    """Return structures that overlap, two by two, and how many such pairs there are."""
    structures = facts.census.structures
    starts = np.concatenate([one.offsets for one in structures])
    lengths = np.concatenate([one.lengths for one in structures])
    kinds = np.concatenate([np.full(len(one.offsets), int(one.owner), dtype=np.int64) for one in structures])
    order = np.lexsort((kinds, starts))
    starts, lengths, kinds = starts[order], lengths[order], kinds[order]
    # Whole clusters: what is in the same cluster as a structure overlaps it. Offsets past the end of any file are
    # lowered, so that the sum does not overflow.
    size = np.uint64(facts.cluster_size)
    ends = (np.minimum(starts, np.uint64(2**62)) + lengths + size - np.uint64(1)) // size * size
    furthest_end = np.maximum.accumulate(ends)
    hits = np.flatnonzero(starts[1:] < furthest_end[:-1]) + 1
    furthest = np.maximum.accumulate(np.where(ends == furthest_end, np.arange(len(ends)), 0))

    def structure_at(at: int) -> Evidence:
        name = structure_of(Owner(int(kinds[at])))
        return Evidence("structure", name, int(starts[at]), int(lengths[at]), name)

    found: list[Evidence] = []
    for at in evenly(hits, EVIDENCE_LIMIT // 2).tolist():
        found += (structure_at(int(furthest[at - 1])), structure_at(at))
    return found, len(hits)


# --- aliases -------------------------------------------------------------------------------------


@rule(
    "QCOW2-SHARED-CLUSTER",
    Severity.HIGH,
    "several guest offsets share one host cluster",
    note="QEMU never maps one cluster twice within a state: consistent with a crafted image or with damage",
    when="one host cluster, or one compressed stream, is mapped at two or more guest offsets; QEMU's check ignores it",
    explained_by=("QCOW2-L2-TABLE-LOST",),
)
def shared_cluster(facts: Facts) -> Iterator[OneFinding]:
    census = facts.census
    issue = census.issues["alias"]
    if not issue.count:
        return
    found = []
    for cluster, items in sorted(census.referrers(census.aliases).items()):
        host = cluster * census.cluster_size
        found.append(Evidence(f"refcount of host cluster {host:#x}", census.refcount(host), host, census.cluster_size))
        found += [referrer_evidence(facts, item) for item in items[:8]]
    yield OneFinding(found or [Evidence("aliases", issue.count)], count=issue.count)


@rule(
    "QCOW2-SHARED-L2",
    Severity.HIGH,
    "one L2 table serves several guest ranges",
    note="whole guest ranges show the same bytes; also a way to make a small file expand: consistent with a crafted image",
    when="two entries of one L1 table, or different entries of different L1 tables, name one L2 table",
)
def shared_l2(facts: Facts) -> Iterator[OneFinding]:
    named = facts.census.named
    several = np.flatnonzero((named.low != named.high) & (named.offsets != 0))
    found = []
    for at in evenly(several).tolist():
        low, high, uses = int(named.low[at]), int(named.high[at]), int(named.active[at] + named.snapshots[at])
        words = f"L2 table, in L1 slots {low} to {high}; uses"
        owner = snapshot_id(facts, int(named.tree[at]))
        found.append(Evidence(words, uses, int(named.offsets[at]), facts.cluster_size, "L2", None, owner))
    if found:
        yield OneFinding(found, count=len(several))


# --- ends ----------------------------------------------------------------------------------------


@rule(
    "QCOW2-DATA-BEYOND-END",
    Severity.MEDIUM,
    "data is mapped past the end of the disk",
    note="data the guest cannot reach: consistent with a shrunk or edited size, or hidden storage",
    when="the active state maps data at guest offsets at or above the disk size",
    harmless="a snapshot with VM state that was applied: its machine state is mapped there, and nothing else (Low)",
)
def data_beyond_end(facts: Facts) -> Iterator[OneFinding]:
    issue = facts.census.issues["beyond-end"]
    if not issue.count:
        return
    found = []
    for item in issue.items:
        found.append(item_evidence(facts, item, f"entry, mapping host offset {item.host or 0:#x}"))
        if len(found) <= 8 and not facts.header.external_data and item.host is not None:
            found.append(_stored(facts, item.host, item.value, item.guest))
    if applied_vm_state(facts, issue.count):
        note = "all of it is one saved machine state: consistent with a snapshot that was applied"
        yield OneFinding(found, severity=Severity.LOW, note=note, count=issue.count)
    else:
        yield OneFinding(found, count=issue.count)


def _stored(facts: Facts, host: int, entry: int, guest: int | None) -> Evidence:
    """Return how many bytes are not zero of what an L2 entry, mapping ``host``, stores."""
    packed = is_compressed(entry)
    data = facts.read(host, stored_extent(entry, facts.header.cluster_bits)[1])
    words, structure = ("compressed stream", "compressed cluster") if packed else ("cluster", "host cluster")
    return Evidence(f"non-zero bytes in the {words}", len(data) - data.count(0), host, len(data), structure, guest)


@rule(
    "QCOW2-TRUNCATED",
    Severity.HIGH,
    "the file is cut off",
    note="consistent with an incomplete copy",
    when="a table, or a cluster that refcount and mapping agree on, begins past the end of the file",
)
def truncated(facts: Facts) -> Iterator[OneFinding]:
    census, end = facts.census, facts.image.file_size
    lost = []
    for item in census.issues["beyond-eof"].items:
        entry = item.structure in ("L1", "L2", "bitmap table")
        # One stray pointer is not a missing tail; a refcount that agrees, or its absence, is.
        if not entry or census.refcount(item.host or 0) or census.issues["reftable-beyond-eof"].count:
            lost.append(item)
    blocks = census.issues["reftable-beyond-eof"].items
    lost += [item for item in blocks if item.host is not None and item.host < 2**62]
    missing = [entry_evidence(facts, item) for item in lost]
    # Of a table, whose value is its length, all is expected; of a cluster its first byte.
    least = max(((item.host or 0) + (item.value if item.offset is None else 1) for item in lost), default=0)
    if census.issues["beyond-eof"].count > len(census.issues["beyond-eof"].items):  # not all items are kept
        least = max(least, census.highest_missing + 1)
    length = facts.header.header_length
    if end < length <= facts.cluster_size:  # a longer one is no header, whatever the file's size
        missing.append(Evidence("header, bytes", length, 0, end, "header"))
        least = max(least, length)
    if missing:
        found = [Evidence("file size", end), Evidence("least expected size", least), *missing]
        yield OneFinding(found, count=len(missing))


@rule(
    "QCOW2-PARTIAL-LAST-CLUSTER",
    Severity.INFO,
    "the file ends inside its last cluster",
    note="normal for files QEMU wrote: new images end right after the L1 table",
    when="the file size is not a multiple of the cluster size and its last cluster is in use; High where it cuts off "
    "encrypted guest data, of which QEMU writes whole clusters or subclusters",
    validated=QEMU_MADE,
)
def partial_last_cluster(facts: Facts) -> Iterator[Evidence | OneFinding]:
    size, end = facts.cluster_size, facts.image.file_size
    if end % size and facts.census.end >= end:
        sizes = [Evidence("file size", end), Evidence("end of its last cluster, offset", facts.census.end)]
        cut = _cut_off(facts, end) if facts.header.crypt_method else []
        if not cut:
            yield from sizes
            return
        title = "the file ends inside an encrypted cluster"
        note = "QEMU decrypts zeros for the rest, to bytes that nobody wrote; consistent with an incomplete copy"
        yield OneFinding([*sizes, *cut], severity=Severity.HIGH, title=title, note=note)


def _cut_off(facts: Facts, end: int) -> list[Evidence]:
    """Return the L2 entries whose data, which are not compressed, the end of the file cuts in two."""
    size = facts.cluster_size
    cluster = end // size
    found = []
    for item in facts.census.referrers({cluster}, EVIDENCE_LIMIT).get(cluster, ()):
        at = (item.offset or 0) + 8
        bitmap = int.from_bytes(facts.read(at, 8), "big") if facts.header.extended_l2 else None
        if not is_compressed(item.value) and cluster * size + end_of_data(item.value, size, bitmap) > end:
            found.append(referrer_evidence(facts, item))
    return found
