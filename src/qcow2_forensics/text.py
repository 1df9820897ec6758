"""The only place that turns evidence into text: terminals, HTML, CSV cells, numbers for people."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator

from .errors import printable
from .findings import Value

_ENTRY = re.compile(r"(^|: |L2 )entry\b")  # the word of a table
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%")  # what spreadsheets take for a formula or a command


def text(value: object, limit: int = 1023) -> str:
    """Return ``value`` as one safe line for a terminal."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    return printable(value if isinstance(value, (str, bytes)) else str(value), limit)


def markup(value: object, limit: int = 1023) -> str:
    """Return ``value`` escaped for HTML, invisible and bidi characters made visible."""
    return html.escape(text(value, limit), quote=True)


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
    if "offset" in field or field in {"host", "guest", "mask", "value", "target"} or _ENTRY.search(field):
        return f"{value:#x}"
    if field.endswith("_nsec"):
        return f"{value} ({value / 1_000_000_000:.3f} s)"
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


def sentence(shown: str) -> str:
    """Return ``shown`` with a capital first letter."""
    return shown[:1].upper() + shown[1:]


def columns(shown: str) -> int:
    """Return how many terminal columns ``shown`` takes: wide East Asian characters take two."""
    if shown.isascii():
        return len(shown)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in shown)


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
