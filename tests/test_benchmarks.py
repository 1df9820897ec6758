"""The benchmarks run; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import qemu

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def smoke(groups: str, out: Path) -> tuple[dict[str, list[dict[str, object]]], str]:
    """Run groups of benchmarks without the evidence; return their rows by case, and what was said beside."""
    qemu.need()
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--smoke", "--only", groups, "--json", str(out / "out.json")]
    variables = {key: value for key, value in os.environ.items() if key != "QCOW2_EVIDENCE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=out, env=variables)
    assert done.returncode == 0, done.stderr
    return {case["name"]: case["rows"] for case in json.loads((out / "out.json").read_text())["cases"]}, done.stderr


@pytest.mark.parametrize(
    ("groups", "least", "some"),
    [
        ("reader,audit,compare,guest_memory", 30, ("full read, zlib", "import")),
        ("log2timeline", 2, ("sequential 64 bytes, file objects", "log2timeline, plain qcow2")),
    ],
)
def test_a_smoke_run_gives_a_ratio_for_every_case(
    groups: str, least: int, some: tuple[str, ...], tmp_path: Path
) -> None:
    cases, said = smoke(groups, tmp_path)
    assert len(cases) >= least
    assert "not run" not in said
    for name in some:
        assert len([row for row in cases[name] if row.get("ratio")]) >= 2, cases[name]
    for rows in cases.values():
        assert rows[0].get("ratio"), rows


def test_a_group_that_cannot_be_run_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    cases, said = smoke("volatility,guest_memory", tmp_path)
    assert "volatility: not run, set QCOW2_EVIDENCE" in said
    assert cases


def test_exports_take_no_more_room_than_qemus(tmp_path: Path) -> None:
    qemu.need()
    qemu.need("qemu-io")
    for library in ("pyvhdi", "pyvmdk"):
        pytest.importorskip(library, reason=f"{library} is absent")
    command = [sys.executable, str(BENCHMARKS / "export_size.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 18
