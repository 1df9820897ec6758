"""Nothing that an image holds keeps a finding out of the report: one true thing among 10,000 decoys."""

from __future__ import annotations

import io
import itertools
import json
import re
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from qcow2_forensics.audit import audit, hidden, lost_tables, rules, undecodable_streams, vm_states
from qcow2_forensics.census import take_census
from qcow2_forensics.cli import main
from qcow2_forensics.findings import EVIDENCE_LIMIT, BoundedSample, Evidence, Finding, Report, Severity
from qcow2_forensics.format.image import Image
from qcow2_forensics.recovery import recovered_states
from qcow2_forensics.residue import deleted_snapshots, former_tables, structure_detection
from tests import qemu
from tests.image_builder import B_L1, Builder, Poke, base_b, base_s, compressed_entry
from tests.test_audit_residual import CASES as RESIDUAL_CASES
from tests.tiers import every

pytestmark = qemu.requires_qemu

KEEP = {"pass-discard-snapshot": "off", "discard": "ignore"}
DECOYS = 10_000


def of(report: Report, code: str) -> list[Finding]:
    return [finding for finding in report if finding.code == f"QCOW2-{code}"]


def deleted(path: Path, **options: object) -> Path:
    """An image whose only snapshot was deleted and can be recovered whole."""
    qemu.create(path, "1M", **options)
    qemu.io(path, "write -P 0x11 0 256k")
    qemu.snapshot(path, "alpha")
    qemu.io(path, "write -P 0x22 0 256k")
    qemu.snapshot(path, "alpha", action="-d", opts=KEEP)
    return path


def snapshot_entry(number: int, l1: int, l1_size: int = 1, name: bytes = b"decoy") -> bytes:
    """One entry of a snapshot table as QEMU writes it, 64 bytes long."""
    ident = str(number).encode()
    head = struct.pack(">QIHHIIQII", l1, l1_size, len(ident), len(name), 1_700_000_000, 0, 0, 0, 16)
    entry = head + bytes(8) + (1 << 20).to_bytes(8, "big") + ident + name
    return entry.ljust(-(-len(entry) // 8) * 8, b"\0")


def decoys(path: Path, l1: int) -> None:
    """Append former snapshot entries, whose numbers come before the true one's, that all name one L1 table.

    Each has a name of its own: copies of one entry count once.
    """
    size = path.stat().st_size
    data = b"".join(snapshot_entry(0, l1, 1 + number % 64, b"%05d" % number) for number in range(DECOYS))
    Poke(path).append(bytes(-size % 65536) + data + bytes(-len(data) % 65536))


@pytest.mark.parametrize("place", every(3, ["data", "zeros", "header"]))
def test_bogus_snapshot_entries_do_not_hide_a_deleted_snapshot(tmp_path: Path, place: str) -> None:
    path = deleted(tmp_path / "disk.qcow2")
    (true,) = deleted_snapshots(path)
    assert true.complete
    size = -(-path.stat().st_size // 65536) * 65536
    decoys(
        path,
        {"zeros": size + 65536 * 20, "data": path.read_bytes().index(b"\x22" * 512) & ~0xFFFF, "header": 65536}[place],
    )
    report = audit(path, "deep")
    found = of(report, "RECOVERABLE-SNAPSHOT")
    assert Severity.HIGH in {finding.severity for finding in found}
    assert true.selector in {item.value for finding in found for item in finding.evidence}
    (entries,) = of(report, "RESIDUAL-SNAPSHOT-ENTRY")
    assert true.entry.offset in {item.offset for item in entries.evidence}
    listed = deleted_snapshots(path)
    assert [item for item in listed if item.selector == true.selector and item.complete]


@pytest.mark.parametrize(
    ("module", "limit"), [(former_tables, "FORMER_ENTRIES"), (structure_detection, "FORMER_ENTRY_CANDIDATES")]
)
def test_places_that_are_not_looked_at_for_entries_are_reported(
    module: ModuleType, limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = deleted(tmp_path / "disk.qcow2")
    (true,) = deleted_snapshots(path)
    entry = path.read_bytes()[true.entry.offset :][: true.entry.length]
    Poke(path).write(true.entry.offset, bytes(len(entry)))
    decoy = snapshot_entry(1, 65536).replace(b"1decoy", b"xdecoy")  # sane numbers, and an ID that is none
    size = -(-path.stat().st_size // 65536) * 65536
    Poke(path).append(bytes(size - path.stat().st_size) + (decoy * 6).ljust(65536, b"\0") + decoy + entry)
    assert [item.complete for item in deleted_snapshots(path)] == [True]
    assert of(audit(path, "deep"), "AUDIT-LIMITED") == []
    monkeypatch.setattr(module, limit, 1)
    (limited,) = of(audit(path, "deep"), "AUDIT-LIMITED")
    assert ("former snapshot entries that were found and not looked at", "left out") in {
        (item.field, item.structure) for item in limited.evidence
    }
    assert main(["snapshots", str(path), "--deleted"]) == 0
    assert "former snapshot entries were left out" in capsys.readouterr().err


def test_places_that_recovery_does_not_look_at_are_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = deleted(tmp_path / "disk.qcow2")
    Poke(path).write(0, bytes(65536)).append(snapshot_entry(7, 65536).ljust(65536, b"\0"))
    monkeypatch.setattr(structure_detection, "FORMER_ENTRY_CANDIDATES", 1)
    notes = {note for state in recovered_states(path) for note in state.notes}
    assert [note for note in notes if "like an entry of a snapshot table" in note]


@pytest.mark.slow
def test_entries_that_are_not_followed_are_reported(tmp_path: Path) -> None:
    path = deleted(tmp_path / "disk.qcow2")
    size = -(-path.stat().st_size // 65536) * 65536
    data = b"".join(snapshot_entry(number, 65536 * (2 + number % 8), 1 + number // 8) for number in range(3000))
    Poke(path).append(bytes(size - path.stat().st_size) + data + bytes(-len(data) % 65536))
    (limited,) = of(audit(path, "deep"), "AUDIT-LIMITED")
    assert "not followed" in limited.evidence[0].field
    assert int(str(limited.evidence[0].value)) > 1000
    command = [sys.executable, "-m", "qcow2_forensics", "snapshots", path, "--deleted", "--format", "json"]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert len(json.loads(done.stdout)) == len(deleted_snapshots(path))
    assert "were not followed" in done.stderr


def test_decoy_tables_do_not_lower_a_former_l2_table(tmp_path: Path) -> None:
    path = deleted(tmp_path / "disk.qcow2", cluster_size=512)
    (true,) = of(audit(path, "deep"), "RESIDUAL-L2")
    assert true.severity is Severity.MEDIUM
    real = next(
        item
        for item in true.evidence
        if not str(item.value).endswith("0 of their first targets unused since and not empty")
    )
    with path.open("rb") as file:
        file.seek(real.offset or 0)
        table = file.read(512)
    # The true table goes last; the decoys before it hold zero flags only.
    decoy = struct.pack(">Q", 1) * 64
    size = -(-path.stat().st_size // 512) * 512
    Poke(path).append(bytes(size - path.stat().st_size) + decoy * DECOYS + table)
    Poke(path).write(real.offset or 0, bytes(512))
    (finding,) = of(audit(path, "deep"), "RESIDUAL-L2")
    assert finding.severity is Severity.MEDIUM
    assert size + 512 * DECOYS in {item.offset for item in finding.evidence}
    assert finding.count >= DECOYS


def test_decoy_data_does_not_hide_a_file_in_free_space(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, "1M", cluster_size=512)
    size = -(-path.stat().st_size // 512) * 512
    picture = b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(range(256)) * 16
    one = b"\1" + bytes(1023)  # a cluster that is not zeros, and one that is: each decoy is a piece of its own
    data = one * (DECOYS // 2) + picture.ljust(8192, b"\0") + one * (DECOYS // 2)
    Poke(path).append(bytes(size - path.stat().st_size) + data)
    findings = of(audit(path, "deep"), "TRAILING-DATA")
    place = size + 1024 * (DECOYS // 2)
    assert place in {item.offset for finding in findings for item in finding.evidence}


def test_evidence_is_spread_over_the_tables_that_are_hit(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, "4G")
    qemu.io(path, *(f"write {place}M 64k" for place in (0, 512, 1024, 1536)))
    tables = [Poke(path).get(B_L1 + 8 * index) & ~(1 << 63) for index in range(4)]
    for table in tables[1:]:
        Poke(path).write(table, bytes(range(1, 256)) * 256)
    report = audit(path)
    for code in ("RESERVED-BITS", "UNALIGNED-OFFSET"):
        (finding,) = of(report, code)
        hit = {(item.offset or 0) & ~0xFFFF for item in finding.evidence if item.structure == "L2"}
        assert hit == set(tables[1:]), code


@pytest.mark.slow
def test_findings_above_the_limit_per_code_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = base_b(tmp_path / "disk.qcow2")
    size = -(-path.stat().st_size // 65536) * 65536
    data = b"".join(snapshot_entry(number + 1, B_L1) for number in range(1500))
    Poke(path).append(bytes(size - path.stat().st_size) + data + bytes(-len(data) % 65536))
    Poke(path).u32(60, 1500).u64(64, size)
    (limited,) = of(audit(path, "triage"), "AUDIT-LIMITED")
    assert Evidence("snapshots that are not described", 500, structure="left out") in limited.evidence
    assert main(["audit", str(path), "--depth", "triage"]) == 0
    assert "qcow2-forensics: snapshots that are not described: 500\n" in capsys.readouterr().err


def test_a_count_above_the_evidence_that_is_listed_is_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "64M")
    qemu.io(path, "write 0 64M")
    table = Poke(path).get(B_L1) & ~(1 << 63)
    Poke(path).write(table, bytes(range(1, 256)) * 32)
    assert main(["audit", str(path)]) == 0
    assert re.search(r"not all evidence is listed: .*QCOW2-RESERVED-BITS 100 of \d{3}", capsys.readouterr().err)


def test_findings_that_one_rule_has_too_many_of_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = base_s(tmp_path / "disk.qcow2")
    code = Counter(finding.code for finding in audit(path)).most_common(1)[0]
    assert code[1] > 1
    monkeypatch.setattr(rules, "FINDINGS_PER_RULE", 1)
    report = audit(path)
    (limited,) = of(report, "AUDIT-LIMITED")
    assert (f"findings {code[0]}, above", code[1] - 1) in {
        (item.field.rpartition(" ")[0], item.value) for item in limited.evidence
    }


def _three_vm_states(path: Path) -> None:
    builder = Builder(cluster_bits=16, size=1 << 20)
    for ident in (b"1", b"2", b"3"):
        builder.snapshot(ident, b"s", l1_offset=B_L1, l1_size=1, vm_size=4096)
    builder.write(path)


def _clusters_behind_the_disk(path: Path) -> None:
    qemu.create(path, "1M", cluster_size=512)
    qemu.io(path, "write 32k 32k")
    Poke(path).u64(24, 0x8000)  # the disk ends with its first L2 table now


def _l1_table_of_zeros(path: Path) -> None:
    qemu.create(path, "1M")
    qemu.io(path, "write 0 1M")
    Poke(path).u64(B_L1, 0)


# What is made, and how many of it a cap of one leaves out.
CAPS: list[tuple[ModuleType, str, Callable[[Path], None], str, int]] = [
    (vm_states, "FINDINGS_PER_RULE", _three_vm_states, "VM states that were not looked at", 2),
    (hidden, "VM_STATE_CLUSTERS", _clusters_behind_the_disk, "not looked at for a VM state", 63),
    (
        lost_tables,
        "LEAKED_TABLES_SEARCHED",
        _l1_table_of_zeros,
        "not looked at for L2 tables",
        16,
    ),  # 17 with the L2 table
]


@pytest.mark.parametrize(("module", "limit", "make", "words", "left_out"), CAPS, ids=[cap[1] for cap in CAPS])
def test_how_much_a_cap_leaves_out_is_in_the_report(
    module: ModuleType,
    limit: str,
    make: Callable[[Path], None],
    words: str,
    left_out: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tmp_path / "disk.qcow2")
    assert of(audit(tmp_path / "disk.qcow2", "deep"), "AUDIT-LIMITED") == []
    monkeypatch.setattr(module, limit, 1)
    (limited,) = of(audit(tmp_path / "disk.qcow2", "deep"), "AUDIT-LIMITED")
    (item,) = (item for item in limited.evidence if words in item.field)
    assert item.value == left_out


@pytest.mark.parametrize("sound", [False, True])
def test_a_magic_does_not_make_a_vm_state_of_what_lies_past_the_end(tmp_path: Path, sound: bool) -> None:
    path = base_b(tmp_path / "disk.qcow2")
    qemu.io(path, "write -P 0x41 512k 192k")
    Poke(path).u64(24, 0x80000)  # the disk ends at 512 KiB now
    place = path.read_bytes().index(b"A" * 65536) & ~0xFFFF
    Poke(path).write(place, b"QEVM\0\0\0\3" + (b"\7\0\0\0\4none" if sound else b""))
    (finding,) = of(audit(path), "DATA-BEYOND-END")
    assert finding.severity is Severity.MEDIUM


# --- polyglots -----------------------------------------------------------------------------------


def archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as writer:
        writer.writestr("evil.txt", "evil")
    return out.getvalue()


def vhd_footer(size: int) -> bytes:
    """The footer of a fixed VHD disk of ``size`` bytes."""
    fields = struct.pack(
        ">8sIIQI4sI4sQQHBBI", b"conectix", 2, 0x10000, 2**64 - 1, 0, b"test", 0, b"Wi2k", size, size, 1, 4, 17, 2
    )
    footer = fields + bytes(4) + bytes(16)
    footer = footer.ljust(512, b"\0")
    total = ~sum(footer) & 0xFFFF_FFFF
    return footer[:64] + total.to_bytes(4, "big") + footer[68:]


@pytest.mark.parametrize("slack", [b"", b"\n", bytes(512), b"# the end" * 100])
def test_an_archive_behind_the_image_is_found_where_a_reader_opens_it(tmp_path: Path, slack: bytes) -> None:
    path = base_b(tmp_path / "disk.qcow2")
    Poke(path).append(archive() + slack)
    with zipfile.ZipFile(path) as reader:
        assert reader.read("evil.txt") == b"evil"
    (finding,) = of(audit(path), "POLYGLOT")
    assert finding.severity is Severity.HIGH
    assert finding.evidence[0].value == "ZIP end record"


@pytest.mark.parametrize("cut", [0, 1])
def test_a_vhd_footer_is_found_where_qemu_opens_it(tmp_path: Path, cut: int) -> None:
    path = base_b(tmp_path / "disk.qcow2")
    Poke(path).append(vhd_footer(path.stat().st_size)[: 512 - cut])
    assert json.loads(qemu.img("info", "-f", "vpc", "--output=json", path).stdout)["format"] == "vpc"
    (finding,) = of(audit(path), "POLYGLOT")
    assert (finding.severity, finding.evidence[0].value) == (Severity.HIGH, "VHD footer")


@pytest.mark.parametrize("slack", [b"", b"\n"])
def test_a_dmg_trailer_is_found(tmp_path: Path, slack: bytes) -> None:
    path = base_b(tmp_path / "disk.qcow2")
    Poke(path).append(b"koly" + struct.pack(">II", 4, 512) + bytes(500) + slack)
    (finding,) = of(audit(path), "POLYGLOT")
    assert (finding.severity, finding.evidence[0].value) == (Severity.HIGH, "DMG trailer")


def test_an_archive_of_the_guest_that_is_stored_last_is_low(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M")
    source = tmp_path / "archive"
    source.write_bytes(archive().ljust(4096, b"\0"))
    qemu.io(path, f"write -s {source} 0 4k")
    assert [finding.severity for finding in of(audit(path), "POLYGLOT")] == [Severity.LOW]


@pytest.mark.parametrize("tail", [b"PK\5\6" + bytes(40), b"conectix" + bytes(504), b"koly" + bytes(508)])
def test_a_magic_alone_is_no_polyglot(tmp_path: Path, tail: bytes) -> None:
    path = base_b(tmp_path / "disk.qcow2")
    Poke(path).append(tail)
    assert of(audit(path), "POLYGLOT") == []


# --- the selection -------------------------------------------------------------------------------


def test_a_selection_keeps_every_place_while_there_is_room() -> None:
    chosen: BoundedSample[tuple[int, int]] = BoundedSample(10)
    for place in range(5):
        for number in range(1000):
            chosen.add((place, number), place)
    assert chosen.count == 5000
    assert [item for item in chosen.items if item[1] == 0] == [(place, 0) for place in range(5)]
    assert len(chosen.items) == 10


def test_a_selection_of_too_many_places_is_spread_over_all_of_them() -> None:
    chosen: BoundedSample[int] = BoundedSample(100)
    for place in range(100_000):
        chosen.add(place, place)
    kept = chosen.items
    assert 50 <= len(kept) <= 100
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 100_000 // 50 + 1
    assert kept[-1] > 95_000


def test_items_without_a_place_stay_while_there_is_room() -> None:
    chosen: BoundedSample[str] = BoundedSample(4)
    chosen.add("total")
    for number in range(100):
        chosen.add(f"item {number}", number)
    assert chosen.items[0] == "total"
    assert len(chosen.items) <= 4
    for number in range(100):
        chosen.add(f"more {number}")
    assert len(chosen.items) <= 4


def test_entries_that_name_one_cluster_leave_room_for_those_that_name_another(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=16, size=4096 << 16)
    first, last = builder.put(b"\x11" * 65536), builder.put(b"\x22" * 65536)
    builder.entry(0, first | (1 << 63)).entry(4000 << 16, last | (1 << 63))
    for number in range(1, 4000):
        builder.entry(number << 16, first | (1 << 63))
    with Image(builder.write(tmp_path / "disk.qcow2")) as image:
        found = take_census(image).referrers({first >> 16, last >> 16})
    assert [item.guest for item in found[last >> 16]] == [4000 << 16]
    assert len(found[first >> 16]) == 500


def test_many_entries_of_one_bad_stream_are_counted_and_not_made_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = Builder(cluster_bits=16, size=3 * 8192 << 16)
    bad = compressed_entry(builder.put(b"\xff" * 512), 512, 16)
    for number in range(3 * 8192):
        builder.entry(number << 16, bad)
    made = []
    real = undecodable_streams.Deferred
    monkeypatch.setattr(undecodable_streams, "Deferred", lambda *args: made.append(1) or real(*args))
    (finding,) = of(audit(builder.write(tmp_path / "disk.qcow2"), depth="deep"), "COMPRESSED-INVALID")
    assert finding.count == 3 * 8192
    assert len(made) <= 3 * EVIDENCE_LIMIT
    assert len({item.offset // 65536 for item in finding.evidence}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(RESIDUAL_CASES)))
def test_former_tables_beside_it_lower_no_severity(number: int, tmp_path: Path) -> None:
    _, make, severity = RESIDUAL_CASES[number]
    if severity is None or severity < Severity.MEDIUM:
        pytest.skip("nothing above Low is expected")
    path = tmp_path / "disk.qcow2"
    make(path)
    before = audit(path, "deep").at_least(Severity.MEDIUM)
    with Image(path) as image:
        size = image.cluster_size
    end = -(-path.stat().st_size // size) * size
    tables = [struct.pack(">2Q", 1, 1), b"\0\1" * (size // 2), struct.pack(">2Q", 1 << 63 | end, 1)]
    Poke(path).append(bytes(end - path.stat().st_size) + b"".join(one.ljust(size, b"\0") for one in tables * 50))
    after = {finding.code: finding.severity for finding in audit(path, "deep").at_least(Severity.MEDIUM)}
    assert [finding.code for finding in before if after.get(finding.code, Severity.INFO) < finding.severity] == []
