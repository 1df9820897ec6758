"""What a read promises at its edges: nothing is made up, and nothing is short without an error."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.errors import FormatError, MissingFile
from qcow2_forensics.format.source import FileSource, StreamSource
from qcow2_forensics.reader.mapping import Kind
from tests import qemu
from tests.image_builder import COPIED, EXT_DATA_FILE, PASSPHRASE, Builder, Poke

MiB = 1 << 20


# --- sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "wanted"), [(0, 3000), (2999, 1), (3000, 0), (2**63, 0), (2**64, 0)])
@pytest.mark.parametrize("length", [2**40, 2**63, 2**70])
def test_a_source_gives_what_there_is_however_much_is_asked(
    offset: int, wanted: int, length: int, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3000)
    file = FileSource(path)
    assert len(file.read(offset, length)) == wanted
    file.close()
    with path.open("rb") as stream:
        assert len(StreamSource(stream).read(offset, length)) == wanted


# --- chains ---------------------------------------------------------------------------------------


def at_depth(frames: int, call: object) -> object:
    return call() if frames == 0 else at_depth(frames - 1, call)  # type: ignore[operator]


def test_the_longest_chain_leaves_room_on_the_stack_of_the_caller(tmp_path: Path) -> None:
    name: bytes | None = None
    for index in range(q.DEFAULT_LIMITS.chain_depth):
        builder = Builder(backing=name, cluster_bits=9, size=65536)
        if name is None:
            builder.data(512, b"\x11" * 512)
        name = builder.write(tmp_path / f"layer{index}").name.encode()
    frames = sys.getrecursionlimit() - 700 - len(_stack())
    assert frames > 100

    def use() -> bytes:
        with q.open_disk(tmp_path / os.fsdecode(name or b"")) as disk:
            assert disk.depth == q.DEFAULT_LIMITS.chain_depth
            assert [extent.kind for extent in disk.extents()] == [Kind.HOLE, Kind.DATA, Kind.HOLE]
            return disk.read(0, 2048)

    assert at_depth(frames, use) == bytes(512) + b"\x11" * 512 + bytes(1024)


def _stack() -> list[object]:
    frame, found = sys._getframe(), []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return found  # type: ignore[return-value]


def test_a_backing_name_that_the_end_of_the_file_cuts_off_is_an_error(tmp_path: Path) -> None:
    # Version 1 has no other structure that must be there; QEMU takes the name for empty.
    path = Builder(version=1, cluster_bits=12, size=MiB, backing=b"base.raw").write(tmp_path / "disk")
    (tmp_path / "base.raw").write_bytes(b"\x11" * MiB)
    end = path.stat().st_size
    Poke(path).u64(8, end - 3)
    with pytest.raises(FormatError, match="backing file name reaches past the end"):
        q.open_disk(path)
    with q.open_disk(path, follow=False) as disk:
        assert disk.read(0, 512) == bytes(512)
    Poke(path).u64(8, end + 4096)
    with pytest.raises(FormatError, match="backing file name reaches past the end"):
        q.open_disk(path)
    with q.open_disk(path, eof="zeros") as disk:
        assert disk.backing is None
        if qemu.available():
            assert disk.read(0, 65536) == qemu.read(path, 0, 65536, fmt="qcow")


# --- snapshots ------------------------------------------------------------------------------------


def with_short_table(path: Path, disk_size: int | None) -> Path:
    """Write an image with a snapshot of one L1 entry; 512 MiB are mapped by it."""
    builder = Builder(size=2 << 30)
    builder.data(0, b"\x11" * 65536)
    l2 = builder._l2[0]
    l1 = builder.put((l2 | COPIED).to_bytes(8, "big"))
    extra = b"" if disk_size is None else bytes(8) + disk_size.to_bytes(8, "big") + bytes(8)
    if disk_size is None:
        builder.version = 2
    builder.snapshot(b"1", b"short", l1_offset=l1, l1_size=1, extra=extra)
    return builder.write(path)


def test_a_snapshot_larger_than_its_own_table_is_read_as_far_as_that_goes(tmp_path: Path) -> None:
    path = with_short_table(tmp_path / "disk", 1 << 30)
    with q.open_disk(path, "1") as disk:
        assert disk.size == 1 << 30
        assert disk.read(0, 65536) == b"\x11" * 65536
        assert disk.read((512 << 20) - 512, 512) == bytes(512)
        for offset, length in ((512 << 20, 512), ((512 << 20) - 512, 1024), (disk.size - 1, 1)):
            with pytest.raises(FormatError, match="past what its L1 table"):
                disk.read(offset, length)
        seen = []
        with pytest.raises(FormatError, match="past what its L1 table"):
            seen.extend(disk.extents())
        assert list(disk.extents(0, 512 << 20))
    with q.open_disk(path, "1", eof="zeros") as disk:
        assert disk.read(512 << 20, 512) == bytes(512)
        assert sum(extent.length for extent in disk.extents()) == disk.size


def test_a_snapshot_that_does_not_record_its_size_may_be_smaller_than_the_disk_is_now(tmp_path: Path) -> None:
    path = with_short_table(tmp_path / "disk", None)
    with q.open_disk(path, "1") as disk:
        assert disk.size == 2 << 30
        assert disk.read(0, 512) == b"\x11" * 512
        assert disk.read(1 << 30, 512) == bytes(512)


def test_vm_state_that_no_table_maps_is_an_error_never_zeros(tmp_path: Path) -> None:
    builder = Builder(size=MiB)
    builder.data(0, b"\x11" * 65536)
    builder.data(512 << 20, b"QEVM".ljust(65536, b"\x22"))
    l1 = builder.put(b"".join((builder._l2[index] | COPIED).to_bytes(8, "big") for index in (0, 1)))
    builder.snapshot(b"1", b"vm", l1_offset=l1, l1_size=2, vm_size=(512 << 20) + 4096)
    path = builder.write(tmp_path / "disk")
    with q.open_vm_state(path) as state:
        assert state.read(0, 8) == b"QEVM\x22\x22\x22\x22"
        assert state.read((512 << 20) - 16, 16) == bytes(16)
        with pytest.raises(FormatError, match="past what its L1 table"):
            state.read(512 << 20, 16)


# --- data files and keys --------------------------------------------------------------------------


def test_a_data_file_name_ends_at_its_first_nul_as_in_qemu(tmp_path: Path) -> None:
    qemu.need()
    path = qemu.create(tmp_path / "disk", "1M", data_file=tmp_path / "own.data")
    qemu.io(path, "write -P 7 0 64k")
    Poke(path).names([(EXT_DATA_FILE, b"own.data\0junk")])
    with q.open_disk(path) as disk:
        assert disk.read(0, disk.size) == qemu.raw_bytes(path, cwd=tmp_path)


def test_a_caller_may_supply_a_data_file_the_image_does_not_name(tmp_path: Path) -> None:
    qemu.need()
    path = qemu.create(tmp_path / "disk", "1M", data_file=tmp_path / "own.data")
    qemu.io(path, "write -P 7 0 64k")
    wanted = qemu.raw_bytes(path)
    Poke(path).names([])
    with pytest.raises(MissingFile):
        q.open_disk(path)
    with q.open_disk(path, resolver=q.Resolver(files={"": tmp_path / "own.data"})) as disk:
        assert disk.read(0, disk.size) == wanted


def test_a_passphrase_of_bytes_that_are_no_text_can_come_as_text_from_the_environment(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography is absent")
    from tests.image_builder import luks

    path = luks(tmp_path / "disk")
    with q.open_disk(path, passphrase=PASSPHRASE) as disk:
        assert disk.read(0, 512) == b"\x11" * 512
    with pytest.raises(q.Locked):
        q.open_disk(path, passphrase=os.fsdecode(b"\xff\xfe"))
