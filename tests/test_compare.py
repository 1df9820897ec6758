"""Differences between states are those that comparing QEMU's raw exports byte by byte finds."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics import Disk, open_disk, open_image
from qcow2_forensics.compare.ranges import Change, Difference, compare, unequal_sectors
from qcow2_forensics.format.source import FileSource
from tests import qemu
from tests.conftest import EvidenceCase
from tests.image_builder import COPIED, EXT_BACKING_FORMAT, EXT_DATA_FILE, Builder
from tests.tiers import every

SECTOR = 512
MIB = 1 << 20


def raw_state(path: Path, name: str | None, folder: Path) -> bytes:
    """The bytes of one state as QEMU has them: the snapshot applied to a copy, then converted.

    Converting a snapshot directly would use the current disk size.
    """
    if name is None:
        return qemu.raw_bytes(path)
    copy = folder / "applied.qcow2"
    shutil.copyfile(path, copy)
    qemu.snapshot(copy, name, action="-a")
    return qemu.raw_bytes(copy)


def unequal_ranges(before: bytes, after: bytes) -> list[tuple[int, int]]:
    """Sector ranges that differ, found the slow way; what only one has differs."""
    longest = max(len(before), len(after))
    bad = [at for at in range(0, longest, SECTOR) if before[at : at + SECTOR] != after[at : at + SECTOR]]
    ranges: list[tuple[int, int]] = []
    for at in bad:
        if ranges and ranges[-1][1] == at:
            ranges[-1] = (ranges[-1][0], at + SECTOR)
        else:
            ranges.append((at, at + SECTOR))
    return ranges


def merged(found: Iterable[Difference]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for item in found:
        assert item.length > 0
        assert item.change is not Change.UNREADABLE, item
        if ranges and ranges[-1][1] == item.offset:
            ranges[-1] = (ranges[-1][0], item.end)
        else:
            ranges.append((item.offset, item.end))
    return ranges


class Life:
    """One image that qemu-img and qemu-io put through a random life."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.path = folder / f"life{seed}.qcow2"
        self.cluster = self.random.choice([512, 4096, 65536])
        self.size = self.random.randrange(64, 2048) * SECTOR
        self.names: list[str] = []
        options = {"cluster_size": self.cluster, "compat": self.random.choice(["0.10", "1.1", "1.1"])}
        if options["compat"] == "1.1" and self.random.random() < 0.3:
            options["cluster_size"] = self.cluster = 65536
            options["extended_l2"] = "on"
        backing = None
        if self.random.random() < 0.4:
            backing = folder / f"base{seed}.qcow2"
            qemu.create(backing, self.random.randrange(64, 2048) * SECTOR, cluster_size=4096)
            self.write(backing, 4)
        self.versioned = options["compat"] == "1.1"
        named = {"backing": backing, "backing_format": "qcow2"} if backing else {}
        qemu.create(self.path, self.size, **named, **options)

    def command(self, size: int) -> str:
        at = self.random.randrange(size // SECTOR) * SECTOR
        length = min(self.random.choice([SECTOR, 3 * SECTOR, self.cluster, 5 * self.cluster]), size - at)
        verb = self.random.choice(["write -P {}", "write -P {}", "write -P {}", "write -z", "write -z -u", "discard"])
        if verb.startswith("write -P") and self.random.random() < 0.25:
            at -= at % self.cluster
            length = min(self.cluster, size - at)
            verb = verb.replace("-P", "-c -P") if length == self.cluster else verb
        return f"{verb.format(self.random.choice([0, 1, 2, 0x5A]))} {at} {length}"

    def write(self, path: Path, count: int) -> None:
        size = int(qemu.info_json(path)["virtual-size"])
        # QEMU refuses some, such as a compressed write over an allocated cluster, and goes on.
        qemu.io(path, *(self.command(size) for _ in range(count)), check=False)

    def live(self) -> None:
        """Write, discard, zero, snapshot, delete, grow: a dozen times."""
        for _ in range(4):
            self.write(self.path, self.random.randrange(1, 8))
            if self.random.random() < 0.8 and len(self.names) < 3:
                self.names.append(f"s{len(self.names)}")
                qemu.snapshot(self.path, self.names[-1])
            if len(self.names) > 1 and self.random.random() < 0.3:
                gone = self.names.pop(self.random.randrange(len(self.names)))
                qemu.snapshot(self.path, gone, action="-d")
                self.names.append(f"{gone}x")
                qemu.snapshot(self.path, self.names[-1])
            if self.versioned and self.random.random() < 0.3:
                self.size += self.random.randrange(1, 512) * SECTOR
                qemu.resize(self.path, self.size)


@qemu.requires_qemu
@pytest.mark.parametrize("seed", every(17, range(50)))
def test_differences_of_a_random_life_are_those_of_the_raw_exports(tmp_path: Path, seed: int) -> None:
    life = Life(tmp_path, seed)
    life.live()
    states: list[str | None] = [*life.names, None]
    truth = {name: raw_state(life.path, name, tmp_path) for name in states}
    pairs = [(a, b) for at, a in enumerate(states) for b in states[at + 1 :]]
    for first, second in [*pairs, (None, states[0])]:
        with open_disk(life.path, first) as before, open_disk(life.path, second) as after:
            found = list(compare(before, after))
        assert all(one.end <= two.offset for one, two in pairwise(found))
        assert merged(found) == unequal_ranges(truth[first], truth[second]), (first, second)


@qemu.requires_qemu
@pytest.mark.parametrize("base_format", ["qcow2", "raw"])
def test_an_overlay_differs_from_its_backing_file_where_their_raw_exports_do(tmp_path: Path, base_format: str) -> None:
    base = qemu.create(tmp_path / "base", "700k", fmt=base_format)
    qemu.io(base, "write -P 1 0 300k", "write -P 2 400k 64k", fmt=base_format)
    over = qemu.create(tmp_path / "over.qcow2", "1M", backing=base.name, backing_format=base_format, cwd=tmp_path)
    qemu.io(over, "write -P 1 0 64k", "write -P 9 100k 512", "write -z 128k 64k", "write -P 7 900k 1k")
    with open_disk(over) as disk:
        assert disk.backing is not None
        found = list(compare(disk.backing, disk))
    before = qemu.raw_bytes(base, fmt=base_format)
    assert merged(found) == unequal_ranges(before, qemu.raw_bytes(over))
    assert [item.change for item in found] == [Change.CHANGED, Change.ZEROED, Change.ADDED]


@qemu.requires_qemu
def test_an_overlay_over_two_pebibytes_costs_what_it_maps(tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "base.qcow2", "2P")
    over = qemu.create(tmp_path / "over.qcow2", backing=base.name, backing_format="qcow2", cwd=tmp_path)
    qemu.io(over, "write -P 1 1048576G 64k", "write -P 0 1048579G 64k", "write -P 2 2097151G 512")
    with open_disk(over) as disk:
        assert disk.backing is not None
        found = list(compare(disk.backing, disk))
    assert [(item.offset, item.length) for item in found] == [(1 << 50, 65536), (2097151 << 30, 512)]


@qemu.requires_qemu
def test_each_difference_says_what_became_of_its_range(make_image: Callable[..., Path]) -> None:
    path = make_image("disk.qcow2", "1M", "write -P 1 0 192k")
    qemu.snapshot(path, "old")
    qemu.io(path, "write -P 2 0 512", "write -z -u 64k 64k", "write -P 3 512k 1k", "write -P 0 640k 64k")
    qemu.resize(path, "2M")
    with open_disk(path, "old") as old, open_disk(path) as new:
        changes = [(item.offset, item.length, item.change) for item in compare(old, new)]
        back = [item.change for item in compare(new, old)]
    assert changes == [
        (0, 512, Change.CHANGED),
        (64 << 10, 64 << 10, Change.ZEROED),
        (512 << 10, 1024, Change.WRITTEN),
        (MIB, MIB, Change.ADDED),  # the zeros written at 640k change nothing
    ]
    assert back == [Change.CHANGED, Change.WRITTEN, Change.ZEROED, Change.REMOVED]


class CountingSource:
    """Counts what is read of a file."""

    def __init__(self, path: Path) -> None:
        self._file = FileSource(path)
        self.size = self._file.size
        self.name = str(path)
        self.identity = self._file.identity
        self.bytes = 0
        self.offsets: list[tuple[int, int]] = []

    def read(self, offset: int, length: int, /) -> bytes:
        self.bytes += length
        self.offsets.append((offset, length))
        return self._file.read(offset, length)


@qemu.requires_qemu
def test_states_of_a_tebibyte_disk_compare_by_reading_hardly_any_of_it(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "big.qcow2", "1T")
    # Growing with metadata preallocation maps the new part to clusters that are holes in the file.
    qemu.resize(path, (1 << 40) + (4200 << 20), preallocation="metadata")
    qemu.io(path, *(f"write -P {at % 251 + 1} {at}G 64k" for at in range(0, 1024, 8)))
    for name in ("one", "two", "three"):
        qemu.snapshot(path, name)
        qemu.io(path, f"write -P 77 {len(name)}G 1k", "write -P 0x33 512G 4k", f"write -P {len(name)} 700G 64k")
    allocated = sum(item["length"] for item in qemu.map_json(path) if item.get("offset") is not None)
    assert allocated > 4 << 30
    source = CountingSource(path)
    with open_disk(source, "one") as before, open_disk(source) as after:
        source.bytes = 0
        found = list(compare(before, after))
    assert [(item.offset >> 30, item.length) for item in found] == [(3, 1024), (5, 1024), (512, 4096), (700, 65536)]
    assert source.bytes < allocated / 100
    assert source.bytes < 4 * MIB


@qemu.requires_qemu
def test_clusters_two_states_share_are_not_read(make_image: Callable[..., Path]) -> None:
    path = make_image("disk.qcow2", "16M", "write -P 1 0 8M", cluster_size="64k")
    qemu.snapshot(path, "old")
    qemu.io(path, "write -P 2 1M 512")
    source = CountingSource(path)
    with open_disk(source, "old") as old, open_disk(source) as new:
        source.offsets.clear()
        found = list(compare(old, new))
    assert found == [Difference(MIB, 512, Change.CHANGED)]
    assert (
        sum(length for _, length in source.offsets) <= 2 * 65536 + 4 * 65536 + 2 * 8
    )  # two clusters, two L2 tables (as a whole, then as runs), L1


@qemu.requires_qemu
def test_what_cannot_be_read_is_a_difference_of_its_own(make_image: Callable[..., Path]) -> None:
    path = make_image("disk.qcow2", "1M", "write -P 1 0 256k", cluster_size="64k")
    qemu.snapshot(path, "old")
    qemu.io(path, "write -P 2 0 256k")
    with open_disk(path) as disk:
        entry = disk.mapping.entry_offset(64 << 10)
    assert entry is not None
    with path.open("r+b") as stream:
        stream.seek(entry)
        stream.write(struct.pack(">Q", 0x123400))  # not aligned to a cluster
    with open_disk(path, "old") as old, open_disk(path) as new:
        found = list(compare(old, new))
    assert [(item.offset, item.length, item.change) for item in found] == [
        (0, 64 << 10, Change.CHANGED),
        (64 << 10, 64 << 10, Change.UNREADABLE),
        (128 << 10, 128 << 10, Change.CHANGED),
    ]
    assert "unaligned" in found[1].note


@qemu.requires_qemu
def test_two_files_with_the_same_bytes_do_not_differ(make_image: Callable[..., Path], tmp_path: Path) -> None:
    path = make_image("disk.qcow2", "1M", "write -P 1 64k 64k", "write -P 2 300k 5k")
    packed = tmp_path / "packed.qcow2"
    qemu.convert(path, packed, target_format="qcow2", compressed=True)
    with open_disk(path) as one, open_disk(packed) as two:
        assert list(compare(one, two)) == []


@qemu.requires_qemu
def test_states_of_an_encrypted_disk_compare_after_unlocking(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    path = qemu.create(tmp_path / "aes.qcow2", "1M", secret="pw", encrypt={"format": "aes"})
    qemu.io(path, "write -P 1 0 128k", secret="pw")
    qemu.snapshot(path, "old", secret="pw")
    qemu.io(path, "write -P 2 1k 512", secret="pw")
    with open_disk(path, "old", passphrase="pw") as old, open_disk(path, passphrase="pw") as new:
        assert list(compare(old, new)) == [Difference(1024, 512, Change.CHANGED)]


def test_unequal_sectors_are_runs_of_whole_sectors() -> None:
    left = bytes(16 * SECTOR)
    right = bytearray(left)
    right[0] = 1
    right[7 * SECTOR + 511] = 1
    right[8 * SECTOR] = 1
    right[16 * SECTOR - 1] = 1
    found = list(unequal_sectors(left, bytes(right)))
    assert found == [(0, 512), (7 * SECTOR, 9 * SECTOR), (15 * SECTOR, 16 * SECTOR)]


@pytest.mark.slow
def test_differences_of_the_case_are_those_of_the_raw_exports(evidence: EvidenceCase) -> None:
    qemu.need()
    states = ["before-incident", "during-incident", None]
    truth = {name: qemu.raw_bytes(evidence.image, snapshot=name) for name in states}
    for first, second in ((0, 1), (0, 2), (1, 2), (2, 0)):
        one, two = states[first], states[second]
        with open_disk(evidence.image, one) as before, open_disk(evidence.image, two) as after:
            found = list(compare(before, after))
        assert found
        assert merged(found) == unequal_ranges(truth[one], truth[two])


# --- states that only look alike ------------------------------------------------------------------


def _over_one_data_file(folder: Path, **fields: Any) -> tuple[Path, Path]:
    """Two images with tables at the same places over one data file: only the first maps its cluster 0."""
    (folder / "d.raw").write_bytes(b"D" * (4 << 16))
    paths = folder / "one.qcow2", folder / "other.qcow2"
    for path, entry in zip(paths, (COPIED, 0), strict=True):
        builder = Builder(size=4 << 16, incompatible=4, extensions=[(EXT_DATA_FILE, b"d.raw")], **fields)
        builder.entry(0, entry).entry(1 << 16, 1 << 16 | COPIED).write(path)
    return paths


def test_two_images_over_one_data_file_differ_where_their_tables_do(tmp_path: Path) -> None:
    one, other = _over_one_data_file(tmp_path)
    with open_disk(one) as before, open_disk(other) as after:
        assert list(compare(before, after)) == [Difference(0, 1 << 16, Change.ZEROED)]


def test_an_overlay_differs_from_an_image_that_only_shares_the_data_file_of_its_backing_file(tmp_path: Path) -> None:
    one, other = _over_one_data_file(tmp_path)
    overlay = Builder(size=4 << 16, backing=one.name.encode(), extensions=[(EXT_BACKING_FORMAT, b"qcow2")])
    with open_disk(other) as before, open_disk(overlay.write(tmp_path / "overlay.qcow2")) as after:
        assert list(compare(before, after)) == [Difference(0, 1 << 16, Change.WRITTEN)]


def test_two_encrypted_images_over_one_data_file_have_keys_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography is absent")
    one, other = _over_one_data_file(tmp_path, crypt_method=1)
    with open_disk(one, passphrase="a") as before, open_disk(other, passphrase="b") as after:
        assert list(compare(before, after)) == [
            Difference(0, 1 << 16, Change.ZEROED),
            Difference(1 << 16, 1 << 16, Change.CHANGED),
        ]


@pytest.mark.parametrize("shared", [True, False], ids=["one table", "two tables"])
def test_a_snapshot_whose_l1_table_is_shorter_than_its_disk_is_unreadable_from_there_on(
    shared: bool, tmp_path: Path
) -> None:
    span = 64 * SECTOR
    builder = Builder(cluster_bits=9, size=3 * span).data(0, b"A").data(span, b"B")
    l1 = builder.l1 if shared else builder.put(bytes(8))
    path = builder.snapshot(b"1", b"s", l1_offset=l1, l1_size=1).write(tmp_path / "disk.qcow2")
    reported: list[int] = []
    with open_disk(path, "1") as before, open_disk(path) as after:
        *first, last = compare(before, after, progress=reported.append)
    assert first == ([] if shared else [Difference(0, SECTOR, Change.WRITTEN)])
    assert (last.offset, last.end, last.change) == (span, 3 * span, Change.UNREADABLE)
    assert sum(reported) == 3 * span
    with open_disk(path, "1", eof="zeros") as before, open_disk(path, eof="zeros") as after:
        assert list(compare(before, after)) == [*first, Difference(span, SECTOR, Change.WRITTEN)]


def test_so_is_it_where_the_snapshot_is_the_backing_disk(tmp_path: Path) -> None:
    span = 64 * SECTOR
    builder = Builder(cluster_bits=9, size=3 * span)
    path = builder.snapshot(b"1", b"s", l1_offset=builder.l1, l1_size=1).write(tmp_path / "base.qcow2")
    overlay = Builder(cluster_bits=9, size=2 * span).data(span, b"A").write(tmp_path / "overlay.qcow2")
    with open_disk(path, "1") as base, open_image(overlay) as image, open_disk(path) as other:
        found = list(compare(other, Disk(image, backing=base)))
    assert [(item.offset, item.end, item.change) for item in found] == [
        (span, span + SECTOR, Change.WRITTEN),
        (span + SECTOR, 2 * span, Change.UNREADABLE),
        (2 * span, 3 * span, Change.REMOVED),
    ]


def test_a_missing_backing_file_is_not_the_zeros_it_is_taken_for_elsewhere(tmp_path: Path) -> None:
    path = Builder(size=4 << 16, backing=b"gone").data(0, b"A").write(tmp_path / "disk.qcow2")
    with open_disk(path, missing="raise") as before, open_disk(path, missing="zeros") as after:
        (found,) = compare(before, after)
    assert (found.offset, found.end, found.change) == (1 << 16, 4 << 16, Change.UNREADABLE)


def test_what_lies_past_the_end_of_the_file_is_not_the_zeros_it_is_taken_for_elsewhere(tmp_path: Path) -> None:
    path = Builder(size=4 << 16).entry(0, 1 << 40).write(tmp_path / "disk.qcow2")
    with open_disk(path) as before, open_disk(path, eof="zeros") as after:
        (found,) = compare(before, after)
    assert (found.offset, found.end, found.change) == (0, 1 << 16, Change.UNREADABLE)
