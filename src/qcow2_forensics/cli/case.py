"""The facts of a run: who, when, with what, on which files, with which hashes.

They go onto pages, into JSON, and into the files beside an export, a memory or a folder of residue::

    {"source": [{"role", "path", "size", "modified", "device", "inode", "sha256"}, ...],
     "tool", "command", "started", "finished", ...}
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..errors import Qcow2Error
from ..format.source import FileSource, Source, source_name
from ..limits import MiB
from ..reader.disk import Disk
from ..text import TOOL, iso_time
from .output import Progress

if TYPE_CHECKING:
    from ..findings import Report

_PIECE = 4 * MiB
_LIBRARIES = ("numpy", "backports.zstd", "pytsk3", "dfvfs")

# --- options -------------------------------------------------------------------------------------


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


def add_sidecar_arguments(parser: argparse.ArgumentParser, facts: str) -> None:
    """Add the options for a file of ``facts`` beside an output."""
    parser.add_argument("--sidecar", action="store_true", help=f"write OUT.json beside OUT: {facts}")
    add_hash_source_argument(parser)


def add_hash_source_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option of what writes files: their own hashes come anyway, those of the evidence take a whole read."""
    parser.add_argument(
        "--hash-source", action="store_true", help="also add the SHA-256 of each file of the evidence; reads them whole"
    )


def wants_run(args: argparse.Namespace) -> bool:
    """Whether any of the options was given."""
    return bool(args.case or args.examiner or args.note)


# --- of a report ---------------------------------------------------------------------------------


def audit_run(args: argparse.Namespace, report: Report, path: str, started: datetime) -> dict[str, Any]:
    """Return the facts of an audit as plain data; hashing reads every file whole."""
    from ..render.next_commands import next_command

    facts = run_of(args, (path, *report.details.get("files", ())), started, hashed=args.hash)
    commands = {finding.code: next_command(finding, path, report.depth) for finding in reversed(report.findings)}
    return {**facts, "next": commands}


def run_of(
    args: argparse.Namespace, paths: Iterable[str], started: datetime, *, hashed: bool = False
) -> dict[str, Any]:
    """Return the facts of a run over some files as plain data."""
    import platform

    facts = {
        "case": args.case,
        "examiner": args.examiner,
        "note": args.note,
        "started": started.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command": command_of(args),
        "tool": TOOL,
        "system": f"Python {platform.python_version()}, {platform.system()} {platform.release()}",
        "libraries": ", ".join(_libraries()),
        "files": files_of(paths, hashed=hashed),
    }
    return {key: value for key, value in facts.items() if value is not None}


def _libraries() -> Iterator[str]:
    """Yield the libraries that have a part in what is found, with their versions."""
    from importlib import metadata  # here: it brings the parsers of mail, which most audits need none of

    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield f"{name} {metadata.version(name)}"


def files_of(paths: Iterable[str], *, hashed: bool) -> list[dict[str, Any]]:
    """Return the absolute path of each file, with its size and SHA-256 where ``hashed``, or why there is none."""
    return [{"path": os.path.abspath(path), **(_hash_of_file(path) if hashed else {})} for path in paths]


def command_of(args: argparse.Namespace) -> str:
    """Return the command line of a run as it can be typed again."""
    import shlex

    given = getattr(args, "given", None)
    return shlex.join(["qcow2-forensics", *(sys.argv[1:] if given is None else given)])


def _hash_of_file(path: str) -> dict[str, Any]:
    """Return size and SHA-256 of a file, or why there is none."""
    try:
        source = FileSource(path)
    except OSError as error:
        return {"error": error.strerror or str(error)}
    try:
        return {"size": source.size, **_hash(source)}
    finally:
        source.close()


def _hash(source: Source) -> dict[str, Any]:
    """Return the SHA-256 of a source, or why there is none."""
    import hashlib

    digest = hashlib.sha256()
    try:
        with Progress("hash", source.size) as progress:
            for offset in range(0, source.size, _PIECE):
                digest.update(source.read(offset, min(_PIECE, source.size - offset)))
                progress.advance(min(_PIECE, source.size - offset))
    except (Qcow2Error, OSError) as error:
        return {"error": str(error)}
    return {"sha256": digest.hexdigest()}


# --- of an output --------------------------------------------------------------------------------


def now() -> str:
    """Return the time in UTC, to the second."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def origin_of(args: argparse.Namespace, sources: Iterable[tuple[str, object]], started: str) -> dict[str, Any]:
    """Return what an output is from: ``sources`` that were read by their role, the tool, the command, the times."""
    hashed = getattr(args, "hash_source", False)
    files = [{"role": role, **_identity(source, hashed)} for role, source in sources if isinstance(source, Source)]
    return {"source": files, "tool": TOOL, "command": command_of(args), "started": started, "finished": now()}


def sources_of(disk: Disk) -> Iterator[tuple[str, object]]:
    """Yield the files that a disk is read from by their role: the image first, then what it builds on."""
    layer: object = disk
    role = "image"
    while layer is not None:
        if isinstance(layer, Disk):
            yield role, layer.image.source
            if layer.host is not layer.image.source:
                yield "data file", layer.host
        else:
            yield role, getattr(layer, "source", None)
        layer, role = getattr(layer, "backing", None), "backing file"


def _identity(source: Source, hashed: bool) -> dict[str, Any]:
    name = source_name(source)
    identity = getattr(source, "file_identity", None) or getattr(source, "identity", None)
    facts: dict[str, Any] = {"path": os.path.realpath(name) if identity else name, "size": source.size}
    if identity:
        facts["modified"] = iso_time(getattr(source, "mtime_ns", 0))
        facts["device"], facts["inode"] = identity
    return {**facts, **_hash(source)} if hashed else facts


def sidecar_of(args: argparse.Namespace, instead: str) -> str | None:
    """Return the name of the file of facts beside an output, None where none is wanted; raises where it cannot be written.

    ``instead`` is the option that prints the same where the output is no file.
    """
    from ..reader.writer import is_standard_output, refuse_existing  # here: most commands write no file

    if not args.sidecar:
        return None
    if is_standard_output(args.output):
        raise Qcow2Error(f"--sidecar needs a file to be beside; take {instead}, which prints the same")
    path = f"{args.output}.json"
    refuse_existing(path, force=args.force)
    return path


def report_output(
    args: argparse.Namespace, sidecar: str | None, facts: Mapping[str, Any], lines: Iterable[str], *, as_json: bool
) -> None:
    """Write the facts of an output beside it, and print them, on standard error where the output has standard output."""
    from ..reader.writer import atomic_writer, is_standard_output

    if sidecar is not None:
        with atomic_writer(sidecar, force=args.force) as file:
            file.write(json.dumps(facts, indent=1).encode() + b"\n")
    to = sys.stderr if is_standard_output(args.output) else sys.stdout
    for line in [json.dumps(facts)] if as_json else lines:
        print(line, file=to)
