"""The most memory that this process has used, for the processes that tests start to measure it."""

from __future__ import annotations

from pathlib import Path


def peak_mib() -> int:
    """Return the largest resident size of this program in MiB, from Linux's ``/proc``.

    ``getrusage`` will not do: what it gives survives ``exec``, so that a process started by a
    large one, such as a test run, begins with the peak of its parent and seems never to grow.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) >> 10
    raise AssertionError("/proc/self/status has no line VmHWM")
