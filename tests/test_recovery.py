"""States put together from what is left of damaged images hold the bytes that QEMU read before the damage.

The images are made by qemu-img; the damage is done here, byte by byte, by the offsets in the intact header.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import tracemalloc
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics import audit, open_disk
from qcow2_forensics.cli import main
from qcow2_forensics.errors import LimitExceeded, Qcow2Error, SnapshotNotFound
from qcow2_forensics.findings import Severity
from qcow2_forensics.format.source import BytesSource, FileSource
from qcow2_forensics.limits import L1_ENTRIES
from qcow2_forensics.reader.parts import gatherable
from qcow2_forensics.recovery import Confidence, RecoveredState, confidence_of, open_recovered, recovered_states
from qcow2_forensics.recovery.patched_source import PatchedSource
from qcow2_forensics.recovery.without_header import Rebuilder
from qcow2_forensics.render.next_commands import next_command
from qcow2_forensics.residue.restricted_source import GuardedSource, Refusals
from qcow2_forensics.residue.structure_detection import Geometry
from tests import qemu
from tests.image_builder import S_SNAPSHOTS, Builder, Poke, base_s
from tests.tiers import every, quick

SIZE = 6 << 20
CLUSTERS = {"512": 512, "4k": 4096, "64k": 65536, "2M": 2 << 20}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a raw disk whose every cluster holds data, half of it compressible."""
    chance = random.Random(19)
    path = tmp_path_factory.mktemp("recovery") / "disk.raw"
    path.write_bytes(b"".join(chance.randbytes(2048) + b"%8d" % n * 256 for n in range(SIZE // 4096)))
    return path


def converted(raw: Path, path: Path, *options: str, compress: bool = False) -> bytearray:
    """Return the bytes of a converted image."""
    qemu.img("convert", "-O", "qcow2", *(["-c"] if compress else []), *options, raw, path)
    return bytearray(path.read_bytes())


def header_of(data: bytes) -> tuple[int, int, int]:
    """Return cluster size, L1 entries and L1 table offset."""
    (bits,), (l1_size, l1_offset) = struct.unpack_from(">I", data, 20), struct.unpack_from(">IQ", data, 36)
    return 1 << bits, l1_size, l1_offset


def read_all(state: RecoveredState) -> bytes:
    with state.open() as disk:
        return disk.read(0, disk.size)


def sure_bytes_are_right(state: RecoveredState, expected: bytes) -> bool:
    """Whether every byte in a range that is certain is the one expected."""
    with state.open() as disk:
        return all(
            disk.read(piece.offset, piece.length) == expected[piece.offset : piece.offset + piece.length]
            for piece in state.ranges(disk)
            if piece.confidence is Confidence.CERTAIN
        )


LAYOUTS = [
    *((size, "", False) for size in CLUSTERS),
    *((size, "", True) for size in CLUSTERS),
    *((size, "compression_type=zstd", True) for size in CLUSTERS),
    ("64k", "extended_l2=on", False),
    ("2M", "extended_l2=on", False),
    ("64k", "compat=0.10", False),
]
QUICK_LAYOUTS = [
    ("4k", "", False),
    ("64k", "", True),
    ("64k", "compression_type=zstd", True),
    ("2M", "extended_l2=on", False),
]


@pytest.mark.parametrize(("cluster_size", "option", "compress"), quick(LAYOUTS, QUICK_LAYOUTS, unpack=True))
def test_a_lost_header_costs_no_byte_while_the_l1_table_is_there(
    cluster_size: str, option: str, compress: bool, raw: Path, tmp_path: Path
) -> None:
    options = f"cluster_size={cluster_size}" + (f",{option}" if option else "")
    data = converted(raw, tmp_path / "image.qcow2", "-o", options, compress=compress)
    size = header_of(data)[0]
    data[:size] = os.urandom(size)
    path = tmp_path / "no-header.bin"
    path.write_bytes(data)
    best = recovered_states(path)[0]
    assert (best.cluster_size, best.size) == (size, SIZE)
    assert read_all(best) == raw.read_bytes()


@qemu.requires_qemu
@pytest.mark.parametrize("header_too", [False, True])
def test_l2_tables_without_entries_do_not_hide_the_l1_table_of_a_disk_that_was_discarded_before_use(
    header_too: bool, tmp_path: Path
) -> None:
    path, expected = tmp_path / "disk.qcow2", tmp_path / "expected.raw"
    qemu.img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,compat=0.10", path, "40M")
    qemu.run(
        "qemu-io", "-f", "qcow2", "-d", "unmap", "-c", "discard 0 40M", path
    )  # as mkfs does: twenty tables, nothing in them
    qemu.io(path, "write -P 5 0 64k", "write -P 6 7M 100k")
    qemu.img("snapshot", "-c", "first", path)
    qemu.io(path, "write -P 7 39M 50k")
    qemu.img("convert", "-f", "qcow2", "-O", "raw", path, expected)
    data = bytearray(path.read_bytes())
    _, l1_size, l1_offset = header_of(data)
    assert l1_size > 8
    if header_too:
        data[:4096] = random.Random(2).randbytes(4096)
    else:
        data[l1_offset : l1_offset + 8 * l1_size] = bytes(8 * l1_size)
    path.write_bytes(data)
    state = recovered_states(path, virtual_size=40 << 20)[0]
    assert read_all(state) == expected.read_bytes()
    assert sure_bytes_are_right(state, expected.read_bytes())


@pytest.mark.parametrize("cluster_size", ["512", "4k", "64k"])
@pytest.mark.parametrize("header_too", [False, True])
def test_a_lost_l1_table_of_a_converted_disk_is_rebuilt(
    cluster_size: str, header_too: bool, raw: Path, tmp_path: Path
) -> None:
    data = converted(raw, tmp_path / "image.qcow2", "-o", f"cluster_size={cluster_size}")
    size, l1_size, l1_offset = header_of(data)
    data[l1_offset : l1_offset + 8 * l1_size] = bytes(8 * l1_size)
    if header_too:
        data[:size] = os.urandom(size)
    path = tmp_path / "no-l1.bin"
    path.write_bytes(data)
    best = recovered_states(path)[0]
    assert read_all(best) == raw.read_bytes()
    assert best.confidence is not Confidence.CERTAIN
    assert sure_bytes_are_right(best, raw.read_bytes())


def test_the_state_before_a_revert_is_put_together_from_free_tables(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "reverted.qcow2"
    converted(raw, path)
    qemu.img("snapshot", "-c", "s1", path)
    qemu.run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 300k", path)
    before = tmp_path / "before.raw"
    qemu.img("convert", "-O", "raw", path, before)
    # Without discarding: where holes are punched nothing is left.
    options = f"driver=qcow2,file.filename={path},pass-discard-snapshot=off"
    qemu.img("snapshot", "--image-opts", "-a", "s1", options)
    (state,) = recovered_states(path)
    assert read_all(state) == before.read_bytes()
    assert state.confidence is Confidence.LIKELY


def test_an_image_that_starts_inside_another_file_is_found(raw: Path, tmp_path: Path) -> None:
    data = converted(raw, tmp_path / "image.qcow2")
    path = tmp_path / "carved.bin"
    path.write_bytes(os.urandom(3 * 512) + bytes(data))
    assert read_all(recovered_states(path)[0]) == raw.read_bytes()


def test_ranges_tile_the_disk_and_unallocated_ones_are_not_certain_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "sparse.qcow2"
    qemu.create(path, "1G")
    qemu.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", "-c", "write -P 2 700M 1M", path)
    data = bytearray(path.read_bytes())
    data[:65536] = os.urandom(65536)
    path.write_bytes(data)
    disk, state = open_recovered(path, virtual_size=1 << 30)
    with disk:
        pieces = list(state.ranges(disk))
        assert disk.read(700 << 20, 4) == b"\2\2\2\2"
    assert pieces[0].offset == 0
    assert all(a.offset + a.length == b.offset for a, b in pairwise(pieces))
    assert sum(piece.length for piece in pieces) == 1 << 30
    assert all(p.confidence < Confidence.CERTAIN for p in pieces if "unallocated" in p.reason or "no L2" in p.reason)


def test_nothing_is_recovered_from_bytes_without_tables(tmp_path: Path) -> None:
    path = tmp_path / "noise.bin"
    path.write_bytes(os.urandom(1 << 20))
    assert recovered_states(path) == []
    with pytest.raises(SnapshotNotFound):
        open_recovered(path)


def test_recovery_reads_the_file_and_writes_nothing(raw: Path, tmp_path: Path) -> None:
    data = converted(raw, tmp_path / "image.qcow2")
    data[:65536] = bytes(65536)
    path = tmp_path / "evidence.bin"
    path.write_bytes(data)
    path.chmod(0o444)
    before = path.stat().st_mtime_ns
    read_all(recovered_states(path)[0])
    assert path.stat().st_mtime_ns == before
    assert path.read_bytes() == data


def test_the_command_line_lists_exports_and_proposes_recovered_states(raw: Path, tmp_path: Path, capsys: Any) -> None:
    data = converted(raw, tmp_path / "image.qcow2")
    data[:65536] = os.urandom(65536)
    path = tmp_path / "no-header.bin"
    path.write_bytes(data)
    assert main(["info", str(path)]) == 2
    assert "snapshots IMAGE --recovered" in capsys.readouterr().err
    assert main(["snapshots", str(path), "--recovered", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["open_as"], row["confidence"], row["size"]) == ("recovered:1", "certain", SIZE)
    out = tmp_path / "out.raw"
    assert main(["export", str(path), str(out), "--snapshot", "recovered:1"]) == 0
    assert out.read_bytes() == raw.read_bytes()
    assert "put together" in capsys.readouterr().out
    assert main(["export", str(path), str(tmp_path / "none"), "--snapshot", "recovered:2"]) == 2


@pytest.mark.parametrize("size", quick(["512", "64k", "2M"], ["64k", "2M"]))
def test_a_rewritten_compression_type_is_read_by_the_examiners_assumption(size: str, raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    data = converted(raw, path, "-o", f"compression_type=zstd,cluster_size={size}", compress=True)
    data[79] &= ~8  # the incompatible feature bit
    data[104] = 0
    path.write_bytes(data)
    with open_disk(path, assume={"compression": "zstd"}) as disk:
        assert disk.read(0, disk.size) == raw.read_bytes()
    with pytest.raises(ValueError, match="choose from"):
        open_disk(path, assume={"compression": "lzma"})


def test_recovered_words_mean_the_same_through_pytsk3(raw: Path, tmp_path: Path) -> None:
    pytsk3_qcow2 = pytest.importorskip("pytsk3_qcow2")
    data = converted(raw, tmp_path / "image.qcow2")
    data[:65536] = bytes(65536)
    path = tmp_path / "no-header.bin"
    path.write_bytes(data)
    image = pytsk3_qcow2.Img_Info(str(path), snapshot="recovered:1")
    assert image.read(0, 65536) == raw.read_bytes()[:65536]


def test_a_wrapper_that_refuses_or_replaces_ranges_is_never_read_past(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    patched = PatchedSource(FileSource(path), [(0, b"new")])
    assert patched.read_into is not None  # passed on to the file behind it
    assert gatherable(patched) is None
    assert gatherable(GuardedSource(FileSource(path), Refusals(512))) is None
    assert gatherable(FileSource(path)) is not None


@qemu.requires_qemu
@pytest.mark.parametrize("l1_size", [0xFFFFFFFF, 1 << 22])
def test_snapshot_entries_that_name_more_than_a_file_can_store_cost_no_memory(l1_size: int, tmp_path: Path) -> None:
    path = base_s(tmp_path / "disk")
    Poke(path).u32(S_SNAPSHOTS + 8, l1_size)
    tracemalloc.start()
    try:
        recovered_states(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_overlapping_l1_tables_of_snapshots_are_refused_not_read_again_and_again(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=16, size=1 << 20)
    builder.data(0, b"\x11" * 65536)
    table = builder.put(bytes(32 << 20))
    for number in range(16):
        builder.snapshot(b"%d" % number, b"s", l1_offset=table, l1_size=1 << 22)
    path = builder.write(tmp_path / "disk")
    with pytest.raises(LimitExceeded, match="L1 tables of snapshots"):
        recovered_states(path)


GEOMETRY = "QCOW2-GEOMETRY-CONTRADICTED"


def _compression_cleared(data: bytearray) -> None:
    data[79] &= ~8
    data[104] = 0


def _extended_l2_cleared(data: bytearray) -> None:
    data[79] &= ~16


def _extended_l2_set(data: bytearray) -> None:
    data[79] |= 16


def _cluster_size_wrong(data: bytearray) -> None:
    data[23] += 1


def _cluster_bits(bits: int) -> Any:
    return lambda data: data.__setitem__(slice(20, 24), bits.to_bytes(4, "big"))


def _version_lowered(data: bytearray) -> None:
    data[7] = 2


@pytest.mark.parametrize(
    ("options", "compress", "rewrite", "code", "proposed"),
    every(
        4,
        [
            ("compression_type=zstd", True, _compression_cleared, "QCOW2-COMPRESSED-INVALID", "compression=zstd"),
            ("compression_type=zstd", True, _version_lowered, "QCOW2-COMPRESSED-INVALID", "version=3"),
            ("extended_l2=on", False, _extended_l2_cleared, "QCOW2-L2-TABLE-LOST", "extended-l2=on"),
            ("cluster_size=64k", False, _extended_l2_set, "QCOW2-L2-TABLE-LOST", "extended-l2=off"),
            ("compat=1.1", False, _version_lowered, "QCOW2-ZERO-FLAG-V2", "version=3"),
            ("cluster_size=2M", False, _extended_l2_set, "QCOW2-L2-TABLE-LOST", "extended-l2=off"),
            ("cluster_size=4k", False, _extended_l2_set, GEOMETRY, "extended-l2=off"),
            ("cluster_size=4k", True, _extended_l2_set, GEOMETRY, "extended-l2=off"),
            ("cluster_size=16k", True, _extended_l2_set, GEOMETRY, "extended-l2=off"),
            ("cluster_size=4k", False, _cluster_bits(13), GEOMETRY, "cluster-size=4096"),
            ("cluster_size=4k", False, _cluster_bits(16), GEOMETRY, "cluster-size=4096"),
            ("cluster_size=4k", False, _cluster_bits(40), GEOMETRY, "cluster-size=4096"),
            ("cluster_size=4k,compat=0.10", False, _cluster_bits(9), GEOMETRY, "cluster-size=4096"),
            ("cluster_size=64k", False, _cluster_bits(15), GEOMETRY, "cluster-size=65536"),
            ("cluster_size=64k", True, _cluster_bits(12), GEOMETRY, "cluster-size=65536"),
            ("cluster_size=64k", True, _cluster_bits(17), GEOMETRY, "cluster-size=65536"),
            ("cluster_size=16k,extended_l2=on", False, _cluster_bits(17), GEOMETRY, "cluster-size=16384"),
        ],
        unpack=True,
    ),
)
def test_a_finding_proposes_the_assumption_with_which_the_export_is_right(
    options: str, compress: bool, rewrite: Any, code: str, proposed: str, raw: Path, tmp_path: Path
) -> None:
    path = tmp_path / "image.qcow2"
    converted(raw, path, "-o", options, compress=compress)
    if code == "QCOW2-ZERO-FLAG-V2":
        qemu.io(path, "write -z 1M 1M")
    expected = qemu.raw_bytes(path)
    data = bytearray(path.read_bytes())
    rewrite(data)
    path.write_bytes(data)
    (finding,) = [found for found in audit(path, depth="deep") if found.code == code]
    command = next_command(finding, str(path))
    assert command == f"qcow2-forensics export {path} OUT.raw --assume {proposed}"
    words = [str(tmp_path / "out.raw") if word == "OUT.raw" else word for word in command.split()[1:]]
    assert main(words) == 0
    assert (tmp_path / "out.raw").read_bytes() == expected


@pytest.mark.parametrize(
    ("options", "compress", "damage", "assume"),
    [
        ("cluster_size=4k", False, _extended_l2_set, {"extended-l2": "off"}),
        ("cluster_size=16k", True, _extended_l2_set, {"extended-l2": "off"}),
        ("cluster_size=4k", False, _cluster_size_wrong, {"cluster-size": "4096"}),
        ("cluster_size=64k", True, _cluster_size_wrong, {"cluster-size": "65536"}),
    ],
)
def test_a_wrong_header_field_is_read_as_the_examiner_states_it(
    options: str, compress: bool, damage: Any, assume: dict[str, str], raw: Path, tmp_path: Path
) -> None:
    path = tmp_path / "image.qcow2"
    data = converted(raw, path, "-o", options, compress=compress)
    damage(data)
    path.write_bytes(data)
    with open_disk(path, assume=assume) as disk:
        assert disk.read(0, disk.size) == raw.read_bytes()


@pytest.mark.parametrize(("bits", "order"), [(16, 3), (16, 5), (16, 40), (8, 4), (1, 4), (64, 4)])
def test_a_finding_names_the_width_that_the_refcounts_have(bits: int, order: int, raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    data = converted(raw, path, "-o", f"cluster_size=4k,refcount_bits={bits}")
    assert GEOMETRY not in [found.code for found in audit(path)]
    data[96:100] = order.to_bytes(4, "big")
    path.write_bytes(data)
    (finding,) = [found for found in audit(path) if found.code == GEOMETRY]
    assert finding.severity is Severity.MEDIUM
    assert finding.evidence[1].value == bits.bit_length() - 1


@pytest.mark.slow
def test_no_geometry_is_contradicted_by_damage_to_refcounts_and_tables(raw: Path, tmp_path: Path) -> None:
    """Bytes of metadata are overwritten one after the other, so that the check finds something each time."""
    path = tmp_path / "image.qcow2"
    data = converted(raw, path, "-o", "cluster_size=4k")
    chance = random.Random(3)
    places = [block * 4096 + chance.randrange(256) for block in range(5) for _ in range(8)]
    for at in places:
        if 20 <= at < 24 or 72 <= at < 80 or 96 <= at < 100 or at < 8:
            continue
        broken = bytearray(data)
        broken[at] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        with contextlib.suppress(Qcow2Error):
            assert GEOMETRY not in [found.code for found in audit(path)], hex(at)


def test_no_other_entries_are_proposed_for_extended_tables_that_lost_clusters(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    data = converted(raw, path, "-o", "extended_l2=on,cluster_size=16k")
    _, _, l1_offset = header_of(data)
    l2 = int.from_bytes(data[l1_offset : l1_offset + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    data[l2 : l2 + 16 * 60] = bytes(16 * 60)  # sixty clusters leak
    path.write_bytes(data)
    assert not [found for found in audit(path, depth="deep") if "--assume" in next_command(found, str(path))]


def test_no_assumption_is_proposed_where_streams_of_the_headers_own_type_would_be_lost(
    raw: Path, tmp_path: Path
) -> None:
    path = tmp_path / "image.qcow2"
    data = converted(raw, path, "-o", "compression_type=zstd", compress=True)
    path.write_bytes(data)
    assert not [found for found in audit(path, depth="deep") if "--assume" in next_command(found, str(path))]
    size, _, l1_offset = header_of(data)
    l2 = int.from_bytes(data[l1_offset : l1_offset + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    descriptor = int.from_bytes(data[l2 : l2 + 8], "big") & ((1 << 54) - 1)  # 64 KiB clusters: 54 bits of offset
    stream = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = stream.compress(b"x" * size) + stream.flush()
    data[descriptor : descriptor + len(packed)] = packed
    _compression_cleared(data)
    path.write_bytes(data)
    (finding,) = [found for found in audit(path, depth="deep") if found.code == "QCOW2-COMPRESSED-INVALID"]
    assert finding.title == "compressed clusters are zstd, the header says zlib"
    assert "--assume" not in next_command(finding, str(path))


@pytest.mark.parametrize("cluster_bits", [9, 16, 21])
@pytest.mark.parametrize("size", [1 << 45, 1 << 53, 1 << 60, (1 << 64) - 512])
def test_a_size_in_the_evidence_is_taken_only_as_far_as_l1_tables_reach(cluster_bits: int, size: int) -> None:
    source = BytesSource(bytes(1 << 22))
    geometry = Geometry(3, cluster_bits, source.size, False)
    rebuilder = Rebuilder(source, None, geometry, None, ())
    for _ in range(40):
        found = rebuilder.state("test", (), size)
        table = found.patches[1][1]
        assert found.size <= L1_ENTRIES << (2 * cluster_bits - 3)
        assert len(table) == 8 * -(-found.size // (1 << (2 * cluster_bits - 3)))
        assert found.size == size or "left out" in found.size_from
    assert rebuilder._l1_bytes >= 0
    if size > L1_ENTRIES << (2 * cluster_bits - 3):
        with pytest.raises(LimitExceeded):
            Rebuilder(source, size, geometry, None, ()).state("test", ())


@pytest.mark.parametrize("offset", quick(range(4, 104, 4), [24, 96, 100]))
def test_no_value_of_a_header_field_keeps_recovery_from_an_answer(offset: int, tmp_path: Path) -> None:
    data = Poke(base_s(tmp_path / "image")).l1(0, 0).path.read_bytes()  # its L2 table is free now
    for value in (0, 63, 0xFFFFFFFF):
        source = BytesSource(data[:offset] + value.to_bytes(4, "big") + data[offset + 4 :])
        for number, state in enumerate(recovered_states(source, virtual_size=1 << 20), 1):
            disk, opened = open_recovered(source, number, virtual_size=1 << 20)
            assert opened == state
            assert sum(piece.length for piece in confidence_of(disk)) == disk.size
