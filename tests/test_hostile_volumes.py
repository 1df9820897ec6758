"""LVM metadata crafted to cost its reader time or memory: it is parsed once, refused, or named, and nothing is hidden."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections import deque
from pathlib import Path

import pytest

from qcow2_forensics.errors import LimitExceeded
from qcow2_forensics.files.tolerant import TolerantReader
from qcow2_forensics.files.volumes import GuestVolumes, open_volumes
from qcow2_forensics.format import lvm
from qcow2_forensics.format.source import BytesSource, FileSource
from qcow2_forensics.limits import LVM_TEXT_BYTES
from qcow2_forensics.reader.disk import RawDisk


def volumes_of(path: Path) -> GuestVolumes:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    return open_volumes(RawDisk(FileSource(path)), "the disk")


def _physical(text: bytes, areas: int = 1, size: int = 0) -> bytes:
    """A physical volume with one metadata text that some areas share in turn: each names the same bytes."""
    data = bytearray(max(size, 4096 + 512 + len(text)))
    data[512 : 512 + 32] = b"LABELONE" + struct.pack("<QII8s", 1, 0, 32, b"LVM2 001")
    places = struct.pack("<QQ", 4096, len(data) - 4096) * areas
    data[512 + 32 : 512 + 32 + 56 + 16 * areas + 16] = b"P" * 32 + bytes(8) + bytes(16) + places + bytes(16)
    total = zlib.crc32(text, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    header = struct.pack("<I16sIQQ", 0, b" LVM2 x[5A%r0N*>", 1, 4096, len(data) - 4096)
    data[4096 : 4096 + 64] = header + struct.pack("<QQII", 512, len(text), total, 0)
    data[4608 : 4608 + len(text)] = text
    return bytes(data)


def _group(volumes: str, name: str = "g") -> bytes:
    head = f'{name}{{id="{name}" seqno=1 extent_size=8 physical_volumes{{pv0{{id="{"P" * 32}" pe_start=0}}}}'
    return f"{head} logical_volumes{{{volumes}}}}}".encode()


def _linear(name: str, extents: int = 1, *, at: int = 0) -> str:
    segment = f'segment1{{start_extent=0 extent_count={extents} type="striped" stripe_count=1 stripes=["pv0",{at}]}}'
    return f'{name}{{status=["VISIBLE"] {segment}}}'


def test_metadata_that_many_areas_share_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    real = lvm.parse
    monkeypatch.setattr(lvm, "parse", lambda text: parsed.append(text) or real(text))
    known = lvm.Texts()
    for _ in range(20):
        found = lvm.physical_volume(TolerantReader(RawDisk(BytesSource(_physical(_group(_linear("a")), 20)))), known)
        assert found is not None
    assert len(parsed) == 1


def test_more_metadata_than_any_group_has_is_refused_and_named(tmp_path: Path) -> None:
    text = _group(_linear("a")) + b"#" + b"x" * (LVM_TEXT_BYTES - 300)
    known = lvm.Texts()
    reader = TolerantReader(RawDisk(BytesSource(_physical(text))))
    assert lvm.physical_volume(reader, known) is not None
    with pytest.raises(LimitExceeded, match="different LVM metadata"):
        lvm.physical_volume(TolerantReader(RawDisk(BytesSource(_physical(text + b"y")))), known)
    with pytest.raises(LimitExceeded, match="read of LVM metadata"):
        deque((lvm.physical_volume(reader, known) for _ in range(100)), 0)
    (tmp_path / "raw").write_bytes(_physical(text, 40))
    (item,) = volumes_of(tmp_path / "raw").unread
    assert (item.volume.kind, "LVM metadata" in item.why) == ("LVM2", True)


def test_a_string_without_an_end_costs_no_memory_for_each_character() -> None:
    tracemalloc.start()
    try:
        for piece in ("x", "\\x"):
            with pytest.raises(lvm.LvmError):
                lvm.parse('a = "' + piece * (LVM_TEXT_BYTES // 2))
        assert tracemalloc.get_traced_memory()[1] < 4 * LVM_TEXT_BYTES
    finally:
        tracemalloc.stop()


def test_logical_volumes_that_share_their_hidden_parts_are_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lvm, "LVM_SEGMENTS", 5000)
    hidden = "".join(f'h{n}{{segment1{{start_extent=0 extent_count=1 type="raid1" x="h{n + 1}"}}}}' for n in range(200))
    seen = "".join(
        f'v{n}{{status=["VISIBLE"] segment1{{start_extent=0 extent_count=1 type="raid1" x="h0"}}}}' for n in range(50)
    )
    physical = lvm.PhysicalVolume("P" * 32, lvm.parse(_group(seen + hidden).decode()))
    with pytest.raises(LimitExceeded, match="segments of LVM volumes"):
        list(lvm.logical_volumes([physical]))


def test_more_logical_volumes_than_are_looked_into_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lvm, "LVM_VOLUMES", 3)
    (tmp_path / "raw").write_bytes(_physical(_group("".join(_linear(f"v{n}", at=2) for n in range(10))), size=65536))
    unread = volumes_of(tmp_path / "raw").unread
    assert len(unread) == 4
    assert "10 logical volumes, of which 3 are looked into" in unread[-1].why


@pytest.mark.parametrize("extents", [1 << 40, 1 << 61, 10**30])
def test_a_logical_volume_larger_than_any_disk_is_named(extents: int, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(_physical(_group(_linear("big", extents)), size=65536))
    assert all(item.why for item in volumes_of(tmp_path / "raw").unread)


def test_volumes_that_hold_their_own_physical_volume_end(tmp_path: Path) -> None:
    volumes = "".join(_linear(f"v{n}", 16) for n in range(30))
    (tmp_path / "raw").write_bytes(_physical(_group(volumes), size=65536))
    found = volumes_of(tmp_path / "raw")
    assert found.systems == []
    assert any("nested more than" in item.why for item in found.unread)
    assert len(found.unread) <= 200
