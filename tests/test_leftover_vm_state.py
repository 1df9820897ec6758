"""The VM state that is still mapped behind the disk after its snapshot was applied and deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcow2_forensics import SnapshotNotFound, audit, open_vm_state
from qcow2_forensics.cli import main
from qcow2_forensics.memory import open_guest_memory
from tests import qemu
from tests.machines import Machine, MiB, running
from tests.test_guest_memory_machines import allowed, differing_pages

SIZE = 64 * MiB
MACHINE = Machine("leftover", ("-M", "pc", "-m", "64"), ((8 * MiB, MiB),))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An image whose only memory snapshot was applied and deleted, and QEMU's dump of that memory."""
    folder = tmp_path_factory.mktemp("leftover")
    with running(MACHINE, folder) as guest:
        guest.ask("stop")
        guest.save("one")
        dump = guest.memory_file(0, SIZE)
    qemu.img("snapshot", "-a", "one", guest.disk)
    qemu.img("snapshot", "-d", "one", guest.disk)
    return guest.disk, dump


def test_memory_of_no_listed_snapshot_equals_what_qemu_had(image: tuple[Path, Path], tmp_path: Path) -> None:
    disk, dump = image
    for wanted in (None, "leftover"):
        with open_guest_memory(disk, wanted) as memory:
            assert memory.complete
            assert memory.cpus
            copy = tmp_path / "dump"
            copy.write_bytes(dump.read_bytes())
            assert allowed(MACHINE, differing_pages(memory, 0, copy))


def test_it_is_a_finding_of_high_severity(image: tuple[Path, Path]) -> None:
    finding = next(item for item in audit(image[0]).findings if item.code == "QCOW2-VMSTATE-LEFTOVER")
    assert finding.severity.name == "HIGH"


def test_the_command_line_says_what_it_took(
    image: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["memory", str(image[0]), str(tmp_path / "out.raw"), "--summary", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["snapshot"].startswith("leftover")


def test_a_snapshot_of_that_name_is_distinguished_and_an_image_without_a_leftover_has_none(tmp_path: Path) -> None:
    with running(Machine("named", ("-M", "pc", "-m", "16")), tmp_path) as guest:
        guest.ask("stop")
        guest.save("leftover")
        guest.save("other")
        with pytest.raises(SnapshotNotFound, match="ambiguous"):
            open_vm_state(guest.disk, "leftover")
        with open_vm_state(guest.disk, "name:leftover") as state:
            assert state.snapshot is not None
            assert state.snapshot.name == "leftover"
        guest.tell("delvm leftover")
        with pytest.raises(SnapshotNotFound):
            open_vm_state(guest.disk, "leftover")
