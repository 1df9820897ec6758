"""The facts of a run for a case file: who, when, with what, on which files."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from ..findings import TOOL, Report
from ..format.source import FileSource
from ..limits import MiB
from ..render.next_commands import next_command
from .output import Progress

_PIECE = 4 * MiB


def add_case_arguments(parser: argparse.ArgumentParser, *, hashes: bool = True) -> None:
    """Add the options of a report that goes into a case; ``hashes`` also that for hashes of whole files."""
    group = parser.add_argument_group("for the case file (HTML, and JSON when one of them is given)")
    if hashes:
        group.add_argument(
            "--hash", action="store_true", help="add the SHA-256 of the image and of every file it leads to"
        )
    group.add_argument("--case", metavar="TEXT", help="the number or name of the case")
    group.add_argument("--examiner", metavar="TEXT", help="who examines")
    group.add_argument("--note", metavar="TEXT", help="a remark")


def wants_run(args: argparse.Namespace) -> bool:
    """Whether any of the options was given."""
    return bool(args.case or args.examiner or args.note)


def audit_run(args: argparse.Namespace, report: Report, path: str, started: datetime) -> dict[str, Any]:
    """Return the facts of an audit as plain data; hashing reads every file whole."""
    facts = run_of(args, (path, *report.details.get("files", ())), started, hashed=args.hash)
    commands = {finding.code: next_command(finding, path, report.depth) for finding in reversed(report.findings)}
    return {**facts, "next": commands}


def run_of(
    args: argparse.Namespace, paths: Iterable[str], started: datetime, *, hashed: bool = False
) -> dict[str, Any]:
    """Return the facts of a run over some files as plain data."""
    files = [{"path": os.path.abspath(path), **(_hashed(path) if hashed else {})} for path in paths]
    facts = {
        "case": args.case,
        "examiner": args.examiner,
        "note": args.note,
        "started": started.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command": shlex.join(["qcow2-forensics", *sys.argv[1:]]),
        "tool": TOOL,
        "system": f"Python {platform.python_version()}, {platform.system()} {platform.release()}",
        "files": files,
    }
    return {key: value for key, value in facts.items() if value is not None}


def _hashed(path: str) -> dict[str, Any]:
    """Return size and SHA-256 of a file, or why there is none."""
    digest = hashlib.sha256()
    try:
        source = FileSource(path)
    except OSError as error:
        return {"error": error.strerror or str(error)}
    try:
        with Progress("hash", source.size) as progress:
            for offset in range(0, source.size, _PIECE):
                digest.update(source.read(offset, min(_PIECE, source.size - offset)))
                progress.advance(min(_PIECE, source.size - offset))
        return {"size": source.size, "sha256": digest.hexdigest()}
    except OSError as error:
        return {"error": str(error)}
    finally:
        source.close()
