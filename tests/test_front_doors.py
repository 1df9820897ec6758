"""One question, asked at every front door: which state a text means, when a snapshot was taken, what a name is.

A door is a function of an image and a text; it answers with the place of the snapshot in its table, with
``ACTIVE``, or with ``REFUSED``.
"""

from __future__ import annotations

import importlib.util
import io
import json
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fuzz.targets import run_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qcow2_forensics as q
from qcow2_forensics.findings import Severity
from qcow2_forensics.reader import states
from qcow2_forensics.text import printable
from tests import qemu
from tests.image_builder import Builder, Poke

ACTIVE, REFUSED = -1, "refused"
Answer = int | str
Names = Iterable[tuple[str, str]]
CLUSTER = 512


def image_of(names: Names, path: Path, *, dates: Iterable[tuple[int, int]] = ()) -> Path:
    """Write an image whose snapshots have these IDs and names; the first byte of each is its place plus one."""
    builder = Builder(size=CLUSTER * 4, cluster_bits=9)
    builder.data(0, b"\xff" * CLUSTER)
    given_dates = list(dates)
    for index, (ident, name) in enumerate(names):
        data = builder.put(bytes([index + 1]) * CLUSTER)
        l2 = builder.put((data | 1 << 63).to_bytes(8, "big").ljust(CLUSTER, b"\0"))
        l1 = builder.put((l2 | 1 << 63).to_bytes(8, "big"))
        date = given_dates[index] if index < len(given_dates) else (1_700_000_000 + index, 0)
        stored = (text.encode("utf-8", "surrogateescape") for text in (ident, name))
        builder.snapshot(*stored, l1_offset=l1, l1_size=1, date=date, vm_size=CLUSTER if index == 0 else 0)
    return builder.write(path)


def _of_byte(data: bytes) -> Answer:
    return ACTIVE if data == b"\xff" else data[0] - 1


# --- the doors -----------------------------------------------------------------------------------


def python_disk(path: Path, text: str) -> Answer:
    try:
        with q.open_disk(path, text) as disk:
            return _of_byte(disk.read(0, 1))
    except (q.SnapshotNotFound, q.Qcow2Error):
        return REFUSED


def command_export(path: Path, text: str) -> Answer:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.raw"
        code, _, _ = run_command(["export", str(path), str(out), f"--snapshot={text}"])
        assert code in (0, 2)
        return _of_byte(out.read_bytes()[:1]) if code == 0 else REFUSED


def command_diff(path: Path, text: str) -> Answer:
    with q.open_image(path) as image:
        active = states.spelled(states.names_of(image.snapshots), "active")
        code, out, _ = run_command(["diff", str(path), f"--from={active}", f"--to={text}", "--format=json"])
        if code:
            return REFUSED
        label = json.loads(out)["to"]["state"]
        label_of = states.labels(image.snapshots)
        known = {label_of(entry): entry.index for entry in image.snapshots}
        assert len(known) == len(image.snapshots), "no two states are called the same"
    answer = ACTIVE if label == "active" else known[label]
    assert bool(json.loads(out)["ranges"]) == (answer != ACTIVE), "states that differ are not called equal"
    return answer


def volatility_option(path: Path, text: str) -> Answer:
    from tests import volatility_tools  # noqa: F401 - puts the plugins on Volatility's path

    from volatility3.plugins.qcow2 import choice  # isort: skip

    with q.open_image(path) as image:
        try:
            chosen = choice.choose(image, f"disk:{text}", "image")
        except q.Qcow2Error:
            return REFUSED
        assert chosen is not None
        if chosen.snapshot is None:
            return ACTIVE
    # What is saved in a configuration means the same snapshot.
    assert python_disk(path, chosen.name) == chosen.snapshot.index
    return chosen.snapshot.index


def dfvfs_option(path: Path, text: str) -> Answer:
    from dfvfs_qcow2.selection import Selection
    from qcow2_forensics.residue import deleted_snapshots

    with q.open_image(path) as image:
        try:
            selection = Selection(text)
            chosen = selection.choose(image)
            if selection.wants_deleted:
                chosen += [item.entry for item in selection.choose_deleted(deleted_snapshots(image))]
        except (q.Qcow2Error, ValueError):
            return REFUSED
        return chosen[0].index if chosen else ACTIVE


def pytsk3_snapshot(path: Path, text: str) -> Answer:
    import pytsk3_qcow2

    try:
        with pytsk3_qcow2.Img_Info(str(path), snapshot=text) as image:
            return _of_byte(image.read(0, 1))
    except OSError:
        return REFUSED


DOORS: dict[str, tuple[Callable[[Path, str], Answer], str]] = {
    "open_disk": (python_disk, "qcow2_forensics"),
    "export --snapshot": (command_export, "qcow2_forensics"),
    "diff --to": (command_diff, "qcow2_forensics"),
    "vol --qcow2-snapshot": (volatility_option, "volatility3"),
    "--qcow_snapshots": (dfvfs_option, "dfvfs"),
    "Img_Info(snapshot=)": (pytsk3_snapshot, "pytsk3"),
}


def door(name: str) -> Callable[[Path, str], Answer]:
    function, module = DOORS[name]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is absent")
    return function


# --- which state ---------------------------------------------------------------------------------

ORDINARY = (("2", "before"), ("3", "after"))
BACKSLASH = (("1", "a\\x1b"), ("2", "a\x1b"))
SITUATIONS: dict[str, tuple[Names, str, Answer]] = {
    "an ID": (ORDINARY, "2", 0),
    "an ID, not a position": (ORDINARY, "3", 1),
    "no ID": (ORDINARY, "1", REFUSED),
    "a name": (ORDINARY, "after", 1),
    "the active state": (ORDINARY, "active", ACTIVE),
    "a place from 0": (ORDINARY, "index:0", 0),
    "a place from 1": (ORDINARY, "#1", 0),
    "a place that is none": (ORDINARY, "index:2", REFUSED),
    "a place before the first": (ORDINARY, "#0", REFUSED),
    "an ID and nothing else": (ORDINARY, "id:3", 1),
    "a name and nothing else": (ORDINARY, "name:before", 0),
    "a name is no ID": (ORDINARY, "id:before", REFUSED),
    "an ID is no name": (ORDINARY, "name:2", REFUSED),
    "equals signs": (ORDINARY, "==active", ACTIVE),
    "a name is matched in full": (ORDINARY, "bef", REFUSED),
    "no snapshots": ((), "active", ACTIVE),
    "a snapshot called active": ((("1", "active"),), "active", REFUSED),
    "the active state beside it": ((("1", "active"),), "=active", ACTIVE),
    "a snapshot called active, by name": ((("1", "active"),), "name:active", 0),
    "an ID of active": ((("active", "x"),), "active", REFUSED),
    "an ID that is a place": ((("index:1", "x"), ("2", "y")), "index:1", REFUSED),
    "the place beside it": ((("index:1", "x"), ("2", "y")), "=index:1", 1),
    "that ID": ((("index:1", "x"), ("2", "y")), "id:index:1", 0),
    "an ID that is its own place": ((("index:0", "x"), ("2", "y")), "index:0", 0),
    "an ID that is a place there is none of": ((("index:9", "x"),), "index:9", 0),
    "an ID with an equals sign": ((("=index:1", "x"), ("2", "y")), "=index:1", REFUSED),
    "more equals signs": ((("=index:1", "x"), ("2", "y")), "==index:1", 1),
    "an ID that is another's name": ((("1", "2"), ("2", "x")), "2", REFUSED),
    "that ID, as an ID": ((("1", "2"), ("2", "x")), "id:2", 1),
    "that name, as a name": ((("1", "2"), ("2", "x")), "name:2", 0),
    "an ID that is its own name": ((("1", "1"), ("2", "x")), "1", 0),
    "a name that two share": ((("1", "x"), ("2", "x")), "x", REFUSED),
    "an ID that two share": ((("1", "x"), ("1", "y")), "1", REFUSED),
    "a place where IDs are shared": ((("1", "x"), ("1", "x")), "index:1", 1),
    "a deleted one that there is not": (ORDINARY, "deleted:9", REFUSED),
    "a name with a backslash": (BACKSLASH, "a\\x1b", 0),
    "a name with an escape": (BACKSLASH, "a\x1b", 1),
    "a name of bytes": ((("1", "\udcff\udcfe"), ("2", "x")), "\udcff\udcfe", 0),
    "a name with a comma": ((("1", "a,b"), ("2", "a")), "name:a,b", 0),
    "an ID with a comma": ((("1,2", "a"), ("7", "b")), "1,2", 0),
    "a name with a space before it": ((("1", " after"), ("2", "x")), " after", 0),
    "an ID with a line feed": ((("1\n", "x"), ("2", "y")), "1\n", 0),
    "a snapshot called none": ((("1", "none"),), "name:none", 0),
    "an empty text": (ORDINARY, "", REFUSED),
}
SPLITS = {"a name with a comma"}  # a list of states: its items are not what the others read


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_door_means_the_same_state(situation: str, name: str, tmp_path: Path) -> None:
    names, text, wanted = SITUATIONS[situation]
    if name == "--qcow_snapshots" and situation in SPLITS:
        text, wanted = "a,b", 0
    assert door(name)(image_of(names, tmp_path / "disk.qcow2"), text) == wanted


WORDS = ["active", "backing", "index:0", "index:1", "#1", "#2", "id:1", "name:a", "deleted:1", "disk", "all", "none"]
HOSTILE = st.sampled_from(["1", "2", "a", "", *WORDS, *(f"={word}" for word in WORDS[:6]), "id:index:0", "#01"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.tuples(HOSTILE, HOSTILE), max_size=3), text=HOSTILE)
def test_hostile_ids_shadow_no_word_and_every_choice_offered_opens(names: Names, text: str, tmp_path: Path) -> None:
    path = image_of(names, tmp_path / "disk.qcow2")
    stored = list(names)
    with q.open_image(path) as image:
        named = {index for index, pair in enumerate(stored) if text in pair}
        answer = python_disk(path, text)
        if answer not in (REFUSED, ACTIVE):
            assert named <= {answer}, "a text that means another snapshot too was not refused"
        if answer == ACTIVE:
            assert not named
        spelling = states.spellings(image.snapshots)
        label = states.labels(image.snapshots)
        for entry in image.snapshots:
            assert python_disk(path, spelling(entry)) == entry.index
        assert len({label(entry) for entry in (*image.snapshots, None)}) == len(stored) + 1
        assert python_disk(path, states.spelled(states.names_of(image.snapshots), "active")) == ACTIVE
        try:
            states.choose(image, text)
        except q.SnapshotNotFound as error:
            for choice in error.choices:
                first = choice.partition(" (")[0]
                assert python_disk(path, first) != REFUSED or "below" in choice or first.lstrip("=") == "deleted:1"
        except q.Qcow2Error:
            pass
    for name in ("vol --qcow2-snapshot", "Img_Info(snapshot=)", "diff --to"):
        if importlib.util.find_spec(DOORS[name][1]) is not None and text.lstrip("=") != "backing" and text:
            assert DOORS[name][0](path, text) == answer, name


def test_a_name_from_json_lines_opens_its_snapshot(tmp_path: Path) -> None:
    names = (("1", "a\\b"), ("2", "\u202egpj"), ("3", "\udcff"), ("4", "x\u3164"))
    path = image_of(names, tmp_path / "disk.qcow2")
    _, out, _ = run_command(["snapshots", str(path), "--format", "jsonl"])
    for index, line in enumerate(out.splitlines()):
        assert command_export(path, json.loads(line)["name"]) == index


@pytest.mark.skipif(importlib.util.find_spec("pytsk3") is None, reason="pytsk3 is absent")
def test_states_lists_each_state_once_under_its_own_name(tmp_path: Path) -> None:
    import pytsk3_qcow2

    names = (("index:1", "active"), ("active", "x"), ("3", "x"), ("3", "x"))
    with ExitStack() as stack:
        found = [
            stack.enter_context(state) for state in pytsk3_qcow2.states(str(image_of(names, tmp_path / "disk.qcow2")))
        ]
        assert [_of_byte(state.read(0, 1)) for state in found] == [0, 1, 2, 3, ACTIVE]
        assert len({state.state for state in found}) == 5
        assert found[-1].state == "active"


@pytest.mark.skipif(importlib.util.find_spec("dfvfs") is None, reason="dfvfs is absent")
@pytest.mark.parametrize(
    ("text", "wanted"),
    [("all", [0, 1, 2]), ("#1..#2", [0, 1]), ("#2..3", [1, 2]), ("index:1..2", [1, 2]), ("5,#1", [0, 1]), ("none", [])],
)
def test_positions_have_a_mark_of_their_own(text: str, wanted: list[int], tmp_path: Path) -> None:
    from dfvfs_qcow2.selection import Selection

    with q.open_image(image_of((("3", "a"), ("5", "b"), ("2", "c")), tmp_path / "disk.qcow2")) as image:
        assert [entry.index for entry in Selection(text).choose(image)] == wanted


@pytest.mark.skipif(importlib.util.find_spec("dfvfs") is None, reason="dfvfs is absent")
@pytest.mark.parametrize(
    ("names", "text", "wanted"),
    [
        ((("1", " after"), ("2", "after")), " after", REFUSED),
        ((("1", " after"), ("2", "after")), "name: after", [0]),
        ((("index:1 ", "x"), ("2", "y")), "index:1 ", REFUSED),
        ((("1", " 2"), ("2", "x")), "1, 2", REFUSED),
        ((("1", "a"), ("2", "x")), "1, 2", [0, 1]),
        ((("1", "none"),), "none", REFUSED),
        ((("1", "none"),), "=none", []),
        ((("1", "None"),), "None", REFUSED),
        ((("1", "a"),), "=none", []),
    ],
)
def test_white_space_and_none_choose_no_other_snapshot(
    names: Names, text: str, wanted: list[int] | str, tmp_path: Path
) -> None:
    from dfvfs_qcow2.selection import Selection

    with q.open_image(image_of(names, tmp_path / "disk.qcow2")) as image:
        try:
            chosen: list[int] | str = [entry.index for entry in Selection(text).choose(image)]
        except q.SnapshotNotFound:
            chosen = REFUSED
    assert chosen == wanted


@pytest.mark.skipif(importlib.util.find_spec("dfvfs") is None, reason="dfvfs is absent")
def test_a_range_without_marks_is_refused_with_the_form_that_works(tmp_path: Path) -> None:
    from dfvfs_qcow2.selection import Selection

    with pytest.raises(ValueError, match=r"#3\.\.#5"):
        Selection("1,3..5")
    path = image_of((("1", "all"),), tmp_path / "disk.qcow2")
    with q.open_image(path) as image, pytest.raises(q.SnapshotNotFound, match="=all"):
        Selection("all").choose(image)


@pytest.mark.skipif(importlib.util.find_spec("dfvfs") is None, reason="dfvfs is absent")
@pytest.mark.parametrize(("text", "number"), [("recovered:1", 1), ("=recovered:02", 2), ("recovered:3", 0)])
def test_a_recovered_state_is_chosen_by_its_number_everywhere(text: str, number: int) -> None:
    from dfvfs_qcow2.selection import Selection
    from qcow2_forensics.recovery import choose_recovered

    found: Any = [SimpleNamespace(number=one, label=f"recovered:{one}", what="tables") for one in (1, 2)]
    if number:
        assert Selection(text).choose_recovered(found) == [found[number - 1]]
        assert choose_recovered(found, text.partition(":")[2]).number == number
    else:
        with pytest.raises(q.SnapshotNotFound, match=r"no state 'recovered:3'; recovered states: recovered:1 \(tables"):
            Selection(text).choose_recovered(found)


def test_without_recovered_states_no_snapshot_is_missed(tmp_path: Path) -> None:
    path = image_of(ORDINARY, tmp_path / "disk.qcow2")
    with pytest.raises(q.SnapshotNotFound, match="no state 'recovered:1'; recovered states: none"):
        q.open_disk(path, "recovered:1")


# --- dates ---------------------------------------------------------------------------------------

NSEC = 1_500_000_000
NOTE = f"nsec {NSEC} out of range"


@pytest.fixture
def dated(tmp_path: Path) -> Path:
    """An image with a snapshot whose date has a fraction of 1.5 seconds."""
    return image_of((("1", "s"),), tmp_path / "disk.qcow2", dates=[(1_700_000_000, NSEC)])


@pytest.mark.parametrize(
    "command",
    [
        ["info"],
        ["info", "--format", "json"],
        ["snapshots"],
        ["snapshots", "--format", "jsonl"],
        ["timeline", "--no-files"],
        ["timeline", "--no-files", "--format", "jsonl"],
    ],
    ids=" ".join,
)
def test_the_commands_show_a_fraction_out_of_range(command: list[str], dated: Path) -> None:
    code, out, _ = run_command([command[0], str(dated), *command[1:]])
    assert code == 0
    assert NOTE in out
    if command[0] == "timeline":
        assert "1700000000" in out
    elif command == ["info"]:
        assert f"2023-11-14 22:13:20 UTC ({NOTE})" in out
    else:
        assert "22:13:20" in out


def test_volatility_shows_a_fraction_out_of_range(dated: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("volatility3", reason="volatility3 is absent")
    from tests import volatility_tools as tools

    with tools.warnings_of(caplog) as warnings:
        (row,) = tools.plugin_rows("snapshots.Snapshots", dated)
    assert str(row["Date"]).startswith("2023-11-14 22:13:20")
    assert sum(warning.count(NOTE) for warning in warnings) == 1
    assert any(f"2023-11-14 22:13:20 UTC ({NOTE})" in warning for warning in warnings)


def test_dfvfs_and_plaso_show_a_fraction_out_of_range(dated: Path) -> None:
    pytest.importorskip("dfvfs", reason="dfvfs is absent")
    from dfvfs_qcow2 import volume_scanner

    with q.open_image(dated) as image:
        (entry,) = image.snapshots
    assert f"2023-11-14 22:13:20 UTC ({NOTE})" in volume_scanner.describe(entry)
    pytest.importorskip("plaso", reason="plaso is absent")
    from dfvfs_qcow2 import plaso_preprocess

    data: Any = plaso_preprocess._event_data(entry)
    assert data.date_note == NOTE
    assert data.creation_time.timestamp == 1_700_000_000 * 10**9


class _Mediator:
    """What plaso's preprocessing takes warnings through."""

    def __init__(self) -> None:
        self._file_entry: Any = None
        self.warnings: list[str] = []

    def SetFileEntry(self, file_entry: Any) -> None:  # noqa: N802 - plaso's name
        self._file_entry = file_entry

    def ProducePreprocessingWarning(self, _plugin: str, message: str) -> None:  # noqa: N802 - plaso's name
        self.warnings.append(message)


def test_plaso_shows_findings_of_low_and_above_and_no_facts(dated: Path) -> None:
    pytest.importorskip("plaso", reason="plaso is absent")
    from dfvfs.lib import definitions
    from dfvfs.path import factory

    from dfvfs_qcow2 import plaso_preprocess

    location = factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_OS, location=str(dated))
    mediator = _Mediator()
    plaso_preprocess._report_findings(
        mediator, factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_QCOW, parent=location)
    )
    severities = {finding.code: finding.severity for finding in q.audit(dated)}
    assert Severity.INFO in severities.values()
    shown = [code for code in severities if any(code in warning for warning in mediator.warnings)]
    assert shown
    assert [severities[code] for code in shown if severities[code] < Severity.LOW] == []
    assert {code for code in severities if severities[code] >= Severity.LOW} == set(shown)


# --- one escape ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["info"], ["snapshots"], ["timeline", "--no-files"], ["diff", "--from=index:0"]], ids=" ".join
)
def test_a_backslash_is_doubled_once(command: list[str], tmp_path: Path) -> None:
    path = image_of((("1", "a\\b"),), tmp_path / "disk.qcow2")
    code, out, _ = run_command([command[0], str(path), *command[1:]])
    assert code == 0
    assert "a\\\\b" in out
    assert "a\\\\\\" not in out


def test_an_error_doubles_a_backslash_once(tmp_path: Path) -> None:
    path = image_of((("1", "a\\b"), ("2", "a\\b")), tmp_path / "disk.qcow2")
    with pytest.raises(q.SnapshotNotFound) as caught:
        q.open_disk(path, "a\\b")
    assert "'a\\\\b' is ambiguous" in str(caught.value)
    assert "a\\\\\\" not in str(caught.value)
    assert caught.value.choices == ("1 (a\\b)", "2 (a\\b)")
    _, _, err = run_command(["map", str(path), "--snapshot", "a\\b"])
    assert err == f"qcow2-forensics: {caught.value}\n"
    _, _, err = run_command(["diff", str(path), "--from", "bitmap:a\\b"])
    assert err.endswith("has no bitmaps 'a\\\\b'; it holds: none\n")


def test_a_reference_name_is_shown_the_same_by_audit_and_error(tmp_path: Path) -> None:
    name = "no\\such\u202efile"
    path = Builder(cluster_bits=16, backing=name.encode()).write(tmp_path / "disk.qcow2")
    report = q.audit(path)
    values = [str(item.value) for finding in report for item in finding.evidence]
    assert name in values, "findings hold the name as stored"
    with pytest.raises(q.Qcow2Error) as caught:
        q.open_disk(path)
    shown = printable(name)
    assert shown in str(caught.value)
    _, out, _ = run_command(["audit", str(path)])
    assert shown in out
    assert "no\\\\\\" not in out


def test_a_long_name_is_cut_in_every_line(tmp_path: Path) -> None:
    path = image_of((("1", "n" * 60_000),), tmp_path / "disk.qcow2")
    for command in (["info"], ["snapshots"], ["timeline", "--no-files"], ["diff", "--from=index:0"], ["audit"]):
        _, out, err = run_command([command[0], str(path), *command[1:]])
        assert max(map(len, io.StringIO(out + err))) < 2000, command
    _, _, err = run_command(["map", str(path), "--snapshot", "x"])
    assert len(err) < 2000


# --- the command line ----------------------------------------------------------------------------


def test_a_kind_of_residue_that_there_is_not_is_refused_with_the_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qcow2_forensics.cli import main

    path = image_of(ORDINARY, tmp_path / "disk.qcow2")
    with pytest.raises(SystemExit) as caught:
        main(["residue", str(path), str(tmp_path / "out"), "--kind", "leeked"])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert "leeked" in shown
    assert "leaked" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [0, 8, 4096])
def test_the_check_line_says_where_qemu_opens_nothing(length: int, tmp_path: Path) -> None:
    """An end mark with a length: QEMU refuses one that reaches past the area, and ignores a shorter one."""
    path = Builder(cluster_bits=16).write(tmp_path / "disk.qcow2")
    Poke(path).u32(112 + 4, length * 16)
    report = q.audit(path)
    _, out, _ = run_command(["audit", str(path)])
    assert ("QEMU itself does not open this image" in " ".join(out.split())) == ("not_opened_by_qemu" in report.details)
    if qemu.available():
        assert ("not_opened_by_qemu" in report.details) == (not qemu.img("info", path, check=False).ok)
