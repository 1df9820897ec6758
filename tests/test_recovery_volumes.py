"""L2 tables find their places under volumes inside partitions: logical partitions, mirrors, LVM2, and one in the other.

Partition tables are made by sfdisk, physical and logical volumes by LVM's own tools, file systems by mke2fs; the raw disk is the
oracle. Superblocks of a RAID are written here after the layout in the kernel's headers, and blkid has to recognise them.
"""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_forensics.format.lvm import Segment
from qcow2_forensics.limits import Budget
from qcow2_forensics.recovery import Confidence
from qcow2_forensics.recovery.volumes import Holds, VolumeBytes, pieces_of, volumes_of
from tests import guest_disks, qemu
from tests.filesystems import MIB, SECTOR, need_tools
from tests.test_hostile_volumes import _group, _linear, _physical
from tests.test_recovery_placement import (
    RIGHT,
    RawDisk,
    best,
    image_of,
    l1_of,
    without_l1,
    wrong_bytes,
    wrong_placements,
)

LVM_TYPE = "E6D6D379-F507-44C2-A23C-238F2A3DF928"


def ext4(folder: Path, name: str, size: int) -> Path:
    qemu.need("mke2fs")
    path, inside = folder / name, folder / f"{name}.files"
    chance = random.Random(name)
    for number in range(24):
        where = inside / f"folder{number % 4}"
        where.mkdir(parents=True, exist_ok=True)
        (where / f"file{number}").write_bytes(chance.randbytes(chance.choice([300, 9000, 150_000, 700_000])))
    with path.open("wb") as file:
        file.truncate(size)
    qemu.run("mke2fs", "-q", "-F", "-t", "ext4", "-d", inside, path)
    return path


def put(content: Path, disk: Path, at: int) -> None:
    qemu.run("dd", f"if={content}", f"of={disk}", "bs=1M", f"seek={at // MIB}", "conv=notrunc,sparse", "status=none")


def grown_group(folder: Path) -> guest_disks.Group:
    """A group with a volume in two pieces, one behind the other's."""
    made = guest_disks.group(folder, [200 * MIB])
    guest_disks.create_volume(made, "root", 60 * MIB)
    guest_disks.create_volume(made, "home", 40 * MIB)
    made.lvm(["lvextend", "-q", "-L", f"{96 * MIB}b", "vg0/root"])
    assert len(made.extents("root")) == 2
    for name, size in (("root", 96), ("home", 40)):
        made.write(name, ext4(folder, name, size * MIB))
    return made


def lvm(folder: Path) -> Path:
    disk = folder / "lvm.raw"
    parts = [ext4(folder, "boot", 16 * MIB), *grown_group(folder).devices]
    guest_disks.partitioned(disk, parts, ["linux", LVM_TYPE])
    return disk


def logical(folder: Path) -> Path:
    """A primary partition, and an extended one with three in it."""
    need_tools("sfdisk")
    disk = folder / "logical.raw"
    parts = [ext4(folder, f"part{number}", size * MIB) for number, size in enumerate((24, 40, 24, 32))]
    lines = ["label: dos", "start=1MiB, size=24MiB, type=83", "start=26MiB, size=102MiB, type=5"]
    starts = [1, *(at := 27, at + 41, at + 66)]
    lines += [
        f"start={start}MiB, size={part.stat().st_size // SECTOR}, type=83"
        for start, part in zip(starts[1:], parts[1:], strict=True)
    ]
    with disk.open("wb") as file:
        file.truncate(130 * MIB)
    subprocess.run(["sfdisk", "-q", disk], input="\n".join(lines).encode(), check=True, capture_output=True)
    for start, part in zip(starts, parts, strict=True):
        put(part, disk, start * MIB)
    return disk


def member(folder: Path, content: Path, data: int) -> Path:
    """A member of a mirror, version 1.2, whose data starts at ``data``."""
    need_tools("blkid")
    path = folder / f"{content.name}.member"
    length = content.stat().st_size
    with path.open("wb") as file:
        file.truncate(data + length)
    put(content, path, data)
    block = bytearray(258)
    struct.pack_into("<II8x16s32s", block, 0, 0xA92B4EFC, 1, b"S" * 16, b"host:0")
    struct.pack_into("<IIQII", block, 72, 1, 0, length // SECTOR, 0, 2)
    struct.pack_into("<QQQ", block, 128, data // SECTOR, length // SECTOR, 8)
    struct.pack_into("<I", block, 220, 1)
    total = sum(struct.unpack("<64IH", block))
    struct.pack_into("<I", block, 216, (total & 0xFFFF_FFFF) + (total >> 32) & 0xFFFF_FFFF)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(block)
    assert qemu.run("blkid", "-p", "-s", "TYPE", "-o", "value", path).stdout.decode().strip() == "linux_raid_member"
    return path


def mirrors(folder: Path) -> Path:
    disk = folder / "mirrors.raw"
    parts = [
        member(folder, ext4(folder, "boot", 32 * MIB), MIB),
        member(folder, ext4(folder, "root", 60 * MIB), 2 * MIB),
    ]
    guest_disks.partitioned(disk, parts)
    return disk


def lvm_on_a_mirror(folder: Path) -> Path:
    disk = folder / "both.raw"
    boot = ext4(folder, "boot", 16 * MIB)
    guest_disks.partitioned(disk, [boot, member(folder, grown_group(folder).devices[0], MIB)])
    return disk


@pytest.mark.parametrize("cluster", [4096, pytest.param(1024, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "make", [logical, mirrors, *(pytest.param(of, marks=pytest.mark.slow) for of in (lvm, lvm_on_a_mirror))]
)
def test_tables_of_a_converted_disk_with_volumes_inside_partitions_find_their_places(
    make: Callable[[Path], Path], cluster: int, tmp_path: Path
) -> None:
    disk = make(tmp_path)
    data = image_of(disk, f"cluster_size={cluster}")
    used = [slot for slot, host in enumerate(l1_of(data)[1]) if host]
    assert used != list(range(len(used)))  # there are gaps
    assert wrong_bytes(best(without_l1(data), tmp_path), disk) == RIGHT


@pytest.mark.slow
def test_nothing_is_likely_where_the_label_of_a_physical_volume_is_lost(tmp_path: Path) -> None:
    disk = lvm(tmp_path)
    data = image_of(disk, "cluster_size=4096")
    hosts = l1_of(data)[1]
    true = {host: slot for slot, host in enumerate(hosts) if host}
    host = hosts[17 * MIB // (2 * MIB)]
    data[host : host + 4096] = bytes(4096)
    damaged = without_l1(data)
    assert wrong_placements(damaged, true, tmp_path) == []
    likely = [p.reason for p in best(damaged, tmp_path).placements if p.confidence is Confidence.LIKELY]
    assert all("GPT header" in reason for reason in likely)


# --- the parts -----------------------------------------------------------------------------------


def volumes_in(data: bytes, folder: Path, first: list[VolumeBytes]) -> tuple[list[tuple[Segment, ...]], bool]:
    """Return the segments of the volumes found on a raw disk, without the ``first`` ones, and whether they are all."""
    path = folder / "raw"
    path.write_bytes(data)
    found = volumes_of(RawDisk(path), first)
    return [volume.segments for volume in found.found[len(first) :]], found.are_all


def test_a_position_in_a_volume_is_that_of_its_segment() -> None:
    volume = VolumeBytes((Segment(0, 10, 100), Segment(10, 10, 50)), 20)
    assert [volume.place(at) for at in (0, 9, 10, 19, 20)] == [100, 109, 50, 59, None]
    assert (volume.place(8, 2), volume.place(8, 3)) == (108, None)
    assert list(volume.runs(8, 5)) == [(108, 2), (50, 3)]
    assert list(volume.part([Segment(0, 4, 8)])) == [Segment(0, 2, 108), Segment(2, 2, 50)]


def test_a_logical_volume_in_two_pieces_is_both_of_them_on_the_disk(tmp_path: Path) -> None:
    pieces = (
        f'segment{number + 1}{{start_extent={number} extent_count=1 type="striped" stripe_count=1 stripes=["pv0",{at}]}}'
        for number, at in enumerate((9, 5))
    )
    data = _physical(_group(f'a{{status=["VISIBLE"] {" ".join(pieces)}}}'), size=64 * 1024)
    found = volumes_in(bytes(MIB) + data, tmp_path, [VolumeBytes.at(MIB, len(data))])
    extent = 8 * SECTOR
    assert found == ([(Segment(0, extent, MIB + 9 * extent), Segment(extent, extent, MIB + 5 * extent))], True)


def test_a_physical_volume_that_holds_itself_ends(tmp_path: Path) -> None:
    data = _physical(_group(_linear("a", 4)), size=64 * 1024)
    found, are_all = volumes_in(data, tmp_path, [VolumeBytes.at(0, len(data))])
    assert len(found) < 100
    assert not are_all


def test_pieces_of_volumes_inside_volumes_are_bounded() -> None:
    """Each of many segments is the whole of a volume in many pieces."""
    count = 1000
    below = VolumeBytes(tuple(Segment(n, 1, 2 * n) for n in range(count)), count)
    room = Budget.up_to("pieces", 10 * count)
    asked = (Segment(n * count, count, 0) for n in range(100))
    assert pieces_of(below, asked, room) == ()
    assert next(asked).start <= 12 * count * count
    assert pieces_of(below, [Segment(0, 2, 3)], Budget.up_to("pieces", 2)) == (Segment(0, 1, 6), Segment(1, 1, 8))


def test_a_chain_of_logical_partitions_that_leads_back_ends(tmp_path: Path) -> None:
    data = bytearray(MIB)
    for at, following in ((0, 200), (200, 0x10), (0x10, 200)):
        entry = struct.pack("<B3xB3xIIB3xB3xII", 0, 0x83, 1, 8, 0, 5, following, 16)
        data[at * SECTOR + 446 : at * SECTOR + 512] = entry + bytes(32) + b"\x55\xaa"
    found, _ = volumes_in(bytes(data), tmp_path, [VolumeBytes.at(0, MIB)._replace(holds=Holds.LOGICAL_PARTITIONS)])
    assert len(found) < 10


def test_volumes_that_are_not_read_leave_starts_unknown(tmp_path: Path) -> None:
    striped = 'a{status=["VISIBLE"] segment1{start_extent=0 extent_count=1 type="thin"}}'
    data = _physical(_group(striped), size=64 * 1024)
    assert volumes_in(data, tmp_path, [VolumeBytes.at(0, len(data))]) == ([], False)
    announced = VolumeBytes.at(0, MIB)._replace(holds_volumes=True)
    assert volumes_in(bytes(MIB), tmp_path, [announced]) == ([], False)
    assert volumes_in(b"XFSB" + bytes(MIB - 4), tmp_path, [announced]) == (
        [],
        True,
    )  # the superblock of its RAID is at the end
    assert volumes_in(bytes(MIB), tmp_path, [VolumeBytes.at(0, MIB)]) == ([], True)
