"""Residue as files in a folder: one per piece, and an index in JSON and CSV; the folder gets its name when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..limits import MiB
from ..reader.writer import whole_folder, writing
from ..text import csv_lines, printable
from .inventory import Residue
from .model import Piece
from .snapshot_entries import DeletedSnapshot

SCHEMA = 1
_CHUNK = MiB
_COLUMNS = (
    "offset",
    "length",
    "kind",
    "looks",
    "nonzero",
    "entropy",
    "signature",
    "sha256",
    "guest_offset",
    "snapshot",
    "source",
    "name",
)


@dataclass
class Summary:
    """What was written: pieces found, bytes in files, pieces only indexed, one line per deleted snapshot.

    ``problem`` is why the disk cannot be read: what its tables would map counts as residue then. ``unseen`` is why
    some residue was not looked for.
    ``by_kind`` has the number of pieces and their bytes, whether they are in files or only indexed.
    """

    pieces: int = 0
    written: int = 0
    skipped: int = 0
    deleted: tuple[str, ...] = ()
    problem: str = ""
    unseen: str = ""
    by_kind: dict[str, tuple[int, int]] = field(default_factory=dict)


def write(
    residue: Residue,
    folder: str | os.PathLike[str],
    *,
    kinds: Collection[str] | None = None,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
    origin: Callable[[], Mapping[str, Any]] = dict,
) -> Summary:
    """Write the pieces of some kinds (all by default) to a new folder and return what was done.

    The folder appears under its name only when it is complete. ``limit`` bounds the bytes in
    files; pieces beyond it are indexed with their hash and no file. ``origin`` is asked at the end for what the index
    records about the run.
    """
    with whole_folder(folder) as partial:
        return _fill(residue, partial, kinds, limit, advance, origin)


def _fill(
    residue: Residue,
    folder: Path,
    kinds: Collection[str] | None,
    limit: int | None,
    advance: Callable[[int], None],
    origin: Callable[[], Mapping[str, Any]],
) -> Summary:
    summary = Summary()
    image = {"path": residue.image.name, "file_size": residue.image.file_size, "schema": SCHEMA}
    problem = residue.image.unreadable("disk")
    if problem is not None:
        summary.problem = image["problem"] = str(problem.error())
    with (
        (folder / "index.json").open("w", encoding="utf-8") as index,
        (folder / "index.csv").open("w", encoding="utf-8", newline="") as table,
    ):
        table.writelines(csv_lines((), _COLUMNS))
        index.write(f'{{"image": {json.dumps(image)},\n"pieces": [')
        for piece in residue.pieces():
            if kinds and piece.kind not in kinds:
                continue
            room = limit is None or summary.written + piece.length <= limit
            entry = _write_piece(residue, piece, folder, room)
            index.write(("," if summary.pieces else "") + "\n" + json.dumps(entry))
            table.writelines(csv_lines([[entry.get(column) for column in _COLUMNS]]))
            summary.pieces += 1
            count, total = summary.by_kind.get(piece.kind, (0, 0))
            summary.by_kind[piece.kind] = count + 1, total + piece.length
            summary.written += piece.length if room else 0
            summary.skipped += not room
            advance(piece.length)
        deleted = residue.deleted_snapshots()
        summary.deleted = tuple(_described(item) for item in deleted)
        summary.unseen = str(residue.unseen or "")
        index.write(f'],\n"unseen": {json.dumps(summary.unseen or None)}')
        index.write(f',\n"deleted_snapshots": {json.dumps(_deleted(deleted))}')
        index.writelines(f',\n"{key}": {json.dumps(value)}' for key, value in origin().items())
        index.write("}\n")
    return summary


def _write_piece(residue: Residue, piece: Piece, folder: Path, room: bool) -> dict[str, Any]:
    name = _free_name(folder, f"{piece.file or 'image'}-{piece.offset:012x}-{piece.kind}-{piece.looks}")
    if room:
        with writing(folder / name) as writer:
            for data in _chunks(residue, piece):
                writer.data(data)
        digest = writer.sha256
    else:
        sha256 = hashlib.sha256()
        for data in _chunks(residue, piece):
            sha256.update(data)
        digest = sha256.hexdigest()
    entry = asdict(piece)
    entry["entropy"] = round(piece.entropy, 4)
    entry["source"] = entry.pop("file") or "image"
    return {**entry, "sha256": digest, "name": name if room else None}


def _free_name(folder: Path, stem: str) -> str:
    """Return a file name that is not in use; the same bytes may be slack of two tables."""
    name, number = f"{stem}.bin", 1
    while (folder / name).exists():
        number += 1
        name = f"{stem}-{number}.bin"
    return name


def _chunks(residue: Residue, piece: Piece) -> Iterator[bytes]:
    return (residue.read(piece, at, _CHUNK) for at in range(0, piece.length, _CHUNK))


def _deleted(deleted: list[DeletedSnapshot]) -> list[dict[str, Any]]:
    return [
        {
            "open_as": None if item.is_gone else item.selector,
            "id": item.entry.id,
            "name": item.entry.name,
            "date_sec": item.entry.date_sec,
            "disk_size": item.entry.disk_size,
            "l1_table_offset": item.entry.l1_table_offset,
            "readable": round(item.readable, 4),
            "rewritable": round(item.rewritable, 4),
            "intact_clusters": item.intact,
            "shared_clusters": item.shared,
            "zeroed_clusters": item.zeroed,
            "reused_clusters": item.reused,
            "l2_tables": item.l2_tables,
            "lost_l2_tables": item.lost_tables,
        }
        for item in deleted
    ]


def _described(item: DeletedSnapshot) -> str:
    entry = item.entry
    state = item.what_is_left if item.is_gone else f"{item.what_is_left}, open as {item.selector}"
    return f"deleted snapshot {printable(entry.id)} ({printable(entry.name)}): {state}"
