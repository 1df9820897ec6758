"""A fixed number of mutated images through every target, from a printed seed; the kept ones every time.

``QCOW2_FUZZ_SEED`` and ``QCOW2_FUZZ_CASES`` choose others. For hours use ``python -m fuzz``.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fuzz import budget, differential, targets
from fuzz.mutator import Mutator
from fuzz.targets import TARGETS, Case, Escape, check_output, run

import qcow2_forensics as q
from tests import qemu
from tests.image_builder import base_s

ROOT = Path(__file__).resolve().parent.parent
REGRESSIONS = sorted((ROOT / "tests" / "regressions").glob("*.qcow*"))
SEED = int(os.environ.get("QCOW2_FUZZ_SEED", "20260101"))
CASES = int(os.environ.get("QCOW2_FUZZ_CASES", "300"))
FEW = 4  # in the quick tier: of one base, in this process
DIFFERENTIAL = 60

_NEEDS = {"img_info": "pytsk3", "dfvfs": "dfvfs", "volatility": "volatility3.framework"}


def _has(target: str) -> bool:
    module = _NEEDS.get(target)
    try:
        return module is None or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


PRESENT = [target for target in TARGETS if _has(target)]


def _fuzz(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "fuzz", "--seed", str(SEED), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    qemu.need()
    return base_s(tmp_path / "b.qcow2").read_bytes()


@pytest.mark.parametrize("target", PRESENT)
def test_a_few_mutated_images_stay_inside(target: str, whole: bytes) -> None:
    mutator = Mutator(whole)
    for seed in range(SEED, SEED + FEW):
        run(target, mutator.mutate(random.Random(seed))[0])


def test_bytes_and_counters_of_a_few_mutated_images_are_those_of_qemu(
    whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert differential.run({"base.qcow2": whole}, SEED, FEW, tmp_path) == []
    assert re.search(rf"{FEW} opened by QEMU, [1-9]\d* checked, 0 differences", capsys.readouterr().out)


@pytest.mark.slow
@qemu.requires_qemu
def test_no_mutated_image_escapes_the_contract(tmp_path: Path) -> None:
    done = _fuzz("--cases", CASES, "--targets", ",".join(PRESENT), "--save", tmp_path)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{CASES * len(PRESENT)} runs of {CASES} images, 0 escapes" in done.stdout


@pytest.mark.slow
@qemu.requires_qemu
def test_bytes_and_counters_of_mutated_images_are_those_of_qemu() -> None:
    done = _fuzz("--cases", 0, "--differential", DIFFERENTIAL, "--targets", "read")
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(rf"{DIFFERENTIAL} opened by QEMU, [1-9]\d* checked, 0 differences", done.stdout)


@pytest.mark.parametrize("target", PRESENT)
@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.stem)
def test_what_once_escaped_stays_inside(path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = path.read_bytes()
    run(target, data)  # imports belong to no case
    monkeypatch.setattr(budget, "enforced", True)
    budget.restart()
    run(target, data)


# --- the instrument itself -----------------------------------------------------------------------


def test_a_seed_repeats_a_case_exactly(whole: bytes) -> None:
    first, second = (Mutator(whole).mutate(random.Random(7)) for _ in range(2))
    assert first == second
    assert Mutator(whole).mutate(random.Random(8)) != first


def test_a_foreign_exception_escapes(whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **_options: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(q, "open_disk", broken)
    with pytest.raises(KeyError, match="planted"):
        run("read", whole)


def test_too_much_time_and_too_much_memory_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "enforced", True)
    clock = itertools.chain([0.0, budget.CPU_SECONDS + 0.1], itertools.repeat(0.0))
    monkeypatch.setattr(budget, "time", SimpleNamespace(process_time=lambda: next(clock)))
    with pytest.raises(budget.OverBudget, match="processor time"):
        targets._call("slow", lambda: None)
    budget.restart()
    with pytest.raises(budget.OverBudget, match="MiB"):
        targets._call("large", lambda: bytearray(b"\1") * (160 << 20))


@pytest.mark.parametrize(
    ("arguments", "code", "out"),
    [
        (["info"], 0, "name \x1b[2J\n"),
        (["info"], 0, "name \u202egpj\n"),
        (["info", "--format", "json"], 0, '{"a": 1'),
        (["map"], 3, ""),
        (["audit", "--format", "html"], 0, "<p><script>alert(1)</script>\n"),
    ],
)
def test_unsafe_output_escapes(arguments: list[str], code: int, out: str) -> None:
    with pytest.raises((Escape, ValueError)):
        check_output(arguments, code, out, "")


def test_a_case_leaves_nothing_behind(whole: bytes) -> None:
    case = Case(whole)
    folder = case.path.parent
    assert folder.exists()
    case.close()
    assert not folder.exists()
