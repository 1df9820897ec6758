"""How much work something is, in lines of Python that run: tests bound work by counting it and never by a clock.

A time depends on the machine and on what else runs there; a count does not. What runs in C, such as one call that
decompresses or one operation on an array, is one line however long it takes: where that is the work, count bytes instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class TooMuchWork(BaseException):  # not an Exception: nothing that is tested may handle it
    """More lines ran than a test allows; raised at once, so that endless work ends too."""


@contextmanager
def at_most(lines: int) -> Iterator[None]:
    """Fail once more than so many lines of Python have run inside, in this thread and outside this function."""
    left = lines

    def note(_frame: FrameType, event: str, _argument: object) -> object:
        nonlocal left
        if event == "line":
            left -= 1
            if left < 0:
                raise TooMuchWork(f"more than {lines} lines")
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_run(function: Callable[[], object]) -> int:
    """Return how many lines of Python a call runs."""
    count = 0

    def note(_frame: FrameType, event: str, _argument: object) -> object:
        nonlocal count
        count += event == "line"
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def assert_proportional(work: Callable[[int], object], few: int, many: int) -> None:
    """Fail where doing much takes over a quarter more lines than doing little lets expect, and then at once."""
    lines = lines_run(lambda: work(few))
    with at_most(lines * many // few * 5 // 4):
        work(many)
