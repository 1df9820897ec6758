"""What the library notes of a chain, on standard error."""

from __future__ import annotations

import logging
import sys

from ..text import printable


class _Notes(logging.Handler):
    """Prints what the library notes of a chain on standard error, each sentence once."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._shown: set[str] = set()

    def forget(self) -> None:
        """Take every sentence for one not shown yet."""
        self._shown.clear()

    def emit(self, record: logging.LogRecord) -> None:
        sentence = record.getMessage()
        if sentence not in self._shown:
            self._shown.add(sentence)
            kind = "warning: " if record.levelno >= logging.WARNING else ""
            print(f"qcow2-forensics: {kind}{printable(sentence)}", file=sys.stderr)


def repeat_notes() -> None:
    """Show notes again that were shown before: what follows is about another state or image."""
    for handler in logging.getLogger("qcow2_forensics").handlers:
        if isinstance(handler, _Notes):
            handler.forget()


def show_notes() -> None:
    """Have the library's notes printed on standard error from now on."""
    logger = logging.getLogger("qcow2_forensics")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())
        logger.setLevel(logging.INFO)
        logger.propagate = False
