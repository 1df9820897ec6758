"""Streams inside other files: libvirt save files, padded volumes, qcow2 disks that are one.

The streams come from a real machine where the tools are there; the libvirt header is written here,
field by field as libvirt documents it, because no libvirt runs in these tests.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from qcow2_forensics import Disk, open_image
from qcow2_forensics.errors import FormatError, LimitExceeded, Qcow2Error, ReadError, SnapshotNotFound, Unsupported
from qcow2_forensics.format.source import BytesSource, FileSource
from qcow2_forensics.limits import DEFAULT_LIMITS
from qcow2_forensics.memory import GuestMemory, containers, find_stream, open_guest_memory
from tests import qemu
from tests.stream_builder import PAGE, page, simple
from tests.test_guest_memory import mapped_stream

CONTENT = bytes(range(256)) * 16
STREAM = simple([page(0, CONTENT, "pc.ram"), *(page(n, 0) for n in range(1, 300))], {"pc.ram": 300 * PAGE})
XML = b"<domain type='kvm'><name>guest</name></domain>\0" * 20


def zstd(data: bytes) -> bytes:
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    return bytes(importlib.import_module(name).compress(data))


PACKERS: dict[int, Callable[[bytes], bytes]] = {1: gzip.compress, 2: bz2.compress, 3: lzma.compress, 5: zstd}


def libvirt(
    body: bytes, packing: int = 0, order: str = "<", magic: bytes = b"LibvirtQemudSave", version: int = 2
) -> bytes:
    return struct.pack(order + "16s19I", magic, version, len(XML), 1, packing, *[0] * 15) + XML + body


@pytest.mark.parametrize("order", ["<", ">"])
def test_raw_save_file_is_read_in_place(order: str) -> None:
    source = BytesSource(libvirt(STREAM, order=order))
    memory = open_guest_memory(source)
    assert memory.read(0, 2 * PAGE) == CONTENT + bytes(PAGE)
    assert memory.source.size == len(STREAM)


def test_sparse_save_file_counts_its_offsets_from_the_start_of_the_file() -> None:
    start = len(libvirt(b""))
    memory = open_guest_memory(BytesSource(libvirt(mapped_stream(start), packing=6)))
    assert memory.blocks[0].recorded == memory.blocks[0].size
    assert [device.name for device in memory.devices] == ["mc146818rtc"]


@pytest.mark.parametrize("packing", PACKERS)
def test_compressed_save_file_is_decompressed_once_into_the_cache(packing: int, tmp_path: Path) -> None:
    path = tmp_path / "guest.save"
    path.write_bytes(libvirt(PACKERS[packing](STREAM), packing))
    cache = tmp_path / "cache"
    stream = find_stream(path, cache_dir=cache)
    assert stream is not None
    assert GuestMemory(stream).read(0, PAGE) == CONTENT
    (cached,) = cache.iterdir()
    assert cached.read_bytes() == STREAM
    before = cached.stat().st_mtime_ns
    again = find_stream(path, cache_dir=cache)
    assert again is not None
    assert again.read(0, again.size) == STREAM
    assert [(entry, entry.stat().st_mtime_ns) for entry in cache.iterdir()] == [(cached, before)]
    with open_guest_memory(path) as memory:  # without a cache: a temporary file nobody sees
        assert memory.read(0, PAGE) == CONTENT


@pytest.mark.parametrize("packing", PACKERS)
def test_damaged_compression_is_a_format_error_and_leaves_no_cache(packing: int, tmp_path: Path) -> None:
    packed = PACKERS[packing](STREAM)
    half = len(packed) // 2
    for broken in (packed[:half], b"\xff" * 8 + packed[8:], PACKERS[packing](b"nothing")):
        with pytest.raises(FormatError):
            find_stream(BytesSource(libvirt(broken, packing)), cache_dir=tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []


def test_decompression_that_is_ended_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: object) -> None:
        assert list((tmp_path / "cache").iterdir()) != []
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(containers, "_decompress", end)
    with pytest.raises(SystemExit):
        find_stream(BytesSource(libvirt(PACKERS[1](STREAM), 1)), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def lzop(data: bytes) -> bytes:
    pytest.importorskip("lzallright", reason="lzallright is absent")
    if shutil.which("lzop") is None:
        pytest.skip("lzop is not installed")
    return subprocess.run(["lzop", "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout


def test_a_save_file_that_lzop_compressed_is_the_stream() -> None:
    stream = simple(
        [page(n, random.Random(n).randbytes(PAGE) if n % 3 else 0, None if n else "pc.ram") for n in range(300)],
        {"pc.ram": 300 * PAGE},
    )
    found = find_stream(BytesSource(libvirt(lzop(stream), packing=4)))
    assert found is not None
    assert found.read(0, found.size) == stream


def test_a_damaged_lzop_file_is_an_error_wherever_it_is_damaged() -> None:
    whole = lzop(STREAM)
    source = random.Random(4)
    for _ in range(200):
        place = source.randrange(9, len(whole))
        bad = bytearray(whole)
        bad[place] ^= 1 << source.randrange(8)
        data = bytes(bad) if source.random() < 0.7 else whole[:place]
        try:
            found = find_stream(BytesSource(libvirt(data, packing=4)))
            assert found is not None
            assert found.read(0, found.size) == STREAM  # in a field that changes nothing
        except Qcow2Error:
            pass


def test_a_block_of_lzop_that_announces_gigabytes_is_refused() -> None:
    whole = bytearray(lzop(STREAM))
    block = whole.index(len(STREAM).to_bytes(4, "big"))
    whole[block : block + 4] = (1 << 31).to_bytes(4, "big")
    with pytest.raises(FormatError, match="a block of 2147483648 bytes"):
        find_stream(BytesSource(libvirt(bytes(whole), packing=4)))


def test_decompression_has_a_limit(tmp_path: Path) -> None:
    bomb = gzip.compress(STREAM + bytes(1 << 20))
    limits = DEFAULT_LIMITS._replace(decompressed_stream_bytes=1 << 19)
    with pytest.raises(LimitExceeded):
        find_stream(BytesSource(libvirt(bomb, 1)), cache_dir=tmp_path, limits=limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        pytest.param(
            libvirt(b"\x89LZO\0".ljust(40, b"x"), 4),
            FormatError,
            "no lzop file",
            marks=pytest.mark.skipif(find_spec("lzallright") is None, reason="lzallright is absent"),
        ),
        (libvirt(b"xxxx", 99), Unsupported, "format 99"),
        (libvirt(b"xxxx", 0), Unsupported, "without a QEMU stream"),
        (libvirt(STREAM, version=9), Unsupported, "version 9"),
        (libvirt(STREAM, magic=b"LibvirtQemudPart"), FormatError, "unfinished"),
        (libvirt(STREAM)[:500], FormatError, "ends before"),
        (libvirt(STREAM)[:50], FormatError, "header"),
    ],
)
def test_a_save_file_that_cannot_be_read_says_why(data: bytes, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        open_guest_memory(BytesSource(data))


def test_other_files_are_left_to_others() -> None:
    for data in (b"", b"QFI\xfb" + bytes(100), b"EMiL" + bytes(100), b"\x7fELF" + bytes(100)):
        assert find_stream(BytesSource(data)) is None


def test_a_stream_has_no_snapshots_to_choose_from() -> None:
    with pytest.raises(SnapshotNotFound):
        open_guest_memory(BytesSource(STREAM), "one")


@qemu.requires_qemu
def test_a_qcow2_whose_disk_is_a_stream_is_a_state_volume(tmp_path: Path) -> None:
    """Proxmox keeps states in volumes of their own, longer than the stream, in whatever format."""
    raw = tmp_path / "state.raw"
    raw.write_bytes(STREAM + bytes(3 << 20))
    volume = tmp_path / "state.qcow2"
    qemu.convert(raw, volume, fmt="raw", target_format="qcow2")
    for path in (raw, volume):
        with open_guest_memory(path) as memory:
            assert memory.read(0, 2 * PAGE) == CONTENT + bytes(PAGE)
            assert memory.machine == "pc-i440fx-7.2"


@qemu.requires_qemu
def test_an_image_without_memory_lists_what_it_holds(base_image: Path) -> None:
    qemu.snapshot(base_image, "disk-only")
    with pytest.raises(SnapshotNotFound, match="disk-only"):
        open_guest_memory(base_image)
    with pytest.raises(FormatError, match="no VM state"):
        open_guest_memory(base_image, "disk-only")


@pytest.mark.slow
@qemu.requires_qemu
def test_memory_of_an_encrypted_image_is_read_with_its_passphrase(tmp_path: Path) -> None:
    """QEMU 7.2 aborts in savevm on an encrypted image, so qemu-io writes the state and we its size."""
    disk = qemu.create(tmp_path / "locked.qcow2", "8M", secret="hunter2")
    padded = STREAM.ljust(-(-len(STREAM) // 512) * 512, b"\0")
    (tmp_path / "stream").write_bytes(padded)
    qemu.io(disk, f"write -b -s {tmp_path / 'stream'} 0 {len(padded)}", secret="hunter2")
    qemu.snapshot(disk, "one", secret="hunter2")
    with open_image(disk) as image:
        (entry,) = image.snapshots
    with disk.open("r+b") as file:
        file.seek(entry.offset + 32)
        file.write(struct.pack(">I", len(padded)))
        file.seek(entry.offset + 40)
        file.write(struct.pack(">Q", len(padded)))
    with pytest.raises(PermissionError):
        open_guest_memory(disk)
    with open_guest_memory(disk, "one", "hunter2") as memory:
        assert memory.read(0, 2 * PAGE) == CONTENT + bytes(PAGE)


def test_the_handed_in_source_stays_open_and_an_opened_one_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(STREAM)
    source = FileSource(path)
    with open_guest_memory(source):
        pass
    assert source.read(0, 4) == b"QEVM"
    with open_guest_memory(path) as memory:
        inner = memory.source
    assert isinstance(inner, FileSource)
    with pytest.raises(OSError, match=r"."):
        inner.read(0, 4)


@pytest.mark.parametrize("packing", [0, 1])
def test_closing_the_memory_frees_the_file_it_was_decompressed_into(packing: int) -> None:
    data = libvirt(PACKERS[packing](STREAM) if packing else STREAM, packing)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        memory = open_guest_memory(file)
        assert memory.read(0, PAGE) == CONTENT
        window = memory.source
        memory.close()
        if packing:
            with pytest.raises(ValueError, match="closed"):
                window.read(0, 1)
        else:
            assert window.read(0, 1) == b"Q"


def test_a_disk_that_cannot_be_read_is_closed(make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def unreadable(self: Disk, offset: int, length: int, /) -> bytes:
        raise ReadError("gone", offset=offset, length=length)

    def close(self: Disk) -> None:
        events.append("closed")

    monkeypatch.setattr(Disk, "read", unreadable)
    monkeypatch.setattr(Disk, "close", close)
    with pytest.raises(ReadError, match="gone"):
        open_guest_memory(make_image("disk.qcow2", "1M"))
    assert events == ["closed"]


def test_an_xz_file_of_several_streams_with_padding_is_read() -> None:
    half = len(STREAM) // 2
    body = lzma.compress(STREAM[:half]) + bytes(8) + lzma.compress(STREAM[half:]) + bytes(4)
    assert open_guest_memory(BytesSource(libvirt(body, packing=3))).read(0, PAGE) == CONTENT


def test_an_xz_file_that_announces_a_huge_dictionary_is_refused_before_it_takes_memory() -> None:
    body = bytearray(lzma.compress(STREAM))
    header = 4 * (body[12] + 1)
    at = body.index(b"\x21\x01", 12)
    body[at + 2] = 40  # 4 GiB
    body[12 + header - 4 : 12 + header] = zlib.crc32(body[12 : 12 + header - 4]).to_bytes(4, "little")
    with pytest.raises(FormatError, match="cannot be decompressed: Memory usage limit"):
        open_guest_memory(BytesSource(libvirt(bytes(body), packing=3)))


@pytest.mark.slow
def test_a_file_that_decompresses_without_end_is_refused_by_its_own_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("qcow2_forensics.memory.containers.UNPACKED_BYTES", 1 << 20)
    source = BytesSource(libvirt(bz2.compress(STREAM + bytes(64 << 20)), packing=2))
    with pytest.raises(LimitExceeded, match="decompressed_stream_bytes"):
        find_stream(source, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_addresses_of_modules_are_taken_from_the_description_of_the_domain() -> None:
    domain = b"""<domain><devices>
      <memory model='dimm'><target><size unit='KiB'>1024</size></target>
        <alias name='dimm0'/><address type='dimm' slot='0' base='0x108000000'/></memory>
      <memory model="nvdimm"><target><size unit='MiB'>2</size></target><address type='dimm' slot='1' base='0x200000000'/></memory>
      <memory model='dimm'><target><size unit='KiB'>1024</size></target><alias name='dimm7'/></memory>
    </devices></domain>"""
    blocks = {"pc.ram": 4 << 20, "memdimm0": 1 << 20, "memnv": 2 << 20, "/rom@etc/acpi/tables": PAGE}
    state = simple([page(0, 1, "memdimm0")], blocks)
    head = struct.pack("<16s19I", b"LibvirtQemudSave", 2, len(domain), 1, 0, *[0] * 15)
    with open_guest_memory(BytesSource(head + domain + state)) as memory:
        places = {region.block: region.address for region in memory.regions}
        assert places == {"pc.ram": 0, "memdimm0": 0x108000000, "memnv": 0x200000000}
        assert "the libvirt domain states the address" in memory.layout.reasons
        assert memory.layout.doubts == ()
