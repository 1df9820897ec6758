"""``snapshots``: the internal snapshots of an image as a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..text import FORMATS, Column, plural, printable, short_date, size, snapshot_date, write_table
from . import add_format_argument, add_image_argument, complain

HELP = "list internal snapshots"
DESCRIPTION = "List the internal snapshots of an image; with --deleted also those no table lists any more."
EPILOG = """examples:
  qcow2-forensics snapshots disk.qcow2
  qcow2-forensics snapshots disk.qcow2 --deleted
  qcow2-forensics snapshots damaged.qcow2 --recovered
  qcow2-forensics snapshots disk.qcow2 --format jsonl | jq -r .name
"""
_UNKNOWN = {"text": "unknown: the snapshot table cannot be read", "json": "null"}
_NAME_SHOWN = 40  # characters of an ID or a name in the table for people


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``snapshots`` takes."""
    from .options import bytes_of  # here: info takes the facts of a snapshot from this module, and opens no disk

    add_image_argument(parser)
    add_format_argument(parser, FORMATS)
    parser.add_argument("--deleted", action="store_true", help="also look for deleted snapshots in free space (slow)")
    parser.add_argument(
        "--recovered",
        action="store_true",
        help="list states put together from what is left of a damaged image instead; reads the whole file",
    )
    parser.add_argument(
        "--virtual-size", metavar="BYTES", type=bytes_of, help="with --recovered: the disk's size, where it is known"
    )


def run(args: argparse.Namespace) -> int:
    """Print the snapshots of one image, or its recovered states."""
    if args.recovered:
        return _print_recovered(args)
    with Image(args.image) as image:
        rows = [facts_of(entry) for entry in image.snapshots]
        if args.deleted:
            rows += _deleted(image)
        problem = image.unreadable("snapshots")
    if problem is not None and not rows and args.format in _UNKNOWN:
        print(_UNKNOWN[args.format])
    elif args.format == "text" and not rows:
        print("no snapshots" if args.deleted else "no snapshots (--deleted looks for those that were deleted)")
    else:
        write_table(rows, _TABLE, args.format, sys.stdout)
    if problem is not None:
        complain(str(problem.error()))
        return 2
    return 0


def facts_of(entry: SnapshotEntry) -> dict[str, Any]:
    """Return one snapshot as plain data, its text as the image has it."""
    return {
        "id": entry.id,
        "name": entry.name,
        "date": snapshot_date(entry.date_sec, entry.date_nsec),
        "date_sec": entry.date_sec,
        "date_nsec": entry.date_nsec,
        "vm_clock_nsec": entry.vm_clock_nsec,
        "disk_size": entry.disk_size,
        "vm_state_size": entry.vm_state_size,
        "icount": entry.icount,
        "l1_table_offset": entry.l1_table_offset,
        "l1_size": entry.l1_size,
        "offset": entry.offset,
    }


def _print_recovered(args: argparse.Namespace) -> int:
    from ..recovery import recovered_states

    states = recovered_states(args.image, virtual_size=args.virtual_size)
    rows = [
        {
            "open_as": state.label,
            "what": state.what,
            "memory": state.is_memory,
            "confidence": state.confidence.label,
            "l2_tables": {level.label: count for level, count in state.tables_by_confidence().items()},
            "unplaced_l2_tables": len(state.unplaced),
            "size": state.size,
            "size_from": state.size_from,
            "cluster_size": state.cluster_size,
            "backing_unknown": state.backing_unknown,
            "notes": list(state.notes),
            "search_complete": state.is_search_complete,
        }
        for state in states
    ]
    if args.format == "text" and not rows:
        print("no state can be put together from tables in this file, besides those the image lists")
        return 0
    write_table(rows, _RECOVERED, args.format, sys.stdout)
    if args.format == "text":
        for note in dict.fromkeys(note for state in states for note in state.notes):
            print(f"note: {printable(note)}")
        for state in states:
            if state.unplaced:
                print(f"note: {state.label} leaves out {plural(len(state.unplaced), 'L2 table')} without a known place")
        if any(state.backing_unknown for state in states):
            print(
                "note: without its header it is not known whether the image had a backing file; unallocated ranges read as zeros"
            )
    return 0 if all(state.is_search_complete for state in states) else 2


def _deleted(image: Image) -> list[dict[str, Any]]:
    from ..residue import Residue

    rows = []
    residue = Residue(image)
    found = residue.deleted_snapshots()
    not_followed = sum(not item.followed for item in found)
    for count, what in ((not_followed, "not followed into their tables"), (residue.entries_left_out, "left out")):
        if count:
            complain(f"{count} former snapshot entries were {what}: there are too many")
    problem = image.unreadable("disk")
    if found and problem is not None:
        complain(f"none of them can be opened: {problem.error()}; --recovered lists what can be put together")
    for item in found:
        left = {
            "open_as": None if item.is_gone else item.selector,
            "readable": round(item.readable, 4),
            "rewritable": round(item.rewritable, 4),
            "left": item.what_is_left,
        }
        rows.append({**facts_of(item.entry), "deleted": True, **left})
    return rows


def _clock(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds // 1_000_000, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{rest:03d}"


def _name(row: Mapping[str, Any]) -> str:
    name = printable(row["name"], _NAME_SHOWN)
    if row.get("deleted"):
        name += f" (deleted, {row['left']}" + (f", {row['open_as']})" if row["open_as"] else ")")
    return name


def _tables(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {level}" for level, count in row["l2_tables"].items() if count) or "none"


_RECOVERED = (
    Column("open_as", "OPEN AS"),
    Column("confidence", "CONFIDENCE"),
    Column("size", "DISK SIZE", lambda row: f"{size(row['size'])} ({row['size_from']})"),
    Column("l2_tables", "L2 TABLES", _tables),
    Column("what", "WHAT"),
)

_TABLE = (
    Column("id", "ID", lambda row: printable(row["id"], _NAME_SHOWN)),
    Column("name", "NAME", _name),
    Column("date", "DATE (UTC)", lambda row: short_date(row["date_sec"], row["date_nsec"])),
    Column("vm_clock_nsec", "VM CLOCK", lambda row: _clock(row["vm_clock_nsec"])),
    Column("disk_size", "DISK SIZE", lambda row: "-" if row["disk_size"] is None else size(row["disk_size"])),
    Column("vm_state_size", "VM STATE", lambda row: size(row["vm_state_size"]) if row["vm_state_size"] else "-"),
    Column("l1_table_offset", "L1 OFFSET", lambda row: f"{row['l1_table_offset']:#x}"),
)
