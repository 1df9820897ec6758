"""The machines of ``tools/memory_machines.py``: no page is wrong without a warning that names its range."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.machines import MiB

TOOL = Path(__file__).resolve().parent.parent / "tools" / "memory_machines.py"


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_machines", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = _tool()


@pytest.mark.slow
@pytest.mark.parametrize("name", tool.SCENARIOS)
def test_no_page_of_the_machine_is_wrong_without_a_warning(name: str, tmp_path: Path) -> None:
    try:
        tool.make(name, tmp_path / name)
    except tool.SkippedError as error:
        pytest.skip(str(error))
    compared, wrong, unreadable, warnings = tool.check(tmp_path / name)
    assert compared > 8 * MiB // 4096
    assert wrong == 0
    assert bool(unreadable) == (name == "second-of-two-modules-unmapped")
    assert bool(warnings) == tool.SCENARIOS[name].is_doubtful


def test_a_wrong_page_is_counted(tmp_path: Path) -> None:
    tool.make("applied-then-deleted", tmp_path / "one")
    place = max((tmp_path / "one").glob("*.ram"), key=lambda path: int(path.stem, 16))
    content = bytearray(place.read_bytes())
    content[5000] ^= 1
    place.write_bytes(content)
    assert tool.check(tmp_path / "one")[1] == 1
