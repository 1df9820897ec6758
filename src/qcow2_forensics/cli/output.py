"""What commands share: where their output goes, and progress on a terminal."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TextIO

from ..text import columns, fit, printable, size

_FORMAT_OF_SUFFIX = {".htm": "html", ".txt": "text"}


def add_output_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options that say where ``what`` is written."""
    parser.add_argument("-o", "--output", metavar="FILE", help=f"write {what} to FILE instead of standard output")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")


def format_of(args: argparse.Namespace, known: Sequence[str]) -> str | None:
    """Return the format that is asked for, or else the one of the output file's suffix; None when neither says."""
    asked: str | None = args.format
    if asked is not None or args.output is None:
        return asked
    suffix = os.path.splitext(args.output)[1].lower()
    name = _FORMAT_OF_SUFFIX.get(suffix, suffix[1:])
    return name if name in known else None


@contextlib.contextmanager
def printing_to(args: argparse.Namespace, evidence: Collection[str]) -> Iterator[None]:
    """Have what is printed in the block go where ``--output`` says; a file gets its name when the block ends well."""
    if args.output is None:
        yield
        return
    from ..reader.writer import atomic_writer, is_standard_output  # here: most output goes to a terminal or a pipe

    if is_standard_output(args.output):
        yield
        return
    with atomic_writer(args.output, force=args.force, evidence=evidence) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace")
        try:
            with contextlib.redirect_stdout(text):
                yield
        finally:
            text.detach()  # flushes; the file is the writer's to close


_LABEL_SHOWN = 60  # characters: what is drawn over must fit into one line
_LABEL_LEAST = 6  # characters that stay on a narrow terminal
_WIDTH = 80  # of a terminal that does not say


def draw_over(stream: TextIO, label: str, rest: str = "") -> None:
    """Draw one line over the last one on a terminal, cut to its width: the label first, down to a few characters."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns or _WIDTH
    except (OSError, ValueError):
        width = _WIDTH
    room = width - 1  # in the last column some terminals begin a new line
    shown = fit(label, max(room - columns(rest), _LABEL_LEAST)) + rest
    stream.write(f"\r{fit(shown, room)}\x1b[K")
    stream.flush()


class Progress:
    """One line on standard error, only when that is a terminal; a context manager.

    ``label`` may hold names from evidence: it is escaped here. ``total`` is in bytes, or in items with ``unit``; 0 when it is not known.
    """

    def __init__(self, label: str, total: int, *, unit: str = "bytes", stream: TextIO | None = None) -> None:
        self._label = printable(label, _LABEL_SHOWN)
        self._total = total
        self._unit = unit
        self._stream = stream or sys.stderr
        self._shown = self._stream is not None and self._stream.isatty()  # None: closed by whoever started us
        self._done = 0
        self._started = time.monotonic()
        self._next = self._started + 0.2

    def advance(self, count: int) -> None:
        """Count further bytes or items, and redraw at most ten times a second."""
        self._done += count
        if self._shown:
            now = time.monotonic()
            if now >= self._next:
                self._next = now + 0.1
                self._draw(now)

    def _draw(self, now: float) -> None:
        if not self._total:  # nobody knows how many there are
            draw_over(self._stream, self._label, f": {self._done} {self._unit}")
            return
        share = self._done / self._total
        elapsed = max(now - self._started, 1e-9)
        if self._unit == "bytes":
            amount = f"{size(self._done)} of {size(self._total)}, {size(int(self._done / elapsed))}/s"
        else:
            amount = f"{self._done} of {self._total} {self._unit}"
        left = f", {elapsed / share - elapsed:.0f} s left" if 0 < share < 1 else ""
        draw_over(self._stream, self._label, f": {share:4.0%}  {amount}{left}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
