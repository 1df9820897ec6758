"""Backing and data files are found in the file system that holds the image, and nowhere else.

Images are made by qemu-img, the file systems that hold them by mke2fs, mkntfs, zipfile and tarfile.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dfvfs")

from dfvfs.lib import errors as dfvfs_errors
from dfvfs.path import factory
from dfvfs.resolver import context, resolver

import dfvfs_qcow2  # noqa: F401
from tests import qemu

NewPathSpec = factory.Factory.NewPathSpec
KiB, MiB = 1 << 10, 1 << 20
BASE = b"\x11" * (64 * KiB)
TOP = b"\x22" * (64 * KiB)


def open_file(path_spec: Any) -> Any:
    return resolver.Resolver.OpenFileObject(path_spec, resolver_context=context.Context())


def qcow(parent: Any) -> Any:
    return NewPathSpec("QCOW", parent=NewPathSpec("OS", location=str(parent)) if isinstance(parent, Path) else parent)


def read(path_spec: Any, offset: int = 0, length: int = 64 * KiB) -> bytes:
    file_object = open_file(path_spec)
    file_object.seek(offset)
    data: bytes = file_object.read(length)
    return data


def base(folder: Path, name: str = "base.qcow2") -> Path:
    """An image whose first cluster is BASE."""
    folder.mkdir(parents=True, exist_ok=True)
    path = qemu.create(folder / name, MiB)
    qemu.io(path, "write -P 0x11 0 64k")
    return path


def overlay(path: Path, backing: str, backing_format: str | None = "qcow2") -> Path:
    """An image of a megabyte whose second cluster is TOP, and the rest in ``backing``, whatever that is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    qemu.create(path, MiB)
    qemu.io(path, "write -P 0x22 64k 64k")
    named = ["-F", backing_format] if backing_format else []
    qemu.img("rebase", "-u", "-f", "qcow2", "-b", backing, *named, path)
    return path


@pytest.fixture(autouse=True)
def _tools() -> None:
    qemu.need()


# --- beside the image on the examiner's machine --------------------------------------------------


def test_names_in_the_image_folder_are_followed(tmp_path: Path) -> None:
    base(tmp_path / "sub")
    os.symlink("sub/base.qcow2", tmp_path / "link.qcow2")
    for name in ("sub/base.qcow2", "./sub/../sub/base.qcow2", "link.qcow2", str(tmp_path / "sub/base.qcow2")):
        path = overlay(tmp_path / "top.qcow2", name)
        assert read(qcow(path)) == BASE
        path.unlink()


@pytest.mark.parametrize(
    "name", ["../secret.qcow2", "{outside}/secret.qcow2", "out.qcow2", "nbd://127.0.0.1:1/x", "json:{{}}", "/dev/zero"]
)
def test_names_that_lead_out_of_the_folder_are_not_followed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base(tmp_path, "secret.qcow2")
    folder = tmp_path / "case"
    folder.mkdir()
    os.symlink(tmp_path / "secret.qcow2", folder / "out.qcow2")
    path_spec = qcow(overlay(folder / "top.qcow2", name.format(outside=tmp_path)))
    opened: list[str] = []
    really_open = os.open

    def open_and_note(path: Any, *rest: Any, dir_fd: int | None = None) -> int:
        beside = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
        opened.append(os.path.join(beside, path))
        return really_open(path, *rest, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", open_and_note)
    assert read(path_spec, 64 * KiB) == TOP  # what the overlay itself holds stays readable
    with pytest.raises(OSError, match=r"is not followed: .*; to allow it, give its folder with QCOW2_BACKING_DIR="):
        read(path_spec)
    assert set(opened) <= {str(folder), str(folder / "top.qcow2")}


@pytest.mark.parametrize(
    "name", ["/var/lib/libvirt/images/base.qcow2", "../elsewhere/base.qcow2", "C:\\vm\\base.qcow2"]
)
def test_a_name_from_another_machine_means_the_file_beside_the_image(tmp_path: Path, name: str) -> None:
    base(tmp_path / "case")
    assert read(qcow(overlay(tmp_path / "case/top.qcow2", name))) == BASE


def test_only_reads_that_need_the_missing_file_fail(tmp_path: Path) -> None:
    file_object = open_file(qcow(overlay(tmp_path / "top.qcow2", "gone.qcow2")))
    for offset, length in ((0, 64 * KiB), (0, 1), (63 * KiB, 2 * KiB), (128 * KiB, 512)):
        file_object.seek(offset)
        with pytest.raises(OSError, match=r"gone\.qcow2' of top\.qcow2 is missing"):
            file_object.read(length)
        assert file_object.get_offset() == offset
    file_object.seek(64 * KiB)
    assert file_object.read(64 * KiB) == TOP


def test_a_recorded_raw_format_is_never_probed(tmp_path: Path) -> None:
    path = base(tmp_path)
    assert read(qcow(overlay(tmp_path / "top.qcow2", "base.qcow2", "raw")), 0, 4 * KiB) == path.read_bytes()[: 4 * KiB]


def test_chains_that_loop_end(tmp_path: Path) -> None:
    overlay(tmp_path / "a.qcow2", "b.qcow2")
    overlay(tmp_path / "b.qcow2", "a.qcow2")
    overlay(tmp_path / "self.qcow2", "self.qcow2")
    for name in ("a", "b", "self"):
        with pytest.raises(dfvfs_errors.BackEndError, match="already part of the chain"):
            open_file(qcow(tmp_path / f"{name}.qcow2"))


# --- inside containers ---------------------------------------------------------------------------


def _ext4(tree: Path, path: Path) -> Any:
    qemu.need("mke2fs")
    path.touch()
    os.truncate(path, 24 * MiB)
    qemu.run("mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(path))
    return lambda location: NewPathSpec("EXT", location=location, parent=NewPathSpec("OS", location=str(path)))


def _tsk(tree: Path, path: Path) -> Any:
    _ext4(tree, path)
    return lambda location: NewPathSpec("TSK", location=location, parent=NewPathSpec("OS", location=str(path)))


def _qcow2(tree: Path, path: Path) -> Any:
    _ext4(tree, path.with_suffix(".raw"))
    qemu.convert(path.with_suffix(".raw"), path, fmt="raw", target_format="qcow2", compressed=True)
    return lambda location: NewPathSpec("EXT", location=location, parent=qcow(path))


def _optional(tool: str) -> None:
    """Skip by name where a tool is absent, also where QEMU's must be there."""
    if not shutil.which(tool):
        pytest.skip(f"{tool} is absent")


def _ewf(tree: Path, path: Path) -> Any:
    _optional("ewfacquirestream")
    _ext4(tree, path)
    qemu.run("ewfacquirestream", "-q", "-t", str(path), stdin=path.read_bytes())
    parent = NewPathSpec("EWF", parent=NewPathSpec("OS", location=f"{path}.E01"))
    return lambda location: NewPathSpec("EXT", location=location, parent=parent)


def _ntfs(tree: Path, path: Path) -> Any:
    _optional("mkntfs")
    _optional("ntfscp")
    path.touch()
    os.truncate(path, 24 * MiB)
    qemu.run("mkntfs", "-q", "-F", "-f", str(path))
    for item in sorted(tree.rglob("*")):
        if item.is_file() and item.parent == tree:
            qemu.run("ntfscp", "-q", str(path), str(item), item.name)
    parent = NewPathSpec("OS", location=str(path))
    return lambda location: NewPathSpec("NTFS", location=location.replace("/", "\\"), parent=parent)


def _zip(tree: Path, path: Path) -> Any:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for item in sorted(tree.rglob("*")):
            archive.write(item, item.relative_to(tree))
    return lambda location: NewPathSpec("ZIP", location=location, parent=NewPathSpec("OS", location=str(path)))


def _tar(tree: Path, path: Path) -> Any:
    with tarfile.open(path, "w") as archive:
        for item in sorted(tree.iterdir()):
            archive.add(item, item.name)
    return lambda location: NewPathSpec("TAR", location=location, parent=NewPathSpec("OS", location=str(path)))


CONTAINERS: dict[str, Callable[[Path, Path], Any]] = {
    "ext4": _ext4,
    "TSK": _tsk,
    "EWF": _ewf,
    "another qcow2": _qcow2,
    "NTFS": _ntfs,
    "ZIP": _zip,
    "TAR": _tar,
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_chains_inside_a_container_are_read_whole(kind: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    base(tree)
    overlay(tree / "middle.qcow2", "base.qcow2")
    overlay(tree / "top.qcow2", "middle.qcow2")
    path_spec = qcow(CONTAINERS[kind](tree, tmp_path / "container")("/top.qcow2"))
    assert read(path_spec, 0, MiB) == BASE + TOP + bytes(MiB - 128 * KiB)


def test_a_file_listed_in_a_container_leads_to_its_backing_file(tmp_path: Path) -> None:
    # The path specification of a listed file carries an inode, which its backing file must not inherit.
    tree = tmp_path / "tree"
    base(tree)
    overlay(tree / "top.qcow2", "base.qcow2")
    locate = _ext4(tree, tmp_path / "container")
    root = resolver.Resolver.OpenFileEntry(locate("/"), resolver_context=context.Context())
    listed = {entry.name: entry.path_spec for entry in root.sub_file_entries}
    assert listed["top.qcow2"].inode
    assert read(qcow(listed["top.qcow2"])) == BASE


def test_an_external_data_file_inside_a_container_is_found(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    qemu.create(tree / "top.qcow2", MiB, data_file="top.data", cwd=tree)
    qemu.io(tree / "top.qcow2", "write -P 0x11 0 64k", cwd=tree)
    assert read(qcow(_ext4(tree, tmp_path / "container")("/top.qcow2"))) == BASE


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("/vm/top.qcow2", "/images/base.qcow2"),
        ("/vm/top.qcow2", "../images/base.qcow2"),
        ("/vm/top.qcow2", "../../../../images/base.qcow2"),
        ("/vm/top.qcow2", "link.qcow2"),
    ],
)
def test_absolute_and_parent_names_stay_inside_the_container(tmp_path: Path, location: str, name: str) -> None:
    tree = tmp_path / "tree"
    base(tree / "images")
    overlay(tree / location[1:], name)
    os.symlink("/images/base.qcow2", tree / "vm/link.qcow2")
    assert read(qcow(_ext4(tree, tmp_path / "container")(location))) == BASE


def test_a_name_inside_a_container_never_leads_to_the_examiners_machine(tmp_path: Path) -> None:
    secret = base(tmp_path, "secret.qcow2")
    tree = tmp_path / "tree"
    for number, name in enumerate((str(secret), "../" * 9 + str(secret), "loop", "folder", "a/b")):
        overlay(tree / f"top{number}.qcow2", name)
    os.symlink("loop", tree / "loop")
    (tree / "folder").mkdir()
    locate = _ext4(tree, tmp_path / "container")
    for number in range(5):
        path_spec = qcow(locate(f"/top{number}.qcow2"))
        assert read(path_spec, 64 * KiB) == TOP
        with pytest.raises(OSError, match=r"is missing|is not followed"):
            read(path_spec)


def test_chains_that_loop_inside_a_container_end(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    overlay(tree / "a.qcow2", "b.qcow2")
    overlay(tree / "b.qcow2", "/a.qcow2")
    locate = _ext4(tree, tmp_path / "container")
    for name in "ab":
        with pytest.raises(dfvfs_errors.BackEndError, match="already part of the chain"):
            open_file(qcow(locate(f"/{name}.qcow2")))


def test_an_image_in_a_compressed_file_is_not_its_own_backing_file(tmp_path: Path) -> None:
    overlay(tmp_path / "top.qcow2", "base.raw", "raw")
    packed = tmp_path / "top.qcow2.gz"
    packed.write_bytes(gzip.compress((tmp_path / "top.qcow2").read_bytes()))
    path_spec = qcow(NewPathSpec("GZIP", parent=NewPathSpec("OS", location=str(packed))))
    assert read(path_spec, 64 * KiB) == TOP
    with pytest.raises(OSError, match="not in a file system"):
        read(path_spec)
