"""The plugin ``qcow2.audit.Audit``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from volatility3.framework import interfaces
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints

from .evidence import ABSENT, EvidencePlugin, Row, hexadecimal
from .options import optional_flag

if TYPE_CHECKING:
    from qcow2_forensics import Evidence, Finding


class Audit(EvidencePlugin):
    """Lists what the structures of a QCOW2 image show: damage, hidden data, contradictions.

    Observations with stable codes and severities; the conclusions are the examiner's.
    """

    hidden = False
    columns = (
        ("Severity", str),
        ("Code", str),
        ("Count", int),
        ("Offset", format_hints.Hex),
        ("Title", str),
        ("Note", str),
    )

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        return [
            *super().get_requirements(),
            requirements.ChoiceRequirement(
                name="depth",
                choices=["triage", "standard", "deep"],
                description="How much is read: header and tables, all metadata, or data too",
                default="standard",
                optional=True,
            ),
            optional_flag("evidence", "Show each piece of evidence below its finding"),
        ]

    def _rows(self) -> Iterator[Row]:
        from qcow2_forensics import audit

        report = audit(self.source(), depth=self.config.get("depth", "standard"))
        for finding in sorted(report.findings, key=lambda item: -item.severity):
            yield 0, _finding(finding)
            if self.config.get("evidence", False):
                for item in finding.evidence:
                    yield 1, _evidence(finding, item)


def _finding(finding: Finding) -> tuple[Any, ...]:
    from qcow2_forensics.text import printable

    offset = next((item.offset for item in finding.evidence if item.offset is not None), None)
    count = finding.count or len(finding.evidence) or 1
    title, note = printable(finding.title), printable(finding.note)
    return finding.severity.label, finding.code, count, hexadecimal(offset), title, note


def _evidence(finding: Finding, item: Evidence) -> tuple[Any, ...]:
    from qcow2_forensics.text import printable

    where = f" in {printable(item.structure)}" if item.structure else ""
    title = f"{printable(item.field)}{where}"
    return finding.severity.label, finding.code, ABSENT(), hexadecimal(item.offset), title, printable(str(item.value))
