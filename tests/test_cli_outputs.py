"""Where the commands write: ``-o FILE``, folders that do not exist, files that are evidence; and how they are typed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qcow2_forensics.cli import COMMANDS, build_parser, main
from tests import qemu
from tests.image_builder import base_b, base_s

Run = Callable[..., tuple[int, str, str]]
COMMANDS_WITH_OUTPUT = {
    "audit": ["audit", "IMAGE", "-o", "OUT"],
    "audit of a fleet": ["audit", "IMAGE", "IMAGE2", "-o", "OUT"],
    "diff": ["diff", "IMAGE", "-o", "OUT"],
    "diff in two files": ["diff", "IMAGE", "IMAGE2", "-o", "OUT"],
    "examine": ["examine", "IMAGE", "OUT", "--no-files"],
    "export": ["export", "IMAGE", "OUT"],
    "residue": ["residue", "IMAGE", "OUT"],
    "timeline": ["timeline", "IMAGE", "--no-files", "-o", "OUT"],
}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; returns exit code, output, errors."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(str(end.code))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with the snapshots s1 and s2, which differ."""
    return base_s(tmp_path / "disk.qcow2")


def typed(command: str, image: Path, out: Path) -> list[str | Path]:
    """Return a command line of COMMANDS_WITH_OUTPUT."""
    other = image.with_name("other.qcow2")
    if not other.exists():
        base_b(other)
    places: dict[str, str | Path] = {"IMAGE": image, "IMAGE2": other, "OUT": out}
    return [places.get(word, word) for word in COMMANDS_WITH_OUTPUT[command]]


# --- -o FILE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "json", "jsonl", "html"])
def test_diff_writes_to_a_file_what_it_prints(form: str, run: Run, image: Path, tmp_path: Path) -> None:
    printed = run("diff", image, "--format", form)
    assert printed[0] == 0
    assert run("diff", image, "--format", form, "-o", tmp_path / "out") == (0, "", printed[2])
    written = (tmp_path / "out").read_text()
    assert "s2" in written
    if form == "html":  # the page has the command line and the time
        assert written.startswith("<!DOCTYPE")
        assert "-o" in written
    else:
        assert written == printed[1]


@pytest.mark.parametrize("form", ["body", "jsonl"])
def test_timeline_writes_to_a_file_what_it_prints(form: str, run: Run, image: Path, tmp_path: Path) -> None:
    printed = run("timeline", image, "--no-files", "--format", form)
    assert printed[0] == 0
    assert len(printed[1].splitlines()) == 2
    assert run("timeline", image, "--no-files", "--format", form, "-o", tmp_path / "out") == (0, "", "")
    assert (tmp_path / "out").read_text() == printed[1]


@pytest.mark.parametrize(
    ("command", "suffix", "start"),
    [
        ("diff", "html", "<!DOCTYPE"),
        ("diff", "json", "{\n"),
        ("diff", "jsonl", '{"record"'),
        ("diff", "txt", "/"),
        ("timeline", "html", "<!DOCTYPE"),
        ("timeline", "jsonl", '{"message"'),
        ("timeline", "body", "0|"),
        ("timeline", "csv", "0|"),
    ],
)
def test_the_suffix_of_the_output_chooses_the_format(
    command: str, suffix: str, start: str, run: Run, image: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"out.{suffix}"
    assert run(*typed(command, image, out))[0] == 0
    assert out.read_text().startswith(start)


@pytest.mark.parametrize(("command", "name"), [("audit", "/dev/stdout"), ("diff", "-"), ("timeline", "-")])
def test_standard_output_can_be_named(command: str, name: str, run: Run, image: Path) -> None:
    code, out, _ = run(*typed(command, image, Path(name)))
    assert code == 0
    assert "s1" in out or "s2" in out


@pytest.mark.parametrize("command", COMMANDS_WITH_OUTPUT)
def test_an_existing_output_is_kept_unless_forced(command: str, run: Run, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    code, printed, errors = run(*typed(command, image, out))
    assert (code, printed) == (2, "")
    assert str(out) in errors
    assert out.read_text() == "mine"
    if command in ("diff", "timeline"):
        assert run(*typed(command, image, out), "--force")[0] == 0
        assert out.read_text() != "mine"


def test_a_diff_that_fails_leaves_no_file(run: Run, image: Path, tmp_path: Path) -> None:
    code, _, errors = run("diff", image, "--from", "no-such", "-o", tmp_path / "out")
    assert code == 2
    assert "no-such" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["disk.qcow2"]


# --- folders that do not exist ---------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS_WITH_OUTPUT)
def test_an_output_in_no_folder_is_named_as_the_user_named_it(
    command: str, run: Run, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "a-file").write_bytes(b"")
    for folder, problem in (("missing", "does not exist"), ("a-file", "is not a folder")):
        out = tmp_path / folder / "out"
        code, printed, errors = run(*typed(command, image, out))
        assert (code, printed) == (2, "")
        assert errors == f"qcow2-forensics: {out} cannot be written: the folder {out.parent} {problem}\n"


@pytest.mark.parametrize("command", COMMANDS_WITH_OUTPUT)
def test_an_error_of_the_file_system_names_the_output_and_not_its_temporary_name(
    command: str, run: Run, image: Path, tmp_path: Path
) -> None:
    out = tmp_path / ("n" * 400)  # no file system takes such a name
    code, _, errors = run(*typed(command, image, out))
    assert code == 2
    assert ".partial" not in errors
    assert "n" * 100 in errors


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_does_not_exist_is_a_usage_error(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parser = build_parser([command])
    if "--backing-dir" not in parser_help(command, capsys):
        return
    with pytest.raises(SystemExit) as end:
        parser.parse_args([command, "image", "out", "--backing-dir", str(tmp_path / "missing")])
    assert end.value.code == 2
    assert f"argument --backing-dir: {tmp_path / 'missing'} is not a folder" in capsys.readouterr().err


def parser_help(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what ``COMMAND --help`` prints."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


def test_the_audit_names_a_missing_folder(run: Run, image: Path, tmp_path: Path) -> None:
    code, printed, errors = run("audit", image, "--backing-dir", tmp_path / "missing")
    assert (code, printed) == (2, "")
    assert f"{tmp_path / 'missing'} is not a folder" in errors


# --- evidence --------------------------------------------------------------------------------------


@qemu.requires_qemu
@pytest.mark.parametrize("command", ["audit", "audit of a fleet", "diff", "diff in two files", "export", "timeline"])
def test_no_output_replaces_a_file_that_was_read_for_it(command: str, run: Run, tmp_path: Path) -> None:
    base = base_b(tmp_path / "base.qcow2")
    overlay = qemu.create(tmp_path / "disk.qcow2", backing=base, backing_format="qcow2")
    for target in (overlay, base):
        before = target.read_bytes()
        words = [word for word in typed(command, overlay, target) if word != "--no-files"]
        if command == "timeline":
            pytest.importorskip("pytsk3", reason="pytsk3 is absent")
        code, _, errors = run(*words, "--force")
        assert code == 2
        assert f"{target} is part of the evidence" in errors
        assert target.read_bytes() == before
        assert not list(tmp_path.glob(".*"))


# --- words -----------------------------------------------------------------------------------------


def test_the_summary_of_a_fleet_of_one_is_in_the_singular(run: Run, image: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(f"{image}\n")
    code, out, errors = run("audit", "--files-from", tmp_path / "list")
    assert code == 0
    assert json.loads(out)["image"]["path"] == str(image)
    assert re.search(r"1 image, by its worst finding: 1 \w+", errors)


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        (["audit", "a", "--jobs", "x"], 256),
        (["audit", "a", "--jobs", "257"], 256),
        (["examine", "a", "b", "--last", "0"], 10**9),
    ],
)
def test_an_option_that_is_no_number_says_which_numbers_are(run: Run, arguments: list[str], most: int) -> None:
    code, _, shown = run(*arguments)
    assert code == 2
    assert f"argument {arguments[-2]}: a number from 1 to {most} is needed" in shown


def test_a_state_of_the_timeline_that_is_not_there_is_an_error_before_anything_is_printed(
    run: Run, image: Path
) -> None:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    code, printed, shown = run("timeline", image, "--state", "s1", "--state", "gone")
    assert (code, printed) == (2, "")
    assert "no snapshot 'gone'" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_wrapped_but_for_its_examples(run: Run, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, printed, _ = run(command, "--help")
    assert [line for line in printed.splitlines() if len(line) > 80 and not line.startswith("  ")] == []
    assert f"\n  qcow2-forensics {command} " in printed


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("memory disk --snapshot 1 OUT", "output", "OUT"),
        ("memory disk --snapshot 1 -", "output", "-"),
        ("memory disk OUT --snapshot 1", "output", "OUT"),
        ("diff disk --from 1 OTHER --to 2", "other", "OTHER"),
        ("audit disk --depth deep OTHER THIRD", "images", ["disk", "OTHER", "THIRD"]),
        ("demo --only audit DIR", "folder", "DIR"),
    ],
)
def test_what_may_be_left_out_may_also_follow_an_option(line: str, name: str, value: object) -> None:
    words = line.split()
    assert getattr(build_parser(words[:1]).parse_args(words), name) == value


@pytest.mark.parametrize(
    "line", ["export disk OUT --no-hash THIRD", "memory disk OUT --force --nonsense", "info disk x"]
)
def test_what_no_command_takes_is_a_mistake(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = line.split()
    with pytest.raises(SystemExit):
        build_parser(words[:1]).parse_args(words)
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("export", "IMAGE", "OUT", "--hash", "md5", "--no-hash"),
        ("timeline", "IMAGE", "--no-files", "--state", "active"),
    ],
    ids=" ".join,
)
def test_an_option_that_another_one_makes_void_is_refused(
    words: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"IMAGE": str(qemu.create(tmp_path / "a.qcow2", "1M")), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as ended:
        main([places.get(word, word) for word in words])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out, "not allowed with argument" in printed.err) == (2, "", True)
    assert not (tmp_path / "out").exists()
