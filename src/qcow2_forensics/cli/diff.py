"""``diff``: which guest ranges, and which files, differ between two states of one image, or of two."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from ..compare.ranges import Change, Difference
from ..text import plural, printable, size
from . import add_image_argument, complain
from ._sides import Sides, sides_of
from .case import add_case_arguments, run_of, wants_run
from .options import add_disk_arguments, add_guest_arguments
from .output import Progress, add_output_arguments, format_of, printing_to

if TYPE_CHECKING:
    from ._diff_files import Files

FORMATS = ("text", "json", "jsonl", "body", "html")

HELP = "show what differs between two states"
DESCRIPTION = "Show which guest ranges, and which files, differ between two states of one image, or of two."
EPILOG = """examples:
  qcow2-forensics diff disk.qcow2 --from before-incident --to active
  qcow2-forensics diff disk.qcow2 --from 1 --to 2 --files --hash
  qcow2-forensics diff disk.qcow2 --from 1 --files --format body > changes.body
  qcow2-forensics diff disk.qcow2 --from 1 --files -o diff.html --case 17/26
  qcow2-forensics diff overlay.qcow2 --from backing
  qcow2-forensics diff disk.qcow2 --from bitmap:daily --files
  qcow2-forensics diff yesterday.qcow2 today.raw --files

A state is the ID or name of a snapshot, "active", "backing" for the disk below an overlay, "index:0" or
"#1" for a place in the snapshot table, or "deleted:X"; "id:X" or "name:X" where the ID or name X means
another state too. Ranges are of the guest's disk. Clusters that the two states share are not read.
--files needs pytsk3: pip install 'qcow2-forensics[tsk]'.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``diff`` takes."""
    add_image_argument(parser)
    parser.add_argument(
        "other",
        metavar="OTHER",
        nargs="?",
        help="another image, or a raw disk, to compare IMAGE with; --from is then a state of IMAGE and --to one of OTHER, "
        "both active by default",
    )
    parser.add_argument(
        "--from",
        dest="first",
        metavar="STATE",
        help="the earlier state (default: the last snapshot; the backing disk when there is none), or bitmap:NAME "
        "for what a dirty bitmap marks as written",
    )
    parser.add_argument("--to", dest="second", metavar="STATE", help="the later state (default: active)")
    parser.add_argument("--files", action="store_true", help="also show the files that differ, in each partition")
    parser.add_argument("--hash", action="store_true", help="with --files: the SHA-256 of both versions of each file")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="output format (default: that of FILE's suffix, else text); body is for mactime and other timeline tools, "
        "and implies --files; html is one page for a case file",
    )
    add_output_arguments(parser, "the differences")
    add_disk_arguments(parser, snapshot=False)
    add_guest_arguments(parser)
    add_case_arguments(parser, hashes=False)


class Compared(NamedTuple):
    """What differs between two states: ranges, files where those were wanted, and what could not be compared."""

    sides: Sides
    found: list[Difference]
    listed: Files | None
    notes: list[str]  # safe on a terminal
    code: int  # 2 when a part could not be compared


def run(args: argparse.Namespace) -> int:
    """Print what differs; 2 when a part could not be read and so could not be compared."""
    args.format = format_of(args, FORMATS) or "text"
    started = datetime.now(UTC)
    with printing_to(args, [path for path in (args.image, args.other) if path]), ExitStack() as stack:
        if args.format in ("text", "jsonl") and not _wants_files(args) and not sys.stdout.isatty():
            return _print_as_found(args, sides_of(args, stack))
        result = compared(args, stack)
        _PRINTERS[args.format](args, result, started)
    for note in result.notes:
        complain(note)
    return result.code


def compared(args: argparse.Namespace, stack: ExitStack) -> Compared:
    """Compare what the options mean; the states stay open until ``stack`` ends."""
    files = _wants_files(args)
    if files:
        from ..files.volumes import need_back_end

        need_back_end()
    sides = sides_of(args, stack)
    notes = list(sides.warnings)
    with Progress("compare", min(sides.before.disk.size, sides.after.disk.size)) as progress:
        found = list(sides.ranges(progress.advance))  # shown when the progress line is gone
    listed = None
    if files:
        from ._diff_files import compare_files  # here: most comparisons are of ranges alone

        listed = compare_files(args, sides, found)
    notes += [*listed.notes, *listed.gaps()] if listed else ()
    notes += _not_compared(_unreadable(found))
    code = 0 if sides.is_trusted and not _unreadable(found) else 2
    return Compared(sides, found, listed, notes, max(code, listed.exit_code if listed else 0))


def _wants_files(args: argparse.Namespace) -> bool:
    return bool(args.files or args.hash or args.format == "body")


# --- ranges --------------------------------------------------------------------------------------


def _print_as_found(args: argparse.Namespace, sides: Sides) -> int:
    """Print ranges as they are found; return the exit code."""
    for warning in sides.warnings:
        complain(warning)
    with Progress("compare", min(sides.before.disk.size, sides.after.disk.size)) as progress:
        unreadable = _print_ranges(args, sides, sides.ranges(progress.advance))
    for note in _not_compared(unreadable):
        complain(note)
    return 2 if unreadable or not sides.is_trusted else 0


def _print_ranges(
    args: argparse.Namespace, sides: Sides, ranges: Iterable[Difference], listed: Files | None = None
) -> int:
    """Print ranges one by one, as text or JSON lines, there with the files; return how many could not be read."""
    text = args.format == "text"
    print(_heading(args, sides) if text else json.dumps(_states_dict(args, sides)))
    total = _Total()
    for item in ranges:
        if text and not total.ranges:
            print(f"{'offset':>18} {'length':>14}  change")
        total.add(item)
        print(_range_line(item) if text else json.dumps({"record": "range", **_range_dict(item)}))
    for record in listed.json_records() if listed else ():
        print(json.dumps(record))
    totals = {**total.to_dict(), **(listed.totals if listed else {})}
    print(total.sentence if text else json.dumps({"record": "summary", **totals}))
    return total.ranges[Change.UNREADABLE]


def _range_line(item: Difference) -> str:
    note = f": {printable(item.note)}" if item.note else ""
    return f"{item.offset:>#18x} {item.length:>#14x}  {item.change}{note}"


def _range_dict(item: Difference) -> dict[str, Any]:
    shown: dict[str, Any] = {"offset": item.offset, "length": item.length, "change": str(item.change)}
    return {**shown, "note": item.note} if item.note else shown


class _Total:
    """How many ranges there are of each change, and how many bytes."""

    def __init__(self, found: Iterable[Difference] = ()) -> None:
        self.ranges: Counter[Change] = Counter()
        self._bytes: Counter[Change] = Counter()
        for item in found:
            self.add(item)

    def add(self, item: Difference) -> None:
        """Count one range."""
        self.ranges[item.change] += 1
        self._bytes[item.change] += item.length

    def to_dict(self) -> dict[str, Any]:
        """Return the totals for JSON; ``ranges`` and ``bytes`` count what could not be compared too."""
        return {
            "ranges": self.ranges.total(),
            "bytes": self._bytes.total(),
            "bytes_not_compared": self._bytes[Change.UNREADABLE],
            "changes": {str(change): count for change, count in self.ranges.items()},
        }

    @property
    def sentence(self) -> str:
        """The totals in words."""
        if not self.ranges:
            return "the two states are equal"
        count, total = self.ranges.total() - self.ranges[Change.UNREADABLE], self._bytes.total()
        unread = self.ranges[Change.UNREADABLE]
        kinds = ", ".join(f"{self.ranges[change]} {change}" for change in Change if self.ranges[change])
        if not unread:
            return f"{plural(count, 'range differs', 'ranges differ')}, {size(total)}: {kinds}"
        not_compared = f"{plural(unread, 'range')} of {size(self._bytes[Change.UNREADABLE])} could not be compared"
        if not count:
            return f"no range that could be compared differs; {not_compared}"
        differing = size(total - self._bytes[Change.UNREADABLE])
        return f"{plural(count, 'range differs', 'ranges differ')}, {differing}; {not_compared}: {kinds}"


def _unreadable(found: Iterable[Difference]) -> int:
    return sum(item.change is Change.UNREADABLE for item in found)


def _not_compared(unreadable: int) -> Iterator[str]:
    if unreadable:
        were = "was" if unreadable == 1 else "were"
        yield f"{plural(unreadable, 'range')} could not be read and {were} not compared"


# --- formats -----------------------------------------------------------------------------------------


def _heading(args: argparse.Namespace, sides: Sides) -> str:
    before, after = sides.before, sides.after
    if args.other is not None:
        return " -> ".join(f"{printable(side.path)} ({printable(side.label)})" for side in (before, after))
    return f"{printable(args.image)}: {printable(before.label)} -> {printable(after.label)}"


def _states_dict(args: argparse.Namespace, sides: Sides) -> dict[str, Any]:
    before, after = sides.before, sides.after
    return {
        "record": "states",
        "image": args.image,
        "from": {"state": before.label, "size": before.disk.size, "image": before.path},
        "to": {"state": after.label, "size": after.disk.size, "image": after.path},
    }


def as_dict(args: argparse.Namespace, result: Compared, started: datetime) -> dict[str, Any]:
    """Return what ``--format json`` prints as plain data."""
    shown = _states_dict(args, result.sides)
    del shown["record"]
    if wants_run(args) or args.format == "html":
        shown["run"] = run_of(args, dict.fromkeys((result.sides.before.path, result.sides.after.path)), started)
    shown["summary"] = _Total(result.found).to_dict()
    shown["ranges"] = [_range_dict(item) for item in result.found]
    if result.listed is not None:
        shown["summary"] |= result.listed.totals
        shown["volumes"] = result.listed.volume_dicts
        shown["files"] = list(result.listed.change_dicts)
    return shown


def as_page(args: argparse.Namespace, result: Compared, started: datetime) -> str:
    """Return what ``--format html`` prints."""
    from ..render.difference_page import render_difference

    rows = None if result.listed is None else result.listed.page_rows()
    total = _Total(result.found).sentence
    return render_difference(as_dict(args, result, started), rows, total=total, notes=result.notes)


def _print_text(args: argparse.Namespace, result: Compared, _started: datetime) -> None:
    if result.listed is None:
        _print_ranges(args, result.sides, result.found)
        return
    print(_heading(args, result.sides))
    print(_Total(result.found).sentence)
    for item in result.found:
        if item.change is Change.UNREADABLE:
            print(_range_line(item))
    for line in result.listed.text_lines():
        print(line)


def _print_json(args: argparse.Namespace, result: Compared, started: datetime) -> None:
    print(json.dumps(as_dict(args, result, started), indent=2))


def _print_html(args: argparse.Namespace, result: Compared, started: datetime) -> None:
    print(as_page(args, result, started), end="")


def _print_lines(args: argparse.Namespace, result: Compared, _started: datetime) -> None:
    _print_ranges(args, result.sides, result.found, result.listed)


def _print_body(_args: argparse.Namespace, result: Compared, _started: datetime) -> None:
    before, after = result.sides.before.label, result.sides.after.label
    for line in result.listed.body_lines(before, after) if result.listed else ():
        print(line)


_PRINTERS = {
    "text": _print_text,
    "json": _print_json,
    "jsonl": _print_lines,
    "body": _print_body,
    "html": _print_html,
}
