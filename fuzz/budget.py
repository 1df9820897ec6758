"""The budget every public call must keep, measured: processor time, and memory above what was in use."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

CPU_SECONDS = 1.0  # processor time: the machine may be busy
MEMORY_MIB = 64  # above the high-water mark since :func:`restart`

enforced = False  # off until everything is imported: first use belongs to no case


class OverBudget(AssertionError):
    """A call took more than it may."""


@contextmanager
def of(what: str) -> Iterator[None]:
    """Hold what happens inside to the budget."""
    before, started = _peak_mib(), time.process_time()
    yield
    spent, grown = time.process_time() - started, _peak_mib() - before
    if enforced and spent > CPU_SECONDS:
        raise OverBudget(f"{what} took {spent:.1f} s of processor time")
    if enforced and grown > MEMORY_MIB:
        raise OverBudget(f"{what} took {grown:.0f} MiB")


def restart() -> None:
    """Forget the high-water mark of memory, where the system allows it."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass  # not Linux, or not allowed: the mark then is of the whole process


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
