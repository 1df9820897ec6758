"""Errors carry their evidence, are safe to print, and cross process borders."""

from __future__ import annotations

import pickle

import pytest

import qcow2_forensics as q
from qcow2_forensics.text import printable

ERRORS = [
    q.NotQcow2("no magic"),
    q.FormatError("bad entry", offset=0x40000, field="l2_entry"),
    q.LimitExceeded("l1_size", 4194305, 4194304, offset=36),
    q.Unsupported("feature bit 40"),
    q.SnapshotNotFound("x", ["1 (a)", "2 (b)"]),
    q.SnapshotNotFound("a", ["1 (a)", "2 (a)"], ambiguous=True),
    q.MissingFile("backing", "base.qcow2", ["/evidence/base.qcow2"]),
    q.ForbiddenReference("/etc/passwd", "it leads outside the folder of the image"),
    q.Locked("LUKS"),
    q.ReadError("input/output error", offset=512, length=4096),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling_with_its_evidence(error: q.Qcow2Error) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        (q.NotQcow2, ValueError),
        (q.Unsupported, NotImplementedError),
        (q.MissingFile, FileNotFoundError),
        (q.Locked, PermissionError),
        (q.ReadError, OSError),
        (q.SnapshotNotFound, LookupError),
        (q.LimitExceeded, q.FormatError),
    ],
)
def test_an_error_is_also_what_python_users_expect(kind: type, family: type) -> None:
    assert issubclass(kind, q.Qcow2Error)
    assert issubclass(kind, family)


def test_a_format_error_names_the_file_offset() -> None:
    assert "0x40000" in str(q.FormatError("bad entry", offset=0x40000))


def test_text_from_evidence_is_escaped_in_messages() -> None:
    error = q.MissingFile("backing", "\x1b[2Jbase\u202egpj.exe")
    assert "\x1b" not in str(error)
    assert "\u202e" not in str(error)
    assert "\\x1b" in str(error)


@pytest.mark.parametrize("text", ["a\nb", "a\u2028b", "a\u200bb", "a\u2066b", "a\ufeffb", "a\x00b", "\ud800", "a\x9bb"])
def test_printable_leaves_nothing_a_terminal_would_act_on(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text) != text


def test_printable_is_unambiguous_and_cut() -> None:
    assert printable("a\\x1b") != printable("a\x1b")
    assert printable(b"\xff\xfe") == "\\xff\\xfe"
    assert printable("é") == "é"
    assert printable("x" * 2000) == "x" * 1023 + "…"
