"""``examine``: everything an examiner looks at first, as one folder with one page.

Each part is one of the single commands, run with the command line that is beside it on the page::

    DIR/index.html          what was found, what was not looked at and why, and the way to everything else
        examination.json    the same as data
        audit.html, .json   snapshots.json   recovered.json   diff-N.html, .json   timeline.html, .jsonl
        memory-N.json       residue/         sha256sums.txt
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import Qcow2Error
from ..findings import Severity
from ..reader.writer import whole_folder
from ..text import cut, plural, printable
from . import _examine_parts as parts
from . import add_images_argument, complain
from ._examine_plan import PAIRS, PlannedPart, deleted_memories, left_out, plan
from ._messages import Messages
from .audit import add_fail_on_argument
from .case import add_case_arguments, command_of, run_of
from .notes import repeat_notes
from .options import add_disk_arguments, add_guest_arguments, bytes_of, count_up_to, open_from
from .output import draw_over

HELP = "look at everything first, into one folder with one page"
DESCRIPTION = (
    "Run everything an examiner looks at first, into one folder with one page: a deep audit, snapshots, "
    "deleted snapshots and recovered states, what changed from state to state, the timeline, what each memory "
    "is, and an index of residue. Images are only read."
)
EPILOG = """examples:
  qcow2-forensics examine disk.qcow2 case-17/
  qcow2-forensics examine disk.qcow2 case-17/ --hash --case 17/26 --examiner "A. Lovelace"
  qcow2-forensics examine overlay.qcow2 case-17/ --backing-dir /evidence/templates
  qcow2-forensics examine *.qcow2 case-17/ --no-files
  qcow2-forensics examine disk.qcow2 case-17/ --last 5 --pieces --limit 2G

Open DIR/index.html. The folder gets its name when everything is written: Ctrl-C leaves nothing behind.

exit codes: 0 everything was looked at, 1 findings at or above --fail-on, 2 something could not be looked at:
the page and standard error say what and why
"""

_SCHEMA = 1
_DATA = "examination.json"
_SUMS = "sha256sums.txt"
_NOTES, _WHY = 3, 300  # notes of a part that are its reason, and characters of each
_REASONS = 10  # printed for one image; the page has all
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``examine`` takes."""
    add_images_argument(parser)
    parser.add_argument("folder", metavar="DIR", help="the folder to create")
    parser.add_argument(
        "--force", action="store_true", help="replace DIR where it is the folder of an earlier examination"
    )
    parser.add_argument("--no-files", action="store_true", help="compare ranges of states only, not files")
    parser.add_argument(
        "--last",
        metavar="N",
        type=count_up_to(10**9),
        help=f"compare only the last N pairs of neighbouring states (default: {PAIRS}, fewer where there are very many snapshots)",
    )
    parser.add_argument("--pieces", action="store_true", help="also write the pieces of residue, not only their index")
    parser.add_argument(
        "--limit", metavar="BYTES", type=bytes_of, help="with --pieces: stop writing files after so many bytes"
    )
    add_fail_on_argument(parser)
    add_case_arguments(parser)
    add_disk_arguments(parser, snapshot=False)
    add_guest_arguments(parser)


def run(args: Namespace) -> int:
    """Examine one image or several; 2 when something could not be looked at."""
    target = Path(args.folder)
    replace = _may_replace(target, args)
    for path in args.images:
        _refuse_missing(path)
    with whole_folder(target, replace=replace) as folder:
        if len(args.images) == 1:
            done = [_examine(args, args.images[0], folder)]
        else:
            done = list(_examine_each(args, folder))
            _write_overview(args, done, folder)
        _write_sums(folder)
    for data in done:
        _print_summary(data, several=len(done) > 1)
    print(f"{printable(str(target / 'index.html'))}: open it in a browser")
    if args.fail_on is not None and any(_worst(data) >= args.fail_on for data in done):
        return 1
    return 2 if any(data["not_looked_at"] for data in done) else 0


# --- folders -------------------------------------------------------------------------------------


def _may_replace(target: Path, args: Namespace) -> bool:
    """Return whether there is a folder that the new one replaces; raises where it must not."""
    if not target.is_dir():
        return False  # what else has the name is refused by the writer
    if any(target.iterdir()):
        if not args.force:
            raise Qcow2Error(f"{cut(str(target))} is not empty; name a new folder, or use --force to replace it")
        if not (target / _DATA).is_file():
            raise Qcow2Error(f"{cut(str(target))} is not the folder of an examination and is not replaced")
        resolved = target.resolve()
        inside = next((path for path in args.images if resolved in Path(path).resolve().parents), None)
        if inside is not None:
            raise Qcow2Error(f"{cut(str(target))} holds {cut(inside)}, which is evidence")
    return True


def _refuse_missing(path: str) -> None:
    """Raise where an image cannot be opened at all: before hours of work on the others."""
    from ..format.source import FileSource

    FileSource(path).close()


def _examine_each(args: Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    for number, path in enumerate(args.images, 1):
        name = f"{number:02d}-{_UNSAFE.sub('_', Path(path).name)[:60]}"
        (folder / name).mkdir()
        yield {**_examine(args, path, folder / name), "folder": name}


def _write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file in the folder, as ``sha256sum -c`` reads it."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    (folder / _SUMS).write_text("".join(lines), encoding="utf-8")


def _write_overview(args: Namespace, done: Sequence[Mapping[str, Any]], folder: Path) -> None:
    from ..render.examination_page import render_examinations

    run_facts = run_of(args, (), datetime.now(UTC))  # the files are those of the table
    (folder / "index.html").write_text(render_examinations(done, run_facts), encoding="utf-8")
    shown = [{key: value for key, value in data.items() if key != "report"} for data in done]
    _write_json(folder / _DATA, {"schema": _SCHEMA, "run": run_facts, "images": shown})


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


# --- one image -----------------------------------------------------------------------------------


def _examine(args: Namespace, path: str, folder: Path) -> dict[str, Any]:
    """Run every part over one image, write its page, and return what the page shows."""
    from ..render.examination_page import render_examination
    from ..render.next_commands import commands_after

    started = datetime.now(UTC)
    before = _stamp(path)
    asked = _unlock(args, path)
    steps, unseen = plan(args, path)
    done: list[dict[str, Any]] = []
    for number, step in enumerate(steps, 1):
        if sys.stderr.isatty():
            draw_over(sys.stderr, f"[{number}/{len(steps)}] {printable(f'{path}: {step.title}', 60)}")
        done.append(_run(step, asked, folder))
        if step.kind == "snapshots":  # only now it is known which deleted ones there are
            steps += deleted_memories(args, path, done[-1]["facts"].get("rows") or (), unseen)
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    if _stamp(path) != before:
        unseen.append("the image was changed while it was examined: its parts may be of different contents")
    audited = _audited(done)
    report = audited.pop("report", None)
    not_seen = [{"part": "examination", "why": why} for why in unseen]
    not_seen += [{"part": part["title"], "why": _why(part["notes"])} for part in done if part["code"]]
    run_facts = {**run_of(args, [path], started), **audited.get("run", {})}
    run_facts.pop("next", None)
    data = {
        "schema": _SCHEMA,
        "image": path,
        "run": {**run_facts, "command": command_of(args), "finished": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S UTC}"},
        "exit_code": 2 if not_seen else 0,
        "not_looked_at": not_seen,
        "left_out": left_out(args),
        "parts": done,
        "next": commands_after(path, done),
    }
    (folder / "index.html").write_text(render_examination(data), encoding="utf-8")
    _write_json(folder / _DATA, data)
    return {**data, "report": report}


def _why(notes: Sequence[str]) -> str:
    """Return the first notes of a part as one sentence; the part has all of them."""
    shown = "; ".join(cut(note, _WHY) for note in notes[:_NOTES])
    more = len(notes) - _NOTES
    return (f"{shown}; and {plural(more, 'more note')}" if more > 0 else shown) or "it ended with exit code 2"


def _run(step: PlannedPart, asked: Sequence[bytes], folder: Path) -> dict[str, Any]:
    """Run one part and return what is known of it."""
    from . import build_parser

    given = list(step.command)
    args = build_parser(given[:1]).parse_args(given)
    args.given = given
    args.asked_passphrases = list(asked)
    repeat_notes()
    messages = Messages(sys.stderr)
    begun = time.monotonic()
    with contextlib.redirect_stderr(messages):
        outcome = parts.attempt(step.work, args, folder, step.stem)
    return {
        "kind": step.kind,
        "title": step.title,
        "command": command_of(args),
        "code": outcome.code,
        "files": list(outcome.files),
        "notes": list(dict.fromkeys([*outcome.notes, *messages.sentences])),
        "seconds": round(time.monotonic() - begun, 2),
        "facts": dict(outcome.facts),
    }


def _audited(done: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the audit gave, empty when it gave nothing."""
    return next((part["facts"] for part in done if part["kind"] == "audit"), {})


def _worst(data: Mapping[str, Any]) -> int:
    """Return the severity of the worst finding of an image, -1 without findings."""
    counts = _audited(data["parts"]).get("severities", {})
    return max((int(Severity.parse(name)) for name, count in counts.items() if count), default=-1)


def _unlock(args: Namespace, path: str) -> list[bytes]:
    """Ask once for the passphrases of an encrypted image; the parts get them."""
    if sys.stdin is None or not sys.stdin.isatty():
        return []
    own = Namespace(**{**vars(args), "image": path, "snapshot": None})
    with contextlib.suppress(Qcow2Error, OSError):
        open_from(own).close()  # what is wrong with the image is a note of each part
    asked: list[bytes] = getattr(own, "asked_passphrases", [])
    return asked


def _stamp(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns


def _print_summary(data: Mapping[str, Any], *, several: bool) -> None:
    """Print one line about an image, and on standard error what was not looked at."""
    from ..render.examination_page import by_reason

    counts = _audited(data["parts"]).get("severities", {})
    found = ", ".join(f"{count} {level}" for level, count in reversed(counts.items()) if count) or "no findings"
    print(f"{printable(data['image'])}: {found}; {plural(len(data['parts']), 'part')}")
    name = f"{printable(data['image'])}: " if several else ""
    rows = by_reason(data["not_looked_at"])
    for what, why in rows[:_REASONS]:
        complain(f"{name}not looked at: {printable(what)}: {why}")
    if len(rows) > _REASONS:
        complain(f"{name}{len(rows) - _REASONS} more reasons are on the page")
