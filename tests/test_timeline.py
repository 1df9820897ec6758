"""``timeline`` gives the times The Sleuth Kit gives, for every state, in forms that timeline tools read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qcow2_forensics import open_image
from qcow2_forensics.cli import main
from qcow2_forensics.format.snapshot_table import SnapshotEntry
from qcow2_forensics.reader.states import labels
from tests import filesystems, qemu
from tests.conftest import EvidenceCase
from tests.filesystems import make, sleuthkit
from tests.image_builder import S_SNAPSHOTS, Builder, Poke, base_s

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("utc")


@pytest.fixture
def timeline(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Run ``timeline`` and return its lines."""

    def run(image: Path, *options: str, code: int = 0) -> list[str]:
        capsys.readouterr()
        assert main(["timeline", str(image), *options]) == code
        return capsys.readouterr().out.splitlines()

    return run


@qemu.requires_qemu
@pytest.mark.parametrize("kind", ["ext4", "fat12", "ntfs"])
def test_the_body_file_is_that_of_fls_for_each_state(
    tmp_path: Path, kind: str, timeline: Callable[..., list[str]]
) -> None:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    one = make(tmp_path, kind)
    two = one.copy("two.raw")
    two.put("later.txt", b"later")
    path = filesystems.states_of(tmp_path / "disk.qcow2", [("old", one.path), (None, two.path)])
    lines = [line for line in timeline(path) if "|/$MFT" not in line and "] /$MFT" not in line]
    expected = []
    for state, raw in (("old", one.path), ("active", two.path)):
        listed = sleuthkit("fls", raw, 0, "-r", "-m", "/").splitlines()
        expected += [line.replace("|/", f"|[{state}] /", 1) for line in listed if "|/$MFT" not in line]
    taken = [line for line in lines if "snapshot 'old' (ID 1) was taken" in line]
    assert len(taken) == 1
    assert sorted(line for line in lines if line not in taken) == sorted(expected)


@qemu.requires_qemu
def test_snapshots_are_dated_as_qemu_dates_them(
    make_image: Callable[..., Path], timeline: Callable[..., list[str]]
) -> None:
    path = make_image("disk.qcow2", "1M")
    for name in ("first", "second"):
        qemu.snapshot(path, name)
    reported = qemu.info_json(path)["snapshots"]
    events = [json.loads(line) for line in timeline(path, "--no-files", "--format", "jsonl")]
    assert [event["state"] for event in events] == ["first", "second"]
    for event, snapshot in zip(events, reported, strict=True):
        microseconds = snapshot["date-sec"] * 1_000_000 + snapshot["date-nsec"] // 1000
        assert event["timestamp"] == microseconds
        assert event["timestamp_desc"] == "Snapshot Creation Time"
        assert snapshot["name"] in event["message"]
    bodies = timeline(path, "--no-files")
    assert [int(line.split("|")[10]) for line in bodies] == [snapshot["date-sec"] for snapshot in reported]


@qemu.requires_qemu
def test_bitmaps_are_listed_with_the_time_the_file_was_written(
    make_image: Callable[..., Path], timeline: Callable[..., list[str]]
) -> None:
    path = make_image("disk.qcow2", "1M")
    qemu.bitmap(path, "--add", "backup|1")
    (event,) = [json.loads(line) for line in timeline(path, "--no-files", "--format", "jsonl")]
    assert "held bitmap 'backup|1' (current, 65536 bytes a bit)" in event["message"]
    assert event["timestamp"] == path.stat().st_mtime_ns // 1000
    (body,) = timeline(path, "--no-files")
    assert body.count("|") == 10


def test_the_time_in_a_version_1_header_is_an_event(tmp_path: Path, timeline: Callable[..., list[str]]) -> None:
    # A version 1 header written by hand: QEMU itself leaves the time at zero.
    path = tmp_path / "old.qcow"
    header = struct.pack(">4sIQIIQBBHIQ", b"QFI\xfb", 1, 0, 0, 1_000_000_000, MIB, 12, 9, 0, 0, 48)
    path.write_bytes(header + bytes(8))
    with open_image(path) as image:
        assert image.header.mtime == 1_000_000_000
    (event,) = [json.loads(line) for line in timeline(path, "--no-files", "--format", "jsonl")]
    assert event["datetime"] == "2001-09-09T01:46:40.000000+00:00"
    assert event["timestamp_desc"] == "Header Modification Time"


@qemu.requires_qemu
def test_json_lines_have_what_timesketch_asks_for(tmp_path: Path, timeline: Callable[..., list[str]]) -> None:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    made = make(tmp_path, "ext4")
    made.debugfs("sif small.txt mtime 20200101120000")
    path = filesystems.states_of(tmp_path / "disk.qcow2", [("old", made.path), (None, made.path)])
    events = [json.loads(line) for line in timeline(path, "--format", "jsonl")]
    for event in events:
        assert {"message", "datetime", "timestamp", "timestamp_desc", "state"} <= event.keys()
        assert isinstance(event["timestamp"], int)
        assert event["datetime"].endswith("+00:00")
    found = [
        event
        for event in events
        if event.get("filename") == "/small.txt" and event["timestamp_desc"] == "Content Modification Time"
    ]
    assert [(event["state"], event["datetime"]) for event in found] == [
        ("old", "2020-01-01T12:00:00.000000+00:00"),
        ("active", "2020-01-01T12:00:00.000000+00:00"),
    ]
    assert all(event["message"] == f"[{event['state']}] /small.txt" for event in found)


@qemu.requires_qemu
def test_states_are_chosen_by_name(tmp_path: Path, timeline: Callable[..., list[str]]) -> None:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    made = make(tmp_path, "ext4", populated=False)
    path = filesystems.states_of(tmp_path / "disk.qcow2", [("a", made.path), ("b", made.path), (None, made.path)])
    lines = [line for line in timeline(path, "--state", "b", "--state", "active") if "was taken" not in line]
    assert {line.split("|")[1].split("]")[0] for line in lines} == {"[b", "[active"}


@qemu.requires_qemu
def test_a_state_without_a_file_system_is_reported_and_the_others_are_listed(
    make_image: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    path = make_image("disk.qcow2", "1M")
    qemu.snapshot(path, "empty")
    assert main(["timeline", str(path)]) == 0
    streams = capsys.readouterr()
    assert "snapshot 'empty'" in streams.out
    assert streams.err.count("no file system was found") == 2


@qemu.requires_qemu
def test_snapshots_of_one_name_are_distinguished(
    make_image: Callable[..., Path], timeline: Callable[..., list[str]]
) -> None:
    path = make_image("disk.qcow2", "1M")
    for _ in range(2):
        qemu.snapshot(path, "twin")
    states = [json.loads(line)["state"] for line in timeline(path, "--no-files", "--format", "jsonl")]
    assert states == ["twin (ID 1)", "twin (ID 2)"]


def test_thousands_of_snapshots_are_named_in_one_pass(tmp_path: Path, timeline: Callable[..., list[str]]) -> None:
    builder = Builder(size=MIB)
    for number in range(300):
        builder.snapshot(b"%d" % number, b"same", l1_offset=builder.l1, l1_size=1)
    path = builder.write(tmp_path / "disk.qcow2")
    assert len(timeline(path, "--no-files")) == 300
    looked_at = []

    class Entries(list[SnapshotEntry]):
        def __iter__(self) -> Iterator[SnapshotEntry]:
            looked_at.append(len(self))
            return super().__iter__()

    with open_image(path) as image:
        entries = Entries(image.snapshots)
    label = labels(entries)
    assert [label(entry) for entry in entries[:2]] == ["same (ID 0)", "same (ID 1)"]
    assert looked_at == [300, 300]  # once for the names they share, once for each


def test_the_cost_of_a_state_does_not_grow_with_their_number(
    tmp_path: Path, timeline: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    import pytsk3_qcow2
    from qcow2_forensics.format import image as image_module

    builder = Builder(size=MIB)
    for number in range(200):
        builder.snapshot(b"%d" % number, b"state %d" % number, l1_offset=builder.l1, l1_size=1)
    path = builder.write(tmp_path / "disk.qcow2")
    tables: list[object] = []
    read = image_module.read_snapshot_table
    monkeypatch.setattr(image_module, "read_snapshot_table", lambda image: tables.append(image) or read(image))
    assert len(timeline(path)) == 200
    assert len(tables) <= 3
    tables.clear()
    states = [state.state for state in pytsk3_qcow2.states(path)]
    assert states == [*(f"state {number}" for number in range(200)), "active"]
    assert len(tables) <= 3


@pytest.mark.slow
def test_the_case_shows_when_the_implant_came(evidence: EvidenceCase, timeline: Callable[..., list[str]]) -> None:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    events = [json.loads(line) for line in timeline(evidence.image, "--format", "jsonl")]
    born = [
        event
        for event in events
        if event.get("filename", "").endswith("/.cache_helper") and event["timestamp_desc"] == "Creation Time"
    ]
    assert [(event["state"], event["datetime"][:19]) for event in born] == [("during-incident", "2026-05-04T09:00:04")]


@qemu.requires_qemu
@pytest.mark.parametrize("as_format", ["body", "jsonl", "html"])
def test_a_cut_snapshot_table_is_no_empty_timeline(
    tmp_path: Path, as_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = base_s(tmp_path / "disk.qcow2")
    Poke(path).u32(S_SNAPSHOTS + 36, 1 << 16)  # the extra data of the first entry is longer than allowed
    assert main(["timeline", str(path), "--no-files", "--format", as_format]) == 2
    shown = capsys.readouterr()
    assert "extra_data_size is 65536" in shown.err
    assert ("extra_data_size is 65536" in shown.out) == (as_format == "html")
