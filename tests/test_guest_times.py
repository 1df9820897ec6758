"""Times of files between 1901 and 2446: each as the kernel shows it, or reported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from qcow2_forensics import FileSource
from qcow2_forensics.cli import main
from qcow2_forensics.files.volumes import open_volumes
from qcow2_forensics.reader.disk import RawDisk
from tests import guest_disks, qemu
from tests.filesystems import MIB
from tests.guest_disks import Disk

pytest.importorskip("pytsk3", reason="pytsk3 is absent")

DATES = {  # seconds of the epoch
    "1902": -2_145_916_800,
    "1966": -122_000_000,
    "1969": -1,
    "1970": 1,
    "2009": 1_234_567_890,
    "2038": 2**31 + 5,
    "2106": 2**32 + 10,
    "round": 2**32,
    "2242": 2**33 + 5,
    "2400": 13_569_465_600,
}
KINDS = {
    "ext4": ("ext4", [], range(-(2**31), 2**34)),
    "ext4, 128 byte inodes": ("ext4", ["-I", "128"], range(-(2**31), 2**31)),
    "ext4, no checksums, 32 bit": ("ext4", ["-O", "^metadata_csum,^64bit"], range(-(2**31), 2**34)),
    "ntfs": ("ntfs", [], range(-(2**33), 2**36)),
    "xfs": ("xfs", ["-m", "bigtime=1"], range(-(2**31), 2**33 + 2**32)),
    "xfs, 32 bit": ("xfs", ["-m", "bigtime=0"], range(-(2**31), 2**31)),
}


def dated(folder: Path, kind: str, options: Sequence[str], kept: range) -> Disk:
    """A file system with a file for each date that it can keep."""

    def work(mounted: Path) -> None:
        for name, seconds in DATES.items():
            if seconds in kept:
                (mounted / name).write_bytes(b"content")
                # ntfs-3g itself shows a fraction before 1970 as more than a second.
                fraction = 0 if kind == "ntfs" else 700
                os.utime(mounted / name, ns=(seconds * 10**9 + fraction, seconds * 10**9 + fraction))

    return guest_disks.make(folder, kind, 64 * MIB if kind == "xfs" else 16 * MIB, options=options).change(work)


@pytest.mark.parametrize("kind", list(KINDS))
def test_times_are_those_of_the_kernel(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kind.startswith("xfs"):
        pytest.importorskip("dfvfs", reason="dfVFS is absent")
    disk = dated(tmp_path, *KINDS[kind])
    (system,) = open_volumes(RawDisk(FileSource(disk.path)), "the disk").systems
    times = {record.path: record.times for record in system.records() if record.path[1:] in DATES}
    with disk.mounted() as mounted:
        seen = {f"/{item.name}": item.stat() for item in os.scandir(mounted) if item.name in DATES}
    assert times.keys() == seen.keys()
    fraction = 10**9 if kind == "ext4, 128 byte inodes" else 1
    for path, item in seen.items():
        assert times[path].modified // fraction == item.st_mtime_ns // fraction, path
        assert times[path].accessed // fraction == item.st_atime_ns // fraction, path
        assert times[path].changed // fraction == item.st_ctime_ns // fraction, path
    assert not system.problems
    if not kind.startswith("xfs"):
        image = tmp_path / "disk.qcow2"
        qemu.img("convert", "-O", "qcow2", disk.path, image)
        capsys.readouterr()
        assert main(["timeline", str(image), "--format", "body"]) == 0
        rows = {line.split("|")[1].split("/")[-1]: line.split("|") for line in capsys.readouterr().out.splitlines()}
        assert {name: int(rows[name][8]) for name in DATES if f"/{name}" in seen} == {
            name: seconds for name, seconds in DATES.items() if f"/{name}" in seen
        }


@pytest.mark.parametrize("kind", ["ext4", "ntfs"])
def test_a_change_of_century_alone_is_a_difference(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Sleuth Kit shows both dates alike: by their low 32 bits, or not at all."""
    before = dated(tmp_path, *KINDS[kind])
    after = before.copy("after.raw")

    def set_back(mounted: Path) -> None:
        os.utime(mounted / "2106", (10, 10) if kind == "ext4" else (-(2**32), -(2**32)))

    after.change(set_back)
    capsys.readouterr()
    assert main(["diff", str(before.path), str(after.path), "--files"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "/2106" in line]
    assert line.startswith("metadata changed")
    assert "modified" in line


def test_times_that_cannot_be_looked_up_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = dated(tmp_path, *KINDS["ext4"])
    monkeypatch.setattr("qcow2_forensics.files.ext_inodes.ExtInodes._table", lambda *_: 0)
    (system,) = open_volumes(RawDisk(FileSource(disk.path)), "the disk").systems
    assert list(system.records())
    (problem,) = system.problems
    assert "dates before 1970 and after 2038 may be missing or wrong" in problem
    assert not system.is_incomplete


def test_an_xfs_time_that_cannot_be_looked_up_is_reported_and_the_listing_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dfvfs", reason="dfVFS is absent")
    disk = dated(tmp_path, *KINDS["xfs, 32 bit"])

    def broken(*_: object) -> None:
        raise OSError("inode 7 is not where it belongs")

    monkeypatch.setattr("qcow2_forensics.files.dfvfs_files.stored_times", broken)
    (system,) = open_volumes(RawDisk(FileSource(disk.path)), "the disk").systems
    assert {record.path for record in system.records()} == {"/1902", "/1966", "/1969", "/1970", "/2009"}
    assert len(system.problems) == 3
    assert all("dates before 1970 may be two seconds early" in problem for problem in system.problems)
