"""``diff``: which guest ranges, and which files, differ between two states of one image, or of two."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from ..compare.ranges import Change, Difference
from ..files.volumes import need_back_end
from ..text import plural, printable, size
from . import _diff_files, _files
from ._diff_files import Files
from ._sides import Side, sides_of
from .options import add_disk_arguments, add_image_argument
from .output import Progress

_EPILOG = """examples:
  qcow2-forensics diff disk.qcow2 --from before-incident --to active
  qcow2-forensics diff disk.qcow2 --from 1 --to 2 --files --hash
  qcow2-forensics diff disk.qcow2 --from 1 --files --format body > changes.body
  qcow2-forensics diff overlay.qcow2 --from backing
  qcow2-forensics diff disk.qcow2 --from bitmap:daily --files
  qcow2-forensics diff yesterday.qcow2 today.raw --files

A state is the ID or name of a snapshot, "active", "backing" for the disk below an overlay, "index:0" or
"#1" for a place in the snapshot table, or "deleted:X". "id:X" and "name:X" are taken for nothing else.
Ranges are of the guest's disk. Clusters that the two states share are not read. --files needs
pytsk3: pip install 'qcow2-forensics[tsk]'.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``diff`` to the command line."""
    parser = subparsers.add_parser(
        "diff",
        help="show what differs between two states",
        description="Show which guest ranges, and which files, differ between two states of one image.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
        choices=("text", "json", "jsonl", "body"),
        default="text",
        help="output format (default: text); body is for mactime and other timeline tools, and implies --files",
    )
    add_disk_arguments(parser, snapshot=False)
    _files.add_guest_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what differs; 2 when a part could not be read and so could not be compared."""
    files = args.files or args.hash or args.format == "body"
    if files:
        need_back_end()
    with ExitStack() as stack:
        sides = sides_of(args, stack)
        before, after = sides.before, sides.after
        for sentence in sides.warnings:
            _files.complain(sentence)
        code = 0 if sides.is_trusted else 2
        with Progress("compare", min(before.disk.size, after.disk.size)) as progress:
            ranges = sides.ranges(progress.advance)
            if not files and args.format in ("text", "jsonl") and not sys.stdout.isatty():
                return max(code, _print_ranges(args, before, after, ranges))
            found = list(ranges)  # printed when the progress line is gone
        if not files and args.format in ("text", "jsonl"):
            return max(code, _print_ranges(args, before, after, found))
        listed = _diff_files.compare_files(args, sides, found) if files else None
        _PRINTERS[args.format](args, before, after, found, listed)
        if listed is not None:
            _report_unread(listed)
        return max(code, _verdict(_unreadable(found)), listed.exit_code if listed else 0)


# --- ranges --------------------------------------------------------------------------------------


def _print_ranges(args: argparse.Namespace, before: Side, after: Side, ranges: Iterable[Difference]) -> int:
    """Print ranges as they are found; return the exit code."""
    text = args.format == "text"
    print(_heading(args, before, after) if text else json.dumps(_states_dict(args, before, after)))
    counts: Counter[Change] = Counter()
    total = 0
    for item in ranges:
        if text and not counts:
            print(f"{'offset':>18} {'length':>14}  change")
        counts[item.change] += 1
        total += item.length
        print(_range_line(item) if text else json.dumps({"record": "range", **_range_dict(item)}))
    print(_summary(counts, total) if text else json.dumps({"record": "summary", **_totals(counts, total)}))
    return _verdict(counts[Change.UNREADABLE])


def _range_line(item: Difference) -> str:
    note = f": {printable(item.note)}" if item.note else ""
    return f"{item.offset:>#18x} {item.length:>#14x}  {item.change}{note}"


def _range_dict(item: Difference) -> dict[str, Any]:
    shown: dict[str, Any] = {"offset": item.offset, "length": item.length, "change": str(item.change)}
    return {**shown, "note": item.note} if item.note else shown


def _totals(counts: Counter[Change], total: int) -> dict[str, Any]:
    return {"ranges": sum(counts.values()), "bytes": total, "changes": {str(key): counts[key] for key in counts}}


def _counted(found: Iterable[Difference]) -> tuple[Counter[Change], int]:
    items = list(found)
    return Counter(item.change for item in items), sum(item.length for item in items)


def _summary(counts: Counter[Change], total: int) -> str:
    if not counts:
        return "the two states are equal"
    parts = ", ".join(f"{counts[change]} {change}" for change in Change if counts[change])
    ranges = sum(counts.values())
    return f"{ranges} {'range differs' if ranges == 1 else 'ranges differ'}, {size(total)}: {parts}"


def _unreadable(found: Iterable[Difference]) -> int:
    return sum(item.change is Change.UNREADABLE for item in found)


def _verdict(unreadable: int) -> int:
    if unreadable:
        were = "was" if unreadable == 1 else "were"
        print(
            f"qcow2-forensics: {plural(unreadable, 'range')} could not be read and {were} not compared", file=sys.stderr
        )
        return 2
    return 0


def _report_unread(listed: Files) -> None:
    for item in listed.unread:
        if item.hides_changes:
            where = _files.volume_label(item.unread.volume)
            _files.complain(f"{size(item.changed_bytes)} differ in {where}, whose files are not listed")
    if listed.is_incomplete:
        _files.complain("parts of the file systems could not be read: files may be missing above")


# --- formats -----------------------------------------------------------------------------------------


def _heading(args: argparse.Namespace, before: Side, after: Side) -> str:
    if args.other is not None:
        return " -> ".join(f"{printable(side.path)} ({printable(side.label)})" for side in (before, after))
    return f"{printable(args.image)}: {printable(before.label)} -> {printable(after.label)}"


def _states_dict(args: argparse.Namespace, before: Side, after: Side) -> dict[str, Any]:
    return {
        "record": "states",
        "image": args.image,
        "from": {"state": before.label, "size": before.disk.size, "image": before.path},
        "to": {"state": after.label, "size": after.disk.size, "image": after.path},
    }


def _print_text(
    args: argparse.Namespace, before: Side, after: Side, found: list[Difference], listed: Files | None
) -> None:
    print(_heading(args, before, after))
    print(_summary(*_counted(found)))
    for item in found:
        if item.change is Change.UNREADABLE:
            print(_range_line(item))
    for line in _diff_files.text_lines(listed) if listed else ():
        print(line)


def _print_json(
    args: argparse.Namespace, before: Side, after: Side, found: list[Difference], listed: Files | None
) -> None:
    shown = _states_dict(args, before, after)
    del shown["record"]
    shown["summary"] = _totals(*_counted(found))
    shown["ranges"] = [_range_dict(item) for item in found]
    if listed is not None:
        shown["summary"] |= _diff_files.totals(listed)
        shown["volumes"] = _diff_files.volume_dicts(listed)
        shown["files"] = [_diff_files.file_dict(change) for change in listed.changes]
    print(json.dumps(shown, indent=2))


def _print_lines(
    args: argparse.Namespace, before: Side, after: Side, found: list[Difference], listed: Files | None
) -> None:
    print(json.dumps(_states_dict(args, before, after)))
    for item in found:
        print(json.dumps({"record": "range", **_range_dict(item)}))
    for volume in _diff_files.volume_dicts(listed) if listed else ():
        print(json.dumps({"record": "volume", **volume}))
    for change in listed.changes if listed else ():
        print(json.dumps({"record": "file", **_diff_files.file_dict(change)}))
    outside = _diff_files.totals(listed) if listed else {}
    print(json.dumps({"record": "summary", **_totals(*_counted(found)), **outside}))


def _print_body(
    _args: argparse.Namespace, before: Side, after: Side, _found: list[Difference], listed: Files | None
) -> None:
    for line in _diff_files.body_lines(listed, before.label, after.label) if listed else ():
        print(line)


_PRINTERS = {"text": _print_text, "json": _print_json, "jsonl": _print_lines, "body": _print_body}
