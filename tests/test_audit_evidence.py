"""What evidence says stands in the file stands there, and what it says of an entry is true of it.

Images are made by QEMU and edited byte by byte, or built; see :mod:`tests.image_builder`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qcow2_forensics.audit import audit
from qcow2_forensics.findings import Evidence, Finding
from tests import qemu
from tests.image_builder import (
    B_END,
    B_REFTABLE,
    COPIED,
    S_SNAPSHOT_STEP,
    S_SNAPSHOTS,
    Builder,
    Poke,
    base_b,
    base_s,
    compressed_entry,
    deflate,
    empty,
)

pytestmark = qemu.requires_qemu
MiB = 1 << 20


def reported(path: Path, code: str) -> Finding:
    """Return the one finding of a code."""
    (found,) = (finding for finding in audit(path, "deep") if finding.code == code)
    return found


def bytes_of(path: Path, item: Evidence) -> bytes:
    """Return what stands where an item of evidence says it does."""
    assert item.offset is not None
    assert item.length is not None
    return path.read_bytes()[item.offset : item.offset + item.length]


def test_names_in_header_extensions_are_reported_with_their_own_place(tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "base.qcow2", "1M")
    overlay = qemu.create(tmp_path / "overlay.qcow2", "1M", backing=base, backing_format="qcow2")
    (item,) = (item for item in reported(overlay, "QCOW2-BACKING-FILE").evidence if item.field == "backing format")
    assert (item.value, bytes_of(overlay, item)) == ("qcow2", b"qcow2")
    image = qemu.create(tmp_path / "x.qcow2", "1M", data_file=tmp_path / "x.raw")
    (item,) = (item for item in reported(image, "QCOW2-EXTERNAL-DATA").evidence if item.field == "data file name")
    assert (item.value, bytes_of(image, item).decode()) == (str(tmp_path / "x.raw"),) * 2


def test_a_compressed_entry_past_the_end_of_the_disk_is_found_at_any_host_offset_and_reported_with_its_stream(
    tmp_path: Path,
) -> None:
    image = Builder(size=MiB, l1_size=1)
    streams = [deflate(bytes([number]) * 65536) for number in (1, 2)]
    host = image.put(b"".join(streams))  # the second begins at an odd offset, where a plain entry has its zero flag
    places = [host, host + len(streams[0])]
    assert places[1] % 2
    for number, (place, stream) in enumerate(zip(places, streams, strict=True)):
        image.entry(MiB + number * 65536, compressed_entry(place, len(stream), 16))
    image.references[host >> 16] = 2
    path = image.write(tmp_path / "x.qcow2")
    finding = reported(path, "QCOW2-DATA-BEYOND-END")
    assert finding.count == 2
    assert [item.field for item in finding.evidence[::2]] == [f"entry, mapping host offset {at:#x}" for at in places]
    for item, place, stream in zip(finding.evidence[1::2], places, streams, strict=True):
        assert (item.field, item.offset) == ("non-zero bytes in the compressed stream", place)
        data = bytes_of(path, item)
        assert data.startswith(stream)
        assert item.value == len(data) - data.count(0)


def test_a_compressed_entry_that_leads_past_the_end_of_the_file_is_reported_with_the_offset_it_names(
    tmp_path: Path,
) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).l2(0, compressed_entry(0x1000123, 700, 16))
    assert [item.field for item in reported(path, "QCOW2-BEYOND-EOF").evidence] == ["entry, pointing at 0x1000123"]


def test_corruptions_of_refcounts_name_the_host_cluster(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).u64(B_REFTABLE, 0)  # no refcount stands anywhere: only the clusters tell the items apart
    items = reported(path, "QCOW2-CHECK-CORRUPTIONS").evidence
    assert len(items) == len(set(items))
    assert "mapped cluster has the refcount 0: refcount of host cluster 0x50000" in [item.field for item in items]


def test_corruptions_list_how_often_an_overflowing_cluster_is_referenced(tmp_path: Path) -> None:
    image = Builder(refcount_order=0)
    host = image.put(b"x" * 65536)
    for number in range(3):
        image.entry(number << 16, host | COPIED)
    items = reported(image.write(tmp_path / "x.qcow2"), "QCOW2-CHECK-CORRUPTIONS").evidence
    (item,) = (item for item in items if "can hold: " in item.field)
    assert (item.field.partition(": ")[2], item.value) == (f"references to host cluster {host:#x}", 3)


def test_an_l2_table_at_another_slot_of_a_snapshot_is_reported_with_its_own_states_guest_offset(
    tmp_path: Path,
) -> None:
    image = Builder(size=64 * MiB, cluster_bits=12)
    image.entry(8 * MiB, image.put(b"x" * 4096) | COPIED | 2)  # slot 4 of the active state, with a reserved bit
    entry = image._chunks[image.l1 + 8 * 4]
    table = image.put(bytes(entry))  # slot 0 of the snapshot
    path = image.snapshot(b"1", b"s", l1_offset=table, l1_size=1).write(tmp_path / "x.qcow2")
    (item,) = reported(path, "QCOW2-RESERVED-BITS").evidence
    assert (item.snapshot, item.guest_offset) == ("", 8 * MiB)


def test_a_cluster_just_past_the_end_of_the_file_is_reported_with_what_refers_to_it(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).l2(2, (B_END - 0x8000) | COPIED)  # unaligned: its second half is in the next cluster
    found = [item.field for item in reported(path, "QCOW2-ORPHAN-CLUSTERS").evidence]
    assert f"refcount of host cluster {B_END:#x} (1 reference: data)" in found


def test_tables_whose_refcounts_cannot_be_read_lie_before_the_end_of_the_image(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).set_bits(B_REFTABLE, 1 << 63)
    assert "QCOW2-TRAILING-DATA" not in [finding.code for finding in audit(path, "deep")]


def test_refcounts_the_header_rules_out_contradict_no_copied_flag(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).u32(56, 0xFFFFFFFF)
    assert "QCOW2-COPIED-FLAG" not in [finding.code for finding in audit(path, "deep")]


@pytest.mark.parametrize(
    ("at", "length", "value"),
    [(S_SNAPSHOTS, 8, 0x1234), (S_SNAPSHOTS + 8, 4, 0x10000000), (S_SNAPSHOTS + 36, 4, 65536), (64, 8, 0)],
)
def test_a_snapshot_table_fault_is_reported_where_the_field_is(
    at: int, length: int, value: int, tmp_path: Path
) -> None:
    path = base_s(tmp_path / "s.qcow2")
    Poke(path).write(at, value.to_bytes(length, "big"))
    (item,) = reported(path, "QCOW2-SNAPSHOT-TABLE-INVALID").evidence
    assert (item.offset, item.value) == (at, value)


@pytest.mark.parametrize("data", [b"", b"abc", bytes(range(1, 100))])
def test_the_start_of_an_unknown_extension_is_reported_as_long_as_it_is(data: bytes, tmp_path: Path) -> None:
    path = empty(tmp_path / "x.qcow2")
    Poke(path).names([(0x12345678, data)])
    found = [item for item in reported(path, "QCOW2-UNKNOWN-EXTENSION").evidence if item.field == "starts_with"]
    assert [(item.value, bytes_of(path, item)) for item in found] == [(data[:16].hex(" "), data[:16])] * bool(data)


def test_clusters_whose_refcounts_the_header_does_not_lead_to_are_not_called_free(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).u32(56, 0xFFFFFFFF)
    finding = reported(path, "QCOW2-RESIDUAL-CLUSTERS")
    assert finding.evidence[0].offset == B_REFTABLE  # which the header names
    assert finding.title == "clusters nothing refers to hold tables"
    assert "may be free or not" in finding.note


def test_an_extended_entry_with_several_reserved_bits_is_reported_once(tmp_path: Path) -> None:
    image = Builder(extended_l2=True)
    image.entry(0, image.put(b"x" * 65536) | COPIED | 2 | 1, 0xFFFFFFFF)
    finding = reported(image.write(tmp_path / "x.qcow2"), "QCOW2-RESERVED-BITS")
    assert (finding.count, len(finding.evidence)) == (1, 1)


def test_a_snapshot_table_that_cannot_be_read_to_its_end_is_not_given_a_length(tmp_path: Path) -> None:
    path = base_s(tmp_path / "s.qcow2")
    Poke(path).u32(S_SNAPSHOTS + S_SNAPSHOT_STEP + 36, 65536)
    item = reported(path, "QCOW2-INTERNAL-SNAPSHOTS").evidence[-1]
    assert (item.field, item.value) == ("readable part of the snapshot table, bytes", 67)


def test_a_faulty_header_field_is_reported_with_its_length(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).u32(100, 103)
    (item,) = reported(path, "QCOW2-HEADER-INVALID").evidence
    assert (item.value, bytes_of(path, item)) == (103, (103).to_bytes(4, "big"))


def test_a_missing_refcount_block_makes_the_least_size_that_is_expected(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).u64(B_REFTABLE + 8, 0x100000)
    assert _least(path) == 0x100001


def test_a_stray_pointer_makes_no_size_that_is_expected_of_a_cut_file(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).cut(B_END - 0x10000).l2(3, 0x1000000)
    assert _least(path) == B_END - 0x10000 + 1


def _least(path: Path) -> object:
    (item,) = (item for item in reported(path, "QCOW2-TRUNCATED").evidence if item.field == "least expected size")
    return item.value


def test_plain_content_of_a_snapshot_is_reported_as_its_own_and_once(tmp_path: Path) -> None:
    path = base_s(tmp_path / "s.qcow2")
    Poke(path).u32(32, 1)  # an encryption method: nothing of the image is encrypted
    items = reported(path, "QCOW2-PLAINTEXT-CONTENT").evidence
    assert sorted((item.snapshot, item.guest_offset) for item in items) == [("", 0), ("1", 0)]


def test_a_compressed_cluster_of_an_encrypted_snapshot_is_reported_as_its_own(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "x.qcow2", "1M", secret="k", encrypt={"format": "aes"})
    qemu.io(path, "write -c -P 1 0 64k", secret="k")
    qemu.snapshot(path, "s", secret="k")
    qemu.io(path, "write -P 2 0 64k", secret="k")
    (item,) = reported(path, "QCOW2-PLAINTEXT-COMPRESSED").evidence
    assert item.snapshot == "1"


@pytest.mark.parametrize("length", [*range(105, 113), 120, 121])
def test_a_header_of_odd_length_has_its_extensions_where_qemu_reads_them(length: int, tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).u32(100, length)
    opens = qemu.img("info", path, check=False).ok
    codes = [finding.code for finding in audit(path, "deep")]
    assert opens == ("QCOW2-EXTENSION-INVALID" not in codes)
    assert ("QCOW2-HEADER-SLACK" in codes) == (opens and length != 112)
