"""What the library notes about an image, on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from ..reader.notes import taking_notes
from ..text import printable

_shown: set[str] = set()


def repeat_notes() -> None:
    """Show notes again that were shown before: what follows is about another state or image."""
    _shown.clear()


@contextlib.contextmanager
def showing_notes() -> Iterator[None]:
    """Print what the library notes on standard error until the block ends, each sentence once."""
    repeat_notes()
    with taking_notes(_show):
        yield


def _show(sentence: str, doubt: bool) -> None:
    if sentence not in _shown:
        _shown.add(sentence)
        print(f"qcow2-forensics: {'warning: ' if doubt else ''}{printable(sentence)}", file=sys.stderr)
