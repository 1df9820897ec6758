"""Deleted files on NTFS, names that several records share, and folders that several names share."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics import FileSource
from qcow2_forensics.cli import main
from qcow2_forensics.files.lines import body_line, fls_line
from qcow2_forensics.files.protocol import FileSystem
from qcow2_forensics.files.sleuthkit import SleuthKitFileSystem
from qcow2_forensics.files.volumes import open_volumes
from qcow2_forensics.reader.disk import RawDisk
from tests import filesystems, guest_disks, qemu
from tests.guest_disks import MIB, Disk
from tests.tiers import quick

pytest.importorskip("pytsk3", reason="pytsk3 is absent")

pytestmark = pytest.mark.usefixtures("utc")


def system_of(path: Path) -> FileSystem:
    (system,) = open_volumes(RawDisk(FileSource(path)), "the disk").systems
    return system


def content(number: int) -> bytes:
    return random.Random(number).randbytes(100 + 137 * number)  # resident up to some 700 bytes


def populate(folder: Path) -> None:
    (folder / "folder").mkdir()
    for number in range(60):
        (folder / "folder" / f"A long file name {number}.txt").write_bytes(content(number))
    for number in range(10):
        (folder / f"file{number}.bin").write_bytes(content(number))
    os.link(folder / "file1.bin", folder / "folder" / "another name.bin")
    (folder / "file1.bin:hidden").write_bytes(b"a stream")


def remove(folder: Path) -> None:
    for path in sorted((folder / "folder").iterdir()):
        path.unlink()
    (folder / "folder").rmdir()
    (folder / "file3.bin").unlink()


@pytest.fixture
def ntfs(tmp_path: Path) -> tuple[Disk, Disk]:
    guest_disks.need_tools("ntfs-3g")
    one = guest_disks.make(tmp_path, "ntfs", 24 * MIB).change(populate)
    return one, one.copy("two.raw").change(remove)


def test_deleted_records_of_ntfs_are_listed_as_fls_does(ntfs: tuple[Disk, Disk]) -> None:
    for disk in ntfs:
        system = system_of(disk.path)
        listed = filesystems.sleuthkit("fls", disk.path, 0, "-r", "-p").splitlines()
        assert sorted(fls_line(record) for record in system.records()) == sorted(listed)
        assert not system.problems


def test_files_without_a_name_are_listed_as_fls_does_where_the_library_fails(
    tmp_path: Path,
) -> None:
    """A removed folder without content is one that some releases of The Sleuth Kit end in an error about."""

    def fill(folder: Path) -> None:
        (folder / "folder").mkdir()
        for number in range(30):
            (folder / "folder" / f"file {number}").write_bytes(content(number))

    def empty(folder: Path) -> None:
        for path in sorted((folder / "folder").iterdir()):
            path.unlink()
        (folder / "folder").rmdir()

    disk = guest_disks.make(tmp_path, "ext4", 16 * MIB).change(fill).change(empty)
    expected = sorted(filesystems.sleuthkit("fls", disk.path, 0, "-r", "-p").splitlines())
    assert sum("$OrphanFiles/" in line for line in expected) > 20
    system = system_of(disk.path)
    assert isinstance(system, SleuthKitFileSystem)
    handle = system.handle
    for wrapped in (handle, WithoutOrphans(handle)):
        system.handle = wrapped
        assert sorted(fls_line(record) for record in system.records()) == expected
    assert not system.is_incomplete


class WithoutOrphans:
    """A file system whose folder of orphans does not open."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def open_dir(self, inode: int) -> Any:
        if inode == self._handle.info.last_inum:
            raise OSError("unknown libtsk error")
        return self._handle.open_dir(inode=inode)


@pytest.mark.slow
def test_thousands_of_ntfs_records_are_those_of_fls(tmp_path: Path) -> None:
    guest_disks.need_tools("ntfs-3g")

    def many(folder: Path) -> None:
        for group in range(28):
            (folder / f"group {group}").mkdir()
            for number in range(100):
                (folder / f"group {group}" / f"a file with a long name {number}.dat").write_bytes(b"x" * number)

    disk = guest_disks.make(tmp_path, "ntfs", 32 * MIB).change(many)
    lines = [fls_line(record) for record in system_of(disk.path).records()]
    assert len(lines) > 2758
    assert sorted(lines) == sorted(filesystems.sleuthkit("fls", disk.path, 0, "-r", "-p").splitlines())


@qemu.requires_qemu
def test_the_content_of_a_removed_ntfs_folder_is_found(
    tmp_path: Path, ntfs: tuple[Disk, Disk], capsys: pytest.CaptureFixture[str]
) -> None:
    image = guest_disks.states(tmp_path / "disk.qcow2", [("old", ntfs[0].path), (None, ntfs[1].path)])
    assert main(["diff", str(image), "--files", "--hash", "--format", "json"]) == 0
    files = {item["path"]: item for item in json.loads(capsys.readouterr().out)["files"]}
    for number in range(60):
        item = files[f"/folder/A long file name {number}.txt"]
        digest = hashlib.sha256(content(number)).hexdigest()
        assert (item["change"], item["recoverable"]) == ("removed", "yes")
        assert (item["before"]["sha256"], item["after"]["sha256"]) == (digest, digest)
    assert main(["timeline", str(image), "--state", "active"]) == 0
    lines = capsys.readouterr().out.splitlines()
    dated = [line for line in lines if "/file3.bin (deleted)|" in line and line.split("|")[8] != "0"]
    assert len(dated) == 1


def test_a_record_that_is_used_again_is_not_given_to_the_old_name(ntfs: tuple[Disk, Disk]) -> None:
    def reuse(folder: Path) -> None:
        for number in range(80):
            (folder / f"new{number}").write_bytes(b"other content")

    disk = ntfs[1].copy("three.raw").change(reuse)
    used = {record.inode for record in system_of(disk.path).records() if record.path.startswith("/new")}
    old = [record for record in system_of(disk.path).records() if record.inode in used and not record.allocated]
    assert all(not record.has_metadata or record.in_use for record in old)


def test_each_ntfs_name_has_one_line_with_its_own_times(tmp_path: Path) -> None:
    guest_disks.need_tools("ntfs-3g")

    def names(folder: Path) -> None:
        (folder / "folder").mkdir()
        (folder / "A long file name.txt").write_bytes(b"x")
        os.setxattr(folder / "A long file name.txt", "system.ntfs_dos_name", b"ALONGF~1.TXT")
        time.sleep(0.05)
        os.link(folder / "A long file name.txt", folder / "folder" / "second name.txt")

    disk = guest_disks.make(tmp_path, "ntfs", 16 * MIB)
    try:
        disk.change(names)
    except OSError as error:
        pytest.skip(f"this ntfs-3g sets no short names: {error}")
    records = [item for item in system_of(disk.path).records(names=True) if item.path.endswith("name.txt")]
    of_names = {item.path: item for item in records if item.of_name}
    assert sorted(item.path for item in records if item.of_name) == ["/A long file name.txt", "/folder/second name.txt"]
    assert not [item for item in records if "~" in item.path]
    first, second = of_names.values()
    assert first.attribute != second.attribute
    assert len({body_line(item) for item in records}) == 4


@qemu.requires_qemu
@pytest.mark.parametrize("depth", quick([3, 18, 40], [3]))
def test_shared_folders_are_listed_within_a_bound_that_reports(tmp_path: Path, depth: int) -> None:
    disk = filesystems.make(tmp_path, "ext4", populated=False)
    folders = range(depth)
    disk.debugfs(
        *(f"mkdir d{number}" for number in folders),
        *(f"ln d{number + 1} d{number}/{name}" for number in folders[:-1] for name in "ab"),
        *(f"unlink d{number}" for number in folders[1:]),
    )
    system = system_of(disk.path)
    count = sum(1 for _ in system.records())
    assert system.is_incomplete == (depth > 12)
    if depth > 12:
        assert count < 12_000
        assert "folders listed before have further names" in system.problems[0]
    else:
        assert sum(1 for record in system.records() if record.path.endswith("/a")) == 2**depth // 2 - 1
