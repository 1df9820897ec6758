"""``snapshots``: the internal snapshots of an image as a table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..text import columns, printable, size
from .options import add_image_argument

_EPILOG = """examples:
  qcow2-forensics snapshots disk.qcow2
  qcow2-forensics snapshots disk.qcow2 --deleted
  qcow2-forensics snapshots disk.qcow2 --format jsonl | jq -r .name
"""
_HEADINGS = ("ID", "NAME", "DATE (UTC)", "VM CLOCK", "DISK SIZE", "VM STATE", "L1 OFFSET")


def add_parser(subparsers: Any) -> None:
    """Add ``snapshots`` to the command line."""
    parser = subparsers.add_parser(
        "snapshots",
        help="list internal snapshots",
        description="List the internal snapshots of an image; with --deleted also those no table lists any more.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_image_argument(parser)
    parser.add_argument("--format", choices=("text", "json", "jsonl"), default="text", help="default: text")
    parser.add_argument("--deleted", action="store_true", help="also look for deleted snapshots in free space (slow)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the snapshots of one image."""
    with Image(args.image) as image:
        rows = [facts_of(entry) for entry in image.snapshots]
        if args.deleted:
            rows += _deleted(image)
        problem = next((found for found in image.problems if "snapshots" in found.blocks), None)
    if args.format == "json":
        print(json.dumps(rows, indent=2))
    elif args.format == "jsonl":
        sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        print(_table(rows) if rows else "no snapshots")
    if problem is not None:
        print(f"qcow2-forensics: {problem.error()}", file=sys.stderr)
        return 2
    return 0


def facts_of(entry: SnapshotEntry) -> dict[str, Any]:
    """Return one snapshot as plain data; text from the image is escaped."""
    return {
        "id": printable(entry.id),
        "name": printable(entry.name),
        "date": date_text(entry),
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


def _deleted(image: Image) -> list[dict[str, Any]]:
    from ..residue import Residue

    rows = []
    residue = Residue(image)
    found = residue.deleted_snapshots()
    not_followed = sum(not item.followed for item in found)
    for count, what in ((not_followed, "not followed into their tables"), (residue.entries_left_out, "left out")):
        if count:
            print(f"qcow2-forensics: {count} former snapshot entries were {what}: there are too many", file=sys.stderr)
    for item in found:
        told = {
            "open_as": None if item.is_gone else item.selector,
            "readable": round(item.readable, 4),
            "rewritable": round(item.rewritable, 4),
            "left": item.told,
        }
        rows.append({**facts_of(item.entry), "deleted": True, **told})
    return rows


def date_text(entry: SnapshotEntry) -> str:
    """Return the date of a snapshot, UTC, to the microsecond."""
    moment = datetime.fromtimestamp(entry.date_sec, UTC).replace(tzinfo=None)
    return f"{moment.isoformat(timespec='seconds')}.{entry.date_nsec // 1000:06d}Z"


def _clock(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds // 1_000_000, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{rest:03d}"


def _table(rows: Iterable[dict[str, Any]]) -> str:
    lines = [_HEADINGS, *(_row(row) for row in rows)]
    widths = [max(columns(line[at]) for line in lines) for at in range(len(_HEADINGS))]
    shown = []
    for line in lines:
        cells = [cell + " " * (width - columns(cell)) for cell, width in zip(line, widths, strict=True)]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    name = row["name"] if len(row["name"]) <= 40 else row["name"][:39] + "…"
    if row.get("deleted"):
        name += f" (deleted, {row['left']}" + (f", {row['open_as']})" if row["open_as"] else ")")
    return (
        row["id"],
        name,
        row["date"].replace("T", " ")[:19],
        _clock(row["vm_clock_nsec"]),
        "-" if row["disk_size"] is None else size(row["disk_size"]),
        size(row["vm_state_size"]) if row["vm_state_size"] else "-",
        f"{row['l1_table_offset']:#x}",
    )
