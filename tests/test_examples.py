"""The example scripts run as they stand and print what is true of the image."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import filesystems, qemu
from tests.conftest import EvidenceCase
from tests.filesystems import Made, make
from tests.tiers import every

pytest.importorskip("pytsk3", reason="pytsk3 is absent")

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: object, code: int = 0) -> list[str]:
    """Run a script as a user would, and return the lines it printed."""
    folders = [str(ROOT / "src"), str(ROOT / "plugins" / "tsk_img"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "TZ": "UTC"}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == code, outcome.stderr
    assert "Traceback" not in outcome.stderr
    return (outcome.stdout if code == 0 else outcome.stderr).splitlines()


@pytest.fixture
def lives(tmp_path: Path) -> tuple[Path, list[Made]]:
    """An image with two snapshots and an active state of one partition, and what each holds."""
    one = make(tmp_path, "ext4")
    two = one.copy("two.raw")
    two.put("only-here.txt", b"only in the second state")
    two.remove("letters.txt")
    three = two.copy("three.raw")
    three.remove("only-here.txt")
    three.put("letters.txt", b"other letters")
    raws = []
    for made in (one, two, three):
        raw, _ = filesystems.disk_of(tmp_path, [made], f"disk-{made.path.name}")
        raws.append(raw)
    states = [("first", raws[0]), ("second", raws[1]), (None, raws[2])]
    return filesystems.states_of(tmp_path / "disk.qcow2", states), [one, two, three]


@qemu.requires_qemu
def test_listing_the_states_prints_one_line_each(lives: tuple[Path, list[Made]]) -> None:
    path, made = lives
    lines = run("pytsk3_list_states.py", path)
    assert [line.split(":")[0] for line in lines] == ["first", "second", "active"]
    for line, state in zip(lines, made, strict=True):
        names = {name for name in line.split(": ")[1].split(", ") if name[0] != "$" and "(deleted)" not in name}
        assert names - {"lost+found", "folder"} == {name for name in state.files if "/" not in name}
    assert "letters.txt (deleted)" in lines[1]
    folders = run("pytsk3_list_states.py", path, "/folder")
    assert all("inside.txt" in line for line in folders)


@qemu.requires_qemu
def test_one_path_is_extracted_from_every_state_that_has_it(lives: tuple[Path, list[Made]], tmp_path: Path) -> None:
    path, made = lives
    out = tmp_path / "out"
    lines = run("pytsk3_extract_path.py", path, "/letters.txt", out)
    assert (out / "0-first-p1").read_bytes() == made[0].files["letters.txt"]
    assert (out / "2-active-p1").read_bytes() == b"other letters"
    assert lines[1] == "second: no such file"
    assert lines[2].endswith(hashlib.sha256(b"other letters").hexdigest())
    assert sorted(item.name for item in out.iterdir()) == ["0-first-p1", "2-active-p1"]


@qemu.requires_qemu
def test_hashes_of_one_state_only_are_reported(lives: tuple[Path, list[Made]]) -> None:
    path, made = lives
    lines = [line.split("  ") for line in run("pytsk3_hash_states.py", path)]
    assert sorted(lines) == sorted(
        [state, hashlib.sha256(content).hexdigest(), name]
        for state, content, name in (
            ("first", made[0].files["letters.txt"], "/p1/letters.txt"),
            ("second", b"only in the second state", "/p1/only-here.txt"),
            ("active", b"other letters", "/p1/letters.txt"),
        )
    )


@pytest.mark.parametrize(
    "script", every(3, ["pytsk3_extract_path.py", "pytsk3_list_states.py", "pytsk3_hash_states.py"])
)
def test_bad_input_is_a_sentence(script: str, tmp_path: Path) -> None:
    arguments = [tmp_path / "missing", "/x", tmp_path / "out"] if "extract" in script else [tmp_path / "missing"]
    (line,) = run(script, *arguments, code=1)
    assert "No such file" in line
    assert run(script, code=1)[0]  # without arguments it says how it is used


def test_the_states_of_the_case_differ(evidence: EvidenceCase) -> None:
    assert run("pytsk3_list_states.py", evidence.image, "/home/alice") == [
        "before-incident: plan.txt, diary.txt, secret_key.txt",
        "during-incident: plan.txt, diary.txt, .cache_helper",
        "active: plan.txt, diary.txt, readme.txt",
    ]
