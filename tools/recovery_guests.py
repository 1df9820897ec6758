"""Damages disks that a kernel wrote through QEMU, and counts what recovery gives back, in bytes and in files.

Unlike the images of ``recovery_trial.py`` these are no generated ones: an installed system (a folder with a root file
system, or parts of this machine's own) is copied into a mounted ext4, NTFS or XFS file system, which is then used: files
deleted, rewritten, extended and added in several rounds, with snapshots between. The writes travel as a guest's do, from a
file system of the kernel through a block device to ``qemu-nbd``, of any QEMU release.

    python tools/recovery_guests.py --guests 20 --seed 1 --out guests.jsonl
    python tools/recovery_guests.py --qemu /srv/bullseye --qemu /srv/trixie --layout cloned --how aged
    python tools/recovery_guests.py --layout lvm --layout grown --layout logical

``--qemu`` names the root folder of another system whose QEMU writes the images, besides this machine's own; it is also the
installed system that is copied. Needs root, loop devices, FUSE, ``qemu-storage-daemon`` and the tools of the file systems.
LVM2's own tools make logical volumes, one behind the other (``lvm``) or one of them in two pieces (``grown``), whose file systems are
put together from files, since no device mapper is asked for: such disks are converted ones.
Every line of the output is one damaged image. The oracle is ``qemu-img convert`` of the intact image.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import recovery_trial as trial
from recovery_trial import MIB, SECTOR, Damaged, Made

import qcow2_forensics as q

sys.path.append(str(Path(__file__).resolve().parent.parent))
from tests import guest_disks

GIB = 1 << 30
FILES_JUDGED = 64  # of 256, chosen by a hash of their names
LAYOUTS = ("bare", "single", "two", "cloned", "lvm", "grown", "logical")
EXTENT = 4 * MIB  # of LVM
IN_PIECES = ("lvm", "grown")
LOCAL = (
    "/usr/share/doc",
    "/usr/share/man",
    "/usr/share/vim",
    "/usr/lib/python3",
    "/usr/lib/git-core",
    "/usr/share/perl",
)
SIZES = {1024: (160 * MIB, 256 * MIB), 4096: (600 * MIB, 1400 * MIB), 16384: (GIB, 3 * GIB), 65536: (3 * GIB, 12 * GIB)}


class Qemu(NamedTuple):
    """One release of QEMU: this machine's own, or that of the system below ``root``, which is started in it."""

    root: Path | None

    def command(self, *parts: object) -> list[str]:
        if self.root is None:
            return [str(part) for part in parts]
        return ["chroot", str(self.root), *(str(part).replace(f"{self.root}/", "/") for part in parts)]

    def run(self, *parts: object) -> None:
        trial.run(*self.command(*parts))

    @property
    def version(self) -> str:
        text = subprocess.run(self.command("qemu-img", "--version"), check=True, capture_output=True, text=True).stdout
        return text.split()[2]


class Part(NamedTuple):
    """Where one file system is on the disk: (start, length) of its pieces, in bytes."""

    pieces: tuple[tuple[int, int], ...]

    @property
    def start(self) -> int:
        return self.pieces[0][0]

    @property
    def length(self) -> int:
        return sum(length for _, length in self.pieces)


def whole(start: int, length: int) -> Part:
    return Part(((start, length),))


class Guest(NamedTuple):
    """What a guest is made of."""

    qemu: Qemu
    fs: str
    layout: str
    how: str  # converted, fresh, aged
    cluster: int
    options: str
    size: int

    def parts(self) -> list[Part]:
        if self.layout == "bare":
            return [whole(0, self.size)]
        if self.layout in IN_PIECES:  # after the start of the partition, and LVM's own first MiB
            half = (self.size - 4 * MIB - EXTENT) // 2 // EXTENT * EXTENT
            first = half // 2 // EXTENT * EXTENT if self.layout == "grown" else half
            root = [(2 * MIB, first), (2 * MIB + first + half, half - first)]
            return [Part(tuple(root[: 2 if self.layout == "grown" else 1])), whole(2 * MIB + first, half)]
        count = 1 if self.layout == "single" else 2
        length = (self.size - 4 * MIB) // count // MIB * MIB
        gap = MIB if self.layout == "logical" else 0  # the table of the logical partition
        return [whole(MIB + number * (length + gap), length) for number in range(count)]

    def table(self) -> str:
        """Return the partition table as sfdisk wants it."""
        parts = self.parts()
        if self.layout in IN_PIECES:
            kind = "8e" if self.size // MIB % 2 else "E6D6D379-F507-44C2-A23C-238F2A3DF928"
            return (
                f"label: {'dos' if kind == '8e' else 'gpt'}\nstart=1MiB, size={self.size // MIB - 3}MiB, type={kind}\n"
            )
        lines = [f"start={part.start // SECTOR}, size={part.length // SECTOR}, type=linux" for part in parts]
        if self.layout == "logical":
            first = parts[1].start // MIB - 1
            lines.insert(1, f"start={first}MiB, size={parts[1].length // MIB + 1}MiB, type=5")
            return "\n".join(["label: dos", *(line.replace("linux", "83") for line in lines), ""])
        return "\n".join(["label: gpt", *lines, ""])


# --- a disk that the kernel mounts ----------------------------------------------------------------


@contextlib.contextmanager
def attached(qemu: Qemu, path: Path, folder: Path) -> Iterator[Path]:
    """Yield a file that shows the image's disk: through qemu-nbd of the given release, and FUSE."""
    socket, disk = path.with_name("nbd"), folder / "disk"
    disk.touch()
    server = subprocess.Popen(
        qemu.command("qemu-nbd", "-t", "-k", socket, "-f", "qcow2", "--discard=unmap", path), stderr=subprocess.DEVNULL
    )
    try:
        _wait(socket.exists)
        bridge = subprocess.Popen([
            "qemu-storage-daemon",
            "--blockdev", f"driver=nbd,node-name=disk,server.type=unix,server.path={socket},discard=unmap",
            "--export", f"fuse,id=export,node-name=disk,mountpoint={disk},writable=on",
        ])  # fmt: skip
        try:
            _wait(lambda: disk.stat().st_size > 0)
            yield disk
        finally:
            bridge.terminate()
            bridge.wait()
    finally:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)


def _wait(ready: Callable[[], bool]) -> None:
    for _ in range(600):
        if ready():
            return
        time.sleep(0.05)
    raise OSError("the image was not served")


@contextlib.contextmanager
def device(disk: Path, part: Part) -> Iterator[str]:
    """Yield a loop device over one partition."""
    assert len(part.pieces) == 1
    command = ["losetup", "--show", "-f", "-o", str(part.start), "--sizelimit", str(part.length), str(disk)]
    for attempt in range(20):  # others look for a free device too
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode == 0:
            break
        time.sleep(0.1 * attempt)
    name = made.stdout.strip()
    if not name:
        raise OSError(made.stderr.strip())
    try:
        yield name
    finally:
        trial.run("losetup", "-d", name)


@contextlib.contextmanager
def mounted(fs: str, disk: Path, part: Part, folder: Path) -> Iterator[Path]:
    """Yield the folder of a mounted partition."""
    place = folder / "mnt"
    place.mkdir(exist_ok=True)
    with device(disk, part) as name:
        trial.run(
            "mount", "-t", {"ntfs": "ntfs-3g"}.get(fs, fs), *(["-o", "nouuid"] if fs == "xfs" else []), name, place
        )
        try:
            yield place
        finally:
            _unmount(place)


def _unmount(place: Path) -> None:
    for attempt in range(40):
        if subprocess.run(["umount", str(place)], capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.05 * attempt)
    raise OSError(f"{place} stays mounted")


def make_file_system(fs: str, disk: Path, part: Part) -> None:
    with device(disk, part) as name:
        if fs == "ext4":
            trial.run("mke2fs", "-q", "-F", "-t", "ext4", name)
        elif fs == "xfs":
            trial.run("mkfs.xfs", "-q", "-f", name)
        else:
            trial.run("mkntfs", "-q", "-F", "-Q", "-s", "512", "-c", "4096", "-p", "2048", "-H", "16", "-S", "63", name)


# --- what is in it, and its use -------------------------------------------------------------------


def install(folder: Path, guest: Guest, chance: random.Random, most: int) -> None:
    """Copy a system: the root folder of another one, or parts of this machine's, in files of at most ``most`` bytes in all."""
    if guest.qemu.root is not None:
        names = ("bin", "sbin", "etc", "lib", "usr", "var")
        sources = [guest.qemu.root / name for name in names if not (guest.qemu.root / name).is_symlink()]
    else:
        sources = [Path(name) for name in chance.sample(LOCAL, 4) if Path(name).exists()]
    left = most
    for source in sources:
        left = copy_some(source, folder / source.name, left, chance)


def copy_some(source: Path, target: Path, most: int, chance: random.Random) -> int:
    """Copy a tree until ``most`` bytes are copied; returns what is left of them."""
    for where, folders, files in os.walk(source):
        folders.sort()
        chance.shuffle(folders)
        here = target / Path(where).relative_to(source)
        here.mkdir(parents=True, exist_ok=True)
        for name in sorted(files):
            path = Path(where, name)
            if path.is_symlink() or not path.is_file() or path.stat().st_size > most:
                continue
            with contextlib.suppress(OSError):  # a name that NTFS has no room for
                shutil.copyfile(path, here / name)
                most -= path.stat().st_size
    return most


def use(folder: Path, guest: Guest, chance: random.Random, number: int) -> None:
    """One round of use: whole folders and single files deleted, files rewritten and extended, others added."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    for path in chance.sample(files, len(files) // 8):
        path.unlink()
    kept = [path for path in files if path.exists()]
    for path in chance.sample(kept, len(kept) // 16):
        path.write_bytes(chance.randbytes(path.stat().st_size))
    for path in chance.sample(kept, len(kept) // 32):
        with path.open("r+b") as file:
            file.seek(chance.randrange(path.stat().st_size + 1))
            file.write(chance.randbytes(chance.randint(1, 20_000)))
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "lost+found")
    if len(folders) > 3 and chance.random() < 0.5:
        shutil.rmtree(chance.choice(folders), ignore_errors=True)
    install(folder / f"round {number}", guest, chance, 16 * MIB)
    (folder / f"log {number}").write_bytes(b"".join(f"{line} started\n".encode() for line in range(30_000)))


def partition(disk: Path, guest: Guest, folder: Path) -> None:
    """Write the partition table, and the metadata of volumes inside a partition."""
    if guest.layout == "bare":
        return
    subprocess.run(["sfdisk", "-q", str(disk)], input=guest.table().encode(), check=True, capture_output=True)
    if guest.layout not in IN_PIECES:
        return
    root, home = guest.parts()
    with device(disk, whole(MIB, guest.size - 3 * MIB)) as name:
        group = guest_disks.Group([Path(name)], folder)
        group.lvm(["pvcreate", "-q", "-y", "{0}"], ["vgcreate", "-q", "vg0", "{0}"])
        guest_disks.create_volume(group, "root", root.pieces[0][1])
        guest_disks.create_volume(group, "home", home.length)
        if len(root.pieces) > 1:
            group.lvm(["lvextend", "-q", "-L", f"{root.length}b", "vg0/root"])
        for part, volume in ((root, "root"), (home, "home")):
            found = tuple((MIB + extent.offset, extent.length) for extent in group.extents(volume))
            assert found == part.pieces, (found, part)


def put_together(folder: Path, raw: Path, guest: Guest, chance: random.Random) -> None:
    """Make a raw disk with volumes in several pieces from file systems in files of their own, which were used twice."""
    with raw.open("wb") as out:
        out.truncate(guest.size)
    partition(raw, guest, folder)
    for part in guest.parts():
        volume, inside = folder / "volume.raw", whole(0, part.length)
        with volume.open("wb") as out:
            out.truncate(part.length)
        make_file_system(guest.fs, volume, inside)
        with mounted(guest.fs, volume, inside, folder) as place:
            install(place, guest, chance, 45 * MIB)
        for number in range(2):
            with mounted(guest.fs, volume, inside, folder) as place:
                use(place, guest, chance, number)
        done = 0
        with volume.open("rb") as source, raw.open("r+b") as target:
            segments = trial.data_segments(volume)
            for start, length in part.pieces:
                for at, count in segments:
                    first, last = max(at, done), min(at + count, done + length)
                    if first < last:
                        source.seek(first)
                        target.seek(start + first - done)
                        target.write(source.read(last - first))
                done += length
        volume.unlink()


def make_guest(folder: Path, guest: Guest, chance: random.Random) -> Made:
    """Return the intact image with its raw disk."""
    path = folder / "image.qcow2"
    text = f"cluster_size={guest.cluster}" + (f",{guest.options}" if guest.options else "")
    guest.qemu.run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        text.replace("compression_type=zlib", "").rstrip(","),
        path,
        guest.size,
    )
    parts = guest.parts()
    if guest.layout == "grown":
        raw = folder / "grown.raw"
        put_together(folder, raw, guest, chance)
        packed = ["-c"] if "compression" in guest.options else []
        guest.qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *packed, "-o", text, raw, path)
        return Made(path, raw, guest.fs, guest.cluster, guest.how, guest.options)
    with attached(guest.qemu, path, folder) as disk:
        partition(disk, guest, folder)
        for number, part in enumerate(parts):
            if number and guest.layout == "cloned":
                with device(disk, parts[0]) as source, device(disk, part) as target:
                    trial.run("dd", f"if={source}", f"of={target}", "bs=1M", "conv=sparse,fsync", "status=none")
                continue
            make_file_system(guest.fs, disk, part)
            with mounted(guest.fs, disk, part, folder) as place:
                install(place, guest, chance, 90 * MIB // len(parts))
    if guest.how == "converted" and chance.random() < 0.5:  # what was deleted is still stored
        with attached(guest.qemu, path, folder) as disk, mounted(guest.fs, disk, parts[0], folder) as place:
            use(place, guest, chance, 0)
    if guest.how == "aged":
        has_snapshots = chance.random() < 0.5
        for number in range(3):
            if has_snapshots and chance.random() < 0.8:
                guest.qemu.run("qemu-img", "snapshot", "-c", f"round{number}", path)
            with attached(guest.qemu, path, folder) as disk:
                for part in chance.sample(parts, chance.randint(1, len(parts))):
                    with mounted(guest.fs, disk, part, folder) as place:
                        use(place, guest, chance, number)
                        if chance.random() < 0.3:
                            subprocess.run(["fstrim", str(place)], capture_output=True, check=False)
    elif guest.how == "converted":
        first = path.rename(folder / "first.qcow2")
        packed = ["-c"] if "compression" in guest.options else []
        guest.qemu.run("qemu-img", "convert", "-O", "qcow2", *packed, "-o", text, first, path)
        first.unlink()
    raw = folder / "disk.raw"
    guest.qemu.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    return Made(path, raw, guest.fs, guest.cluster, guest.how, guest.options)


def reverted(guest: Guest, made: Made, folder: Path, chance: random.Random) -> Damaged:
    """Take a snapshot, use the guest, go back: the state before is wanted. The intact image is changed."""
    guest.qemu.run("qemu-img", "snapshot", "-c", "back", made.path)
    with attached(guest.qemu, made.path, folder) as disk, mounted(guest.fs, disk, guest.parts()[0], folder) as place:
        use(place, guest, chance, 9)
    before = folder / "before.raw"
    guest.qemu.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", made.path, before)
    options = f"driver=qcow2,file.filename={made.path},pass-discard-snapshot=off"
    guest.qemu.run("qemu-img", "snapshot", "-a", "back", "--image-opts", options)
    return Damaged(made.path, before, None, {})


# --- files -----------------------------------------------------------------------------------------


class Files:
    """Compares files of a recovered disk with those of the intact one: ext4 and NTFS through pytsk3, XFS through libfsxfs."""

    def __init__(self, guest: Guest) -> None:
        self._fs = guest.fs
        self._parts = guest.parts()
        self._wanted: dict[Path, dict[str, str]] = {}

    def __call__(self, disk: q.Disk | None, raw: Path) -> dict[str, int]:
        if raw not in self._wanted:
            with raw.open("rb") as file:
                self._wanted[raw] = self._hashes(file)
        wanted = self._wanted[raw]
        found = self._hashes(disk.open()) if disk is not None else {}
        return {"all": len(wanted), "right": sum(found.get(name) == digest for name, digest in wanted.items())}

    def _hashes(self, stream: Any) -> dict[str, str]:
        found: dict[str, str] = {}
        walk = self._xfs if self._fs == "xfs" else self._tsk
        for number, part in enumerate(self._parts):
            with contextlib.suppress(OSError, RuntimeError):  # what was lost
                found.update((f"{number}{name}", digest) for name, digest in walk(stream, part))
        return found

    def _tsk(self, stream: Any, part: Part) -> Iterator[tuple[str, str]]:
        import pytsk3

        volume = _Part(stream, part)

        class Image(pytsk3.Img_Info):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

            def read(self, offset: int, length: int) -> bytes:
                volume.seek(offset)
                return volume.read(length)

            def get_size(self) -> int:
                return volume.get_size()

        file_system = pytsk3.FS_Info(Image())
        pending = [("", file_system.open_dir("/"))]
        seen: set[int] = set()
        while pending:
            path, folder = pending.pop()
            for entry in _readable(folder):
                name, meta = entry.info.name.name.decode("utf-8", "replace"), entry.info.meta
                if meta is None or name in (".", "..") or name.startswith("$") or entry.info.name.flags & 2:
                    continue
                if meta.type == pytsk3.TSK_FS_META_TYPE_DIR and meta.addr not in seen:
                    seen.add(meta.addr)
                    with contextlib.suppress(OSError, RuntimeError):
                        pending.append((f"{path}/{name}", entry.as_directory()))
                elif meta.type == pytsk3.TSK_FS_META_TYPE_REG and _is_judged(f"{path}/{name}"):
                    with contextlib.suppress(OSError, RuntimeError):
                        yield f"{path}/{name}", _sha256(entry.read_random, meta.size)

    def _xfs(self, stream: Any, part: Part) -> Iterator[tuple[str, str]]:
        import pyfsxfs

        volume = pyfsxfs.volume()
        volume.open_file_object(_Part(stream, part))
        pending = [("", volume.get_root_directory())]
        while pending:
            path, folder = pending.pop()
            for number in range(folder.get_number_of_sub_file_entries()):
                with contextlib.suppress(OSError, RuntimeError):
                    entry = folder.get_sub_file_entry(number)
                    name = f"{path}/{entry.name}"
                    kind = entry.get_file_mode() & 0xF000
                    if kind == 0x4000:
                        pending.append((name, entry))
                    elif kind == 0x8000 and _is_judged(name):
                        yield (
                            name,
                            _sha256(
                                lambda at, length, entry=entry: entry.read_buffer_at_offset(length, at), entry.size
                            ),
                        )


class _Part:
    """One file system of a stream as a file object."""

    def __init__(self, stream: Any, part: Part) -> None:
        self._stream, self._part, self._at = stream, part, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._part.length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def get_size(self) -> int:
        return self._part.length

    def read(self, size: int = -1) -> bytes:
        left = self._part.length - self._at
        left = left if size < 0 else max(0, min(size, left))
        data, before = b"", 0
        for start, length in self._part.pieces:
            inside = self._at - before
            before += length
            if 0 <= inside < length and left:
                self._stream.seek(start + inside)
                piece = bytes(self._stream.read(min(left, length - inside)))
                data += piece
                left -= len(piece)
                self._at += len(piece)
        return data


def _readable(folder: Any) -> Iterator[Any]:
    with contextlib.suppress(OSError, RuntimeError):
        yield from folder


def _is_judged(name: str) -> bool:
    return hashlib.md5(name.encode("utf-8", "replace"), usedforsecurity=False).digest()[0] < FILES_JUDGED


def _sha256(read: Callable[[int, int], bytes], size: int) -> str:
    digest, at = hashlib.sha256(), 0
    while at < size:
        data = read(at, min(MIB, size - at))
        if not data:
            break
        digest.update(data)
        at += len(data)
    return digest.hexdigest()


# --- the trial -------------------------------------------------------------------------------------


def guests(chance: random.Random, arguments: argparse.Namespace) -> Iterator[Guest]:
    """Yield guests of every kind in turn, without end."""
    systems = [Qemu(None), *(Qemu(path.resolve()) for path in arguments.qemu)]
    number = 0
    while True:
        system = chance.choice(systems)
        cluster = chance.choice(arguments.cluster or [4096, 4096, 16384, 65536, 65536])
        how = chance.choice(arguments.how or ["converted", "fresh", "aged", "aged"])
        options = chance.choice(["", "", "", "extended_l2=on", "compat=0.10"])
        if how == "converted":
            options = chance.choice([options, "compression_type=zlib", "compression_type=zstd"])
        if "zstd" in options:
            system = systems[0]  # not every release is built with it
        if options == "extended_l2=on":
            cluster = max(cluster, 16384)
        fs = (arguments.fs or ["ext4", "ntfs", "xfs"])[number % len(arguments.fs or "123")]
        low, high = SIZES[cluster]
        layout = chance.choice(arguments.layout or ["bare", "single", "single", "two", "lvm", "logical", "grown"])
        if layout == "grown":
            how = "converted"
        low = max(low, (320 if fs == "xfs" else 160) * MIB * (1 if layout in ("bare", "single") else 2) + 64 * MIB)
        size = chance.randrange(low, max(high, low + MIB), MIB)
        yield Guest(system, fs, layout, how, cluster, options, size)
        number += 1


def damages(guest: Guest, chance: random.Random, only: list[str] | None) -> list[str]:
    """Return the ways in which one guest's image is damaged."""
    ways = [
        "header-noise",
        chance.choice(["l1-zeroed", "l1-noise"]),
        "header-and-l1",
        chance.choice(["l2-zeroed", "l2-noise"]),
    ]
    ways += [way for way in ("carved", "header-zeroed") if chance.random() < 0.4]
    if "zstd" in guest.options or "extended_l2" in guest.options:
        ways.append("flag-cleared")
    return [way for way in ways if not only or way in only] + (
        ["reverted"] if guest.how != "converted" and (not only or "reverted" in only) else []
    )


def judge(folder: Path, guest: Guest, chance: random.Random, only: list[str] | None) -> Iterator[dict[str, Any]]:
    """Make one guest, damage it in several ways, and yield what came back from each."""
    facts: dict[str, Any] = {
        "qemu": guest.qemu.version, "fs": guest.fs, "layout": guest.layout, "how": guest.how, "cluster": guest.cluster,
        "options": guest.options, "size": guest.size,
    }  # fmt: skip
    made = make_guest(folder, guest, chance)
    facts["l2_tables"] = sum(slot >= 0 for slot in trial.true_slots(trial.layout_of(made.path)).values())
    facts["snapshots"] = trial.snapshots_of(made.path)
    facts["file_size"] = made.path.stat().st_size
    files = Files(guest)
    for way in damages(guest, chance, only):
        line = {**facts, "damage": way}
        try:
            damaged = (
                reverted(guest, made, folder, chance) if way == "reverted" else trial.DAMAGES[way](made, folder, chance)
            )
            line.update(trial.measure(damaged, files))
        except (q.Qcow2Error, OSError, subprocess.CalledProcessError) as error:
            line["failed"] = f"{type(error).__name__}: {error} {getattr(error, 'stderr', '')}"[:500]
        yield line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guests", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--qemu", type=Path, action="append", default=[], help="root folder of a system with another QEMU"
    )
    parser.add_argument("--only", action="append", choices=[*trial.DAMAGES])
    parser.add_argument("--fs", action="append", choices=["ext4", "ntfs", "xfs"])
    parser.add_argument("--cluster", action="append", type=int, choices=SIZES)
    parser.add_argument("--how", action="append", choices=["converted", "fresh", "aged"])
    parser.add_argument("--layout", action="append", choices=LAYOUTS)
    parser.add_argument("--keep", action="store_true", help="keep the images of the last guest")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what is mounted is unmounted
    chance = random.Random(arguments.seed)
    lines: list[dict[str, Any]] = []
    for number, guest in enumerate(guests(chance, arguments), 1):
        if number > arguments.guests:
            break
        seed = chance.randrange(1 << 30)
        below = guest.qemu.root / "tmp" if guest.qemu.root is not None else None
        folder = Path(tempfile.mkdtemp(prefix="recovery-guest-", dir=below))
        try:
            for line in judge(folder, guest, random.Random(seed), arguments.only):
                lines.append({"number": number, "seed": seed, **line})
                with arguments.out.open("a") if arguments.out else contextlib.nullcontext(sys.stdout) as out:
                    print(json.dumps(lines[-1]), flush=True, file=out)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"guest {number} was not made: {error} {getattr(error, 'stderr', '')}", file=sys.stderr, flush=True)
        finally:
            if not arguments.keep:
                shutil.rmtree(folder, ignore_errors=True)
    print(trial.summary(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
