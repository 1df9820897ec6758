"""What differs between two states as one page: totals, files, volumes that are not read, ranges.

Takes what ``diff --format json`` prints, and the rows that its text form has for files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..text import html_only, markup, plural, sentence, size
from .allocation_map import draw_map
from .difference_map import difference_map
from .page import Row, fact_table, page, run_facts, table, warning
from .stylesheet import KINDS

RANGES = 2000  # rows on the page; the JSON has all of them
FILES = 5000
_LONG = 40  # rows of ranges that are still shown unfolded
_FILE_COLUMNS = ("change", "path", "inode", "size", "modified (UTC)", "what")


class FileRow(NamedTuple):
    """One file that differs, in words that are safe on a terminal; ``digests`` are (which state, SHA-256)."""

    change: str
    cells: tuple[str, ...]  # as in _FILE_COLUMNS, the change first
    digests: tuple[tuple[str, str], ...] = ()


def render_difference(
    data: Mapping[str, Any], files: Iterable[FileRow] | None = None, *, total: str, notes: Sequence[str] = ()
) -> str:
    """Return the page; ``total`` sums the ranges up, ``notes`` say what could not be compared: both safe on a terminal.

    ``files`` is None where only ranges were compared.
    """
    rows = None if files is None else list(files)
    before, after = data["from"], data["to"]
    two = before["image"] != after["image"]
    title = f"{markup(before['state'], 80)} → {markup(after['state'], 80)}"
    parts = [f"<h1>{title}</h1>", *_states(data, two)]
    parts += [*warning("Not compared", map(html_only, notes)), *_totals(data, total, rows)]
    parts += _picture(data)
    if rows is not None:
        parts += [*_volumes(data.get("volumes", ())), *_files(rows)]
    parts += _ranges(data["ranges"])
    known = {kind_of(row.change) for row in rows} if rows else {item["change"] for item in data["ranges"]}
    return page(f"{title}: what differs", parts, kinds=[(kind, kind) for kind in KINDS if kind in known])


def kind_of(change: str) -> str:
    """Return the key of a change among the filters: ``content`` for ``content changed``."""
    return change.partition(" ")[0]


def _states(data: Mapping[str, Any], two: bool) -> Iterator[str]:
    if data.get("run"):
        yield from run_facts(data["run"])
    rows = [("image", markup(data["image"], 4096))] if not two and not data.get("run") else []
    for key in ("from", "to"):
        side = data[key]
        where = f" of {markup(side['image'], 4096)}" if two else ""
        rows.append((key, f"{markup(side['state'], 4096)}{where}, {size(side['size'])}"))
    yield from fact_table(rows)


def _totals(data: Mapping[str, Any], total: str, files: Sequence[FileRow] | None) -> Iterator[str]:
    summary = data["summary"]
    yield f"<p><b>{sentence(html_only(total))}.</b></p>"
    if files is None:
        yield "<p class='quiet'>Files were not compared; diff --files does.</p>"
        return
    for key, words in (
        ("bytes_in_no_file", "of it in no file: file system structures or free space"),
        ("bytes_in_unread_volumes", "of it in volumes whose files are not listed"),
    ):
        if summary.get(key):
            yield f"<p>{size(summary[key])} {words}.</p>"


def _picture(data: Mapping[str, Any]) -> Iterator[str]:
    size_ = max(data["from"]["size"], data["to"]["size"])
    if data["ranges"] and size_:
        yield f"<section><h2>Where</h2>{draw_map(difference_map(size_, data['ranges']))}</section>"


def _volumes(volumes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    unread = [item for item in volumes if not item["read"] and item.get("changed_bytes")]
    if unread:
        yield "<h2>Volumes whose files are not listed</h2>"
        rows = map(_volume_row, unread)
        yield from table(("volume", "type", "changed", "why"), rows, narrow=("type", "changed"))


def _volume_row(item: Mapping[str, Any]) -> Row:
    path, kind = markup(item["path"] or "the whole disk"), markup(item["type"] or "unknown")
    return Row((path, kind, size(item["changed_bytes"]), markup(item["why"])))


def _files(rows: Sequence[FileRow]) -> Iterator[str]:
    yield "<h2>Files</h2>"
    if not rows:
        yield "<p>No files differ where files could be listed.</p>"
        return
    yield from table(_FILE_COLUMNS, map(_file_row, rows[:FILES]), narrow=("change", "inode", "size", "modified (UTC)"))
    yield from _left_out(len(rows) - FILES, "file")


def _file_row(row: FileRow) -> Row:
    cells = [html_only(cell) for cell in row.cells]
    for state, digest in row.digests:
        cells[-1] += (
            f"{'<br/>' if cells[-1] else ''}<span class='quiet'>SHA-256 {state}</span> <span class='hash'>{markup(digest)}</span>"
        )
    return Row(cells, f"s-{kind_of(row.change)}")


def _ranges(ranges: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not ranges:
        return
    open_ = " open" if len(ranges) <= _LONG else ""
    yield f"<h2>Ranges of the guest's disk</h2><details{open_}><summary>{plural(len(ranges), 'range')}</summary>"
    noted = any(item.get("note") for item in ranges[:RANGES])
    columns = ("offset", "length", "bytes", "change", *(("note",) if noted else ()))
    yield from table(columns, (_range_row(item, noted) for item in ranges[:RANGES]), narrow=columns[:4])
    yield from _left_out(len(ranges) - RANGES, "range")
    yield "</details>"


def _range_row(item: Mapping[str, Any], noted: bool) -> Row:
    offset, length = item["offset"], item["length"]
    cells = [f"{offset:#x}", f"{length:#x}", size(length), markup(item["change"])]
    note = [markup(item.get("note", ""))] if noted else []
    return Row([*cells, *note], f"s-{item['change']}")


def _left_out(count: int, noun: str) -> Iterator[str]:
    if count > 0:
        yield f"<p class='quiet'>and {plural(count, f'more {noun}')}, which diff --format json lists.</p>"
