"""The parts of an examination: each is a single command, run for its plain data and its files.

A part gets the parsed arguments of that command and the folder to write to. Nothing is computed here: what a part
shows is what the command gives.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import Qcow2Error, reason
from ..files.protocol import NoFileSystem
from ..findings import Report, Severity
from ..format.image import Image
from ..reader.opening import leftover_vm_state
from ..reader.states import labels, spellings
from ..render import render
from ..render.anchors import Anchors
from ..render.image_facts import check_line, heading
from ..render.rows import without_pictures
from ..text import plural, printable
from . import audit, diff, memory, residue, snapshots, timeline

_NOT_WHOLE = ("QCOW2-UNREADABLE", "QCOW2-AUDIT-INCOMPLETE", "QCOW2-AUDIT-LIMITED")  # the audit did not see everything


class PartResult(NamedTuple):
    """What a part gave: exit code, files by name, what it prints about itself, and plain data for the page."""

    code: int
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # safe on a terminal
    facts: Mapping[str, Any] = {}


Work = Callable[[argparse.Namespace, Path, str], PartResult]  # arguments, folder, stem of the names of files


class ListedState(NamedTuple):
    """A state of an image: how it is called, how it is chosen, and whether it holds memory."""

    label: str
    choice: str
    has_memory: bool


def states_of(path: str) -> tuple[list[ListedState], list[ListedState]]:
    """Return the states of the disk in the order of the snapshot table, the active one last, and those with memory."""
    with Image(path) as image:
        label, spelling = labels(image.snapshots), spellings(image.snapshots)
        taken = [ListedState(label(entry), spelling(entry), bool(entry.vm_state_size)) for entry in image.snapshots]
        with_memory = [state for state in taken if state.has_memory]
        if leftover_vm_state(image) is not None:
            with_memory.append(ListedState("leftover", "leftover", True))
        below = [ListedState("backing", "backing", False)] if image.backing_name is not None else []
        return [*below, *taken, ListedState("active", "active", False)], with_memory


def _written(folder: Path, stem: str, contents: Mapping[str, str]) -> tuple[str, ...]:
    """Write the files of a part, each by its suffix, and return their names."""
    for suffix, content in contents.items():
        (folder / f"{stem}.{suffix}").write_text(content, encoding="utf-8")
    return tuple(f"{stem}.{suffix}" for suffix in contents)


def run_audit(args: argparse.Namespace, folder: Path, stem: str) -> PartResult:
    """Audit the image: a page and JSON."""
    report = audit.report_of(args, args.images[0])
    missing = audit.why_missing(report)
    if missing:
        return PartResult(2, notes=(missing,))
    contents = {"html": render(report, "html"), "json": render(without_pictures(report), "json")}
    files = _written(folder, stem, contents)
    unseen = [finding for finding in report.findings if finding.code in _NOT_WHOLE]
    notes = [*audit.left_out(report), *(_sentence(finding.title, finding.evidence) for finding in unseen)]
    return PartResult(2 if unseen else 0, files, tuple(notes), _audit_facts(report, files[0]))


def _sentence(title: str, evidence: Any) -> str:
    return printable("; ".join([title, *(f"{item.field}: {item.value}" for item in evidence[:5])]))


def _audit_facts(report: Report, page: str) -> dict[str, Any]:
    anchors = Anchors(report)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for finding in report.findings:
        row = found.setdefault(
            (finding.code, finding.title),
            {
                "code": finding.code,
                "severity": finding.severity.label,
                "title": finding.title,
                "note": finding.note,
                "number": 0,
                "link": f"{page}#{anchors.finding(finding)}",
            },
        )
        row["number"] += 1
    counts = Counter(finding.severity for finding in report.findings)
    return {
        "heading": heading(report),
        "check": check_line(report),
        "image": dict(report.image),
        "run": report.details.get("run", {}),
        "severities": {severity.label: counts[severity] for severity in sorted(Severity)},
        "findings": list(found.values()),
        "report": without_pictures(report).to_dict(),  # for a page over many images; not in examination.json
    }


def run_snapshots(args: argparse.Namespace, folder: Path, stem: str) -> PartResult:
    """List snapshots, deleted ones, or recovered states as JSON."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        code = snapshots.run(args)
    text = shown.getvalue()
    return PartResult(code, _written(folder, stem, {"json": text}), facts={"rows": json.loads(text)})


def run_diff(args: argparse.Namespace, folder: Path, stem: str) -> PartResult:
    """Compare two states: a page and JSON. Where there is no file system, ranges alone."""
    notes: list[str] = []
    started = datetime.now(UTC)
    with ExitStack() as stack:
        try:
            result = diff.compared(args, stack)
        except NoFileSystem as error:
            notes.append(str(error))
            args.files = False
            result = diff.compared(args, stack)
        data = diff.as_dict(args, result, started)
        page = diff.as_page(args, result, started)
    files = _written(folder, stem, {"html": page, "json": json.dumps(data, indent=2) + "\n"})
    changes = Counter(item["change"] for item in data["files"]) if "files" in data else None
    facts = {"summary": data["summary"], "files": None if changes is None else dict(changes)}
    return PartResult(result.code, files, (*notes, *result.notes), facts)


def run_timeline(args: argparse.Namespace, folder: Path, stem: str) -> PartResult:
    """Gather the dated facts: a page and JSON lines."""
    started = datetime.now(UTC)
    events: list[dict[str, Any]] = []
    notes: list[str] = []
    code = timeline.write(args, timeline.Output(events.append, None, notes.append))
    lines = "".join(json.dumps(event) + "\n" for event in events)
    files = _written(folder, stem, {"html": timeline.as_page(args, events, notes, started), "jsonl": lines})
    return PartResult(code, files, tuple(notes), {"events": len(events)})


def run_memory(args: argparse.Namespace, folder: Path, stem: str) -> PartResult:
    """Say what a memory is, as JSON."""
    facts = memory.facts_of(args)
    files = _written(folder, stem, {"json": json.dumps(facts, indent=1) + "\n"})
    notes = [f"{facts['missing_bytes']} bytes of RAM are not in the stream"] if facts["missing_bytes"] else []
    return PartResult(0 if facts["complete"] else 2, files, tuple(notes), facts)


def run_deleted_memory(args: argparse.Namespace, folder: Path, stem: str) -> PartResult:
    """Say what the memory of a deleted snapshot is; that it is gone is an answer too."""
    try:
        return run_memory(args, folder, stem)
    except Qcow2Error as error:
        return PartResult(0, notes=(f"it cannot be opened any more: {error}",))


def run_residue(args: argparse.Namespace, folder: Path, stem: str) -> PartResult:
    """Index what nothing points at, and write the pieces where that was asked for."""
    args.folder = str(folder / stem)
    summary = residue.write_folder(args)
    notes = residue.doubts(summary)
    if summary.skipped and not args.index_only:
        notes.append(f"{plural(summary.skipped, 'piece is', 'pieces are')} in the index only")
    facts = {
        "pieces": summary.pieces,
        "written": summary.written,
        "kinds": {kind: {"pieces": count, "bytes": total} for kind, (count, total) in summary.by_kind.items()},
        "deleted": list(summary.deleted),
    }
    return PartResult(2 if summary.unseen else 0, (f"{stem}/index.csv", f"{stem}/index.json"), tuple(notes), facts)


def attempt(work: Work, args: argparse.Namespace, folder: Path, stem: str) -> PartResult:
    """Run a part; what ends it early is its note and exit code 2, and the other parts still run."""
    try:
        return work(args, folder, stem)
    except Qcow2Error as error:
        return PartResult(2, notes=(str(error),))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # nothing that follows could be written either
        name = f"{error.filename}: " if error.filename else ""
        return PartResult(2, notes=(printable(f"{name}{error.strerror or reason(error)}"),))
    except ImportError as error:
        return PartResult(2, notes=(printable(f"a package is missing: {error}"),))
    except Exception as error:  # noqa: BLE001 - a defect in one part must not cost the others; it is reported
        return PartResult(
            2, notes=(printable(f"a defect of this tool ended this part: {type(error).__name__}: {error}"),)
        )
