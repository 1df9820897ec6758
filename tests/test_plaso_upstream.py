"""Faults of plaso and dfVFS that stop people who use this package are mended while they are there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("plaso")
pytest.importorskip("dfvfs")

from tests import plaso_tools

TWO_FILES_WITH_WARNINGS = """
import collections, sys
from plaso.cli import pinfo_tool, tools
from plaso.containers import counts
found = collections.Counter()
for number in range(12):
    found[f"type: OS, location: /{number}\\n"] = counts.WarningCount(number_of_events=number)
pinfo_tool.PinfoTool()._PrintWarningCountersTable("extraction", found, {})
"""

LUKS = """
import dfvfs.path
from dfvfs.path import factory
os = factory.Factory.NewPathSpec("OS", location="/x")
print(factory.Factory.NewPathSpec("LUKSDE", parent=os).comparable)
"""


def run(script: str, *, active: bool) -> subprocess.CompletedProcess[str]:
    prefix = "import dfvfs_qcow2\n" if active else ""
    return subprocess.run(
        [sys.executable, "-P", "-c", prefix + script],
        check=False,
        capture_output=True,
        text=True,
        env=plaso_tools.environment(active),
        timeout=60,
    )


def test_pinfo_lists_warnings_of_several_files_most_first() -> None:
    done = run(TWO_FILES_WITH_WARNINGS, active=True)
    assert done.returncode == 0, done.stderr
    listed = [line.split()[-1] for line in done.stdout.splitlines() if "location:" in line]
    assert listed == [f"/{number}" for number in range(11, 1, -1)]


def test_stored_path_specs_of_luks_volumes_are_known() -> None:
    done = run(LUKS, active=True)
    assert (done.returncode, done.stdout) == (0, "type: OS, location: /x\ntype: LUKSDE\n\n")


@pytest.mark.parametrize(
    ("script", "error"), [(TWO_FILES_WITH_WARNINGS, "TypeError: '<' not supported"), (LUKS, "KeyError")]
)
def test_the_faults_are_still_there(script: str, error: str) -> None:
    # When this skips, a version without the fault is installed: once the oldest supported one is, the mend can go.
    done = run(script, active=False)
    if done.returncode == 0:
        pytest.skip("mended upstream")
    assert error in done.stderr


def test_a_path_spec_without_parent_compares_as_the_stock_one() -> None:
    script = """
from dfvfs.path import factory
os = factory.Factory.NewPathSpec("OS", location="/x")
spec = factory.Factory.NewPathSpec("QCOW", parent=os)
spec.parent = None
print(repr(spec.comparable))
"""
    with_us, stock = run(script, active=True), run(script, active=False)
    assert (with_us.returncode, with_us.stdout) == (0, stock.stdout)


def test_the_docs_have_the_patches() -> None:
    text = (Path(__file__).parent.parent / "docs/dfvfs.md").read_text()
    assert "def __lt__" in text
    assert "from dfvfs.path import luksde_path_spec" in text
