"""Files that a bitmap marks while a kernel writes to the disk through QEMU: what changed is listed, and what was made on the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import filesystems, guest_bitmaps, guest_disks, qemu
from tests.filesystems import MIB
from tests.guest_disks import Disk, Seen

pytest.importorskip("pytsk3", reason="pytsk3 is absent")


def populate(folder: Path) -> None:
    for number in range(40):
        (folder / f"file{number}.bin").write_bytes(os.urandom(number * 700))
    (folder / "large.bin").write_bytes(os.urandom(2 * MIB))
    (folder / "folder").mkdir()
    (folder / "folder" / "small.txt").write_bytes(b"a few bytes\n")


def work(folder: Path) -> None:
    (folder / "added.bin").write_bytes(os.urandom(70_000))
    (folder / "folder" / "small.txt").write_bytes(b"other bytes\n")
    with (folder / "large.bin").open("r+b") as stream:
        stream.seek(MIB)
        stream.write(b"written in place")
    (folder / "file7.bin").unlink()
    (folder / "file8.bin").rename(folder / "folder" / "moved.bin")
    (folder / "file39.bin").write_bytes(b"")


def tree_after(disk: Path, offset: int, kind: str, change: Callable[[Path], None]) -> dict[str, Seen]:
    """Mount a partition of a disk, change it, and return what the kernel shows when it is mounted again."""
    size = os.stat(disk).st_size - offset - MIB
    loop = guest_disks.run("losetup", "--show", "-f", "-o", str(offset), "--sizelimit", str(size), disk).strip()
    try:
        partition = Disk(Path(loop), kind)
        folder = disk.with_name("mounted")
        folder.mkdir(exist_ok=True)
        with partition.mounted(writing=True, on=folder) as mounted:
            change(mounted)
        with partition.mounted(on=folder) as mounted:
            return dict(guest_disks._tree(mounted))
    finally:
        guest_disks.run("losetup", "-d", loop)


@pytest.mark.slow
@qemu.requires_qemu
@pytest.mark.parametrize("granularity", [512, 65536])
@pytest.mark.parametrize("kind", ["ext4", "xfs", "ntfs"])
def test_what_a_kernel_writes_through_qemu_is_listed(kind: str, granularity: int, tmp_path: Path) -> None:
    if kind == "xfs":
        pytest.importorskip("dfvfs", reason="dfVFS is absent")
    volume = guest_disks.make(tmp_path, kind, 64 * MIB)
    before = volume.change(populate).tree()
    (offset,) = guest_disks.partitioned(tmp_path / "disk.raw", [volume.path])
    image = guest_bitmaps.image_with_bitmap(tmp_path / "disk.raw", tmp_path / "disk.qcow2", granularity)
    with guest_bitmaps.exported(image) as disk:
        after = tree_after(disk, offset, kind, work)
    found = guest_bitmaps.marked(image)
    assert list(guest_bitmaps.wrong(found, {"/p1": before}, {"/p1": after}, exact=False)) == []
    assert {"/p1/added.bin", "/p1/large.bin", "/p1/folder/small.txt"} <= found.files.keys()
    assert found.files["/p1/added.bin"] >= 70_000  # none of it is called free space
    if granularity == 512:
        assert not {f"/p1/file{number}.bin" for number in range(10, 39)} & found.files.keys()


@qemu.requires_qemu
def test_a_small_file_in_a_marked_ntfs_record_is_listed(tmp_path: Path) -> None:
    """Its content is in no block of its own."""
    one = filesystems.make(tmp_path, "ntfs")
    one.put("other.txt", b"as it was\n")
    two = one.copy("two.raw")
    two.put("small.txt", b"other bytes\n")
    image = guest_bitmaps.image_with_bitmap(one.path, tmp_path / "disk.qcow2", 512)
    filesystems._write_differences(image, one.path, two.path, 512)
    found = guest_bitmaps.marked(image)
    assert "/small.txt" in found.files
    assert not {"/other.txt", "/large.bin", "/letters.txt"} & found.files.keys()
    assert "its content is in its file system record" in found.text
    assert "names, times and owners may have been written too" in found.text
