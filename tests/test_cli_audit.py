"""The audit, snapshots and residue commands: formats, exit codes, fleets that survive everything."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qcow2_forensics.audit import audit_path
from qcow2_forensics.cli import main
from qcow2_forensics.cli.fleet import audit_line, lines
from qcow2_forensics.findings import Report
from tests import qemu
from tests.fleet_work import dies_on_two
from tests.image_builder import Builder, Poke, base_b, base_s
from tests.pages import check_page

pytestmark = qemu.requires_qemu

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run_with_workers: Run, without_workers: None) -> Run:
    return run_with_workers


@pytest.fixture
def run_with_workers(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return base_b(tmp_path / "disk.qcow2")


@pytest.fixture
def deleted(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "deleted.qcow2", "1M")
    qemu.io(path, "write -P 0x11 0 256k")
    qemu.snapshot(path, "alpha")
    qemu.io(path, "write -P 0x22 0 256k")
    qemu.snapshot(path, "alpha", action="-d", opts={"pass-discard-snapshot": "off"})
    return path


# --- one image -----------------------------------------------------------------------------------


def test_healthy_image_is_one_screen_and_exits_0(run: Run, image: Path) -> None:
    code, out, err = run("audit", image)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) < 24
    assert "no errors" in out


@pytest.mark.parametrize(("threshold", "code"), [("info", 1), ("low", 1), ("medium", 1), ("high", 0), ("critical", 0)])
def test_fail_on_exits_1_at_or_above_the_threshold(run: Run, image: Path, threshold: str, code: int) -> None:
    Poke(image).write(0x8000, b"in the header's slack")  # Medium
    assert run("audit", image, "--fail-on", threshold)[0] == code
    assert run("audit", image)[0] == 0


def test_json_is_the_report(run: Run, image: Path) -> None:
    code, out, _ = run("audit", image, "--format", "json")
    data = json.loads(out)
    assert code == 0
    assert data["schema"] == 1
    expected = json.loads(audit_path(image).to_json())
    assert data == expected
    assert data["check"]["allocated-clusters"] == qemu.check_json(image).counters["allocated-clusters"]


def test_jsonl_is_one_line_and_csv_has_a_header(run: Run, image: Path) -> None:
    assert run("audit", image, "--format", "jsonl")[1].count("\n") == 1
    rows = list(csv.DictReader(io.StringIO(run("audit", image, "--format", "csv")[1])))
    assert {row["code"] for row in rows} >= {"QCOW2-WRITER-PROFILE", "QCOW2-GATEKEEPER"}


def test_html_page_has_both_pictures_and_no_script(run: Run, deleted: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    code, out, _ = run("audit", deleted, "--depth", "deep", "--format", "html", "-o", target)
    page = target.read_text()
    assert (code, out) == (0, "")
    assert 'class="map"' in page
    assert 'class="tree"' in page
    assert "alpha" in page
    assert "<script" not in page
    again, _, err = run("audit", deleted, "--format", "html", "-o", target)
    assert again == 2
    assert "exists" in err
    assert run("audit", deleted, "--format", "html", "-o", target, "--force")[0] == 0


def test_a_report_for_the_case_file_names_who_when_and_the_hash_of_every_file(run: Run, tmp_path: Path) -> None:
    base, path = base_b(tmp_path / "base.qcow2"), tmp_path / "disk.qcow2"
    qemu.create(path, backing="base.qcow2", backing_format="qcow2")
    code, out, _ = run(
        "audit", path, "--format", "json", "--hash", "--case", "2026-7", "--examiner", "E", "--note", "N"
    )
    assert code == 0
    facts = json.loads(out)["details"]["run"]
    assert (facts["case"], facts["examiner"], facts["note"]) == ("2026-7", "E", "N")
    assert facts["started"].endswith("UTC")
    assert facts["next"]["QCOW2-BACKING-FILE"].startswith("qcow2-forensics ")
    hashes = {file["path"]: file["sha256"] for file in facts["files"]}
    assert hashes == {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, base)}
    assert "run" not in json.loads(run("audit", path, "--format", "json")[1])["details"]


def test_file_that_is_no_image_is_reported_and_exits_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nothing")
    code, out, _ = run("audit", tmp_path / "x")
    assert code == 2
    assert "QCOW2-UNREADABLE" in out


def test_missing_file_is_one_sentence_and_exits_2(run: Run, tmp_path: Path) -> None:
    code, out, err = run("audit", tmp_path / "nope.qcow2")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("qcow2-forensics: ")


def test_encrypted_image_is_audited_without_asking_for_its_key(run: Run, tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "e.qcow2", "1M", secret="x", encrypt={"format": "aes"})
    code, out, _ = run("audit", path, "--depth", "deep")
    assert code == 0
    assert "QCOW2-LEGACY-AES" in out


# --- snapshots and residue -----------------------------------------------------------------------


def test_snapshots_are_those_qemu_lists(run: Run, tmp_path: Path) -> None:
    path = base_s(tmp_path / "s.qcow2")
    rows = json.loads(run("snapshots", path, "--format", "json")[1])
    reported = qemu.info_json(path)["snapshots"]
    assert [(row["id"], row["name"], row["date_sec"], row["date_nsec"], row["vm_state_size"]) for row in rows] == [
        (item["id"], item["name"], item["date-sec"], item["date-nsec"], item["vm-state-size"]) for item in reported
    ]
    out = run("snapshots", path)[1]
    assert [line.split()[1] for line in out.splitlines()] == ["NAME", "s1", "s2"]
    assert run("snapshots", path, "--format", "jsonl")[1].count("\n") == 2


def test_hostile_snapshot_names_are_escaped(run: Run, tmp_path: Path) -> None:
    path = base_s(tmp_path / "s.qcow2")
    Poke(path).write(0xB0000 + 65, b"\x1b[")
    table = run("snapshots", path)[1]
    assert "\x1b" not in table
    assert r"\x1b[" in table
    rows = run("snapshots", path, "--format", "json")[1]
    assert "\x1b" not in rows
    assert "\x1b[" in [row["name"] for row in json.loads(rows)]


def test_residue_of_version_1_is_what_nothing_refers_to(run: Run, tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "old.qcow", "1M", fmt="qcow")
    with path.open("ab") as file:
        file.write(b"HIDDEN")
    code, out, err = run("residue", path, tmp_path / "out")
    assert (code, out.partition(",")[0], err) == (0, "1 piece", "")
    (piece,) = (tmp_path / "out").glob("*-unaccounted-*")
    assert piece.read_bytes() == b"HIDDEN"
    assert run("snapshots", path, "--deleted")[:2] == (0, "no snapshots\n")


def test_deleted_snapshots_are_listed_with_how_to_open_them(run: Run, deleted: Path) -> None:
    assert run("snapshots", deleted)[1].startswith("no snapshots (--deleted ")
    (row,) = json.loads(run("snapshots", deleted, "--deleted", "--format", "json")[1])
    assert row["open_as"].startswith("deleted:0x")
    assert row["readable"] == 1.0


def test_deleted_snapshots_of_an_image_whose_disk_cannot_be_read_are_listed_with_that_reason(
    run: Run, deleted: Path
) -> None:
    Poke(deleted).add(40, 512)  # the L1 table is not aligned now
    code, out, err = run("snapshots", deleted, "--deleted", "--format", "json")
    (row,) = json.loads(out)
    assert code == 0
    assert "none of them can be opened: the L1 table is not aligned to a cluster" in err
    assert run("export", deleted, deleted.parent / "x.raw", "--snapshot", row["open_as"])[0] == 2


def test_a_deleted_snapshot_without_tables_is_listed_without_a_name_to_open_it_by(
    run: Run, deleted: Path, tmp_path: Path
) -> None:
    (row,) = json.loads(run("snapshots", deleted, "--deleted", "--format", "json")[1])
    Poke(deleted).write(row["l1_table_offset"], b"\xff" * 512)
    (row,) = json.loads(run("snapshots", deleted, "--deleted", "--format", "json")[1])
    assert (row["open_as"], row["readable"]) == (None, 0)
    assert "(deleted, its tables are gone)" in run("snapshots", deleted, "--deleted")[1]
    assert "(alpha): its tables are gone\n" in run("residue", deleted, tmp_path / "out")[1]


def test_broken_snapshot_table_is_reported_and_exits_2(run: Run, tmp_path: Path) -> None:
    path = base_s(tmp_path / "s.qcow2")
    Poke(path).u32(60, 100)
    code, out, err = run("snapshots", path)
    assert code == 2
    assert "s1" in out
    assert len(err.splitlines()) == 1


def test_residue_writes_a_folder_with_an_index(run: Run, deleted: Path, tmp_path: Path) -> None:
    code, out, _ = run("residue", deleted, tmp_path / "out")
    assert code == 0
    assert "deleted snapshot 1 (alpha): 100% readable" in out
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert len(list((tmp_path / "out").glob("image-*.bin"))) == len(index["pieces"])
    code, _, err = run("residue", deleted, tmp_path / "out")
    assert code == 2
    assert "exists" in err


def test_residue_of_one_kind_only(run: Run, deleted: Path, tmp_path: Path) -> None:
    Poke(deleted).write(0x8000, b"slack")
    run("residue", deleted, tmp_path / "out", "--kind", "header-slack")
    assert [p["kind"] for p in json.loads((tmp_path / "out" / "index.json").read_text())["pieces"]] == ["header-slack"]


# --- fleets --------------------------------------------------------------------------------------


@pytest.fixture
def fleet(tmp_path: Path) -> list[Path]:
    paths = [base_b(tmp_path / f"{number}.qcow2") for number in range(5)]
    (tmp_path / "bad.qcow2").write_bytes(b"no image")
    return [*paths, tmp_path / "bad.qcow2", tmp_path / "missing.qcow2"]


def listed(folder: Path, paths: list[Path]) -> Path:
    target = folder / "list"
    target.write_text("".join(f"{path}\n" for path in paths))
    return target


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_fleet_writes_a_line_per_image_and_no_bad_one_stops_it(
    run_with_workers: Run, tmp_path: Path, fleet: list[Path]
) -> None:
    out = tmp_path / "out.jsonl"
    code, shown, err = run_with_workers("audit", "--files-from", listed(tmp_path, fleet), "--jobs", 2, "--resume", out)
    found = {line["identity"]["path"]: line for line in read_lines(out)}
    assert (code, shown) == (2, "")
    assert "2 of 7 images" in err
    assert set(found) == {str(path) for path in fleet}
    assert found[str(fleet[0])]["identity"]["size"] == fleet[0].stat().st_size
    assert found[str(fleet[0])]["check"]["allocated-clusters"] == 3
    assert [finding["code"] for finding in found[str(fleet[5])]["findings"]] == ["QCOW2-UNREADABLE"]


def test_fleet_says_on_standard_error_that_reports_list_less_than_was_found(run: Run, tmp_path: Path) -> None:
    many = Builder(cluster_bits=16, size=1 << 20)
    for number in range(1500):
        many.snapshot(b"%d" % (number + 1), b"s", l1_offset=65536 * 3, l1_size=1)
    paths = [many.write(tmp_path / "many.qcow2"), base_b(tmp_path / "few.qcow2")]
    code, _, err = run("audit", "--depth", "triage", "-o", tmp_path / "out.jsonl", *paths)
    assert code == 0
    assert "1 report of this run lists less than was found" in err
    assert "QCOW2-AUDIT-LIMITED" in err
    assert "less than" not in run("audit", "--depth", "triage", "-o", tmp_path / "few.jsonl", paths[1], paths[1])[2]


def test_resumed_fleet_does_the_rest_and_what_changed(run: Run, tmp_path: Path, fleet: list[Path]) -> None:
    out = tmp_path / "out.jsonl"
    run("audit", *fleet[:3], "--resume", out)
    with out.open("a") as stream:
        stream.write('{"schema":1,"identity":{"path":"cut')  # the run was killed while it wrote
    os.utime(fleet[1], (1, 1))
    assert run("audit", *fleet[:5], "--resume", out, "--jobs", 2)[0] == 0
    paths = [line["identity"]["path"] for line in read_lines(out)]
    assert sorted(paths[3:]) == sorted(str(fleet[number]) for number in (1, 3, 4))
    before = out.read_bytes()
    assert run("audit", *fleet[:5], "--resume", out)[0] == 0
    assert out.read_bytes() == before


def test_resumed_fleet_reads_again_what_was_read_less_deeply(run: Run, tmp_path: Path, fleet: list[Path]) -> None:
    out = tmp_path / "out.jsonl"
    for depth, count in (("triage", 1), ("deep", 2), ("standard", 2)):
        run("audit", fleet[0], "--resume", out, "--depth", depth)
        assert len(read_lines(out)) == count


def test_fail_on_counts_what_earlier_runs_found(run: Run, tmp_path: Path, fleet: list[Path]) -> None:
    out = tmp_path / "out.jsonl"
    Poke(fleet[0]).write(0x8000, b"slack")
    for _ in range(2):
        assert run("audit", fleet[0], fleet[1], "--resume", out, "--fail-on", "medium")[0] == 1


def test_file_that_holds_no_audit_lines_is_not_appended_to(run: Run, tmp_path: Path, fleet: list[Path]) -> None:
    (tmp_path / "notes").write_text("my notes\n")
    code, _, err = run("audit", fleet[0], "--resume", tmp_path / "notes")
    assert code == 2
    assert "not a file of audit lines" in err
    assert (tmp_path / "notes").read_text() == "my notes\n"


@pytest.mark.parametrize("option", ["--resume", "--output"])
def test_fleet_never_writes_to_an_image(run: Run, tmp_path: Path, fleet: list[Path], option: str) -> None:
    (tmp_path / "no newline.qcow2").write_bytes(b"QFI\xfb" + bytes(1000))
    (tmp_path / "link").symlink_to(fleet[1])
    for target in (fleet[0], tmp_path / "link", tmp_path / "no newline.qcow2"):
        before = target.read_bytes()
        code, _, err = run("audit", fleet[0], fleet[1], tmp_path / "no newline.qcow2", option, target, "--force")
        assert code == 2
        assert "evidence" in err
        assert target.read_bytes() == before
    # Not even when it is no image of this run: nothing but a line that was cut off is ever removed.
    other = tmp_path / "no newline.qcow2"
    before = other.read_bytes()
    assert run("audit", fleet[0], fleet[1], "--resume", other)[0] == 2
    assert other.read_bytes() == before


def test_death_of_a_worker_costs_one_image(fleet: list[Path]) -> None:
    some = [fleet[0], *fleet[2:4]]
    found = [json.loads(line) for line in lines(map(str, some), dies_on_two, 2)]
    assert len(found) == len(some)
    crashed = {line["identity"]["path"] for line in found if line["findings"][0]["code"] == "QCOW2-AUDIT-CRASHED"}
    assert crashed == {str(fleet[2]), str(fleet[3])}


def busy_run(tmp_path: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """Start a run of two workers in a process group of its own; return it and the workers when both are busy."""
    script = (
        "import functools, sys\n"
        "from qcow2_forensics.cli.fleet import lines\nfrom tests.fleet_work import slow\n"
        "if __name__ == '__main__':\n"
        f"    list(lines(map(str, range(9)), functools.partial(slow, folder={str(tmp_path)!r}), 2))\n"
    )
    (tmp_path / "script.py").write_text(script)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], stderr=subprocess.PIPE, env=environment, start_new_session=True
    )
    workers: list[int] = []
    deadline = time.monotonic() + 30
    while len(workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        workers = [int(item.name.removeprefix("started-")) for item in tmp_path.glob("started-*")]
    assert len(workers) == 2
    return process, workers


def test_interrupt_ends_the_workers_at_once(tmp_path: Path) -> None:
    process, workers = busy_run(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=30)
    assert err.count(b"Traceback") == 1  # ours, none of a worker
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_interrupted_run_over_many_images_leaves_no_report(
    run: Run, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(paths: list[str], work: Callable[[str], str], _jobs: int) -> Iterator[str]:
        yield work(paths[0])
        raise KeyboardInterrupt

    monkeypatch.setattr("qcow2_forensics.cli.fleet.lines", interrupted)
    other = image.with_name("other")
    other.write_bytes(image.read_bytes())
    before = sorted(tmp_path.rglob("*"))
    assert run("audit", image, other, "--format", "jsonl", "-o", tmp_path / "out.jsonl")[0] == 130
    assert sorted(tmp_path.rglob("*")) == before
    assert run("audit", image, other, "--resume", tmp_path / "kept.jsonl")[0] == 130
    assert len(read_lines(tmp_path / "kept.jsonl")) == 1


def test_workers_end_when_the_run_is_killed(tmp_path: Path) -> None:
    process, _ = busy_run(tmp_path)
    process.kill()
    process.communicate(timeout=30)  # which is until no worker holds the other end of its standard error


def test_a_fifo_in_the_list_waits_for_no_writer(run: Run, tmp_path: Path, image: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    out = tmp_path / "out.jsonl"
    code, _, _ = run("audit", tmp_path / "fifo", image, "--resume", out)
    assert code == 2
    assert [line["identity"]["head_sha256"] is None for line in read_lines(out)] == [True, False]


def test_names_in_a_list_end_at_line_feeds_only(run: Run, tmp_path: Path, image: Path) -> None:
    names = [image.with_name(name) for name in ("a\rb", "c\u2028d", "e\x0bf", "plain")]
    for name in names:
        name.write_bytes(image.read_bytes())
    (tmp_path / "list").write_bytes(b"".join(os.fsencode(name) + b"\n" for name in names[:3]))
    with (tmp_path / "list").open("ab") as stream:
        stream.write(os.fsencode(names[3]) + b"\r\n")  # as other systems end lines
    out = tmp_path / "out.jsonl"
    assert run("audit", "--files-from", tmp_path / "list", "--resume", out)[0] == 0
    assert {line["identity"]["path"] for line in read_lines(out)} == set(map(str, names))


def test_report_of_a_worker_survives_pickling(image: Path) -> None:
    import pickle

    report = pickle.loads(pickle.dumps(audit_path))(str(image))
    again: Report = pickle.loads(pickle.dumps(report))
    assert again == report
    assert pickle.loads(pickle.dumps(functools.partial(audit_line, depth="triage")))(str(image))


def test_fleet_reads_names_from_standard_input(
    run: Run, image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{image}\n\n{image}\n".encode())))
    code, out, _ = run("audit", "--files-from", "-")
    assert code == 0
    assert [json.loads(line)["identity"]["path"] for line in out.splitlines()] == [str(image)]


def test_fleet_of_nothing_and_one_json_document_for_many_are_errors(run: Run, image: Path) -> None:
    assert run("audit", "--resume", image.with_suffix(".jsonl"))[0] == 2
    code, _, err = run("audit", image, image.with_name("other"), "--format", "json")
    assert code == 2
    assert "jsonl" in err


def test_a_fleet_on_one_page(run: Run, fleet: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "fleet.html"
    assert run("audit", *fleet, "--format", "html", "-o", target)[0] in (0, 2)
    page = target.read_text()
    assert all(path.name in page for path in fleet)
    assert "<script" not in page


def test_a_fleet_has_the_facts_of_the_case_and_every_hash(run: Run, fleet: list[Path], tmp_path: Path) -> None:
    options = ("--hash", "--case", "17/26 <b>", "--examiner", "Ada")
    run("audit", *fleet, "--format", "html", *options, "-o", tmp_path / "fleet.html")
    page = check_page((tmp_path / "fleet.html").read_text())
    assert {"17/26 <b>", "Ada"} <= set(page.words)
    lines_of = tmp_path / "audit.jsonl"
    run("audit", *fleet, "--resume", lines_of)  # no hashes: these lines are not enough for the next run
    run("audit", *fleet, "--resume", lines_of, *options)
    found = [json.loads(line) for line in lines_of.read_text().splitlines()]
    assert len(found) > len(fleet)
    with_facts = [line for line in found if "run" in line["details"]]
    assert len(with_facts) == len(fleet)
    for line in with_facts:
        assert line["details"]["run"]["case"] == "17/26 <b>"
        file = line["details"]["run"]["files"][0]
        digest = hashlib.sha256(Path(file["path"]).read_bytes()).hexdigest() if Path(file["path"]).exists() else None
        assert file.get("sha256") == digest
        assert digest is None or f"SHA-256 {digest}" in page.words


@pytest.mark.slow
def test_dask_recipe_in_the_documentation_runs(tmp_path: Path, fleet: list[Path]) -> None:
    pytest.importorskip("dask.distributed", reason="dask is absent")
    text = (Path(__file__).parents[1] / "docs" / "fleet.md").read_text()
    recipe = next(block for block in text.split("```python\n") if "dask.distributed" in block).split("```")[0]
    (tmp_path / "recipe.py").write_text(recipe)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, tmp_path / "recipe.py", tmp_path, tmp_path / "out.jsonl"]
    subprocess.run(command, check=True, env=environment, timeout=120, capture_output=True)
    found = read_lines(tmp_path / "out.jsonl")
    assert sorted(line["image"]["path"] for line in found) == sorted(map(str, fleet[:6]))
    assert {finding["code"] for line in found for finding in line["findings"]} >= {"QCOW2-UNREADABLE"}


# --- what is printed where -----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "csv"])
def test_several_images_are_reported_in_one_document(form: str, run: Run, fleet: list[Path]) -> None:
    code, out, err = run("audit", *fleet[:2], "--format", form)
    assert code == 0
    assert all(str(path) in out for path in fleet[:2])
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        assert {row["image"] for row in rows} == {str(path) for path in fleet[:2]}
    assert re.search(r"2 images, by their worst finding: \d \w+", err)
    assert run("audit", *fleet[:2], "--format", "json")[0] == 2


@pytest.mark.parametrize(("suffix", "start"), [("html", "<!DOCTYPE"), ("json", "{\n"), ("csv", "image,"), ("log", "/")])
def test_the_suffix_of_the_output_chooses_the_format(
    suffix: str, start: str, run: Run, image: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"report.{suffix}"
    assert run("audit", image, "-o", out)[0] == 0
    assert out.read_text().startswith(start)


def test_a_dash_as_output_is_standard_output(
    run: Run, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert str(image) in run("audit", image, "-o", "-")[1]
    assert str(image) in run("audit", image, image, "-o", "-")[1]
    assert sorted(tmp_path.iterdir()) == before


def test_a_standard_audit_says_how_much_only_a_deep_one_reads(run: Run, image: Path, deleted: Path) -> None:
    assert "--depth deep" in run("audit", deleted)[1]
    assert json.loads(run("audit", deleted, "--format", "json")[1])["details"]["unexamined_bytes"] > 0
    assert "--depth deep" not in run("audit", deleted, "--depth", "deep")[1]
    assert "--depth deep" not in run("audit", image)[1]


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"\x1f\x8b\x08", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"KDMV\1\0\0\0", "VMDK"),
        (b"# Disk DescriptorFile\n", "VMDK"),
        (b"vhdxfile", "VHDX"),
        (b"EVF\x09\x0d\x0a\xff\0", "EWF"),
        (b"WithoutFreeSpace", "Parallels"),
        (bytes(510) + b"\x55\xaa", "raw disk"),
        (b"plain text", "51 46 49 fb"),
    ],
)
def test_a_file_that_is_no_image_is_called_what_it_is(head: bytes, what: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(head.ljust(4096, b"\0"))
    for command in ("info", "audit"):
        code, out, err = run(command, path)
        assert code == 2
        assert what in " ".join((out + err).split())  # lines are broken where the name of the folder is long
