"""Findings about snapshots and bitmaps: each code fires on its trigger and not on the near miss."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_forensics.audit import audit
from qcow2_forensics.audit.vm_states import machine_type
from qcow2_forensics.findings import Finding, Severity
from qcow2_forensics.format.image import Image
from tests import qemu
from tests.image_builder import S_SNAPSHOT_STEP, S_SNAPSHOTS, Builder, Poke, base_b, base_s

pytestmark = qemu.requires_qemu
Recipe = Callable[[Path], object]


def found(path: Path, code: str, depth: str = "triage") -> list[Finding]:
    report = audit(path, depth)
    assert not [finding for finding in report if finding.code == "QCOW2-AUDIT-INCOMPLETE"], report.to_json()
    return [finding for finding in report if finding.code == f"QCOW2-{code}"]


def severity(path: Path, code: str, depth: str = "triage") -> Severity | None:
    return max((finding.severity for finding in found(path, code, depth)), default=None)


def snapshots(*steps: str, size: str = "1M", **options: object) -> Recipe:
    """Create snapshots by name; ``-name`` deletes one."""

    def make(path: Path) -> None:
        qemu.create(path, size, **options)
        for step in steps:
            qemu.io(path, "write -P 0x11 0 64k")
            qemu.snapshot(path, step.lstrip("-"), action="-d" if step.startswith("-") else "-c")

    return make


def entry(number: int, at: int) -> int:
    return S_SNAPSHOTS + number * S_SNAPSHOT_STEP + at


def edited(edit: Callable[[Poke], object]) -> Recipe:
    def make(path: Path) -> None:
        base_s(path)
        edit(Poke(path))

    return make


def resized(path: Path) -> None:
    snapshots("a")(path)
    qemu.resize(path, "2M")


def bitmap(*commands: str) -> Recipe:
    def make(path: Path) -> None:
        qemu.create(path, "4M")
        qemu.bitmap(path, "--add", "daily", "-g", "64k")
        if commands:
            qemu.io(path, *commands, check=False)

    return make


def stale(path: Path) -> None:
    bitmap()(path)
    Poke(path).u8(95, 0)


def memory(path: Path) -> None:
    if not qemu.system_available():
        pytest.skip("qemu-system-x86_64 is absent")
    qemu.create(path, "1M")
    qemu.monitor(path, "savevm a")


def longer_extra(path: Path) -> None:
    """The only snapshot's entry with eight more bytes of extra data than QEMU writes."""
    snapshots("a")(path)
    with Image(path) as image:
        old = image.snapshots[0]
    poke = Poke(path)
    tail = poke.read(old.offset + 40 + 24, len(old.id_bytes) + len(old.name_bytes))
    poke.u32(old.offset + 36, 32).write(old.offset + 40 + 24, b"whatever" + tail)


T = Severity
CASES: list[tuple[str, Recipe, Severity | None]] = [
    ("SNAPSHOT-VMSTATE", memory, T.MEDIUM),
    ("SNAPSHOT-VMSTATE", base_s, None),
    ("SNAPSHOT-VMSTATE-INVALID", edited(lambda p: p.u64(entry(0, 40), 4096)), T.MEDIUM),
    ("SNAPSHOT-VMSTATE-INVALID", base_s, None),
    ("SNAPSHOT-ID-GAP", snapshots("a", "b", "c", "-b"), T.LOW),
    ("SNAPSHOT-ID-GAP", snapshots("a", "b", "-a"), T.LOW),
    ("SNAPSHOT-ID-GAP", snapshots("a", "b", "-b"), None),
    ("SNAPSHOT-ORDER", edited(lambda p: p.write(entry(1, 64), b"1")), T.LOW),
    ("SNAPSHOT-ORDER", edited(lambda p: p.write(entry(0, 64), b"x")), T.LOW),
    ("SNAPSHOT-ORDER", edited(lambda p: p.write(entry(0, 65), b"\x1b[")), T.LOW),
    ("SNAPSHOT-ORDER", base_s, None),
    ("SNAPSHOT-CLOCK", edited(lambda p: p.u32(entry(1, 16), 1000)), T.LOW),
    ("SNAPSHOT-CLOCK", edited(lambda p: p.u32(entry(0, 16), 0)), T.LOW),
    ("SNAPSHOT-CLOCK", edited(lambda p: p.u32(entry(1, 16), 0xFFFFFFFF)), T.LOW),
    ("SNAPSHOT-CLOCK", edited(lambda p: p.u32(entry(0, 20), 7)), T.LOW),
    ("SNAPSHOT-CLOCK", base_s, None),
    ("SNAPSHOT-SIZE-CHANGED", resized, T.LOW),
    ("SNAPSHOT-SIZE-CHANGED", base_s, None),
    ("SNAPSHOT-UNKNOWN-EXTRA", longer_extra, T.LOW),
    ("SNAPSHOT-UNKNOWN-EXTRA", snapshots("a"), None),
    ("SNAPSHOT-WRITER", base_s, T.INFO),
    ("SNAPSHOT-WRITER", base_b, None),
    ("BITMAPS", bitmap("write 1M 64k"), T.LOW),
    ("BITMAPS", base_b, None),
    ("BITMAP-IN-USE", bitmap("write 1M 64k", "abort"), T.LOW),
    ("BITMAP-IN-USE", bitmap("write 1M 64k"), None),
    ("BITMAP-STALE", stale, T.LOW),
    ("BITMAP-STALE", bitmap(), None),
    ("AUTOCLEAR-ODD", lambda path: Poke(base_b(path)).u64(88, 4), T.LOW),
    ("AUTOCLEAR-ODD", lambda path: Poke(base_b(path)).u64(88, 1), T.LOW),
    ("AUTOCLEAR-ODD", bitmap(), None),
]


@pytest.mark.parametrize(
    ("code", "recipe", "expected"),
    CASES,
    ids=[f"{code}-{wanted.name if wanted else 'absent'}" for code, _, wanted in CASES],
)
def test_code_fires_on_its_trigger_only(tmp_path: Path, code: str, recipe: Recipe, expected: Severity | None) -> None:
    path = tmp_path / "disk.qcow2"
    recipe(path)
    assert severity(path, code, "standard") == expected


def test_missing_ids_are_named(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    snapshots("a", "b", "c", "d", "e", "-b", "-c", "-a")(path)
    (finding,) = found(path, "SNAPSHOT-ID-GAP")
    assert {item.field: item.value for item in finding.evidence} == {"missing_ids": "1 to 3", "present_ids": "4, 5"}


def test_snapshot_newer_than_its_file_is_reported(tmp_path: Path) -> None:
    path = base_s(tmp_path / "disk.qcow2")
    os.utime(path)
    assert severity(path, "SNAPSHOT-CLOCK") is None
    with Image(path) as image:
        newest = image.snapshots[-1].date_sec
    os.utime(path, (newest - 3600,) * 2)
    assert severity(path, "SNAPSHOT-CLOCK") is Severity.LOW


def test_longer_extra_data_is_reported_with_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    longer_extra(path)
    (finding,) = found(path, "SNAPSHOT-UNKNOWN-EXTRA")
    (item,) = finding.evidence
    with Image(path) as image:
        assert (item.offset, item.length) == (image.snapshots[0].offset + 64, 8)
    assert bytes.fromhex(str(item.value)) == b"whatever"


def test_bitmap_lists_the_ranges_qemu_marked(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    bitmap("write 1M 100k", "write 3M 1k")(path)
    (finding,) = found(path, "BITMAPS", "standard")
    ranges = [(item.guest_offset, item.value) for item in finding.evidence if item.guest_offset is not None]
    assert ranges == [(1 << 20, 128 << 10), (3 << 20, 64 << 10)]
    reported = {item.field: item.value for item in finding.evidence if item.guest_offset is None}
    assert (reported["name"], reported["granularity"], reported["dirty_bytes_total"]) == ("daily", 65536, 192 << 10)


@qemu.requires_qemu_system
def test_memory_snapshot_names_its_machine_and_a_changed_one_is_invalid(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M")
    qemu.monitor(path, "savevm a")
    (finding,) = found(path, "SNAPSHOT-VMSTATE")
    reported = {item.field: item for item in finding.evidence}
    assert finding.severity is Severity.MEDIUM
    assert str(reported["machine"].value).startswith("pc-i440fx")
    assert reported["version"].value == 3
    assert severity(path, "SNAPSHOT-VMSTATE-INVALID") is None
    host = reported["version"].offset
    assert host is not None
    Poke(path).write(host, b"XXXX")
    assert severity(path, "SNAPSHOT-VMSTATE-INVALID") is Severity.MEDIUM


def test_a_vm_state_size_without_extra_data_is_the_field_of_32_bits(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    builder = Builder(size=1 << 20, version=2)
    builder.snapshot(b"1", b"a name longer than a size", l1_offset=0x30000, l1_size=1, vm_size=4096, extra=b"")
    builder.write(path)
    (finding,) = found(path, "SNAPSHOT-VMSTATE-INVALID")
    with Image(path) as image:
        at = image.snapshots[0].offset
    (item,) = (item for item in finding.evidence if item.field == "vm_state_size")
    assert (item.value, item.offset, item.length) == (4096, at + 32, 4)


def test_machine_name_with_a_crafted_length_is_not_read() -> None:
    assert machine_type(b"QEVM\0\0\0\3\x07\0\0\0\2pc") == "pc"
    assert machine_type(b"QEVM\0\0\0\3\x07\xff\xff\xff\xffpc") == ""
    assert machine_type(b"QEVM") == ""
