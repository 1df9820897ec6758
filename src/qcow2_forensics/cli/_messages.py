"""Standard error while one part of an examination runs: its sentences are kept, its progress goes to the terminal."""

from __future__ import annotations

import io
from typing import TextIO

_PREFIX = "qcow2-forensics: "


class Messages(io.TextIOBase):
    """Takes the place of standard error. Lines that draw over themselves go on to ``terminal``, all others are kept."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._kept: list[str] = []

    def isatty(self) -> bool:
        """Whether progress is shown."""
        return self._terminal.isatty()

    def fileno(self) -> int:
        """Return the terminal's descriptor: its width is asked for."""
        return self._terminal.fileno()

    def write(self, shown: str) -> int:
        """Take what a command writes to standard error."""
        if shown.startswith("\r"):
            self._terminal.write(shown)
            self._terminal.flush()
        else:
            self._kept.append(shown)
        return len(shown)

    def writable(self) -> bool:
        return True

    @property
    def sentences(self) -> list[str]:
        """What was written, a sentence each, without the name of the tool."""
        lines = "".join(self._kept).splitlines()
        return list(dict.fromkeys(line.removeprefix(_PREFIX) for line in lines if line.strip()))
