"""File systems that the kernel of this machine does not write: a Debian kernel does, under emulation.

``QCOW2_GUEST_KERNEL`` names a folder into which two packages of Debian were unpacked::

    apt-get download busybox-static linux-image-6.1.0-57-amd64
    for each of them: dpkg-deb -x FILE FOLDER

HFS+ volumes are written upon the empty-enough one that macOS made, among the test files of dfVFS (``QCOW2_DFVFS_TEST_DATA``): Debian
12 has nothing that makes one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import qemu
from tests.guest_disks import Seen

KERNEL = "QCOW2_GUEST_KERNEL"
TEST_DATA = "QCOW2_DFVFS_TEST_DATA"
_TIMEOUT = 300  # seconds, of an emulated machine on a busy one
_MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"),
    *("nls_utf8", "cdrom", "hfsplus"),
)
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc none /proc; mount -t devtmpfs none /dev
for name in {modules}; do insmod /modules/$name.ko; done
mkdir -p /m
fail() {{ echo "FAILED: $1"; poweroff -f; }}
mount -t {kind} -o {options} /dev/vda /m || fail mount
cd /m && sh -e /work || fail work
cd / && umount /m && mount -t {kind} -o ro /dev/vda /m && cd /m || fail again
find . -mindepth 1 | while read -r path; do
  digest=-
  [ -f "$path" ] && [ ! -h "$path" ] && digest=$(sha256sum < "$path" | cut -d' ' -f1)
  link=-
  [ -h "$path" ] && link=$(readlink "$path")
  stat -c "SEEN|%F|%s|%a|%u|%g|%Y|%Z|$digest|$link|%n" "$path"
done
echo TREE-ENDS
cd / && umount /m; poweroff -f
"""

POPULATE = """
for n in $(seq 1 60); do
  mkdir -p folder$((n % 5)); head -c $((n * 97)) /dev/urandom > "folder$((n % 5))/file $n.dat"
done
head -c 400000 /dev/urandom > large.bin
yes before | head -c 21000 > edited.txt
yes A | tr -d '\\n' | head -c 50000 > 'in place.txt'
yes removed | head -c 16000 > removed.txt
echo moved > moved.txt
ln -s edited.txt link
"""
EDIT = """
yes after | head -c 54000 > edited.txt
head -c 100 /dev/urandom | dd of='in place.txt' bs=1 seek=20000 conv=notrunc 2>/dev/null
rm removed.txt
mv moved.txt folder1/renamed.txt
head -c 90000 /dev/urandom > implant.exe
"""
COVER = "rm implant.exe; rm -r folder2; touch -d '2020-09-13 12:26:40' 'in place.txt'\n"
REUSE = "head -c 200000 /dev/urandom > later.bin; mkdir 'new folder'; echo later > 'new folder/readme.txt'\n"
WORK = (POPULATE, EDIT, COVER, REUSE)


def hfs_volume(folder: Path) -> Path:
    """A copy of the volume that macOS made."""
    data = os.environ.get(TEST_DATA)
    if not data:
        pytest.skip(f"a volume of macOS is absent: set {TEST_DATA} to test_data of dfVFS")
    path = folder / "hfsplus-volume.raw"
    shutil.copyfile(Path(data) / "hfsplus.raw", path)
    with path.open("r+b") as stream:
        stream.truncate(-(-path.stat().st_size // 512) * 512)
    return path


def change(volume: Path, kind: str, work: str, options: str = "rw") -> dict[str, Seen]:
    """Let the kernel mount a volume and run a script in it; return what it shows when it has mounted it again."""
    if not qemu.system_available():
        pytest.skip("qemu-system-x86_64 is absent")
    image = _initramfs(volume.parent / "initramfs", kind, options, work)
    console = ("-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot")
    disk = f"file={volume},format=raw,if=virtio,cache=writeback"
    kernel = ("-kernel", _one("boot/vmlinuz-*"), "-initrd", image, "-append", "console=ttyS0 quiet panic=-1")
    done = subprocess.run(
        ["qemu-system-x86_64", "-m", "256", "-accel", "tcg", *console, *kernel, "-drive", disk],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=_TIMEOUT,
    )
    text = done.stdout.decode(errors="surrogateescape").replace("\r", "")
    assert "TREE-ENDS" in text, text[-3000:]
    lines = [line.split("|", 10)[1:] for line in text.splitlines() if line.startswith("SEEN|")]
    return dict(map(_seen, lines))


def _seen(fields: Sequence[str]) -> tuple[str, Seen]:
    what, size, mode, uid, gid, modified, changed, digest, link, path = fields
    kind = {"regular file": "r", "regular empty file": "r", "directory": "d", "symbolic link": "l"}.get(what, "?")
    times = int(modified) * 10**9, int(changed) * 10**9
    is_link = kind == "l"
    return path.removeprefix("."), Seen(
        kind,
        int(size),
        int(mode, 8),
        int(uid),
        int(gid),
        *times,
        link if is_link else "",
        digest if kind == "r" else "",
    )


def _one(pattern: str) -> Path:
    folder = os.environ.get(KERNEL)
    if not folder:
        pytest.skip(f"a kernel is absent: set {KERNEL} to a folder with packages of Debian")
    found = sorted(Path(folder).glob(pattern))
    if not found:
        pytest.skip(f"{pattern} is not in {folder}")
    return found[-1]


def _initramfs(path: Path, kind: str, options: str, work: str) -> Path:
    files = {"bin/busybox": _one("bin/busybox").read_bytes(), "work": work.encode()}
    files["init"] = _INIT.format(kind=kind, options=options, modules=" ".join(_MODULES)).encode()
    for name in _MODULES:
        files[f"modules/{name}.ko"] = _one(f"lib/modules/*/kernel/**/{name}.ko").read_bytes()
    folders = ("bin", "modules", "proc", "dev")
    with path.open("wb") as stream:
        for number, (name, mode, data) in enumerate(
            [(name, 0o040755, b"") for name in folders]
            + [(name, 0o100755, data) for name, data in files.items()]
            + [("TRAILER!!!", 0, b"")]
        ):
            fields = (number + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
            header = b"070701" + b"".join(b"%08x" % value for value in fields) + name.encode() + b"\0"
            stream.write(header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4))
    return path
