"""Images inside others: in a host's file system (``--archives qcow``), in LVM volumes, in E01."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("plaso")
pytest.importorskip("dfvfs")

from dfvfs.helpers import volume_scanner
from dfvfs.resolver import resolver

from tests import guest_disks, qemu
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


# --- in volumes ----------------------------------------------------------------------------------


def names(source: Path, wanted: str | None = None) -> dict[str, list[str]]:
    """The names in the root folder of each file system that the scan finds, by the path to it."""
    options = volume_scanner.VolumeScannerOptions()
    options.partitions, options.volumes, options.snapshots = ["all"], ["all"], ["none"]
    if wanted:
        options.qcow_snapshots = wanted
    found = {}
    for spec in volume_scanner.VolumeScanner().GetBasePathSpecs(str(source), options=options):
        kinds, step = [], spec
        while step is not None:
            kinds.append(
                f"{step.type_indicator}{getattr(step, 'location', '') if step.type_indicator == 'LVM' else ''}"
            )
            step = step.parent
        root = resolver.Resolver.OpenFileEntry(spec)
        found[" > ".join(reversed(kinds[:-1]))] = sorted(entry.name for entry in root.sub_file_entries)
    return found


@pytest.mark.parametrize(
    "backing", ["snap_disk-1.qcow2", "/dev/vg0/snap_disk-1.qcow2", "/dev/mapper/vg0-snap_disk--1.qcow2", "json"]
)
@qemu.requires_qemu
def test_an_image_in_a_logical_volume_has_its_backing_image_in_another(
    backing: str, guest: Path, tmp_path: Path
) -> None:
    made = guest_disks.group(tmp_path, [64 * MIB])
    base, over = tmp_path / "snap_disk-1.qcow2", tmp_path / "disk.qcow2"
    qemu.convert(guest, base, fmt="raw", target_format="qcow2")
    qemu.snapshot(base, "in-the-base")
    if backing == "json":
        device = {"driver": "host_device", "filename": "/dev/vg0/snap_disk-1.qcow2"}
        backing = f"json:{json.dumps({'driver': 'qcow2', 'file': device})}"
    qemu.create(over, guest.stat().st_size, backing=base.name, backing_format="qcow2", cwd=tmp_path)
    qemu.img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, over)
    for name, path in (("snap_disk-1.qcow2", base), ("disk.qcow2", over)):
        guest_disks.create_volume(made, name, 16 * MIB)
        made.write(name, path)
    found = names(made.devices[0], "all")
    chain = {path: listed for path, listed in found.items() if "QCOW" in path}
    assert chain == {
        "RAW > LVM/lvm1 > QCOW > EXT": ["inner.txt", "lost+found"],
        "RAW > LVM/lvm1 > QCOW > ENCODED_STREAM > EXT": ["inner.txt", "lost+found"],
        "RAW > LVM/lvm2 > QCOW > EXT": ["inner.txt", "lost+found"],
    }


@qemu.requires_qemu
def test_an_image_in_an_e01_is_found(guest: Path, tmp_path: Path) -> None:
    if shutil.which("ewfacquirestream") is None:
        pytest.skip("ewfacquirestream is absent")
    image = tmp_path / "disk.qcow2"
    qemu.convert(guest, image, fmt="raw", target_format="qcow2")
    qemu.run("ewfacquirestream", "-q", "-t", str(tmp_path / "disk"), stdin=image.read_bytes())
    assert names(tmp_path / "disk.E01") == {"EWF > QCOW > EXT": ["inner.txt", "lost+found"]}


@qemu.requires_qemu
def test_four_bytes_hide_no_file_system(guest: Path, tmp_path: Path) -> None:
    image = tmp_path / "decoy.qcow2"
    raw = tmp_path / "decoy.raw"
    shutil.copyfile(guest, raw)
    with raw.open("r+b") as stream:  # where ext has its boot block
        stream.write(b"QFI\xfb\0\0\0\3")
    qemu.convert(raw, image, fmt="raw", target_format="qcow2")
    assert names(image) == {"QCOW > EXT": ["inner.txt", "lost+found"]}


@qemu.requires_qemu
def test_a_damaged_image_in_a_volume_is_a_warning(
    guest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = guest_disks.group(tmp_path, [64 * MIB])
    for name, content in (("damaged", b"QFI\xfb\0\0\0\3"), ("sound", guest.read_bytes())):
        path = tmp_path / name
        path.write_bytes(content + bytes(-len(content) % 4096))
        guest_disks.create_volume(made, name, 8 * MIB)
        made.write(name, path)
    assert names(made.devices[0])["RAW > LVM/lvm2 > EXT"] == ["inner.txt", "lost+found"]
    assert "the image in /lvm1" in caplog.text.replace(f"{made.devices[0]}:", "")
