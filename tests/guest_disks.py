"""Volumes that only a kernel writes, made with the real tools: XFS, btrfs, NTFS by mounting them, LVM2 on loop devices.

All of it needs root, loop devices and the tools, and is skipped by name where they are absent. The oracle is
:func:`tree`: what the kernel (or ntfs-3g) shows of a file system that is mounted read-only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import qemu
from tests.filesystems import MIB, SECTOR, need_tools

_SMALL_XFS = {"TEST_DIR": "1", "TEST_DEV": "1", "QA_CHECK_FS": "1"}  # mkfs.xfs then makes less than 300 MiB
MAKERS = {
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "-m", "single"],
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "ntfs": ["mkntfs", "-q", "-F", "-p", "0", "-H", "16", "-S", "63"],
    "exfat": ["mkfs.exfat"],
}


def run(*command: str | os.PathLike[str], **environment: str) -> str:
    """Run one of the tools; its output in an error is shown."""
    done = subprocess.run(
        [os.fspath(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def need_mounts() -> None:
    """Skip where nothing can be mounted."""
    need_tools("losetup", "mount")
    if os.geteuid() or subprocess.run(["losetup", "-f"], capture_output=True, check=False).returncode:
        pytest.skip("loop devices are not usable here")


class Seen(NamedTuple):
    """One name as a mounted file system shows it; times in nanoseconds."""

    type: str
    size: int
    mode: int
    uid: int
    gid: int
    modified: int
    changed: int
    link: str
    sha256: str


@dataclass
class Disk:
    """A raw file with one file system."""

    path: Path
    kind: str

    def copy(self, name: str) -> Disk:
        path = self.path.with_name(name)
        run("cp", "--sparse=always", self.path, path)
        return Disk(path, self.kind)

    @contextlib.contextmanager
    def mounted(self, *, writing: bool = False, on: Path | None = None) -> Iterator[Path]:
        """The folder under which the file system is mounted: ``on``, or one beside it."""
        folder = on or self.path.with_name(f"{self.path.name}-mounted")
        folder.mkdir(exist_ok=True)
        mode = "rw" if writing else "ro"
        loop = ""
        try:
            if self.kind == "ntfs":
                run("ntfs-3g", "-o", f"{mode},streams_interface=windows,no_def_opts", self.path, folder)
            elif self.kind == "exfat":
                # FUSE mounts block devices only.
                run("mount.exfat-fuse", "-o", mode, loop := run("losetup", "--show", "-f", self.path).strip(), folder)
            elif self.kind == "xfs":
                run(
                    "mount",
                    "-t",
                    "xfs",
                    "-o",
                    f"loop,{mode},nouuid" + ("" if writing else ",norecovery"),
                    self.path,
                    folder,
                )
            else:
                run("mount", "-t", self.kind, "-o", f"loop,{mode}", self.path, folder)
        except (AssertionError, FileNotFoundError) as error:
            pytest.skip(f"{self.kind} cannot be mounted here: {error}")
        try:
            yield folder
        finally:
            os.sync()
            run("umount", folder)
            if loop:
                run("losetup", "-d", loop)

    def change(self, work: Callable[[Path], None]) -> Disk:
        with self.mounted(writing=True) as folder:
            work(folder)
        return self

    def tree(self) -> dict[str, Seen]:
        """Every name in the file system, as the kernel has it."""
        with self.mounted() as folder:
            return dict(_tree(folder))


def _tree(folder: Path) -> Iterator[tuple[str, Seen]]:
    for root, folders, files in os.walk(os.fsencode(folder)):
        for name in [*folders, *files]:
            path = os.path.join(root, name)
            info = os.lstat(path)
            kind = {stat.S_IFREG: "r", stat.S_IFDIR: "d", stat.S_IFLNK: "l", stat.S_IFIFO: "p"}.get(
                stat.S_IFMT(info.st_mode), "?"
            )
            digest = link = ""
            if kind == "r":
                with open(path, "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
            elif kind == "l":
                link = os.readlink(path).decode("utf-8", "surrogateescape")
            shown = "/" + os.path.relpath(path, os.fsencode(folder)).decode("utf-8", "surrogateescape")
            yield (
                shown,
                Seen(
                    kind,
                    info.st_size,
                    stat.S_IMODE(info.st_mode),
                    info.st_uid,
                    info.st_gid,
                    info.st_mtime_ns,
                    info.st_ctime_ns,
                    link,
                    digest,
                ),
            )


def make(folder: Path, kind: str, size: int, name: str = "", options: Sequence[str] = ()) -> Disk:
    """An empty file system in a raw file."""
    need_mounts()
    need_tools(MAKERS[kind][0])
    path = folder / (name or f"{kind}.raw")
    with path.open("wb") as stream:
        stream.truncate(size)
    run(*MAKERS[kind], *options, path, **(_SMALL_XFS if kind == "xfs" else {}))
    return Disk(path, kind)


# --- LVM2 ------------------------------------------------------------------------------------------------

_CONFIGURATION = """
global { activation=0 use_lvmpolld=0 }
devices { dir="/dev" scan=["/dev"] obtain_device_list_from_udev=0 external_device_info_source="none"
  filter=[%s, "r|.*|"] use_devicesfile=0 }
activation { udev_sync=0 udev_rules=0 monitoring=0 }
backup { backup=0 archive=0 }
"""


class Extent(NamedTuple):
    """Where a piece of a logical volume is, as LVM reports it; bytes."""

    start: int
    length: int
    device: int
    offset: int


@dataclass
class Group:
    """A volume group on raw files: how to run LVM's commands on it, and where its volumes are."""

    devices: list[Path]
    folder: Path

    def lvm(self, *commands: Sequence[str]) -> str:
        """Run commands; ``{0}`` in one stands for the first device, as ``#0`` does in what they print.

        Each call may get other loop devices.
        """
        loops = [run("losetup", "--show", "-f", path).strip() for path in self.devices]
        try:
            accepted = ",".join(f'"a|^{loop}$|"' for loop in loops)
            (self.folder / "lvm.conf").write_text(_CONFIGURATION % accepted)
            printed = "".join(
                run(
                    *(part.format(*loops) for part in command),
                    LVM_SYSTEM_DIR=str(self.folder),
                    LVM_SUPPRESS_FD_WARNINGS="1",
                )
                for command in commands
            )
            numbers = {loop: f"#{number}" for number, loop in enumerate(loops)}
            return re.sub(r"/dev/loop\d+", lambda found: numbers.get(found[0], found[0]), printed)
        finally:
            os.sync()
            for loop in loops:
                run("losetup", "-d", loop)

    def extents(self, name: str) -> list[Extent]:
        """Where a linear volume is: LVM's own report."""
        report = self.lvm(
            [
                *("lvs", "--noheadings", "--segments", "--units", "b", "--nosuffix", "--separator", ";"),
                *("-o", "lv_name,seg_start,seg_size,devices,vg_extent_size"),
            ]
        )
        starts = self.lvm(["pvs", "--noheadings", "--units", "b", "--nosuffix", "-o", "pv_name,pe_start"])
        first = {line.split()[0]: int(line.split()[1]) for line in starts.splitlines() if line.strip()}
        found = []
        for line in report.splitlines():
            fields = line.strip().split(";")
            if fields[0] != name:
                continue
            device, extent = re.fullmatch(r"(.*)\((\d+)\)", fields[3]).groups()  # type: ignore[union-attr]
            at = first[device] + int(extent) * int(fields[4])
            found.append(Extent(int(fields[1]), int(fields[2]), int(device[1:]), at))
        return sorted(found)

    def write(self, name: str, content: Path) -> None:
        """Put the bytes of a file into a volume."""
        data = content.read_bytes()
        for extent in self.extents(name):
            with self.devices[extent.device].open("r+b") as stream:
                stream.seek(extent.offset)
                stream.write(data[extent.start : extent.start + extent.length])


def group(folder: Path, sizes: Sequence[int], name: str = "vg0") -> Group:
    """A volume group over raw files of these sizes."""
    need_mounts()
    need_tools("pvcreate", "vgcreate", "lvcreate", "lvs")
    devices = []
    for number, size in enumerate(sizes):
        path = folder / f"pv{number}.raw"
        with path.open("wb") as stream:
            stream.truncate(size)
        devices.append(path)
    made = Group(devices, folder)
    every = [f"{{{number}}}" for number in range(len(sizes))]
    made.lvm(["pvcreate", "-q", "-y", *every], ["vgcreate", "-q", name, *every])
    return made


def create_volume(made: Group, name: str, size: int, *where: str) -> None:
    """Add a linear volume, without activating it."""
    made.lvm(["lvcreate", "-y", "-q", "-an", "-Zn", "-Wn", "-L", f"{size}b", "-n", name, "vg0", *where])


# --- disks -----------------------------------------------------------------------------------------------


def partitioned(path: Path, parts: Sequence[Path], types: Sequence[str] = ()) -> list[int]:
    """Put raw files into the partitions of a new disk (GPT); return their offsets."""
    need_tools("sfdisk")
    offsets, at = [], MIB
    for part in parts:
        offsets.append(at)
        at += -(-part.stat().st_size // MIB) * MIB
    with path.open("wb") as disk:
        disk.truncate(at + MIB)
    lines = [
        f"start={offset // SECTOR}, size={part.stat().st_size // SECTOR}"
        for offset, part in zip(offsets, parts, strict=True)
    ]
    for number, kind in enumerate(types):
        lines[number] += f", type={kind}"
    subprocess.run(
        ["sfdisk", "-q", path],
        input=("label: gpt\n" + "\n".join(lines) + "\n").encode(),
        check=True,
        capture_output=True,
    )
    for offset, part in zip(offsets, parts, strict=True):
        run("dd", f"if={part}", f"of={path}", "bs=1M", f"seek={offset // MIB}", "conv=notrunc,sparse", "status=none")
    return offsets


def states(path: Path, raws: Sequence[tuple[str | None, Path]]) -> Path:
    """A QCOW2 image with a snapshot for each named raw disk, the last one active. Sparse files stay quick."""
    name, first = raws[0]
    qemu.img("convert", "-f", "raw", "-O", "qcow2", first, path)
    if name is not None:
        qemu.snapshot(path, name)
    before = first
    for name, raw in raws[1:]:
        _write_differences(path, before, raw)
        if name is not None:
            qemu.snapshot(path, name)
        before = raw
    return path


def _write_differences(path: Path, before: Path, after: Path, step: int = 65536) -> None:
    commands = []
    pieces = path.with_name("pieces")
    shutil.rmtree(pieces, ignore_errors=True)
    pieces.mkdir()
    with before.open("rb") as old, after.open("rb") as new:
        at = 0
        while piece := new.read(step):
            if old.read(step) != piece:
                source = pieces / str(at)
                source.write_bytes(piece)
                commands.append(f"write -s {source} {at} {len(piece)}")
            at += step
    if commands:
        qemu.io(path, *commands)
    shutil.rmtree(pieces)
