"""What the library notes about an image while it works: to the logger ``qcow2_forensics``, or to whoever takes notes instead.

The command line takes them: it prints each as a sentence of its own, and ``logging`` takes longer to import than
many an image takes to open.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Taker = Callable[[str, bool], object]  # the sentence, and whether it puts what is read in doubt
_takers: list[Taker] = []


def log_note(sentence: str, *, doubt: bool) -> None:
    """Hand a sentence to who takes notes, else log it: as a warning where it puts what is read in doubt."""
    if _takers:
        _takers[-1](sentence, doubt)
        return
    import logging

    logging.getLogger("qcow2_forensics").log(logging.WARNING if doubt else logging.INFO, "%s", sentence)


@contextlib.contextmanager
def taking_notes(taker: Taker) -> Iterator[None]:
    """Have ``taker`` called with each note until the block ends."""
    _takers.append(taker)
    try:
        yield
    finally:
        _takers.remove(taker)
