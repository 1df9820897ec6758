"""Every byte is accounted for: rows tile each file, and what no state shows and nothing needs is pointed at.

Plants go into images that qemu-img and qemu-io made (:mod:`tests.plants`), and count where QEMU sees no difference.
Crafted places are written by :mod:`tests.image_builder`.
"""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz import corpus

import qcow2_forensics as q
from qcow2_forensics.account import summary
from qcow2_forensics.account.labels import ByteKind as LabelKind
from qcow2_forensics.account.labels import Labels
from qcow2_forensics.account.tiling import Tile
from qcow2_forensics.audit import audit
from qcow2_forensics.findings import Severity
from qcow2_forensics.render import render
from qcow2_forensics.residue import residue
from tests import hostile, plants, qemu
from tests.image_builder import (
    COPIED,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    Builder,
    Poke,
    base_b,
    base_s,
    compressed_entry,
    deflate,
    luks,
)
from tests.test_residue_pieces import _covered
from tests.tiers import quick

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Recipe = Callable[[Path], object]
MARK = b"planted where no state looks" * 2
CLUSTER = 65536
T = Severity

# --- places that are known -----------------------------------------------------------------------


def feature_name(path: Path) -> int:
    base_b(path)
    Poke(path).write(0x90, MARK[:20])
    return 0x90


def nul_in_front_of_the_backing_name(path: Path) -> int:
    base_b(path)
    Poke(path).names(backing=b"\0" + MARK)
    return path.read_bytes().index(MARK)


def backing_format_behind_its_nul(path: Path) -> int:
    base_b(path)
    Poke(path).names([(EXT_BACKING_FORMAT, b"raw\0" + MARK[:9])])
    return path.read_bytes().index(MARK[:9])


def data_file_name_without_the_bit(path: Path) -> int:
    base_b(path)
    Poke(path).names([(EXT_DATA_FILE, MARK)])
    return path.read_bytes().index(MARK)


def extension_twice(path: Path) -> int:
    base_b(path)
    Poke(path).names([(EXT_BACKING_FORMAT, MARK[:12]), (EXT_BACKING_FORMAT, b"raw")])
    return path.read_bytes().index(MARK[:12])


def length_of_no_backing_name(path: Path) -> int:
    base_b(path)
    Poke(path).write(16, MARK[:4])
    return 16


def other_vm_state_size(path: Path) -> int:
    base_s(path)
    Poke(path).write(0xB0000 + 32, MARK[:4])
    return 0xB0000 + 32


def qcow1_mtime(path: Path) -> int:
    Poke(qcow1(path)).write(20, MARK[:4])
    return 20


def l2_entries_past_the_disk_of_a_snapshot(path: Path) -> int:
    base_s(path)
    table = Poke(path).get(Poke(path).get(0xB0000), 8) & ~(1 << 63)
    Poke(path).write(table + 16 * 8, struct.pack(">8Q", *[1] * 8))  # zero flags, which the check does not mind
    return table + 16 * 8 + 7


def _saved_vm_state(path: Path, *marks: int, extended_l2: bool = False) -> int:
    """An image whose snapshot has a VM state of three clusters, as savevm leaves it but for the active entries past the disk."""
    image = Builder(l1_size=2, extended_l2=extended_l2)
    image.data(0, b"\x11" * CLUSTER)
    at = image.l2_entries * CLUSTER
    for number, mark in enumerate(marks):
        image.entry(at + number * CLUSTER, *((0, mark) if extended_l2 else (mark,)))
    l1 = image.put(bytes(16))
    image.snapshot(b"1", b"saved", l1_offset=l1, l1_size=2, vm_size=2 * CLUSTER + 1)
    image.write(path)
    return Poke(path).get(image.l1 + 8) & ~COPIED


def zero_entries_that_savevm_leaves(path: Path) -> int:
    return _saved_vm_state(path, 1, 1, 1)


def zero_subclusters_that_savevm_leaves(path: Path) -> int:
    return _saved_vm_state(path, *[0xFFFFFFFF << 32] * 3, extended_l2=True)


def zero_entries_of_another_vm_state(path: Path) -> int:
    return _saved_vm_state(path, 1, 1)


def an_entry_among_those_that_savevm_leaves(path: Path) -> int:
    return _saved_vm_state(path, 1, 1, 1 << 56)


def l1_entries_past_the_disk_of_a_snapshot(path: Path) -> int:
    base_s(path)
    Poke(path).u32(0xB0008, 9)
    table = Poke(path).get(0xB0000)
    Poke(path).write(table + 8, MARK[:56])
    return table + 8


def behind_vm_state_size(path: Path) -> int:
    qemu.create(path, "1M", cluster_size="64k")
    qemu.io(path, "write -P 1 0 64k", "write -b -P 8 0 128k")
    qemu.snapshot(path, "one")
    return path.read_bytes().index(b"\x08" * CLUSTER)


def _packed(path: Path, stream: bytes, *, compression_type: int = 0, size: int = 1 << 20) -> int:
    Builder(compression_type=compression_type, size=size).packed((size - 1) // CLUSTER * CLUSTER, stream).write(path)
    return path.read_bytes().index(stream)


def behind_a_stream_without_an_end(path: Path) -> int:
    stored = b"\0" + struct.pack("<HH", CLUSTER // 2, CLUSTER // 2 ^ 0xFFFF) + b"\x11" * (CLUSTER // 2)
    stream = stored * 2 + b"\x62"  # a block of fixed codes begins, of which not even one byte is needed
    return _packed(path, stream + MARK) + len(stream) + 4  # the decoder may look a few bits ahead


def behind_a_longer_stream(path: Path) -> int:
    start = _packed(path, deflate(b"\x11" * CLUSTER + MARK, 0))
    return path.read_bytes().index(MARK, start)


def in_a_skippable_frame(path: Path) -> int:
    frame = struct.pack("<II", 0x184D2A5A, len(MARK)) + MARK
    return _packed(path, frame + zstd.compress(b"\x11" * CLUSTER), compression_type=1) + 8


def in_a_skippable_frame_of_a_second_stream_like_the_first(path: Path) -> int:
    stream = struct.pack("<II", 0x184D2A5A, len(MARK)) + MARK + zstd.compress(b"\x11" * CLUSTER)
    builder = Builder(compression_type=1, incompatible=8)
    start = builder.put(stream * 2)
    for number in range(2):
        builder.entry(number * CLUSTER, compressed_entry(start + number * len(stream), len(stream), 16))
    builder.write(path)
    return start + len(stream) + 8


def behind_two_frames(path: Path) -> int:
    half = zstd.compress(b"\x11" * (CLUSTER // 2))
    start = _packed(path, half + half + MARK, compression_type=1)
    return start + 2 * len(half)


def tail_in_a_compressed_cluster(path: Path) -> int:
    size = (1 << 20) + 4096
    return _packed(path, deflate(b"\x11" * 4096 + MARK + bytes(CLUSTER - 4096 - len(MARK))), size=size)


def zeros_in_the_tail_of_a_compressed_cluster(path: Path) -> int:
    return _packed(path, deflate(b"\x11" * 4096 + bytes(CLUSTER - 4096)), size=(1 << 20) + 4096)


def luks_gap(path: Path) -> int:
    luks(path)
    at = path.read_bytes().index(b"LUKS\xba\xbe") + 800
    Poke(path).write(at, MARK)
    return at


def luks_salt(path: Path) -> int:
    luks(path)
    at = path.read_bytes().index(b"LUKS\xba\xbe") + 208 + 3 * 48 + 8
    Poke(path).write(at, MARK[:32])
    return at


def tail_of_a_snapshot(path: Path) -> int:
    qemu.create(path, (1 << 20) + 512, cluster_size="64k")
    qemu.io(path, "write -P 1 1M 512")
    qemu.snapshot(path, "one")
    qemu.io(path, "write -P 2 1M 512")
    table = Poke(path).get(Poke(path).get(64))  # the snapshot's L1 table
    table = Poke(path).get(table) & ~(1 << 63)
    host = Poke(path).get(table + 16 * 8) & ~(1 << 63)
    Poke(path).write(host + 1024, MARK)
    return host + 1024


def padding_of_a_snapshot_entry(path: Path) -> int:
    base_s(path)
    length = 40 + 24 + 1 + 2
    Poke(path).write(0xB0000 + length, MARK[:5])
    return 0xB0000 + length


def qcow1(path: Path) -> Path:
    qemu.create(path, "1M", fmt="qcow")
    qemu.io(path, "write -P 1 0 8k", "write -P 2 64k 4k", fmt="qcow")
    return path


def behind_the_qcow1_header(path: Path) -> int:
    Poke(qcow1(path)).append(bytes(4096))
    start = Poke(path).get(40) + (1 << 20) // 4096 // 512 * 8 + 64
    Poke(path).write(start, MARK)
    return start


def behind_the_last_qcow1_cluster(path: Path) -> int:
    size = qcow1(path).stat().st_size
    Poke(path).append(bytes(1000) + MARK)
    return size + 1000


def bitmap_bits_past_the_disk(path: Path) -> int:
    qemu.create(path, "1M", cluster_size="64k")
    qemu.bitmap(path, "--add", "one", "-g", "512")
    qemu.io(path, "write -P 1 0 64k")
    bits = Poke(path).get(q.open_image(path).bitmaps[0].table_offset)
    Poke(path).write(bits + 256 + 100, MARK)
    return bits + 256 + 100


PLACES: dict[str, tuple[Recipe, str]] = {
    function.__name__: (function, code)
    for function, code in (
        (feature_name, "NAME-SLACK"),
        (nul_in_front_of_the_backing_name, "NAME-SLACK"),
        (backing_format_behind_its_nul, "NAME-SLACK"),
        (padding_of_a_snapshot_entry, "NAME-SLACK"),
        (data_file_name_without_the_bit, "UNREAD-FIELD"),
        (extension_twice, "UNREAD-FIELD"),
        (length_of_no_backing_name, "UNREAD-FIELD"),
        (other_vm_state_size, "UNREAD-FIELD"),
        (qcow1_mtime, "UNREAD-FIELD"),
        (l2_entries_past_the_disk_of_a_snapshot, "ENTRIES-PAST-END"),
        (l1_entries_past_the_disk_of_a_snapshot, "ENTRIES-PAST-END"),
        (bitmap_bits_past_the_disk, "ENTRIES-PAST-END"),
        (behind_vm_state_size, "STATE-TAIL"),
        (tail_of_a_snapshot, "STATE-TAIL"),
        (tail_in_a_compressed_cluster, "STATE-TAIL"),
        (behind_a_stream_without_an_end, "COMPRESSED-SLACK"),
        (behind_a_longer_stream, "COMPRESSED-SLACK"),
        (in_a_skippable_frame, "COMPRESSED-SLACK"),
        (in_a_skippable_frame_of_a_second_stream_like_the_first, "COMPRESSED-SLACK"),
        (behind_two_frames, "COMPRESSED-SLACK"),
        (luks_gap, "LUKS-SLACK"),
        (luks_salt, "LUKS-SLACK"),
        (behind_the_qcow1_header, "UNACCOUNTED"),
        (behind_the_last_qcow1_cluster, "UNACCOUNTED"),
    )
}

CASES: list[tuple[str, Recipe, Severity | None]] = [
    ("NAME-SLACK", feature_name, T.MEDIUM),
    ("NAME-SLACK", base_s, None),
    ("UNREAD-FIELD", data_file_name_without_the_bit, T.LOW),
    ("UNREAD-FIELD", backing_format_behind_its_nul, None),
    ("ENTRIES-PAST-END", l2_entries_past_the_disk_of_a_snapshot, T.LOW),
    ("ENTRIES-PAST-END", base_s, None),
    ("ENTRIES-PAST-END", zero_entries_that_savevm_leaves, None),
    ("ENTRIES-PAST-END", zero_subclusters_that_savevm_leaves, None),
    ("ENTRIES-PAST-END", zero_entries_of_another_vm_state, T.LOW),
    ("ENTRIES-PAST-END", an_entry_among_those_that_savevm_leaves, T.LOW),
    ("LUKS-SLACK", luks_salt, T.LOW),
    ("LUKS-SLACK", luks, None),
    ("STATE-TAIL", behind_vm_state_size, T.LOW),
    ("STATE-TAIL", zeros_in_the_tail_of_a_compressed_cluster, None),
    ("UNACCOUNTED", behind_the_last_qcow1_cluster, T.LOW),
    ("UNACCOUNTED", qcow1, None),
]


@qemu.requires_qemu
@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)])
def test_each_code_fires_where_it_should_and_nowhere_else(number: int, tmp_path: Path) -> None:
    code, make, severity = CASES[number]
    path = tmp_path / "disk.qcow2"
    make(path)
    found = [finding.severity for finding in q.audit(path, "deep") if finding.code == f"QCOW2-{code}"]
    assert found == ([] if severity is None else [severity])


@qemu.requires_qemu
@pytest.mark.parametrize("name", PLACES)
def test_a_known_place_has_a_finding_a_piece_and_a_row(name: str, tmp_path: Path) -> None:
    make, code = PLACES[name]
    path = tmp_path / "disk.qcow2"
    at = make(path)
    assert isinstance(at, int)
    report = q.audit(path, "deep")
    found = [item for finding in report if finding.code == f"QCOW2-{code}" for item in finding.evidence]
    near = [item for item in found if item.offset is not None and item.offset <= at < item.offset + (item.length or 1)]
    assert near, [(item.offset, item.length) for item in found]
    with residue(path) as opened:
        assert _covered(list(opened.pieces()), "", at)
    if code != "STATE-TAIL" or "compressed" not in name:  # what a stream decodes to has no row
        row = next(row for row in plants.rows_of(report) if row["offset"] <= at < row["offset"] + row["length"])
        assert row["remainder"]
        assert row["nonzero"]


# --- rows tile -----------------------------------------------------------------------------------


def assert_tiles(report: q.Report) -> None:
    """Assert that the rows and the totals of each file add up to it, without gaps and without doubles."""
    account: dict[str, Any] = report.details["account"]
    for file in account.get("files", ()):
        at = 0
        for row in file["rows"]:
            assert row["offset"] == at
            assert row["length"] > 0
            at += row["length"]
        assert at == file["size"]
        assert sum(total["bytes"] for total in file["totals"]) == file["size"]
        assert len(file["rows"]) <= 2000


@qemu.requires_qemu
@pytest.mark.parametrize("ident", quick(hostile.IMAGES, hostile.REPRESENTATIVE))
def test_the_account_of_a_hostile_image_tiles_its_file(ident: str, tmp_path: Path) -> None:
    path = hostile.build(ident, tmp_path)
    for depth in ("standard", "deep"):
        report = q.audit(path, depth)
        if "account" in report.details:
            assert "error" not in report.details["account"], report.details["account"]
            assert_tiles(report)
            assert report.details["account"]["files"][0]["size"] == path.stat().st_size


@qemu.requires_qemu
def test_claims_of_two_structures_on_the_same_bytes_are_an_overlap(tmp_path: Path) -> None:
    path = base_b(tmp_path / "disk.qcow2")
    Poke(path).l2(1, 0x30000 | 1 << 63)  # the L1 table as guest data
    report = q.audit(path, "deep")
    assert_tiles(report)
    row = next(row for row in plants.rows_of(report) if row["offset"] == 0x30000)
    assert (row["claims"], report.details["account"]["files"][0]["overlapping_bytes"]) == (2, 8)


@qemu.requires_qemu
def test_a_table_of_too_many_rows_joins_what_is_not_notable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.qcow2"
    at = feature_name(path)
    whole = plants.rows_of(q.audit(path, "deep"))
    monkeypatch.setattr(summary, "ACCOUNT_ROWS", 20)
    report = q.audit(path, "deep")
    assert_tiles(report)
    file = report.details["account"]["files"][0]
    assert len(file["rows"]) <= 20 < len(whole)
    assert file["rows_joined"] >= len(whole) - len(file["rows"])
    assert [row for row in whole if row.get("nonzero")] == [
        row for row in file["rows"] if row.get("nonzero") and "remainder" in row
    ]
    assert file["unaccounted_bytes"] == sum(row.get("nonzero", 0) for row in whole) > 0
    assert any(row["offset"] <= at < row["offset"] + row["length"] for row in file["remainders"])


@pytest.mark.slow
@qemu.requires_qemu
def test_the_accounts_of_the_fuzzing_corpus_tile_their_files(tmp_path: Path) -> None:
    for path in corpus.make(tmp_path / "corpus"):
        assert_tiles(q.audit(path, "deep", passphrase="fuzz", resolver=q.Resolver(folders=[path.parent])))


@qemu.requires_qemu
def test_a_standard_audit_accounts_by_allocation_and_says_so(tmp_path: Path) -> None:
    report = q.audit(base_b(tmp_path / "disk.qcow2"))
    assert_tiles(report)
    file = report.details["account"]["files"][0]
    assert (file["exact"], file["unaccounted_bytes"]) == (False, None)
    assert not any("nonzero" in row for row in file["rows"])
    assert "metadata and allocation, no data was read" in render(report)


@qemu.requires_qemu
def test_a_report_ends_with_how_many_bytes_nothing_accounts_for(tmp_path: Path) -> None:
    path = base_b(tmp_path / "disk.qcow2")
    assert f"0 bytes unaccounted for, of {0x80000:,}" in render(q.audit(path, "deep"))
    feature_name(path)
    shown = render(q.audit(path, "deep"))
    assert "20 bytes unaccounted for" in shown
    assert "20 after the end of a name" in shown
    line = json.loads(render(q.audit(path, "deep"), "jsonl"))
    assert [sorted(file) for file in line["details"]["account"]["files"] if "rows" in file] == []


@qemu.requires_qemu
@pytest.mark.parametrize("make", [feature_name, tail_of_a_snapshot, base_b], ids=lambda make: make.__name__)
def test_the_picture_of_a_deep_audit_has_every_byte(make: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make(path)
    Poke(path).append(b"no whole cluster")
    report = audit(path, "deep", pictures=True)
    picture = report.details["map"]
    assert sum(picture["byte_counts"]) == path.stat().st_size
    assert sum(count for cell in picture["byte_cells"] for _, count in cell) == path.stat().st_size
    named = {key: count for (key, _), count in zip(picture["byte_owners"], picture["byte_counts"], strict=True)}
    assert (named["unaccounted"] > 0) == (make is not base_b)
    assert "Remainders of zeros" in render(report, "html")


# --- plants --------------------------------------------------------------------------------------


@qemu.requires_qemu
@pytest.mark.parametrize("kind", quick(plants.KINDS, ["plain", "compressed"]))
def test_what_no_state_shows_and_nothing_needs_is_pointed_at(kind: str, tmp_path: Path) -> None:
    chance = random.Random(f"{kind}-quick")
    outcome = plants.try_plants(plants.KINDS[kind](chance, tmp_path), chance, 20, 2)
    assert outcome.missed == []
    assert len(outcome.counted) >= 5


def test_totals_of_a_file_of_exbibytes_are_exact() -> None:
    labels = Labels()
    shown = labels.number(LabelKind.DATA)
    size = (1 << 60) + 1
    added = summary.AccountSummary(labels.all, exact=False)
    added.add(Tile(*(np.asarray([value], np.int64) for value in (0, size, shown, 1, -1))))
    assert [length for _, length, _ in added.totals] == [size]


@pytest.mark.parametrize(("vm_state_size", "what"), [(65536, "guest data or VM state"), (0, "guest data")])
def test_data_of_snapshots_with_memory_is_not_called_guest_data_before_it_is_read(
    vm_state_size: int, what: str, tmp_path: Path
) -> None:
    path = base_s(tmp_path / "disk")
    with q.open_image(path) as image:
        at, length = image.snapshots[0].place_of("vm_state_size")
    Poke(path).write(at, vm_state_size.to_bytes(length, "big"))
    (account,) = audit(path).details["account"]["files"]
    of_snapshots = {total["what"] for total in account["totals"] if total["owner"] == "snapshots"}
    assert of_snapshots - {"L2 entries", "L1 entries"} == {what}
