"""Records as the lines of The Sleuth Kit's tools: ``fls`` and body files. Escapes what it prints."""

from __future__ import annotations

from ..text import printable
from .records import SECOND, FileRecord


def fls_line(record: FileRecord) -> str:
    """Return a record as ``fls -r -p`` prints it."""
    deleted = "" if record.allocated else "* "
    realloc = "(realloc)" if record.in_use and not record.allocated else ""
    path = printable(_with_stream(record, record.path).removeprefix("/"))
    return f"{record.name_type}/{record.type} {deleted}{record.address}{realloc}:\t{path}"


def body_line(record: FileRecord, prefix: str = "") -> str:
    """Return a record as a body file line (mactime 3); ``prefix`` goes before the path as it is.

    The digest field is 0, as it is where ``fls -m`` is not asked for hashes.
    """
    name = f"{record.path} ($FILE_NAME)" if record.of_name else _with_stream(record, record.path)
    shown = prefix.replace("|", "\\x7c") + _field(name)
    if record.link:
        shown += f" -> {_field(record.link)}"
    if not record.allocated:
        shown += " (deleted-realloc)" if record.in_use else " (deleted)"
    times = record.times
    fields = [
        "0",
        shown,
        record.address,
        f"{record.name_type}/{mode_text(record)}",
        str(record.uid),
        str(record.gid),
        str(record.size),
        *(str(value // SECOND) for value in (times.accessed, times.modified, times.changed, times.created)),
    ]
    return "|".join(fields)


def _field(text: str) -> str:
    """Escape text for a body file, whose fields end at a bar."""
    return printable(text, limit=8192).replace("|", "\\x7c")


def mode_text(record: FileRecord) -> str:
    """Return type and permissions as ``ls -l`` has them."""
    if not record.has_metadata:
        return "-" * 10
    text = [record.type]
    for shift, special, letter in ((6, 0o4000, "s"), (3, 0o2000, "s"), (0, 0o1000, "t")):
        bits = record.mode >> shift
        run = bits & 1
        text += ["r" if bits & 4 else "-", "w" if bits & 2 else "-"]
        if record.mode & special:
            text.append(letter if run else letter.upper())
        else:
            text.append("x" if run else "-")
    return "".join(text)


def _with_stream(record: FileRecord, path: str) -> str:
    return f"{path}:{record.stream}" if record.stream else path
