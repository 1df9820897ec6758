"""The page about all findings is generated from the rules and kept fresh."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from qcow2_forensics.audit import catalog

ROOT = Path(__file__).parent.parent


def test_the_page_is_fresh() -> None:
    command = [sys.executable, ROOT / "tools" / "write_findings_page.py"]
    page = subprocess.run(command, capture_output=True, check=True, text=True, encoding="utf-8").stdout
    stale = "write it again: tools/write_findings_page.py > docs/findings.md"
    assert (ROOT / "docs" / "findings.md").read_text(encoding="utf-8") == page, stale


def test_every_code_is_described_with_its_trigger() -> None:
    for code, entry in catalog().items():
        assert code.startswith("QCOW2-")
        assert entry.when, code
        assert entry.note, code
        assert entry.title, code


def test_rules_conclude_nothing_about_people() -> None:
    for entry in catalog().values():
        reported = f"{entry.title} {entry.note} {entry.when}".lower()
        assert not [word for word in ("user deleted", "attacker", "suspect", "malicious") if word in reported], (
            entry.code
        )
