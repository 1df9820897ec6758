"""Tables and refcounts by the rules of ``qemu-img check``, and the entries it silently accepts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..census import GUEST_DATA, METADATA
from ..census.issues import Item
from ..findings import BoundedSample, Evidence, Severity
from ..format.header import Incompatible
from .entry_evidence import (
    describe_value,
    entry_evidence,
    item_evidence,
    of_issues,
    one_finding,
    qcow1_claims,
    refcount_evidence,
    referrer_evidence,
)
from .facts import Facts
from .header_assumptions import other_version
from .rules import QEMU_MADE, Chapter, Deferred, Depth, OneFinding
from .undecodable_streams import undecodable

rule = Chapter(__name__, "Integrity, by the rules of `qemu-img check` and beyond them", depth=Depth.STANDARD)

_FEW = 4  # clusters in use: a header and three tables
_UNCOUNTED = ("QCOW2-REFCOUNTS-ABSENT",)
_LOST = ("QCOW2-L2-TABLE-LOST", "QCOW2-L1-TABLE-LOST")  # tables, and with them what they account for
_DIRTY = ("QCOW2-DIRTY", *_UNCOUNTED, *_LOST)
_CUT = ("QCOW2-TRUNCATED",)

# Issues of the census that QEMU's check counts as corruptions.
_COUNTED = {
    "reserved-bits": "reserved bits are set",
    "unaligned": "pointer is not aligned",
    "beyond-eof": "pointer leads past the end of the file",
    "copied-flag": "copied flag disagrees with the refcount",
    "subcluster": "subcluster bitmap contradicts itself",
    "compressed-copied": "compressed, with the copied flag",
    "compressed-data-file": "compressed, beside a data file",
    "refcount-zero-metadata": "metadata has the refcount 0",
    "refcount-zero-data": "mapped cluster has the refcount 0",
    "refcount-low": "refcount is below the references",
    "refcount-overflow": "more references than a refcount can hold",
    "reftable-reserved": "reserved bits are set for a refcount block",
    "reftable-unaligned": "refcount block is not aligned",
    "reftable-beyond-eof": "refcount block is past the end of the file",
    "reftable-shared": "refcount block is used by something else too",
}


@rule(
    "QCOW2-REFCOUNTS-ABSENT",
    Severity.MEDIUM,
    "the image counts none of its clusters",
    note="the disk can be read in full, but the next writer that trusts the refcounts will overwrite it: consistent "
    "with a library that keeps no refcounts",
    when="every cluster in use has the refcount 0, none that is free has another, and the refcounts can be read",
)
def refcounts_absent(facts: Facts) -> Iterator[Evidence]:
    census = facts.census
    lost = any(census.issues[f"reftable-{kind}"].count for kind in ("reserved", "unaligned", "beyond-eof"))
    if lost or "refcount_table" in facts.image.unreadable_facts:
        return  # refcounts that cannot be read are not refcounts of 0
    counted = sum(census.issues[kind].count for kind in ("refcount-zero-data", "refcount-zero-metadata"))
    if counted < _FEW or census.issues["leaked"].count or census.issues["refcount-past-end"].count:
        return
    used = census.owned(METADATA | GUEST_DATA)
    if used == counted:
        yield Evidence("clusters in use", used)
        yield facts.field("refcount_table_offset")


@rule(
    "QCOW2-ORPHAN-CLUSTERS",
    Severity.MEDIUM,
    "clusters in use have the refcount 0",
    note="the next writer may overwrite such clusters; consistent with an interrupted write or with edited metadata",
    when="a cluster that a guest range maps to has the refcount 0",
    harmless="images with lazy refcounts after a crash",
    validated=QEMU_MADE,
    explained_by=(*_DIRTY, *_CUT),
)
def orphan_clusters(facts: Facts) -> Iterator[OneFinding]:
    census = facts.census
    issue = census.issues["refcount-zero-data"]
    if not issue.count:
        return
    found = [Evidence("orphan_clusters", census.comparison.orphans), Evidence("all states", issue.count)]
    clusters = {(item.host or 0) // census.cluster_size for item in issue.items}
    mapping = census.referrers(clusters)
    for item in issue.items:
        found.append(refcount_evidence(facts, item))
        found += [referrer_evidence(facts, one) for one in mapping.get((item.host or 0) // census.cluster_size, ())[:3]]
    stale = facts.header.incompatible_features & Incompatible.DIRTY
    note = "expected of an image that was not closed, whose refcounts are stale" if stale else ""
    yield OneFinding(found, count=issue.count, note=note)


@rule(
    "QCOW2-CHECK-CORRUPTIONS",
    Severity.HIGH,
    "QEMU's consistency check counts corruptions",
    note="metadata is inconsistent by QEMU's own rules",
    when="the counter corruptions of qemu-img check is above 0",
    validated=QEMU_MADE,
    explained_by=(*_DIRTY, *_CUT),
)
def check_corruptions(facts: Facts) -> Iterator[OneFinding]:
    check = facts.census.check
    if not check or not (check.get("corruptions") or check["check-errors"]):
        return
    total = int(check.get("corruptions", 0))
    found = [Evidence("corruptions", total), Evidence("check-errors", check["check-errors"])]
    kinds = facts.census.issues.kinds()
    found += [Evidence(f"places: {words}", kinds[kind]) for kind, words in _COUNTED.items() if kind in kinds]
    for kind, words in _COUNTED.items():
        for item in facts.census.issues[kind].items:
            found.append(item_evidence(facts, item, f"{words}: {describe_value(item)}"))
    yield OneFinding(found, count=total)


@rule(
    "QCOW2-CHECK-LEAKS",
    Severity.LOW,
    "leaked clusters: counted as used, but nothing refers to them",
    note="consistent with an interrupted operation, or with space reserved on purpose",
    when="the counter leaks of qemu-img check is above 0",
    harmless="a writer that crashed, or a snapshot whose deletion did not finish",
    validated=QEMU_MADE,
    explained_by=_DIRTY,
)
def check_leaks(facts: Facts) -> Iterator[OneFinding]:
    census = facts.census
    leaks = int((census.check or {}).get("leaks", 0))
    if not leaks:
        return
    found = [Evidence("leaks", leaks)]
    runs: BoundedSample[tuple[int, int]] = BoundedSample()
    for run in census.leaked():
        runs.add(run, run[0])
    for offset, length in runs.items:
        found.append(Evidence("unreferenced clusters", length // census.cluster_size, offset, length, "host cluster"))
    found += [refcount_evidence(facts, item) for item in census.issues["refcount-high"].items]
    yield OneFinding(found, count=leaks)


@rule(
    "QCOW2-CHECK-ABORTED",
    Severity.HIGH,
    "QEMU's consistency check cannot finish",
    note="the image cannot be verified by QEMU",
    when="something other than the header makes qemu-img check stop without counters",
)
def check_aborted(facts: Facts) -> Iterator[Evidence]:
    for reason in facts.census.reasons:
        if not reason.header:
            yield Evidence(reason.what, None, reason.offset)


@rule(
    "QCOW2-REFCOUNT-LOW",
    Severity.HIGH,
    "clusters have more references than their refcount says",
    note="the next write may destroy shared data",
    when="a refcount is above 0 and below the number of references",
    explained_by=_DIRTY,
)
def refcount_low(facts: Facts) -> Iterator[OneFinding]:
    for finding in one_finding(facts, "refcount-low", show=refcount_evidence):
        census = facts.census
        clusters = {(item.host or 0) // census.cluster_size for item in census.issues["refcount-low"].items}
        mapping = census.referrers(clusters, 100)
        found = [*finding.evidence, *(referrer_evidence(facts, one) for some in mapping.values() for one in some)]
        yield OneFinding(found, count=finding.count)


rule(
    "QCOW2-REFCOUNT-ZERO-METADATA",
    Severity.HIGH,
    "metadata has the refcount 0",
    note="the next write may destroy a table",
    when="a cluster of the header, a table or a LUKS header has the refcount 0",
    explained_by=(*_DIRTY, *_CUT),
)(of_issues("refcount-zero-metadata", show=refcount_evidence))


rule(
    "QCOW2-REFCOUNT-HIGH",
    Severity.LOW,
    "clusters have fewer references than their refcount says",
    note="consistent with a snapshot that was removed from the table only, or with editing",
    when="a refcount is above the number of references, and that is at least 1",
    explained_by=_DIRTY,
)(of_issues("refcount-high", show=refcount_evidence))


@rule(
    "QCOW2-REFCOUNT-PAST-END",
    Severity.LOW,
    "clusters past the end of the file have refcounts",
    note="consistent with a file that was cut off or was larger before; QEMU's check does not look there",
    when="the refcount of a cluster that begins at or after the end of the file is not 0",
    explained_by=(*_CUT, *_LOST),
)
def refcount_past_end(facts: Facts) -> Iterator[OneFinding]:
    issue = facts.census.issues["refcount-past-end"]
    if issue.count:
        last = max((item.host or 0 for item in issue.items), default=0) + facts.cluster_size
        words = "implied file size" if len(issue.items) == issue.count else "implied file size, at least"
        found = [Evidence(words, last)]
        found += [entry_evidence(facts, item) for item in issue.items]
        yield OneFinding(found, count=issue.count)


@rule(
    "QCOW2-REFCOUNT-OVERFLOW",
    Severity.MEDIUM,
    "clusters have more references than a refcount can hold",
    note="the counter is at its maximum and cannot count all references",
    when="a cluster has more references than the width of its refcount allows",
)
def refcount_overflow(facts: Facts) -> Iterator[Evidence]:
    for item in facts.census.issues["refcount-overflow"].items:
        words = f"references to host cluster {item.host or 0:#x}, counted in {facts.header.refcount_bits} bits"
        yield Evidence(words, item.value, item.host, facts.cluster_size, "host cluster")


rule(
    "QCOW2-COPIED-FLAG",
    Severity.MEDIUM,
    "copied flags disagree with refcounts",
    note="consistent with a writer other than QEMU or an interrupted snapshot operation",
    when="the copied flag of an entry of the active state does not match its cluster's refcount",
    explained_by=_DIRTY,
)(of_issues("copied-flag"))


rule(
    "QCOW2-RESERVED-BITS",
    Severity.MEDIUM,
    "reserved bits are set in table entries",
    note="consistent with editing, a foreign writer, or data parsed as metadata",
    when="a reserved bit of an L1, L2, refcount table or bitmap table entry is set; QEMU's check ignores some of them",
    explained_by=_LOST,
)(of_issues("reserved-bits", "extended-bit-0", "compressed-high-bits", "reftable-reserved"))


@rule(
    "QCOW2-UNALIGNED-OFFSET",
    Severity.HIGH,
    "offsets are not aligned to clusters",
    note="what such an offset maps cannot be read; consistent with damage or a crafted image",
    when="an offset of a table or a cluster is not a multiple of the cluster size, in version 1 of 512",
    needs="tables",
    explained_by=_LOST,
)
def unaligned_offset(facts: Facts) -> Iterator[Evidence | OneFinding]:
    aligned = ("l1_table_offset", "refcount_table_offset", "snapshots_offset") if facts.has_census else ()
    for name in aligned:
        if getattr(facts.header, name) % facts.cluster_size:
            yield facts.field(name)
    place = facts.image.crypto_header
    if place and place[0] % facts.cluster_size:
        yield Evidence("LUKS header offset", place[0], structure="header extension")
    yield from one_finding(facts, "unaligned", "reftable-unaligned")


rule(
    "QCOW2-BEYOND-EOF",
    Severity.HIGH,
    "pointers lead past the end of the file",
    note="consistent with a truncated acquisition or a crafted pointer; QEMU silently shows zeros there",
    when="a table, or a cluster that an entry names, begins at or after the end of the file",
    needs="tables",
    explained_by=(*_CUT, *_LOST),
)(of_issues("beyond-eof", "reftable-beyond-eof"))


rule(
    "QCOW2-SUBCLUSTER-INVALID",
    Severity.HIGH,
    "subcluster bitmaps contradict themselves",
    note="the whole cluster is unreadable in QEMU; consistent with damage or editing",
    when="a subcluster is both allocated and zero, or allocated without a cluster, or a compressed entry has a bitmap",
    explained_by=_LOST,
)(of_issues("subcluster"))


@rule(
    "QCOW2-ZERO-FLAG-V2",
    Severity.HIGH,
    "zero flags in a version 2 image",
    note="QEMU cannot read such ranges; consistent with an image that was downgraded or edited",
    when="bit 0 of an L2 entry is set although version 2 does not define it; QEMU's check ignores it",
    explained_by=_LOST,
)
def zero_flag_v2(facts: Facts) -> Iterator[OneFinding]:
    for found in one_finding(facts, "zero-flag-v2"):
        yield replace(found, evidence=(*other_version(facts), *found.evidence))


rule(
    "QCOW2-ALLOC-AT-ZERO",
    Severity.MEDIUM,
    "entries have flags but the host offset 0",
    note="such an entry reads as unallocated; consistent with editing or damage",
    when="an L1 or L2 entry has flags but the offset 0, without a data file; QEMU's check ignores it",
    explained_by=_LOST,
)(of_issues("alloc-at-zero", "l1-at-zero"))


@rule(
    "QCOW2-COMPRESSED-INVALID",
    Severity.HIGH,
    "compressed clusters are invalid",
    note="the cluster is unreadable or ambiguous; consistent with damage, or with an entry edited by hand",
    when="a compressed entry has the copied flag or uses a data file; deep: its stream does not give exactly one cluster, "
    "in version 1 not even one",
    needs="tables",
    explained_by=_LOST,
)
def compressed_invalid(facts: Facts) -> Iterator[OneFinding | Deferred]:
    if not facts.has_census:
        yield from one_finding(facts, "undecodable", show=_undecodable)
        if (stopped := qcow1_claims(facts).stopped) is not None:
            raise stopped
        return
    yield from one_finding(facts, "compressed-copied", "compressed-data-file")
    if facts.depth >= Depth.DEEP:
        yield from undecodable(facts)


def _undecodable(facts: Facts, item: Item) -> Evidence:
    return entry_evidence(facts, item, "entry of a stream that does not decode")


rule(
    "QCOW2-DATAFILE-MISMATCH",
    Severity.HIGH,
    "data file offsets differ from guest offsets",
    note="QEMU cannot read such ranges; consistent with editing",
    when="with an external data file, an entry names another offset than its own guest offset; QEMU's check ignores it",
)(of_issues("datafile-mismatch"))


rule(
    "QCOW2-REFTABLE-INVALID",
    Severity.HIGH,
    "the refcount table is damaged",
    note="the refcounts of this image cannot be trusted",
    when="an entry has reserved bits, is unaligned or outside the file, or its block is used more than once",
)(of_issues("reftable-reserved", "reftable-unaligned", "reftable-beyond-eof", "reftable-shared"))
