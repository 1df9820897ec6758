"""Volumes and files whose names are not their own: each is listed, none takes the place of another."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics import FileSource
from qcow2_forensics.cli import main
from qcow2_forensics.files.dfvfs_files import Scanned
from qcow2_forensics.files.records import Volume
from qcow2_forensics.files.tolerant import TolerantReader
from qcow2_forensics.files.volumes import _Finder, open_volumes
from qcow2_forensics.format import lvm
from qcow2_forensics.reader.disk import RawDisk
from tests import filesystems, guest_disks
from tests.filesystems import MIB
from tests.guest_disks import Group

pytest.importorskip("pytsk3", reason="pytsk3 is absent")


def diff(before: Path, after: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["diff", str(before), str(after), "--files", "--format", "json"])
    return code, json.loads(capsys.readouterr().out)


def changed(listed: dict[str, Any]) -> list[tuple[str, str]]:
    return [(item["change"], item["path"]) for item in listed["files"]]


def group_with_a_file(folder: Path) -> tuple[Group, Path]:
    """A group ``vg0`` with an ext4 file system in its volume ``root``, and that file system with a file removed."""
    folder.mkdir()
    made = guest_disks.group(folder, [24 * MIB])
    guest_disks.create_volume(made, "root", 12 * MIB)
    volume = filesystems.make(folder, "ext4")
    made.write("root", volume.path)
    volume.remove("small.txt")
    return made, volume.path


def test_volumes_of_one_name_are_numbered_in_linear_time(tmp_path: Path) -> None:
    class Counted(set[tuple[int, str]]):
        lookups = 0

        def __contains__(self, place: object) -> bool:
            self.lookups += 1
            return super().__contains__(place)

    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(512))
    finder = _Finder(TolerantReader(RawDisk(FileSource(disk))), (), lvm.Texts())
    places = finder._places = Counted()
    count = 2000
    named = [finder._own_place(Volume(0, 0, "", "", f"/g/v{taken}")).inside for taken in ("~3", *[""] * count)]
    assert len(set(named)) == count + 1
    assert named[1:5] == ["/g/v", "/g/v~2", "/g/v~4", "/g/v~5"]
    assert places.lookups < 3 * count


@pytest.mark.parametrize("number", [1, 2])
def test_groups_of_one_name_are_distinguished(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [group_with_a_file(tmp_path / name) for name in ("one", "two")]
    before, after = tmp_path / "before.raw", tmp_path / "after.raw"
    for disk in (before, after):
        guest_disks.partitioned(disk, [group.devices[0] for group, _ in made])
        group, edited = made[number - 1]
        group.write("root", edited)
    code, listed = diff(before, after, capsys)
    assert code == 0
    assert ("removed", f"/p{number}/vg0/root/small.txt") in changed(listed)
    assert {item["path"].split("/")[1] for item in listed["files"]} == {f"p{number}"}


@pytest.mark.parametrize("number", [1, 2])
def test_a_copy_of_a_physical_volume_is_named(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group, edited = group_with_a_file(tmp_path / "one")
    device = group.devices[0]
    copy = tmp_path / "copy.raw"
    shutil.copyfile(device, copy)
    before, after = tmp_path / "before.raw", tmp_path / "after.raw"
    guest_disks.partitioned(before, [device, copy])
    group.write("root", edited)
    guest_disks.partitioned(after, [device, copy] if number == 1 else [copy, device])
    code, listed = diff(before, after, capsys)
    if number == 1:
        assert (code, ("removed", "/p1/vg0/root/small.txt") in changed(listed)) == (0, True)
    else:
        assert (code, changed(listed)) == (2, [])
    (unread,) = [item for item in listed["volumes"] if not item["read"]]
    assert unread["path"] == "/p2"
    assert "is that of another physical volume of this disk" in unread["why"]
    assert (unread["changed_bytes"] > 0) == (number == 2)


def test_short_fat_names_that_nobody_decodes_are_files_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names in a code page, as DOS writes them: The Sleuth Kit shows one sign for every letter that is not ASCII."""
    volume = filesystems.make(tmp_path, "fat12", populated=False)
    for name in ("X.TXT", "Y.TXT"):
        volume.put(name, b"content\n")
    before, after = tmp_path / "before.raw", tmp_path / "after.raw"
    data = volume.path.read_bytes()
    for old, new in ((b"X       TXT", b"\x8eB      TXT"), (b"Y       TXT", b"\x99B      TXT")):
        assert data.count(old) == 1
        data = data.replace(old, new)
    before.write_bytes(data)
    entry = data.index(b"\x99B      TXT")
    after.write_bytes(data[: entry + 28] + struct.pack("<I", 3) + data[entry + 32 :])
    code, listed = diff(before, after, capsys)
    assert code == 0
    (item,) = listed["files"]
    assert (item["change"], item["before"]["size"], item["after"]["size"]) == ("content changed", 8, 3)
    after.write_bytes(data[:entry] + b"\xe5" + data[entry + 1 :])
    _, listed = diff(before, after, capsys)
    assert [item["change"] for item in listed["files"]] == ["removed"]


def test_file_systems_of_one_container_have_places_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An APFS container holds several, as here the one that is found is given twice."""
    pytest.importorskip("dfvfs", reason="dfVFS is absent")
    volume = guest_disks.make(tmp_path, "xfs", 64 * MIB)
    scan = Scanned._scan

    def twice(self: Scanned, passphrases: tuple[bytes, ...]) -> None:
        scan(self, passphrases)
        self.specs *= 2

    monkeypatch.setattr(Scanned, "_scan", twice)
    found = open_volumes(RawDisk(FileSource(volume.path)), "the disk")
    assert [system.volume.prefix for system in found.systems] == ["", "~2"]
    assert len(found.spans) == 2


def test_a_partition_that_a_table_lists_twice_is_listed_once(tmp_path: Path) -> None:
    filesystems.need_tools("sfdisk")
    volume = filesystems.make(tmp_path, "ext4")
    disk, (offset,) = filesystems.disk_of(tmp_path, [volume])
    with disk.open("r+b") as stream:
        stream.seek(446)
        entry = stream.read(16)
        stream.write(entry)
    found = open_volumes(RawDisk(FileSource(disk)), "the disk")
    assert [(system.volume.number, system.volume.offset) for system in found.systems] == [(1, offset)]
    assert found.unread == []
