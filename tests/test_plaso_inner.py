"""Images inside others: in a host's file system (``--archives qcow``), in LVM volumes, in E01."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("plaso")
pytest.importorskip("dfvfs")

from tests import qemu
from tests.filesystems import MIB
from tests.plaso_tools import Variant, log2timeline, psort


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ext4 disk with one file."""
    qemu.need("mke2fs")
    return ext4(tmp_path_factory.mktemp("guest"), "guest.raw", {"inner.txt": b"inner\n"}, 4 * MIB)


def ext4(folder: Path, name: str, files: dict[str, bytes | Path], size: int) -> Path:
    tree = folder / f"{name}-tree"
    for location, content in files.items():
        path = tree / location
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_bytes(content)
    raw = folder / name
    raw.write_bytes(b"")
    os.truncate(raw, size)
    qemu.run("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", str(tree), str(raw))
    return raw


@pytest.fixture
def hypervisor(guest: Path, tmp_path: Path) -> Path:
    """A host's disk with an image with a snapshot, and an overlay over a base beside it."""
    qemu.need()
    web = tmp_path / "web.qcow2"
    qemu.convert(guest, web, fmt="raw", target_format="qcow2")
    qemu.snapshot(web, "before")
    base = tmp_path / "base.qcow2"
    qemu.convert(guest, base, fmt="raw", target_format="qcow2", compressed=True)
    over = tmp_path / "db.qcow2"
    qemu.create(over, guest.stat().st_size, backing="base.qcow2", backing_format="qcow2", cwd=tmp_path)
    files = {"images/web.qcow2": web, "images/base.qcow2": base, "images/db.qcow2": over, "host.txt": b"host\n"}
    return ext4(tmp_path, "host.raw", files, 32 * MIB)


@pytest.mark.slow
@qemu.requires_qemu
def test_images_in_a_hosts_file_system_are_processed_with_their_snapshots(hypervisor: Path, tmp_path: Path) -> None:
    options = ("--archives", "qcow", "--qcow_snapshots", "all", "--parsers", "filestat", "--hashers", "none")
    run = log2timeline(Variant(hypervisor), tmp_path / "out", *options)
    assert run.rc == 0, run.output
    for lines in (run.lines, psort(run.storage, tmp_path / "active.csv", active=True)):
        shown = {line.split(",")[6].split(" ")[0] for line in lines if "inner.txt" in line}
        assert shown == {
            "QCOW2-IMAGE[/images/web.qcow2]:EXT:/inner.txt",
            "QCOW2-IMAGE[/images/web.qcow2]:QCOW2-SNAPSHOT1[before]:EXT:/inner.txt",
            "QCOW2-IMAGE[/images/base.qcow2]:EXT:/inner.txt",
            "QCOW2-IMAGE[/images/db.qcow2]:EXT:/inner.txt",
        }
    assert any("EXT:/host.txt" in line for line in run.lines)
    none = log2timeline(Variant(hypervisor), tmp_path / "none", *options[4:])
    assert none.rc == 0
    assert not [line for line in none.lines if "inner.txt" in line]
