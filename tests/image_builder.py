"""Images that QEMU cannot make: edits of real ones, and a small writer for crafted ones.

:class:`Poke` edits a file in place. :class:`Builder` writes QCOW version 1, 2 and 3 images from
guest clusters and raw table entries. Neither proves that the reader is right (the oracle does);
they make bytes for it to be right about. Nothing here uses the library under test.
"""

from __future__ import annotations

import functools
import shutil
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests import qemu

MAGIC = b"QFI\xfb"
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1

PASSPHRASE = "correct horse, battery"  # of every encrypted image made here

EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
EXT_DATA_FILE = 0x44415441

# Layout of base image B: 64 KiB clusters, three of data.
B_REFTABLE, B_REFBLOCK, B_L1, B_L2, B_DATA, B_END = 0x10000, 0x20000, 0x30000, 0x40000, 0x50000, 0x80000
# Layout of base image S: two snapshots, table entries 72 bytes apart.
S_SNAPSHOTS, S_SNAPSHOT_STEP = 0xB0000, 72


class Poke:
    """Edits one file in place, big-endian; every edit returns the editor, so that they chain."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def get(self, offset: int, length: int = 8) -> int:
        """Return the big-endian number at ``offset``."""
        return int.from_bytes(self.read(offset, length), "big")

    def write(self, offset: int, data: bytes) -> Poke:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        return self

    def u8(self, offset: int, value: int) -> Poke:
        return self.write(offset, value.to_bytes(1, "big"))

    def u16(self, offset: int, value: int) -> Poke:
        return self.write(offset, value.to_bytes(2, "big"))

    def u32(self, offset: int, value: int) -> Poke:
        return self.write(offset, value.to_bytes(4, "big"))

    def u64(self, offset: int, value: int) -> Poke:
        return self.write(offset, value.to_bytes(8, "big"))

    def set_bits(self, offset: int, bits: int) -> Poke:
        """Set bits of the 64-bit number at ``offset``."""
        return self.u64(offset, self.get(offset) | bits)

    def clear_bits(self, offset: int, bits: int) -> Poke:
        """Clear bits of the 64-bit number at ``offset``."""
        return self.u64(offset, self.get(offset) & ~bits)

    def add(self, offset: int, delta: int) -> Poke:
        """Add to the 64-bit number at ``offset``."""
        return self.u64(offset, self.get(offset) + delta)

    def cut(self, size: int) -> Poke:
        """Cut the file to ``size`` bytes."""
        with self.path.open("r+b") as file:
            file.truncate(size)
        return self

    def append(self, data: bytes) -> Poke:
        with self.path.open("ab") as file:
            file.write(data)
        return self

    # Names for the layout of base image B.

    def l1(self, index: int, value: int) -> Poke:
        return self.u64(B_L1 + 8 * index, value)

    def l2(self, index: int, value: int) -> Poke:
        return self.u64(B_L2 + 8 * index, value)

    def refcount(self, cluster: int, value: int) -> Poke:
        return self.u16(B_REFBLOCK + 2 * cluster, value)

    def names(
        self, extensions: Iterable[tuple[int, bytes]] = (), backing: bytes | None = None, *, at: int | None = None
    ) -> Poke:
        """Rewrite everything between the header and the end of its first 4 KiB.

        ``backing`` is stored after the extensions, or at file offset ``at``; None leaves the image
        without a backing file.
        """
        header_length = self.get(100, 4) if self.get(4, 4) >= 3 else 72
        area = b"".join(extension(kind, data) for kind, data in extensions) + extension(0, b"")
        self.write(header_length, bytes(4096 - header_length)).write(header_length, area)
        if backing is None:
            return self.u64(8, 0).u32(16, 0)
        where = header_length + len(area) if at is None else at
        return self.write(where, backing).u64(8, where).u32(16, len(backing))


def extension(kind: int, data: bytes) -> bytes:
    """Return one header extension with its padding."""
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def deflate(data: bytes, level: int = 9) -> bytes:
    """Return a raw deflate stream of ``data`` with the 4 KiB window QEMU writes."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int:
    """Return the L2 entry of a compressed cluster of ``length`` bytes at host ``offset``."""
    split = 70 - cluster_bits
    sectors = (offset + length - 1) // 512 - offset // 512
    return COMPRESSED | sectors << split | offset


# --- base images ---------------------------------------------------------------------------------


@functools.cache
def _template(kind: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="qcow2-base-") as folder:
        if kind == "luks":
            path = qemu.create(Path(folder) / kind, "1M", secret=PASSPHRASE)
            qemu.io(path, "write -P 0x11 0 64k", secret=PASSPHRASE)
            return path.read_bytes()
        path = qemu.create(Path(folder) / kind, "1M", cluster_size="64k")
        if kind == "B":
            qemu.io(path, "write -P 0x11 0 64k", "write -P 0x22 64k 64k", "write -P 0x33 128k 64k")
        elif kind == "S":
            qemu.io(path, "write -P 0x11 0 64k")
            qemu.snapshot(path, "s1")
            qemu.io(path, "write -P 0x22 0 64k")
            qemu.snapshot(path, "s2")
        return path.read_bytes()


def base_b(path: Path) -> Path:
    """Write base image B: clusters 0, 1 and 2 hold 0x11, 0x22 and 0x33. Made by QEMU."""
    path.write_bytes(_template("B"))
    return path


def base_s(path: Path) -> Path:
    """Write base image S: cluster 0 held 0x11 at snapshot s1, 0x22 at s2 and now. Made by QEMU."""
    path.write_bytes(_template("S"))
    return path


def empty(path: Path) -> Path:
    """Write an image of 1 MiB without data. Made by QEMU."""
    path.write_bytes(_template("empty"))
    return path


def luks(path: Path) -> Path:
    """Write a LUKS image whose first cluster holds 0x11. Made by QEMU, unlocked by PASSPHRASE."""
    path.write_bytes(_template("luks"))
    return path


# --- the writer ----------------------------------------------------------------------------------


@dataclass
class Builder:
    """Collects guest clusters and table entries, then writes one image.

    Clusters are handed out in call order after the header and the active L1; the refcount table and
    its blocks come last and follow from what was placed. ``fields`` overrides header bytes at the end:
    ``{offset: (value, length)}``.
    """

    size: int = 1 << 20
    version: int = 3
    cluster_bits: int = 16
    l2_bits: int = 9  # version 1 only
    l1_size: int | None = None
    refcount_order: int = 4
    extended_l2: bool = False
    crypt_method: int = 0
    compression_type: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    header_length: int = 112
    extensions: list[tuple[int, bytes]] = field(default_factory=list)
    backing: bytes | None = None
    fields: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cluster_size = 1 << self.cluster_bits
        self.entry_size = 16 if self.extended_l2 else 8
        self.l2_entries = 1 << self.l2_bits if self.version == 1 else self.cluster_size // self.entry_size
        if self.l1_size is None:
            self.l1_size = -(-self.size // (self.cluster_size * self.l2_entries))
        self.references: Counter[int] = Counter()
        self._chunks: dict[int, bytearray] = {}
        self._snapshots: list[bytes] = []
        self._l2: dict[int, int] = {}  # L1 index to L2 offset
        self._end = 0
        self._place(self.cluster_size)  # the header
        self.reftable = self.reftable_clusters = 0
        self.l1 = self._place(max(8 * self.l1_size, 8))

    def _place(self, length: int, at: int | None = None) -> int:
        """Reserve clusters for ``length`` bytes and return their offset."""
        offset = self._end if at is None else at
        clusters = -(-length // self.cluster_size)
        for index in range(clusters):
            self.references[offset // self.cluster_size + index] += 1
        self._end = max(self._end, offset + clusters * self.cluster_size)
        return offset

    def put(self, data: bytes, at: int | None = None) -> int:
        """Store host bytes in clusters of their own and return their offset."""
        offset = self._place(len(data), at)
        self._chunks[offset] = bytearray(data)
        return offset

    def entry(self, guest: int, value: int, bitmap: int = 0) -> Builder:
        """Set the L2 entry of the cluster at guest offset ``guest``."""
        index, slot = divmod(guest >> self.cluster_bits, self.l2_entries)
        if index not in self._l2:
            self._l2[index] = self.put(bytes(self.l2_entries * self.entry_size))
            flag = 0 if self.version == 1 else COPIED
            self.raw(self.l1 + 8 * index, (self._l2[index] | flag).to_bytes(8, "big"))
        packed = value.to_bytes(8, "big") + (bitmap.to_bytes(8, "big") if self.extended_l2 else b"")
        at = slot * self.entry_size
        self._chunks[self._l2[index]][at : at + len(packed)] = packed
        return self

    def raw(self, offset: int, data: bytes) -> Builder:
        """Store host bytes without accounting for them."""
        self._chunks[offset] = bytearray(data)
        return self

    def data(self, guest: int, data: bytes, *, at: int | None = None) -> Builder:
        """Store one guest cluster as it is."""
        host = self.put(data.ljust(self.cluster_size, b"\0"), at)
        return self.entry(guest, host | (0 if self.version == 1 else COPIED), 0xFFFFFFFF)

    def packed(self, guest: int, stream: bytes) -> Builder:
        """Store one guest cluster as a compressed stream."""
        host = self.put(stream)
        if self.version == 1:
            return self.entry(guest, 1 << 63 | len(stream) << (63 - self.cluster_bits) | host)
        return self.entry(guest, compressed_entry(host, len(stream), self.cluster_bits))

    def snapshot(
        self,
        ident: bytes,
        name: bytes,
        *,
        l1_offset: int,
        l1_size: int,
        disk_size: int | None = None,
        vm_size: int = 0,
        extra: bytes | None = None,
        date: tuple[int, int] = (1_700_000_000, 0),
    ) -> Builder:
        """Add one snapshot table entry; ``extra`` overrides the usual 24 bytes of extra data."""
        if extra is None:
            extra = struct.pack(">QQq", vm_size, self.size if disk_size is None else disk_size, 0)
        head = struct.pack(
            ">QIHHIIQII", l1_offset, l1_size, len(ident), len(name), *date, 0, vm_size & 0xFFFFFFFF, len(extra)
        )
        entry = head + extra + ident + name
        self._snapshots.append(entry + bytes(-len(entry) % 8))
        return self

    def write(self, path: Path) -> Path:
        """Write the image, with holes where nothing was put."""
        table_offset = self.put(b"".join(self._snapshots)) if self._snapshots else 0
        if self.version > 1:
            self._count()
        with path.open("wb") as file:
            file.truncate(self._end)
            for offset, data in self._chunks.items():
                file.seek(offset)
                file.write(data)
            file.seek(0)
            file.write(self._header(table_offset))
            for offset, (value, length) in self.fields.items():
                file.seek(offset)
                file.write(value.to_bytes(length, "big"))
        return path

    def _count(self) -> None:
        bits = 1 << self.refcount_order
        per_block = self.cluster_size * 8 // bits
        most = self._end // self.cluster_size // per_block + 2  # blocks, themselves not yet counted
        self.reftable_clusters = -(-8 * (most + most // per_block + 2) // self.cluster_size)
        self.reftable = self._place(self.reftable_clusters * self.cluster_size)
        table = bytearray(self.reftable_clusters * self.cluster_size)
        blocks: dict[int, int] = {}
        todo = {cluster // per_block for cluster in self.references}
        while todo:  # a refcount block is itself counted, maybe by another block
            number = todo.pop()
            if number not in blocks:
                blocks[number] = self._place(self.cluster_size)
                todo.add(blocks[number] // self.cluster_size // per_block)
        for number, offset in blocks.items():
            block = bytearray(self.cluster_size)
            for slot in range(per_block):
                count = min(self.references.get(number * per_block + slot, 0), (1 << bits) - 1)
                if bits < 8:
                    block[slot * bits // 8] |= count << slot * bits % 8
                elif count:
                    block[slot * bits // 8 : (slot + 1) * bits // 8] = count.to_bytes(bits // 8, "big")
            self._chunks[offset] = block
            table[8 * number : 8 * number + 8] = offset.to_bytes(8, "big")
        if len(table) != self.reftable_clusters * self.cluster_size:
            raise ValueError("the refcount table is too small for its blocks")
        self._chunks[self.reftable] = table

    def _header(self, snapshots_offset: int) -> bytes:
        length = {1: 48, 2: 72}.get(self.version, self.header_length)
        area = b""
        if self.version > 1:
            area = b"".join(extension(kind, data) for kind, data in self.extensions) + extension(0, b"")
        name_at = length + len(area) if self.backing is not None else 0
        start = MAGIC + struct.pack(">IQI", self.version, name_at, len(self.backing or b""))
        if self.version == 1:
            head = struct.pack(">IQBBHIQ", 0, self.size, self.cluster_bits, self.l2_bits, 0, self.crypt_method, self.l1)
            return start + head + (self.backing or b"")
        head = struct.pack(
            ">IQIIQQIIQ",
            *(self.cluster_bits, self.size, self.crypt_method, self.l1_size, self.l1),
            *(self.reftable, self.reftable_clusters, len(self._snapshots), snapshots_offset),
        )
        if self.version > 2:
            incompatible = self.incompatible | self.extended_l2 << 4 | (self.compression_type != 0) << 3
            head += struct.pack(">QQQII", incompatible, self.compatible, self.autoclear, self.refcount_order, length)
            head += bytes([self.compression_type]) + bytes(7) if length > 104 else b""
        return (start + head).ljust(length, b"\0") + area + (self.backing or b"")


def copy(source: Path, target: Path) -> Path:
    """Copy a file without its times; returns the copy."""
    shutil.copyfile(source, target)
    return target
