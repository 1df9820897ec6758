"""File systems made and changed by the real tools, and disks that hold them in several states.

A :class:`Made` is a raw file with a file system and the bytes that were put into it. :func:`disk_of`
puts a partition table around file systems; :func:`states_of` makes a QCOW2 image whose snapshots
are given raw disks, by writing only what differs, as a guest would.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import qemu

SECTOR = 512
MIB = 1 << 20
KINDS = ("ext4", "ext2", "fat12", "fat32", "ntfs")
TOOLS = {"ext4": "mkfs.ext4", "ext2": "mkfs.ext2", "fat12": "mkfs.fat", "fat32": "mkfs.fat", "ntfs": "mkntfs"}
HELPERS = {"ext4": "debugfs", "ext2": "debugfs", "fat12": "mcopy", "fat32": "mcopy", "ntfs": "ntfscp"}


def need_tools(*tools: str) -> None:
    """Skip by name when a tool is absent; fail where tools are required."""
    for tool in tools:
        if shutil.which(tool) is None:
            if qemu.REQUIRED:
                pytest.fail(f"{tool} is required and absent")
            pytest.skip(f"{tool} is absent")


@dataclass
class Made:
    """A raw file with one file system; ``files`` maps paths to content."""

    path: Path
    kind: str
    files: dict[str, bytes] = field(default_factory=dict)

    def copy(self, name: str) -> Made:
        """The same file system in another file, to be changed on its own."""
        path = self.path.with_name(name)
        shutil.copyfile(self.path, path)
        return Made(path, self.kind, dict(self.files))

    # --- changes by the tools of each file system -----------------------------------------------

    def put(self, name: str, content: bytes) -> None:
        """Write a new file below the root."""
        source = self.path.with_name("content")
        source.write_bytes(content)
        if self.kind.startswith("ext"):
            self.debugfs(f"write {source} {name}")
        elif self.kind.startswith("fat"):
            qemu.run("mcopy", "-i", self.path, source, f"::{name}")
        else:
            qemu.run("ntfscp", "-f", "-q", self.path, source, name)
        self.files[name] = content

    def stream(self, name: str, stream: str, content: bytes) -> None:
        """Write an alternate data stream of a file (NTFS)."""
        source = self.path.with_name("content")
        source.write_bytes(content)
        qemu.run("ntfscp", "-f", "-q", "-N", stream, self.path, source, name)
        self.files[f"{name}:{stream}"] = content

    def folder(self, name: str) -> None:
        if self.kind.startswith("ext"):
            self.debugfs(f"mkdir {name}")
        else:
            qemu.run("mmd", "-i", self.path, f"::{name}")

    def remove(self, name: str) -> None:
        if self.kind.startswith("ext"):
            self.debugfs(f"rm {name}")
        else:
            qemu.run("mdel", "-i", self.path, f"::{name}")
        del self.files[name]

    def rename(self, old: str, new: str) -> None:
        if self.kind.startswith("ext"):
            self.debugfs(f"ln {old} {new}", f"unlink {old}")
        else:
            qemu.run("mren", "-i", self.path, f"::{old}", f"::{new}")
        self.files[new] = self.files.pop(old)

    def debugfs(self, *commands: str) -> None:
        """Run debugfs commands; it reports failure on standard error only."""
        script = "".join(f"{command}\n" for command in commands).encode()
        outcome = qemu.run("debugfs", "-w", "-f", "-", self.path, stdin=script)
        complaints = [line for line in outcome.stderr.splitlines() if not line.startswith("debugfs ")]
        assert not complaints, complaints


def make(folder: Path, kind: str, name: str = "", *, populated: bool = True) -> Made:
    """Make a file system of a kind with a few files: small, large, sparse-looking, in folders."""
    need_tools(TOOLS[kind], HELPERS[kind])
    path = folder / (name or f"{kind}.raw")
    size = {"ext4": 12, "ext2": 12, "fat12": 4, "fat32": 36, "ntfs": 8}[kind] * MIB
    with path.open("wb") as stream:
        stream.truncate(size)
    if kind.startswith("ext"):
        # Inodes of 128 bytes keep no creation times.
        extra = ["-I", "128"] if kind == "ext2" else []
        qemu.run(TOOLS[kind], "-q", "-F", "-b", "1024", *extra, path)
    elif kind == "ntfs":
        qemu.run("mkntfs", "-q", "-F", "-p", "0", "-H", "16", "-S", "63", "-s", "512", path)
    else:
        qemu.run("mkfs.fat", "-F", kind.removeprefix("fat"), "-n", "EVIDENCE", path)
    made = Made(path, kind)
    if populated:
        noise = random.Random(kind)
        made.put("small.txt", b"a few bytes\n")
        made.put("large.bin", noise.randbytes(300_001))
        made.put("letters.txt", b"abcdefgh" * 9000)
        if kind == "ntfs":
            made.stream("small.txt", "hidden", noise.randbytes(70_000))
        else:
            made.folder("folder")
            made.put("folder/inside.txt", b"inside a folder\n" * 100)
            made.put("folder/gone.bin", noise.randbytes(20_000))
            made.remove("folder/gone.bin")
    return made


def disk_of(folder: Path, parts: Sequence[Made], name: str = "disk.raw") -> tuple[Path, list[int]]:
    """Return a raw disk with an MBR and one partition per file system, and their offsets in bytes."""
    need_tools("sfdisk")
    path = folder / name
    offsets: list[int] = []
    at = MIB
    for part in parts:
        offsets.append(at)
        at += part.path.stat().st_size
    with path.open("wb") as disk:
        disk.truncate(at + MIB)
    types = {"ntfs": "7", "fat12": "1", "fat32": "c"}
    lines = [
        f"start={offset // SECTOR}, size={part.path.stat().st_size // SECTOR}, type={types.get(part.kind, '83')}"
        for offset, part in zip(offsets, parts, strict=True)
    ]
    qemu.run("sfdisk", "-q", path, stdin=("label: dos\n" + "\n".join(lines) + "\n").encode())
    with path.open("r+b") as disk:
        for offset, part in zip(offsets, parts, strict=True):
            disk.seek(offset)
            disk.write(part.path.read_bytes())
    return path, offsets


def states_of(path: Path, raws: Sequence[tuple[str | None, Path]], cluster_size: int = 65536) -> Path:
    """Return a QCOW2 image with a snapshot for each named raw disk; the last, unnamed one is active."""
    _, first = raws[0]
    qemu.img("convert", "-O", "qcow2", "-o", f"cluster_size={cluster_size}", first, path)
    before = first
    for name, raw in raws:
        _write_differences(path, before, raw, cluster_size)
        if name is not None:
            qemu.snapshot(path, name)
        before = raw
    return path


def _write_differences(path: Path, before: Path, after: Path, step: int) -> None:
    old, new = before.read_bytes(), after.read_bytes()
    assert len(old) == len(new)
    commands = []
    for at in range(0, len(new), step):
        piece = new[at : at + step]
        if old[at : at + step] != piece:
            source = path.with_name(f"piece-{at}")
            source.write_bytes(piece)
            commands.append(f"write -s {source} {at} {len(piece)}")
    if commands:
        qemu.io(path, *commands)
    for source in path.parent.glob("piece-*"):
        source.unlink()


def sleuthkit(tool: str, raw: Path, offset: int, *args: str) -> str:
    """Return what one of The Sleuth Kit's own tools prints about a raw disk."""
    need_tools(tool)
    *options, last = [*args, ""]
    extra = [last] if last else []
    return qemu.run(tool, *options, "-o", str(offset // SECTOR), raw, *extra).text
