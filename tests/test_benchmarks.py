"""The benchmarks run; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests import qemu

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_a_smoke_run_of_the_reader_benchmarks_gives_a_ratio_for_every_case(tmp_path: Path) -> None:
    qemu.need()
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--smoke", "--only", "reader", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cases = json.loads(out.read_text())["cases"]
    assert len(cases) >= 15
    for case in cases:
        ours = [row for row in case["rows"] if row["reader"].startswith(("qcow2-forensics", "import"))]
        assert ours, case["name"]
        assert all(row.get("ratio") for row in ours), case
