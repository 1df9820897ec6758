"""Questions of an attended scan are asked once for all states, and say which state they are about."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("dfvfs")
pytest.importorskip("plaso")

from plaso.cli import tools as plaso_tools

from dfvfs_qcow2 import end_notes
from dfvfs_qcow2.state_prompts import StatePrompts
from qcow2_forensics.findings import Severity


class Mediator:
    """Answers every question, and remembers what was asked and printed."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.printed = ""
        self._output_writer = SimpleNamespace(Write=self._write)

    def _write(self, text: str) -> None:
        self.printed += text

    def GetPartitionIdentifiers(self, _system: Any, identifiers: list[str]) -> list[str]:  # noqa: N802
        self.asked.append("partitions")
        return identifiers[1:]

    def UnlockEncryptedVolume(self, _scanner: Any, _context: Any, node: Any, _credentials: Any) -> bool:  # noqa: N802
        self.asked.append("password")
        node.credential = ("password", "secret")
        return node.unlocks


GPT = SimpleNamespace(TYPE_INDICATOR="GPT")


def test_a_state_with_the_same_volumes_gets_the_same_answer() -> None:
    mediator = Mediator()
    prompts = StatePrompts(mediator)
    first = prompts.GetPartitionIdentifiers(GPT, ["p1", "p2", "p3"])
    first.reverse()  # as callers do
    prompts.begin("snapshot 1 (before)")
    assert prompts.GetPartitionIdentifiers(GPT, ["p1", "p2", "p3"]) == ["p2", "p3"]
    assert (mediator.asked, mediator.printed) == (["partitions"], "")


def test_a_question_about_other_volumes_names_the_state() -> None:
    mediator = Mediator()
    prompts = StatePrompts(mediator)
    prompts.GetPartitionIdentifiers(GPT, ["p1", "p2"])
    prompts.begin("snapshot 1 (a\x1b[2J)")
    assert prompts.GetPartitionIdentifiers(GPT, ["p1", "p2", "p3"]) == ["p2", "p3"]
    assert mediator.asked == ["partitions"] * 2
    assert mediator.printed == "\nSnapshot 1 (a\\x1b[2J):\n\n"


def test_two_volumes_of_one_state_are_two_questions() -> None:
    mediator = Mediator()
    prompts = StatePrompts(mediator)
    for state in ("", "snapshot 1", "snapshot 2"):
        prompts.begin(state)
        prompts.GetPartitionIdentifiers(GPT, ["p1", "p2"])
        prompts.GetPartitionIdentifiers(GPT, ["p1", "p2"])
    assert mediator.asked == ["partitions"] * 2


@pytest.mark.parametrize(("unlocks", "asked"), [(True, 1), (False, 1)])
def test_what_opened_a_volume_opens_it_in_other_states_too(unlocks: bool, asked: int) -> None:
    mediator = Mediator()
    prompts = StatePrompts(mediator)
    tried: list[Any] = []

    def unlock(_context: Any, path_spec: Any, kind: str, data: str) -> bool:
        tried.append((path_spec, kind, data))
        return True

    scanner = SimpleNamespace(Unlock=unlock)
    credentials = SimpleNamespace(CREDENTIALS=frozenset(["password"]))
    for state in ("active", "snapshot 1"):
        prompts.begin(state)
        node = SimpleNamespace(type_indicator="LUKSDE", path_spec=state, unlocks=unlocks)
        assert prompts.UnlockEncryptedVolume(scanner, None, node, credentials) is unlocks
    assert mediator.asked == ["password"] * asked
    assert tried == ([("snapshot 1", "password", "secret")] if unlocks else [])


def test_a_run_ends_with_what_the_status_window_wiped_and_one_line_about_each_audit() -> None:
    end_notes.take(printed=True)  # what tests of this process have left
    end_notes.notices.append("The image holds 1 internal snapshot(s)")
    end_notes.note_audit("/cases/a.qcow2", Counter({Severity.HIGH: 2, Severity.LOW: 1}))
    end_notes.note_audit("b\x1b", Counter())
    assert end_notes.take(printed=False) == [
        "The image holds 1 internal snapshot(s)",
        "audit: 2 High, 1 Low in /cases/a.qcow2",
        "audit: no findings in b\\x1b",
        "pinfo --sections warnings lists the findings.",
    ]
    end_notes.notices.append("seen already")
    end_notes.note_audit("healthy.qcow2", Counter())
    assert end_notes.take(printed=True, attended=False) == []
    assert end_notes.take(printed=True) == end_notes.take(printed=False) == []


@pytest.mark.parametrize("unattended", [False, True])
def test_output_that_a_program_reads_is_what_the_tool_alone_prints(
    unattended: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = SimpleNamespace(_unattended_mode=unattended, _output_writer=plaso_tools.StdoutOutputWriter())
    end_notes.say(tool, "audit: 2 High in a.qcow2")
    shown = capsys.readouterr()
    line = "audit: 2 High in a.qcow2\n\n"
    assert (shown.out, shown.err) == (("", line) if unattended else (line, ""))
    writer = Mediator()
    end_notes.say(SimpleNamespace(_unattended_mode=False, _output_writer=writer._output_writer), "to a program")
    assert writer.printed == ""


def test_the_base_class_of_the_tools_has_its_own_options_only() -> None:
    import argparse

    from plaso.cli import image_export_tool, storage_media_tool

    from dfvfs_qcow2 import plaso_options  # noqa: F401 - wraps

    for tool, has_ours in ((storage_media_tool.StorageMediaTool, False), (image_export_tool.ImageExportTool, True)):
        parser = argparse.ArgumentParser()
        tool().AddVSSProcessingOptions(parser)
        assert ("--qcow_snapshots" in parser.format_help()) == has_ours
