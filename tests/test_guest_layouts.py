"""Disks whose partition table does not lead to every volume: what could not be seen is neither removed nor free space.

The disks are made by sfdisk, mke2fs and debugfs; the damage is what wiping tools and failed installations leave.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qcow2_forensics import FileSource
from qcow2_forensics.cli import main
from qcow2_forensics.files.volumes import open_volumes
from qcow2_forensics.reader.disk import RawDisk
from tests import filesystems, guest_disks, qemu
from tests.filesystems import MIB, SECTOR
from tests.tiers import every

pytest.importorskip("pytsk3", reason="pytsk3 is absent")

SIZE = 36 * MIB
SECOND = 17 * MIB  # where the second file system begins
EXTENDED = 15 * MIB  # where the extended partition begins
TABLES = {
    "gpt": "label: gpt\nlabel-id: 9A4B2B4E-0D0C-4B6E-9C0F-0123456789AB\n"
    "start=1MiB, size=12MiB, uuid=9A4B2B4E-0D0C-4B6E-9C0F-0123456789AC\n"
    "start=17MiB, size=12MiB, uuid=9A4B2B4E-0D0C-4B6E-9C0F-0123456789AD\n",
    "mbr": "label: dos\nlabel-id: 0x12345678\n"
    "start=1MiB, size=12MiB, type=83\nstart=15MiB, type=5\nstart=17MiB, size=12MiB, type=83\n",
}


class States(NamedTuple):
    """The disk before and after a file of its second file system was removed."""

    before: Path
    after: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], States]:
    """Makes the disks of a kind once."""
    folder = tmp_path_factory.mktemp("disks")

    @functools.cache
    def make(kind: str) -> States:
        filesystems.need_tools("sfdisk", "debugfs")
        volume = filesystems.make(folder, "ext4", f"{kind}-volume.raw")
        changed = folder / f"{kind}-changed.raw"
        shutil.copyfile(volume.path, changed)
        qemu.run("debugfs", "-w", "-R", "rm small.txt", str(changed))
        found = States(folder / f"{kind}-before.raw", folder / f"{kind}-after.raw")
        for disk, second in zip(found, (volume.path, changed), strict=True):
            with disk.open("wb") as stream:
                stream.truncate(SIZE)
            qemu.run("sfdisk", "-q", disk, stdin=TABLES[kind].encode())
            for at, part in ((MIB, volume.path), (SECOND, second)):
                write(disk, at, part.read_bytes())
        return found

    return make


@pytest.fixture
def states(made: Callable[[str], States], tmp_path: Path) -> Callable[[str], States]:
    def copied(kind: str) -> States:
        found = States(tmp_path / "before.raw", tmp_path / "after.raw")
        for source, copy in zip(made(kind), found, strict=True):
            shutil.copyfile(source, copy)
        return found

    return copied


def write(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(data)


def clear(disk: Path, *ranges: tuple[int, int]) -> None:
    for at, length in ranges:
        write(disk, at, bytes(length))


COPY = (SIZE - SECTOR, SECTOR)  # the second header of a GPT
DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "the first MiB and the copy of the GPT are zeros": ("gpt", lambda disk: clear(disk, (0, MIB), COPY)),
    "both headers of the GPT are zeros": ("gpt", lambda disk: clear(disk, (SECTOR, SECTOR), COPY)),
    "the partition is in no table": ("gpt", lambda disk: qemu.run("sfdisk", "-q", "--delete", str(disk), "2")),
    "the extended table is zeros": ("mbr", lambda disk: clear(disk, (EXTENDED, SECTOR))),
    "the extended table is noise": (
        "mbr",
        lambda disk: write(disk, EXTENDED + 446, bytes(range(100, 164)) + b"\x55\xaa"),
    ),
}


def diff(states: States, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """What ``diff --files`` returns, lists as JSON, and prints as text."""
    command = ["diff", str(states.before), str(states.after), "--files"]
    code = main([*command, "--format", "json"])
    listed = json.loads(capsys.readouterr().out)
    assert main(command) == code
    return code, listed, capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "where"),
    every(2, [(damage, where) for damage in DAMAGE for where in ("after", "both", "before")], unpack=True),
)
def test_files_that_no_table_leads_to_are_not_compared(
    damage: str, where: str, states: Callable[[str], States], capsys: pytest.CaptureFixture[str]
) -> None:
    kind, spoil = DAMAGE[damage]
    disks = states(kind)
    for disk in {"before": disks[:1], "after": disks[1:], "both": disks}[where]:
        spoil(disk)
    code, listed, text = diff(disks, capsys)
    assert code == 2
    assert not [item["path"] for item in listed["files"] if item["change"] in ("added", "removed")]
    unread = [item for item in listed["volumes"] if not item["read"]]
    assert unread
    assert "its files are not listed" in text
    assert "\nno files differ\n" not in text
    summary = listed["summary"]
    assert summary["bytes_in_unread_volumes"] + summary["bytes_in_no_file"] <= summary["bytes"]
    assert summary["bytes_in_unread_volumes"] > 0


@pytest.mark.parametrize("damage", every(2, DAMAGE))
@qemu.requires_qemu
def test_a_timeline_that_may_lack_files_says_so(
    damage: str, states: Callable[[str], States], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, spoil = DAMAGE[damage]
    disk = states(kind).after
    image = tmp_path / "disk.qcow2"
    qemu.convert(disk, image, fmt="raw", target_format="qcow2")
    assert main(["timeline", str(image)]) == 0
    spoil(disk)
    qemu.convert(disk, image, fmt="raw", target_format="qcow2")
    capsys.readouterr()
    assert main(["timeline", str(image)]) == 2
    assert "are not listed" in capsys.readouterr().err


@pytest.mark.parametrize("kind", TABLES)
def test_gaps_that_hold_tables_or_nothing_are_no_volumes(
    kind: str, states: Callable[[str], States], capsys: pytest.CaptureFixture[str]
) -> None:
    code, listed, _ = diff(states(kind), capsys)
    assert code == 0
    assert [item["change"] for item in listed["files"] if item["change"] == "removed"] == ["removed"]
    found = open_volumes(RawDisk(FileSource(states(kind).after)), "the disk")
    assert [system.volume.prefix for system in found.systems] == ["/p1", "/p2"]
    assert all(item.blank for item in found.unread)


def test_the_copy_of_a_damaged_gpt_is_read(states: Callable[[str], States], capsys: pytest.CaptureFixture[str]) -> None:
    disks = states("gpt")
    sound = diff(disks, capsys)
    for disk in disks:
        write(disk, SECTOR, bytes(SECTOR))
    spoiled = diff(disks, capsys)
    assert spoiled[0] == 0
    assert spoiled[1]["files"] == sound[1]["files"] != []


def test_bytes_written_outside_the_partitions_are_in_no_free_space(
    states: Callable[[str], States], capsys: pytest.CaptureFixture[str]
) -> None:
    disks = states("gpt")
    shutil.copyfile(disks.before, disks.after)
    write(disks.after, 32 * MIB, b"hidden")
    code, listed, text = diff(disks, capsys)
    assert code == 2
    assert (listed["summary"]["bytes_in_unread_volumes"], listed["summary"]["bytes_in_no_file"]) == (512, 0)
    assert "no partition covers 0x1d00000 to 0x2300000 of the disk" in text


def test_files_under_new_swap_space_are_removed(
    states: Callable[[str], States], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filesystems.need_tools("mkswap")
    disks = states("gpt")
    swap = tmp_path / "swap"
    swap.write_bytes(bytes(12 * MIB))
    qemu.run("mkswap", "-q", str(swap))
    write(disks.after, SECOND, swap.read_bytes())
    code, listed, _ = diff(disks, capsys)
    assert code == 0
    removed = [item["path"] for item in listed["files"] if item["change"] == "removed"]
    before = open_volumes(RawDisk(FileSource(disks.before)), "the disk").systems[1]
    assert set(removed) == {record.full_path for record in before.records() if record.allocated and not record.virtual}


def test_a_volume_that_is_partly_on_another_disk_may_differ_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = guest_disks.group(tmp_path, [40 * MIB, 40 * MIB])
    guest_disks.create_volume(group, "near", 16 * MIB, "{0}")
    guest_disks.create_volume(group, "far", 24 * MIB, "{1}")
    group.write("near", filesystems.make(tmp_path, "ext4").path)
    copy = tmp_path / "copy.raw"
    shutil.copyfile(group.devices[0], copy)
    code, _, text = diff(States(group.devices[0], copy), capsys)
    assert code == 2
    assert "/vg0/far (LVM2): its files are not listed: part of it is on physical volume" in text
    assert "no files differ where files could be listed" in text


@pytest.mark.parametrize("kind", ["ext4", "fat12", "ntfs"])
def test_bytes_behind_a_file_system_are_in_no_free_space(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small file system at the start of a large partition: anything may follow it."""
    volume = filesystems.make(tmp_path, kind)
    end = volume.path.stat().st_size
    with volume.path.open("r+b") as stream:
        stream.truncate(end + 8 * MIB)
    before, _ = filesystems.disk_of(tmp_path, [volume])
    after = tmp_path / "after.raw"
    shutil.copyfile(before, after)
    assert open_volumes(RawDisk(FileSource(before)), "the disk").unread == []
    write(after, MIB + end + 3 * MIB, b"hidden")
    code, listed, text = diff(States(before, after), capsys)
    assert code == 2
    assert (listed["summary"]["bytes_in_unread_volumes"], listed["summary"]["bytes_in_no_file"]) == (512, 0)
    assert f"the file system ends at {end:#x} of {end + 8 * MIB:#x} bytes of its volume" in text or kind == "ntfs"
    assert "/p1/behind (unknown)" in text
