"""The dfVFS back-end reads what the raw disk holds, in dfVFS's own ways, and never anything else.

Images are made by qemu-img; what is true comes from the raw disk or from qemu-img convert.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dfvfs")

from dfvfs.helpers import volume_scanner
from dfvfs.lib import errors as dfvfs_errors
from dfvfs.path import factory
from dfvfs.resolver import context, resolver
from dfvfs.serializer import json_serializer

import dfvfs_qcow2
import qcow2_forensics
from dfvfs_qcow2 import inspection, opening
from qcow2_forensics.residue import inventory
from tests import plaso_tools, qemu
from tests.image_builder import Poke
from tests.tiers import quick

NewPathSpec = factory.Factory.NewPathSpec
STOCK_ENVIRONMENT = plaso_tools.environment(active=False)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw ext4 disk; see plaso_tools."""
    qemu.need()
    qemu.need("mke2fs")
    return plaso_tools.make_disk(tmp_path_factory.mktemp("disk"), files=60)


@pytest.fixture
def key_chain() -> Iterator[Any]:
    yield resolver.Resolver.key_chain
    resolver.Resolver.key_chain.Empty()


def qcow(path: Path, **keywords: Any) -> Any:
    return NewPathSpec("QCOW", parent=NewPathSpec("OS", location=str(path)), **keywords)


def open_file(path_spec: Any, resolver_context: Any = None) -> Any:
    return resolver.Resolver.OpenFileObject(path_spec, resolver_context=resolver_context or context.Context())


def walk(file_entry: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and digest of every file and folder, the digest empty for what has no content."""
    for sub_entry in file_entry.sub_file_entries:
        name = f"{path}/{sub_entry.name}"
        data = sub_entry.GetFileObject().read() if sub_entry.IsFile() else b""
        yield name, hashlib.sha256(data or b"").hexdigest()
        if sub_entry.IsDirectory():
            yield from walk(sub_entry, name)


def walk_file_system(parent: Any) -> list[tuple[str, str]]:
    root = NewPathSpec("EXT", location="/", parent=parent)
    return sorted(walk(resolver.Resolver.OpenFileEntry(root, resolver_context=context.Context())))


def scan(path: Path, **attributes: Any) -> list[Any]:
    options = volume_scanner.VolumeScannerOptions()
    options.partitions = ["all"]
    options.snapshots = ["none"]
    for name, value in attributes.items():
        setattr(options, name, value)
    found: list[Any] = volume_scanner.VolumeScanner().GetBasePathSpecs(str(path), options=options)
    return found


# --- every dress of the disk ---------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(plaso_tools.VARIANTS, [name for name in plaso_tools.VARIANTS if name != "LUKS"]))
def test_file_systems_in_every_kind_of_image_are_those_of_the_raw_disk(
    name: str, disk: Path, tmp_path: Path, key_chain: Any
) -> None:
    variant = plaso_tools.VARIANTS[name](tmp_path, disk)
    image = NewPathSpec("OS", location=str(variant.path))
    if variant.nested:
        image = NewPathSpec("EXT", location=variant.nested, parent=image)
    parent = image if name == "raw" else NewPathSpec("QCOW", parent=image)
    if variant.arguments:
        key_chain.SetCredential(parent, "password", plaso_tools.PASSPHRASE)
    listing = walk_file_system(parent)
    assert len(listing) > 80
    assert listing == walk_file_system(NewPathSpec("OS", location=str(disk)))


def test_random_reads_are_those_of_the_raw_disk(disk: Path, tmp_path: Path) -> None:
    variant = plaso_tools.three_deep_chain(tmp_path, disk)
    raw = disk.read_bytes()
    file_object = open_file(qcow(variant.path))
    assert file_object.get_size() == len(raw)
    chance = random.Random(7)
    for _ in range(4000):
        offset = chance.randrange(len(raw)) if chance.random() < 0.3 else file_object.get_offset()
        size = chance.choice((1, 16, 64, 64, 64, 1024, 4096, 65536, 70000, 200000))
        file_object.seek(offset)
        data = file_object.read(size)
        assert type(data) is bytes
        assert data == raw[offset : offset + size]
        assert file_object.get_offset() == max(offset, min(offset + size, len(raw)))


# --- the file object's contract ------------------------------------------------------------------


def test_file_object_moves_and_reads_as_dfvfs_expects(base_image: Path) -> None:
    file_object = open_file(qcow(base_image))
    assert file_object.read() == qemu.raw_bytes(base_image)
    assert file_object.read(5) == b""
    assert file_object.seek(-4, os.SEEK_END) is None
    assert file_object.read(64) == bytes(4)
    file_object.seek(5 << 20)  # past the end is allowed
    assert file_object.tell() == 5 << 20
    assert file_object.read(1) == b""
    file_object.seek(10)
    file_object.seek(10, os.SEEK_CUR)
    assert file_object.read(2) == b"\x11\x11"
    assert file_object.read(0) == b""
    for wrong in ((-1, os.SEEK_SET), (-(2 << 20), os.SEEK_END), (0, 99)):
        with pytest.raises(OSError, match=r"."):
            file_object.seek(*wrong)
    with pytest.raises(OSError, match="less than zero"):
        file_object.read(-1)
    file_object.close()
    file_object.seek(0)
    assert file_object.read(1) == b"\x11"


def test_what_cannot_be_opened_is_a_back_end_error(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not an image")
    empty = tmp_path / "empty"
    empty.touch()
    for path in (text, empty, tmp_path, tmp_path / "absent"):
        with pytest.raises(dfvfs_errors.BackEndError):
            open_file(qcow(path))


def test_an_unopened_file_object_raises_oserror(base_image: Path) -> None:
    from dfvfs_qcow2.file_io import QCOWFile

    file_object = QCOWFile(context.Context(), qcow(base_image))
    for call in (file_object.read, file_object.get_size, file_object.get_offset, lambda: file_object.seek(0)):
        with pytest.raises(OSError, match="Not opened"):
            call()


def test_opening_again_reads_no_table_again(disk: Path, tmp_path: Path) -> None:
    variant = plaso_tools.VARIANTS["plain qcow2"](tmp_path, disk)
    kept = context.Context()
    first = opening.open_state(qcow(variant.path), kept)
    first.disk.read(0, 64)
    assert opening.open_state(qcow(variant.path), kept) is first
    os.utime(variant.path, ns=(1, 1))  # the file changed
    assert opening.open_state(qcow(variant.path), kept) is not first


# --- path specifications -------------------------------------------------------------------------


def test_active_state_path_specs_are_those_of_the_stock_back_end(base_image: Path) -> None:
    script = (
        "import sys; from dfvfs.path import factory; from dfvfs.serializer import json_serializer;"
        "q = factory.Factory.NewPathSpec('QCOW', parent=factory.Factory.NewPathSpec('OS', location=sys.argv[1]));"
        "print(type(q).__module__); print(json_serializer.JsonPathSpecSerializer.WriteSerialized(q));"
        "print(repr(q.comparable)); print(q.CopyToDict().keys()); print(factory.Factory.GetProperties(q))"
    )
    command = [sys.executable, "-P", "-c", script, str(base_image)]
    stock = subprocess.run(command, check=True, capture_output=True, text=True, env=STOCK_ENVIRONMENT).stdout
    ours = subprocess.run(
        [*command[:3], f"import dfvfs_qcow2; {script}", str(base_image)],
        check=True,
        capture_output=True,
        text=True,
        env=plaso_tools.environment(),
    ).stdout
    assert stock.splitlines()[0] == "dfvfs.path.qcow_path_spec"
    assert ours.splitlines()[0] == "dfvfs_qcow2.path_spec"
    assert ours.splitlines()[1:] == stock.splitlines()[1:]


def test_snapshot_path_specs_survive_serialisation(snapshots_image: Path) -> None:
    for path_spec in dfvfs_qcow2.snapshot_path_specs(qcow(snapshots_image)):
        text = json_serializer.JsonPathSpecSerializer.WriteSerialized(path_spec)
        again = json_serializer.JsonPathSpecSerializer.ReadSerialized(text)
        assert again == path_spec
        assert open_file(again).read(512) == open_file(path_spec).read(512)


# --- snapshots -----------------------------------------------------------------------------------


@pytest.fixture
def snapshots_image(disk: Path, tmp_path: Path) -> Path:
    """The disk with two snapshots, the second of a hostile name, and a wiped active state."""
    path = plaso_tools.VARIANTS["plain qcow2"](tmp_path, disk).path
    qemu.snapshot(path, "first")
    qemu.io(path, "write -P 0x55 20M 64k")
    qemu.snapshot(path, "a/../b: 100%,\u202egpj")
    qemu.io(path, "write -z 0 32M")
    return path


def test_snapshots_read_as_qemu_converts_them(snapshots_image: Path) -> None:
    path_specs = dfvfs_qcow2.snapshot_path_specs(qcow(snapshots_image))
    names = [entry.name for entry in dfvfs_qcow2.snapshots(qcow(snapshots_image))]
    assert [item.encoding_method for item in path_specs] == [
        "qcow2-snapshot:0:first",
        "qcow2-snapshot:1:a%2F..%2Fb%3A%20100%25%2C%E2%80%AEgpj",
    ]
    for path_spec, name in zip(path_specs, names, strict=True):
        assert open_file(path_spec).read() == qemu.raw_bytes(snapshots_image, snapshot=name)
    assert not any(open_file(qcow(snapshots_image)).read())


def test_the_stock_back_end_refuses_a_snapshot_instead_of_showing_another_state(snapshots_image: Path) -> None:
    script = (
        "import sys; from dfvfs.path import factory; from dfvfs.resolver import resolver;"
        "n = factory.Factory.NewPathSpec; q = n('QCOW', parent=n('OS', location=sys.argv[1]));"
        "s = n('ENCODED_STREAM', encoding_method='qcow2-snapshot:0:first', parent=q);"
        "resolver.Resolver.OpenFileObject(s).read(512)"
    )
    command = [sys.executable, "-P", "-c", script, str(snapshots_image)]
    stock = subprocess.run(command, check=False, capture_output=True, text=True, env=STOCK_ENVIRONMENT)
    assert stock.returncode == 1
    assert "Decode" in stock.stderr  # it looks for a decoder of that name, and has none


def test_a_snapshot_that_is_no_longer_there_is_an_error(snapshots_image: Path) -> None:
    for method in ("qcow2-snapshot:0:second", "qcow2-snapshot:7:first", "qcow2-snapshot:x", "qcow2-snapshot:-1:first"):
        with pytest.raises((dfvfs_errors.BackEndError, dfvfs_errors.PathSpecError)):
            open_file(NewPathSpec("ENCODED_STREAM", encoding_method=method, parent=qcow(snapshots_image)))


def test_other_encoded_streams_are_read_as_ever(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"aGVsbG8=")
    parent = NewPathSpec("OS", location=str(tmp_path / "text"))
    assert open_file(NewPathSpec("ENCODED_STREAM", encoding_method="base64", parent=parent)).read() == b"hello"


def test_the_scanner_finds_file_systems_in_the_snapshots_asked_for(snapshots_image: Path) -> None:
    methods = ["qcow2-snapshot:0:first", "qcow2-snapshot:1:a%2F..%2Fb%3A%20100%25%2C%E2%80%AEgpj"]
    assert scan(snapshots_image) == []
    for text, wanted in (
        ("all", methods),
        ("none", []),
        ("#1..#2", methods),
        ("2", methods[1:]),
        ("first", methods[:1]),
        ("id:2", methods[1:]),
        ("a/../b: 100%,\u202egpj", methods[1:]),
    ):
        assert [item.parent.encoding_method for item in scan(snapshots_image, qcow_snapshots=text)] == wanted
    for text in ("3", "1,4", "third", "#2..#1", "1..2", "1,,2", "id:9", "#3"):
        with pytest.raises(dfvfs_errors.ScannerError):
            scan(snapshots_image, qcow_snapshots=text)


# --- deleted snapshots ---------------------------------------------------------------------------


@pytest.fixture
def image_with_deleted_snapshots(disk: Path, tmp_path: Path) -> tuple[Path, bytes]:
    """The disk in the snapshot ``alpha``, deleted, and another one taken and deleted after it was wiped."""
    path = plaso_tools.VARIANTS["plain qcow2"](tmp_path, disk).path
    qemu.snapshot(path, "alpha")
    before = qemu.raw_bytes(path, snapshot="alpha")
    qemu.io(path, "write -P 0x66 0 32M")
    qemu.snapshot(path, "live")
    qemu.snapshot(path, "alpha", action="-d", opts={"pass-discard-snapshot": "off", "discard": "ignore"})
    return path, before


def test_a_deleted_snapshot_has_a_path_spec_that_survives_serialisation(
    image_with_deleted_snapshots: tuple[Path, bytes],
) -> None:
    path, before = image_with_deleted_snapshots
    (found,) = dfvfs_qcow2.deleted_snapshots(qcow(path))
    path_spec = inspection.snapshot_path_spec(qcow(path), found.entry)
    assert path_spec.encoding_method == f"qcow2-snapshot:deleted:{found.entry.offset:#x}:alpha"
    again = json_serializer.JsonPathSpecSerializer.ReadSerialized(
        json_serializer.JsonPathSpecSerializer.WriteSerialized(path_spec)
    )
    assert open_file(again).read() == before
    assert len(walk_file_system(again)) > 80
    assert dfvfs_qcow2.snapshots(qcow(path))[0].name != "alpha"


def test_opening_a_deleted_snapshot_does_not_read_all_free_space(
    image_with_deleted_snapshots: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = image_with_deleted_snapshots
    (found,) = dfvfs_qcow2.deleted_snapshots(qcow(path))
    monkeypatch.setattr(inventory, "scan", None)
    assert open_file(inspection.snapshot_path_spec(qcow(path), found.entry)).read(65536) == before[:65536]


@pytest.mark.parametrize("method", ["deleted:{:#x}:beta", "deleted:{:x}:alpha", "deleted:0x10000:alpha", "deleted::a"])
def test_a_deleted_snapshot_that_is_not_at_its_place_is_an_error(
    method: str, image_with_deleted_snapshots: tuple[Path, bytes]
) -> None:
    path, _ = image_with_deleted_snapshots
    (found,) = dfvfs_qcow2.deleted_snapshots(qcow(path))
    method = f"qcow2-snapshot:{method.format(found.entry.offset)}"
    with pytest.raises((dfvfs_errors.BackEndError, dfvfs_errors.PathSpecError)):
        open_file(NewPathSpec("ENCODED_STREAM", encoding_method=method, parent=qcow(path)))


def test_a_live_snapshot_named_like_a_deleted_one_is_not_taken_for_it(
    image_with_deleted_snapshots: tuple[Path, bytes],
) -> None:
    path, before = image_with_deleted_snapshots
    (found,) = dfvfs_qcow2.deleted_snapshots(qcow(path))
    (live,) = dfvfs_qcow2.snapshots(qcow(path))
    name = found.selector.encode()
    poke = Poke(path)
    poke.write(live.offset + 14, len(name).to_bytes(2, "big"))
    poke.write(live.offset + live.length - len(live.name_bytes), name)
    assert dfvfs_qcow2.snapshots(qcow(path))[0].name == found.selector
    with qcow2_forensics.open_disk(path, snapshot=found.entry) as opened:
        assert opened.read(0, 4096) == before[:4096]
    assert open_file(inspection.snapshot_path_spec(qcow(path), found.entry)).read(4096) == before[:4096]


def test_the_scanner_takes_deleted_snapshots_only_when_they_are_asked_for(
    image_with_deleted_snapshots: tuple[Path, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = image_with_deleted_snapshots
    (found,) = dfvfs_qcow2.deleted_snapshots(qcow(path))
    method = f"qcow2-snapshot:deleted:{found.entry.offset:#x}:alpha"
    for text in (
        "deleted",
        "all,deleted",
        "#1,deleted",
        "deleted:alpha",
        "deleted:1",
        found.selector,
        "live, deleted:1",
    ):
        assert [item.parent.encoding_method for item in scan(path, qcow_snapshots=text)] == [method], text
    assert scan(path, qcow_snapshots="all") == []  # the live one holds no file system
    for text in ("alpha", "deleted:live", "deleted:2", "name:deleted"):
        with pytest.raises(dfvfs_errors.ScannerError):
            scan(path, qcow_snapshots=text)


def test_what_is_left_of_a_deleted_snapshot_is_reported(
    image_with_deleted_snapshots: tuple[Path, bytes], base_image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = image_with_deleted_snapshots
    with caplog.at_level("WARNING", logger="dfvfs_qcow2"):
        scan(base_image, qcow_snapshots="deleted")
        assert "No table entry of a deleted snapshot" in caplog.text
        (found,) = dfvfs_qcow2.deleted_snapshots(qcow(path))
        with path.open("r+b") as file:
            file.seek(found.entry.l1_table_offset)
            file.write(b"\xff" * 512)
        assert scan(path, qcow_snapshots="deleted") == []
    assert f"0% of the deleted snapshot at {found.entry.offset:#x} (alpha) can be read" in caplog.text
    assert "Unable to scan" not in caplog.text  # which would open what another snapshot put there


def test_a_cluster_that_libtsk_cannot_read_is_an_error_of_the_scan_and_of_one_snapshot_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = qemu.create(tmp_path / "bad.qcow2", "1M", cluster_size=4096)
    qemu.io(path, "write -P 0x11 0 8k", "write -c -P 0x22 8k 4k", "write -P 0x11 12k 500k")
    qemu.snapshot(path, "bad")
    with qcow2_forensics.open_image(path) as image:
        l2 = image.table(image.header.l1_table_offset, 1, "L1")[0] & ~(1 << 63)
        stream = image.table(l2, 3, "L2")[2] & ((1 << 58) - 1)
    with path.open("r+b") as file:
        file.seek(stream)
        file.write(b"\xff" * 16)
    with pytest.raises(dfvfs_errors.ScannerError, match="cannot be decoded"):
        scan(path, qcow_snapshots="none")
    path = path.rename(tmp_path / "mended.qcow2")  # a path of its own: opened files are kept
    qemu.io(path, "write -P 0x33 0 512k")
    with caplog.at_level("WARNING", logger="dfvfs_qcow2"):
        assert scan(path, qcow_snapshots="all") == []
    assert "Unable to scan snapshot 1 (bad)" in caplog.text
    assert "cannot be decoded" in caplog.text


def test_an_image_with_a_file_system_only_in_a_snapshot_is_a_storage_media_image(snapshots_image: Path) -> None:
    scanner = volume_scanner.VolumeScanner()
    options = volume_scanner.VolumeScannerOptions()
    options.qcow_snapshots = "first"
    assert len(scanner.GetBasePathSpecs(str(snapshots_image), options=options)) == 1
    assert scanner._source_type == "storage media image"


def test_the_environment_asks_for_snapshots_too(
    snapshots_image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="dfvfs_qcow2"):
        scan(snapshots_image)
    assert "2 internal snapshot(s)" in caplog.text
    assert "1: first (ID 1, " in caplog.text
    assert "\\u202e" in caplog.text
    monkeypatch.setenv("DFVFS_QCOW2_SNAPSHOTS", "2")
    assert [item.parent.encoding_method[:16] for item in scan(snapshots_image)] == ["qcow2-snapshot:1"]
    assert scan(snapshots_image, qcow_snapshots="none") == []


# --- findings ------------------------------------------------------------------------------------


def test_findings_of_an_image_are_listed_by_path_spec(snapshots_image: Path) -> None:
    inside = NewPathSpec("EXT", location="/", parent=qcow(snapshots_image))
    findings = dfvfs_qcow2.findings(inside)
    assert [item.code for item in findings] == [item.code for item in dfvfs_qcow2.audit(qcow(snapshots_image))]
    assert any("SNAPSHOT" in item.code for item in findings)
    with pytest.raises(ValueError, match="no QCOW image"):
        dfvfs_qcow2.findings(NewPathSpec("OS", location=str(snapshots_image)))


def test_the_log_names_the_back_end_and_its_version(base_image: Path, caplog: pytest.LogCaptureFixture) -> None:
    from qcow2_forensics import __version__

    with caplog.at_level("INFO", logger="dfvfs_qcow2"):
        open_file(qcow(base_image))
        open_file(qcow(base_image))
    assert caplog.text.count(f"QCOW back-end qcow2-forensics {__version__} reads {base_image}") == 1


def test_few_images_stay_open_however_many_contexts_come_and_go(base_image: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("/proc is absent")
    before = len(list(descriptors.iterdir()))
    for _ in range(50):
        open_file(qcow(base_image), context.Context()).read(16)
    gc.collect()
    assert len(list(descriptors.iterdir())) <= before + opening._KEPT


def test_snapshots_are_nodes_of_a_source_scan_when_they_are_asked_for(
    snapshots_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfvfs.helpers import source_scanner

    def kinds(wanted: str | None) -> list[str]:
        context = source_scanner.SourceScannerContext()
        context.OpenSourcePath(str(snapshots_image))
        scanner = source_scanner.SourceScanner()
        if wanted is not None:
            scanner.qcow_snapshots = wanted
        scanner.Scan(context)
        (qcow,) = context.GetRootScanNode().sub_nodes
        return [f"{node.type_indicator}>{[sub.type_indicator for sub in node.sub_nodes]}" for node in qcow.sub_nodes]

    active = kinds(None)
    assert not active  # only the snapshots have a file system
    assert kinds("all") == ["ENCODED_STREAM>['EXT']"] * 2
    assert kinds("first") == [*active, "ENCODED_STREAM>['EXT']"]
    monkeypatch.setenv("DFVFS_QCOW2_SNAPSHOTS", "#2")
    assert kinds(None) == [*active, "ENCODED_STREAM>['EXT']"]
    assert kinds("none") == active


def test_dfimagetools_keeps_the_files_of_each_state_apart(
    snapshots_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lister = pytest.importorskip("dfimagetools.file_entry_lister", reason="dfimagetools is absent")
    monkeypatch.setenv("DFVFS_QCOW2_SNAPSHOTS", "all")
    made = lister.FileEntryLister()
    specs = made.GetBasePathSpecs(str(snapshots_image))
    paths = ["/".join(segments) for _, segments in made.ListFileEntries(specs)]
    assert len(paths) == len(set(paths))
    assert {path.split("/")[1] for path in paths if path.startswith("/qcow2-")} >= {"qcow2-snapshot1-first"}


def test_an_inherited_lister_names_snapshots(snapshots_image: Path) -> None:
    class Lister(volume_scanner.VolumeScanner):  # as dfimagetools has one
        def _GetBasePathSegments(self, path_spec: Any) -> list[str]:  # noqa: N802
            return [""] if path_spec is None else self._GetBasePathSegments(path_spec.parent)

    options = volume_scanner.VolumeScannerOptions()
    options.qcow_snapshots = "all"  # type: ignore[attr-defined]
    lister = Lister()
    found = [lister._GetBasePathSegments(spec) for spec in lister.GetBasePathSpecs(str(snapshots_image), options)]
    assert found[0] == ["", "qcow2-snapshot1-first"]
    assert len({str(segments) for segments in found}) == 2
