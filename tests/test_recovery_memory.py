"""A VM state that no snapshot owns any more opens as the guest's memory: QEMU's own dump is the oracle."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from qcow2_forensics import Qcow2Error, open_disk, open_image, open_vm_state
from qcow2_forensics.cli import main
from qcow2_forensics.memory import open_guest_memory
from qcow2_forensics.recovery import Confidence, recovered_states
from tests import qemu
from tests.machines import MiB

SIZE = 16 * MiB
KNOWN = 4 * MiB  # where a megabyte of noise is loaded


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An image whose memory snapshot was deleted in a running QEMU, and QEMU's dump of that memory."""
    qemu.need("qemu-system-x86_64")
    folder = tmp_path_factory.mktemp("residue")
    path, dump, noise = qemu.create(folder / "disk.qcow2", "16M"), folder / "dump", folder / "noise"
    qemu.io(path, "write -P 1 0 1M")
    noise.write_bytes(random.Random(8).randbytes(MiB))
    loader = ("-device", f"loader,file={noise},addr={KNOWN:#x},force-raw=on")
    qemu.monitor(path, f'pmemsave 0 {SIZE} "{dump}"', "savevm one", args=loader)
    qemu.monitor(path, "delvm one", drive="if=ide,pass-discard-snapshot=off")
    with open_image(path) as opened:
        assert not opened.snapshots
    return path, dump


def memory_state(path: Path) -> str:
    (state,) = (state for state in recovered_states(path) if state.is_memory)
    return state.label


def test_a_former_table_gives_the_order_of_the_clusters(image: tuple[Path, Path]) -> None:
    path, dump = image
    state = next(state for state in recovered_states(path) if state.is_memory)
    assert "former tables" in state.what
    assert state.confidence is Confidence.LIKELY
    with open_guest_memory(path, state.label) as memory:
        assert memory.complete
        assert memory.read(MiB, SIZE - MiB) == dump.read_bytes()[MiB:]  # below it QEMU dumps devices and ROMs


def test_without_a_table_clusters_are_taken_as_they_follow_each_other(image: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "wiped.qcow2"
    data = bytearray(image[0].read_bytes())
    for placed in next(state for state in recovered_states(image[0]) if state.is_memory).placements:
        data[placed.offset : placed.offset + 65536] = bytes(65536)
    path.write_bytes(data)
    state = next(state for state in recovered_states(path) if state.is_memory)
    assert "their order" in state.what
    assert state.confidence is Confidence.GUESS
    with open_vm_state(path, state.label) as stream:
        assert stream.read(0, 4) == b"QEVM"
        assert state.label in stream.name


def test_it_is_memory_at_every_front_door_and_no_disk(
    image: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.qcow2"  # a sentence is shown once for a file
    path.write_bytes(image[0].read_bytes())
    label = memory_state(path)
    with pytest.raises(Qcow2Error, match="memory alone"):
        open_disk(path, label)
    assert main(["memory", str(path), str(tmp_path / "out.raw"), "--snapshot", label, "--summary", "json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["snapshot"].startswith(label)
    assert "put together" in shown.err
    assert main(["snapshots", str(path), "--recovered", "--format", "json"]) == 0
    assert [row["open_as"] for row in json.loads(capsys.readouterr().out) if row["memory"]] == [label]


def test_it_is_memory_in_volatility(image: tuple[Path, Path]) -> None:
    pytest.importorskip("volatility3")
    from tests import volatility_tools

    layer = volatility_tools.stack(image[0], snapshot=memory_state(image[0]))
    with open_guest_memory(image[0], memory_state(image[0])) as memory:
        assert type(layer).__name__ == "QemuRamLayer"
        assert layer.read(KNOWN, 4096) == memory.read(KNOWN, 4096)
    label = memory_state(image[0])
    rows = volatility_tools.plugin_rows("info.Info", image[0], qcow2_snapshot=label)
    named = [row["Value"] for row in rows if (row["Subject"], row["Item"]) == ("memory", "snapshot")]
    assert named == [f"{label} (a VM state that nothing maps any more)"]
