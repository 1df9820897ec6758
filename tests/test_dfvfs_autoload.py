"""The back-end is active whichever dfVFS module a program imports first."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import plaso_tools
from tests.tiers import every, quick

pytest.importorskip("dfvfs")

import qcow2_forensics_autoload

DRIVER = Path(__file__).with_name("dfvfs_import_first.py")
# All of these, and every sixth of the others; QCOW2_ALL_IMPORTS=1 takes all, a minute of CPU time.
WHOLE = ("dfvfs.credentials", "dfvfs.resolver.", "dfvfs.helpers")
ALL = os.environ.get("QCOW2_ALL_IMPORTS") == "1"
PLASO = sorted(name for name in qcow2_forensics_autoload.PARTS if name.startswith("plaso."))


def _modules() -> list[str]:
    found = importlib.util.find_spec("dfvfs")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    names = sorted(
        ".".join((root.parent / path).relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in root.rglob("*.py")
    )
    return [name for index, name in enumerate(names) if ALL or name.startswith(WHOLE) or index % 6 == 0]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is absent")
def test_any_module_imported_first_leaves_the_back_end_active() -> None:
    modules = _modules()
    assert len(modules) > 50
    autoload = plaso_tools.REPOSITORY / "plugins" / "autoload"
    environment = plaso_tools.environment()
    environment["PYTHONPATH"] += f"{os.pathsep}{autoload}"
    result = subprocess.run(
        [sys.executable, "-P", str(DRIVER), *modules],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "module",
    every(
        4,
        ["dfvfs_qcow2.path_spec", "dfvfs_qcow2.file_io", "dfvfs_qcow2.resolver_helper", "dfvfs_qcow2.volume_scanner"],
    ),
)
def test_our_own_modules_may_be_imported_first_too(module: str) -> None:
    script = f"import {module}, dfvfs.resolver_helpers, dfvfs_qcow2; assert dfvfs_qcow2.is_active()"
    result = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        env=plaso_tools.environment(),
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("module", quick(PLASO, ["plaso.engine.worker"]))
def test_any_part_of_plaso_imported_first_leaves_all_of_ours_in_place(module: str) -> None:
    pytest.importorskip("plaso", reason="plaso is absent")
    environment = plaso_tools.environment()
    environment["PYTHONPATH"] += f"{os.pathsep}{plaso_tools.REPOSITORY / 'plugins' / 'autoload'}"
    script = f"import qcow2_forensics_autoload as hook; hook.install(); import {module}"
    result = subprocess.run(
        [sys.executable, "-P", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "NOT active" not in result.stderr


def test_a_program_that_imported_dfvfs_before_gets_the_back_end() -> None:
    script = (
        "import dfvfs.path, dfvfs.resolver_helpers, dfvfs.helpers.volume_scanner, dfvfs.credentials; import dfvfs_qcow2;"
        "from dfvfs.path import factory; assert dfvfs_qcow2.is_active();"
        "assert factory.Factory._path_spec_types['QCOW'].__module__ == 'dfvfs_qcow2.path_spec'"
    )
    environment = plaso_tools.environment()
    result = subprocess.run(
        [sys.executable, "-P", "-c", script], check=False, capture_output=True, text=True, env=environment, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_importing_the_package_imports_nothing_of_dfvfs() -> None:
    script = (
        "import dfvfs_qcow2, sys; print([n for n in sys.modules if n.split('.')[0] in ('dfvfs', 'plaso', 'numpy')])"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env=plaso_tools.environment(),
        timeout=60,
    )
    assert result.stdout == "[]\n"


def test_a_part_that_cannot_be_put_in_place_is_shown_and_stops_nothing(tmp_path: Path) -> None:
    # A dfVFS whose factory lost a method: the tool goes on, and says that it reads with the stock back-end.
    script = (
        "import dfvfs_qcow2, qcow2_forensics_autoload as a; a.PARTS['dfvfs.path'] = 'no_such_part';"
        "import dfvfs.path; print('goes on')"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        env=plaso_tools.environment(),
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (0, "goes on\n")
    assert "NOT active in dfVFS" in result.stderr
