"""``timeline``: every dated fact of an image and of the files in its states, for timeline tools."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from ..files.lines import body_line, mode_text
from ..files.protocol import NoFileSystem
from ..files.records import FileRecord
from ..files.volumes import need_back_end
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..reader.disk import Disk, Layer
from ..reader.states import Choice, labels
from ..render.timeline_page import render_timeline
from ..text import cut, date_note, iso_time, printable, quoted, snapshot_time
from . import _files, add_image_argument, complain
from .case import add_case_arguments, run_of
from .options import add_disk_arguments, add_guest_arguments, chosen, open_from, open_layer
from .output import Progress, add_output_arguments, format_of, printing_to

FORMATS = ("body", "jsonl", "html")

HELP = "print every dated fact for timeline tools"
DESCRIPTION = "Print snapshot times and the file times of every state, as a body file or for Timesketch."
EPILOG = """examples:
  qcow2-forensics timeline disk.qcow2 | mactime -b - -d -z UTC
  qcow2-forensics timeline disk.qcow2 -o timesketch.jsonl
  qcow2-forensics timeline disk.qcow2 --state before-incident --state active
  qcow2-forensics timeline disk.qcow2 --no-files --deleted -o timeline.html

Every line names the state it is from; by default all states are listed, the active one last. Files
need pytsk3: pip install 'qcow2-forensics[tsk]'. The JSON lines have the fields Timesketch asks for.
"""

_SECOND = 1_000_000_000  # nanoseconds
_FILE_TIMES = (
    ("modified", "Content Modification Time"),
    ("accessed", "Last Access Time"),
    ("changed", "Metadata Modification Time"),
    ("created", "Creation Time"),
)


class ImageEvent(NamedTuple):
    """One dated fact of the image itself; ``time`` is nanoseconds of the epoch. ``message`` is as the image has it."""

    time: int
    description: str
    message: str
    state: str
    kind: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``timeline`` takes."""
    add_image_argument(parser)
    files = parser.add_mutually_exclusive_group()
    files.add_argument(
        "--state",
        metavar="STATE",
        action="append",
        default=[],
        help='a state whose files to list: the ID or name of a snapshot, "active", "backing" or others as in "diff" '
        "(repeatable; default: all)",
    )
    files.add_argument("--no-files", action="store_true", help="only what the image itself dates")
    parser.add_argument(
        "--deleted", action="store_true", help="also date the snapshots that no table lists any more (slow)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="a body file for mactime, JSON lines for Timesketch, or one page for a case file (default: that of FILE's "
        "suffix, else body)",
    )
    add_output_arguments(parser, "the timeline")
    add_disk_arguments(parser, snapshot=False)
    add_guest_arguments(parser)
    add_case_arguments(parser, hashes=False)


def run(args: argparse.Namespace) -> int:
    """Print the timeline; what cannot be listed is reported on standard error."""
    args.format = format_of(args, FORMATS) or "body"
    with printing_to(args, [args.image]):
        return _print(args)


def _print(args: argparse.Namespace) -> int:
    started = datetime.now(UTC)
    if args.format == "html":
        events: list[dict[str, Any]] = []
        notes: list[str] = []
        code = write(args, Output(events.append, None, notes.append))
        print(as_page(args, events, notes, started), end="")
        for note in notes:
            complain(note)
        return code
    if args.format == "body":
        return write(args, Output(None, print, complain))
    return write(args, Output(lambda event: print(json.dumps(event)), None, complain))


class Output(NamedTuple):
    """Who takes the dated facts: as mappings, as lines of a body file; and notes on what is not listed."""

    event: Callable[[dict[str, Any]], object] | None
    body: Callable[[str], object] | None
    note: Callable[[str], object]


def as_page(args: argparse.Namespace, events: Iterable[dict[str, Any]], notes: Sequence[str], started: datetime) -> str:
    """Return what ``--format html`` prints."""
    return render_timeline(events, args.image, run=run_of(args, [args.image], started), notes=notes)


def write(args: argparse.Namespace, out: Output) -> int:
    """Give every dated fact that the options mean to ``out``; return the exit code."""
    if not args.no_files:
        need_back_end()
    with Image(args.image) as image:
        events = list(image_events(image, _modified(args.image)))
        if args.deleted:
            events += _deleted_events(image, out)
        snapshots = image.snapshots
        unread = [problem for part in ("snapshots", "bitmaps") if (problem := image.unreadable(part)) is not None]
    states: list[Choice] = []  # a choice that means none is an error before anything is printed
    if not args.no_files:
        states = [chosen(args.image, text) for text in args.state] or [*snapshots, None]
    for event in events:
        if out.event is not None:
            out.event(_event_dict(event, args.image))
        if out.body is not None:
            out.body(_event_body(event))
    for problem in unread:
        out.note(f"dated facts are missing: {problem.error()}")
    code = 2 if unread else 0
    label = labels(snapshots)
    with ExitStack() as stack:
        base: Disk | None = None  # of which the other states are read without opening the image again
        for state in states:
            if not _is_listed(state):
                disk: Layer = open_layer(args, state, stack)
            elif base is None:
                disk = base = stack.enter_context(open_from(args, state))
            else:
                disk = base.at(state)
            code = max(code, _write_files(args, disk, label(state), out))
    return code


def _is_listed(state: Choice) -> TypeGuard[SnapshotEntry | None]:
    """Whether a state is the active one or in the snapshot table."""
    return state is None or (isinstance(state, SnapshotEntry) and state.index >= 0)


# --- the image -----------------------------------------------------------------------------------


def image_events(image: Image, modified: int | None) -> Iterator[ImageEvent]:
    """Yield what the image dates; ``modified`` is the time of its file, in nanoseconds.

    Bitmaps carry no date. They are listed with the time the file was last written, as what it held
    then.
    """
    label = labels(image.snapshots)
    for entry in image.snapshots:
        what = f"snapshot {quoted(entry.name)} (ID {cut(entry.id)})"
        yield _taken(entry, what, label(entry), "snapshot")
    if image.header.version == 1 and image.header.mtime:
        yield ImageEvent(
            image.header.mtime * _SECOND,
            "Header Modification Time",
            "modification time in the header of a version 1 image",
            "active",
            "qcow1_mtime",
        )
    if modified is None:
        return
    for bitmap in image.bitmaps:
        current = "current" if image.bitmaps_current else "not kept up to date"
        yield ImageEvent(
            modified,
            "Image File Modification Time",
            f"the image held bitmap {quoted(bitmap.name)} ({current}, {bitmap.granularity} bytes a bit) "
            "when it was last written",
            "active",
            "bitmap",
        )


def _deleted_events(image: Image, out: Output) -> Iterator[ImageEvent]:
    """Yield when the snapshots were taken that no table lists any more."""
    from ..residue import Residue

    found = Residue(image)
    entries, _ = found.entries()
    label = labels(image.snapshots)
    for entry in entries:
        what = f"deleted snapshot {quoted(entry.name)} (ID {cut(entry.id)}, entry at {entry.offset:#x})"
        yield _taken(entry, what, label(entry), "deleted_snapshot")
    if found.entries_left_out:
        out.note(f"{found.entries_left_out} former snapshot entries were left out: there are too many")


def _taken(entry: SnapshotEntry, what: str, state: str, kind: str) -> ImageEvent:
    """Return when a snapshot was taken, and with what."""
    parts = [f"guest clock {entry.vm_clock_nsec / _SECOND:.3f} s"] if entry.vm_clock_nsec else []
    if entry.vm_state_size:
        parts.append(f"{entry.vm_state_size} bytes of VM state")
    note = date_note(entry.date_nsec)
    details = (f" with {' and '.join(parts)}" if parts else "") + (f" ({note})" if note else "")
    time = snapshot_time(entry.date_sec, entry.date_nsec)
    return ImageEvent(time, "Snapshot Creation Time", f"{what} was taken{details}", state, kind)


def _modified(path: str) -> int | None:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return None


def _event_body(event: ImageEvent) -> str:
    times = (event.time // _SECOND,) * 4  # mactime prints a row without a date for each that is 0
    name = printable(f"[{cut(event.state)}] {event.message}", 4096).replace("|", "\\x7c")
    return "|".join(["0", name, "0", "-/----------", "0", "0", "0", *map(str, times)])


def _event_dict(event: ImageEvent, image: str) -> dict[str, Any]:
    return _shown(event.time, event.message, event.description, event.state, image, data_type=f"qcow2:{event.kind}")


# --- files -----------------------------------------------------------------------------------------


def _write_files(args: argparse.Namespace, disk: Layer, state: str, out: Output) -> int:
    """Write the files of one state; return the exit code."""
    try:
        volumes = _files.volumes_of(args, disk, f"{args.image}, state {state}")
    except NoFileSystem as error:
        out.note(str(error))
        return 0
    # On a terminal the lines themselves show how far it is.
    stream = io.StringIO() if sys.stdout.isatty() else sys.stderr
    with Progress(f"list {state}", 0, unit="names", stream=stream) as progress:
        for system in volumes.systems:
            for record in system.records(names=True):
                progress.advance(1)
                if out.body is not None:
                    out.body(body_line(record, f"[{printable(state)}] {printable(record.volume.prefix)}"))
                if out.event is not None:
                    for event in _record_events(record, state, args.image):
                        out.event(event)
    for problem in (*volumes.read_errors, *(one for system in volumes.systems for one in system.problems)):
        out.note(f"{printable(state)}: {problem}")
    not_listed = [item for item in volumes.unread if not item.blank]
    for item in not_listed:
        out.note(f"{printable(state)}: the files of {_files.volume_label(item.volume)} are not listed: {item.why}")
    return 2 if volumes.is_incomplete or any(item.holds_files for item in not_listed) else 0


def _record_events(record: FileRecord, state: str, image: str) -> Iterator[dict[str, Any]]:
    shown = f"{record.full_path} (deleted)" if not record.allocated else record.full_path
    for name, description in _FILE_TIMES:
        time = getattr(record.times, name)
        if time:
            yield _shown(
                time,
                f"[{state}] {shown}",
                f"{description} ($FILE_NAME)" if record.of_name else description,
                state,
                image,
                data_type="fs:stat",
                filename=record.full_path,
                inode=record.address,
                file_size=record.size,
                mode=mode_text(record),
                is_allocated=record.allocated,
                filesystem=record.volume.kind,
                backend=record.volume.backend,
                partition=record.volume.number,
            )


def _shown(time: int, message: str, description: str, state: str, image: str, **more: Any) -> dict[str, Any]:
    # A time no calendar holds is left out of the text form only: the number says what was stored.
    return {
        "message": message,
        "datetime": iso_time(time) or "1970-01-01T00:00:00.000000+00:00",
        "timestamp": time // 1000,
        "timestamp_desc": description,
        "state": state,
        "image": image,
        **more,
    }
