"""Every front door opens the same recovered state of a damaged image, and gives the same bytes.

The images are made by qemu-img, whose raw disk is the oracle; the damage is done by raw byte writes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz.targets import run_command

from qcow2_forensics import open_disk
from qcow2_forensics.errors import SnapshotNotFound
from qcow2_forensics.recovery import recovered_states
from tests import qemu

SIZE = 3 << 20
STATE = "recovered:1"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = random.Random(1909)
    path = tmp_path_factory.mktemp("doors") / "disk.raw"
    path.write_bytes(chance.randbytes(SIZE // 2) + b"stored text " * (SIZE // 24))
    return path


def _no_header(data: bytearray) -> bytes:
    data[:65536] = random.Random(1).randbytes(65536)
    return bytes(data)


def _no_l1(data: bytearray) -> bytes:
    size, offset = struct.unpack_from(">IQ", data, 36)
    data[offset : offset + 8 * size] = bytes(8 * size)
    return bytes(data)


def _inside(data: bytearray) -> bytes:
    return bytes(7 * 512) + bytes(data)


DAMAGES: dict[str, Callable[[bytearray], bytes]] = {
    "lost header": _no_header,
    "lost L1 table": _no_l1,
    "image inside another file": _inside,
}


@pytest.fixture(params=DAMAGES)
def damaged(request: pytest.FixtureRequest, raw: Path, tmp_path: Path) -> Path:
    whole = tmp_path / "whole.qcow2"
    qemu.img("convert", "-O", "qcow2", raw, whole)
    path = tmp_path / "damaged.bin"
    path.write_bytes(DAMAGES[request.param](bytearray(whole.read_bytes())))
    return path


# --- the doors: each returns the bytes of the recovered disk ---------------------------------------


def python_disk(path: Path) -> bytes:
    with open_disk(path, STATE) as disk:
        return disk.read(0, disk.size)


def command_export(path: Path) -> bytes:
    out = path.with_suffix(".out")
    code, _, errors = run_command(["export", str(path), str(out), f"--snapshot={STATE}"])
    assert code == 0
    assert "put together" in errors
    return out.read_bytes()


def pytsk3_class(path: Path) -> bytes:
    module = pytest.importorskip("pytsk3_qcow2")
    with module.Img_Info(str(path), snapshot=STATE) as image:
        assert image.state == STATE
        return bytes(image.read(0, image.get_size()))


def pytsk3_open_image(path: Path) -> bytes:
    module = pytest.importorskip("pytsk3_qcow2")
    with module.open_image(path, STATE, unreadable="zeros") as image:
        assert not image.unreadable
        return bytes(image.read(0, image.get_size()))


def pytsk3_states(path: Path) -> bytes:
    module = pytest.importorskip("pytsk3_qcow2")
    (image,) = (state for state in module.states(path, recovered=True) if state.state == STATE)
    with image:
        return bytes(image.read(0, image.get_size()))


def dfvfs_path_spec(path: Path) -> bytes:
    pytest.importorskip("dfvfs")
    from dfvfs.path import factory
    from dfvfs.resolver import context, resolver

    import dfvfs_qcow2

    qcow = factory.Factory.NewPathSpec("QCOW", parent=factory.Factory.NewPathSpec("OS", location=str(path)))
    state = dfvfs_qcow2.recovered_states(qcow)[0]
    spec = dfvfs_qcow2.recovered_path_spec(qcow, state)
    assert spec.encoding_method == f"qcow2-snapshot:recovered:1:{state.confidence.label}"
    file_object = resolver.Resolver.OpenFileObject(spec, resolver_context=context.Context())
    return bytes(file_object.read())


def volatility_layer(path: Path) -> bytes:
    pytest.importorskip("volatility3")
    from tests import volatility_tools

    layer = volatility_tools.stack(path, snapshot=STATE)
    return bytes(layer.read(0, layer.maximum_address + 1))


def mounted_file(path: Path) -> bytes:
    from qcow2_forensics.mount.folder import ImageFolder, Openers

    def disk(selector: Any, _keys: object) -> Any:
        return open_disk(path, selector)

    with ImageFolder(str(path), Openers(disk, None, None, recovered=lambda: recovered_states(path))) as folder:
        file = folder.files["recovered-1.raw"]
        return bytes(file.content.read(0, file.content.size))


def dissect_container(path: Path) -> bytes:
    pytest.importorskip("dissect.target")
    from dissect_qcow2 import Qcow2Container

    container = Qcow2Container(path, STATE)
    return bytes(container.read(container.size))


DOORS = [
    python_disk,
    command_export,
    pytsk3_class,
    pytsk3_open_image,
    pytsk3_states,
    dfvfs_path_spec,
    volatility_layer,
    mounted_file,
    dissect_container,
]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_front_door_gives_the_bytes_of_the_recovered_state(
    door: Callable[[Path], bytes], damaged: Path, raw: Path
) -> None:
    assert hashlib.sha256(door(damaged)).hexdigest() == hashlib.sha256(raw.read_bytes()).hexdigest()


def test_whoever_opens_a_recovered_state_is_warned_of_how_sure_it_is(
    damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "qcow2_forensics"), open_disk(damaged, STATE) as disk:
        assert disk.rebuilt is not None
        assert any(STATE in note and "put together" in note for note in disk.notes)
        assert any(word in disk.notes[-1] for word in ("certain", "likely", "guess"))
    # The sentence is logged, which is how command line, Volatility and plaso show it.
    assert not caplog.records or disk.notes[-1] in caplog.text


def test_a_state_that_cannot_be_put_together_is_refused_at_every_door_with_the_choices(damaged: Path) -> None:
    from dfvfs_qcow2.selection import Selection

    with pytest.raises(SnapshotNotFound, match="recovered:1"):
        open_disk(damaged, "recovered:7")
    with pytest.raises(SnapshotNotFound, match="recovered:1"):
        Selection("recovered:7").choose_recovered(recovered_states(damaged))
    assert Selection("all,recovered").wants_recovered
    assert [state.number for state in Selection("recovered:1").choose_recovered(recovered_states(damaged))] == [1]


@qemu.requires_qemu
def test_a_snapshot_called_as_a_recovered_state_does_not_take_its_place(tmp_path: Path) -> None:
    image = qemu.create(tmp_path / "disk.qcow2", "1M")
    qemu.io(image, "write -P 1 0 64k")
    qemu.snapshot(image, STATE)
    with pytest.raises(SnapshotNotFound, match="ambiguous"):
        open_disk(image, STATE)
    with open_disk(image, f"name:{STATE}") as disk:
        assert disk.read(0, 1) == b"\1"


def test_a_recovered_state_says_so_in_the_names_that_plaso_shows() -> None:
    from dfvfs_qcow2.names import SnapshotKey, folder, label, parse_encoding_method

    key = SnapshotKey(1, b"guess", recovered=True)
    assert label(key) == "QCOW2-RECOVERED1[guess]"
    assert folder(key) == "qcow2-recovered1-guess"
    assert parse_encoding_method(key.encoding_method) == key
    assert key.position is None


def test_recovered_states_leave_no_file_open(damaged: Path) -> None:
    states = recovered_states(damaged)
    assert not is_open(damaged)
    with states[0].open() as disk:
        disk.read(0, 512)
        assert is_open(damaged)
    assert not is_open(damaged)


def is_open(path: Path) -> bool:
    """Whether this process has a file open; other tests may leave others to the garbage collector."""
    descriptors = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return str(path.resolve()) in (os.readlink(name) for name in descriptors if os.path.lexists(name))
