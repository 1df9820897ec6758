"""The benchmarks run; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests import qemu

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_a_smoke_run_of_all_benchmarks_gives_a_ratio_for_every_case(tmp_path: Path) -> None:
    qemu.need()
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--smoke", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Without the evidence one group cannot be run, and says so.
    assert [line for line in done.stderr.splitlines() if "not run" in line and not line.startswith("volatility:")] == []
    cases = {case["name"]: case for case in json.loads(out.read_text())["cases"]}
    assert len(cases) >= 30
    assert "log2timeline, plain qcow2" in cases
    for name in ("sequential 64 bytes, file objects", "full read, zlib", "import"):
        assert len([row for row in cases[name]["rows"] if row.get("ratio")]) >= 2, cases[name]
    for case in cases.values():
        assert any(row.get("ratio") for row in case["rows"][1:] or case["rows"]), case
