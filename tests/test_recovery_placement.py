"""L2 tables find their places: by what file systems record and use, in disks with gaps, after every kind of loss.

File systems are made by mke2fs, mkntfs and mkfs.xfs, images by qemu-img; the raw disk is the oracle. The damage is done by
raw byte writes. ``tools/recovery_trial.py`` does the same to hundreds of images.
"""

from __future__ import annotations

import itertools
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_forensics.recovery import Confidence, RecoveredState, confidence_of, recovered_states
from qcow2_forensics.recovery.alignment import chances, clear_slots, rising
from qcow2_forensics.recovery.allocation import FREE, UNKNOWN, USED, PlacedDisk, VolumeMap, cluster_use
from qcow2_forensics.recovery.ext_volume import crc32c, ext_map
from qcow2_forensics.recovery.placement import slots_by_use
from qcow2_forensics.recovery.positions import FileSystems, empty, note_file_systems, positions
from tests import guest_disks, qemu, work
from tests.tiers import every, quick

OFFSETS = 0x00FF_FFFF_FFFF_FE00


def tree(folder: Path) -> Path:
    chance = random.Random(5)
    inside = folder / "tree"
    for number in range(24):
        where = inside / f"dir{number % 5}"
        where.mkdir(parents=True, exist_ok=True)
        (where / f"file{number}.bin").write_bytes(chance.randbytes(chance.choice([300, 9000, 150_000])))
    return inside


def ext4(folder: Path) -> Path:
    qemu.need("mke2fs")
    disk = folder / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(160 << 20)
    qemu.run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree(folder), disk)
    return disk


def ntfs(folder: Path) -> Path:
    qemu.need("mkntfs")
    disk = folder / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(48 << 20)
    qemu.run("mkntfs", "-q", "-F", "-Q", "-s", "512", disk)
    for file_ in sorted(tree(folder).rglob("*.bin")):
        qemu.run("ntfscp", "-q", "-f", disk, file_, file_.name)
    return disk


def xfs(folder: Path) -> Path:
    qemu.need("mkfs.xfs")
    lines = ["/dev/null", "0 0", "d--755 0 0"]
    lines += [f"{path.name} ---644 0 0 {path}" for path in sorted(tree(folder).rglob("*.bin"))]
    (folder / "proto").write_text("\n".join([*lines, "$", ""]))
    disk = folder / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(320 << 20)
    qemu.run("mkfs.xfs", "-q", "-f", "-p", folder / "proto", disk)
    return disk


def image_of(disk: Path, options: str, *, compress: bool = False) -> bytearray:
    path = disk.with_suffix(".qcow2")
    qemu.img("convert", "-O", "qcow2", *(["-c"] if compress else []), "-o", options, disk, path)
    return bytearray(path.read_bytes())


def l1_of(data: bytearray) -> tuple[int, list[int]]:
    size, offset = struct.unpack_from(">IQ", data, 36)
    return offset, [entry & OFFSETS for entry in struct.unpack_from(f">{size}Q", data, offset)]


def without_l1(data: bytearray) -> bytes:
    offset, entries = l1_of(data)
    data[offset : offset + 8 * len(entries)] = bytes(8 * len(entries))
    return bytes(data)


def best(data: bytes, folder: Path, **options: int) -> RecoveredState:
    path = folder / "damaged.bin"
    path.write_bytes(data)
    return recovered_states(path, **options)[0]


def wrong_bytes(state: RecoveredState, disk: Path) -> dict[str, int]:
    """Return how many bytes differ from those of the disk, by confidence."""
    counts = dict.fromkeys(("certain", "likely", "guess"), 0)
    with state.open() as opened, disk.open("rb") as raw:
        for piece in confidence_of(opened):
            for at in range(piece.offset, piece.offset + piece.length, 16 << 20):
                length = min(16 << 20, piece.offset + piece.length - at)
                raw.seek(at)
                found = np.frombuffer(opened.read(at, length), np.uint8)
                wrong = int((found != np.frombuffer(raw.read(length), np.uint8)).sum())
                counts[piece.confidence.label] += wrong
    return counts


RIGHT = {"certain": 0, "likely": 0, "guess": 0}


@pytest.mark.parametrize(
    ("make", "compress"),
    quick(
        [(make, compress) for make in (ext4, ntfs, xfs) for compress in (False, True)],
        [(ext4, True), (ntfs, False)],
        unpack=True,
    ),
)
def test_tables_of_a_disk_with_gaps_find_their_places(
    make: Callable[[Path], Path], compress: bool, tmp_path: Path
) -> None:
    disk = make(tmp_path)
    data = image_of(disk, "cluster_size=4096", compress=compress)
    used = [slot for slot, host in enumerate(l1_of(data)[1]) if host]
    assert used != list(range(len(used)))  # there are gaps
    assert wrong_bytes(best(without_l1(data), tmp_path), disk) == RIGHT


@pytest.mark.slow
def test_tables_of_alike_file_systems_in_several_partitions_find_their_places(tmp_path: Path) -> None:
    """What records its position counts from the start of its file system, so that it agrees with a slot of each."""
    qemu.need("mke2fs")
    parts = []
    for number in range(3):
        parts.append(tmp_path / f"part{number}.raw")
        with parts[-1].open("wb") as file:
            file.truncate(80 << 20)
        files = tree(tmp_path / f"files{number}")
        qemu.run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-d", files, parts[-1])
    disk = tmp_path / "disk.raw"
    guest_disks.partitioned(disk, parts)
    data = image_of(disk, "cluster_size=4096")
    assert wrong_bytes(best(without_l1(data), tmp_path), disk) == RIGHT


def _mft_record(runs: bytes) -> bytes:
    """Return the record of an MFT, number 0, whose data has some packed runs."""
    record = bytearray(1024)
    struct.pack_into("<4sHHQHHHHII", record, 0, b"FILE", 48, 3, 0, 1, 1, 56, 1, 512, 1024)
    struct.pack_into("<IIB", record, 56, 0x80, 64 + len(runs), 1)
    struct.pack_into("<H", record, 56 + 32, 64)
    record[56 + 64 : 56 + 64 + len(runs)] = runs
    struct.pack_into("<I", record, 56 + 64 + len(runs), 0xFFFF_FFFF)
    record[510:512] = record[1022:1024] = record[48:50] = b"\x07\x00"
    return bytes(record)


def test_file_records_of_a_fragmented_mft_are_placed_by_its_runs() -> None:
    boot = bytearray(512)
    boot[3:11], boot[510:512] = b"NTFS    ", b"\x55\xaa"
    struct.pack_into("<HB", boot, 11, 512, 8)  # clusters of 4 KiB
    struct.pack_into("<Qb", boot, 48, 4, 0)
    boot[64] = 0xF6  # records of 1 KiB
    record = bytearray(512)
    record[:4] = b"FILE"

    def belongs(known: FileSystems, number: int) -> list[int]:
        record[0x2C:0x30] = number.to_bytes(4, "little")
        return [position.belongs for position in positions(known, 0, bytes(record))]

    known = empty()
    note_file_systems(known, bytes(boot))
    assert belongs(known, 70) == [4 * 4096 + 70 * 1024]  # nothing is known of its runs
    fragmented = b"\x11\x10\x04" + b"\x21\x08\x00\x20"  # 16 clusters from 4 on, 8 from 0x2004 on
    note_file_systems(known, _mft_record(fragmented))
    assert belongs(known, 10) == [4 * 4096 + 10 * 1024]
    assert belongs(known, 70) == [0x2004 * 4096 + 6 * 1024]
    assert belongs(known, 96) == []  # past its end


def wrong_placements(data: bytes, true: dict[int, int], folder: Path) -> list[tuple[int, str]]:
    """Return the slot and reason of tables that are placed as likely or certain where they do not belong."""
    state = best(data, folder)
    return [
        (placed.slot, placed.reason)
        for placed in state.placements
        if placed.confidence > Confidence.GUESS and true.get(placed.offset) != placed.slot
    ]


@pytest.mark.parametrize("make", every(2, [ext4, ntfs]))
@pytest.mark.parametrize("which", [slice(0, 4), pytest.param(slice(4, None), marks=pytest.mark.slow)])
def test_a_clone_never_takes_the_place_of_a_lost_table_as_likely(
    make: Callable[[Path], Path], which: slice, tmp_path: Path
) -> None:
    """Of two partitions that are copies of each other one L2 table is lost with the L1 table: its copy fits as well."""
    part = make(tmp_path)
    disk = tmp_path / "both.raw"
    guest_disks.partitioned(disk, [part, part])
    whole = image_of(disk, "cluster_size=4096")
    true = {host: slot for slot, host in enumerate(l1_of(whole)[1]) if host}
    data = without_l1(whole)
    half = [host for host, slot in true.items() if slot * (2 << 20) < part.stat().st_size]
    assert len(half) >= 5
    for host in half[which]:
        damaged = bytearray(data)
        damaged[host : host + 4096] = bytes(4096)
        assert wrong_placements(bytes(damaged), true, tmp_path) == [], f"slot {true[host]} is lost"


@pytest.mark.slow
def test_where_file_systems_start_is_a_guess_without_a_partition_table_and_a_size_that_fits(tmp_path: Path) -> None:
    """A file system that starts where a table does may be a partition, whose disk lost the table of its start."""
    part = ext4(tmp_path)
    disk = tmp_path / "behind.raw"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(64 << 20)
        file.write(part.read_bytes())
    data = image_of(disk, "cluster_size=4096")
    true = {host: slot for slot, host in enumerate(l1_of(data)[1]) if host}
    assert min(true.values()) == 32  # the partition table was in a table that is lost
    assert wrong_placements(without_l1(data), true, tmp_path) == []
    assert best(without_l1(image_of(part, "cluster_size=4096")), tmp_path).confidence is Confidence.LIKELY


def test_the_size_of_a_disk_without_header_and_l1_table_is_that_of_its_file_system(tmp_path: Path) -> None:
    disk = ext4(tmp_path)
    data = bytearray(without_l1(image_of(disk, "cluster_size=4096")))
    data[:4096] = random.Random(2).randbytes(4096)
    state = best(bytes(data), tmp_path)
    assert (state.size, state.size_from) == (disk.stat().st_size, "the ext file system")
    assert wrong_bytes(state, disk) == RIGHT


@pytest.mark.parametrize("options", every(2, ["cluster_size=16384,extended_l2=on", "cluster_size=512"]))
def test_an_l1_table_with_gaps_is_found_without_a_header(options: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        for at in (0, 33 << 20, 97 << 20):  # L1 clusters between them are zeros; the second slot is odd
            file.seek(at)
            file.write(random.Random(at).randbytes(1 << 20))
        file.truncate(128 << 20)
    data = image_of(disk, options)
    size = int(re.findall(r"\d+", options)[0])
    data[:size] = random.Random(3).randbytes(size)
    state = best(bytes(data), tmp_path, virtual_size=128 << 20)
    assert wrong_bytes(state, disk) == RIGHT


@pytest.mark.parametrize("loss", [bytes, random.Random(4).randbytes])
def test_a_lost_l2_table_costs_no_certain_byte_and_its_clusters_are_guessed(
    loss: Callable[[int], bytes], tmp_path: Path
) -> None:
    disk = ext4(tmp_path)
    data = image_of(disk, "cluster_size=4096")
    hosts = [host for host in l1_of(data)[1] if host]
    data[hosts[2] : hosts[2] + 4096] = loss(4096)
    state = best(bytes(data), tmp_path)
    assert "1 of its L2 tables lost" in state.what
    assert wrong_bytes(state, disk) == RIGHT
    assert state.tables_by_confidence()[Confidence.GUESS] == 1
    assert state.tables_by_confidence()[Confidence.CERTAIN] == len(hosts) - 1


def test_a_table_of_zeros_is_not_called_certain_while_clusters_have_no_owner(tmp_path: Path) -> None:
    """An aged image keeps the clusters of a table far from it: none of them follow it in the file."""
    path = qemu.create(tmp_path / "aged.qcow2", "8M", cluster_size="4096")
    qemu.io(path, "write -P 1 0 4k", "write -P 2 4M 1M", "write -P 3 64k 1M")
    raw = tmp_path / "disk.raw"
    qemu.img("convert", "-O", "raw", path, raw)
    data = bytearray(path.read_bytes())
    host = l1_of(data)[1][0]
    data[host : host + 4096] = bytes(4096)
    state = best(bytes(data), tmp_path)
    assert wrong_bytes(state, raw)["certain"] == 0


@pytest.mark.slow
def test_the_active_state_comes_before_those_of_snapshots_whose_l1_tables_are_whole(tmp_path: Path) -> None:
    disk = ext4(tmp_path)
    image_of(disk, "cluster_size=4096")
    path = disk.with_suffix(".qcow2")
    qemu.snapshot(path, "before")
    qemu.io(path, "write -P 7 1M 1M")
    raw = tmp_path / "active.raw"
    qemu.img("convert", "-O", "raw", path, raw)
    data = bytearray(without_l1(bytearray(path.read_bytes())))
    data[:4096] = bytes(4096)
    path = tmp_path / "damaged.bin"
    path.write_bytes(data)
    first, second = recovered_states(path)[:2]
    assert wrong_bytes(first, raw) == RIGHT
    assert "snapshot 1" in second.what
    assert wrong_bytes(second, disk) == RIGHT


# --- the parts -----------------------------------------------------------------------------------


class RawDisk(PlacedDisk):
    """A raw file in place of a disk whose tables are all placed."""

    def __init__(self, path: Path) -> None:
        super().__init__(SimpleNamespace(file_size=path.stat().st_size), {}, 1)  # type: ignore[arg-type]
        self._data = path.read_bytes()

    def read(self, offset: int, length: int) -> bytes | None:
        data = self._data[offset : offset + length]
        return data if len(data) == length else None


def test_blocks_in_use_are_those_that_dumpe2fs_does_not_list_as_free(tmp_path: Path) -> None:
    disk = ext4(tmp_path)
    volume = ext_map(RawDisk(disk), 0)
    assert volume is not None
    listed = qemu.run("dumpe2fs", disk).stdout.decode()
    free: set[int] = set()
    for line in re.findall(r"^  Free blocks: (.*)$", listed, re.MULTILINE):
        for part in filter(None, line.split(", ")):
            first, _, last = part.partition("-")
            free.update(range(int(first), int(last or first) + 1))
    known = np.flatnonzero(volume.bits >= 0)
    assert len(known) > len(volume.bits) // 2
    assert {int(block) for block in known if volume.bits[block] != USED} <= free
    assert not free & {int(block) for block in known if volume.bits[block] == USED}


def test_the_checksum_is_that_of_the_specification() -> None:
    assert crc32c(0xFFFF_FFFF, b"123456789") ^ 0xFFFF_FFFF == 0xE306_9283


@given(st.integers(1, 4), st.integers(0, 3), st.randoms(use_true_random=False))
def test_a_rising_arrangement_is_the_best_there_is(tables: int, more: int, chance: random.Random) -> None:
    slots = tables + more
    scores = np.array([[chance.randint(-9, 9) for _ in range(slots)] for _ in range(tables)], np.float64)
    found = rising(scores)
    assert found is not None
    assert found == sorted(set(found))
    total = sum(scores[at, slot] for at, slot in enumerate(found))
    assert total == max(
        sum(scores[at, slot] for at, slot in enumerate(chosen))
        for chosen in itertools.combinations(range(slots), tables)
    )


@given(st.integers(1, 4), st.integers(0, 3))
def test_where_nothing_distinguishes_slots_tables_take_the_first_ones(tables: int, more: int) -> None:
    assert rising(np.full((tables, tables + more), 3.0)) == list(range(tables))


@pytest.mark.slow
def test_no_table_of_an_ntfs_volume_in_clusters_of_a_sector_is_lost(tmp_path: Path) -> None:
    """Second halves of file records look like L2 tables, so that the table over them looks like an L1 table."""
    disk = ntfs(tmp_path)
    data = without_l1(image_of(disk, "cluster_size=512"))
    assert wrong_bytes(best(data, tmp_path), disk) == RIGHT
    # Without the header the refcounts are found, which say that the first refcount table is in use no more.
    state = best(bytes(512) + data[512:], tmp_path, virtual_size=disk.stat().st_size)
    assert (wrong_bytes(state, disk), state.unplaced) == (RIGHT, ())


def test_a_table_gets_the_slot_that_fits_alone_and_no_two_the_same() -> None:
    assert clear_slots(np.array([[20.0, 0.0], [0.0, 20.0]])) == {0: 0, 1: 1}
    assert clear_slots(np.array([[20.0, 19.0], [0.0, 20.0]])) == {1: 1}
    assert clear_slots(np.array([[20.0, 0.0], [20.0, 0.0]])) == {}
    assert clear_slots(np.zeros((0, 4))) == {}


def test_clusters_of_deleted_files_make_free_clusters_say_little() -> None:
    stored = np.ones((4, 64), np.bool_)
    use = np.full((4, 64), FREE, np.int8)
    assert chances(stored, use)[FREE] > 0.8
    assert chances(stored[:0], use[:0])[FREE] < 0.1


def test_deleted_files_that_are_still_stored_do_not_move_tables_to_where_nothing_is_known() -> None:
    """Four tables store all of their clusters, of which half are free or all; positions say where the first and the last are."""
    stored = np.ones((4, 64), np.bool_)
    use = np.full((6, 64), UNKNOWN, np.int8)
    use[[1, 5], :32], use[[1, 5], 32:] = USED, FREE
    use[2], use[4] = FREE, USED
    votes = np.zeros((4, 6))
    votes[0, 1] = votes[3, 5] = 1e7
    assert slots_by_use(stored, use, votes, rising(votes)) == [1, 2, 4, 5]
    assert slots_by_use(stored[1:3], use[2:5], np.zeros((2, 3)), None) == [
        1,
        2,
    ]  # nothing says that free clusters are stored


def test_a_cluster_is_in_use_where_one_of_its_blocks_is_and_unknown_where_one_may_be() -> None:
    volume = VolumeMap(4096, 1024, np.zeros(12, np.int8))
    volume.bits[:] = [0, 0, 0, 0, 0, 1, 0, 0, 0, -1, 0, 0]
    assert cluster_use([volume], [0], 5 * 4096, 4096).tolist() == [[-1, 0, 1, -1, -1]]


@pytest.mark.slow
def test_a_file_of_crafted_tables_ends_within_the_budget(tmp_path: Path) -> None:
    """Every cluster is an L2 table that maps the first clusters: much to look at for few bytes."""
    cluster = 4096
    count = 400
    table = b"".join((place % 64 * cluster + cluster | 1 << 63).to_bytes(8, "big") for place in range(512))
    data = bytearray(table * count)
    data[4096 : 4096 + 12] = b"FILE" * 3
    path = tmp_path / "crafted.bin"
    path.write_bytes(data)
    with work.at_most(2_000_000):
        for state in recovered_states(path):
            with state.open() as disk:
                disk.read(0, 1 << 20)
