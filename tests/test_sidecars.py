"""What lies beside an export, a memory or a folder of residue says what it is from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics.cli import demo, main
from qcow2_forensics.text import TOOL


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """The image that the demo writes."""
    demo.write_files(tmp_path)
    return tmp_path / "demo.qcow2"


def check_origin(facts: Mapping[str, Any], image: Path, arguments: list[str], *, hashed: bool = True) -> None:
    status = image.stat()
    (source,) = facts["source"]
    assert (source["role"], source["path"], source["size"]) == ("image", str(image), status.st_size)
    assert source["inode"] == status.st_ino
    assert source.get("sha256") == (hashlib.sha256(image.read_bytes()).hexdigest() if hashed else None)
    assert facts["tool"] == TOOL
    assert facts["command"].split() == ["qcow2-forensics", *arguments]
    assert facts["started"] <= facts["finished"]


@pytest.mark.parametrize("command", ["export", "memory"])
def test_a_file_has_its_origin_and_its_hash_beside_it(command: str, case: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    arguments = [command, str(case), str(out), "--snapshot", "intrusion", "--sidecar", "--hash-source"]
    assert main(arguments) == 0
    facts = json.loads((tmp_path / "out.raw.json").read_text())
    check_origin(facts, case, arguments)
    assert facts["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert facts["snapshot"] in ({"id": "2", "name": "intrusion"}, "2 (intrusion)")


def test_the_index_of_residue_says_what_it_is_from(case: Path, tmp_path: Path) -> None:
    with case.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"left behind" + bytes(65536 - 11))
    arguments = ["residue", str(case), str(tmp_path / "out"), "--index-only", "--hash-source"]
    assert main(arguments) == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    check_origin(index, case, arguments)
    assert index["pieces"]
    assert all(piece["name"] is None and len(piece["sha256"]) == 64 for piece in index["pieces"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.csv", "index.json"]


def test_a_sidecar_that_exists_is_refused_before_the_memory_is_written(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.raw.json").write_text("precious")
    assert main(["memory", str(case), str(tmp_path / "out.raw"), "--sidecar"]) == 2
    assert "exists" in capsys.readouterr().err
    assert not (tmp_path / "out.raw").exists()
    assert (tmp_path / "out.raw.json").read_text() == "precious"


def test_memory_without_a_file_says_what_it_is_and_writes_nothing(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    arguments = ["memory", str(case), "--summary", "json"]
    assert main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    check_origin(facts, case, arguments, hashed=False)
    assert (facts["snapshot"], facts["machine"], facts["ram_bytes"]) == ("2 (intrusion)", "pc-i440fx-7.2", 16 << 20)
    assert facts["processors"][0]["registers"]["rip"] == "0x7c16"
    assert main(["memory", str(case)]) == 0
    shown = capsys.readouterr().out
    assert "snapshot: 2 (intrusion)" in shown
    assert "rip 0x7c16" in shown
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("option", [["--device", "timer"], ["--sidecar"]])
def test_what_needs_a_file_says_so(option: list[str], case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", str(case), *option]) == 2
    assert "need OUT" in capsys.readouterr().err
