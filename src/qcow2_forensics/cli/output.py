"""What long-running commands share: progress on a terminal, files that appear only when whole."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from ..errors import Qcow2Error
from ..format.source import is_being_read
from ..text import cut, size

_LABEL_SHOWN = 60  # characters: what is drawn over must fit into one line


class Progress:
    """One line on standard error, only when that is a terminal; a context manager.

    ``label`` may hold names from evidence: it is escaped here. ``total`` is in bytes, or in items with ``unit``; 0 when it is not known.
    """

    def __init__(self, label: str, total: int, *, unit: str = "bytes", stream: TextIO | None = None) -> None:
        self._label = cut(label, _LABEL_SHOWN)
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
            self._stream.write(f"\r{self._label}: {self._done} {self._unit}\x1b[K")
            self._stream.flush()
            return
        share = self._done / self._total
        elapsed = max(now - self._started, 1e-9)
        if self._unit == "bytes":
            amount = f"{size(self._done)} of {size(self._total)}, {size(int(self._done / elapsed))}/s"
        else:
            amount = f"{self._done} of {self._total} {self._unit}"
        left = f", {elapsed / share - elapsed:.0f} s left" if 0 < share < 1 else ""
        self._stream.write(f"\r{self._label}: {share:4.0%}  {amount}{left}\x1b[K")
        self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


class OutputExists(Qcow2Error):
    """An output file is already there and nobody said to replace it."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{cut(str(path))} exists; use --force to replace it")


class IsEvidence(Qcow2Error):
    """An output would replace a file that is being examined."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{cut(str(path))} is part of the evidence, which is never written to")


def refuse_evidence(path: str | os.PathLike[str], evidence: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Raise :class:`IsEvidence` when ``path`` is one of ``evidence``, or any file that is open as a source."""
    target = Path(path)
    if not target.exists():
        return
    if is_being_read(target) or any(Path(item).exists() and target.samefile(item) for item in evidence):
        raise IsEvidence(target)


@contextlib.contextmanager
def atomic_writer(
    path: str | os.PathLike[str], *, force: bool = False, evidence: Iterable[str | os.PathLike[str]] = ()
) -> Iterator[BinaryIO]:
    """Yield a binary file that gets its final name only when the block ends well.

    On any exception, an interrupt included, nothing is left behind. Neither ``evidence`` nor any
    file that is open as a source is ever replaced, whatever ``force`` says.
    """
    target = Path(path)
    refuse_evidence(target, evidence)
    if os.path.lexists(target) and not force:
        raise OutputExists(target)
    if target.exists() and not target.is_file():
        raise Qcow2Error(f"{cut(str(target))} is not a regular file")
    # Half of a long name: with what is added it must still be a name.
    kept = target.name if len(os.fsencode(target.name)) < 200 else target.name[: len(target.name) // 2]
    partial = target.with_name(f".{kept}.{os.getpid()}.partial")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as stream:
            yield stream
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
