"""Signals that end a process: as exceptions where something is unfinished, and never between making and removing it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TypeVar

T = TypeVar("T")
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]


@contextlib.contextmanager
def unfinished(make: Callable[[], T], remove: Callable[[T], object]) -> Iterator[T]:
    """Yield what ``make`` returns; unless the block ends well, ``remove`` is called with it, also where a signal ends it.

    A signal waits while either is at work: between the making and the block nobody would remove anything.
    """
    made: list[T] = []

    def clean() -> None:
        if made:
            with signals_wait():
                remove(made.pop())

    with ended_by_signals():
        try:
            try:
                with signals_wait():
                    made.append(make())
                yield made[0]
                made.clear()
            finally:
                clean()
        finally:
            clean()  # where a signal came before the first one made it wait


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let signals that would end the process end the block as an exception, so that what is unfinished is removed.

    Only where nobody else handles them, and in the main thread, which alone gets them.
    """
    mine = threading.current_thread() is threading.main_thread()
    taken = [number for number in _ENDING if mine and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Have signals that would raise something inside the block do so at its end."""
    came: list[int] = []
    former: dict[int, Callable[[int, FrameType | None], object]] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                handler = signal.getsignal(number)
                if callable(handler):
                    former[number] = handler
                    signal.signal(number, lambda number, _frame: came.append(number))
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
