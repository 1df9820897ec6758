"""What an examiner states of a damaged image, its header fields and the size of its disk, counts at every front door.

The images are made by qemu-img, whose raw disk is the oracle; the damage is done by raw byte writes.
"""

from __future__ import annotations

import json
import random
import runpy
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fuzz.targets import run_command

from qcow2_forensics import (
    ALONE_VARIABLE,
    ASSUME_VARIABLE,
    VIRTUAL_SIZE_VARIABLE,
    Qcow2Error,
    assumptions_from_environment,
    data,
    open_disk,
    open_guest_memory,
    open_image,
    parse_assumptions,
    parse_size,
    virtual_size_from_environment,
)
from tests import qemu
from tests.stream_builder import PAGE, page, simple

MIB = 1 << 20
SIZE = 6 * MIB
STORED = 3 * MIB  # the rest of the disk was never written
STATE = "recovered:1"

Door = Callable[[Path, str | None, int | None, str, pytest.MonkeyPatch], bytes]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stated") / "disk.raw"
    path.write_bytes(random.Random(77).randbytes(STORED).ljust(SIZE, b"\0"))
    return path


@pytest.fixture
def headless(raw: Path, tmp_path: Path) -> Path:
    """An image whose header is lost, and nothing else gives the size of its disk."""
    path = tmp_path / "headless.bin"
    qemu.img("convert", "-O", "qcow2", raw, path)
    data = bytearray(path.read_bytes())
    data[:65536] = random.Random(1).randbytes(65536)
    path.write_bytes(data)
    return path


@pytest.fixture
def unflagged(raw: Path, tmp_path: Path) -> Path:
    """An image with extended L2 entries of which the feature bit was cleared."""
    path = tmp_path / "unflagged.qcow2"
    qemu.img("convert", "-O", "qcow2", "-o", "extended_l2=on", raw, path)
    _clear_extended(path)
    return path


def _clear_extended(path: Path) -> None:
    with path.open("r+b") as file:
        (features,) = struct.unpack(">Q", file.read(80)[72:])
        file.seek(72)
        file.write(struct.pack(">Q", features & ~16))


# --- the doors: state, virtual size, header fields -------------------------------------------------


def python_disk(path: Path, state: str | None, size: int | None, assume: str, _: pytest.MonkeyPatch) -> bytes:
    with open_disk(path, state, virtual_size=size, assume=parse_assumptions(assume)) as disk:
        return disk.read(0, disk.size)


def command_export(path: Path, state: str | None, size: int | None, assume: str, _: pytest.MonkeyPatch) -> bytes:
    out = path.with_suffix(".out")
    arguments = ["export", str(path), str(out), "--force"]
    arguments += ["--snapshot", state] if state else []
    arguments += ["--virtual-size", str(size)] if size else []
    arguments += [part for item in filter(None, assume.split(",")) for part in ("--assume", item)]
    code, _, errors = run_command(arguments)
    assert code == 0, errors
    return out.read_bytes()


def pytsk3_class(path: Path, state: str | None, size: int | None, assume: str, _: pytest.MonkeyPatch) -> bytes:
    module = pytest.importorskip("pytsk3_qcow2")
    with module.Img_Info(str(path), snapshot=state, virtual_size=size, assume=parse_assumptions(assume)) as image:
        return bytes(image.read(0, image.get_size()))


def pytsk3_states(path: Path, state: str | None, size: int | None, assume: str, _: pytest.MonkeyPatch) -> bytes:
    module = pytest.importorskip("pytsk3_qcow2")
    recovered = state is not None
    found = module.states(str(path), recovered=recovered, virtual_size=size, assume=parse_assumptions(assume))
    image = next(found)
    return bytes(image.read(0, image.get_size()))


def volatility_layer(path: Path, state: str | None, size: int | None, assume: str, _: pytest.MonkeyPatch) -> bytes:
    pytest.importorskip("volatility3")
    from tests import volatility_tools

    layer = volatility_tools.stack(path, snapshot=state or "disk", virtual_size=size and str(size), assume=assume)
    saved = dict(layer.build_configuration())  # what vol --save-config writes: it has all that was stated
    assert (saved.get("virtual_size"), saved.get("assume") or "") == (size, assume)
    return bytes(layer.read(0, layer.maximum_address + 1))


def dfvfs_path_spec(
    path: Path, state: str | None, size: int | None, assume: str, environment: pytest.MonkeyPatch
) -> bytes:
    pytest.importorskip("dfvfs")
    from dfvfs.path import factory
    from dfvfs.resolver import context, resolver

    import dfvfs_qcow2

    _set(environment, size, assume)
    spec = factory.Factory.NewPathSpec("QCOW", parent=factory.Factory.NewPathSpec("OS", location=str(path)))
    if state:
        spec = dfvfs_qcow2.recovered_path_spec(spec, dfvfs_qcow2.recovered_states(spec)[0])
    file_object = resolver.Resolver.OpenFileObject(spec, resolver_context=context.Context())
    return bytes(file_object.read())


def dissect_container(
    path: Path, state: str | None, size: int | None, assume: str, environment: pytest.MonkeyPatch
) -> bytes:
    pytest.importorskip("dissect.target")
    from dissect_qcow2 import Qcow2Container

    _set(environment, size, assume)
    container = Qcow2Container(path, state)
    return bytes(container.read(container.size))


def _set(environment: pytest.MonkeyPatch, size: int | None, assume: str) -> None:
    for name, value in ((VIRTUAL_SIZE_VARIABLE, size and str(size)), (ASSUME_VARIABLE, assume)):
        if value:
            environment.setenv(name, value)
        else:
            environment.delenv(name, raising=False)


def nbd_export(path: Path, state: str | None, size: int | None, assume: str, environment: pytest.MonkeyPatch) -> bytes:
    _set(environment, size, assume)
    environment.setitem(sys.modules, "nbdkit", ModuleType("nbdkit"))
    plugin = runpy.run_path(str(Path(data.__path__[0], "nbdkit_plugin.py")))
    plugin["config"]("image", str(path))
    with plugin["opened"](state or "") as disk:
        return bytes(disk.read(0, disk.size))


DOORS: list[Door] = [
    python_disk,
    command_export,
    pytsk3_class,
    pytsk3_states,
    volatility_layer,
    dfvfs_path_spec,
    dissect_container,
    nbd_export,
]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_stated_size_is_that_of_the_recovered_disk(
    door: Door, headless: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert door(headless, STATE, None, "", monkeypatch) == raw.read_bytes()[:STORED]
    assert door(headless, STATE, SIZE, "", monkeypatch) == raw.read_bytes()


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_an_assumed_header_field_counts(
    door: Door, unflagged: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert door(unflagged, None, None, "extended-l2=on", monkeypatch) == raw.read_bytes()


def test_memory_is_read_with_the_assumed_header_field(tmp_path: Path) -> None:
    pages = 40  # more than one cluster: the first entry of a table reads the same either way
    stream = simple(
        [page(number, bytes([number]) * 16 + bytes(PAGE - 16), "pc.ram") for number in range(pages)],
        {"pc.ram": pages * PAGE},
    )
    padded = stream.ljust(-(-len(stream) // 512) * 512, b"\0")
    (tmp_path / "stream").write_bytes(padded)
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-f", "qcow2", "-o", "extended_l2=on", path, "8M")
    qemu.io(path, f"write -b -s {tmp_path / 'stream'} 0 {len(padded)}")
    qemu.snapshot(path, "one")
    with open_image(path) as image:
        (entry,) = image.snapshots
    with path.open("r+b") as file:  # qemu-io wrote a state of which no snapshot knows the size
        file.seek(entry.offset + 32)
        file.write(struct.pack(">I", len(padded)))
        file.seek(entry.offset + 40)
        file.write(struct.pack(">Q", len(padded)))
    _clear_extended(path)
    with pytest.raises(Qcow2Error):
        open_guest_memory(path)
    with open_guest_memory(path, assume={"extended-l2": "on"}) as memory:
        assert [memory.read(number * PAGE, 1)[0] for number in range(pages)] == list(range(pages))
    out = tmp_path / "memory.raw"
    code, _, errors = run_command(["memory", str(path), str(out), "--assume", "extended-l2=on"])
    assert code == 0, errors
    assert out.read_bytes()[::PAGE] == bytes(range(pages))
    run_command(["examine", str(path), str(tmp_path / "case"), "--no-files", "--assume", "extended-l2=on"])
    assert json.loads((tmp_path / "case" / "memory-1.json").read_text())["ram_bytes"] == pages * PAGE


def test_the_nbd_plug_in_reads_an_image_alone_where_the_environment_says_so(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "overlay.qcow2"
    qemu.img("create", "-f", "qcow2", "-b", raw, "-F", "raw", path)
    raw_elsewhere = path.with_name("gone")
    qemu.img("rebase", "-u", "-b", raw_elsewhere, "-F", "raw", path)
    with pytest.raises(Qcow2Error, match=f"{ALONE_VARIABLE}=1"):
        nbd_export(path, None, None, "", monkeypatch)
    monkeypatch.setenv(ALONE_VARIABLE, "1")
    assert nbd_export(path, None, None, "", monkeypatch) == bytes(SIZE)


def test_a_disk_of_unknown_size_says_which_option_states_it(headless: Path) -> None:
    with open_disk(headless, STATE) as disk:
        assert disk.rebuilt is not None
        for option in ("--virtual-size", "--qcow2-virtual-size", "--qcow_virtual_size", VIRTUAL_SIZE_VARIABLE):
            assert option in disk.rebuilt.warning
    with open_disk(headless, STATE, virtual_size=SIZE) as disk:
        assert disk.rebuilt is not None
        assert "virtual-size" not in disk.rebuilt.warning


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {}),
        ("extended-l2=off", {"extended-l2": "off"}),
        ("version=3,compression=zstd", {"version": "3", "compression": "zstd"}),
        ("cluster-size=65536", {"cluster-size": "65536"}),
    ],
)
def test_fields_are_written_as_a_list(text: str, fields: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_assumptions(text) == fields
    monkeypatch.setenv(ASSUME_VARIABLE, text)
    assert assumptions_from_environment() == fields


@pytest.mark.parametrize(
    "text", ["extended-l2", "extended-l2=1", "version=4", "size=3", "cluster-size=3", "=", "\x1b[2J"]
)
def test_a_field_that_cannot_be_assumed_is_refused_with_the_choices(text: str) -> None:
    with pytest.raises(Qcow2Error, match=r"choose from compression=.*extended-l2=on\|off"):
        parse_assumptions(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "20X", "nan", "1e30", "G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(Qcow2Error, match="is not a size"):
        parse_size(text)


def test_an_unset_size_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VIRTUAL_SIZE_VARIABLE, raising=False)
    assert virtual_size_from_environment() is None
    monkeypatch.setenv(VIRTUAL_SIZE_VARIABLE, "1.5M")
    assert virtual_size_from_environment() == MIB * 3 // 2


def test_plaso_refuses_what_cannot_be_stated_before_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plaso")
    import argparse

    from plaso.cli import storage_media_tool
    from plaso.lib import errors

    import dfvfs_qcow2  # noqa: F401 - registers the options

    _set(monkeypatch, None, "")
    monkeypatch.setenv(VIRTUAL_SIZE_VARIABLE, "")  # so that what the tool sets is undone afterwards
    monkeypatch.setenv(ASSUME_VARIABLE, "")
    tool: Any = type(
        "Tool", (storage_media_tool.StorageMediaTool,), {}
    )()  # the base class alone has no options of ours
    parser = argparse.ArgumentParser()
    tool.AddVSSProcessingOptions(parser)
    for arguments in (["--qcow_virtual_size", "large"], ["--qcow_assume", "version=9"]):
        with pytest.raises(errors.BadConfigOption):
            tool._ParseVSSProcessingOptions(parser.parse_args(arguments))
    tool._ParseVSSProcessingOptions(
        parser.parse_args(
            ["--qcow_virtual_size", "20G", "--qcow_assume", "version=3", "--qcow-assume", "extended-l2=on"]
        )
    )
    assert virtual_size_from_environment() == 20 << 30
    assert assumptions_from_environment() == {"version": "3", "extended-l2": "on"}


@pytest.mark.slow
def test_vol_takes_the_options(headless: Path, raw: Path, tmp_path: Path) -> None:
    pytest.importorskip("volatility3")
    from tests.volatility_tools import vol

    state = ("--qcow2-snapshot", STATE, "-o", tmp_path)
    layer = ("-f", headless, "layerwriter", "--layers", "primary")
    found = vol(*state, "--qcow2-virtual-size", str(SIZE), *layer, cwd=tmp_path)
    (written,) = tmp_path.glob("*.raw")
    assert written.read_bytes() == raw.read_bytes(), found.stderr
    for option, value, words in (
        ("assume", "version=9", "cannot be assumed"),
        ("virtual-size", "big", "is not a size"),
    ):
        refused = vol(*state, f"--qcow2-{option}", value, *layer, cwd=tmp_path)
        assert words in refused.stderr
        assert "Traceback" not in refused.stderr
