"""Files crafted to cost whoever looks for lost states in them: each ends in states or in a refusal, within a budget.

Bytes and reads are counted, not seconds. Without a budget, and with tables compared one with all others, each
of these files of a few megabytes took minutes or gigabytes.
"""

from __future__ import annotations

import os
import struct
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qcow2_forensics import errors
from qcow2_forensics.census import take_census
from qcow2_forensics.cli import main
from qcow2_forensics.format.image import Image
from qcow2_forensics.format.source import BytesSource
from qcow2_forensics.limits import DEFAULT_LIMITS, Budget, Limits
from qcow2_forensics.recovery import metered_source, recovered_states
from qcow2_forensics.recovery.allocation import PlacedDisk
from qcow2_forensics.recovery.ext_volume import ext_expected, ext_map
from qcow2_forensics.recovery.ntfs_volume import ntfs_map
from qcow2_forensics.recovery.placement import Unplaced, place
from qcow2_forensics.recovery.rebuilt_metadata import new_header
from qcow2_forensics.recovery.vm_states import vm_states
from qcow2_forensics.recovery.xfs_volume import xfs_map
from qcow2_forensics.residue.structure_detection import Geometry
from tests.image_builder import COPIED, Builder
from tests.test_work_budget import Counted
from tests.tiers import every

states_module = sys.modules[recovered_states.__module__]

KiB, MiB = 1 << 10, 1 << 20


def tables(count: int, flags: int) -> bytes:
    """Clusters of 512 bytes, each of which names 64 others, as an L1 table and an L2 table do."""
    numbers = np.arange(count, dtype=np.uint64)[:, np.newaxis] * np.uint64(64) + np.arange(64, dtype=np.uint64)
    return ((numbers % np.uint64(count) + np.uint64(1)) * np.uint64(512) | np.uint64(flags)).astype(">u8").tobytes()


def tables_without_a_header(folder: Path) -> Path:
    path = folder / "disk"
    path.write_bytes(bytes(512) + tables(1024, COPIED))
    return path


def tables_behind_an_image(folder: Path) -> Path:
    path = Builder(cluster_bits=9, size=MiB).data(0, b"x" * 512).write(folder / "disk")
    with path.open("ab") as file:
        file.write(bytes(-path.stat().st_size % 512) + tables(1024, 0))
    return path


def images_that_share_a_long_l1_table(folder: Path) -> Path:
    """A header every KiB, each with an L1 table of 2^20 entries that is the same bytes for all."""
    data = bytearray(16 * MiB)
    for at in range(KiB, MiB, KiB):
        header = new_header(cluster_bits=9, size=1 << 35, l1_size=1 << 20)
        data[at : at + len(header)] = header[:40] + (8 * MiB - at).to_bytes(8, "big") + header[48:]
    data[8 * MiB :] = (512 * 80).to_bytes(8, "big") * MiB
    path = folder / "disk"
    path.write_bytes(data)
    return path


def snapshot_tables_of_one_l2_table(folder: Path) -> Path:
    builder = Builder(cluster_bits=9, size=4096 * 64 * 512, l1_size=4096)
    table = builder.put(struct.pack(">64Q", *[0x200] * 64))
    base = builder.put(table.to_bytes(8, "big") * 64 * 500)
    for number in range(500):
        builder.snapshot(b"%d" % (number + 1), b"s", l1_offset=base + 512 * number, l1_size=64 * (500 - number))
    return builder.write(folder / "disk")


CRAFTED = [
    tables_without_a_header,
    tables_behind_an_image,
    images_that_share_a_long_l1_table,
    snapshot_tables_of_one_l2_table,
]


@pytest.mark.parametrize("make", every(2, CRAFTED), ids=lambda make: make.__name__)
def test_looking_for_states_reads_a_bounded_multiple_of_the_file_or_refuses(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metered_source, "DEFAULT_LIMITS", DEFAULT_LIMITS._replace(work_spare=MiB))
    source = Counted(make(tmp_path))
    placements = 0
    with suppress(errors.LimitExceeded):
        placements = sum(len(state.placements) for state in recovered_states(source))
    assert placements <= source.size // 512 + (1 << 18)
    assert source.bytes <= 20 * source.size + 65 * MiB
    assert source.reads <= (16 * source.size + MiB) // (8 * KiB)


def test_headers_that_share_a_long_l1_table_cost_memory_for_no_more_than_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = images_that_share_a_long_l1_table(tmp_path)
    monkeypatch.setattr(states_module, "RECOVERED_TABLES", (1 << 13) - path.stat().st_size // 512)
    tracemalloc.start()
    try:
        with pytest.raises(errors.LimitExceeded, match="L2 tables of recovered states"):
            recovered_states(path)
        assert tracemalloc.get_traced_memory()[1] < 24 * MiB
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_states_found_before_the_budget_is_used_up_are_listed_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = bytearray(images_that_share_a_long_l1_table(tmp_path).read_bytes())
    sound = Builder(cluster_bits=9, size=MiB).data(0, b"x" * 512).write(tmp_path / "sound").read_bytes()
    first = recovered_states(BytesSource(bytes(512) + sound))
    assert first[0].start == 512
    path = tmp_path / "both"
    path.write_bytes(bytes(512) + sound.ljust(MiB, b"\0") + bytes(data))
    states = recovered_states(path)
    assert states[0].start == 512
    assert all("were not looked for" in state.notes[-1] for state in states)
    assert not any(state.is_search_complete for state in states)
    assert "were not looked for" in caplog.text
    assert main(["snapshots", str(path), "--recovered"]) == 2


@pytest.mark.parametrize("heads", [16, 17])
def test_vm_states_beyond_the_limit_leave_the_search_incomplete(heads: int, tmp_path: Path) -> None:
    builder = Builder(cluster_bits=9, size=MiB).data(0, b"x" * 512)
    path = builder.write(tmp_path / "disk")
    with path.open("ab") as file:
        file.write((b"QEVM\0\0\0\3".ljust(512, b"\1")) * heads)
    states = recovered_states(path)
    assert len(states) == 16
    assert all(state.is_memory and state.is_search_complete == (heads == 16) for state in states)


def test_holes_of_a_sparse_file_are_not_read(tmp_path: Path) -> None:
    path = tables_behind_an_image(tmp_path)
    os.truncate(path, 8 << 40)
    path.write_bytes(bytes(512))
    os.truncate(path, 8 << 40)
    assert recovered_states(path) == []


def test_a_former_table_that_ends_before_it_begins_does_not_repeat_itself(tmp_path: Path) -> None:
    """Each table maps the state's first cluster last: its successor by the order of clusters is the table itself."""
    builder = Builder(cluster_bits=9, size=MiB).data(0, b"x" * 512)
    head = builder.put(b"QEVM\0\0\0\3".ljust(512, b"\1"))
    early = builder.l1
    found = [builder.put(struct.pack(">64Q", head, *[head + 512] * 62, early)) for _ in range(2)]
    with Image(builder.write(tmp_path / "disk")) as image:
        room = Budget("tables", 0, Limits(work_spare=100))
        (state,) = vm_states(image.source, Geometry.of(image), take_census(image), found, room)
    assert [placed.offset for placed in state.placements] == found[:1]


def test_a_table_that_shares_clusters_with_tables_of_one_slot_only_gets_it() -> None:
    shared, other = np.array([512, 1024, 0, 0], np.uint64), np.array([512, 4096, 0, 8192], np.uint64)
    mine = np.array([512, 1024, 0, 0], np.uint64)
    for known, slot in (({3: [shared, other]}, 3), ({3: [shared], 4: [other]}, None), ({5: [other[::-1]]}, None)):
        placed = place([Unplaced(99, mine, {})], known, 16, 512, ordered=False).placements
        assert [item.slot for item in placed] == ([] if slot is None else [slot])


# --- file systems on tables that are placed ------------------------------------------------------


class Crafted(PlacedDisk):
    """A disk of some bytes at some places, in a file of a megabyte; the rest repeats one cluster."""

    def __init__(self, places: dict[int, bytes], rest: bytes) -> None:
        super().__init__(SimpleNamespace(file_size=MiB), {0: 0}, 1 << 60)  # type: ignore[arg-type]
        self._places, self._rest = places, rest
        self.reads = 0

    def _disk(self, _slot: int) -> Crafted:  # type: ignore[override]
        return Crafted._Bytes(self)  # type: ignore[return-value]

    class _Bytes:
        def __init__(self, owner: Crafted) -> None:
            self._owner = owner

        def read(self, offset: int, length: int) -> bytes:
            self._owner.reads += 1
            for at, data in self._owner._places.items():
                if at <= offset < at + len(data):
                    return data[offset - at :][:length].ljust(length, b"\0")
            rest = self._owner._rest
            return (rest * (length // len(rest) + 1))[:length]


def superblock(blocks: int, per_group: int, inodes: int) -> bytes:
    """An ext superblock with metadata checksums in blocks of 4 KiB."""
    data = bytearray(1024)
    struct.pack_into("<I", data, 4, blocks)
    struct.pack_into("<III", data, 0x18, 2, 0, per_group)
    struct.pack_into("<I", data, 0x28, inodes)
    data[0x38:0x3A] = b"\x53\xef"
    struct.pack_into("<IH", data, 0x4C, 1, 0)
    struct.pack_into("<H", data, 0x58, 256)
    struct.pack_into("<I", data, 0x64, 0x400)
    return bytes(data)


def test_a_bitmap_of_an_ext_file_system_is_no_longer_than_its_block() -> None:
    disk = Crafted({1024: superblock(1 << 24, 1 << 24, 8192)}, bytes(range(1, 33)) * 128)
    assert ext_map(disk, 0) is None
    assert list(ext_expected(disk, 0)) == []


def test_the_maps_of_many_file_systems_share_one_allowance() -> None:
    places = {at + 1024: superblock(1 << 23, 32768, 8192) for at in range(0, 64 * MiB, MiB)}
    disk = Crafted(places, bytes(4096))
    maps = [ext_map(disk, at) for at in range(0, 64 * MiB, MiB)]
    assert sum(found.bits.nbytes for found in maps if found is not None) <= 1 << 24
    assert maps[0] is not None


def test_runs_of_an_ntfs_volume_that_overlap_are_no_volume() -> None:
    clusters = 1 << 20
    boot = bytearray(512)
    boot[3:11] = b"NTFS    "
    struct.pack_into("<HB", boot, 11, 512, 8)
    struct.pack_into("<QQ", boot, 40, clusters * 8, 4)
    boot[64] = 0xF6  # records of 1024 bytes
    record = bytearray(1024)
    record[:4] = b"FILE"
    struct.pack_into("<HH", record, 4, 48, 3)
    struct.pack_into("<HH", record, 20, 56, 1)
    runs = b"\x13" + (clusters - 1).to_bytes(3, "little") + b"\1"
    struct.pack_into("<IIB", record, 56, 0x80, 400, 1)
    struct.pack_into("<H", record, 56 + 32, 64)
    record[56 + 64 : 56 + 400] = (runs + b"\x13" + (clusters - 1).to_bytes(3, "little") + b"\0") * 33 + bytes(6)
    record[456:460] = b"\xff" * 4
    disk = Crafted({0: bytes(boot)}, bytes(record))
    assert ntfs_map(disk, 0) is None
    assert disk.reads < 1000


def test_a_tree_of_free_extents_that_names_its_blocks_again_is_no_tree() -> None:
    head = bytearray(512)
    head[:4] = b"XFSB"
    struct.pack_into(">IQ", head, 4, 4096, 1 << 22)
    struct.pack_into(">II", head, 84, 1 << 20, 4)
    struct.pack_into(">H", head, 102, 512)
    head[124] = 20
    group = bytearray(512)
    group[:4] = b"XAGF"
    struct.pack_into(">I", group, 16, 1)
    struct.pack_into(">I", group, 28, 1)
    node = b"AB3B" + struct.pack(">HH", 1, 300) + bytes(48) + struct.pack(">II", 1, 1) * 505
    disk = Crafted({0: bytes(head), 512: bytes(group)}, node.ljust(4096, b"\0"))
    volume = xfs_map(disk, 0)
    assert volume is not None
    assert (volume.bits[: 1 << 20] == -1).all()
    assert disk.reads < 1000
