"""``examine``: one folder with one page, which holds what the single commands give and says what was not looked at."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics.cli import _examine_parts, _examine_plan, demo, main
from qcow2_forensics.errors import Qcow2Error
from tests import hostile, qemu
from tests.conftest import EvidenceCase
from tests.image_builder import PASSPHRASE, S_SNAPSHOT_STEP, S_SNAPSHOTS, Builder, Poke, base_b, base_s, luks
from tests.pages import check_page

HOSTILE = b"\x1b[31m<script>alert(1)</script>\xe2\x80\xaegpj' onload='x\" &amp;\xff"
Run = Callable[..., tuple[str, str]]


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """The image that the demo writes."""
    demo.write_files(tmp_path)
    return tmp_path / "demo.qcow2"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``examine`` and return what it printed, on both streams."""

    def run_it(*arguments: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert main(["examine", *map(str, arguments)]) == code
        shown = capsys.readouterr()
        return shown.out, shown.err

    return run_it


def data_of(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "examination.json").read_text())
    return data


def part_of(folder: Path, kind: str) -> dict[str, Any]:
    return next(part for part in data_of(folder)["parts"] if part["kind"] == kind)


def check_folder(folder: Path) -> None:
    """Every page holds, every link leads to a file, every hash is right, and every JSON file can be read."""
    for path in folder.rglob("*.html"):
        links = check_page(path.read_text()).links
        for link in links:
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.is_file(), link
            if anchor:
                assert f'id="{anchor}"' in target.read_text()
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    sums = dict(reversed(line.split("  ", 1)) for line in (folder / "sha256sums.txt").read_text().splitlines())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(sums) == files - {"sha256sums.txt"}
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_the_folder_holds_every_part_and_the_page_leads_to_all(case: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    folder = tmp_path / "out"
    out, err = run(case, folder, "--hash", "--case", "17/26", "--examiner", "Ada", "--note", "first look")
    assert "1 Medium, " in out
    assert err == ""
    check_folder(folder)
    page = check_page((folder / "index.html").read_text())
    assert {"17/26", "Ada", "first look", str(case)} <= set(page.words)
    assert hashlib.sha256(case.read_bytes()).hexdigest() in page.words
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files - {"index.html", "sha256sums.txt"} <= set(page.links) | {link.partition("#")[0] for link in page.links}
    assert [part["title"] for part in data_of(folder)["parts"] if part["kind"] == "diff"] == [
        "baseline → intrusion",
        "intrusion → active",
    ]


def test_each_part_is_what_its_command_gives(
    case: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    folder = tmp_path / "out"
    run(case, folder, "--case", "17/26")
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    for part in data_of(folder)["parts"]:
        capsys.readouterr()
        tool, *arguments = shlex.split(part["command"])
        assert tool == "qcow2-forensics"
        assert main(arguments) == part["code"]
        printed = capsys.readouterr().out
        files = [folder / name for name in part["files"]]
        if part["kind"] == "residue":
            printed = Path("residue/index.json").read_text()
        pair = {"memory": 0, "snapshots": 0, "recovered": 0, "residue": 1}.get(part["kind"], 0)
        written = files[pair].read_text()
        if part["kind"] == "memory":
            written, printed = (json.dumps(json.loads(text)) for text in (written, printed))
        assert _timeless(written) == _timeless(printed), part["command"]


def _timeless(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(Z| UTC)", "TIME", text)


def test_names_from_evidence_do_nothing_on_any_page_and_read_back_from_json(tmp_path: Path, run: Run) -> None:
    builder = Builder(cluster_bits=16, size=1 << 20)
    builder.data(0, b"\x11" * 65536)
    table = builder.put(bytes(65536))
    for number in range(2):
        builder.snapshot(HOSTILE, HOSTILE + b"%d" % number, l1_offset=table, l1_size=1)
    path = builder.write(tmp_path / "disk.qcow2")
    folder = tmp_path / "out"
    with contextlib.redirect_stderr(io.StringIO()):
        main(["examine", str(path), str(folder), "--note", "<script>"])
    check_folder(folder)
    name = (HOSTILE + b"0").decode("utf-8", "surrogateescape")
    assert name in [row["name"] for row in json.loads((folder / "snapshots.json").read_text())]
    assert data_of(folder)["parts"][3]["title"].startswith(name)


@pytest.mark.parametrize("ident", ["H10", "H30", "H58", "H84"])
def test_a_hostile_image_is_examined_and_every_page_holds(ident: str, tmp_path: Path) -> None:
    check_hostile(ident, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ident", hostile.IMAGES)
def test_every_hostile_image_is_examined_and_every_page_holds(ident: str, tmp_path: Path) -> None:
    check_hostile(ident, tmp_path)


def check_hostile(ident: str, tmp_path: Path) -> None:
    qemu.need()
    path = hostile.build(ident, tmp_path)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(["examine", str(path), str(tmp_path / "out")])
    check_folder(tmp_path / "out")
    data = data_of(tmp_path / "out")
    assert (code, data["exit_code"]) in ((0, 0), (2, 2))
    assert (code == 2) == bool(data["not_looked_at"]) == ("not looked at" in said.getvalue())
    assert "defect" not in said.getvalue()


# --- what was not looked at ------------------------------------------------------------------------


def test_a_missing_library_is_named_and_the_rest_is_done(
    case: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise Qcow2Error("listing files needs pytsk3: pip install 'qcow2-forensics[tsk]'")

    monkeypatch.setattr(_examine_plan, "need_back_end", missing)
    _, err = run(case, tmp_path / "out", code=2)
    assert "qcow2-forensics[tsk]" in err
    page = check_page((tmp_path / "out" / "index.html").read_text())
    assert any("qcow2-forensics[tsk]" in words for words in page.words)
    assert part_of(tmp_path / "out", "diff")["facts"]["summary"]["ranges"] == 8
    _, err = run(case, tmp_path / "declined", "--no-files")
    assert err == ""
    assert "files of the states: --no-files" in data_of(tmp_path / "declined")["left_out"]


@qemu.requires_qemu
@pytest.mark.parametrize(
    ("place", "known"),
    [
        ((S_SNAPSHOTS + 36,), "at least 1 snapshot, 1 of them deleted"),  # extra data size
        ((S_SNAPSHOTS + 36, S_SNAPSHOTS + S_SNAPSHOT_STEP + 36), "snapshots: not known"),
        ((S_SNAPSHOTS + S_SNAPSHOT_STEP + 12,), "at least 1 snapshot ("),  # length of the ID
    ],
)
def test_a_cut_snapshot_table_is_not_looked_at_completely(
    place: tuple[int, ...], known: str, tmp_path: Path, run: Run
) -> None:
    path = base_s(tmp_path / "disk.qcow2")
    for offset in place:
        Poke(path).u16(offset, 0xFFFF)
    _, err = run(path, tmp_path / "out", code=2)
    assert "snapshots, deleted ones included" in err
    check_folder(tmp_path / "out")
    assert known in (tmp_path / "out" / "index.html").read_text()


def test_what_is_no_image_is_examined_as_far_as_it_goes(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "noise.bin"
    path.write_bytes(bytes(range(256)) * 1024)
    _, err = run(path, tmp_path / "out", code=2)
    assert "not a QCOW image" in err or "not start" in err or "magic" in err
    check_folder(tmp_path / "out")
    assert part_of(tmp_path / "out", "recovered")["code"] == 0


def test_a_defect_in_one_part_does_not_cost_the_others(
    case: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("<b>unforeseen</b>")

    monkeypatch.setattr(_examine_parts.memory, "facts_of", broken)
    _, err = run(case, tmp_path / "out", "--no-files", code=2)
    assert "defect" in err
    assert part_of(tmp_path / "out", "residue")["code"] == 0
    check_folder(tmp_path / "out")


@qemu.requires_qemu
def test_an_encrypted_image_without_its_key_is_no_failure_of_what_needs_none(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QCOW2_PASSPHRASE", raising=False)
    path = luks(tmp_path / "disk.qcow2")
    qemu.snapshot(path, "one", secret=PASSPHRASE)
    _, err = run(path, tmp_path / "locked", code=2)
    assert "one → active" in err
    assert part_of(tmp_path / "locked", "snapshots")["code"] == 0
    (tmp_path / "key").write_text(PASSPHRASE)
    run(path, tmp_path / "open", "--passphrase-file", tmp_path / "key", "--no-files")
    (tmp_path / "bad").write_text("not it\n")
    _, err = run(path, tmp_path / "mistaken", "--passphrase-file", tmp_path / "bad", code=2)
    assert "the encrypted content: disk.qcow2 is encrypted (LUKS): no key slot accepts this passphrase" in err
    assert PASSPHRASE not in "".join(file.read_text() for file in (tmp_path / "open").glob("*.*"))


def test_pairs_and_memories_above_a_bound_are_counted(
    case: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_examine_plan, "PAIRS", 1)
    _, err = run(case, tmp_path / "out", "--no-files", code=2)
    assert "first 1 pair of states" in err
    run(case, tmp_path / "chosen", "--no-files", "--last", "1")
    assert [part["title"] for part in data_of(tmp_path / "chosen")["parts"] if part["kind"] == "diff"] == [
        "intrusion → active"
    ]


@pytest.mark.parametrize(("threshold", "code"), [("high", 0), ("medium", 1)])
def test_findings_at_the_threshold_give_exit_code_1(
    threshold: str, code: int, case: Path, tmp_path: Path, run: Run
) -> None:
    run(case, tmp_path / "out", "--no-files", "--fail-on", threshold, code=code)
    assert (tmp_path / "out" / "index.html").exists()
    assert data_of(tmp_path / "out")["exit_code"] == 0  # everything was looked at


# --- folders ---------------------------------------------------------------------------------------


def test_only_an_empty_folder_or_an_earlier_examination_is_replaced(case: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    run(case, folder, "--no-files")
    (folder / "mine.txt").write_text("from before")
    _, err = run(case, folder, "--no-files", code=2)
    assert "--force" in err
    assert (folder / "mine.txt").exists()
    run(case, folder, "--no-files", "--force")
    assert not (folder / "mine.txt").exists()
    check_folder(folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    _, err = run(case, other, "--force", code=2)
    assert "not the folder of an examination" in err
    (folder / "disk.qcow2").write_bytes(case.read_bytes())
    _, err = run(folder / "disk.qcow2", folder, "--force", code=2)
    assert "evidence" in err
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []


def test_a_file_in_place_of_the_folder_is_never_replaced(case: Path, tmp_path: Path, run: Run) -> None:
    before = case.read_bytes()
    _, err = run(case, case, "--force", code=2)
    assert "exists" in err
    assert case.read_bytes() == before


def test_an_image_that_is_not_there_leaves_no_folder(case: Path, tmp_path: Path, run: Run) -> None:
    _, err = run(case, tmp_path / "absent.qcow2", tmp_path / "out", code=2)
    assert "absent.qcow2" in err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_nothing_behind(case: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_examine_parts.residue, "write_folder", interrupted)
    before = sorted(tmp_path.iterdir())
    _, err = run(case, tmp_path / "out", "--no-files", code=130)
    assert err == "qcow2-forensics: interrupted\n"
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_ends_the_examination_and_leaves_nothing_behind(
    case: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_examine_parts.residue, "write_folder", full)
    before = sorted(tmp_path.iterdir())
    _, err = run(case, tmp_path / "out", "--no-files", code=2)
    assert err == f"qcow2-forensics: {os.strerror(errno.ENOSPC)}\n"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a signal to a process is of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    base_b(path)
    with path.open("r+b") as file:
        file.truncate(64 << 30)  # recovery reads all of it
    command = [sys.executable, "-m", "qcow2_forensics", "examine", str(path), str(tmp_path / "out"), "--no-files"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not list(tmp_path.glob(".out.*")):
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(120) in (130, 143, -number)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["disk.qcow2"]


# --- several images --------------------------------------------------------------------------------


def test_several_images_get_a_page_each_and_one_over_all(case: Path, tmp_path: Path, run: Run) -> None:
    odd = tmp_path / "x'y <b>.qcow2"
    odd.write_bytes(b"no image" * 100)
    out, err = run(case, odd, tmp_path / "out", "--no-files", "--case", "17/26", code=2)
    check_folder(tmp_path / "out")
    page = check_page((tmp_path / "out" / "index.html").read_text())
    assert {"01-demo.qcow2/index.html", "02-x_y_b_.qcow2/index.html"} <= set(page.links)
    assert "17/26" in page.words
    assert len(out.splitlines()) == 3
    assert all("x'y <b>.qcow2: not looked at" in line for line in err.splitlines())
    assert [image["exit_code"] for image in data_of(tmp_path / "out")["images"]] == [0, 2]


@pytest.mark.slow
def test_the_case_names_the_kernel_of_both_memories(evidence: EvidenceCase, tmp_path: Path, run: Run) -> None:
    run(evidence.image, tmp_path / "out", "--no-files")
    memories = [part["facts"] for part in data_of(tmp_path / "out")["parts"] if part["kind"] == "memory"]
    assert [facts["snapshot"] for facts in memories] == ["1 (before-incident)", "2 (during-incident)"]
    assert all("6.1.0-56-cloud-amd64" in facts["kernel"]["identity"] for facts in memories)
    assert any("qcow2.changes" in item["command"] for item in data_of(tmp_path / "out")["next"])


@pytest.mark.slow
def test_the_memory_of_a_deleted_snapshot_is_looked_at_too(evidence: EvidenceCase, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "case.qcow2"
    shutil.copyfile(evidence.image, path)
    qemu.snapshot(path, "during-incident", action="-d", opts={"pass-discard-snapshot": "off"})
    out, _ = run(path, tmp_path / "out", "--no-files")
    memories = [part for part in data_of(tmp_path / "out")["parts"] if part["kind"] == "memory"]
    assert [part["title"] for part in memories] == [
        "memory of before-incident",
        "memory of the deleted snapshot during-incident",
    ]
    deleted = memories[1]
    assert deleted["facts"] or "cannot be opened any more" in deleted["notes"][0]
    check_folder(tmp_path / "out")
    assert "memory of the deleted snapshot during-incident" in (tmp_path / "out" / "index.html").read_text().lower()
    assert out


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["examine", "--help"])
    assert "qcow2-forensics examine disk.qcow2 case-17/" in capsys.readouterr().out
