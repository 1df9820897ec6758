"""The demo writes a real image made by QEMU, and every front door that is installed finds what is in it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.cli import demo


def _demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qcow2_forensics", "demo", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_demo_image_is_sound_and_holds_two_snapshots_one_with_memory(tmp_path: Path) -> None:
    demo.write_files(tmp_path)
    with q.open_image(tmp_path / "demo.qcow2") as image:
        assert [(entry.name, bool(entry.vm_state_size)) for entry in image.snapshots] == [
            ("baseline", False),
            ("intrusion", True),
        ]
    report = q.audit(tmp_path / "demo.qcow2")
    assert report.check is not None
    assert report.check["check-errors"] == 0
    assert not report.at_least(q.Severity.HIGH)


@pytest.mark.parametrize(
    ("front_door", "module", "found"),
    [
        ("audit", "qcow2_forensics", ["QCOW2-SNAPSHOT-VMSTATE", "baseline"]),
        ("diff", "pytsk3", ["readme.txt", "secret_key.txt"]),
        ("pytsk3", "pytsk3", ["intrusion: .cache_helper, plan.txt", "baseline: plan.txt, secret_key.txt"]),
        pytest.param(
            "volatility", "volatility3", ["intrusion", "0x10ff0\tLinux version 0.0.0"], marks=pytest.mark.slow
        ),
        pytest.param("dfvfs", "dfvfs", ["EXT /home/alice/readme.txt"], marks=pytest.mark.slow),
        pytest.param(
            "plaso", "plaso", ["QCOW2-SNAPSHOT2[intrusion]", "QCOW2-SNAPSHOT1[baseline]"], marks=pytest.mark.slow
        ),
    ],
)
def test_a_front_door_finds_what_is_in_the_demo_image(
    tmp_path: Path, front_door: str, module: str, found: list[str]
) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is absent")
    done = _demo(tmp_path / "demo", "--only", front_door)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in found:
        assert text in done.stdout


@pytest.mark.slow
def test_running_the_demo_again_replaces_what_it_wrote(tmp_path: Path) -> None:
    for _ in range(2):
        assert _demo(tmp_path, "--only", "audit").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.qcow2", "list_dfvfs.py", "list_pytsk3.py"]
