"""``info``: every fact of header and extensions, each with its file offset."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..format.bitmap_directory import BitmapFlag
from ..format.codecs import known_codecs
from ..format.extensions import ExtensionType
from ..format.header import MAGIC, Autoclear, Compatible, Crypt, Header, Incompatible
from ..format.image import Image
from ..text import decoded, printable, short_date, size
from . import add_format_argument, add_image_argument
from .snapshots import facts_of

HELP = "show what the header says"
DESCRIPTION = "Show every fact of the header, its extensions and its tables, with file offsets."
EPILOG = """examples:
  qcow2-forensics info disk.qcow2
  qcow2-forensics info disk.qcow2 --format json | jq .header.cluster_bits
"""

_NAME_SHOWN = 64  # characters of an ID or a name in a line for people


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``info`` takes."""
    add_image_argument(parser)
    add_format_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the facts of one image."""
    with Image(args.image) as image:
        facts = collect(image)
    print(json.dumps(facts, indent=2) if args.format == "json" else _as_text(facts))
    return 0


def collect(image: Image) -> dict[str, Any]:
    """Return what one image records about itself; its text as the image has it."""
    header = image.header
    sane = not any(problem.field in ("version", "cluster_bits") for problem in image.header_problems)
    return {
        "file": image.name,
        "file_size": image.file_size,
        "version": header.version,
        "virtual_size": image.disk_size,
        "cluster_size": image.cluster_size if sane else None,
        "header": {
            field.name: {"offset": field.offset, "length": field.length, "value": _field_value(header, field.name)}
            for field in header.fields
        },
        "incompatible_features": _flags(Incompatible, header.incompatible_features),
        "compatible_features": _flags(Compatible, header.compatible_features),
        "autoclear_features": _flags(Autoclear, header.autoclear_features),
        "encryption": _name(Crypt, header.crypt_method),
        "compression": _compression(header.compression_type),
        "backing_file": image.backing_name,
        "backing_format": image.backing_format,
        "data_file": image.data_file_name,
        "data_file_raw": header.raw_data_file,
        "extensions": [
            {
                "type": f"{item.type:#010x}",
                "name": _name(ExtensionType, item.type),
                "offset": item.offset,
                "length": item.length,
            }
            for item in image.extensions
        ],
        "feature_names": [{"kind": row.kind, "bit": row.bit, "name": decoded(row.name)} for row in image.feature_names],
        "snapshots": _snapshots(image) if sane else None,
        "bitmaps": _bitmaps(image) if sane else None,
        "unreadable": list(image.unreadable_facts),
        "problems": [
            {"code": problem.code, "message": problem.message, "offset": problem.offset} for problem in image.problems
        ],
    }


def _snapshots(image: Image) -> list[dict[str, Any]] | None:
    """Return the snapshots, None where nothing of their table can be read."""
    if not image.snapshots and image.unreadable("snapshots"):
        return None
    return [facts_of(entry) for entry in image.snapshots]


def _bitmaps(image: Image) -> list[dict[str, Any]] | None:
    """Return the persistent bitmaps, None where nothing of their directory can be read."""
    if not image.bitmaps and image.unreadable("bitmaps"):
        return None
    return [
        {
            "name": entry.name,
            "offset": entry.offset,
            "granularity": entry.granularity,
            "flags": _flags(BitmapFlag, entry.flags),
            "table_offset": entry.table_offset,
            "table_size": entry.table_size,
        }
        for entry in image.bitmaps
    ]


def _field_value(header: Header, name: str) -> int | str:
    return printable(MAGIC) if name == "magic" else int(getattr(header, name))


def _flags(kind: Any, value: int) -> list[str]:
    known = [flag.name.lower() for flag in kind if value & flag]
    unknown = value & ~sum(kind)
    return known + ([f"unknown ({unknown:#x})"] if unknown else [])


def _compression(number: int) -> str:
    return next((codec.name for codec in known_codecs() if codec.number == number), f"unknown ({number:#x})")


def _name(kind: Any, value: int) -> str:
    return kind(value).name.lower() if value in tuple(kind) else f"unknown ({value:#x})"


def _as_text(facts: dict[str, Any]) -> str:
    lines = [
        f"file             {printable(facts['file'])}",
        f"file size        {facts['file_size']} ({size(facts['file_size'])})",
        f"virtual size     {facts['virtual_size']} ({size(facts['virtual_size'])})",
        f"encryption       {facts['encryption']}",
        f"compression      {facts['compression']}",
    ]
    for key in ("backing_file", "backing_format", "data_file"):
        if key in facts["unreadable"]:
            lines.append(f"{key.replace('_', ' '):16} unknown: it cannot be read")
        elif facts[key] is not None:
            lines.append(f"{key.replace('_', ' '):16} {printable(facts[key])}")
    if facts["data_file_raw"]:
        lines.append("                 declared to be the raw disk itself: it can be read alone")
    flags = [key for key in ("incompatible_features", "compatible_features", "autoclear_features") if facts[key]]
    lines += [f"{key.split('_')[0]:16} {', '.join(facts[key])}" for key in flags]
    lines.append("header")
    lines += [
        f"  {field['offset']:#06x}  {name:24} {_shown(name, field['value'])}" for name, field in facts["header"].items()
    ]
    if facts["extensions"]:
        lines.append("extensions")
        lines += [f"  {e['offset']:#06x}  {e['name']:24} {e['length']} bytes" for e in facts["extensions"]]
    tables = [key for key in ("l1_table", "refcount_table") if key in facts["unreadable"]]
    lines += [f"{key.replace('_', ' '):16} unknown: it reaches past the end of the file" for key in tables]
    lines += [f"{key:16} unknown: they cannot be read" for key in ("snapshots", "bitmaps") if facts[key] is None]
    if facts["snapshots"]:
        lines.append("snapshots")
        lines += [
            f"  {s['offset']:#x}  {printable(s['id'], _NAME_SHOWN)} ({printable(s['name'], _NAME_SHOWN)}), "
            f"{short_date(s['date_sec'], s['date_nsec'], ' UTC')}, disk {_size_or_none(s['disk_size'])}, "
            f"VM state {size(s['vm_state_size'])}"
            for s in facts["snapshots"]
        ]
    if facts["bitmaps"]:
        lines.append("bitmaps")
        lines += [
            f"  {b['offset']:#x}  {printable(b['name'], _NAME_SHOWN)}, granularity {b['granularity']}"
            for b in facts["bitmaps"]
        ]
    if facts["problems"]:
        lines.append("problems")
        lines += [f"  {p['code']}: {printable(p['message'])}" for p in facts["problems"]]
    return "\n".join(lines)


def _shown(name: str, value: int | str) -> str:
    if isinstance(value, int) and ("offset" in name or "features" in name):
        return f"{value:#x}"
    return str(value)  # the magic is escaped bytes


def _size_or_none(count: int | None) -> str:
    return "size not recorded" if count is None else size(count)
