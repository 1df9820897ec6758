"""Backing and data files: what is followed, what is refused, and that bytes are those of QEMU."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.errors import (
    ForbiddenReference,
    FormatError,
    LimitExceeded,
    Locked,
    MissingFile,
    Qcow2Error,
    Unsupported,
)
from qcow2_forensics.format.source import BytesSource, FileSource
from qcow2_forensics.reader.mapping import Kind
from qcow2_forensics.reader.references import parse_reference
from tests import qemu
from tests.image_builder import EXT_BACKING_FORMAT, EXT_DATA_FILE, Builder, Poke, base_b, empty
from tests.matrix import pattern_file

pytestmark = qemu.requires_qemu

MiB = 1 << 20


def overlay(path: Path, name: str | bytes, fmt: str | None = "qcow2") -> Path:
    """Write an empty image of 1 MiB over the backing file ``name``, whether or not it is there."""
    stored = name if isinstance(name, bytes) else os.fsencode(name)
    Poke(empty(path)).names([] if fmt is None else [(EXT_BACKING_FORMAT, fmt.encode())], stored)
    return path


def read_all(path: Path, **options: object) -> bytes:
    with q.open_disk(path, **options) as disk:  # type: ignore[arg-type]
        return disk.read(0, disk.size)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_b(tmp_path / "base.qcow2")


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["raw", "qcow2", "qcow"])
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "probed"])
def test_backing_formats_we_read_ourselves(fmt: str, recorded: bool, tmp_path: Path) -> None:
    qemu.img("convert", "-f", "raw", "-O", fmt, pattern_file(), tmp_path / "base")
    path = overlay(tmp_path / "disk", "base", fmt if recorded else None)
    qemu.io(path, "write -P 9 64k 64k")
    assert read_all(path) == qemu.raw_bytes(path)


@pytest.mark.parametrize(
    ("fmt", "library", "options"),
    [
        ("vmdk", "pyvmdk", {"subformat": "monolithicSparse"}),
        ("vmdk", "pyvmdk", {"subformat": "streamOptimized"}),
        ("vhdx", "pyvhdi", {}),
        ("vpc", "pyvhdi", {"force_size": "on"}),
    ],
    ids=["vmdk", "vmdk-stream", "vhdx", "vpc"],
)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "probed"])
def test_backing_formats_read_through_a_library(
    fmt: str, library: str, options: dict[str, str], recorded: bool, tmp_path: Path
) -> None:
    pytest.importorskip(library, reason=f"{library} is absent")
    qemu.convert(pattern_file(), tmp_path / "base", fmt="raw", target_format=fmt, target_options=options)
    path = overlay(tmp_path / "disk", "base", fmt if recorded else None)
    qemu.io(path, "write -P 9 64k 64k")
    assert read_all(path) == qemu.raw_bytes(path)


@pytest.mark.parametrize("fmt", ["vdi", "qed", "parallels"])
def test_other_backing_formats_are_unsupported_by_name(fmt: str, tmp_path: Path) -> None:
    qemu.convert(pattern_file(), tmp_path / "base", fmt="raw", target_format=fmt)
    for recorded in (fmt, None):
        with pytest.raises(Unsupported, match=fmt):
            q.open_disk(overlay(tmp_path / "disk", "base", recorded))


def test_the_recorded_format_wins_over_what_the_file_starts_with(base: Path, tmp_path: Path) -> None:
    path = overlay(tmp_path / "disk", "base.qcow2", "raw")
    got = read_all(path)
    assert got == qemu.raw_bytes(path)
    assert got[:4] == b"QFI\xfb"


def test_a_recorded_format_the_file_does_not_have_is_an_error(base: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"\x11" * MiB)
    for name, fmt in (("plain", "qcow2"), ("base.qcow2", "qcow"), ("base.qcow2", "no-such-format")):
        path = overlay(tmp_path / "disk", name, fmt)
        assert not qemu.io(path, "length", check=False).ok
        with pytest.raises(Qcow2Error):
            q.open_disk(path)


# --- shape of chains ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [512, 65536, MiB - 512, MiB + 512, 3 * MiB])
@pytest.mark.parametrize("tail", [0, 1, 511])
def test_backing_files_of_any_size_end_in_zeros(size: int, tail: int, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"\x7f" * (size + tail))
    path = overlay(tmp_path / "disk", "base.raw", "raw")
    qemu.io(path, "write -P 9 96k 8k", "write -z 0 512")
    assert read_all(path) == qemu.raw_bytes(path)


def test_a_chain_of_sixty_reads_as_in_qemu(tmp_path: Path) -> None:
    for index in range(60):
        builder = Builder(cluster_bits=9, size=60 * 512, extensions=[(EXT_BACKING_FORMAT, b"qcow2")])
        builder.backing = None if index == 0 else f"{index - 1}.qcow2".encode()
        builder.data(index * 512, bytes([index + 1]) * 512).write(tmp_path / f"{index}.qcow2")
    path = tmp_path / "59.qcow2"
    with q.open_disk(path) as disk:
        assert disk.depth == 60
        assert disk.read(0, disk.size) == qemu.raw_bytes(path)
        assert [extent.depth for extent in disk.extents()] == list(range(59, -1, -1))


def test_a_chain_is_followed_to_the_limit_and_no_further(tmp_path: Path) -> None:
    for index in range(5):
        builder = Builder(cluster_bits=9, size=512, extensions=[(EXT_BACKING_FORMAT, b"qcow2")])
        builder.backing = None if index == 0 else f"{index - 1}.qcow2".encode()
        builder.write(tmp_path / f"{index}.qcow2")
    q.open_disk(tmp_path / "4.qcow2", limits=q.Limits(chain_depth=5)).close()
    with pytest.raises(LimitExceeded):
        q.open_disk(tmp_path / "4.qcow2", limits=q.Limits(chain_depth=4))


def test_a_loop_through_a_link_is_found(tmp_path: Path) -> None:
    path = overlay(tmp_path / "disk.qcow2", "alias.qcow2")
    (tmp_path / "alias.qcow2").symlink_to(path)
    with pytest.raises(ForbiddenReference):
        q.open_disk(path)
    (tmp_path / "alias.qcow2").unlink()
    os.link(path, tmp_path / "alias.qcow2")
    with pytest.raises(ForbiddenReference):
        q.open_disk(path)


def test_a_snapshot_falls_through_to_the_current_backing_file(base: Path, tmp_path: Path) -> None:
    path = overlay(tmp_path / "disk", "base.qcow2")
    qemu.io(path, "write -P 5 64k 64k")
    qemu.snapshot(path, "s")
    qemu.io(path, "write -P 6 0 1M")
    with q.open_disk(path, "s") as disk:
        got = disk.read(0, disk.size)
    assert got == qemu.raw_bytes(path, snapshot="s")
    assert got[:0x20000] == b"\x11" * 0x10000 + b"\x05" * 0x10000


@pytest.mark.parametrize("encrypted", ["overlay", "base"])
def test_layers_are_encrypted_each_for_itself(encrypted: str, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography is absent")
    aes = {"format": "aes"}
    below = qemu.create(tmp_path / "base", "1M", secret="pw" if encrypted == "base" else None, encrypt=aes)
    qemu.io(below, "write -P 1 0 512k", secret="pw" if encrypted == "base" else None)
    above = qemu.create(tmp_path / "disk", "1M", secret="pw" if encrypted == "overlay" else None, encrypt=aes)
    qemu.io(above, "write -P 2 256k 512k", secret="pw" if encrypted == "overlay" else None)
    Poke(above).names([(EXT_BACKING_FORMAT, b"qcow2")], b"base")
    wanted = b"\x01" * (256 << 10) + b"\x02" * (512 << 10) + bytes(256 << 10)
    assert read_all(above, passphrase="pw") == wanted
    with q.open_disk(above) as disk:
        assert disk.is_locked
        with pytest.raises(Locked):
            disk.read(0, disk.size)
        disk.unlock("pw")
        assert disk.read(0, disk.size) == wanted


# --- names that are followed ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "base.qcow2",
        "./base.qcow2",
        "sub/../base.qcow2",
        "file:base.qcow2",
        "json:{}",
    ],
)
def test_names_that_mean_a_plain_file_beside_the_image_are_followed(name: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    if name == "json:{}":
        name = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}'
    path = overlay(tmp_path / "disk", name)
    with q.open_disk(path) as disk:
        assert disk.read(0, 2) == b"\x11\x11"
    assert qemu.read(path, 0, 512, cwd=tmp_path) == b"\x11" * 512


def test_an_absolute_name_inside_the_folder_of_the_image_is_followed(base: Path, tmp_path: Path) -> None:
    assert read_all(overlay(tmp_path / "disk", str(base)))[:2] == b"\x11\x11"


def test_a_name_with_a_colon_needs_a_dot_slash_as_in_qemu(tmp_path: Path) -> None:
    base_b(tmp_path / "a:b.qcow2")
    assert read_all(overlay(tmp_path / "disk", "./a:b.qcow2"))[:2] == b"\x11\x11"
    with pytest.raises(ForbiddenReference):
        q.open_disk(overlay(tmp_path / "disk", "a:b.qcow2"))


def test_names_that_are_not_utf8_are_followed_as_bytes(tmp_path: Path) -> None:
    name = b"b\xffse.qcow2"
    base_b(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)))
    assert read_all(overlay(tmp_path / "disk", name))[:2] == b"\x11\x11"


def test_relative_names_start_at_the_folder_the_image_was_named_in(base: Path, tmp_path: Path) -> None:
    # As in QEMU: a link to the overlay in another folder looks for the base beside the link.
    path = overlay(tmp_path / "disk", "base.qcow2")
    other = tmp_path / "other"
    other.mkdir()
    (other / "link").symlink_to(path)
    assert qemu.read(other / "link", 0, 512) is None
    with pytest.raises(MissingFile):
        q.open_disk(other / "link")
    Poke(base_b(other / "base.qcow2")).write(0x50000, b"\x77" * 512)
    assert qemu.read(other / "link", 0, 512) == b"\x77" * 512
    assert read_all(other / "link")[:512] == b"\x77" * 512


def test_relative_names_in_a_lower_layer_start_at_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    base_b(tmp_path / "sub" / "base.qcow2")
    overlay(tmp_path / "sub" / "middle.qcow2", "base.qcow2")
    path = overlay(tmp_path / "disk", "sub/middle.qcow2")
    assert read_all(path) == qemu.raw_bytes(path)
    # Up again to the folder of the image that was opened, but no further.
    overlay(tmp_path / "sub" / "middle.qcow2", "../base.qcow2")
    base_b(tmp_path / "base.qcow2")
    assert read_all(path) == qemu.raw_bytes(path)


# --- names that are refused -------------------------------------------------------------------------

REFUSED = [
    "/etc/passwd",
    "../base.raw",
    "sub/../../base.raw",
    "nbd://127.0.0.1:1/x",
    "nbd:unix:/tmp/s",
    "http://127.0.0.1:1/x",
    "ssh://127.0.0.1:1/x",
    "fat:/etc",
    "host_device:/dev/sda",
    "/dev/zero",
    "blkdebug::base.qcow2",
    "raw:base.qcow2",
    "json:{",
    "json:[]",
    'json:{"driver":"file","filename":"base.qcow2"}',
    'json:{"driver":"nbd","host":"127.0.0.1"}',
    'json:{"driver":"qcow2","file":{"driver":"nbd","filename":"base.qcow2"}}',
    'json:{"driver":"qcow2","file":{"driver":"file","filename":"/etc/passwd"}}',
    'json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2","locking":"on"}}',
    'json:{"driver":"qcow2","backing":{"driver":"raw"},"file":{"driver":"file","filename":"base.qcow2"}}',
    'json:{"driver":"raw","file.filename":"base.qcow2","offset":"512k"}',
    'json:{"driver":"qcow2","file.filename":"base.qcow2","offset":512}',  # which QEMU refuses
    'json:{"driver":"qcow2","file.filename":"base.qcow2","file.filename":"base.qcow2"}',  # which QEMU refuses
    'json:{"driver":"qcow2","file":{"filename":"base.qcow2"},"file.filename":"base.qcow2"}',  # of which it takes the inner
    'json:{"driver":"qcow2","file.filename":"base.qcow2","x":{}}',  # which QEMU refuses
    "json:" + '{"file":' * 60 + "1" + "}" * 60,
    "file:/etc/passwd",
    "file:///etc/passwd",
    ".",
    "..",
    "/",
    "C:\\base.raw",
    "base.qcow2/",
    'json:{"driver":"qcow2","file.filename":"\\ud800"}',  # no file name can hold half a character
]


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "case"
    (folder / "sub").mkdir(parents=True)
    base_b(tmp_path / "base.qcow2")
    base_b(folder / "base.qcow2")
    with pytest.raises(ForbiddenReference) as caught:
        q.open_disk(overlay(folder / "disk", name))
    assert caught.value.name == name


def test_a_link_that_leads_outside_the_folder_is_refused(tmp_path: Path) -> None:
    outside = base_b(tmp_path / "base.qcow2")
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / "link.qcow2").symlink_to(outside)
    path = overlay(folder / "disk", "link.qcow2")
    with pytest.raises(ForbiddenReference):
        q.open_disk(path)
    assert read_all(path, resolver=q.Resolver(folders=[tmp_path]))[:2] == b"\x11\x11"


def test_deeply_nested_json_is_refused_not_crashed_on() -> None:
    for text in ("json:" + "[" * 100_000, "json:" + '{"a":' * 5000 + "1" + "}" * 5000):
        with pytest.raises(ForbiddenReference):
            parse_reference(text, "backing")


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "base"
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to("/dev/zero")
    path = overlay(tmp_path / "disk", "base", "raw")
    with pytest.raises(ForbiddenReference):
        q.open_disk(path, resolver=q.Resolver(folders=["/dev"]))


# --- widening ---------------------------------------------------------------------------------------


def test_the_caller_may_name_the_file_to_open(tmp_path: Path) -> None:
    base = base_b(tmp_path / "elsewhere.qcow2")
    folder = tmp_path / "case"
    folder.mkdir()
    for name in ("/gone/base.qcow2", "nbd://host/x", "../elsewhere.qcow2"):
        path = overlay(folder / "disk", name)
        assert read_all(path, resolver=q.Resolver(files={name: base}))[:2] == b"\x11\x11"


def test_a_trusted_folder_serves_names_that_lead_there_and_base_names(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    base = base_b(store / "base.qcow2")
    folder = tmp_path / "case"
    folder.mkdir()
    for name in (str(base), "../store/base.qcow2", "/var/lib/images/base.qcow2", "base.qcow2"):
        path = overlay(folder / "disk", name)
        with pytest.raises(Qcow2Error):
            q.open_disk(path)
        assert read_all(path, resolver=q.Resolver(folders=[store]))[:2] == b"\x11\x11"


def test_a_missing_backing_file_is_an_error_unless_the_caller_says_otherwise(tmp_path: Path) -> None:
    path = overlay(tmp_path / "disk", "gone.qcow2")
    qemu.img("rebase", "-u", "-f", "qcow2", "-b", "", path)
    qemu.io(path, "write -P 5 64k 64k")
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2")], b"gone.qcow2")
    with pytest.raises(MissingFile) as caught:
        q.open_disk(path)
    assert caught.value.role == "backing"
    assert caught.value.tried == (str(tmp_path / "gone.qcow2"),)
    with q.open_disk(path, missing="raise") as disk:
        assert disk.read(0x10000, 0x10000) == b"\x05" * 0x10000
        with pytest.raises(MissingFile):
            disk.read(0, 1)
        assert Kind.MISSING in {extent.kind for extent in disk.extents()}
    with q.open_disk(path, missing="zeros") as disk:
        assert disk.read(0, 0x20000) == bytes(0x10000) + b"\x05" * 0x10000
    with q.open_disk(path, follow=False) as disk:
        assert disk.read(0, 0x20000) == bytes(0x10000) + b"\x05" * 0x10000


def test_an_image_opened_without_a_path_follows_no_relative_name(base: Path, tmp_path: Path) -> None:
    path = overlay(tmp_path / "disk", "base.qcow2")
    for origin in (BytesSource(path.read_bytes()), io.BytesIO(path.read_bytes())):
        with pytest.raises(ForbiddenReference):
            q.open_disk(origin)
        with q.open_disk(origin, resolver=q.Resolver(folders=[tmp_path])) as disk:
            assert disk.read(0, 2) == b"\x11\x11"


# --- data files -------------------------------------------------------------------------------------


def with_data(folder: Path, name: str, *, raw: bool = False) -> Path:
    path = qemu.create(folder / "disk", "1M", data_file=folder / "own.data")
    qemu.io(path, "write -P 0x11 0 64k")
    Poke(path).names([(EXT_DATA_FILE, os.fsencode(name))]).u64(88, 2 if raw else 0)
    return path


@pytest.mark.parametrize("name", ["own.data", "./own.data"])
def test_a_data_file_beside_the_image_is_read(name: str, tmp_path: Path) -> None:
    assert read_all(with_data(tmp_path, name))[:2] == b"\x11\x11"


@pytest.mark.parametrize("name", ["gone.data", "file:own.data", "nbd://127.0.0.1:1/x", 'json:{"driver":"null-co"}'])
def test_data_file_names_are_literal(name: str, tmp_path: Path) -> None:
    path = with_data(tmp_path, name)
    with pytest.raises(MissingFile) as caught:
        q.open_disk(path)
    assert caught.value.role == "data"
    assert qemu.read(path, 0, 512, cwd=tmp_path) is None


@pytest.mark.parametrize("name", ["/etc/passwd", "../other.data", "disk"])
def test_data_files_outside_the_folder_and_the_image_itself_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    (tmp_path / "other.data").write_bytes(bytes(MiB))
    path = with_data(folder, name)
    with pytest.raises(ForbiddenReference):
        q.open_disk(path)


def test_a_data_file_that_is_an_image_is_read_raw_only_when_named_by_the_caller(base: Path, tmp_path: Path) -> None:
    path = with_data(tmp_path, "base.qcow2")
    with pytest.raises(ForbiddenReference):
        q.open_disk(path)
    assert read_all(path, resolver=q.Resolver(files={"base.qcow2": base}))[:4] == b"QFI\xfb"


def test_a_short_data_file_is_an_error_or_zeros_on_request(tmp_path: Path) -> None:
    path = with_data(tmp_path, "own.data")
    qemu.io(path, "write -P 0x22 512k 64k", opts={"data-file.filename": tmp_path / "own.data"})
    os.truncate(tmp_path / "own.data", 70000)
    with q.open_disk(path) as disk:
        assert disk.read(0, 65536) == b"\x11" * 65536
        with pytest.raises(FormatError):
            disk.read(512 << 10, 512)
    assert read_all(path, eof="zeros") == qemu.raw_bytes(path, cwd=tmp_path)


# --- files are closed -------------------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc here")
def test_no_file_stays_open(base: Path, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MiB))
    good = [
        overlay(tmp_path / "over-qcow2", "base.qcow2"),
        overlay(tmp_path / "over-raw", "base.raw", "raw"),
        with_data(tmp_path, "own.data"),
    ]
    overlay(tmp_path / "middle", "gone.qcow2")
    bad = [
        overlay(tmp_path / "over-gone", "gone.qcow2"),
        overlay(tmp_path / "over-middle", "middle"),
        overlay(tmp_path / "over-text", "base.raw", "qcow2"),
        overlay(tmp_path / "over-vdi", "base.raw", "vdi"),
    ]
    wrong: list[Callable[[], object]] = [lambda: q.open_disk(good[0], "no such snapshot")]
    wrong += [lambda path=path: q.open_disk(path) for path in bad]  # type: ignore[misc]
    gc.collect()
    before = open_files()
    gc.disable()  # what is closed must be closed by us, not by the collector
    try:
        for path in good:
            with q.open_disk(path) as disk:
                disk.read(0, 512)
            assert open_files() == before
        for attempt in wrong:
            with pytest.raises(Qcow2Error) as caught:
                attempt()
            del caught
            assert open_files() == before
    finally:
        gc.enable()


def test_a_source_of_the_caller_stays_open(base: Path) -> None:
    source = FileSource(base)
    q.open_disk(source).close()
    assert source.read(0, 4) == b"QFI\xfb"
    source.close()
