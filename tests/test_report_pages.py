"""``diff`` and ``timeline`` as pages: everything the other formats have, and nothing from evidence acts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_forensics.cli import demo, main
from qcow2_forensics.render.allocation_map import draw_map
from qcow2_forensics.render.difference_map import difference_map
from qcow2_forensics.render.difference_page import FILES, RANGES, FileRow, render_difference
from qcow2_forensics.render.timeline_page import ROWS, render_timeline
from tests.pages import check_page
from tests.work import assert_proportional

HOSTILE = "\x1b[31m<script>alert(1)</script>\u202egpj\x00' onload='x\" &amp; \udcff"
Run = Callable[..., str]


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """The image that the demo writes."""
    demo.write_files(tmp_path)
    return tmp_path / "demo.qcow2"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command and return what it printed."""

    def run_it(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        return capsys.readouterr().out

    return run_it


def difference(ranges: int = 1, **more: object) -> dict[str, object]:
    side = {"state": HOSTILE, "size": 1 << 20, "image": HOSTILE}
    found = [{"offset": at * 512, "length": 512, "change": "changed", "note": HOSTILE} for at in range(ranges)]
    summary = {"ranges": ranges, "bytes": ranges * 512, "changes": {"changed": ranges}}
    return {"image": HOSTILE, "from": side, "to": side, "summary": summary, "ranges": found, **more}


def test_names_from_evidence_do_nothing_on_the_page_of_a_difference() -> None:
    from qcow2_forensics.text import printable

    shown = printable(HOSTILE)
    row = FileRow("added", ("added", shown, shown, "1", "-", shown), (("after", "00"),))
    volumes = [{"read": False, "path": HOSTILE, "type": HOSTILE, "why": HOSTILE, "changed_bytes": 1}]
    run = {"case": HOSTILE, "command": HOSTILE, "files": [{"path": HOSTILE, "sha256": "00"}]}
    page = check_page(
        render_difference(difference(volumes=volumes, run=run), [row], total="3 ranges differ", notes=[shown])
    )
    assert "<script>" in "".join(page.words)


def test_names_from_evidence_do_nothing_on_the_page_of_a_timeline() -> None:
    event = {"message": HOSTILE, "datetime": "2026-05-04T09:00:00+00:00", "timestamp": 1, "timestamp_desc": HOSTILE}
    events = [
        {**event, "state": HOSTILE, "data_type": "qcow2:snapshot"},
        {**event, "state": HOSTILE, "data_type": "fs:stat", "filename": HOSTILE, "is_allocated": False},
    ]
    page = check_page(render_timeline(events, HOSTILE, run={"note": HOSTILE, "files": []}))
    assert "<script>" in "".join(page.words)


def test_the_page_says_how_many_rows_it_leaves_out() -> None:
    row = FileRow("added", ("added", "/a", "1", "1", "-", ""))
    page = render_difference(difference(RANGES + 3), [row] * (FILES + 2), total="3 ranges differ")
    assert "and 3 more ranges" in page
    assert "and 2 more files" in page


def test_the_timeline_keeps_the_facts_of_the_image_and_the_latest_of_files() -> None:
    def event(number: int, kind: str) -> dict[str, object]:
        date = f"2026-05-04T09:00:00.{number:06d}+00:00"
        shared = {"datetime": date, "timestamp": number, "timestamp_desc": "Creation Time", "state": "active"}
        return {**shared, "message": f"n{number}.", "filename": f"f{number}.", "data_type": kind}

    events = [event(1, "qcow2:snapshot"), *(event(number, "fs:stat") for number in range(2, 3 * ROWS))]
    page = render_timeline(events, "disk.qcow2")
    assert f"{2 * ROWS - 2} earlier times of files" in page
    assert "n1." in page
    assert f"f{2 * ROWS}." in page
    assert f"f{2 * ROWS - 1}." not in page


@pytest.mark.slow
def test_very_many_facts_of_an_image_cost_what_they_are() -> None:
    shared = {
        "datetime": "2026-05-04T09:00:00+00:00",
        "timestamp_desc": "t",
        "state": "active",
        "data_type": "qcow2:snapshot",
    }
    events = [{**shared, "timestamp": number, "message": f"n{number}."} for number in range(16_384)]
    assert_proportional(lambda count: render_timeline(events[:count], "disk.qcow2"), 2048, 16_384)
    assert f"{16_384 - ROWS} earlier times of the image" in render_timeline(events, "disk.qcow2")


def test_states_and_times_that_agree_share_a_row() -> None:
    def event(state: str, name: str) -> dict[str, object]:
        shared = {"datetime": "2026-05-04T09:00:00+00:00", "timestamp": 5_000_000, "message": "/a", "filename": "/a"}
        return {**shared, "state": state, "timestamp_desc": name, "data_type": "fs:stat", "is_allocated": True}

    names = ("Content Modification Time", "Creation Time")
    page = check_page(render_timeline([event(s, name) for s in ("one", "two") for name in names], "disk.qcow2"))
    assert page.words.count("/a") == 1
    assert "one, two" in page.words
    assert "modified, created" in page.words


def test_the_page_of_a_difference_has_every_range_and_file_of_the_json(case: Path, run: Run) -> None:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    options = ("diff", case, "--from", "baseline", "--to", "intrusion", "--files", "--hash")
    data = json.loads(run(*options, "--format", "json"))
    page = check_page(run(*options, "--format", "html", "--case", "17/26", "--examiner", "Ada"))
    assert {"17/26", "Ada", str(case)} <= set(page.words)
    for item in data["ranges"]:
        assert f"{item['offset']:#x}" in page.words
    for item in data["files"]:
        assert item["path"] in page.words
        for side in (item["before"], item["after"]):
            assert side is None or side["sha256"] in page.words


def test_the_page_of_a_timeline_has_every_fact_of_the_json_lines(case: Path, run: Run) -> None:
    lines = [json.loads(line) for line in run("timeline", case, "--no-files", "--format", "jsonl").splitlines()]
    page = check_page(run("timeline", case, "--no-files", "--format", "html"))
    assert lines
    for line in lines:
        assert line["message"] in page.words


def test_case_facts_are_in_the_json_of_a_difference_when_they_are_given(case: Path, run: Run) -> None:
    options = ("diff", case, "--from", "baseline", "--format", "json")
    assert "run" not in json.loads(run(*options))
    run_facts = json.loads(run(*options, "--case", HOSTILE.replace("\0", "")))["run"]
    assert run_facts["case"] == HOSTILE.replace("\0", "")
    assert run_facts["files"] == [{"path": str(case)}]


@given(
    st.integers(1, 1 << 40),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 5000), st.sampled_from(["changed", "added"])), max_size=20),
)
def test_the_squares_of_a_difference_hold_every_sector_once(disk_size: int, pieces: list[tuple[int, int, str]]) -> None:
    sectors = -(-disk_size // 512)
    ranges, at = [], 0
    for gap, length, change in pieces:
        at += gap
        ranges.append({"offset": at * 512, "length": length * 512, "change": change})
        at += length
    picture = difference_map(disk_size, ranges)
    assert len(picture["cells"]) <= 1024
    assert sum(count for cell in picture["cells"] for _, count in cell) == sectors == sum(picture["counts"])
    inside = sum(max(0, min(r["offset"] + r["length"], sectors * 512) - r["offset"]) // 512 for r in ranges)
    assert sum(count for cell in picture["cells"] for owner, count in cell if owner) == inside
    check_page(draw_map(picture) + "default-src 'none'")
