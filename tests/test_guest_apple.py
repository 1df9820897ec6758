"""HFS+ and APFS as macOS made them: the small disks among the test files of dfVFS, which are not part of this project.

``QCOW2_DFVFS_TEST_DATA`` names the folder ``test_data`` of a checkout of dfVFS. What is changed are bytes at known places.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics import FileSource
from qcow2_forensics.cli import main
from qcow2_forensics.files.records import FileRecord
from qcow2_forensics.files.volumes import open_volumes
from qcow2_forensics.reader.disk import RawDisk

pytest.importorskip("pytsk3", reason="pytsk3 is absent")
pytest.importorskip("dfvfs", reason="dfVFS is absent")

NAMES = {
    "/a_directory",
    "/a_directory/a_file",
    "/a_directory/a_resourcefork",
    "/a_directory/a_resourcefork:rsrc",
    "/a_directory/another_file",
    "/a_link",
    "/passwords.txt",
}
FORK = b"My resource fork\n"


@pytest.fixture(params=["hfsplus.raw", "apfs.raw"])
def disk(request: pytest.FixtureRequest) -> Path:
    folder = os.environ.get("QCOW2_DFVFS_TEST_DATA")
    if not folder:
        pytest.skip("disks of macOS are absent: set QCOW2_DFVFS_TEST_DATA to test_data of dfVFS")
    return Path(folder) / request.param


def records(path: Path) -> dict[str, tuple[FileRecord, str]]:
    (system,) = open_volumes(RawDisk(FileSource(path)), "the disk").systems
    found = {
        f"{record.path}{f':{record.stream}' if record.stream else ''}": (record, system.sha256(record))
        for record in system.records()
        if record.allocated and not record.virtual
    }
    assert system.problems == []
    return found


def test_files_of_macos_and_their_resource_forks_are_listed(disk: Path) -> None:
    found = records(disk)
    assert found.keys() >= NAMES
    fork, _ = found["/a_directory/a_resourcefork:rsrc"]
    assert (fork.size, found["/a_directory/a_resourcefork"][0].size) == (len(FORK), 0)
    assert found["/a_link"][0].link == "a_directory/another_file"


@pytest.mark.parametrize("name", ["/a_directory/a_resourcefork:rsrc", "/passwords.txt"])
def test_changed_content_is_seen_in_both_forks(
    name: str, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes are changed in place, behind unchanged times and sizes."""
    data = bytearray(disk.read_bytes())
    content = FORK if name.endswith(":rsrc") else b"place,user,password"
    assert data.count(content) == 1
    at = data.index(content)
    data[at : at + 2] = b"##"
    after = tmp_path / "after.raw"
    after.write_bytes(data)
    capsys.readouterr()
    assert main(["diff", str(disk), str(after), "--files", "--format", "json"]) == 0
    listed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [(item["change"], item["path"]) for item in listed["files"]] == [("content changed", name)]
