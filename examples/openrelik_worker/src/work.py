"""Audits one image and writes what was found; knows nothing of OpenRelik or Celery."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from qcow2_forensics import Qcow2Error, Report, audit
from qcow2_forensics.errors import reason
from qcow2_forensics.render import render
from qcow2_forensics.residue import residue, write

RESIDUE_LIMIT = 1 << 30  # bytes of residue passed on for one image
DEPTHS = ("triage", "standard", "deep")


@dataclass(frozen=True)
class Written:
    """One file made: where it is, what to call it, what it is."""

    path: Path
    display_name: str
    data_type: str


@dataclass(frozen=True)
class Result:
    """What came of one image; ``error`` says why its residue could not be written."""

    report: Report
    files: tuple[Written, ...]
    residue: tuple[Written, ...] = field(default=())
    error: str = ""

    @property
    def summary(self) -> str:
        """One line: the worst findings, or that there are none."""
        worst = [f"{finding.severity.label}: {finding.title}" for finding in self.report.findings[:3]]
        return "; ".join(worst) or "no findings"


def examine(image: Path, display_name: str, folder: Path, *, depth: str = "standard", carve: bool = False) -> Result:
    """Audit ``image`` and write its reports, and its residue when ``carve``, into ``folder``.

    Never raises for bad evidence: an unreadable image is a report that says so.
    """
    wanted = depth if depth in DEPTHS else "standard"
    report = audit(image, wanted, pictures=True)
    files = []
    for as_format in ("html", "json"):
        path = folder / f"{image.name}.audit.{as_format}"
        path.write_text(render(report, as_format), encoding="utf-8")
        files.append(Written(path, f"{display_name}.audit.{as_format}", f"qcow2:audit:{as_format}"))
    if not carve:
        return Result(report, tuple(files))
    try:
        return Result(report, tuple(files), tuple(_residue(image, display_name, folder)))
    except (Qcow2Error, OSError) as error:
        return Result(report, tuple(files), error=reason(error))


def _residue(image: Path, display_name: str, folder: Path) -> list[Written]:
    target = folder / f"{image.name}.residue"
    with residue(image) as found:
        write(found, target, limit=RESIDUE_LIMIT)
    written = []
    for path in sorted(target.iterdir()):
        kept = folder / f"{image.name}.{path.name}"
        shutil.move(path, kept)
        kind = "qcow2:residue:index" if path.name.startswith("index.") else "qcow2:residue:data"
        written.append(Written(kept, f"{display_name}.{path.name}", kind))
    target.rmdir()
    return written
