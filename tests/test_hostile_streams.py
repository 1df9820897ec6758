"""Small files that hold a memory stream without end: what it may cost goes by the bytes that are stored.

The clusters of an image may be named any number of times. Every stream here repeats a few kilobytes
for a terabyte, as such an image would; the last tests make the image.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
import sys
import tracemalloc
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.errors import FormatError, LimitExceeded
from qcow2_forensics.format.source import BytesSource
from qcow2_forensics.limits import DEFAULT_LIMITS
from qcow2_forensics.memory import GuestMemory
from tests.image_builder import COPIED, Builder
from tests.stream_builder import (
    EOS_FLAG,
    PAGE,
    capabilities,
    configuration,
    name,
    page,
    ram,
    section,
    simple,
    sizes,
    stream,
    u32,
    u64,
)
from tests.tiers import every

MiB = 1 << 20
STORED = 256 * 1024
SIZE = 1 << 40
BLOCK = "pc.ram"
BLOCKS = {BLOCK: 1 << 36}


class Endless:
    """A stream of a terabyte: a beginning, and then one period for ever."""

    stored_size = STORED
    size = SIZE

    def __init__(self, start: bytes, period: bytes) -> None:
        self._start = start
        self._period = period * (MiB // len(period) + 1)
        self._step = len(self._period)
        self.given = 0

    def read(self, offset: int, length: int, /) -> bytes:
        out = self._start[offset : offset + length]
        while len(out) < min(length, SIZE - offset):
            at = (offset + len(out) - len(self._start)) % self._step
            out += self._period[at : at + length - len(out)]
        self.given += len(out)
        return out


START = stream(configuration(), section(1, 2, sizes(BLOCKS) + u64(EOS_FLAG), "ram"))
PART = b"\x02" + u32(2)
RECORDS = START + PART + page(0, 0, BLOCK)
PERIODS = {
    "pages that follow each other": (RECORDS, b"".join(page(number, 0) for number in range(65536))),
    "the same page": (RECORDS, page(5, 0)),
    "pages in no order": (RECORDS, page(5, 0) + page(9, 1)),
    "whole pages": (RECORDS, page(3, bytes(PAGE)) + page(1, bytes(PAGE))),
    "pages that name their block": (RECORDS, page(5, 0, BLOCK)),
    "flushes": (START + PART, u64(0x200)),
    "parts without a page": (START, PART + u64(EOS_FLAG) + b"\x7e" + u32(2)),
    "commands": (START, b"\x08" + struct.pack(">HH", 1, 0)),
    "sections that start": (START, section(1, 9, u64(EOS_FLAG), "ram")),
    "sections nobody knows": (stream(configuration()), section(4, 7, b"x" * 20, "mystery")),
    "footers": (stream(configuration()) + b"\x04" + u32(7) + name("mystery") + u64(0), b"\x7e" + u32(7) + b"\xff"),
    "disk records": (START + section(1, 5, b"", "block", footer=False), u64(0x04)),
    "disk blocks": (START + section(1, 5, b"", "block", footer=False), u64(0x01) + name("drive0") + bytes(MiB)),
}


@pytest.mark.parametrize(("start", "period"), every(3, PERIODS.values(), unpack=True), ids=PERIODS)
def test_a_stream_without_end_ends_in_an_error(start: bytes, period: bytes) -> None:
    source = Endless(start, period)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            GuestMemory(source, allow_truncated=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert source.given <= 64 * MiB
    assert peak < 64 * MiB


@pytest.mark.slow
def test_a_bitmap_of_mapped_pages_without_end_ends_in_an_error() -> None:
    """The bitmap alternates, so that every page is a run, or says nothing for ever."""
    for period in (b"\x55", b"\0"):
        blocks = {BLOCK: 1 << 46}
        header = struct.pack(">IQQQ", 1, PAGE, 4096, 1 << 39)
        start = stream(
            configuration("pc-q35-9.0", capabilities("mapped-ram")),
            section(1, 2, sizes(blocks, {BLOCK: header}), "ram"),
        )
        source = Endless(start.ljust(4096, b"\0"), period)
        tracemalloc.start()
        try:
            with pytest.raises(LimitExceeded):
                GuestMemory(source, allow_truncated=True)
            assert tracemalloc.get_traced_memory()[1] < 64 * MiB
        finally:
            tracemalloc.stop()


def test_what_follows_the_memory_is_read_up_to_a_limit() -> None:
    body = ram(sizes({BLOCK: PAGE}), page(0, 1, BLOCK)) + b"\x03" + u32(2) + u64(EOS_FLAG) + b"\x7e" + u32(2)
    source = Endless(stream(configuration(), body) + b"\x04" + u32(9) + name("device"), bytes(4096))
    tracemalloc.start()
    try:
        memory = GuestMemory(source)
        assert memory.blocks[0].recorded == PAGE
        assert any("first 16777216 bytes of the devices" in note for note in memory.layout.notes)
        assert tracemalloc.get_traced_memory()[1] < 64 * MiB
    finally:
        tracemalloc.stop()
    assert source.given < 32 * MiB


@pytest.mark.parametrize("text", [b"[" * 500 + b"]" * 500, b"{}," * 300_000, b"[]," * 600_000, b" " * (3 * MiB)])
def test_a_description_of_devices_that_is_too_long_is_not_read_and_that_is_reported(text: bytes) -> None:
    data = simple([page(0, 1, BLOCK)], {BLOCK: PAGE})
    plain = data[: data.index(b"\0\x06", data.index(b"mc146818rtc"))]
    text = b'{"devices":[' + text.rstrip(b",") + b"]}"
    tracemalloc.start()
    try:
        memory = GuestMemory(BytesSource(plain + b"\0\x06" + u32(len(text)) + text))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not memory.devices
    assert peak < 64 * MiB
    assert any("description of the devices" in note for note in memory.layout.notes) == (len(text) > 2000)


def test_a_machine_of_two_hundred_processors_is_described() -> None:
    fields = [{"name": f"env.field[{number}]", "type": "uint64", "size": 8} for number in range(110)]
    described = [{"name": "cpu", "instance_id": n, "version": 12, "fields": fields} for n in range(200)]
    text = json.dumps({"page_size": PAGE, "devices": described}, separators=(",", ":")).encode()
    body = ram(sizes({BLOCK: PAGE}), page(0, 1, BLOCK)) + b"\x03" + u32(2) + u64(EOS_FLAG) + b"\x7e" + u32(2)
    sections = b"".join(section(4, 100 + n, bytes(880), "cpu", version=12) for n in range(200))
    data = stream(configuration(), body) + sections + b"\0\x06" + u32(len(text)) + text
    assert len(GuestMemory(BytesSource(data)).devices) == 200


def test_an_honest_stream_may_be_compressed_in_its_image() -> None:
    records = [page(0, bytes([7]) * PAGE, BLOCK), *(page(number, bytes([7]) * PAGE) for number in range(1, 4096))]
    data = simple(records, {BLOCK: 4096 * PAGE})

    class Compressed(BytesSource):
        stored_size = len(data) // 5

    assert GuestMemory(Compressed(data)).complete
    limits = DEFAULT_LIMITS._replace(stream_repeats=1)
    with pytest.raises(LimitExceeded, match="stream_repeats"):
        GuestMemory(Endless(*PERIODS["pages that follow each other"]), limits)


# --- as an image ---------------------------------------------------------------------------------


def image(path: Path, start: bytes, period: bytes) -> Path:
    """Write an image of a few clusters whose VM state is a terabyte: 2,000 L1 slots share one L2 table."""
    cluster = 1 << 16
    builder = Builder(size=MiB)
    again = builder.put(period * (cluster // len(period)))
    table = [again | COPIED] * (cluster // 8)
    rest = builder.put(struct.pack(">8192Q", *table))
    assert (cluster - len(start)) % len(period) == 0
    begin = builder.put(start + period * ((cluster - len(start)) // len(period)))
    first = builder.put(struct.pack(">8192Q", begin | COPIED, *table[1:]))
    slots = [0, first | COPIED, *[rest | COPIED] * 2000]  # the VM state starts under the slot after the disk's
    l1 = builder.put(struct.pack(f">{len(slots)}Q", *slots))
    builder.snapshot(b"1", b"hostile", l1_offset=l1, l1_size=len(slots), disk_size=MiB, vm_size=SIZE)
    return builder.write(path)


def test_an_image_whose_memory_never_ends_is_refused(tmp_path: Path) -> None:
    start = stream(configuration("pc-i440fx-7.2.new"), section(1, 2, sizes(BLOCKS) + u64(EOS_FLAG), "ram")) + PART
    path = image(tmp_path / "disk.qcow2", start, u64(0x200))
    assert path.stat().st_size < MiB
    with pytest.raises(FormatError, match="sections and marks"):
        q.open_guest_memory(path)


# --- compressed save files -----------------------------------------------------------------------


def _zstd(data: bytes) -> bytes:
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    return bytes(zstd.compress(data))


PACKERS = {
    "gzip": (1, gzip.compress),
    "bzip2": (2, bz2.compress),
    "xz": (3, lzma.compress),
    "zstd": (5, _zstd),
}


@pytest.mark.parametrize("name", PACKERS)
def test_a_save_file_of_empty_members_is_refused_and_one_of_a_few_is_read(name: str) -> None:
    number, pack = PACKERS[name]
    head = struct.pack("<16sIIIII14I", b"LibvirtQemudSave", 2, 4, 0, number, 0, *[0] * 14) + b"<a/>"
    data = simple([page(0, 1, BLOCK)], {BLOCK: PAGE})
    half = len(data) // 2
    few = pack(data[:half]) + pack(b"") * 100 + bytes(200 * 1024) + pack(data[half:])
    assert q.open_guest_memory(BytesSource(head + few)).blocks[0].recorded == PAGE
    with pytest.raises(LimitExceeded, match="members of a compressed save file"):
        q.open_guest_memory(BytesSource(head + pack(data[:half]) + pack(b"") * 3000 + pack(data[half:])))
