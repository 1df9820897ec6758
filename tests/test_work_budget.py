"""Work over crafted metadata is bounded by the bytes stored, whatever kind of table is shared.

Each image is a small file in which tables of one kind repeat or overlap thousands of times. What a deep audit,
``residue`` and a comparison may cost is counted in reads and in bytes read and decoded, not in seconds. "Refused"
is an allowed answer, and then the audit says so.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.census import IndexMap, Tables, take_census
from qcow2_forensics.errors import LimitExceeded
from qcow2_forensics.format.image import Image
from qcow2_forensics.format.source import FileSource
from qcow2_forensics.limits import Budget, Limits
from qcow2_forensics.reader.disk import Disk
from qcow2_forensics.residue import residue
from tests.image_builder import COPIED, EXT_BITMAPS, EXT_CRYPTO, EXT_DATA_FILE, Builder, Poke, compressed_entry, deflate

MiB = 1 << 20
TIGHT = Limits(work_spare=MiB)  # so that the spare of 64 MiB hides nothing


class Counted:
    """A source that counts its reads and their bytes."""

    def __init__(self, path: Path) -> None:
        self._source = FileSource(path)
        self.size = self._source.size
        self.reads = 0
        self.bytes = 0

    def read(self, offset: int, length: int, /) -> bytes:
        data = self._source.read(offset, length)
        self.reads += 1
        self.bytes += len(data)
        return data


class CountedEntries:
    """A subscriber that counts the L2 entries of the walk."""

    def __init__(self, _image: Image, _clusters: IndexMap) -> None:
        self.entries = 0

    def tables(self, batch: Tables) -> None:
        self.entries += batch.entries.size


# --- images that share -----------------------------------------------------------------------------


def one_l2_table(builder: Builder) -> None:
    """Every slot of the L1 table names one L2 table."""
    table = builder.put(struct.pack(">64Q", *[0x200 | COPIED] * 64)) | COPIED
    builder.raw(builder.l1, table.to_bytes(8, "big") * (builder.l1_size or 0))


def snapshot_l1_tables_at_one_place(builder: Builder) -> None:
    """L1 tables of snapshots that begin at one place, each longer than the one before."""
    base = builder.put(bytes(8 * 4096) + b"behind them")
    for number in range(4000):
        builder.snapshot(b"%d" % (number + 1), b"s", l1_offset=base, l1_size=number + 1)


def snapshot_l1_tables_inside_each_other(builder: Builder) -> None:
    """L1 tables of snapshots that begin a cluster apart and all reach to one end."""
    table = builder.put(struct.pack(">64Q", *[0x200] * 64))
    base = builder.put(table.to_bytes(8, "big") * 64 * 500)
    for number in range(500):
        builder.snapshot(b"%d" % (number + 1), b"s", l1_offset=base + 512 * number, l1_size=64 * (500 - number))


def bitmap_tables_at_one_place(builder: Builder) -> None:
    """Bitmap tables that begin at one place, each longer than the one before."""
    base = builder.put(bytes(8 * 4096) + b"behind them")
    _bitmaps(builder, [(base, number + 1) for number in range(4000)])


def bitmaps_over_the_same_clusters(builder: Builder) -> None:
    """Bitmaps whose tables all name the same few clusters, in which every second bit is set."""
    clusters = [builder.put(b"\x55" * 512) for _ in range(4)]
    tables = [builder.put(struct.pack(">256Q", *clusters * 64)) for _ in range(40)]
    _bitmaps(builder, [(table, 256) for table in tables])


def _bitmaps(builder: Builder, places: list[tuple[int, int]]) -> None:
    builder.autoclear = 1
    rows = [
        struct.pack(">QIIBBHI5s3x", offset, size, 0, 1, 16, 5, 0, b"%05d" % number)
        for number, (offset, size) in enumerate(places)
    ]
    directory = b"".join(rows)
    at = builder.put(directory)
    builder.extensions.append((EXT_BITMAPS, struct.pack(">IIQQ", len(rows), 0, len(directory), at)))


def streams_inside_each_other(builder: Builder) -> None:
    """Compressed clusters whose streams each begin in the one before, and end badly."""
    empty, ending = b"\0\0\0\xff\xff", deflate(bytes(512))[:-3] + b"\xff" * 3
    host = builder.put(empty * 2000 + ending)
    entries = [compressed_entry(host + 5 * number, 400, 9) for number in range(1984)]
    tables = builder.put(struct.pack(">1984Q", *entries))
    builder.raw(builder.l1, struct.pack(">31Q", *range(tables, tables + 31 * 512, 512)))


def former_streams_at_every_byte(builder: Builder) -> None:
    """Between two streams, bytes in which a stream begins at every fifth and none ends well."""
    stream = deflate(b"A" * 512)
    gap = b"\0\0\0\xff\xff" * 60 + deflate(bytes(400))
    hosts = []
    for _ in range(500):
        at = builder.put(stream + gap[: 512 - 2 * len(stream)] + stream)
        hosts += [at, at + 512 - len(stream)]
    entries = [compressed_entry(host, len(stream), 9) for host in hosts][:960]
    tables = builder.put(struct.pack(">960Q", *entries))
    builder.raw(builder.l1, struct.pack(">15Q", *range(tables, tables + 15 * 512, 512)))


def deleted_snapshots_with_one_l1_table(builder: Builder) -> None:
    """Entries of deleted snapshots in free space, all of which name one L1 table of many L2 tables."""
    tables = builder.put(struct.pack(">64Q", *[0] * 63 + [1]) * 512)
    l1 = builder.put(struct.pack(">512Q", *range(tables, tables + 512 * 512, 512)))
    rows = []
    for number in range(200):
        name = b"%05d" % number
        rows.append(
            struct.pack(">QIHHIIQII", l1, 512, 5, 5, 1, 1, 1, 0, 24) + struct.pack(">QQq", 0, 512 * 32768, 0) + name * 2
        )
    builder.put(b"".join(row.ljust(-(-len(row) // 8) * 8, b"\0") for row in rows))


def deleted_snapshots_with_long_l1_tables(builder: Builder) -> None:
    """Entries of deleted snapshots in free space whose L1 tables are most of the file, each a cluster further on."""
    at = builder.put(bytes(512 * 2000))
    rows = []
    for number in range(1500):
        head = struct.pack(">QIHHIIQII", at + 512 * (number % 100), 120_000 - number // 100, 1, 1, 1, 1, 1, 0, 16)
        rows.append((head + struct.pack(">QQ", 0, 1 << 20) + b"7x").ljust(64, b"\0"))
    builder.put(b"".join(rows))


def data_file_entries_in_turn(builder: Builder) -> None:
    """Beside a data file, entries that are data and zeros in turn."""
    builder.incompatible = 4
    builder.extensions.append((EXT_DATA_FILE, b"data.raw"))
    words = [number * 512 | COPIED if number % 2 else 1 for number in range(64 * 1024)]
    tables = builder.put(struct.pack(f">{len(words)}Q", *words))
    builder.raw(builder.l1, struct.pack(">1024Q", *range(tables, tables + 1024 * 512, 512)))


def compressed_entries_in_an_encrypted_image(builder: Builder) -> None:
    """An image marked as encrypted whose every entry is compressed."""
    stream = deflate(b"A" * 512)
    entry = compressed_entry(builder.put(stream), len(stream), 9)
    tables = builder.put(struct.pack(">64Q", *[entry] * 64) * 1024)
    builder.raw(builder.l1, struct.pack(">1024Q", *range(tables, tables + 1024 * 512, 512)))


def former_bitmaps_with_long_tables(builder: Builder) -> None:
    """A thousand entries of removed bitmaps, whose tables of 256 KiB begin a cluster after each other."""
    at = builder.l1 + 4096 * 8
    tables = at + 1000 * 32 // 512 * 512 + 512
    entries = (
        struct.pack(">QIIBBHI5s3x", tables + 512 * index, 32_768, 0, 1, 16, 5, 0, b"%05d" % index)
        for index in range(1000)
    )
    builder.raw(at, b"".join(entries))
    words = range(512, 512 + (32_768 + 64_000) * 512, 512)
    builder.put(struct.pack(f">{len(words)}Q", *words), tables)
    builder.references.clear()  # nothing refers to any of it


SHARING: list[Callable[[Builder], None]] = [
    one_l2_table,
    snapshot_l1_tables_at_one_place,
    snapshot_l1_tables_inside_each_other,
    bitmap_tables_at_one_place,
    bitmaps_over_the_same_clusters,
    streams_inside_each_other,
    former_streams_at_every_byte,
    deleted_snapshots_with_one_l1_table,
    deleted_snapshots_with_long_l1_tables,
    former_bitmaps_with_long_tables,
    data_file_entries_in_turn,
    compressed_entries_in_an_encrypted_image,
]


def _make(kind: Callable[[Builder], None], folder: Path) -> Path:
    builder = Builder(cluster_bits=9, size=4096 * 64 * 512, l1_size=4096)
    kind(builder)
    path = builder.write(folder / "disk.qcow2")
    if kind is compressed_entries_in_an_encrypted_image:
        Poke(path).u32(32, 1)
    if kind is data_file_entries_in_turn:
        with path.with_name("data.raw").open("wb") as file:
            file.truncate(64 * 1024 * 512)
    return path


@pytest.mark.parametrize("kind", SHARING, ids=lambda kind: kind.__name__)
def test_a_deep_audit_reads_a_small_multiple_of_what_is_stored(kind: Callable[[Builder], None], tmp_path: Path) -> None:
    source = Counted(_make(kind, tmp_path))
    report = q.audit(source, depth="deep", limits=TIGHT)
    assert report.to_json()
    assert source.bytes <= 16 * source.size + 8 * MiB
    assert source.reads <= 4 * source.size // 512 + 2000


@pytest.mark.parametrize("kind", SHARING, ids=lambda kind: kind.__name__)
def test_the_walk_sees_no_more_entries_than_are_stored(kind: Callable[[Builder], None], tmp_path: Path) -> None:
    with Image(_make(kind, tmp_path)) as image:
        census = take_census(image, [CountedEntries])
        assert census.seen(CountedEntries).entries * 8 <= image.file_size + 8 * MiB


@pytest.mark.parametrize("kind", SHARING, ids=lambda kind: kind.__name__)
def test_residue_reads_a_small_multiple_of_what_is_stored_or_refuses(
    kind: Callable[[Builder], None], tmp_path: Path
) -> None:
    source = Counted(_make(kind, tmp_path))
    try:
        with residue(source, limits=TIGHT) as found:
            assert sum(1 for _ in found.pieces()) <= source.size // 8
            found.deleted_snapshots()
    except LimitExceeded:
        pass
    assert source.bytes <= 16 * source.size + 8 * MiB


def test_what_the_budget_refuses_is_a_finding(tmp_path: Path) -> None:
    path = _make(snapshot_l1_tables_inside_each_other, tmp_path)
    report = q.audit(path, depth="deep", limits=Limits(work_spare=0, work_repeats=1))
    incomplete = [finding for finding in report if finding.code == "QCOW2-AUDIT-INCOMPLETE"]
    assert any("L1 tables of all states" in str(item.value) for finding in incomplete for item in finding.evidence)


def test_tables_of_removed_bitmaps_that_are_not_followed_are_counted(tmp_path: Path) -> None:
    report = q.audit(_make(former_bitmaps_with_long_tables, tmp_path), depth="deep", limits=TIGHT)
    (limited,) = (finding for finding in report if finding.code == "QCOW2-AUDIT-LIMITED")
    left_out = {item.field: item.value for item in limited.evidence}
    assert 900 < left_out["tables of former bitmaps that were not followed"] < 1000


def test_unaligned_l2_tables_that_are_more_than_the_file_are_left_out_and_reported(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=16, size=1 << 40, l1_size=2048)
    at = builder.put(bytes(0x40000))
    builder.raw(builder.l1, struct.pack(">384Q", *(at + 512 * number for number in range(384))))
    source = Counted(builder.write(tmp_path / "disk.qcow2"))
    with Image(source) as image:
        census = take_census(image, [CountedEntries])
        assert census.check is None
        assert any("unaligned L2 tables" in reason.what for reason in census.reasons)
        assert census.seen(CountedEntries).entries * 8 <= image.file_size
    assert source.bytes <= 4 * source.size + MiB
    assert "QCOW2-CHECK-ABORTED" in {finding.code for finding in q.audit(source)}


def test_unaligned_l2_tables_past_the_end_of_the_disk_are_not_read_one_by_one(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=21, size=1 << 20, l1_size=2048)
    at = builder.put(bytes(0x400000))
    builder.raw(builder.l1 + 8, struct.pack(">2047Q", *(at + 512 * number for number in range(2047))))
    builder.snapshot(b"1", b"memory", l1_offset=builder.put(bytes(8)), l1_size=1, vm_size=1 << 21)
    source = Counted(builder.write(tmp_path / "disk.qcow2"))
    q.audit(source)
    assert source.bytes <= 4 * source.size + MiB


@pytest.mark.parametrize("state", [0x0000DEAD, 0x00AC71F3], ids=["inactive", "active"])
def test_key_slots_that_claim_much_key_material_have_none_of_it_read(state: int, tmp_path: Path) -> None:
    builder = Builder(cluster_bits=16, size=1 << 20, crypt_method=2)
    head = struct.pack(
        ">6sH32s32s32sII20s32sI40s", b"LUKS\xba\xbe", 1, b"aes", b"xts-plain64", b"sha256", 131072, 64, b"", b"", 1, b""
    )
    slots = struct.pack(">II32sII", state, 1, b"", 8, 62 * MiB // 64) * 8
    at = builder.put(head + slots)
    builder.extensions.append((EXT_CRYPTO, struct.pack(">QQ", at, 64 * MiB)))
    path = builder.write(tmp_path / "disk.qcow2")
    with path.open("r+b") as file:
        file.truncate(at + 64 * MiB)  # sparse, and cheap to make
    source = Counted(path)
    report = q.audit(source, depth="triage")
    assert "QCOW2-CRYPTO-HEADER-INVALID" in {finding.code for finding in report}
    assert source.bytes <= MiB


@pytest.mark.parametrize("apart", [0, 512], ids=["one stream", "streams that overlap"])
def test_vm_states_that_share_compressed_bytes_are_decoded_once_and_within_the_budget(
    apart: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = Builder(cluster_bits=16, size=1 << 29, l1_size=2)
    stream = builder.put(bytes([0, 0, 0, 255, 255]) * 40_000)  # empty blocks of deflate: much to read, nothing to give
    for number in range(40):
        table = builder.put(struct.pack(">Q", compressed_entry(stream + apart * number, 65536, 16)))
        l1 = builder.put(struct.pack(">2Q", 0, table | COPIED))
        builder.snapshot(b"%d" % number, b"s", l1_offset=l1, l1_size=2, vm_size=4096)
    path = builder.write(tmp_path / "disk.qcow2")
    decoded: list[int] = []
    read = Disk.read_mapped
    monkeypatch.setattr(Disk, "read_mapped", lambda disk, *at: decoded.append(1) or read(disk, *at))
    report = q.audit(path, depth="triage", limits=TIGHT)
    (finding,) = (item for item in report if item.code == "QCOW2-SNAPSHOT-VMSTATE-INVALID")
    assert len([item for item in finding.evidence if item.field == "error"]) == 40
    assert len(decoded) <= (3 if apart == 0 else 30)
    words = {str(item.value) for item in finding.evidence if "compressed VM states" in str(item.value)}
    assert bool(words) == bool(apart)


def test_a_budget_takes_nothing_of_what_it_refuses() -> None:
    budget = Budget("bytes of tables", 100, Limits(work_repeats=2, work_spare=50))
    budget.spend(200)
    with pytest.raises(LimitExceeded, match="bytes of tables is 251, the limit is 250"):
        budget.spend(51)
    assert (budget.spent, budget.left) == (200, 50)
    budget.spend(50)
