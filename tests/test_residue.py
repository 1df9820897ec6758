"""Residue: what nothing points at is found where QEMU left it, and deleted snapshots open again.

Residues are made by QEMU alone: discards do not reach the file, so what is freed stays.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import struct
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_forensics import open_disk
from qcow2_forensics.census.arrays import U64
from qcow2_forensics.census.columns import big_endian
from qcow2_forensics.errors import FormatError, LimitExceeded, Qcow2Error, ReadError, SnapshotNotFound
from qcow2_forensics.format.image import Image
from qcow2_forensics.format.source import BytesSource, FileSource
from qcow2_forensics.limits import Limits
from qcow2_forensics.reader.host_holes import host_runs
from qcow2_forensics.recovery import Confidence, confidence_of
from qcow2_forensics.residue import (
    content,
    deleted_snapshots,
    hidden,
    open_deleted,
    residue,
    structure_detection,
)
from qcow2_forensics.residue.model import KINDS
from qcow2_forensics.residue.output import write
from qcow2_forensics.residue.restricted_source import LOST_TABLE, REUSED, GuardedSource, Refusals
from tests import qemu
from tests.image_builder import COMPRESSED, ZERO, Builder, Poke, base_b, base_s, deflate
from tests.tiers import every

KEEP = {"pass-discard-snapshot": "off", "discard": "ignore"}  # what a delete frees keeps its bytes
pytestmark = qemu.requires_qemu

Make = Callable[..., Path]


def deleted_image(tmp_path: Path, name: str = "disk.qcow2", size: str = "4M", **options: object) -> tuple[Path, bytes]:
    """Make an image whose snapshot ``alpha`` was deleted, and return the disk alpha held."""
    path = qemu.create(tmp_path / name, size, **options)
    qemu.io(path, "write -P 0x11 0 1M", "write -P 0x22 2M 64k", "write -P 0x33 3M 100k")
    qemu.snapshot(path, "alpha")
    before = qemu.raw_bytes(path, snapshot="alpha")
    qemu.io(path, "write -P 0x44 0 1M", "write -P 0x55 3M 64k")
    qemu.snapshot(path, "alpha", action="-d", opts=KEEP)
    return path, before


@pytest.mark.parametrize(
    "options",
    every(
        2,
        [
            {},
            {"cluster_size": "2M"},
            {"cluster_size": "4k"},
            {"refcount_bits": "64"},
            {"extended_l2": "on", "cluster_size": "64k"},
            {"compat": "0.10"},
        ],
    ),
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "default",
)
def test_deleted_snapshot_gives_the_bytes_qemu_read_before_it_was_deleted(
    tmp_path: Path, options: dict[str, object]
) -> None:
    path, before = deleted_image(tmp_path, **options)
    found = deleted_snapshots(path)
    assert [(item.entry.id, item.entry.name, item.complete) for item in found] == [("1", "alpha", True)]
    assert found[0].readable == 1.0
    with open_disk(path, snapshot="deleted:1") as disk:
        assert disk.size == len(before)
        assert disk.read(0, disk.size) == before


def test_deleted_snapshot_is_named_by_id_name_or_entry_offset(tmp_path: Path) -> None:
    path, before = deleted_image(tmp_path)
    selector = deleted_snapshots(path)[0].selector
    for wanted in ("deleted:1", "deleted:alpha", selector, selector.upper().replace("DELETED", "deleted")):
        with open_disk(path, snapshot=wanted) as disk:
            assert disk.read(0, 65536) == before[:65536]
    with open_deleted(path, "1") as disk:
        assert disk.read(0, 512) == before[:512]
    with pytest.raises(SnapshotNotFound, match="deleted:0x"):
        open_disk(path, snapshot="deleted:7")


def test_an_entry_behind_the_live_snapshot_table_is_found_wherever_that_ends(tmp_path: Path) -> None:
    """The live entry's name makes the table end between two multiples of eight bytes, as names do."""
    for number, name in enumerate(("a", "abcd", "abcdefgh")):
        path, _ = deleted_image(tmp_path, f"{number}.qcow2")
        (item,) = deleted_snapshots(path)
        former = Poke(path).read(item.entry.offset, item.entry.length)
        qemu.snapshot(path, name)
        with Image(path) as image:
            live = image.snapshots[-1]
        poke = Poke(path)
        if poke.read(item.entry.offset, len(former)) == former:
            poke.write(item.entry.offset, bytes(len(former)))
        place = (live.offset + live.length + 7) // 8 * 8
        poke.write(place, former)
        assert [(item.entry.name, item.entry.offset) for item in deleted_snapshots(path)] == [("alpha", place)], name
        with Image(path) as image:
            assert residue(image).entry_at(place) == deleted_snapshots(path)[0].entry


def test_former_entries_that_cross_from_one_cluster_into_the_next_are_found(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M", cluster_size=512)
    names = [f"a snapshot with a name as long as people give, number {number}" for number in range(20)]
    for name in names:
        qemu.snapshot(path, name)
    with Image(path) as image:
        places = {entry.name: (entry.offset, entry.length) for entry in image.snapshots}
    crossing = [name for name, (offset, length) in places.items() if offset // 512 != (offset + length - 1) // 512]
    assert len(crossing) == 4
    for name in reversed(names):  # each table is written elsewhere, and this one stays
        qemu.snapshot(path, name, action="-d", opts=KEEP)
    found = {item.entry.name: item.entry for item in deleted_snapshots(path)}
    assert set(crossing) <= set(found)
    with Image(path) as image:
        for name in crossing:
            assert residue(image).entry_at(found[name].offset) == found[name]


def test_reused_clusters_of_a_deleted_snapshot_are_refused_and_the_rest_reads(tmp_path: Path) -> None:
    path, before = deleted_image(tmp_path)
    active, former = l2_tables(path)
    for index in (3, 7):
        host = Poke(path).get(former + 8 * index)
        Poke(path).u64(active + 8 * (40 + index), host)  # the active disk uses it, elsewhere
    item = deleted_snapshots(path)[0]
    assert item.reused == 2
    assert item.readable == 1 - 2 * 65536 / len(before)
    with open_disk(path, snapshot=item.entry) as disk, pytest.raises(ReadError):
        disk.read(3 * 65536, 512)
    refused = []
    with open_disk(path, snapshot="deleted:1") as disk:
        for offset in range(0, disk.size, 65536):
            try:
                assert disk.read(offset, 65536) == before[offset : offset + 65536]
            except ReadError:
                refused.append(offset // 65536)
    assert refused == [3, 7]


def test_a_deleted_snapshot_that_claims_more_than_a_file_can_hold_is_examined_all_the_same(tmp_path: Path) -> None:
    path, _ = deleted_image(tmp_path)
    Poke(path).u64(deleted_snapshots(path)[0].entry.offset + 40 + 8, 2**64 - 512)
    active, former = l2_tables(path)
    Poke(path).u64(active + 8 * 40, Poke(path).get(former))
    (item,) = deleted_snapshots(path)
    assert (item.size, item.reused, item.complete) == (2**64 - 512, 1, False)


def l2_tables(path: Path) -> tuple[int, int]:
    """Return where the first L2 table of the active state and of the deleted snapshot stand."""
    with Image(path) as image:
        active = image.table(image.header.l1_table_offset, 1, "L1")[0]
        former = image.table(deleted_snapshots(path)[0].entry.l1_table_offset, 1, "L1")[0]
    return active & ~(1 << 63), former & ~(1 << 63)


def test_deleted_snapshot_whose_l1_table_was_reused_is_an_error(tmp_path: Path) -> None:
    path, _ = deleted_image(tmp_path)
    entry = deleted_snapshots(path)[0].entry
    active, _ = l2_tables(path)
    Poke(path).u64(active + 8 * 40, entry.l1_table_offset | 1 << 63)  # the active disk now uses that cluster
    assert not deleted_snapshots(path)[0].l1_intact
    with pytest.raises(FormatError, match="reused"):
        open_disk(path, snapshot="deleted:1")


@pytest.mark.parametrize("punched", [False, True])
def test_deleted_snapshot_whose_l1_table_was_wiped_is_an_error_not_an_empty_disk(tmp_path: Path, punched: bool) -> None:
    """Zeros are what a discard leaves where the file system knows no holes, or in a copy without them."""
    path, _ = deleted_image(tmp_path, size="64M", cluster_size=4096)  # an L1 table of 32 entries
    entry = deleted_snapshots(path)[0].entry
    if punched:
        qemu.run("fallocate", "--punch-hole", "--keep-size", "-o", str(entry.l1_table_offset), "-l", "4096", path)
    else:
        Poke(path).write(entry.l1_table_offset, bytes(8 * entry.l1_size))
    (item,) = deleted_snapshots(path)
    assert (item.l1_intact, item.readable, item.complete) == (False, 0, False)
    with pytest.raises(FormatError, match="wiped"):
        open_disk(path, snapshot="deleted:1")


def test_an_l1_table_where_an_l2_table_of_the_deleted_snapshot_was_is_not_taken_for_it(tmp_path: Path) -> None:
    """A later snapshot's L1 table has the form of an L2 table, and ends where the entries of that go on."""
    path, before = deleted_image(tmp_path, size="64M", cluster_size=4096)
    entry = deleted_snapshots(path)[0].entry
    _, former = l2_tables(path)
    later = Poke(path).get(entry.l1_table_offset + 8)
    assert later  # the second L2 table: alpha has data at 2M as well
    Poke(path).write(former, later.to_bytes(8, "big") + bytes(entry.l1_size * 8 - 8))
    (item,) = deleted_snapshots(path)
    assert (item.lost_tables, item.complete) == (1, False)
    with open_disk(path, snapshot="deleted:1") as disk:
        with pytest.raises(ReadError, match="reused"):
            disk.read(0, 4096)
        assert disk.read(2 << 20, 4096) == before[2 << 20 : (2 << 20) + 4096]


def test_former_tables_without_end_are_not_followed(tmp_path: Path) -> None:
    path, _ = deleted_image(tmp_path)
    one = deleted_snapshots(path)[0]
    tables_read = 2 * one.l2_tables  # its own, and the active state's in the same places
    for room, intact in ((tables_read, True), (tables_read - 1, False)):
        limits = Limits(work_repeats=0, work_spare=room * 65536)
        with residue(path, limits=limits) as found:
            (item,) = found.deleted_snapshots()
        assert (item.l1_intact, item.followed, item.is_gone) == (intact, intact, False)
    assert item.what_is_left == "not followed: too many tables"
    with pytest.raises(LimitExceeded, match="L2 tables of deleted snapshots"):
        open_disk(path, snapshot="deleted:1", limits=limits)


@pytest.mark.slow
def test_deleted_snapshots_whose_l1_tables_stood_in_one_place_are_all_followed(tmp_path: Path) -> None:
    path, _ = deleted_image(tmp_path, size="4G", cluster_size=512)  # an L1 table of 1 MiB
    entry = deleted_snapshots(path)[0].entry
    raw = Poke(path).read(entry.offset, entry.length - 6)
    for number in range(1, 6):
        Poke(path).write(entry.offset + 72 * number, raw + b"%dagain" % (number + 1))
    assert [item.l1_intact for item in deleted_snapshots(path)] == [True] * 6


def test_an_entry_that_names_more_than_may_be_read_keeps_no_other_from_being_followed(tmp_path: Path) -> None:
    path, _ = deleted_image(tmp_path)
    entry = deleted_snapshots(path)[0].entry
    raw = Poke(path).read(entry.offset, entry.length)
    behind = raw[:8] + (4 << 20).to_bytes(4, "big") + raw[12:-6] + b"0alpha"  # an L1 table of 32 MiB, first in order
    Poke(path).write(entry.offset + 128, behind)
    assert [(item.entry.id, item.l1_intact) for item in deleted_snapshots(path)] == [("0", False), ("1", True)]


def crafted_image(
    path: Path, l2_words: np.ndarray, *, disk_size: int | None = None, extra: bytes | None = None
) -> Path:
    """Write an image of 64 KiB clusters with free space that holds a snapshot entry, its L1 table and L2 tables.

    Guest cluster 0 of the active state is in use at CRAFTED_DATA. Built by hand.
    """
    builder = Builder()
    builder.data(0, b"\x11" * 65536, at=CRAFTED_DATA)
    base = builder.write(path).stat().st_size
    count = len(l2_words)
    l1_table = np.arange(count) * 65536 + base + 2 * 65536
    extra = (
        struct.pack(">QQq", 0, count * 8192 * 65536 if disk_size is None else disk_size, 0) if extra is None else extra
    )
    head = struct.pack(">QIHHIIQII", base + 65536, count, 1, 1, 1_700_000_000, 0, 0, 0, len(extra))
    free = [(head + extra + b"1a"), l1_table.astype(">u8").tobytes(), l2_words.astype(">u8").tobytes()]
    return Poke(path).append(b"".join(part.ljust(65536, b"\0") for part in free)).path


CRAFTED_DATA = 0x20000


def test_what_is_past_the_l1_table_or_in_a_table_cut_off_counts_as_unreadable(tmp_path: Path) -> None:
    words = np.zeros((2, 8192), np.int64)
    words[:, 0] = CRAFTED_DATA, ZERO
    span = 8192 * 65536
    path = crafted_image(tmp_path / "x.qcow2", words, disk_size=3 * span)
    (item,) = deleted_snapshots(path)
    assert (item.unreadable_bytes, item.complete) == (span, False)
    with open_disk(path, snapshot="deleted:1") as disk:
        assert disk.read(0, 65536) == b"\x11" * 65536
        with pytest.raises(FormatError, match="past what its L1 table"):
            disk.read(2 * span, 512)
    Poke(path).cut(path.stat().st_size - 512)
    (item,) = deleted_snapshots(path)
    assert (item.lost_tables, item.unreadable_bytes) == (1, 2 * span)
    with open_disk(path, snapshot="deleted:1") as disk, pytest.raises(Qcow2Error, match="L2 table"):
        disk.read(span, 512)


def test_what_is_readable_is_reported_for_a_deleted_snapshot_whose_entry_has_no_size(tmp_path: Path) -> None:
    """QEMU before 1.1 wrote none; the disk is taken to be as large as it is now."""
    path, before = deleted_image(tmp_path, compat="0.10")
    entry = deleted_snapshots(path)[0].entry
    raw = Poke(path).read(entry.offset, 36)
    Poke(path).write(entry.offset, (raw + bytes(4) + b"1alpha").ljust(entry.length, b"\0"))
    (item,) = deleted_snapshots(path)
    assert (item.size, item.complete, item.readable, item.rewritable) == (None, True, 1, 2 * 65536 / len(before))
    with open_disk(path, snapshot="deleted:1") as disk:
        assert disk.read(0, disk.size) == before
    Poke(path).write(l2_tables(path)[1], bytes(65536))
    (item,) = deleted_snapshots(path)
    assert (item.lost_tables, item.readable, item.rewritable) == (1, 0, 0)


def test_clusters_no_byte_of_which_is_allocated_are_not_counted_when_they_were_reused(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "4M", extended_l2="on", cluster_size="64k")
    qemu.io(path, "write -P 1 0 64k", "write -P 2 1M 64k", "write -z 1M 64k")  # the cluster stays allocated
    qemu.snapshot(path, "alpha")
    qemu.io(path, "write -P 3 0 64k")
    qemu.snapshot(path, "alpha", action="-d", opts=KEEP)
    active, former = l2_tables(path)
    Poke(path).write(active + 16 * 16, bytes(16)).u64(active + 16 * 40, Poke(path).get(former + 16 * 16))
    (item,) = deleted_snapshots(path)
    assert (item.reused, item.shared, item.rewritable_bytes, item.complete) == (0, 0, 0, True)
    with open_disk(path, snapshot="deleted:1") as disk:
        assert disk.read(0, disk.size) == (b"\1" * 65536).ljust(disk.size, b"\0")


def test_punched_compressed_clusters_of_a_deleted_snapshot_are_refused(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "4M")
    qemu.io(path, "write -c -P 1 0 64k", "write -c -P 2 64k 64k", "write -P 3 1M 64k")
    qemu.snapshot(path, "alpha")
    qemu.io(path, "write -P 4 0 128k")
    qemu.snapshot(path, "alpha", action="-d", opts=KEEP)
    (item,) = deleted_snapshots(path)
    assert (item.compressed, item.complete) == (2, True)
    stream = Poke(path).get(l2_tables(path)[1]) % (1 << 54) // 65536 * 65536
    qemu.run("fallocate", "--punch-hole", "--keep-size", "-o", str(stream), "-l", "65536", path)
    (item,) = deleted_snapshots(path)
    assert (item.compressed, item.punched, item.zeroed, item.unreadable_bytes) == (0, 2, 2, 2 * 65536)
    with open_disk(path, snapshot="deleted:1") as disk, pytest.raises(ReadError, match="hole"):
        disk.read(0, 512)


def test_many_compressed_clusters_that_were_reused_are_refused_in_little_memory(tmp_path: Path) -> None:
    words = np.arange(100 * 8192).reshape(100, 8192) % 65536 + CRAFTED_DATA | COMPRESSED
    path = crafted_image(tmp_path / "x.qcow2", words)
    tracemalloc.start()
    with open_disk(path, snapshot="deleted:1") as disk:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        for offset in (0, disk.size // 2, disk.size - 512):
            with pytest.raises(ReadError, match="reused"):
                disk.read(offset, 512)
    assert peak < 32 << 20
    (item,) = deleted_snapshots(path)
    assert (item.reused, item.readable) == (words.size, 0)


def test_an_l1_table_that_a_later_deleted_snapshot_had_in_its_place_is_gone(tmp_path: Path) -> None:
    path, before = deleted_image(tmp_path)
    entry = deleted_snapshots(path)[0].entry
    raw = Poke(path).read(entry.offset, entry.length)
    for seconds, name in ((-1, b"0alpha"), (1, b"2later")):  # the same disk, and its L1 table, at other times
        date = (entry.date_sec + seconds).to_bytes(4, "big")
        Poke(path).write(entry.offset + 128 * (2 + seconds), raw[:16] + date + raw[20:-6] + name)
    assert [(item.entry.id, item.l1_intact) for item in deleted_snapshots(path)] == [
        ("0", False),
        ("1", False),
        ("2", True),
    ]
    with pytest.raises(FormatError, match="gone"):
        open_disk(path, snapshot="deleted:1")
    for place in ("deleted:2", f"deleted:{entry.offset:#x}"):  # by its place an entry opens, whatever others say
        with open_disk(path, snapshot=place) as disk:
            assert disk.read(0, disk.size) == before


@pytest.mark.slow
def test_deleted_snapshot_with_a_hole_in_its_l1_table_is_an_error(tmp_path: Path) -> None:
    path, _ = deleted_image(tmp_path, size="2G", cluster_size=4096)  # an L1 table of two clusters
    entry = deleted_snapshots(path)[0].entry
    assert entry.l1_size * 8 == 8192
    second = str(entry.l1_table_offset + 4096)
    qemu.run("fallocate", "--punch-hole", "--keep-size", "-o", second, "-l", "4096", path)
    assert not deleted_snapshots(path)[0].l1_intact
    with pytest.raises(FormatError, match="wiped"):
        open_disk(path, snapshot="deleted:1")


def test_snapshot_behind_a_broken_table_opens_by_its_own_entry(tmp_path: Path) -> None:
    path = base_s(tmp_path / "s.qcow2")
    before = qemu.raw_bytes(path, snapshot="s2")
    Poke(path).u32(0xB0000 + 36, 65536)  # the first entry's extra data: the table cannot be read any more
    with pytest.raises(Qcow2Error):
        open_disk(path, snapshot="s2")
    (item,) = deleted_snapshots(path)
    assert item.entry.name == "s2"
    with open_disk(path, snapshot=item.selector) as disk:
        assert disk.read(0, disk.size) == before


def test_live_snapshots_in_old_copies_of_the_table_are_not_deleted_ones(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M")
    for name in ("one", "two", "three"):
        qemu.io(path, "write 0 64k")
        qemu.snapshot(path, name, opts=KEEP)
    assert deleted_snapshots(path) == []
    qemu.snapshot(path, "two", action="-d", opts=KEEP)
    assert [item.entry.name for item in deleted_snapshots(path)] == ["two"]


def test_punched_clusters_of_a_deleted_snapshot_are_refused_not_read_as_zeros(tmp_path: Path) -> None:
    path, _ = deleted_image(tmp_path)
    host = Poke(path).get(l2_tables(path)[1]) & ~(1 << 63)
    qemu.run("fallocate", "--punch-hole", "--keep-size", "-o", str(host), "-l", "65536", path)
    again = deleted_snapshots(path)[0]
    assert (again.zeroed, again.complete) == (1, False)
    with open_disk(path, snapshot="deleted:1") as disk:
        with pytest.raises(ReadError, match="hole"):
            disk.read(0, 512)
        assert disk.read(65536, 512) == b"\x11" * 512


def test_compressed_clusters_of_a_deleted_snapshot_that_others_were_written_over_are_refused(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M")
    qemu.io(path, "write -P 1 512k 64k")
    qemu.snapshot(path, "first")
    qemu.io(path, "write -P 2 512k 64k")
    qemu.snapshot(path, "first", action="-d", opts=KEEP)  # from here on the L2 table stands behind free clusters
    qemu.io(path, "write -c -P 0x11 0 64k", "write -c -P 0x12 64k 64k")
    qemu.snapshot(path, "alpha")
    before = qemu.raw_bytes(path, snapshot="alpha")
    qemu.io(path, "write -P 0x44 0 128k")
    qemu.snapshot(path, "alpha", action="-d", opts=KEEP)
    with open_disk(path, snapshot="deleted:alpha") as disk:
        assert disk.read(0, disk.size) == before
    qemu.io(path, "write -c -P 0x77 768k 64k")  # as long as the first of them, and where it was
    item = next(item for item in deleted_snapshots(path) if item.entry.name == "alpha")
    assert (item.reused, item.compressed, item.complete) == (2, 0, False)
    assert item.readable == 1 - 2 * 65536 / len(before)
    with open_disk(path, snapshot="deleted:alpha") as disk:
        for offset in (0, 65536):
            with pytest.raises(ReadError, match="reused"):
                disk.read(offset, 512)
        assert disk.read(131072, disk.size) == before[131072:]


def test_compressed_clusters_of_a_deleted_snapshot_beside_ones_still_in_use_are_read(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"".join(b"%07d the quick brown fox\n" % number for number in range(24000))[: 512 << 10])
    path = tmp_path / "disk.qcow2"
    qemu.convert(raw, path, fmt="raw", target_format="qcow2", compressed=True)
    qemu.snapshot(path, "alpha")
    qemu.io(path, "write -P 0x44 64k 64k")
    qemu.snapshot(path, "alpha", action="-d", opts=KEEP)
    (item,) = deleted_snapshots(path)
    assert (item.reused, item.compressed, item.readable) == (0, 8, 1.0)
    with open_disk(path, snapshot="deleted:alpha") as disk:
        assert disk.read(0, disk.size) == raw.read_bytes()


def test_what_the_active_state_may_have_written_in_place_since_the_deletion_is_counted(tmp_path: Path) -> None:
    path, before = deleted_image(tmp_path)
    (item,) = deleted_snapshots(path)
    assert (item.shared, item.rewritable_bytes) == (2, 2 * 65536)  # at 2M, and the end of 100k at 3M
    qemu.io(path, "write -P 0x66 2M 64k")
    with open_disk(path, snapshot="deleted:1") as disk:
        assert disk.read(2 << 20, 65536) == b"\x66" * 65536 != before[2 << 20 : (2 << 20) + 65536]
        newer = [piece for piece in confidence_of(disk) if piece.confidence is Confidence.LIKELY]
        assert sum(piece.length for piece in newer) == 2 * 65536
        assert any(piece.offset == 2 << 20 and "newer" in piece.reason for piece in newer)
        assert any("131072 bytes of this deleted snapshot may be newer" in note for note in disk.notes)
    (item,) = deleted_snapshots(path)
    assert item.rewritable_bytes == 2 * 65536


def test_compressed_clusters_that_may_have_been_let_go_and_written_again_are_counted_as_perhaps_newer(
    tmp_path: Path,
) -> None:
    """The active state discards both streams of a host cluster and puts two of the same lengths there."""
    path = qemu.create(tmp_path / "disk.qcow2", "4M")
    qemu.io(path, "write -P 1 1M 64k")
    qemu.snapshot(path, "first")
    qemu.io(path, "write -P 2 1M 64k")
    qemu.snapshot(path, "first", action="-d", opts=KEEP)  # from here on the L2 table stands behind free clusters
    qemu.io(path, "write -c -P 3 0 64k", "write -c -P 4 64k 64k")
    qemu.snapshot(path, "alpha")
    before = qemu.raw_bytes(path, snapshot="alpha")
    qemu.io(path, "write -P 5 1M 64k")  # from here on the active state has an L2 table of its own
    qemu.snapshot(path, "alpha", action="-d", opts=KEEP)
    discards = {"discard": "unmap", "file.discard": "ignore"}
    qemu.io(path, "discard 0 128k", "write -c -P 5 0 64k", "write -c -P 6 2M 64k", opts=discards)
    item = next(item for item in deleted_snapshots(path) if item.entry.name == "alpha")
    assert (item.compressed, item.rewritable_bytes) == (2, 2 * 65536)
    with open_disk(path, snapshot="deleted:alpha") as disk:
        assert disk.read(0, 131072) == b"\5" * 65536 + b"\6" * 65536
        assert disk.read(131072, disk.size) == before[131072:]


def test_a_table_only_the_active_state_still_holds_may_be_newer_as_a_whole(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "4M")
    qemu.io(path, "write -P 0x11 0 1M")
    qemu.snapshot(path, "alpha")
    qemu.snapshot(path, "alpha", action="-d", opts=KEEP)
    qemu.io(path, "write -P 0x22 0 1M")
    (item,) = deleted_snapshots(path)
    assert (item.readable, item.rewritable) == (1, 1)
    assert item.what_is_left == "100% readable, 100% perhaps newer"


def test_what_an_older_snapshot_still_holds_is_no_newer_than_the_deleted_one(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "4M")
    qemu.io(path, "write -P 0x11 0 1M")
    qemu.snapshot(path, "older")
    qemu.snapshot(path, "alpha")
    before = qemu.raw_bytes(path, snapshot="alpha")
    qemu.io(path, "write -P 0x22 0 64k")
    qemu.snapshot(path, "alpha", action="-d", opts=KEEP)
    qemu.io(path, "write -P 0x33 0 1M")
    (item,) = deleted_snapshots(path)
    assert (item.readable, item.rewritable_bytes, item.what_is_left) == (1, 0, "100% readable")
    with open_disk(path, snapshot="deleted:alpha") as disk:
        assert disk.read(0, disk.size) == before


def test_active_disk_of_an_image_with_residue_reads_as_ever(tmp_path: Path) -> None:
    path, _ = deleted_image(tmp_path)
    with open_disk(path) as disk:
        assert disk.read(0, disk.size) == qemu.raw_bytes(path)


@qemu.requires_qemu_system
def test_vm_state_of_a_deleted_memory_snapshot_opens(tmp_path: Path) -> None:
    from qcow2_forensics import open_vm_state

    path = qemu.create(tmp_path / "disk.qcow2", "1M")
    qemu.monitor(path, "savevm a")
    with open_vm_state(path) as state:
        before = state.read(0, state.size)
    qemu.monitor(path, "delvm a", drive="if=ide,pass-discard-snapshot=off")
    with open_vm_state(path, "deleted:1") as state:
        assert state.read(0, state.size) == before
    assert any(piece.looks == "vm-state" for piece in _pieces(path))


def test_snapshot_that_never_existed_is_not_made_up_from_guest_data(make_image: Make) -> None:
    path = make_image("disk.qcow2", "4M", "write -P 0x11 0 4M", "discard 1M 1M")
    assert deleted_snapshots(path) == []


# --- pieces --------------------------------------------------------------------------------------


def _pieces(path: Path) -> list:
    with residue(path) as found:
        return list(found.pieces())


def test_healthy_image_has_no_residue(make_image: Make) -> None:
    assert _pieces(make_image("disk.qcow2", "4M", "write -P 0x11 0 1M", "write -P 0x22 3M 64k")) == []


def test_free_leaked_and_trailing_clusters_are_distinguished(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).l2(1, 0).l2(2, 0).refcount(7, 0).append(b"behind the end" * 9000)
    kinds = {(piece.kind, piece.offset) for piece in _pieces(path)}
    assert kinds == {("leaked", 0x60000), ("trailing", 0x70000)}
    Poke(path).refcount(6, 0).refcount(5, 0).l2(0, 0).l2(3, 1 << 63 | 0x80000).refcount(8, 1)
    kinds = {(piece.kind, piece.offset) for piece in _pieces(path)}
    assert ("free", 0x50000) in kinds


def test_discarded_data_is_found_byte_for_byte(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M")
    qemu.io(path, "write -P 0x5a 0 128k", "write -P 0x5b 512k 64k")
    qemu.io(path, "discard 0 64k", opts={"discard": "unmap", "file.discard": "ignore"})
    with residue(path) as found:
        pieces = [piece for piece in found.pieces() if piece.kind == "free"]
        assert [found.open(piece).read() for piece in pieces] == [b"\x5a" * 65536]


def test_free_cluster_with_a_hole_inside_is_one_piece(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M")
    qemu.io(path, "write -P 0x5a 0 192k")
    qemu.io(path, "discard 0 128k", opts={"discard": "unmap", "file.discard": "ignore"})
    (piece,) = _pieces(path)
    qemu.run("fallocate", "--punch-hole", "--keep-size", "-o", str(piece.offset + 8192), "-l", "4096", path)
    (again,) = _pieces(path)
    assert (again.offset, again.length, again.nonzero) == (piece.offset, 131072, 131072 - 4096)


def test_data_under_a_zero_flag_is_found_with_its_guest_offset(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M")
    qemu.io(path, "write -P 17 128k 64k", "write -z 128k 64k")
    assert [(p.kind, p.guest_offset, p.length) for p in _pieces(path)] == [("zero-flagged", 128 << 10, 65536)]


def test_data_under_a_zero_flag_that_a_snapshot_still_shows_is_no_residue(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M")
    qemu.io(path, "write -P 17 0 64k")
    qemu.snapshot(path, "a")
    qemu.io(path, "write -z 0 64k")
    assert _pieces(path) == []


def test_dead_subclusters_are_found(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M", extended_l2="on", cluster_size="64k")
    qemu.io(path, "write -P 7 0 64k", "write -z 8k 4k")
    found = [(p.kind, p.guest_offset, p.length) for p in _pieces(path)]
    assert found == [("subcluster", 8192, 4096)]


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_overwritten_compressed_cluster_is_found_and_inflates(tmp_path: Path, kind: str) -> None:
    # Text compresses to less than a cluster and its streams differ from each other.
    lines = b"".join(b"%07d the quick brown fox\n" % number for number in range(24000))
    raw = tmp_path / "raw"
    raw.write_bytes(lines[: 512 << 10])
    path = tmp_path / "disk.qcow2"
    qemu.convert(
        raw, path, fmt="raw", target_format="qcow2", compressed=True, target_options={"compression_type": kind}
    )
    assert _pieces(path) == []
    qemu.io(path, "write -P 0 64k 64k")
    streams = [piece for piece in _pieces(path) if piece.looks == "stream"]
    assert [piece.signature for piece in streams] == [hashlib.sha256(lines[65536:131072]).hexdigest()]


def test_each_stream_that_is_reported_decodes_by_itself(tmp_path: Path) -> None:
    """Of many streams some end with zeros, which belong to them."""
    clusters = [b"%d " % number**9 * 20 for number in range(64)]
    raw = tmp_path / "raw"
    raw.write_bytes(b"".join(cluster.ljust(65536, b"\0") for cluster in clusters))
    path = tmp_path / "disk.qcow2"
    qemu.convert(raw, path, fmt="raw", target_format="qcow2", compressed=True)
    qemu.io(path, "write -P 7 64k 4032k")  # the first one keeps the host cluster in use
    data, reported = path.read_bytes(), [piece for piece in _pieces(path) if piece.looks == "stream"]
    for piece in reported:
        stream = zlib.decompressobj(-12)
        assert stream.decompress(data[piece.offset : piece.offset + piece.length]).rstrip(b"\0") in clusters
        assert stream.eof
        assert not stream.unused_data
    assert len(reported) > 32
    assert any(data[piece.offset + piece.length - 1] == 0 for piece in reported)


def test_header_slack_and_padding_are_found(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).write(0x8000, b"secret").u8(107, 5)
    assert [(p.kind, p.offset, p.length, p.looks) for p in _pieces(path)] == [
        ("header-slack", 0x8000, 6, "text"),
        ("header-padding", 107, 1, "data"),
    ]


def test_eight_bytes_old_qemu_left_in_version_2_headers_are_no_residue(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M", compat="0.10")
    Poke(path).write(96, bytes.fromhex("0000000400000068"))
    assert _pieces(path) == []
    Poke(path).u8(96, 1)
    assert [piece.kind for piece in _pieces(path)] == ["header-slack"]


def test_slack_behind_an_l1_and_a_snapshot_table_is_found(tmp_path: Path) -> None:
    path = base_s(tmp_path / "s.qcow2")
    with Image(path) as image:
        l1 = image.header.l1_table_offset
        last = image.snapshots[-1]
    Poke(path).write(l1 + 100, b"old").write(last.offset + last.length + 8, b"older")
    found = {(p.kind, p.offset, p.length) for p in _pieces(path)}
    assert found == {("l1-slack", l1 + 100, 3), ("table-slack", last.offset + last.length + 8, 5)}


def test_removed_bitmap_is_found(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M")
    qemu.bitmap(path, "--add", "daily")
    with residue(path) as found:
        assert found.entries()[1] == []
    qemu.bitmap(path, "--remove", "daily")
    with residue(path) as found:
        names = [entry.name for entry in found.entries()[1]]
    if not names:
        pytest.skip("this file system punched the bitmap directory")
    assert names == ["daily"]


def test_grown_l1_table_leaves_the_old_one(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M", cluster_size=512)
    qemu.io(path, "write 0 64k")
    qemu.resize(path, "64M")
    looks = {piece.looks for piece in _pieces(path)}
    assert "l1" in looks


def test_data_file_bytes_behind_zero_flags_are_found(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "1M", data_file=tmp_path / "d.raw")
    qemu.io(path, "write -P 9 64k 64k", "write -z 64k 64k")
    assert [(p.kind, p.file, p.guest_offset) for p in _pieces(path)] == [("zero-flagged", "data", 65536)]


# --- export --------------------------------------------------------------------------------------


def test_export_writes_each_piece_and_an_index_that_matches(tmp_path: Path) -> None:
    path, _ = deleted_image(tmp_path)
    with residue(path) as found:
        summary = write(found, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "index.json").read_text())
    stored = path.read_bytes()
    assert summary.pieces == len(data["pieces"]) > 3
    for piece in data["pieces"]:
        content_bytes = (tmp_path / "out" / piece["name"]).read_bytes()
        assert content_bytes == stored[piece["offset"] : piece["offset"] + piece["length"]]
        assert hashlib.sha256(content_bytes).hexdigest() == piece["sha256"]
    assert [item["open_as"] for item in data["deleted_snapshots"]] == [deleted_snapshots(path)[0].selector]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "index.csv").read_text())))
    assert [int(row["offset"]) for row in rows] == [piece["offset"] for piece in data["pieces"]]


def test_export_leaves_no_folder_when_it_fails(tmp_path: Path) -> None:
    path, _ = deleted_image(tmp_path)
    with residue(path) as found, pytest.raises(KeyboardInterrupt):
        write(found, tmp_path / "out", advance=_interrupt)
    assert {item.name for item in tmp_path.iterdir()} == {path.name}
    (tmp_path / "out").mkdir()
    with residue(path) as found, pytest.raises(Qcow2Error, match="exists"):
        write(found, tmp_path / "out")


def _interrupt(_: int) -> None:
    raise KeyboardInterrupt


def test_export_limit_keeps_the_index_whole(tmp_path: Path) -> None:
    path, _ = deleted_image(tmp_path)
    with residue(path) as found:
        summary = write(found, tmp_path / "out", limit=100_000)
    data = json.loads((tmp_path / "out" / "index.json").read_text())
    assert summary.written <= 100_000
    assert summary.skipped
    assert all(piece["sha256"] for piece in data["pieces"])
    assert sum(piece["name"] is None for piece in data["pieces"]) == summary.skipped


# --- recognition ---------------------------------------------------------------------------------

GEOMETRY = structure_detection.Geometry(3, 16, 1 << 30)


def one_row(data: bytes) -> U64:
    return big_endian(data[: len(data) // 16 * 16]).reshape(1, -1)


@given(st.binary(min_size=512, max_size=4096))
def test_recognition_never_raises_on_any_bytes(data: bytes) -> None:
    for geometry in (GEOMETRY, GEOMETRY._replace(extended_l2=True), GEOMETRY._replace(version=2, cluster_bits=9)):
        for rule in (structure_detection.l1_rows, structure_detection.l2_rows):
            rule(one_row(data), geometry)
        structure_detection.find_entries(data, 0, geometry)
    content.describe(data)


@pytest.mark.parametrize(
    "data",
    [b"the quick brown fox jumps over the lazy dog " * 100, deflate(bytes(range(256)) * 999), b"\xff" * 4096],
    ids=["text", "compressed", "ones"],
)
def test_guest_data_is_not_taken_for_a_table(data: bytes) -> None:
    data = data.ljust(65536, b"\0")
    for rule in (structure_detection.l1_rows, structure_detection.l2_rows):
        assert not rule(one_row(data), GEOMETRY).tables.any()
    assert structure_detection.find_entries(data, 0, GEOMETRY) == ([], [], 0)


def test_live_tables_are_recognised_as_what_they_are(tmp_path: Path) -> None:
    path = base_s(tmp_path / "s.qcow2")
    with Image(path) as image:
        geometry = structure_detection.Geometry.of(image)
        l1 = image.read(image.header.l1_table_offset, 65536)
        facts = structure_detection.l1_rows(one_row(l1), geometry)
        assert facts.tables.all()
        assert structure_detection.l2_rows(one_row(image.read(int(facts.targets[0, 0]), 65536)), geometry).tables.all()
        table = image.read(image.header.snapshots_offset, 65536)
        assert [entry.name for entry in structure_detection.find_entries(table, 0, geometry)[0]] == ["s1", "s2"]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"SQLite format 3\0" + bytes(100), "SQLite database"),
        (bytes(510) + b"\x55\xaa", "boot sector"),
        (bytes(446) + b"\x80" + bytes(3) + b"\x83" + bytes(3) + bytes(8) + bytes(48) + b"\x55\xaa", "MBR"),
        (b"MZ" + bytes(58) + b"\x40\0\0\0" + b"PE\0\0", "PE"),
        (b"MZ" + bytes(600), ""),
        (b"plain text", ""),
    ],
)
def test_signatures(data: bytes, name: str) -> None:
    assert content.signature(data) == name


def test_guarded_source_refuses_only_the_guarded_range() -> None:
    refusals = Refusals(5)
    refusals.add_clusters(LOST_TABLE, np.array([15, 10], np.uint64))
    refusals.add_clusters(REUSED, np.array([40, 20, 15], np.uint64))
    source = GuardedSource(BytesSource(bytes(100)), refusals)
    assert source.read(0, 10) == bytes(10)
    assert source.read(25, 15) == bytes(15)
    for offset, length in ((9, 2), (10, 1), (19, 1), (0, 100), (40, 1)):
        with pytest.raises(ReadError):
            source.read(offset, length)
    with pytest.raises(ReadError, match="L2 table"):
        source.read(15, 1)
    with pytest.raises(ReadError, match="reused"):
        source.read(20, 1)
    assert source.read(45, 55) == bytes(55)
    assert source.read(12, 0) == b""


# --- holes ---------------------------------------------------------------------------------------


class Counting(FileSource):
    """A file that notes where it was read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.places: list[int] = []

    def read(self, offset: int, length: int, /) -> bytes:
        self.places.append(offset)
        return super().read(offset, length)


def test_clusters_under_zero_flags_that_are_holes_of_the_file_are_not_read(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "x.qcow2", "64M", preallocation="metadata")
    qemu.io(path, "write -P 7 20M 64k", *(f"write -z {number}M 1M" for number in range(64)))
    if path.stat().st_blocks * 512 > 16 << 20:
        pytest.skip("the file system keeps no holes")
    source = Counting(path)
    with residue(Image(source)) as found:
        assert found.census.allocated == 1024
        source.places.clear()
        (piece,) = (piece for piece in found.hidden() if piece.kind == "zero-flagged")
    assert (piece.guest_offset, piece.length) == (20 << 20, 65536)
    assert len(source.places) < 50
    source.close()


@given(st.lists(st.integers(0, 40), max_size=12), st.lists(st.integers(0, 50), unique=True, max_size=30))
def test_stored_clusters_are_those_the_file_system_keeps_bytes_of(written: list[int], asked: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sparse"
        with path.open("wb") as stream:
            for block in written:
                stream.seek(block * 4096)
                stream.write(b"x")
            stream.truncate(41 * 4096)
        source = FileSource(path)
        size = 8192
        offsets = np.asarray(sorted(number * 4096 for number in asked), dtype=np.int64)
        kept = hidden.Mapped(offsets, offsets, offsets).stored(source, size).hosts.tolist()
        for number in asked:
            if number * 4096 >= source.size:
                continue  # past the end there is nothing to read anyway
            runs = host_runs(source, number * 4096, min(size, source.size - number * 4096))
            assert (number * 4096 in kept) == any(not run.is_hole for run in runs), number
        source.close()


def test_bytes_in_dead_subclusters_are_found_whatever_state_allocates_the_rest(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "x.qcow2", "1M", extended_l2="on", cluster_size="64k")
    qemu.io(path, "write -P 7 0 64k", "write -P 8 128k 64k")
    qemu.io(path, "write -z 4k 2k", "write -z 130k 2k")
    with residue(path) as found:
        pieces = [piece for piece in found.hidden() if piece.kind == "subcluster"]
        assert [(piece.guest_offset, piece.length) for piece in pieces] == [(4096, 2048), (130 << 10, 2048)]
    qemu.snapshot(path, "one")
    qemu.io(path, "write -P 9 32k 2k")  # copies the cluster: the one with the residue is the snapshot's alone
    with residue(path) as found:
        reported = {(piece.guest_offset, piece.snapshot) for piece in found.hidden() if piece.kind == "subcluster"}
    assert reported == {(4096, "1"), (130 << 10, "1")}


def test_the_page_on_residue_describes_every_kind_of_piece() -> None:
    page = (Path(__file__).parents[1] / "docs" / "residue.md").read_text()
    assert [kind for kind in KINDS if f"`{kind}`" not in page] == []
