"""The page about all findings is generated from the rules and kept fresh."""

from __future__ import annotations

from pathlib import Path

from qcow2_forensics.audit import catalog
from qcow2_forensics.audit.document import page

PAGE = Path(__file__).parent.parent / "docs" / "findings.md"


def test_the_page_is_fresh() -> None:
    stale = "write it again: python -m qcow2_forensics.audit.document > docs/findings.md"
    assert PAGE.read_text(encoding="utf-8") == page(), stale


def test_every_code_is_described_with_its_trigger() -> None:
    for code, entry in catalog().items():
        assert code.startswith("QCOW2-")
        assert entry.when, code
        assert entry.note, code
        assert entry.title, code


def test_rules_conclude_nothing_about_people() -> None:
    for entry in catalog().values():
        told = f"{entry.title} {entry.note} {entry.when}".lower()
        assert not [word for word in ("user deleted", "attacker", "suspect", "malicious") if word in told], entry.code
