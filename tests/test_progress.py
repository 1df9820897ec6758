"""Progress stays on its line: drawn on real terminals of many widths."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios

import pytest

from qcow2_forensics.cli._messages import Messages
from qcow2_forensics.cli.output import Progress, draw_over
from qcow2_forensics.text import columns, fit

LABEL = "audit of a rather long file name.qcow2"


def _drawn(width: int, label: str, done: int, total: int) -> list[str]:
    """Return the lines that a progress of ``done`` bytes draws over each other on a terminal."""
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        for shown in (stream, Messages(stream)):
            progress = Progress(label, total, stream=shown)  # type: ignore[arg-type]
            progress._next = 0
            progress.advance(done)
        stream.flush()
        data = os.read(screen, 65536).decode()
    os.close(screen)
    return [re.sub(r"\x1b\[K", "", line) for line in data.split("\r") if line]


@pytest.mark.parametrize("width", [1, 2, 10, 20, 40, 80, 200])
@pytest.mark.parametrize("label", [LABEL, "日本語" * 20, "x"])
@pytest.mark.parametrize("total", [0, 10 << 30])
def test_a_progress_line_is_narrower_than_the_terminal(width: int, label: str, total: int) -> None:
    lines = _drawn(width, label, 3 << 30, total)
    assert all(columns(line) < width for line in lines)
    assert all("\n" not in line for line in lines)
    assert lines


@pytest.mark.parametrize("label", ["\x1b[2Ja", "a\rb\nc", "\u202egnp", "\x9b31m", "a\udcff", "\U000e0100"])
def test_a_label_from_evidence_draws_nothing_but_itself(label: str) -> None:
    lines = _drawn(80, label, 3 << 30, 10 << 30)
    assert lines
    assert all(line.isprintable() and "\\" in line for line in lines)


def test_a_narrow_line_keeps_the_share() -> None:
    assert _drawn(20, LABEL, 3 << 30, 10 << 30)[0].startswith("audit…:  30%")


def test_a_terminal_that_states_no_width_has_80_columns() -> None:
    assert all(60 < columns(line) < 80 for line in _drawn(0, LABEL * 2, 3 << 30, 10 << 30))


def test_a_stream_without_a_descriptor_is_drawn_on() -> None:
    from io import StringIO

    stream = StringIO()
    draw_over(stream, "x" * 100)
    assert stream.getvalue() == f"\r{'x' * 78}…\x1b[K"


@pytest.mark.parametrize("width", range(8))
def test_what_is_fitted_never_is_wider(width: int) -> None:
    for shown in ("", "a", "abcdefgh", "日本語", "a日b本"):
        assert columns(fit(shown, width)) <= width
