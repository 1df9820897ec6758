"""Findings about residual and hidden data: each code fires on its trigger and not on the near miss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_forensics.audit import audit, figures
from qcow2_forensics.findings import Finding, Severity
from qcow2_forensics.format.image import Image
from tests import qemu
from tests.image_builder import B_END, Poke, base_b, base_s

pytestmark = qemu.requires_qemu

KEEP = {"pass-discard-snapshot": "off", "discard": "ignore"}
Recipe = Callable[[Path], object]


def found(path: Path, code: str, depth: str = "deep") -> list[Finding]:
    report = audit(path, depth)
    assert not [finding for finding in report if finding.code == "QCOW2-AUDIT-INCOMPLETE"], report.to_json()
    return [finding for finding in report if finding.code == f"QCOW2-{code}"]


def severity(path: Path, code: str, depth: str = "deep") -> Severity | None:
    """Return the highest severity of a code in the report, None when it is absent."""
    return max((finding.severity for finding in found(path, code, depth)), default=None)


def create(path: Path, size: str = "1M", **options: object) -> Path:
    return qemu.create(path, size, **options)


# --- recipes -------------------------------------------------------------------------------------


def nothing(path: Path) -> None:
    """Base image B as it is: three clusters of data."""
    base_b(path)


def poked(edit: Callable[[Poke], object]) -> Recipe:
    def make(path: Path) -> None:
        base_b(path)
        edit(Poke(path))

    return make


def deleted(path: Path) -> None:
    create(path)
    qemu.io(path, "write -P 0x11 0 256k")
    qemu.snapshot(path, "alpha")
    qemu.io(path, "write -P 0x22 0 256k")
    qemu.snapshot(path, "alpha", action="-d", opts=KEEP)


def live_snapshots(path: Path) -> None:
    create(path)
    for name in ("a", "b", "c"):
        qemu.io(path, "write -P 0x11 0 256k")
        qemu.snapshot(path, name, opts=KEEP)


def deleted_and_half_reused(path: Path) -> None:
    deleted(path)
    with Image(path) as image:
        active = image.table(image.header.l1_table_offset, 1, "L1")[0] & ~(1 << 63)
        size = image.file_size
    # The deleted snapshot's first data cluster stands right behind its L2 table.
    data = Poke(path).path.read_bytes().index(b"\x11" * 65536) & ~0xFFFF
    assert data < size
    Poke(path).u64(active + 8 * 12, data)


def discarded(path: Path) -> None:
    create(path)
    qemu.io(path, "write -P 0x11 0 128k")
    qemu.io(path, "discard 0 64k", opts={"discard": "unmap", "file.discard": "ignore"})


def discarded_zeros(path: Path) -> None:
    create(path)
    qemu.io(path, "write -P 0 0 64k", "write -P 1 64k 64k")
    qemu.io(path, "discard 0 64k", opts={"discard": "unmap", "file.discard": "ignore"})


def grown(path: Path) -> None:
    create(path, cluster_size=512)
    qemu.io(path, "write 0 64k")
    qemu.resize(path, "64M")


def removed_bitmap(path: Path) -> None:
    create(path)
    qemu.bitmap(path, "--add", "daily")
    qemu.bitmap(path, "--remove", "daily")


def kept_bitmap(path: Path) -> None:
    create(path)
    qemu.bitmap(path, "--add", "daily")


def zeroed(path: Path) -> None:
    create(path)
    qemu.io(path, "write -P 17 0 64k", "write -z 0 32k")


def zeroed_whole(path: Path) -> None:
    create(path)
    qemu.io(path, "write -P 17 0 64k", "write -z 0 64k")


def zeroed_under_snapshot(path: Path) -> None:
    create(path)
    qemu.io(path, "write -P 17 0 64k")
    qemu.snapshot(path, "a")
    qemu.io(path, "write -z 0 64k")


def subclusters(path: Path) -> None:
    create(path, extended_l2="on", cluster_size="64k")
    qemu.io(path, "write -P 7 0 64k", "write -z 8k 4k")


def fresh_subclusters(path: Path) -> None:
    create(path, extended_l2="on", cluster_size="64k")
    qemu.io(path, "write -P 7 0 10k")


def compressed(*commands: str) -> Recipe:
    def make(path: Path) -> None:
        raw = path.with_suffix(".raw")
        raw.write_bytes(b"".join(b"%07d the quick brown fox\n" % number for number in range(20000)))
        qemu.convert(raw, path, fmt="raw", target_format="qcow2", compressed=True)
        if commands:
            qemu.io(path, *commands)

    return make


def scribbled_behind_the_streams(path: Path) -> None:
    """Something that is no stream, in the host cluster of the last compressed one."""
    compressed()(path)
    Poke(path).append(b"\xff" * 32)


def version2(edit: Callable[[Poke], object]) -> Recipe:
    def make(path: Path) -> None:
        create(path, compat="0.10")
        edit(Poke(path).write(96, bytes.fromhex("0000000400000068")))

    return make


def l1_slack(path: Path) -> None:
    base_b(path)
    Poke(path).write(0x30000 + 8, b"behind the table")


def table_slack(path: Path) -> None:
    base_s(path)
    with Image(path) as image:
        last = image.snapshots[-1]
    Poke(path).write(last.offset + last.length + 4, b"old")


def plain_snapshots(path: Path) -> None:
    base_s(path)


def odd_size(mark: bool) -> Recipe:
    def make(path: Path) -> None:
        create(path, "100k")
        qemu.io(path, "write -P 0x11 64k 36k")
        if mark:
            data = path.read_bytes().index(b"\x11" * 36864)
            Poke(path).write(data + 36 * 1024 + 512, b"hidden")

    return make


def shrunk(*, snapshot: bool) -> Recipe:
    def make(path: Path) -> None:
        create(path, "128k")
        qemu.io(path, "write -P 0x11 64k 64k")
        if snapshot:
            qemu.snapshot(path, "larger")
        qemu.resize(path, "100k", shrink=True)

    return make


def data_file(*commands: str, extra: bytes = b"", raw: bool = False) -> Recipe:
    def make(path: Path) -> None:
        target = path.with_suffix(".data")
        options: dict[str, object] = {"data_file": target.name}
        if raw:
            options["data_file_raw"] = "on"
        qemu.create(path, "1M", cwd=path.parent, **options)
        if commands:
            qemu.io(path, *commands, cwd=path.parent)
        if extra:
            with target.open("r+b") as stream:
                stream.seek(512 * 1024)
                stream.write(extra)

    return make


def overlay(size: str) -> Recipe:
    def make(path: Path) -> None:
        create(path.with_name("base.qcow2"))
        create(path, size, backing="base.qcow2", backing_format="qcow2")

    return make


def raw_data_file_without_an_entry(path: Path) -> None:
    data_file("write -P 9 0 64k", raw=True)(path)
    with Image(path) as image:
        l2 = image.table(image.header.l1_table_offset, 1, "L1")[0] & ~(1 << 63)
    Poke(path).u64(l2, 0)


def memory(path: Path) -> None:
    if not qemu.system_available():
        pytest.skip("qemu-system-x86_64 is absent")
    create(path)
    qemu.monitor(path, "savevm a")


def memory_deleted(path: Path) -> None:
    memory(path)
    qemu.monitor(path, "delvm a", drive="if=ide,pass-discard-snapshot=off")


def memory_applied(path: Path) -> None:
    memory(path)
    qemu.img("snapshot", "-a", "a", path)


def memory_applied_and_deleted(path: Path) -> None:
    memory_applied(path)
    qemu.img("snapshot", "-d", "a", path)


T = Severity

CASES: list[tuple[str, Recipe, Severity | None]] = [
    ("VMSTATE-RESIDUE", memory_deleted, T.MEDIUM),
    ("VMSTATE-RESIDUE", memory, None),
    ("VMSTATE-LEFTOVER", memory_applied_and_deleted, T.HIGH),
    ("VMSTATE-LEFTOVER", memory_applied, None),
    ("VMSTATE-TRACE", memory_deleted, T.LOW),
    ("VMSTATE-TRACE", memory, None),
    ("RAW-DATAFILE-DIVERGES", raw_data_file_without_an_entry, T.HIGH),
    ("RESIDUAL-CLUSTERS", discarded, T.MEDIUM),
    ("RESIDUAL-CLUSTERS", discarded_zeros, None),
    ("RESIDUAL-CLUSTERS", grown, T.LOW),
    ("LEAKED-DATA", poked(lambda p: p.l2(2, 0)), T.MEDIUM),
    ("LEAKED-DATA", poked(lambda p: p.l2(2, 0).write(0x70000, bytes(0x10000))), None),
    ("TRAILING-DATA", poked(lambda p: p.append(b"appended")), T.MEDIUM),
    ("TRAILING-DATA", poked(lambda p: p.append(bytes(300_000))), None),
    ("RESIDUAL-L1", deleted, T.MEDIUM),
    ("RESIDUAL-L1", grown, T.LOW),
    ("RESIDUAL-L1", nothing, None),
    ("RESIDUAL-L2", deleted, T.MEDIUM),
    ("RESIDUAL-L2", discarded, None),
    ("RESIDUAL-SNAPSHOT-ENTRY", deleted, T.MEDIUM),
    ("RESIDUAL-SNAPSHOT-ENTRY", live_snapshots, None),
    ("RECOVERABLE-SNAPSHOT", deleted, T.HIGH),
    ("RECOVERABLE-SNAPSHOT", deleted_and_half_reused, T.MEDIUM),
    ("RECOVERABLE-SNAPSHOT", live_snapshots, None),
    ("RESIDUAL-BITMAP-DIR", removed_bitmap, T.LOW),
    ("RESIDUAL-BITMAP-DIR", kept_bitmap, None),
    ("ZERO-ALLOC-DATA", zeroed_whole, T.LOW),
    ("ZERO-ALLOC-DATA", zeroed, None),
    ("ZERO-ALLOC-DATA", zeroed_under_snapshot, None),
    ("SUBCLUSTER-RESIDUE", subclusters, T.LOW),
    ("SUBCLUSTER-RESIDUE", fresh_subclusters, None),
    ("COMPRESSED-SLACK", compressed("write -P 0 64k 64k"), T.MEDIUM),
    ("COMPRESSED-SLACK", scribbled_behind_the_streams, T.LOW),
    ("COMPRESSED-SLACK", compressed(), None),
    ("HEADER-SLACK", poked(lambda p: p.write(0x8000, b"secret")), T.MEDIUM),
    ("HEADER-SLACK", version2(lambda _: None), None),
    ("HEADER-SLACK", version2(lambda p: p.u8(104, 1)), T.MEDIUM),
    ("HEADER-PADDING", poked(lambda p: p.u8(107, 1)), T.LOW),
    ("HEADER-PADDING", poked(lambda p: p.u8(104, 1).u32(100, 104)), T.LOW),
    ("HEADER-PADDING", nothing, None),
    ("L1-SLACK", l1_slack, T.LOW),
    ("L1-SLACK", nothing, None),
    ("TABLE-SLACK", table_slack, T.LOW),
    ("TABLE-SLACK", plain_snapshots, None),
    ("TAIL-BEYOND-DISK", odd_size(True), T.LOW),
    ("TAIL-BEYOND-DISK", odd_size(False), None),
    ("TAIL-BEYOND-DISK", shrunk(snapshot=False), T.LOW),
    ("TAIL-BEYOND-DISK", shrunk(snapshot=True), None),
    ("DATAFILE-RESIDUE", data_file(extra=b"x" * 100), T.MEDIUM),
    ("DATAFILE-RESIDUE", data_file("write -P 9 0 64k", "write -z 0 64k"), T.LOW),
    ("DATAFILE-RESIDUE", data_file("write -P 9 0 64k"), None),
    ("RAW-DATAFILE-DIVERGES", data_file("write -P 9 0 64k", "write -z 0 64k", raw=True), None),
    ("RAW-DATAFILE-DIVERGES", data_file(extra=b"x" * 100), None),
    ("BACKING-HIDDEN-TAIL", overlay("512k"), T.INFO),
    ("BACKING-HIDDEN-TAIL", overlay("1M"), None),
]


@pytest.mark.parametrize(
    ("code", "recipe", "expected"),
    CASES,
    ids=[f"{code}-{wanted.name if wanted else 'absent'}" for code, _, wanted in CASES],
)
def test_code_fires_on_its_trigger_only(tmp_path: Path, code: str, recipe: Recipe, expected: Severity | None) -> None:
    path = tmp_path / "disk.qcow2"
    recipe(path)
    if code == "RESIDUAL-BITMAP-DIR" and expected and b"daily" not in path.read_bytes():
        pytest.skip("this file system punched the bitmap directory")
    assert severity(path, code) == expected


def test_evidence_of_residue_says_where_it_is(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).append(b"PK\x03\x04 an archive")
    (finding,) = found(path, "TRAILING-DATA")
    (item,) = finding.evidence
    assert (item.offset, item.structure) == (B_END, "trailing clusters")
    assert "ZIP" in str(item.value)


def test_residue_is_read_in_deep_audits_only(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    deleted(path)
    for code in ("RESIDUAL-CLUSTERS", "RECOVERABLE-SNAPSHOT", "RESIDUAL-L2"):
        assert severity(path, code, "standard") is None


def test_header_slack_is_a_fact_of_triage(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).write(0x8000, b"secret")
    (finding,) = found(path, "HEADER-SLACK", "triage")
    assert (finding.evidence[0].offset, finding.evidence[0].value) == (0x8000, "secret")


def test_recoverable_snapshot_says_how_to_open_it_and_how_much_is_left(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    deleted(path)
    (finding,) = found(path, "RECOVERABLE-SNAPSHOT")
    reported = {item.field: item.value for item in finding.evidence}
    assert str(reported["open_as"]).startswith("deleted:0x")
    assert reported["readable_fraction"] == 1.0
    assert reported["intact_clusters"] == 4


def test_deleted_memory_snapshot_leaves_its_stream_and_its_trace(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    memory_deleted(path)
    (residue,) = found(path, "VMSTATE-RESIDUE")
    assert {item.field: item.value for item in residue.evidence}["machine"] == "pc-i440fx-7.2"
    (trace,) = found(path, "VMSTATE-TRACE", "standard")
    assert {item.field for item in trace.evidence} == {"l1_slot", "zero_entries", "estimated_vm_state_size"}


def test_pictures_cover_the_file_and_every_state(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    deleted(path)
    qemu.snapshot(path, "beta")
    details = audit(path, "deep", pictures=True).details
    picture = details["map"]
    assert sum(picture["counts"]) == -(-path.stat().st_size // 65536)
    assert sum(count for cell in picture["cells"] for _, count in cell) == sum(picture["counts"])
    named = {key: count for (key, _), count in zip(picture["owners"], picture["counts"], strict=True)}
    assert named["header"] == 1
    assert named["refcounts"] == 2
    assert named["residue"] > 0
    assert named["shared"] == 4
    kinds = [(state["kind"], state.get("name")) for state in details["lineage"]["states"]]
    assert kinds == [("deleted", "alpha"), ("snapshot", "beta"), ("active", "active state")]
    assert set(audit(path, "deep").details) == {"account"}


def test_lineage_counts_the_snapshots_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "disk.qcow2")
    for name in "abc":
        qemu.snapshot(path, name)
    monkeypatch.setattr(figures, "_STATES", 2)
    lineage = audit(path, pictures=True).details["lineage"]
    assert [state["name"] for state in lineage["states"]] == ["b", "c", "active state"]
    assert lineage["left_out"] == 1


def test_lineage_follows_the_clusters_not_the_clock(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.qcow2")
    qemu.io(path, "write -P 1 0 512k")
    qemu.snapshot(path, "a")
    qemu.io(path, "write -P 2 0 256k")
    qemu.snapshot(path, "b")
    qemu.snapshot(path, "a", action="-a")  # back to the first state
    states = audit(path, pictures=True).details["lineage"]["states"]
    assert [(state.get("name"), state["parent"]) for state in states] == [("a", None), ("b", 0), ("active state", 0)]


@pytest.mark.parametrize("offset", [B_END - 12, B_END - 3, B_END + 5])
def test_unaligned_l1_table_at_the_end_of_the_file_is_a_report(tmp_path: Path, offset: int) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).u64(40, offset)
    assert severity(path, "HEADER-INVALID") is Severity.HIGH
