"""The account of every byte, as the end of a text report and as a section of the page.

Takes the ``account`` entry of a report's details::

    {"files": [{"file": "", "size": 196616, "exact": true, "unaccounted_bytes": 0, "overlapping_bytes": 0,
                "totals": [{"what": "guest data", "owner": "active state", "remainder": false, "bytes": 65536}, ...],
                "rows": [{"offset": 0, "length": 4, "what": "header field", "owner": "magic"}, ...], ...}]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..text import html_only, markup, size, text, wrap


def lines(account: Mapping[str, Any], width: int) -> Iterator[str]:
    """Yield the account as lines of text."""
    if account.get("error"):
        yield "ACCOUNT"
        yield from wrap(f"not taken: {text(account['error'])}", width, "  ")
    for file in account.get("files", ()):
        name = "the data file" if file["file"] else "the image file"
        if file.get("error"):
            yield from wrap(f"ACCOUNT of {name}: not taken: {text(file['error'])}", width)
            continue
        how = "every byte" if file["exact"] else "metadata and allocation, no data was read"
        yield f"ACCOUNT of {name}: {how}"
        rows = _rows(file)
        room = len(f"{file['size']:,}")
        yield from (f"  {count:>{room},}  {what}" for what, count in rows)
        yield from wrap(verdict(file), width, "  ")


def section(account: Mapping[str, Any]) -> Iterator[str]:
    """Yield the account as a section of the page."""
    if not account:
        return
    from .page import fact_table  # here: a report in plain text needs no page

    yield "<section><h2>Every byte</h2>"
    if account.get("error"):
        yield f"<p>The account was not taken: {markup(account['error'])}</p>"
    for file in account.get("files", ()):
        name = "The data file" if file["file"] else "The image file"
        if file.get("error"):
            yield f"<p>{name}: the account was not taken: {markup(file['error'])}</p>"
            continue
        yield f"<p>{name}: {html_only(verdict(file))}</p>"
        yield from fact_table((markup(what), f"{count:,}") for what, count in _rows(file))
    yield "</section>"


def _rows(file: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return what the bytes of a file are, and how many of them."""
    structures, rest = Counter[str](), 0
    for total in file["totals"]:
        if total["remainder"]:
            rest += total["bytes"] - total.get("nonzero", 0)
        else:
            structures[total["what"]] += total["bytes"]
    words = "remainders that are zeros" if file["exact"] else "not accounted for by a structure"
    rows = [*structures.most_common(), (words, rest)]
    return [*rows, ("of these, claimed by several", file["overlapping_bytes"])] if file["overlapping_bytes"] else rows


def verdict(file: Mapping[str, Any]) -> str:
    """Return how many bytes nothing accounts for, and where they are."""
    if not file["exact"]:
        return f"{file['size']:,} bytes in all; deep reads what no structure accounts for"
    places = Counter[str]()
    for total in file["totals"]:
        if total.get("nonzero"):
            places[total["what"]] += total["nonzero"]
    words = f"{file['unaccounted_bytes']:,} bytes unaccounted for, of {file['size']:,} ({size(file['size'])})"
    if places:
        words += ": " + ", ".join(f"{count:,} {place}" for place, count in places.most_common())
    return words
