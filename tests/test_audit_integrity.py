"""Each code of header, integrity and overlap fires on its trigger and not on the near miss.

Base images B and S are made by QEMU and edited byte by byte; see :mod:`tests.image_builder`.
"""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_forensics.audit import audit, catalog
from qcow2_forensics.findings import Finding, Report, Severity
from qcow2_forensics.format.codecs import codec_of
from qcow2_forensics.residue import streams
from tests import qemu
from tests.image_builder import (
    B_DATA,
    B_END,
    B_L1,
    B_L2,
    B_REFBLOCK,
    B_REFTABLE,
    COMPRESSED,
    COPIED,
    EXT_BACKING_FORMAT,
    EXT_BITMAPS,
    EXT_FEATURE_NAMES,
    S_SNAPSHOTS,
    Builder,
    Poke,
    base_b,
    base_s,
    compressed_entry,
    deflate,
    empty,
)
from tests.tiers import every

pytestmark = qemu.requires_qemu
Recipe = Callable[[Path], object]
MiB = 1 << 20


def b(*edits: Callable[[Poke], object]) -> Recipe:
    """Base image B with edits."""

    def make(path: Path) -> None:
        poke = Poke(base_b(path))
        for edit in edits:
            edit(poke)

    return make


def s(*edits: Callable[[Poke], object]) -> Recipe:
    """Base image S with edits."""

    def make(path: Path) -> None:
        poke = Poke(base_s(path))
        for edit in edits:
            edit(poke)

    return make


def made(*commands: str, size: str = "1M", **options: object) -> Recipe:
    """An image of QEMU's own."""

    def make(path: Path) -> None:
        qemu.create(path, size, **options)
        if commands:
            qemu.io(path, *commands)

    return make


def _overlay(path: Path) -> None:
    base_b(path.with_name("base.qcow2"))
    qemu.create(path, backing="base.qcow2", backing_format="qcow2")


def _encrypted(path: Path) -> None:
    qemu.create(path, "1M", secret="pw", encrypt={"format": "aes"})


def _data_file(*edits: Callable[[Poke], object]) -> Recipe:
    def make(path: Path) -> None:
        qemu.create(path, "1M", data_file=path.with_suffix(".raw"))
        qemu.io(path, "write -P 0x11 0 128k")
        poke = Poke(path)
        for edit in edits:
            edit(poke)

    return make


def _l2_of(poke: Poke) -> int:
    """The host offset of the first L2 table."""
    return poke.get(poke.get(40)) & 0x00FF_FFFF_FFFF_FE00


def _extended(word: int, bitmap: int) -> Recipe:
    """A small extended image with one more entry."""

    def make(path: Path) -> None:
        builder = Builder(cluster_bits=16, extended_l2=True).data(0, b"\x11" * 65536)
        builder.entry(0x10000, word, bitmap).write(path)

    return make


def _packed(stream: bytes, flags: int = 0) -> Recipe:
    def make(path: Path) -> None:
        builder = Builder(cluster_bits=12)
        host = builder.put(stream.ljust(4096, b"\0"))
        builder.entry(0, compressed_entry(host, len(stream), 12) | flags).write(path)

    return make


def _punched(version: int) -> Callable[..., None]:
    """An image of QEMU's whose L2 (or L1) table reads as zeros since."""

    def make(path: Path, table: str = "l2") -> None:
        qemu.create(path, "4M", compat="0.10" if version == 2 else "1.1")
        qemu.io(path, "write -P 0x11 0 2M")
        poke = Poke(path)
        poke.write(_l2_of(poke) if table == "l2" else poke.get(40), bytes(65536 if table == "l2" else 8))

    return make


def _discarded(path: Path) -> None:
    """Version 2: discarding all that a table maps leaves a table of zeros, and leaks nothing."""
    qemu.create(path, "4M", compat="0.10")
    qemu.io(path, "write -P 0x11 0 2M")
    qemu.io(path, "discard 0 4M", opts={"discard": "unmap"})


def _packed_share(path: Path) -> None:
    """Two different streams in one host cluster, as QEMU packs them."""
    builder = Builder(cluster_bits=12)
    first, second = deflate(b"\x11" * 4096), deflate(b"\x22" * 4096)
    host = builder.put(first + second)
    builder.references[host >> 12] += 1
    builder.entry(0, compressed_entry(host, len(first), 12))
    builder.entry(4096, compressed_entry(host + len(first), len(second), 12)).write(path)


def _packed_alias(path: Path) -> None:
    """One stream under two guest offsets."""
    builder = Builder(cluster_bits=12)
    stream = deflate(b"\x11" * 4096)
    host = builder.put(stream)
    builder.references[host >> 12] += 1
    entry = compressed_entry(host, len(stream), 12)
    builder.entry(0, entry).entry(8192, entry).write(path)


def _refcounts_of_two_bits(writes: int) -> Recipe:
    """A cluster shared ``writes`` times under refcounts of two bits, which hold 3."""

    def make(path: Path) -> None:
        builder = Builder(refcount_order=1)
        host = builder.put(b"\x11" * 65536)
        builder.references[host >> 16] += writes - 1
        for index in range(writes):
            builder.entry(index << 16, host)
        builder.write(path)

    return make


def _bitmap(*edits: Callable[[Poke, int], object]) -> Recipe:
    """An image with a bitmap, its directory entry edited."""

    def make(path: Path) -> None:
        base_b(path)
        qemu.bitmap(path, "--add", "b0", "-g", "65536")
        poke = Poke(path)
        area = poke.read(0, 4096)
        at = area.index(struct.pack(">II", EXT_BITMAPS, 24))
        directory = poke.get(at + 8 + 16)
        for edit in edits:
            edit(poke, directory)

    return make


def _snapshot_and_write(path: Path) -> None:
    """A healthy life: an L2 table and a data cluster shared by two states."""
    base_b(path)
    qemu.snapshot(path, "one")


def _reversed(path: Path) -> None:
    """A fragmented disk: clusters in the order opposite to the guest's."""
    qemu.create(path, "1M")
    qemu.io(path, *(f"write -P {index + 1} {index * 64}k 64k" for index in reversed(range(8))))


def _resized(path: Path) -> None:
    """A disk that once needed a larger L1 table."""
    qemu.create(path, "64M", cluster_size="512")
    qemu.resize(path, "1M", shrink=True)


FEATURES = (EXT_FEATURE_NAMES, b"\0\0dirty bit".ljust(48, b"\0"))


def _of_other_clusters(count: int) -> Recipe:
    """An image with clusters of 4 KiB, ``count`` of them in use, whose header states 8 KiB."""

    def make(path: Path) -> None:
        qemu.create(path, "1M", cluster_size="4k")
        qemu.io(path, f"write -P 0x11 0 {4 * count}k")
        Poke(path).u32(20, 13)

    return make


# code: (trigger, near miss)
CASES: dict[str, tuple[Recipe, Recipe]] = {
    "CORRUPT": (b(lambda p: p.u8(79, 2)), b(lambda p: p.u8(79, 1))),
    "BACKING-FILE": (_overlay, b(lambda p: p.names([], b""))),
    "ENCRYPTED": (_encrypted, b()),
    "EXTERNAL-DATA": (_data_file(), b(lambda p: p.u8(79, 1))),
    "INTERNAL-SNAPSHOTS": (s(), b()),
    "SNAPSHOT": (s(), b(lambda p: p.u32(60, 1))),
    "DIRTY": (b(lambda p: p.u8(79, 1)), b(lambda p: p.u8(79, 2))),
    "GEOMETRY-CONTRADICTED": (_of_other_clusters(16), _of_other_clusters(15)),
    "ORPHAN-CLUSTERS": (b(lambda p: p.refcount(5, 0)), b(lambda p: p.refcount(4, 0))),
    "QCOW1": (made(fmt="qcow"), b(lambda p: p.u32(4, 2))),
    "CHECK-CORRUPTIONS": (b(lambda p: p.clear_bits(B_L2, COPIED)), b(lambda p: p.l2(2, 0))),
    "CHECK-LEAKS": (b(lambda p: p.l2(2, 0)), b(lambda p: p.clear_bits(B_L2, COPIED))),
    "CHECK-ABORTED": (s(lambda p: p.u64(S_SNAPSHOTS, COPIED | 0x30000)), s(lambda p: p.add(S_SNAPSHOTS, 512))),
    "REFCOUNT-LOW": (b(lambda p: p.l2(1, p.get(B_L2))), b(lambda p: p.refcount(5, 0))),
    "REFCOUNT-ZERO-METADATA": (b(lambda p: p.refcount(4, 0)), b(lambda p: p.refcount(5, 0))),
    "REFCOUNT-HIGH": (b(lambda p: p.refcount(5, 2)), b(lambda p: p.l2(2, 0))),
    "REFCOUNT-PAST-END": (b(lambda p: p.refcount(8, 1)), b(lambda p: p.refcount(7, 2))),
    "REFCOUNT-OVERFLOW": (_refcounts_of_two_bits(4), _refcounts_of_two_bits(3)),
    "COPIED-FLAG": (b(lambda p: p.clear_bits(B_L1, COPIED)), _snapshot_and_write),
    "RESERVED-BITS": (b(lambda p: p.set_bits(B_L2, 2)), b(lambda p: p.set_bits(B_L2, 1))),
    "UNALIGNED-OFFSET": (b(lambda p: p.add(B_L2, 512)), b(lambda p: p.add(B_L2, 65536))),
    "BEYOND-EOF": (b(lambda p: p.l2(3, COPIED | B_END)), b(lambda p: p.cut(B_END - 512))),
    "SUBCLUSTER-INVALID": (_extended(0, 1), _extended(0, 1 << 32)),
    "ZERO-FLAG-V2": (b(lambda p: p.u32(4, 2), lambda p: p.set_bits(B_L2, 1)), b(lambda p: p.set_bits(B_L2, 1))),
    "ALLOC-AT-ZERO": (b(lambda p: p.l2(0, COPIED)), b(lambda p: p.l2(0, 1))),
    "COMPRESSED-INVALID": (_packed(deflate(b"\x11" * 4095)), _packed(deflate(b"\x11" * 4096))),
    "DATAFILE-MISMATCH": (_data_file(lambda p: p.u64(_l2_of(p) + 16, COPIED | 0x30000)), _data_file()),
    "SNAPSHOT-WITH-DATAFILE": (s(lambda p: p.u8(79, 4)), _data_file()),
    "REFTABLE-INVALID": (b(lambda p: p.u64(B_REFTABLE + 8, 0x20000)), b(lambda p: p.u64(B_REFTABLE, 0))),
    "HEADER-INVALID": (b(lambda p: p.u32(96, 7)), b(lambda p: p.u32(100, 104))),
    "EXTENSION-INVALID": (
        b(lambda p: p.names([(EXT_BACKING_FORMAT, b"raw"), (EXT_BACKING_FORMAT, b"qcow2")])),
        b(lambda p: p.names([(EXT_BACKING_FORMAT, b"raw"), FEATURES])),
    ),
    "SNAPSHOT-TABLE-INVALID": (s(lambda p: p.u32(S_SNAPSHOTS + 36, 2000)), s(lambda p: p.u32(S_SNAPSHOTS + 16, 0))),
    "BITMAP-INVALID": (_bitmap(lambda p, at: p.u8(at + 16, 2)), _bitmap(lambda p, at: p.u32(at + 12, 1))),
    "DATA-OVER-METADATA": (b(lambda p: p.l2(0, B_L1)), b(lambda p: p.l2(0, B_END - 0x10000))),
    "METADATA-OVERLAP": (b(lambda p: p.l1(0, B_L1)), _snapshot_and_write),
    "SHARED-CLUSTER": (b(lambda p: p.l2(1, p.get(B_L2))), _snapshot_and_write),
    "SHARED-L2": (b(lambda p: p.u32(36, 2), lambda p: p.l1(1, p.get(B_L1))), _snapshot_and_write),
    "SNAPSHOT-L1-ALIAS": (s(lambda p: p.u64(S_SNAPSHOTS, p.get(40))), s()),
    "DATA-BEYOND-END": (b(lambda p: p.u64(24, 0x20000)), b(lambda p: p.u64(24, 0x30000))),
    "REFCOUNTS-ABSENT": (b(lambda p: p.write(B_REFBLOCK, bytes(16))), b(lambda p: p.write(B_REFBLOCK, bytes(14)))),
    "L2-TABLE-LOST": (_punched(2), _discarded),
    "L1-TABLE-LOST": (lambda path: _punched(3)(path, "l1"), empty),
    "TRUNCATED": (b(lambda p: p.cut(B_END - 0x10000)), b(lambda p: p.l2(3, COPIED | 0x1000000))),
    "PARTIAL-LAST-CLUSTER": (empty, b()),
    "L1-OVERSIZED": (_resized, b()),
}


def found(path: Path, code: str) -> list[Finding]:
    report = audit(path, "deep" if code.startswith("COMPRESSED") else "standard")
    assert not [finding for finding in report if finding.code == "QCOW2-AUDIT-INCOMPLETE"], report.to_json()
    return [finding for finding in report if finding.code == f"QCOW2-{code}"]


@pytest.mark.parametrize("code", CASES)
def test_code_is_found_on_its_trigger_with_evidence(code: str, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    CASES[code][0](path)
    findings = found(path, code)
    assert findings
    entry = catalog()[f"QCOW2-{code}"]
    for finding in findings:
        assert finding.severity == entry.severity
        assert finding.evidence
        assert finding.count >= 1
        assert finding.note


@pytest.mark.parametrize("code", CASES)
def test_code_is_not_found_on_the_near_miss(code: str, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    CASES[code][1](path)
    assert not found(path, code)


@pytest.mark.parametrize("which", [0, 1], ids=["damaged", "near miss"])
@pytest.mark.parametrize("code", every(5, [code for code in CASES if code != "GEOMETRY-CONTRADICTED"]))
def test_no_damage_to_one_structure_contradicts_the_geometry(code: str, which: int, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    CASES[code][which](path)
    assert not found(path, "QCOW2-GEOMETRY-CONTRADICTED")


def test_every_rule_of_these_modules_has_a_case() -> None:
    modules = ("contradicted_geometry", "header", "integrity", "lost_tables", "overlap")
    own = {code for code, entry in catalog().items() if entry.section in modules}
    assert own == {f"QCOW2-{code}" for code in CASES}


# The nine of the Rust qcow2-forensic, whose codes and severities users' scripts know.
NINE = {
    "QCOW2-CORRUPT": Severity.HIGH,
    "QCOW2-BACKING-FILE": Severity.MEDIUM,
    "QCOW2-ENCRYPTED": Severity.MEDIUM,
    "QCOW2-EXTERNAL-DATA": Severity.MEDIUM,
    "QCOW2-INTERNAL-SNAPSHOTS": Severity.LOW,
    "QCOW2-SNAPSHOT": Severity.LOW,
    "QCOW2-DIRTY": Severity.LOW,
    "QCOW2-ORPHAN-CLUSTERS": Severity.MEDIUM,
    "QCOW2-QCOW1": Severity.LOW,
}


def test_the_nine_established_findings_keep_code_and_severity() -> None:
    assert {code: catalog()[code].severity for code in NINE} == NINE


# --- evidence ------------------------------------------------------------------------------------


def only(report: Report, code: str) -> Finding:
    (finding,) = [finding for finding in report if finding.code == code]
    return finding


def test_evidence_of_an_orphan_names_guest_host_and_both_entries(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).refcount(6, 0)
    finding = only(audit(path), "QCOW2-ORPHAN-CLUSTERS")
    assert finding.count == 1
    assert {(item.structure, item.offset) for item in finding.evidence} >= {("refcount block", 0x20000 + 12)}
    (entry,) = [item for item in finding.evidence if item.structure == "L2"]
    assert (entry.offset, entry.guest_offset, entry.value) == (B_L2 + 8, 0x10000, COPIED | 0x60000)


def test_evidence_of_data_over_metadata_names_both_structures(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).l2(2, B_REFTABLE)
    finding = only(audit(path), "QCOW2-DATA-OVER-METADATA")
    assert "refcount table" in finding.evidence[0].field
    assert finding.evidence[0].offset == B_REFTABLE
    assert (finding.evidence[1].offset, finding.evidence[1].guest_offset) == (B_L2 + 16, 0x20000)


def test_evidence_in_a_snapshot_names_it(tmp_path: Path) -> None:
    path = base_s(tmp_path / "s.qcow2")
    poke = Poke(path)
    table = poke.get(poke.get(S_SNAPSHOTS)) & 0x00FF_FFFF_FFFF_FE00
    poke.set_bits(table, 4)
    finding = only(audit(path), "QCOW2-RESERVED-BITS")
    assert [(item.offset, item.snapshot) for item in finding.evidence] == [(table, "1")]


def test_a_snapshot_finding_carries_what_the_entry_says(tmp_path: Path) -> None:
    report = audit(base_s(tmp_path / "s.qcow2"), "triage")
    first, second = [finding for finding in report if finding.code == "QCOW2-SNAPSHOT"]
    facts = {item.field: item for item in first.evidence}
    assert (facts["id"].value, facts["name"].value, facts["disk_size"].value) == ("1", "s1", MiB)
    assert facts["l1_table_offset"].offset == S_SNAPSHOTS
    assert {item.snapshot for item in second.evidence} == {"2"}


def test_long_lists_are_capped_and_counted(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "many.qcow2", "4M", cluster_size="4k")
    qemu.io(path, "write -P 1 0 1M")
    poke = Poke(path)
    table = _l2_of(poke)
    for index in range(256):
        poke.set_bits(table + 8 * index, 2)
    finding = only(audit(path), "QCOW2-RESERVED-BITS")
    assert (len(finding.evidence), finding.count) == (100, 256)


def test_findings_that_a_crash_explains_say_so(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "lazy.qcow2", "1M", lazy_refcounts="on")
    qemu.io(path, "write -P 1 0 256k", "abort", check=False)
    report = audit(path)
    for code in ("QCOW2-ORPHAN-CLUSTERS", "QCOW2-CHECK-CORRUPTIONS"):
        assert only(report, code).explained_by == ("QCOW2-DIRTY",)


def test_findings_that_a_truncation_explains_say_so(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).cut(B_DATA)
    report = audit(path)
    for code in ("QCOW2-BEYOND-EOF", "QCOW2-CHECK-CORRUPTIONS", "QCOW2-REFCOUNT-PAST-END"):
        assert "QCOW2-TRUNCATED" in only(report, code).explained_by


@pytest.mark.parametrize("extended", ["off", "on"])
def test_the_end_of_the_file_in_an_encrypted_cluster_is_normal_only_behind_its_data(
    extended: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.qcow2"
    qemu.create(path, "1M", secret="pw", encrypt={"format": "aes"}, extended_l2=extended)
    assert only(audit(path), "QCOW2-PARTIAL-LAST-CLUSTER").severity is Severity.INFO
    qemu.io(path, "write -P 0x11 0 4k", secret="pw")
    size = path.stat().st_size
    assert size % 65536 == (4096 if extended == "on" else 0)  # QEMU writes whole clusters or subclusters
    assert {finding.severity for finding in found(path, "PARTIAL-LAST-CLUSTER")} <= {Severity.INFO}

    Poke(path).cut((size - 1) // 65536 * 65536 + 1536)
    assert qemu.check_json(path, secret="pw").rc == 0
    assert qemu.read(path, 0, 4096, secret="pw") != b"\x11" * 4096
    finding = only(audit(path), "QCOW2-PARTIAL-LAST-CLUSTER")
    assert finding.severity is Severity.HIGH
    assert [item.guest_offset for item in finding.evidence if item.structure == "L2"] == [0]


def test_a_header_longer_than_a_cluster_is_damage_and_no_missing_tail(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).u32(100, 0xFFFFFFFF)
    assert found(path, "HEADER-INVALID")
    assert not found(path, "TRUNCATED")
    Poke(path).cut(104).u32(100, 112)
    (finding,) = found(path, "TRUNCATED")
    reported = {item.field: item.value for item in finding.evidence}
    assert reported["file size"] == 104
    assert reported["header, bytes"] == 112
    assert int(str(reported["least expected size"])) >= 112


def test_reserved_bits_that_qemus_check_passes_over_are_found(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    _extended(1, 0)(path)
    assert found(path, "RESERVED-BITS")
    builder = Builder(cluster_bits=9, size=65536).data(512, b"\x11" * 512)
    builder.entry(0, COMPRESSED | 1 << 58 | builder.put(deflate(bytes(512)))).write(path)
    assert found(path, "RESERVED-BITS")


def test_streams_that_share_a_host_cluster_are_no_alias(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    _packed_share(path)
    assert not found(path, "SHARED-CLUSTER")
    _packed_alias(path)
    assert found(path, "SHARED-CLUSTER")


def test_a_compressed_cluster_with_the_copied_flag_is_invalid_without_decoding(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    _packed(deflate(bytes(4096)), COPIED)(path)
    assert only(audit(path, "standard"), "QCOW2-COMPRESSED-INVALID")


def test_streams_beside_a_data_file_are_invalid_and_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.qcow2"
    _packed(deflate(b"\x11" * 4096))(path)
    Poke(path).u8(79, 4)
    refusing = codec_of(0)._replace(measure=lambda *_: pytest.fail("a stream was decoded"))
    monkeypatch.setattr(streams, "codec_of", lambda _: refusing)
    (finding,) = found(path, "COMPRESSED-INVALID")
    assert finding.count == 1


def test_a_deflate_stream_longer_than_a_cluster_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    _packed(deflate(b"\x11" * 4097))(path)
    (finding,) = found(path, "COMPRESSED-INVALID")
    assert "more than a cluster" in finding.evidence[0].field


def test_a_fragmented_disk_is_healthy(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    _reversed(path)
    assert audit(path, "deep").at_least(Severity.LOW) == ()


def test_header_rules_are_more_severe_where_the_image_does_not_open(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).u64(24, 1000)
    assert only(audit(path, "triage"), "QCOW2-HEADER-INVALID").severity is Severity.MEDIUM
    base_b(path)
    Poke(path).names([], b"")
    assert only(audit(path, "triage"), "QCOW2-HEADER-INVALID").severity is Severity.LOW


def test_an_applied_snapshot_with_vm_state_is_only_low(tmp_path: Path) -> None:
    qemu.need("qemu-system-x86_64")
    path = qemu.create(tmp_path / "vm.qcow2", "8M")
    qemu.monitor(path, "savevm one")
    qemu.snapshot(path, "one", action="-a")
    findings = found(path, "DATA-BEYOND-END")
    assert all(finding.severity <= Severity.LOW for finding in findings)


# --- lost tables ---------------------------------------------------------------------------------

SPAN = 512 * MiB


def four_tables(path: Path, **options: object) -> list[int]:
    """An image of QEMU's with four L2 tables of 16 clusters each; return where the tables are."""
    qemu.create(path, "2G", **options)
    for index in range(4):
        qemu.io(path, f"write -P {index + 1} {index * 512}M 1M")
    poke = Poke(path)
    return [poke.get(poke.get(40) + 8 * index) & 0x00FF_FFFF_FFFF_FE00 for index in range(4)]


CONTENTS = {
    "zeros": (bytes(65536), "holds zeros"),
    "refcounts": (b"\0\1" * 32768, "holds a refcount block"),
    "text": (b"Lorem ipsum dolor sit amet, consectetur.\n" * 1598, "holds text"),
    "random": (random.Random(18).randbytes(65536), "holds other data"),
}


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_three_lost_tables_of_four_are_three_items(tmp_path: Path, what: str, compat: str) -> None:
    path = tmp_path / "image.qcow2"
    tables = four_tables(path, compat=compat)
    data, words = CONTENTS[what]
    for table in tables[1:]:
        Poke(path).write(table, data)
    report = audit(path)
    finding = only(report, "QCOW2-L2-TABLE-LOST")
    assert finding.count == 3
    assert [(item.offset, item.guest_offset) for item in finding.evidence] == [
        (table, index * SPAN) for index, table in enumerate(tables) if index
    ]
    assert all(
        str(item.value).startswith(words) and "16 leaked clusters" in str(item.value) for item in finding.evidence
    )
    assert "QCOW2-L2-TABLE-LOST" in only(report, "QCOW2-CHECK-LEAKS").explained_by


def test_a_hole_of_the_host_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    table = four_tables(path)[2]
    subprocess.run(["fallocate", "-p", "-o", str(table), "-l", "65536", path], check=True)
    finding = only(audit(path), "QCOW2-L2-TABLE-LOST")
    assert "hole" in str(finding.evidence[0].value)


def test_single_wrong_entries_are_no_lost_table(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    table = four_tables(path)[0]
    for index in range(3):
        Poke(path).set_bits(table + 8 * index, 2)
    assert "QCOW2-L2-TABLE-LOST" not in {finding.code for finding in audit(path)}


def test_streams_of_another_compression_type_are_one_finding(tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "image.qcow2"
    raw.write_bytes(b"".join(bytes([index]) * 65000 + bytes(536) for index in range(1, 62)))
    qemu.img("convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", "-f", "raw", raw, path)
    Poke(path).u8(104, 0).u64(72, 0)  # as a rewritten header: compression type 0, no incompatible bit
    findings = [finding for finding in audit(path, "deep") if finding.code == "QCOW2-COMPRESSED-INVALID"]
    (finding,) = findings
    assert "zstd" in finding.title
    assert finding.count == 61


def test_one_finding_accounts_for_all_that_a_writer_without_refcounts_causes(tmp_path: Path) -> None:
    path = base_b(tmp_path / "image.qcow2")
    Poke(path).write(B_REFBLOCK, bytes(16))
    report = audit(path)
    unexplained = [finding.code for finding in report.at_least(Severity.MEDIUM) if not finding.explained_by]
    assert unexplained == ["QCOW2-REFCOUNTS-ABSENT"]
