"""The Volatility layers in a context: bytes, scans, choices, pickles; QEMU's own dumps are the oracle."""

from __future__ import annotations

import bz2
import copy
import lzma
import pickle
import random
import re
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("volatility3.framework", reason="volatility3 is absent")

from volatility3.framework import constants, contexts, exceptions
from volatility3.framework.layers import scanners

from qcow2_forensics import open_disk, open_image, open_vm_state
from qcow2_forensics.format.source import BytesSource
from tests import machines, qemu, stream_builder
from tests.image_builder import PASSPHRASE, Poke
from tests.machines import MiB
from tests.tiers import quick
from tests.volatility_tools import (
    LENGTH,
    LOADED,
    SIZE,
    add_bytes,
    content,
    elision,
    index_cache,
    layers,
    machine_image,
    new_context,
    ram,
    ram_over,
    stack,
    stackers,
    warnings_of,
    without_vga,
)

NEEDLE = machines.loaded(0, LENGTH)[4096 - 10 : 4096 + 10]  # crosses a page, and so two records of the stream


class Saved(NamedTuple):
    image: Path
    dumps: dict[str, bytes]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A real machine's image with two memory snapshots, and what pmemsave wrote right before each."""
    image, dumps, _ = machine_image(tmp_path_factory.mktemp("machine"))
    return Saved(image, dumps)


def all_bytes(layer: Any) -> bytes:
    return bytes(layer.read(0, layer.maximum_address + 1, pad=True))


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["first", "second"])
def test_memory_of_either_snapshot_is_what_qemu_dumped(saved: Saved, name: str) -> None:
    layer = stack(saved.image, snapshot=name)
    assert isinstance(layer, ram.QemuRamLayer)
    assert (layer.minimum_address, layer.maximum_address) == (0, SIZE - 1)
    assert without_vga(all_bytes(layer)) == without_vga(saved.dumps[name])
    assert saved.dumps["first"] != saved.dumps["second"]


def test_random_reads_are_what_qemu_dumped(saved: Saved) -> None:
    layer, dump = stack(saved.image, snapshot="2"), saved.dumps["second"]
    choose = random.Random(1)
    for _ in range(300):
        offset = choose.randrange(LOADED - 8192, LOADED + LENGTH + 8192)
        length = choose.choice((1, 8, 4096, 4097, 100_000))
        assert layer.read(offset, length) == dump[offset : offset + length]


def test_reading_past_the_end_raises_and_pads_only_when_asked(saved: Saved) -> None:
    layer = stack(saved.image)
    with pytest.raises(exceptions.InvalidAddressException):
        layer.read(SIZE - 4, 8)
    assert layer.read(SIZE - 4, 8, pad=True) == layer.read(SIZE - 4, 4) + bytes(4)
    assert layer.is_valid(SIZE - 4, 4)
    assert not layer.is_valid(SIZE - 4, 5)
    assert not layer.is_valid(-1)


def test_nothing_can_be_written(saved: Saved) -> None:
    with pytest.raises(exceptions.LayerException):
        stack(saved.image).write(0, b"x")


def test_reads_go_through_no_unbounded_cache(saved: Saved) -> None:
    assert not hasattr(type(stack(saved.image)).read, "cache_info")


def test_mapping_of_memory_leads_to_the_bytes_of_the_stream(saved: Saved) -> None:
    layer = stack(saved.image)
    start, length = LOADED - 5000, 5 * 4096
    position = start
    for offset, size, mapped, mapped_size, below in layer.mapping(start, length):
        assert offset == position
        position += size
        expected = layer.read(offset, size)
        if mapped_size == size:
            assert layer.context.layers[below].read(mapped, size) == expected
        else:
            assert (mapped, mapped_size, expected) == (0, 1, bytes(size))
    assert position == start + length
    with pytest.raises(exceptions.InvalidAddressException):
        list(layer.mapping(SIZE - 4096, 8192))
    assert sum(run[1] for run in layer.mapping(SIZE - 4096, 8192, ignore_errors=True)) == 4096


def test_mapping_of_the_stream_leads_to_the_bytes_of_the_image(saved: Saved) -> None:
    state = stack(saved.image).context.layers["Qcow2VmStateLayer"]
    position = 0
    for offset, size, mapped, mapped_size, below in state.mapping(0, state.maximum_address + 1):
        assert offset == position
        position += size
        if mapped_size == size:
            assert state.context.layers[below].read(mapped, size) == state.read(offset, size)
    assert position == state.maximum_address + 1


def test_the_stream_layer_is_the_stream(saved: Saved) -> None:
    state = stack(saved.image, snapshot="1").context.layers["Qcow2VmStateLayer"]
    with open_vm_state(saved.image, "1") as expected:
        assert all_bytes(state) == expected.read(0, expected.size)


def test_a_hole_between_regions_is_not_valid() -> None:
    blocks = {"pc.ram": 16 * 4096}
    pages = [stream_builder.page(number, bytes([number + 1]) * 4096, "pc.ram") for number in (0, 1, 5)]
    layer = ram_over(stream_builder.simple(pages, blocks))
    assert layer.is_valid(0, 8192)
    assert not layer.is_valid(0, 8193)
    assert layer.is_valid(5 * 4096, 4096)
    with pytest.raises(exceptions.InvalidAddressException):
        layer.read(4096, 8192)
    padded = layer.read(0, 6 * 4096, pad=True)
    assert padded == b"\1" * 4096 + b"\2" * 4096 + bytes(3 * 4096) + b"\6" * 4096


# --- scans ---------------------------------------------------------------------------------------


def found(layer: Any, scanner: Any) -> list[Any]:
    return sorted(layer.scan(layer.context, scanner))


def raw_layer(data: bytes) -> Any:
    context = new_context()
    return context.layers[add_bytes(context, data)]


SCANNERS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: scanners.BytesScanner(NEEDLE),
    "regex": lambda: scanners.RegExScanner(re.escape(NEEDLE[:8]) + b".{3}" + re.escape(NEEDLE[11:])),
    "unbounded regex": lambda: scanners.RegExScanner(re.escape(NEEDLE[:8]) + b".*?" + re.escape(NEEDLE[11:])),
    "strings": lambda: scanners.MultiStringScanner([NEEDLE, b"no such thing", NEEDLE[:9] + b"!"]),
}


@pytest.mark.parametrize(
    ("name", "zeros"),
    quick(
        [(name, zeros) for name in SCANNERS for zeros in (False, True)],
        [("bytes", True), ("regex", False), ("unbounded regex", False), ("strings", False)],
        unpack=True,
    ),
)
def test_scans_find_what_they_find_in_qemus_dump(saved: Saved, name: str, zeros: bool) -> None:
    layer = stack(saved.image, snapshot="second", scan_zeros=zeros)
    expected = found(raw_layer(saved.dumps["second"]), SCANNERS[name]())
    assert expected
    assert found(layer, SCANNERS[name]()) == expected


def test_the_last_byte_is_scanned() -> None:
    pages = [stream_builder.page(number, b"a" * 4095 + b"z", "pc.ram") for number in range(4)]
    layer = ram_over(stream_builder.simple(pages, {"pc.ram": 4 * 4096}))
    assert found(layer, scanners.BytesScanner(b"z")) == [4096 * number - 1 for number in (1, 2, 3, 4)]


def test_worker_processes_find_everything(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = stack(saved.image, snapshot="second")
    expected = found(layer, scanners.BytesScanner(NEEDLE[:3]))
    monkeypatch.setattr(constants, "PARALLELISM", constants.Parallelism.Multiprocessing)
    assert found(layer, scanners.BytesScanner(NEEDLE[:3])) == expected
    assert expected


class Stateful(scanners.BytesScanner):
    """Keeps state, and says so."""

    thread_safe = False


class Derived(scanners.RegExScanner):
    """Another class may look at anything."""


@pytest.mark.parametrize(
    ("scanner", "expected"),
    [
        (scanners.BytesScanner(b"abc"), elision.Skip.INSIDE),
        (scanners.BytesScanner(b"abc" + bytes(4096)), elision.Skip.WHOLE),
        (scanners.BytesScanner(b"\0\0"), elision.Skip.WHOLE),  # found in zeros: what is tried later says no
        (scanners.RegExScanner(rb"(Linux version|Darwin) [0-9]+\.[0-9]+"), elision.Skip.INSIDE),
        (scanners.RegExScanner(rb"abc.*def"), elision.Skip.WHOLE),
        (scanners.RegExScanner(rb"abc\x00{5000}"), elision.Skip.WHOLE),
        (scanners.RegExScanner(rb"abc[^x]{5000}"), elision.Skip.WHOLE),
        (scanners.RegExScanner(rb"(?=abc\x00{9999})a"), elision.Skip.WHOLE),
        (scanners.RegExScanner(rb"^abc$"), elision.Skip.WHOLE),
        (scanners.RegExScanner(rb"\babc\b"), elision.Skip.WHOLE),
        (scanners.RegExScanner(rb"abc(?=\x00)"), elision.Skip.INSIDE),
        (scanners.RegExScanner(rb"abc(?!x)"), elision.Skip.INSIDE),
        (scanners.RegExScanner(rb"(?<=\x00)abc"), elision.Skip.WHOLE),
        (scanners.RegExScanner(rb"(?<!x)abc"), elision.Skip.WHOLE),
        (scanners.RegExScanner(rb"(a|b)\1"), elision.Skip.WHOLE),
        (scanners.MultiStringScanner([b"abc", b"abd", b"x\0y"]), elision.Skip.INSIDE),
        (Stateful(b"abc"), elision.Skip.NOTHING),
        (Derived(b"abc"), elision.Skip.WHOLE),
    ],
)
def test_zeros_are_skipped_only_where_the_pattern_proves_it(scanner: Any, expected: elision.Skip) -> None:
    assert elision.allowed(scanner) is expected


def test_a_scanner_that_finds_zeros_gets_all_of_them() -> None:
    layer = ram_over(sparse_stream(8 * MiB, {}))
    scanner = scanners.RegExScanner(rb"\x00{4096}")
    scanner.chunk_size = MiB
    assert len(found(layer, scanner)) >= 8 * MiB // 4096 - 8


def sparse_stream(size: int, pages: dict[int, bytes]) -> bytes:
    """A stream of zero pages, but for some."""
    records = [stream_builder.page(number, pages.get(number, 0), "pc.ram") for number in range(size // 4096)]
    return stream_builder.simple(records, {"pc.ram": size})


PATTERNS = [
    rb"ab",
    rb"a[^b]b",
    rb"b\x00+a",
    rb"a.{0,5000}b",
    rb"a(?!\x00)",
    rb"(?<=\x00)a",
    rb"[ab]\x00{2,9}",
    rb"\bab",
    rb"(?<!a)ab",
]


@given(
    st.dictionaries(st.integers(0, 1535), st.sampled_from([0, 1, 2048, 4094, 4095]), max_size=6),
    st.sampled_from(PATTERNS),
    st.sampled_from([4096, 65536, MiB]),
)
@example({496: 0}, rb"(?<=\x00)a", 65536)  # at the start of a chunk, where nothing is before it
@example({495: 4095, 496: 0}, rb"\bab", 65536)
@example({495: 4095, 496: 0}, rb"(?<!a)ab", 65536)
def test_skipping_zeros_changes_no_result(places: dict[int, int], pattern: bytes, chunk: int) -> None:
    size = 6 * MiB
    pages = {page: (bytes(at) + b"aba\0\0b")[:4096].ljust(4096, b"\0") for page, at in places.items()}
    stream = sparse_stream(size, pages)
    results = []
    for zeros in (False, True):
        scanner = scanners.RegExScanner(pattern)
        scanner.chunk_size = chunk
        results.append(found(ram_over(stream, scan_zeros=zeros), scanner))
    assert results[0] == results[1]


# --- choosing ------------------------------------------------------------------------------------


def test_the_latest_memory_is_taken_and_all_are_listed(saved: Saved, caplog: pytest.LogCaptureFixture) -> None:
    with warnings_of(caplog) as messages:
        layer = stack(saved.image)
    assert layer.context.layers["Qcow2VmStateLayer"].config["snapshot"] == "2"
    assert len(messages) == 1
    assert "1 'first'" in messages[0]
    assert "latest is used, 2 'second'" in messages[0]


def test_the_environment_names_the_snapshot_too(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOW2_SNAPSHOT", "first")
    assert stack(saved.image).context.layers["Qcow2VmStateLayer"].config["snapshot"] == "1"


def test_an_unknown_snapshot_is_a_warning_with_the_choices(saved: Saved, caplog: pytest.LogCaptureFixture) -> None:
    with warnings_of(caplog) as messages:
        layer = stack(saved.image, snapshot="nope")
    assert isinstance(layer, layers.Qcow2DiskLayer)
    assert found(layer, scanners.BytesScanner(b"\x00")) == []
    assert len(messages) == 1
    assert "1 (first), 2 (second)" in messages[0]


def test_disk_in_place_of_a_snapshot_is_the_virtual_disk(saved: Saved) -> None:
    layer = stack(saved.image, snapshot="disk")
    assert isinstance(layer, layers.Qcow2DiskLayer)
    with open_disk(saved.image) as disk:
        assert all_bytes(layer) == disk.read(0, disk.size)
    with open_disk(saved.image, "1") as disk:
        assert all_bytes(stack(saved.image, snapshot="disk:first")) == disk.read(0, disk.size)


def test_a_plain_disk_says_so_and_is_not_scanned(
    make_image: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = make_image("plain.qcow2", "64M", "write -P 0x41 1M 64k")
    table = bytes(446) + struct.pack("<B3xB3xII", 0x80, 0x83, 2048, 100_000) + bytes(48) + b"\x55\xaa"
    (tmp_path / "mbr").write_bytes(table)
    qemu.io(image, f"write -s {tmp_path / 'mbr'} 0 512")
    with warnings_of(caplog) as messages:
        layer = stack(image)
    assert len(messages) == 1
    assert "ordinary disk that starts with an MBR partition table" in messages[0]
    assert "--qcow2-snapshot disk" in messages[0]
    assert found(layer, scanners.BytesScanner(b"AAAA")) == []
    assert found(stack(image, snapshot="disk"), scanners.BytesScanner(b"AAAA"))


def test_a_second_disk_says_where_memory_lives(
    make_image: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    image = make_image("second.qcow2", "1M")
    qemu.img("snapshot", "-c", "s1", image)
    with warnings_of(caplog) as messages:
        stack(image)
    assert len(messages) == 1
    assert "usually the first writable one" in messages[0]


def test_disks_and_dumps_are_distinguished_by_their_first_bytes() -> None:
    def disk(*parts: tuple[int, bytes]) -> BytesSource:
        data = bytearray(MiB)
        for offset, part in parts:
            data[offset : offset + len(part)] = part
        return BytesSource(bytes(data))

    assert content.ordinary_disk(disk((0x438, b"\x53\xef"))) == "an ext2, ext3 or ext4 file system"
    assert content.ordinary_disk(disk((512, b"EFI PART"))) == "a GPT partition table"
    assert content.ordinary_disk(disk((0, b"\x7fELF"))) is None
    assert content.ordinary_disk(disk((0, b"\x53\xff\0\xf0" * 127), (510, b"\x55\xaa"))) is None
    assert content.ordinary_disk(BytesSource(b"")) == "nothing: its size is 0"


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("mkfs.ext4", ["-q", "-F"], "ext"),
        ("mkfs.ntfs", ["-q", "-F", "-f"], "NTFS"),
        ("mkfs.vfat", [], "FAT"),
        ("mkswap", [], "swap"),
    ],
)
def test_real_file_systems_are_recognised(tool: str, arguments: list[str], words: str, tmp_path: Path) -> None:
    qemu.need(tool)
    raw = tmp_path / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(16 * MiB)
    subprocess.run([tool, *arguments, raw], check=True, capture_output=True, timeout=60)
    assert words in (content.ordinary_disk(BytesSource(raw.read_bytes())) or "")


# --- disks that are dumps ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dump(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qcow2 whose disk is QEMU's own raw dump of the machine."""
    folder = tmp_path_factory.mktemp("dump")
    raw = folder / "memory.raw"
    raw.write_bytes(saved.dumps["second"])
    qemu.convert(raw, folder / "dump.qcow2", fmt="raw", target_format="qcow2")
    return folder / "dump.qcow2"


def test_a_disk_that_is_a_memory_dump_is_stacked(saved: Saved, dump: Path) -> None:
    layer = stack(dump)
    assert isinstance(layer, layers.Qcow2DiskLayer)
    assert all_bytes(layer) == saved.dumps["second"]
    assert found(layer, SCANNERS["bytes"]()) == found(raw_layer(saved.dumps["second"]), SCANNERS["bytes"]())


def test_backing_files_are_further_base_layers(saved: Saved, dump: Path) -> None:
    overlay = qemu.create(dump.parent / "overlay.qcow2", backing=dump.name, backing_format="qcow2", cwd=dump.parent)
    qemu.io(overlay, "write -P 0x5a 1M 64k")
    layer = stack(overlay)
    expected = bytearray(saved.dumps["second"])
    expected[MiB : MiB + 65536] = b"\x5a" * 65536
    assert all_bytes(layer) == bytes(expected)
    chain = [layer.context.layers[name] for name in layer.dependencies]
    assert [Path(item.location).name for item in chain] == ["overlay.qcow2", "dump.qcow2"]
    rebuilt = layer.build_configuration()
    assert rebuilt["chain_0.location"] == dump.as_uri()


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_a_raw_backing_file_is_never_decompressed(suffix: str, tmp_path: Path) -> None:
    pack = {".gz": _gzip, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix]
    packed = pack(random.Random(3).randbytes(100_000)).ljust(MiB, b"\0")
    (tmp_path / f"base{suffix}").write_bytes(packed)
    overlay = qemu.create(tmp_path / "overlay.qcow2", "1M", backing=f"base{suffix}", backing_format="raw", cwd=tmp_path)
    layer = stack(overlay)
    assert isinstance(layer, layers.Qcow2DiskLayer)
    assert all_bytes(layer) == packed
    clone = pickle.loads(pickle.dumps(layer.context.layers[layer.dependencies[1]]))
    assert clone.read(0, 512) == packed[:512]


def test_a_file_beside_the_image_stands_in_with_one_warning(
    dump: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"/srv/vm/{dump.name}"
    overlay = qemu.create(dump.parent / "moved.qcow2", SIZE, backing=name, backing_format="qcow2", unsafe=True)
    with warnings_of(caplog) as messages:
        layer = stack(overlay)
    assert isinstance(layer, layers.Qcow2DiskLayer)
    assert [message for message in messages if "was taken for" in message] == messages
    assert len(messages) == 1
    assert name in messages[0]


def test_a_backing_file_elsewhere_is_refused_by_name(
    dump: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overlay = qemu.create(tmp_path / "overlay.qcow2", backing=dump, backing_format="qcow2")
    with warnings_of(caplog) as messages:
        assert type(stack(overlay)).__name__ == "FileLayer"
    assert len(messages) == 1
    assert "not followed" in messages[0]
    assert "--qcow2-backing-folder" in messages[0]
    assert isinstance(stack(overlay, backing_folder=str(dump.parent)), layers.Qcow2DiskLayer)


def test_a_missing_backing_file_is_one_warning(dump: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overlay = qemu.create(tmp_path / "lost.qcow2", "1M", backing="gone.qcow2", backing_format="qcow2", unsafe=True)
    with warnings_of(caplog) as messages:
        stack(overlay)
    assert len(messages) == 1
    assert "missing" in messages[0]


def _gzip(data: bytes) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush()


# --- streams in files ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream(saved: Saved) -> bytes:
    with open_vm_state(saved.image, "second") as state:
        return state.read(0, state.size)


def test_a_bare_stream_and_a_padded_volume_are_memory(saved: Saved, stream: bytes, tmp_path: Path) -> None:
    for name, padding in (("bare", b""), ("volume", random.Random(2).randbytes(MiB))):
        (tmp_path / name).write_bytes(stream + padding)
        assert without_vga(all_bytes(stack(tmp_path / name))) == without_vga(saved.dumps["second"])


@pytest.mark.parametrize(("packing", "pack"), [(0, bytes), (1, _gzip)])
def test_a_libvirt_save_file_is_memory(
    saved: Saved,
    stream: bytes,
    tmp_path: Path,
    packing: int,
    pack: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "CACHE_PATH", str(tmp_path / "cache"))
    xml = b"<domain/>\0"
    header = struct.pack("<16s5I14I", b"LibvirtQemudSave", 2, len(xml), 1, packing, 0, *[0] * 14)
    (tmp_path / "vm.save").write_bytes(header + xml + pack(stream))
    layer = stack(tmp_path / "vm.save")
    assert without_vga(all_bytes(layer)) == without_vga(saved.dumps["second"])
    for offset, size, mapped, mapped_size, below in layer.mapping(LOADED, 8192):
        if mapped_size == size:
            assert layer.context.layers[below].read(mapped, size) == layer.read(offset, size)


def test_a_cut_off_stream_is_read_as_far_as_it_goes(
    saved: Saved, stream: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cut").write_bytes(stream[: len(stream) // 2])
    with warnings_of(caplog) as messages:
        layer = stack(tmp_path / "cut")
    assert any("cut off" in message for message in messages)
    assert layer.read(0, 4096) == saved.dumps["second"][:4096]
    assert not layer.is_valid(SIZE - 4096, 4096)


@pytest.mark.parametrize("damage", [b"QEVM", b"QEVM\0\0\0\3" + b"\xff" * 64, b"LibvirtQemudPart" + bytes(100)])
def test_a_stream_that_makes_no_sense_is_one_warning(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad").write_bytes(damage)
    with warnings_of(caplog) as messages:
        assert type(stack(tmp_path / "bad")).__name__ == "FileLayer"
    assert len(messages) == 1


# --- encryption ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=quick(["luks", "aes"], ["aes"]))
def sealed(request: pytest.FixtureRequest, stream: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encrypted image with the machine's memory in a snapshot, put there by qemu-io.

    A machine cannot do it: QEMU 7.2 aborts in ``savevm`` and ``snapshot-save`` because it writes VM
    state in pieces that are no whole sectors. The bytes, their place and their encryption are QEMU's;
    the size of the VM state, which qemu-img sets to 0, is written here.
    """
    folder = tmp_path_factory.mktemp("sealed")
    length = -(-len(stream) // 512) * 512
    (folder / "stream").write_bytes(stream.ljust(length, b"\0"))
    secret = PASSPHRASE
    image = qemu.create(folder / "sealed.qcow2", "8M", secret=secret, encrypt={"format": request.param})
    qemu.io(image, f"write -b -s {folder / 'stream'} 0 {length}", secret=secret)
    qemu.snapshot(image, "memory", secret=secret)
    with open_image(image) as opened:
        entry = opened.snapshots[0]
    Poke(image).u32(entry.offset + 32, len(stream)).u64(entry.offset + 40, len(stream))
    return image


def test_encrypted_vm_state_is_the_memory_qemu_dumped(
    saved: Saved, sealed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings_of(caplog) as messages:
        assert type(stack(sealed)).__name__ == "FileLayer"
    assert len(messages) == 1
    assert "encrypted" in messages[0]
    pytest.importorskip("cryptography", reason="cryptography is absent")
    monkeypatch.setenv("QCOW2_PASSPHRASE", PASSPHRASE)
    layer = stack(sealed)
    assert layer.context.layers["Qcow2VmStateLayer"].config["snapshot"] == "1"
    assert without_vga(all_bytes(layer)) == without_vga(saved.dumps["second"])
    assert found(layer, SCANNERS["bytes"]()) == found(raw_layer(saved.dumps["second"]), SCANNERS["bytes"]())
    assert b"QEVM" not in sealed.read_bytes()


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LUKS image whose disk is a memory stream."""
    qemu.need()
    folder = tmp_path_factory.mktemp("luks")
    stream = sparse_stream(2 * MiB, {300: b"m" * 4096})
    (folder / "stream").write_bytes(stream.ljust(-(-len(stream) // 512) * 512, b"\0"))
    image = qemu.create(folder / "luks.qcow2", "8M", secret=PASSPHRASE)
    qemu.io(image, f"write -s {folder / 'stream'} 0 {(folder / 'stream').stat().st_size}", secret=PASSPHRASE)
    return image


def test_locked_memory_is_one_warning_without_the_key(encrypted: Path, caplog: pytest.LogCaptureFixture) -> None:
    with warnings_of(caplog) as messages:
        assert type(stack(encrypted)).__name__ == "FileLayer"
    assert len(messages) == 1
    assert "encrypted" in messages[0]


@pytest.mark.slow
def test_locked_memory_opens_with_a_key_file_or_the_environment(
    encrypted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography", reason="cryptography is absent")
    (tmp_path / "key").write_text(f"{PASSPHRASE}\n")
    layer = stack(encrypted, key_file=str(tmp_path / "key"))
    assert layer.read(300 * 4096, 4096) == b"m" * 4096
    assert PASSPHRASE not in repr(dict(layer.build_configuration()))
    monkeypatch.setenv("QCOW2_PASSPHRASE", PASSPHRASE)
    assert isinstance(stack(encrypted), ram.QemuRamLayer)


def test_a_wrong_key_is_one_warning(
    encrypted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QCOW2_PASSPHRASE", "open barley")
    with warnings_of(caplog) as messages:
        stack(encrypted)
    assert len(messages) == 1


# --- copies --------------------------------------------------------------------------------------


def test_a_layer_survives_pickling_and_holds_no_file(saved: Saved) -> None:
    layer = stack(saved.image, snapshot="1")
    data = pickle.dumps(layer)
    assert len(data) < 8192
    assert pickle.loads(data).read(LOADED, 8192) == layer.read(LOADED, 8192)


def test_a_cloned_context_reads_the_same(saved: Saved) -> None:
    layer = stack(saved.image, snapshot="1")
    clone = layer.context.clone().layers[layer.name]
    assert clone is not layer
    assert clone.read(LOADED, 8192) == layer.read(LOADED, 8192)
    assert copy.deepcopy(layer).maximum_address == layer.maximum_address


def test_a_configuration_rebuilds_the_same_layer(saved: Saved) -> None:
    configuration = stack(saved.image, snapshot="1").build_configuration()
    assert configuration["base_layer.snapshot"] == "1"
    context = contexts.Context()
    context.config.splice("again", configuration)
    from volatility3.framework.configuration import requirements

    requirement = requirements.TranslationLayerRequirement(name="again")
    from volatility3.framework.automagic import construct_layers

    construct_layers.ConstructionMagic(context, "magic")(context, "", requirement)
    again = context.layers[context.config["again"]]
    assert without_vga(all_bytes(again)) == without_vga(saved.dumps["first"])


def test_bytes_in_memory_are_never_taken_for_one_another() -> None:
    one = ram_over(sparse_stream(MiB, {1: b"a" * 4096}))
    two = ram_over(sparse_stream(MiB, {1: b"b" * 4096}))
    assert (one.read(4096, 1), two.read(4096, 1)) == (b"a", b"b")


def test_a_changed_file_is_indexed_again(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(sparse_stream(MiB, {1: b"a" * 4096}))
    assert stack(path).read(4096, 1) == b"a"
    path.write_bytes(sparse_stream(2 * MiB, {300: b"b" * 4096}))
    assert stack(path).read(300 * 4096, 1) == b"b"


def test_an_index_on_disk_is_used_and_a_damaged_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "WORTH_A_FILE", 0)
    monkeypatch.setattr(constants, "CACHE_PATH", str(tmp_path / "cache"))
    path = tmp_path / "stream"
    path.write_bytes(sparse_stream(MiB, {1: b"a" * 4096}))
    expected = all_bytes(stack(path))
    stored = list((tmp_path / "cache").glob("qcow2_*.cache"))
    assert len(stored) == 1
    for damage in (stored[0].read_bytes(), stored[0].read_bytes()[:-1], b"", b"nonsense"):
        stored[0].write_bytes(damage)
        index_cache._kept.clear()
        assert all_bytes(stack(path)) == expected


def test_the_stackers_come_before_volatilitys_own() -> None:
    assert (stackers.Qcow2Stacker.stack_order, stackers.QemuRamStacker.stack_order) == (5, 9)


@qemu.requires_qemu
def test_the_memory_of_a_deleted_snapshot_is_analysed_when_its_tables_survive(tmp_path: Path) -> None:
    from qcow2_forensics.cli import demo

    demo.write_files(tmp_path)
    image = tmp_path / "demo.qcow2"
    options = {"driver": "qcow2", "file.filename": str(image), "pass-discard-snapshot": "off"}
    qemu.img(
        "snapshot", "--image-opts", "-d", "intrusion", ",".join(f"{key}={value}" for key, value in options.items())
    )
    layer = stack(image, snapshot="deleted:intrusion")
    assert layer.read(0x10FF0, 19) == b"Linux version 0.0.0"
