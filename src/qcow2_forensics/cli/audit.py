"""``audit``: what an examiner needs to know about an image, with the offsets to prove it."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from ..audit import audit
from ..audit.rules import Depth
from ..findings import EVIDENCE_LIMIT, Report, Severity
from ..reader.writer import atomic_writer, is_standard_output, refuse_existing
from ..render import FORMATS, render
from ..text import printable
from . import EXIT_DONE, EXIT_FAILED, EXIT_FINDINGS, add_images_argument, complain
from .case import add_case_arguments, audit_run, wants_run
from .options import add_backing_folders, add_key_arguments, count_up_to
from .output import add_output_arguments, format_of

_UNREADABLE = "QCOW2-UNREADABLE"
LIMITED = "QCOW2-AUDIT-LIMITED"
DEPTHS = tuple(depth.label for depth in Depth)  # from the least to the most that is read

HELP = "examine images and report findings"
DESCRIPTION = "Examine images: integrity, hidden and residual data, references, provenance. Images are only read."
EPILOG = """examples:
  qcow2-forensics audit disk.qcow2
  qcow2-forensics audit disk.qcow2 --depth deep --format html -o report.html
  qcow2-forensics audit disk.qcow2 --fail-on high && echo fine
  find /cases -name '*.qcow2' | qcow2-forensics audit --files-from - --jobs 4 --resume audit.jsonl

exit codes: 0 done, 1 findings at or above --fail-on, 2 could not complete
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``audit`` takes."""
    add_images_argument(parser, "*")
    parser.add_argument(
        "--depth",
        choices=DEPTHS,
        default="standard",
        help="triage reads headers and names, standard all tables (default), deep free space and slack too",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=None,
        help="output format (default: that of FILE's suffix, else text, for many images jsonl)",
    )
    add_output_arguments(parser, "the report")
    parser.add_argument("-v", "--verbose", action="store_true", help="text: show all evidence that was kept")
    add_fail_on_argument(parser)
    add_backing_folders(parser, "a further folder in which backing and data files may be opened (repeatable)")
    add_case_arguments(parser)
    add_key_arguments(parser, "taken as by the other commands, and not used: no finding needs the key")
    fleet = parser.add_argument_group("many images")
    fleet.add_argument("--files-from", metavar="LIST", help="file with one image path a line, - for standard input")
    fleet.add_argument(
        "--jobs", metavar="N", type=count_up_to(256), default=1, help="audit N images at a time (default: 1)"
    )
    fleet.add_argument(
        "--resume",
        metavar="OUT.jsonl",
        help="append one line per image as it completes, and skip images this file already has",
    )


def add_fail_on_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option for the exit code of findings."""
    parser.add_argument(
        "--fail-on",
        metavar="SEVERITY",
        type=_severity,
        help="exit with 1 when a finding is at or above info, low, medium, high or critical (default: never)",
    )


def _severity(text: str) -> Severity:
    try:
        return Severity.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Audit one image or many."""
    if args.output is not None and is_standard_output(args.output):
        args.output = None
    args.format = format_of(args, FORMATS)
    if args.files_from or args.resume or len(args.images) != 1:
        from .fleet import run_fleet

        return run_fleet(args)
    return _one(args, args.images[0])


def _one(args: argparse.Namespace, path: str) -> int:
    if args.output:
        refuse_existing(args.output, force=args.force, evidence=[path])
    wanted = args.format or "text"
    is_page = wanted == "html"
    report = report_of(args, path, wants_facts=is_page or args.hash or wants_run(args), pictures=is_page)
    missing = why_missing(report)
    if missing:
        complain(missing)
        return EXIT_FAILED
    if args.output:
        with atomic_writer(args.output, force=args.force, evidence=[path]) as stream:
            stream.write(_rendered(args, report, wanted, None).encode())
    else:
        sys.stdout.write(_rendered(args, report, wanted, sys.stdout))
        sys.stdout.flush()
    for line in left_out(report):
        complain(line)
    return exit_code(report, args.fail_on)


def report_of(args: argparse.Namespace, path: str, *, wants_facts: bool = True, pictures: bool = True) -> Report:
    """Audit one image as the options say; ``wants_facts`` adds those of the run, ``pictures`` those of the page."""
    from ..reader.resolver import COMMAND_LINE, Resolver

    started = datetime.now(UTC)
    resolver = Resolver(folders=args.backing_dir, remedies=COMMAND_LINE)
    report = audit(path, args.depth, resolver=resolver, pictures=pictures)
    if wants_facts and not why_missing(report):
        report = replace(report, details={**report.details, "run": audit_run(args, report, path, started)})
    return report


def left_out(report: Report) -> Iterator[str]:
    """Yield what the report does not list, a line each."""
    for finding in report.findings:
        if finding.code == LIMITED:
            yield from (f"{printable(item.field)}: {printable(str(item.value))}" for item in finding.evidence)
    capped = [finding for finding in report.findings if finding.count > len(finding.evidence) >= EVIDENCE_LIMIT // 2]
    if capped:
        shown = ", ".join(f"{finding.code} {len(finding.evidence)} of {finding.count}" for finding in capped)
        yield f"not all evidence is listed: {shown}"


def why_missing(report: Report) -> str:
    """Return why nothing at all could be read: no such file, no permission; empty otherwise."""
    if report.image.get("version") is None and report.image.get("file_size") is None:
        finding = next((item for item in report.findings if item.code == _UNREADABLE), None)
        return printable(str(finding.evidence[0].value)) if finding and finding.evidence else "cannot be read"
    return ""


def _rendered(args: argparse.Namespace, report: Report, wanted: str, stream: Any) -> str:
    terminal = stream is not None and stream.isatty()
    if wanted != "text":
        return render(report, wanted)
    from ..render.plain import render_text

    width = min(shutil.get_terminal_size().columns, 140) if terminal else 100
    colour = terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return render_text(report, width=max(width, 40), colour=colour, items=100 if args.verbose else 5)


def exit_code(report: Report, fail_on: Severity | None) -> int:
    """Return 1 when a finding reaches the threshold, 2 when the file was no image, else 0."""
    if fail_on is not None and report.at_least(fail_on):
        return EXIT_FINDINGS
    return EXIT_FAILED if any(finding.code == _UNREADABLE for finding in report.findings) else EXIT_DONE
