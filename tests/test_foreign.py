"""Backing files in other formats, all made by qemu-img: QEMU's bytes, or an error that names the format."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.cli import main
from qcow2_forensics.errors import FormatError, Qcow2Error, Unsupported
from qcow2_forensics.format.source import BytesSource, FileSource
from qcow2_forensics.reader.foreign import open_foreign, probe
from tests import qemu
from tests.image_builder import EXT_BACKING_FORMAT, Poke, empty
from tests.matrix import pattern_file
from tests.tiers import every

pytestmark = qemu.requires_qemu

MiB = 1 << 20
LIBRARIES = {"vmdk": "pyvmdk", "vpc": "pyvhdi", "vhdx": "pyvhdi"}
READ = [
    ("vmdk", {"subformat": "monolithicSparse"}),
    ("vmdk", {"subformat": "streamOptimized"}),
    ("vpc", {"subformat": "dynamic"}),
    ("vpc", {"subformat": "dynamic", "force_size": "on"}),
    ("vpc", {"subformat": "fixed"}),
    ("vhdx", {"subformat": "dynamic"}),
    ("vhdx", {"subformat": "fixed"}),
]
OTHER_FILES = ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]


def name_of(case: object) -> str:
    return "-".join(case.values()) if isinstance(case, dict) else str(case)


def base(folder: Path, fmt: str, options: Mapping[str, object] | None = None) -> Path:
    """Convert the pattern to ``base``; the tests of a format skip where its library is absent."""
    if fmt in LIBRARIES:
        pytest.importorskip(LIBRARIES[fmt], reason=f"{LIBRARIES[fmt]} is absent")
    qemu.convert(pattern_file(), folder / "base", fmt="raw", target_format=fmt, target_options=options)
    return folder / "base"


def overlay(folder: Path, fmt: str | None, size: int = 2 * MiB) -> Path:
    """Write an empty image over ``base`` that records ``fmt``, or leaves it to be probed."""
    path = empty(folder / "disk")
    qemu.resize(path, size)
    extensions = [] if fmt is None else [(EXT_BACKING_FORMAT, fmt.encode())]
    Poke(path).names(extensions, b"base")
    return path


def read_all(path: Path) -> bytes:
    with q.open_disk(path) as disk:
        return disk.read(0, disk.size)


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "probed"])
@pytest.mark.parametrize(("fmt", "options"), READ, ids=name_of)
def test_the_bytes_are_those_of_qemu(fmt: str, options: dict[str, str], recorded: bool, tmp_path: Path) -> None:
    base(tmp_path, fmt, options)
    path = overlay(tmp_path, fmt if recorded else None)
    qemu.io(path, "write -P 9 64k 64k", "write -P 8 1984k 64k")
    got = read_all(path)
    # Larger than the base: its end, rounded as the format has it, is where QEMU sees it.
    assert got == qemu.raw_bytes(path)
    assert len(got) == 2 * MiB


def test_a_fixed_vhd_is_raw_unless_recorded_as_in_qemu(tmp_path: Path) -> None:
    with contextlib.closing(FileSource(base(tmp_path, "vpc", {"subformat": "fixed"}))) as source:
        assert probe(source) == "raw"


@pytest.mark.parametrize(("fmt", "options"), READ[::2], ids=name_of)
def test_reads_of_any_place_are_slices_of_the_whole(fmt: str, options: dict[str, str], tmp_path: Path) -> None:
    source = FileSource(base(tmp_path, fmt, options))
    disk = open_foreign(fmt, source)
    whole = disk.read(0, disk.size)
    assert len(whole) == disk.size
    assert whole[:MiB] == pattern_file().read_bytes()
    for offset, length in ((0, 1), (65535, 2), (disk.size - 1, 1), (disk.size - 1, 512), (12345, 400_000)):
        assert disk.read(offset, length) == whole[offset : offset + length]
    for offset, length in ((0, 0), (disk.size, 0), (disk.size, 1), (disk.size + 5, 10), (2**62, 1)):
        assert disk.read(offset, length) == b""
    assert sum(extent.length for extent in disk.extents()) == disk.size
    assert [(extent.offset, extent.length) for extent in disk.extents(512, 1024)] == [(512, 1024)]
    disk.close()
    with pytest.raises(Qcow2Error):
        disk.read(0, 512)


@pytest.mark.parametrize("fmt", ["vmdk", "vhdx"])
def test_many_threads_read_what_one_reads(fmt: str, tmp_path: Path) -> None:
    base(tmp_path, fmt)
    with q.open_disk(overlay(tmp_path, fmt)) as disk:
        whole = disk.read(0, disk.size)
        wrong: list[int] = []

        def work(start: int) -> None:
            wrong.extend(
                at for at in range(start * 4096, disk.size, 32768) if disk.read(at, 5000) != whole[at : at + 5000]
            )

        threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# --- what is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "probed"])
@pytest.mark.parametrize("fmt", ["vdi", "qed", "parallels"])
def test_formats_without_a_library_are_unsupported_by_name(fmt: str, recorded: bool, tmp_path: Path) -> None:
    base(tmp_path, fmt)
    with pytest.raises(Unsupported, match=fmt):
        q.open_disk(overlay(tmp_path, fmt if recorded else None))


@pytest.mark.parametrize("recorded", every(2, [True, False]), ids=["recorded", "probed"])
def test_a_luks_volume_is_unsupported_by_name(recorded: bool, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"LUKS\xba\xbe\0\1".ljust(1 << 20, b"\0"))
    with pytest.raises(Unsupported, match="luks"):
        q.open_disk(overlay(tmp_path, "luks" if recorded else None))


@pytest.mark.parametrize(
    ("kind", "head"), [("bochs", b"Bochs Virtual HD Image\0"), ("cloop", b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop")]
)
def test_rare_formats_that_qemu_probes_are_never_taken_for_raw(kind: str, head: bytes, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(head.ljust(MiB, b"\0"))
    with pytest.raises(Unsupported, match=kind):
        q.open_disk(overlay(tmp_path, None))


_DESCRIPTOR_HEADS = [
    b"version=1\n",
    b"version=1\r\n",
    b"version=3\n",
    b"version=4\n",
    b"version=1",
    b"\nversion=1\n",
    b"  \nversion=1\n",
    b" \r\nversion=1\n",
    b"  version=1\n",
    b"#x\nversion=1\n",
    b"#" * 500 + b"\nversion=1\n",
    b"#" * 508 + b"\nversion=1\n",
    b"WithoutFreeSpace\2\0\0\0",
    b"LUKS\xba\xbe\0\1",
    b"\0" * 64 + b"\x7f\x10\xda\xbe",
    b"QFI\xfb\0\0\0\4",
    b"QED\0",
    b"conectix",
    b"vhdxfile",
    b"KDMV",
    b"COWD",
]


@pytest.mark.parametrize("head", _DESCRIPTOR_HEADS, ids=lambda head: repr(head[-24:]))
def test_what_qemu_takes_for_another_format_is_never_raw(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "base"
    path.write_bytes(head.ljust(4096, b"\0"))
    shown = qemu.run("qemu-img", "info", str(path), check=False)
    raw_to_qemu = b"file format: raw" in shown.stdout
    assert (probe(FileSource(path)) == "raw") == raw_to_qemu


@pytest.mark.parametrize("name", ["base.dmg", "base.DMG", "dmg", ".dmg", "base.dmg.raw", "base.vmdk", "base.vhd"])
def test_a_name_means_another_format_where_it_does_to_qemu(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"x" * 4096)
    raw_to_qemu = b"file format: raw" in qemu.run("qemu-img", "info", str(path), check=False).stdout
    assert (probe(FileSource(path)) == "raw") == raw_to_qemu


@pytest.mark.parametrize("subformat", OTHER_FILES)
def test_a_vmdk_whose_data_is_in_other_files_is_unsupported(subformat: str, tmp_path: Path) -> None:
    base(tmp_path, "vmdk", {"subformat": subformat})
    for fmt in ("vmdk", None):
        path = overlay(tmp_path, fmt)
        assert qemu.raw_bytes(path)[:MiB] == pattern_file().read_bytes()  # QEMU follows the names
        with pytest.raises(Unsupported, match="vmdk whose data is in other files"):
            q.open_disk(path)


def test_a_difference_to_a_parent_is_unsupported_never_zeros(tmp_path: Path) -> None:
    vmdk = base(tmp_path, "vmdk")
    data = vmdk.read_bytes()
    vmdk.write_bytes(data.replace(b"parentCID=ffffffff", b"parentCID=12345678", 1))
    with pytest.raises(Unsupported, match="difference to a parent"):
        q.open_disk(overlay(tmp_path, "vmdk"))
    vhd = base(tmp_path, "vpc", {"subformat": "dynamic"})
    content = bytearray(vhd.read_bytes())
    for at in (0, len(content) - 512):  # the footer and its copy: disk type 4, and their checksum
        footer = content[at : at + 512]
        struct.pack_into(">II", footer, 60, 4, 0)
        struct.pack_into(">I", footer, 64, ~sum(footer) & 0xFFFFFFFF)
        content[at : at + 512] = footer
    vhd.write_bytes(content)
    with pytest.raises(Unsupported, match="difference to a parent"):
        q.open_disk(overlay(tmp_path, "vpc"))


def test_a_vmdk_with_zeroed_grains_is_unsupported_never_other_bytes_of_the_file(tmp_path: Path) -> None:
    pytest.importorskip("pyvmdk", reason="pyvmdk is absent")
    path = qemu.create(tmp_path / "base", "1M", fmt="vmdk", zeroed_grain="on")
    qemu.io(path, "write -P 17 0 128k", "write -z 0 64k", fmt="vmdk")
    path = overlay(tmp_path, "vmdk")
    assert qemu.raw_bytes(path)[:65537] == bytes(65536) + b"\x11"
    with pytest.raises(Unsupported, match="vmdk with zeroed grains"):
        q.open_disk(path)


def test_a_vhdx_whose_log_was_not_replayed_is_unsupported_never_what_was_before(tmp_path: Path) -> None:
    pytest.importorskip("pyvhdi", reason="pyvhdi is absent")
    path = qemu.create(tmp_path / "base", "4M", fmt="vhdx", block_size="1M")
    qemu.io(path, "write -P 17 0 64k", fmt="vhdx")
    content = bytearray(path.read_bytes())
    entry = content.index(b"loge", MiB)  # QEMU replayed it and left it there; as if it had not come to that
    table = int.from_bytes(content[entry + 80 : entry + 88], "little")
    content[table : table + 4096] = bytes(4096)
    header = max((0x10000, 0x20000), key=lambda at: int.from_bytes(content[at + 8 : at + 16], "little"))
    content[header + 48 : header + 64] = content[entry + 32 : entry + 48]
    content[header + 4 : header + 8] = bytes(4)
    struct.pack_into("<I", content, header + 4, _crc32c(content[header : header + 4096]))
    path.write_bytes(content)
    path = overlay(tmp_path, "vhdx")
    with pytest.raises(qemu.QemuError, match="contains a log that needs to be replayed"):
        qemu.raw_bytes(path)
    with pytest.raises(Unsupported, match="vhdx whose log was not replayed"):
        q.open_disk(path)


def _crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


@pytest.mark.parametrize("fmt", ["vmdk", "vpc", "vhdx"])
def test_what_is_not_of_the_recorded_format_is_a_format_error(fmt: str, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[fmt], reason=f"{LIBRARIES[fmt]} is absent")
    for content in (b"", b"\x11" * MiB):
        with pytest.raises(FormatError, match=fmt):
            open_foreign(fmt, BytesSource(content))


@pytest.mark.parametrize(("fmt", "options"), READ[::3], ids=name_of)
def test_a_cut_file_is_an_error_or_the_bytes_before_the_cut(fmt: str, options: dict[str, str], tmp_path: Path) -> None:
    content = base(tmp_path, fmt, options).read_bytes()
    wanted = pattern_file().read_bytes()
    for cut in (512, 4096, len(content) // 2, len(content) - 65536):
        try:
            disk = open_foreign(fmt, BytesSource(content[:cut]))
        except FormatError:
            continue
        for at in range(0, MiB, 65536):
            try:
                data = disk.read(at, 65536)
            except Qcow2Error:
                continue
            assert data == wanted[at : at + 65536], (cut, at)


# --- names inside them ----------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is absent")
@pytest.mark.parametrize("case", ["flat", "embedded", "parent"])
def test_no_file_named_in_a_descriptor_is_opened(case: str, tmp_path: Path) -> None:
    vmdk = base(tmp_path, "vmdk", {"subformat": "monolithicFlat" if case == "flat" else "monolithicSparse"})
    bait = tmp_path / ("base-flat" if case == "flat" else "bait")
    bait.touch()
    if case != "flat":
        data = vmdk.read_bytes()
        line = b'RW 2048 SPARSE "base"'
        if case == "embedded":
            data = data.replace(line, b'RW 2048 SPARSE "bait"', 1)
            assert b'"bait"' in data
        else:
            data = data.replace(b"parentCID=ffffffff", b"parentCID=12345678", 1)
            hint = b'\nparentFileNameHint="bait"'
            at = data.index(b"\n\0", data.index(b"parentCID")) if b"\n\0" in data else data.index(b"\0" * 64, 512)
            data = data[:at] + hint + b"\n" + data[at + len(hint) + 1 :]
        vmdk.write_bytes(data)
    path = overlay(tmp_path, "vmdk")
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "import qcow2_forensics as q\n"
        "try:\n    disk = q.open_disk(sys.argv[1]); disk.read(0, disk.size); print('read')\n"
        "except q.Qcow2Error as error:\n    print(type(error).__name__)\n"
    )
    log = tmp_path / "log"
    tracer = ["strace", "-f", "-o", str(log), "-e", "trace=open,openat,openat2"]
    done = subprocess.run(
        [*tracer, sys.executable, "-c", code, str(path), *sys.path], capture_output=True, timeout=120, check=False
    )
    if b"ptrace" in done.stderr or not log.exists() or "disk" not in log.read_text():
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    opened = set(re.findall(r'"(?:[^"]*/)?([^"/]+)"', log.read_text()))
    assert bait.name not in opened
    assert "base" in opened


# --- maps and holes --------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", every(2, ["vpc", "vmdk"]))
@pytest.mark.parametrize("seed", every(3, range(3)))
def test_the_map_of_a_chain_over_it_is_that_of_qemu(
    fmt: str, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(LIBRARIES[fmt], reason=f"{LIBRARIES[fmt]} is absent")
    chance = random.Random(seed)
    below = tmp_path / "base"
    size = 300 if seed else 30  # MiB; the small one is quick
    qemu.img("create", "-q", "-f", fmt, below, f"{size}M")
    writes = [
        f"write -P {n + 1} {chance.randrange(size - 5 << 20) // 512 * 512} {chance.choice(['4k', '1M', '3M'])}"
        for n in range(5)
    ]
    subprocess.run(
        ["qemu-io", "-f", fmt, *(part for write in writes for part in ("-c", write)), below],
        check=True,
        capture_output=True,
    )
    top = tmp_path / "top"
    qemu.img("create", "-q", "-f", "qcow2", "-b", below, "-F", fmt, top)
    qemu.io(top, "write -P 99 4M 100k", "write -z 5M 1M")
    assert main(["map", str(top), "--format", "json"]) == 0
    rows = [
        {key: value for key, value in row.items() if key != "compressed"} for row in json.loads(capsys.readouterr().out)
    ]
    wanted = [{key: value for key, value in row.items() if key != "compressed"} for row in qemu.map_json(top)]
    assert rows == wanted
    with q.open_disk(top) as disk:
        assert hashlib.sha256(disk.read(0, disk.size)).digest() == hashlib.sha256(qemu.raw_bytes(top)).digest()


@pytest.mark.parametrize("fmt", every(3, ["vpc", "vmdk", "vhdx"]))
def test_an_export_over_a_sparse_base_takes_no_more_room_than_qemu_s(fmt: str, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[fmt], reason=f"{LIBRARIES[fmt]} is absent")
    below, top = tmp_path / "base", tmp_path / "top"
    qemu.img("create", "-q", "-f", fmt, below, "40M")
    subprocess.run(["qemu-io", "-f", fmt, "-c", "write -P 5 3M 64k", below], check=True, capture_output=True)
    qemu.img("create", "-q", "-f", "qcow2", "-b", below, "-F", fmt, top)
    qemu.img("convert", "-O", "raw", top, tmp_path / "theirs")
    assert main(["export", str(top), str(tmp_path / "ours")]) == 0
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").stat().st_blocks <= 1.05 * (tmp_path / "theirs").stat().st_blocks
