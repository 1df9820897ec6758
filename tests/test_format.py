"""The specification in Python agrees with QEMU: fields, extensions, limits on both sides, snapshots."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qcow2_forensics as q
from qcow2_forensics.errors import FormatError, LimitExceeded, NotQcow2, Qcow2Error, SnapshotNotFound, Unsupported
from qcow2_forensics.format.entries import compressed_descriptor, parse_entries
from qcow2_forensics.format.extensions import ExtensionType
from qcow2_forensics.format.header import parse_header
from qcow2_forensics.format.source import BytesSource
from tests import qemu
from tests.image_builder import (
    EXT_BACKING_FORMAT,
    EXT_BITMAPS,
    EXT_DATA_FILE,
    EXT_FEATURE_NAMES,
    S_SNAPSHOT_STEP,
    S_SNAPSHOTS,
    Builder,
    Poke,
    base_b,
    base_s,
    compressed_entry,
    empty,
    extension,
)

pytestmark = qemu.requires_qemu

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30

# --- headers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster", [512, 4096, 65536, 2 * MiB])
def test_header_facts_are_those_qemu_shows(compat: str, cluster: int, make_image: Callable[..., Path]) -> None:
    path = make_image("disk", 10 * MiB + 512, compat=compat, cluster_size=cluster)
    shown = qemu.info_json(path)
    with q.open_image(path) as image:
        assert image.disk_size == shown["virtual-size"]
        assert image.cluster_size == shown["cluster-size"]
        assert image.header.version == (2 if compat == "0.10" else 3)
        specific = shown["format-specific"]["data"]
        assert image.header.refcount_bits == specific["refcount-bits"]
        assert not image.problems


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"lazy_refcounts": "on"}, (0, 1, 0)),
        ({"extended_l2": "on", "cluster_size": "16k"}, (16, 0, 0)),
        ({"compression_type": "zstd"}, (8, 0, 0)),
        ({"refcount_bits": 1}, (0, 0, 0)),
    ],
)
def test_feature_bits_are_those_of_the_options(
    options: dict[str, Any], bits: tuple[int, int, int], make_image: Callable[..., Path]
) -> None:
    with q.open_image(make_image("disk", "1M", **options)) as image:
        header = image.header
        assert (header.incompatible_features, header.compatible_features, header.autoclear_features) == bits
        assert header.compression_type == (1 if "compression_type" in options else 0)


def test_every_header_field_has_the_offset_of_the_specification() -> None:
    names = {
        "magic": 0, "version": 4, "backing_file_offset": 8, "backing_file_size": 16, "cluster_bits": 20, "size": 24,
        "crypt_method": 32, "l1_size": 36, "l1_table_offset": 40, "refcount_table_offset": 48,
        "refcount_table_clusters": 56, "nb_snapshots": 60, "snapshots_offset": 64, "incompatible_features": 72,
        "compatible_features": 80, "autoclear_features": 88, "refcount_order": 96, "header_length": 100,
        "compression_type": 104,
    }  # fmt: skip
    header = parse_header(b"QFI\xfb" + struct.pack(">I", 3) + bytes(92) + struct.pack(">I", 112) + bytes(8))
    assert {field.name: field.offset for field in header.fields} == names


@pytest.mark.parametrize("bits", range(9, 22))
def test_compressed_descriptors_split_at_bit_70_minus_cluster_bits(bits: int) -> None:
    most_sectors = {9: 2, 12: 16, 16: 256, 21: 8192}.get(bits, 1 << (bits - 8))
    everything = (1 << 62) - 1
    offset, size = compressed_descriptor(everything, bits)
    assert offset == (1 << (70 - bits)) - 1
    assert size == most_sectors * 512 - offset % 512
    for at, length in ((0x50000, 1), (0x50001, 511), (0x501FF, 1 << (bits - 1)), (0x50000, 1 << bits)):
        found, covered = compressed_descriptor(compressed_entry(at, length, bits), bits)
        assert found == at
        assert length <= covered < length + 512


def test_a_version_2_header_takes_nothing_from_bytes_that_are_extensions_there(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "v2", "1M", compat="0.10")
    Poke(path).write(96, struct.pack(">II", 4, 104))  # as old QEMU left it
    with q.open_image(path) as image:
        assert (image.header.refcount_order, image.header.header_length) == (4, 72)
        assert image.header.offset_of("incompatible_features") is None


@pytest.mark.parametrize("size", [72, 60])
def test_a_version_2_file_cut_inside_its_header_reads_as_in_qemu_only_on_request(size: int, tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "v2", "1M", compat="0.10")
    Poke(path).cut(size)
    assert qemu.read(path, 0, 512) == bytes(512)
    with pytest.raises(FormatError):
        q.open_disk(path)
    with q.open_disk(path, eof="zeros") as disk:
        assert disk.read(0, 512) == bytes(512)


@pytest.mark.parametrize("content", [b"", b"QFI", b"QFI\xfb", b"QFI\xfb\0\0", b"KDMV" + bytes(600), bytes(4096)])
def test_what_does_not_start_as_an_image_is_not_qcow2(content: bytes) -> None:
    with pytest.raises(NotQcow2):
        q.open_image(BytesSource(content))


# --- limits, on both sides ------------------------------------------------------------------------


def _b(edit: Callable[[Poke], object]) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        edit(Poke(base_b(path)))
        return path

    return build


def _name(length: int) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        name = (b"./" * 600 + b"/base.qcow2")[-length:] if length % 2 else b"./" * (length // 2 - 5) + b"base.qcow2"
        base_b(path.parent / "base.qcow2")
        Poke(empty(path)).names([(EXT_BACKING_FORMAT, b"qcow2")], name)
        return path

    return build


def _format(name: bytes) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        base_b(path.parent / "base.qcow2")
        Poke(empty(path)).names([(EXT_BACKING_FORMAT, name)], b"base.qcow2")
        return path

    return build


def _v1(**fields: Any) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        return Builder(version=1, **fields).write(path)

    return build


def _v1_poke(edit: Callable[[Poke], object], **fields: Any) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        edit(Poke(Builder(version=1, **fields).write(path)))
        return path

    return build


# name, how it is made, whether QEMU opens it, whether our disk opens it (None: as QEMU).
LIMITS: list[tuple[str, Callable[[Path], Path], bool, bool | None]] = [
    ("cluster_bits 8", _b(lambda p: p.u32(20, 8)), False, None),
    ("cluster_bits 9", lambda p: Builder(cluster_bits=9).write(p), True, None),
    ("cluster_bits 21", lambda p: Builder(cluster_bits=21).write(p), True, None),
    ("cluster_bits 22", lambda p: Builder(cluster_bits=22).write(p), False, None),
    ("extended, 8 KiB clusters", lambda p: Builder(cluster_bits=13, extended_l2=True).write(p), False, None),
    ("extended, 16 KiB clusters", lambda p: Builder(cluster_bits=14, extended_l2=True).write(p), True, None),
    ("refcount_order 6", _b(lambda p: p.u32(96, 6)), True, None),
    ("refcount_order 7", _b(lambda p: p.u32(96, 7)), False, True),
    ("header_length 104", _b(lambda p: p.u32(100, 104)), True, None),
    ("header_length 103", _b(lambda p: p.u32(100, 103)), False, None),
    ("header_length of a cluster", _b(lambda p: p.u32(100, 65536)), True, None),
    ("header_length over a cluster", _b(lambda p: p.u32(100, 65537)), False, None),
    ("size 0", _b(lambda p: p.u64(24, 0)), True, None),
    ("size of the L1 table", _b(lambda p: p.u64(24, 512 * MiB)), True, None),
    ("size over the L1 table", _b(lambda p: p.u64(24, 512 * MiB + 1)), False, None),
    ("l1_size 0 of size 0", _b(lambda p: p.u64(24, 0).u32(36, 0)), True, None),
    ("l1_table_offset 0", _b(lambda p: p.u64(40, 0)), True, None),
    ("l1_table_offset 2^63", _b(lambda p: p.u64(40, 1 << 63)), False, None),
    ("refcount table of 8 MiB", _b(lambda p: p.u32(56, 128)), True, None),
    ("refcount table over 8 MiB", _b(lambda p: p.u32(56, 129)), False, True),
    ("refcount table unaligned", _b(lambda p: p.add(48, 512)), False, True),
    ("65537 snapshots", _b(lambda p: p.u32(60, 65537).u64(64, 0x80000)), False, True),
    ("crypt_method 3", _b(lambda p: p.u32(32, 3)), False, None),
    ("incompatible bit 5", _b(lambda p: p.u64(72, 32)), False, None),
    ("compatible bit 63", _b(lambda p: p.u64(80, 1 << 63)), True, None),
    ("autoclear bit 63", _b(lambda p: p.u64(88, 1 << 63)), True, None),
    ("compression type 1 without its bit", _b(lambda p: p.u8(104, 1)), False, None),
    ("compression type 200 with its bit", _b(lambda p: p.u8(104, 200).u64(72, 8)), False, None),
    ("compression type 1 with its bit", _b(lambda p: p.u8(104, 1).u64(72, 8)), True, None),
    ("name of 1023 bytes", _name(1023), True, None),
    ("name of 1024 bytes", _name(1024), False, None),
    ("name behind the cluster", _b(lambda p: p.u64(8, 65537).u32(16, 1)), False, None),
    ("name at the end of the cluster, no bytes", _b(lambda p: p.u64(8, 65536).u32(16, 0)), True, None),
    ("name over the end of the cluster", _b(lambda p: p.u64(8, 65530).u32(16, 7)), False, None),
    ("name of offset 0 with a size", _b(lambda p: p.u32(16, 4000)), True, None),
    ("format name of 15 bytes", _format(b"q" * 15), False, None),  # read, and then unknown
    ("format name of 16 bytes", _format(b"q" * 16), False, None),
    ("format name of no bytes", _format(b""), True, None),
    ("extension up to the name", _b(lambda p: p.write(112, struct.pack(">II", 0x1234, 65536 - 120))), True, None),
    ("extension over the end", _b(lambda p: p.write(112, struct.pack(">II", 0x1234, 65536 - 119))), False, None),
    ("no end marker", _b(lambda p: p.write(112, struct.pack(">II", 0x1234, 65536 - 128))), True, None),
    ("version 1, size 1", _v1_poke(lambda p: p.u64(24, 1)), False, None),
    ("version 1, size 2", _v1_poke(lambda p: p.u64(24, 2)), True, None),
    ("version 1, cluster_bits 8", _v1_poke(lambda p: p.u8(32, 8)), False, None),
    ("version 1, cluster_bits 9", _v1(cluster_bits=9), True, None),
    ("version 1, cluster_bits 16", _v1(cluster_bits=16), True, None),
    ("version 1, cluster_bits 17", _v1_poke(lambda p: p.u8(32, 17)), False, None),
    ("version 1, l2_bits 5", _v1_poke(lambda p: p.u8(33, 5)), False, None),
    ("version 1, l2_bits 6", _v1(l2_bits=6), True, None),
    ("version 1, l2_bits 13", _v1(l2_bits=13), True, None),
    ("version 1, l2_bits 14", _v1_poke(lambda p: p.u8(33, 14)), False, None),
    ("version 1, crypt_method 2", _v1_poke(lambda p: p.u32(36, 2)), False, None),
]  # fmt: skip


@pytest.mark.parametrize(("build", "qemu_opens", "ours"), [row[1:] for row in LIMITS], ids=[row[0] for row in LIMITS])
def test_limits_are_those_of_qemu_on_both_sides(
    build: Callable[[Path], Path], qemu_opens: bool, ours: bool | None, tmp_path: Path
) -> None:
    path = build(tmp_path / "image")
    fmt = "qcow" if path.read_bytes()[7] == 1 else "qcow2"
    assert qemu.io(path, "length", fmt=fmt, read_only=True, check=False).ok == qemu_opens
    try:
        q.open_disk(path, eof="zeros").close()
        opened = True
    except Qcow2Error:
        opened = False
    assert opened == (qemu_opens if ours is None else ours)


def test_above_a_limit_the_error_carries_name_value_and_limit(tmp_path: Path) -> None:
    path = base_b(tmp_path / "image")
    Poke(path).u32(36, 4194305)
    with pytest.raises(LimitExceeded) as caught:
        q.open_disk(path)
    assert (caught.value.name, caught.value.value, caught.value.limit) == ("l1_size", 4194305, 4194304)
    assert caught.value.offset == 36


def test_an_unknown_feature_is_named_from_the_feature_table(tmp_path: Path) -> None:
    path = base_b(tmp_path / "image")
    row = struct.pack("BB46s", 0, 40, b"flux capacitor")
    Poke(path).names([(EXT_FEATURE_NAMES, row)]).u64(72, 1 << 40)
    with pytest.raises(Unsupported, match="flux capacitor"):
        q.open_disk(path)
    assert "flux capacitor" in qemu.io(path, "length", check=False).stderr


# --- extensions -----------------------------------------------------------------------------------


def test_extensions_are_listed_with_offsets_and_data(make_image: Callable[..., Path], tmp_path: Path) -> None:
    make_image("base.qcow2")
    path = make_image("disk", None, backing="base.qcow2", backing_format="qcow2", cwd=tmp_path)
    with q.open_image(path) as image:
        data = path.read_bytes()
        kinds = [item.type for item in image.extensions]
        assert ExtensionType.BACKING_FORMAT in kinds
        assert ExtensionType.FEATURE_NAMES in kinds
        for item in image.extensions:
            assert data[item.offset : item.offset + 8] == struct.pack(">II", item.type, item.length)
            assert data[item.offset + 8 : item.offset + 8 + item.length] == item.data
        assert {row.name for row in image.feature_names} >= {b"dirty bit", b"corrupt bit", b"external data file"}
        assert (image.backing_name, image.backing_format) == ("base.qcow2", "qcow2")


def test_of_two_backing_formats_the_last_wins_as_in_qemu(tmp_path: Path) -> None:
    base_b(tmp_path / "base.qcow2")
    path = empty(tmp_path / "disk")
    Poke(path).names([(EXT_BACKING_FORMAT, b"raw"), (EXT_BACKING_FORMAT, b"qcow2")], b"base.qcow2")
    assert qemu.read(path, 0, 512) == b"\x11" * 512
    with q.open_disk(path) as disk:
        assert disk.read(0, 512) == b"\x11" * 512
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2"), (EXT_BACKING_FORMAT, b"raw")], b"base.qcow2")
    assert (qemu.read(path, 0, 512) or b"")[:4] == b"QFI\xfb"
    with q.open_disk(path) as disk:
        assert disk.read(0, 4) == b"QFI\xfb"


def test_no_extension_is_read_when_the_name_follows_the_header_at_once(tmp_path: Path) -> None:
    base_b(tmp_path / "base.qcow2")
    path = empty(tmp_path / "disk")
    area = b"base.qcow2".ljust(16, b"\0") + extension(EXT_DATA_FILE, b"/etc/passwd")
    Poke(path).names().write(112, area).u64(8, 112).u32(16, 10)
    assert qemu.read(path, 0, 512) == b"\x11" * 512
    with q.open_disk(path) as disk:
        assert disk.image.extensions == ()
        assert disk.read(0, 512) == b"\x11" * 512


@pytest.mark.parametrize("length", [8, 65416, 65417, 0xFFFFFFFF])
def test_the_length_of_the_end_marker_is_ignored(length: int, tmp_path: Path) -> None:
    path = base_b(tmp_path / "disk")
    Poke(path).names().write(112, struct.pack(">II", 0, length))
    fits = length <= 65536 - 120
    assert (qemu.read(path, 0, 512) is not None) == fits  # QEMU ignores only one that fits
    with q.open_disk(path) as disk:
        assert disk.read(0, 512) == b"\x11" * 512
        assert bool(disk.image.problems) != fits


def test_broken_bitmaps_never_block_the_disk(tmp_path: Path) -> None:
    path = base_b(tmp_path / "disk")
    Poke(path).names([(EXT_BITMAPS, struct.pack(">IIQQ", 0, 1, 1 << 60, 3))]).u64(88, 1)
    assert not qemu.io(path, "length", check=False).ok  # a deliberate difference: evidence access first
    with q.open_disk(path) as disk:
        assert disk.read(0, 512) == b"\x11" * 512
        assert any(problem.code == "QCOW2-BITMAP-INVALID" for problem in disk.image.problems)


# --- snapshots ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_snapshot_entries_are_those_qemu_lists(compat: str, make_image: Callable[..., Path]) -> None:
    path = make_image("disk", "1M", "write -P 1 0 64k", compat=compat)
    for name in ("one", "zwei", "третий", "n" * 200, "a b,c=d"):
        qemu.snapshot(path, name)
    qemu.snapshot(path, "zwei", action="-d")
    with q.open_image(path) as image:
        ours = [
            {
                "id": entry.id,
                "name": entry.name,
                "date-sec": entry.date_sec,
                "date-nsec": entry.date_nsec,
                "vm-clock-sec": entry.vm_clock_nsec // 10**9,
                "vm-clock-nsec": entry.vm_clock_nsec % 10**9,
                "vm-state-size": entry.vm_state_size,
                "icount": entry.icount,
            }
            for entry in image.snapshots
        ]
        assert ours == qemu.info_json(path)["snapshots"]
        assert [entry.id for entry in image.snapshots] == ["1", "3", "4", "5"]
        assert all(entry.disk_size == MiB and entry.extra_length == 24 for entry in image.snapshots)


def test_a_snapshot_keeps_its_own_size_after_a_resize(make_image: Callable[..., Path]) -> None:
    path = make_image("disk", "1M", "write -P 1 0 1M", cluster_size=512)
    qemu.snapshot(path, "small")
    qemu.resize(path, "4M")
    qemu.io(path, "write -P 2 0 4M")
    qemu.snapshot(path, "large")
    with q.open_disk(path, "small") as disk:
        assert disk.size == MiB
        assert disk.read(0, 2 * MiB) == b"\x01" * MiB
    with q.open_disk(path, "large") as disk:
        assert disk.read(0, 8 * MiB) == b"\x02" * 4 * MiB


@qemu.requires_qemu_system
def test_a_snapshot_never_shows_vm_state_behind_its_disk(make_image: Callable[..., Path]) -> None:
    path = make_image("disk", "1M", "write -P 1 0 1M", cluster_size="4k")
    qemu.monitor(path, "savevm vm")
    # QEMU itself shows the VM state there once the disk has grown over it.
    qemu.resize(path, "8M")
    with q.open_disk(path, "vm") as disk, q.open_vm_state(path) as state:
        assert disk.size == MiB
        assert disk.read(0, 8 * MiB) == b"\x01" * MiB
        assert state.read(0, 8)[:4] == b"QEVM"
        assert state.offset >= MiB
        assert state.size == qemu.info_json(path)["snapshots"][0]["vm-state-size"]
        assert len(state.read(0, 1 << 40)) == state.size
        assert state.read(state.size, 1) == b""


@pytest.mark.parametrize("extra", [0, 8, 16])
def test_version_2_snapshots_of_older_qemu_read(extra: int, tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk", "1M", compat="0.10")
    qemu.io(path, "write -P 0x11 0 64k")
    qemu.snapshot(path, "old")
    qemu.io(path, "write -P 0x22 0 64k")
    poke = Poke(path)
    at = poke.get(64)
    head, tail = poke.read(at, 40), poke.read(at + 40 + 24, 4)
    poke.write(at, head[:36] + struct.pack(">I", extra) + poke.read(at + 40, extra) + tail + bytes(24 - extra))
    assert qemu.raw_bytes(path, snapshot="old")[:1] == b"\x11"
    with q.open_disk(path, "old") as disk:
        assert disk.size == MiB
        assert disk.read(0, 65536) == b"\x11" * 65536
        assert disk.snapshot is not None
        assert disk.snapshot.disk_size == (MiB if extra >= 16 else None)
        assert disk.snapshot.icount is None


def test_the_64_bit_vm_state_size_overrides_the_32_bit_one(tmp_path: Path) -> None:
    path = base_s(tmp_path / "disk")
    Poke(path).u32(S_SNAPSHOTS + 32, 77).u64(S_SNAPSHOTS + 40, 5 << 30)
    assert qemu.info_json(path)["snapshots"][0]["vm-state-size"] == 5 << 30
    with q.open_image(path) as image:
        assert image.snapshots[0].vm_state_size == 5 << 30


def test_an_id_that_is_another_snapshots_name_is_refused_with_both_spellings(tmp_path: Path) -> None:
    path = base_s(tmp_path / "disk")
    Poke(path).write(S_SNAPSHOTS + S_SNAPSHOT_STEP + 65, b"1 ")  # the second one is now called "1 "
    Poke(path).u16(S_SNAPSHOTS + S_SNAPSHOT_STEP + 14, 1)  # and now "1"
    with pytest.raises(SnapshotNotFound, match="ambiguous") as both:
        q.open_disk(path, "1")
    assert both.value.choices == ("index:0 (ID 1, s1)", "2 (1)")
    for wanted, first in (("id:1", b"\x11"), ("index:0", b"\x11"), ("name:1", b"\x22"), ("2", b"\x22")):
        with q.open_disk(path, wanted) as disk:
            assert disk.read(0, 1) == first


def test_an_ambiguous_or_unknown_snapshot_lists_the_choices(tmp_path: Path) -> None:
    path = base_s(tmp_path / "disk")
    with pytest.raises(SnapshotNotFound) as unknown:
        q.open_disk(path, "nope")
    assert "1 (s1)" in str(unknown.value)
    assert "2 (s2)" in str(unknown.value)
    Poke(path).write(S_SNAPSHOTS + S_SNAPSHOT_STEP + 65, b"s1")
    with pytest.raises(SnapshotNotFound) as ambiguous:
        q.open_disk(path, "s1")
    assert ambiguous.value.ambiguous
    assert ambiguous.value.choices == ("1 (s1)", "2 (s1)")


@pytest.mark.parametrize("extra", [1024, 1025])
def test_extra_data_up_to_1024_bytes_is_kept(extra: int, tmp_path: Path) -> None:
    builder = Builder()
    builder.data(0, b"\x11" * 65536)
    data = struct.pack(">QQq", 0, builder.size, 0).ljust(extra, b"x")
    builder.snapshot(b"1", b"s", l1_offset=builder.put(bytes(8)), l1_size=1, extra=data)
    path = builder.write(tmp_path / "disk")
    assert qemu.io(path, "length", check=False, read_only=True).ok == (extra == 1024)
    with q.open_image(path) as image:
        assert [entry.extra for entry in image.snapshots] == ([data] if extra == 1024 else [])
        assert bool(image.problems) == (extra == 1025)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [512, 1000, 1023, 1024, 65535, 65537, MiB - 1])
def test_the_exposed_size_is_whole_sectors(size: int, tmp_path: Path) -> None:
    path = base_b(tmp_path / "disk")
    Poke(path).u64(24, size)
    with q.open_disk(path) as disk:
        assert disk.size == qemu.info_json(path)["virtual-size"] == size // 512 * 512
        assert disk.read(0, size) == qemu.raw_bytes(path)


def test_words_come_out_in_the_order_of_the_machine() -> None:
    assert list(parse_entries(bytes.fromhex("0000000000000102 8000000000050000"))) == [0x102, 0x8000000000050000]


_DECODERS = {"format/entries.py", "census/columns.py", "reader/l2_runs.py", "reader/mapping.py", "reader/disk.py"}
_DECODERS |= {"recovery/geometry.py"}  # asks what may be an entry, of words of any meaning
_MASK = re.compile(r"\b(OFFSET_MASK|REFTABLE_OFFSET_MASK|COMPRESSED|[A-Z0-9_]+_RESERVED)\b")


def test_table_entries_are_masked_by_their_decoders_only() -> None:
    source = Path(q.__file__).parent
    entries = {path: path.read_text(encoding="utf-8") for path in source.rglob("*.py")}
    imports = {
        path: re.findall(r"^from [.]+(?:format[.])?entries import (\([^)]*\)|.*)$", text, re.MULTILINE)
        for path, text in entries.items()
    }
    found = {str(path.relative_to(source)) for path, names in imports.items() if any(map(_MASK.search, names))}
    assert found <= _DECODERS
