"""The words of the project: the only escaping, sizes, dates and tables.

Data structures hold the evidence's own text. It is escaped here, once, at output; JSON is its own
escaping and holds the text as stored. Public: adapters may import this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TextIO

__version__ = "0.1.0"  # the same as in pyproject.toml
TOOL = f"qcow2-forensics {__version__}"  # every report says what made it

Value = int | str | bool | float | None

_ENTRY = r"(^|: |L2 )entry\b"  # an entry of a table, shown in hexadecimal
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%")  # what spreadsheets take for a formula or a command
_SECOND = 1_000_000_000  # nanoseconds

# --- escaping ------------------------------------------------------------------------------------

# Python's str.isprintable() rejects the categories C (control, format, surrogate, private, unassigned)
# and Z (separators) but for the blank U+0020. That leaves what Unicode calls default-ignorable without
# being a format character, and symbols whose picture is empty: both are letters, marks or symbols.
_IGNORABLE = (
    (0x034F, 0x034F),  # combining grapheme joiner
    (0x115F, 0x1160),  # Hangul fillers
    (0x17B4, 0x17B5),  # Khmer inherent vowels
    (0x180B, 0x180F),  # Mongolian variation selectors
    (0x3164, 0x3164),  # Hangul filler
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFFA0, 0xFFA0),  # halfwidth Hangul filler
    (0xE0100, 0xE01EF),  # further variation selectors
)
_BLANK = (
    (0x2800, 0x2800),  # Braille pattern without dots
    (0x13441, 0x13442),  # Egyptian hieroglyph blanks
    (0x16FE4, 0x16FE4),  # Khitan filler
    (0x1D159, 0x1D159),  # musical null notehead
)
_INVISIBLE = frozenset(code for first, last in (*_IGNORABLE, *_BLANK) for code in range(first, last + 1))


def is_plain(text: str) -> bool:
    """Whether every character is visible as itself: no control, invisible or undecodable one, no blank but U+0020."""
    return text.isprintable() and (text.isascii() or _INVISIBLE.isdisjoint(map(ord, text)))


def printable(text: str | bytes, limit: int = 1023) -> str:
    """Return ``text`` with everything escaped that a terminal or a reader could be fooled by.

    Control characters, bidi and other invisible characters, blanks that are not U+0020, lone
    surrogates and undecodable bytes become backslash escapes; a backslash is doubled so that the
    result is unambiguous. At most ``limit`` characters of input are shown; a cut is marked with an
    ellipsis.
    """
    if isinstance(text, bytes):
        text = decoded(text)
    if len(text) <= limit and text.isascii() and text.isprintable() and "\\" not in text:
        return text  # nearly all there is
    pieces = [_escape(character) for character in text[:limit]]
    return "".join(pieces) + ("…" if len(text) > limit else "")


def decoded(name: bytes) -> str:
    """Return bytes of the evidence as text, not escaped; those that are not UTF-8 become lone surrogates."""
    return name.decode("utf-8", "surrogateescape")


def cut(name: str | bytes, limit: int = 500) -> str:
    """Return a name from evidence as part of a longer text that is escaped as a whole: as stored, but cut."""
    if isinstance(name, bytes):
        name = decoded(name)
    return name if len(name) <= limit else f"{name[:limit]}…"


def quoted(name: str | bytes) -> str:
    """Return :func:`cut` of a name in quotation marks that it does not hold itself, if there are any."""
    kept = cut(name)
    mark = '"' if "'" in kept and '"' not in kept else "'"
    return f"{mark}{kept}{mark}"


def _escape(character: str) -> str:
    code = ord(character)
    if character == "\\":
        return "\\\\"
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: one undecodable byte
        return f"\\x{code - 0xDC00:02x}"
    if character.isprintable() and code not in _INVISIBLE:
        return character
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def text(value: object, limit: int = 1023) -> str:
    """Return ``value`` as one safe line for a terminal."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    return printable(value if isinstance(value, (str, bytes)) else str(value), limit)


def markup(value: object, limit: int = 1023) -> str:
    """Return ``value`` escaped for HTML, invisible and bidi characters made visible."""
    return html_only(text(value, limit))


def html_only(shown: str) -> str:
    """Return what :func:`text` already made safe, with the characters escaped that HTML reads."""
    import html  # here: reading a disk needs none of it

    return html.escape(shown, quote=True)


def cell(value: object) -> str | int | float:
    """Return ``value`` for a CSV cell: numbers stay numbers, text can never start a formula."""
    if value is None:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    shown = text(value)
    return f"'{shown}" if shown.startswith(_FORMULA) or shown.lstrip().startswith(_FORMULA) else shown


def hexadecimal(value: int | None) -> str:
    """Return an offset as ``0x...``, empty for None; offsets are read as hexadecimal throughout."""
    return "" if value is None else f"{value:#x}"


def shown_value(field: str, value: Value) -> str:
    """Return an evidence value for people: offsets in hexadecimal, sizes with their unit."""
    if isinstance(value, bool) or not isinstance(value, int):
        return f"{value:.2f}" if isinstance(value, float) else text(value, 300)
    if "offset" in field or field in {"host", "guest", "mask", "value", "target"} or re.search(_ENTRY, field):
        return f"{value:#x}"
    if field.endswith("_nsec"):
        return f"{value} ({value // _SECOND}.{value % _SECOND // 1_000_000:03d} s)"  # cut: 0.9999 is not 1.000
    if field.endswith(("size", "bytes", "length")) and abs(value) >= 10 * 1024:
        return f"{value} ({size(value)})"
    return str(value)


def size(count: int) -> str:
    """Return a number of bytes as ``1.5 GiB``."""
    if abs(count) < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        value /= 1024
        if abs(value) < 1024 or unit == "EiB":
            return f"{value:.1f} {unit}" if abs(value) < 100 and value != int(value) else f"{value:.0f} {unit}"
    raise AssertionError("unreachable")


# --- dates ---------------------------------------------------------------------------------------


def snapshot_time(seconds: int, nanoseconds: int) -> int:
    """Return when a snapshot was taken, in nanoseconds since 1970.

    A recorded fraction of a second or more is no fraction: then the second alone counts, and
    :func:`snapshot_date` reports what was recorded.
    """
    return seconds * _SECOND + (nanoseconds if nanoseconds < _SECOND else 0)


def snapshot_date(seconds: int, nanoseconds: int, *, fraction: bool = True) -> str:
    """Return the date of a snapshot in UTC, as ``2026-11-29T21:05:07.250000Z``.

    QEMU records microseconds; finer fractions are shown in full. Without ``fraction`` none is. One that is out of range
    is shown as recorded: ``2026-11-29T21:05:07Z (nsec 1500000000 out of range)``.
    """
    from datetime import UTC, datetime  # here: reading a disk needs none of it

    moment = datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat()
    if nanoseconds >= _SECOND:
        return f"{moment}Z ({date_note(nanoseconds)})"
    if not fraction:
        return f"{moment}Z"
    return f"{moment}.{nanoseconds:09d}Z" if nanoseconds % 1000 else f"{moment}.{nanoseconds // 1000:06d}Z"


def date_note(nanoseconds: int) -> str:
    """Return what is wrong with the fraction of a snapshot's date, empty when nothing is."""
    return f"nsec {nanoseconds} out of range" if nanoseconds >= _SECOND else ""


def short_date(seconds: int, nanoseconds: int, zone: str = "") -> str:
    """Return the date of a snapshot for people: ``2026-11-29 21:05:07``, then ``zone``: `` UTC`` where no heading says so."""
    return snapshot_date(seconds, nanoseconds, fraction=False).replace("T", " ", 1).replace("Z", zone, 1)


def iso_time(nanoseconds: int) -> str | None:
    """Return a time of a file, in nanoseconds since 1970, as RFC 3339; None for 0 and for one that no calendar holds."""
    from datetime import UTC, datetime, timedelta  # here: reading a disk needs none of it

    if not nanoseconds:
        return None
    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=nanoseconds // 1000)).isoformat(
            timespec="microseconds"
        )
    except OverflowError:
        return None


def short_time(nanoseconds: int) -> str:
    """Return a time of a file for people: UTC, to the second."""
    shown = iso_time(nanoseconds)
    return shown[:19].replace("T", " ") if shown else "-"


# --- lines and tables ----------------------------------------------------------------------------


def plural(count: int, one: str, many: str = "") -> str:
    """Return ``1 piece``, ``2 pieces``; ``many`` where the plural does not end in s."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def listed(words: Sequence[str], limit: int) -> str:
    """Return ``a, b, c``, after ``limit`` words with how many more there are; empty for none."""
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more


def sentence(shown: str) -> str:
    """Return ``shown`` with a capital first letter."""
    return shown[:1].upper() + shown[1:]


def columns(shown: str) -> int:
    """Return how many terminal columns ``shown`` takes: wide East Asian characters take two."""
    if shown.isascii():
        return len(shown)
    import unicodedata  # here: most names are ASCII

    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in shown)


def fit(shown: str, width: int) -> str:
    """Return ``shown`` cut to at most ``width`` columns; a cut is marked with an ellipsis."""
    if columns(shown) <= width:
        return shown
    kept = shown[: max(width - 1, 0)]
    while columns(kept) > width - 1 and kept:
        kept = kept[:-1]
    return f"{kept}…" if width > 0 else ""


def wrap(shown: str, width: int, indent: str = "") -> list[str]:
    """Return ``shown`` broken into lines of at most ``width`` columns, long words cut."""
    room = max(width - columns(indent), 20)
    lines: list[str] = []
    line = ""
    for word in _cut_words(shown, room):
        joined = f"{line} {word}" if line else word
        if line and columns(joined) > room:
            lines.append(line)
            line = word
        else:
            line = joined
    lines.append(line)
    return [indent + line.rstrip(" ") for line in lines]


def _cut_words(shown: str, room: int) -> Iterator[str]:
    for word in shown.split(" "):
        if len(word) * 2 <= room or columns(word) <= room:
            yield word
            continue
        piece, taken = "", 0
        for character in word:
            wide = columns(character)
            if taken + wide > room:
                yield piece
                piece, taken = "", 0
            piece += character
            taken += wide
        yield piece


class Column(NamedTuple):
    """One column of a table. ``key`` is its name in JSON and CSV and finds its value in a row.

    ``show`` makes the cell for people from the whole row, :func:`text` of the value by default.
    With a ``width`` (in every column but the last) a table of any length is written as its rows come.
    """

    key: str
    heading: str
    show: Callable[[Mapping[str, Any]], str] | None = None
    right: bool = False
    width: int = 0

    @property
    def cell(self) -> Callable[[Mapping[str, Any]], str]:
        """What makes the cell of a row for people, safe on a terminal."""
        return self.show or (lambda row: text(row.get(self.key)))

    def value(self, row: Mapping[str, Any]) -> object:
        """Return the value of ``row`` for CSV: as recorded, or as people see what is in no field by itself."""
        return row.get(self.key) if self.key in row or self.show is None else self.show(row)

    def align(self, shown: str, width: int) -> str:
        """Return ``shown`` padded to ``width`` columns of a terminal."""
        room = " " * (width - columns(shown))
        return room + shown if self.right else shown + room


FORMATS = ("text", "json", "jsonl", "csv")


def write_table(
    rows: Iterable[Mapping[str, Any]], table: Sequence[Column], as_format: str, out: TextIO, *, gap: str = "  "
) -> None:
    """Write ``rows`` as one of :data:`FORMATS`.

    JSON and JSON lines hold everything in a row, as the evidence has it; text and CSV hold the
    columns of ``table``, escaped. JSON is one array with a row a line.
    """
    import json  # here: reading a disk needs none of it

    if as_format == "json":
        out.writelines(_json_array(json.dumps(row) for row in rows))
    elif as_format == "jsonl":
        out.writelines(json.dumps(row) + "\n" for row in rows)
    elif as_format == "csv":
        out.writelines(csv_lines(([column.value(row) for column in table] for row in rows), [c.key for c in table]))
    else:
        cells = [column.cell for column in table]
        lines = aligned(([cell_of(row) for cell_of in cells] for row in rows), table, gap=gap)
        out.writelines(line + "\n" for line in lines)


def _json_array(items: Iterable[str]) -> Iterator[str]:
    separator = "["
    for item in items:
        yield separator + item
        separator = ",\n"
    yield "[]\n" if separator == "[" else "]\n"


def csv_lines(rows: Iterable[Iterable[object]], headings: Iterable[str] = ()) -> Iterator[str]:
    """Yield lines of CSV (RFC 4180): the headings, where there are some, then the rows, each through :func:`cell`."""
    import csv  # here: reading a disk needs none of it
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    for row in chain((headings,) if headings else (), rows):
        writer.writerow(cell(value) for value in row)
        yield out.getvalue()
        out.seek(0)
        out.truncate()


def aligned(cells: Iterable[Sequence[str]], table: Sequence[Column], *, gap: str = "  ") -> Iterator[str]:
    """Yield the lines of a table for people, its headings first; cells are safe already."""
    lines: Iterable[Sequence[str]] = chain(([column.heading for column in table],), cells)
    widths = [column.width for column in table]
    if not all(widths[:-1]):
        lines = list(lines)
        widths = [max(columns(line[at]) for line in lines) for at in range(len(table))]
    plain = gap.join(f"%{width if column.right else -width}s" for column, width in zip(table, widths, strict=True))
    for line in lines:
        row = plain % tuple(line)
        if not row.isascii():  # a character may take two columns, or none
            padded = (column.align(one, width) for column, one, width in zip(table, line, widths, strict=True))
            row = gap.join(padded)
        yield row.rstrip()
