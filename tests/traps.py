"""Traps: images meant to cost their reader time or memory, or to lead it somewhere else.

``TRAPS["BOMB"].build(folder)`` writes one and returns its path. The numbered images of
:mod:`tests.hostile` are small; these are the ones that need budgets.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qcow2_forensics import errors
from tests.hostile import Answer
from tests.image_builder import (
    COPIED,
    EXT_BACKING_FORMAT,
    EXT_BITMAPS,
    EXT_CRYPTO,
    EXT_DATA_FILE,
    PASSPHRASE,
    Builder,
    Poke,
    compressed_entry,
    deflate,
    extension,
    luks,
)

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
FORBIDDEN, LIMIT = errors.ForbiddenReference, errors.LimitExceeded


@dataclass(frozen=True)
class Trap:
    """An image meant to cost its reader dearly. ``strict`` and ``snapshots`` are as in :class:`Hostile`.

    ``qemu`` is whether QEMU opens it in reasonable time and memory, so that it may be compared.
    """

    id: str
    what: str
    build: Callable[[Path], Path]
    strict: Answer
    qemu: bool = False
    snapshots: Mapping[str, Answer] = field(default_factory=dict)
    passphrase: str | None = None


TRAPS: dict[str, Trap] = {}

# For matrices that are large: see tests/tiers.py. SNAPSHOTS-65536 and BOMB are for those that measure work.
REPRESENTATIVE = [
    "REFCOUNT-1-SHARED",
    "BITMAP-TABLE",
    "LOOP",
    "NAME-1023",
    "EXTENSION-HIDDEN",
    "SPARSE-15T",
    "BACKING-FIFO",
]


def _trap(
    ident: str,
    what: str,
    make: Callable[[Path], Path],
    strict: Answer,
    *,
    qemu_reads: bool = False,
    snapshots: Mapping[str, Answer] | None = None,
    passphrase: str | None = None,
) -> None:
    TRAPS[ident] = Trap(ident, what, make, strict, qemu_reads, snapshots or {}, passphrase)


# fmt: off


def _equal_l1(folder: Path) -> Path:
    builder = Builder(cluster_bits=9, size=(1 << 20) * 64 * 512)
    table = builder.put((builder.put(b"\x11" * 512) | COPIED).to_bytes(8, "big") * 64)
    builder.raw(builder.l1, table.to_bytes(8, "big") * (1 << 20))
    return builder.write(folder / "equal-l1.qcow2")


_trap("L1-EQUAL", "2^20 L1 entries that share one L2 table",
      _equal_l1, {0: b"\x11\x11", (1 << 20) * 64 * 512 - 512: b"\x11\x11"}, qemu_reads=True)


def _many_snapshots(folder: Path) -> Path:
    builder = Builder()
    builder.data(0, b"\x11" * 65536)
    shared = builder.put(b"")
    for index in range(65536):
        builder.snapshot(str(index + 1).encode(), b"s", l1_offset=shared, l1_size=4194304)
    path = builder.write(folder / "many-snapshots.qcow2")
    with path.open("r+b") as file:
        file.truncate(max(path.stat().st_size, shared + 32 * MiB))
    return path


_trap("SNAPSHOTS-65536", "65536 snapshots that share one L1 table of 32 MiB",
      _many_snapshots, {0: b"\x11\x11"}, snapshots={"1": {0: b"\0\0"}, "65536": {0: b"\0\0"}})


def _one_bit(folder: Path) -> Path:
    builder = Builder(refcount_order=0)
    host = builder.put(b"\x11" * 65536)
    return builder.entry(0, host).entry(0x10000, host).write(folder / "one-bit.qcow2")


_trap("REFCOUNT-1-SHARED", "a shared cluster under refcounts of one bit",
      _one_bit, {0: b"\x11\x11", 0x10000: b"\x11\x11"}, qemu_reads=True)


def _bomb(folder: Path) -> Path:
    builder = Builder(cluster_bits=21, size=100_000 * 2 * MiB)
    stream = deflate(bytes(2 * MiB))
    host = builder.put(stream)
    entry = compressed_entry(host, len(stream), 21)
    table = builder.put(struct.pack(">Q", entry) * 100_000)
    builder.raw(builder.l1, table.to_bytes(8, "big"))
    return builder.write(folder / "bomb.qcow2")


_trap("BOMB", "200 GiB from one stream of 2 KiB",
      _bomb, {0: b"\0\0", 99_999 * 2 * MiB: b"\0\0"}, qemu_reads=True)


def _bitmap_table(folder: Path) -> Path:
    builder = Builder(autoclear=1)
    entry = struct.pack(">QIIBBHI", 0x100000, 0x8000000, 0, 1, 16, 1, 0) + b"b" + bytes(7)
    directory = builder.put(entry)
    builder.extensions.append((EXT_BITMAPS, struct.pack(">IIQQ", 1, 0, len(entry), directory)))
    return builder.data(0, b"\x11" * 65536).write(folder / "bitmap-table.qcow2")


_trap("BITMAP-TABLE", "a bitmap table of 2^27 entries",
      _bitmap_table, {0: b"\x11\x11"})


def _loop(folder: Path) -> Path:
    first, second = folder / "loop-a.qcow2", folder / "loop-b.qcow2"
    for path, other in ((first, second), (second, first)):
        Builder(backing=other.name.encode(), extensions=[(EXT_BACKING_FORMAT, b"qcow2")]).write(path)
    return first


_trap("LOOP", "two images that are each other's backing file",
      _loop, FORBIDDEN)


def _self(folder: Path) -> Path:
    return Builder(backing=b"self.qcow2", extensions=[(EXT_BACKING_FORMAT, b"qcow2")]).write(folder / "self.qcow2")


_trap("SELF", "an image that is its own backing file",
      _self, FORBIDDEN)


def _chain(folder: Path) -> Path:
    for index in range(1000):
        builder = Builder(cluster_bits=9, size=4096, extensions=[(EXT_BACKING_FORMAT, b"qcow2")])
        builder.backing = f"c{index + 1}.qcow2".encode()
        builder.write(folder / f"c{index}.qcow2")
    Builder(cluster_bits=9, size=4096).data(0, b"\x11" * 512).write(folder / "c1000.qcow2")
    return folder / "c0.qcow2"


_trap("CHAIN-1000", "a chain of 1001 images",
      _chain, LIMIT)


def _long_name(folder: Path) -> Path:
    builder = Builder(backing=b"n" * 1023)
    return Poke(builder.write(folder / "long.qcow2")).write(65536 - 1023, b"n" * 1023).u64(8, 65536 - 1023).path


_trap("NAME-1023", "a backing file name of 1023 bytes at the end of the first cluster",
      _long_name, errors.Qcow2Error)


def _hidden_extension(folder: Path) -> Path:
    builder = Builder().data(0, b"\x11" * 65536)
    path = builder.write(folder / "hidden-extension.qcow2")
    hidden = struct.pack(">II", 0, 24) + extension(EXT_DATA_FILE, b"/etc/passwd")
    return Poke(path).write(112, hidden).path


_trap("EXTENSION-HIDDEN", "a header extension after the end marker",
      _hidden_extension, {0: b"\x11\x11"}, qemu_reads=True)


def _luks(name: str, *edits: tuple[int, int, int]) -> Callable[[Path], Path]:
    """Return a builder of a LUKS image whose LUKS header is edited: (offset, length, value)."""

    def make(folder: Path) -> Path:
        path = luks(folder / f"{name}.qcow2")
        poke = Poke(path)
        data = poke.read(0, 4096)
        at = data.index(struct.pack(">II", EXT_CRYPTO, 16))
        header = poke.get(at + 8)
        for offset, length, value in edits:
            poke.write(header + offset, value.to_bytes(length, "big"))
        return path

    return make


_SLOT0 = 208  # of the LUKS header: state u32, iterations u32, salt 32, key offset u32, stripes u32

_trap("LUKS-PAYLOAD", "a LUKS payload offset of 2^32 - 1 sectors, which nothing depends on",
      _luks("luks-payload", (104, 4, 0xFFFFFFFF)), {0: b"\x11\x11"}, qemu_reads=True, passphrase=PASSPHRASE)
_trap("LUKS-STRIPES", "a LUKS key slot of one stripe",
      _luks("luks-stripes", (_SLOT0 + 44, 4, 1)), errors.Qcow2Error, passphrase=PASSPHRASE)
_trap("LUKS-OVERLAP", "a LUKS key slot over the LUKS header",
      _luks("luks-overlap", (_SLOT0 + 40, 4, 0)), errors.Qcow2Error, passphrase=PASSPHRASE)
_trap("LUKS-TIME", "a LUKS key slot of 2^32 - 1 iterations",
      _luks("luks-time", (_SLOT0 + 4, 4, 0xFFFFFFFF)), errors.Qcow2Error, passphrase=PASSPHRASE)


def _qcow1(size: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        builder = Builder(version=1, cluster_bits=9, l2_bits=13, size=1 << 20)
        builder.data(0, b"\x11" * 512)
        return Poke(builder.write(folder / f"qcow1-{size.bit_length()}.qcow")).u64(24, size).path

    return make


_trap("QCOW1-2^55", "a version 1 disk of 2^55 bytes",
      _qcow1(1 << 55), errors.Qcow2Error)
_trap("QCOW1-2^64", "a version 1 disk of 2^64 - 1 bytes",
      _qcow1((1 << 64) - 1), errors.Qcow2Error)


def _sparse(folder: Path) -> Path:
    far = 15 * 1024 * GiB
    builder = Builder(size=1 << 20)
    host = builder.put(b"\x11" * 65536, far)
    return builder.entry(0, host | COPIED).write(folder / "sparse.qcow2")


_trap("SPARSE-15T", "a sparse file of 15 TiB with its data at the end",
      _sparse, {0: b"\x11\x11"}, qemu_reads=True)


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "base.fifo")
    return Builder(backing=b"base.fifo", extensions=[(EXT_BACKING_FORMAT, b"raw")]).write(folder / "over-fifo.qcow2")


_trap("BACKING-FIFO", "a FIFO as backing file",
      _fifo, FORBIDDEN)


def _folder(folder: Path) -> Path:
    (folder / "base.d").mkdir()
    return Builder(backing=b"base.d", extensions=[(EXT_BACKING_FORMAT, b"raw")]).write(folder / "over-folder.qcow2")


_trap("BACKING-FOLDER", "a folder as backing file",
      _folder, FORBIDDEN)


def _device(folder: Path) -> Path:
    (folder / "base.dev").symlink_to("/dev/zero")
    return Builder(backing=b"base.dev", extensions=[(EXT_BACKING_FORMAT, b"raw")]).write(folder / "over-device.qcow2")


_trap("BACKING-DEVICE", "a link to a device as backing file",
      _device, FORBIDDEN)
