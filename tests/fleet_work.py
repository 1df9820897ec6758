"""What workers of a fleet are given to do by tests, apart from them: a worker imports the module, and no test."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from qcow2_forensics.cli.fleet import audit_line


def dies_on_two(path: str) -> str:
    """Audit an image; the worker dies of the third, and fails on the fourth."""
    if path.endswith("2.qcow2"):
        os.kill(os.getpid(), signal.SIGKILL)
    if path.endswith("3.qcow2"):
        raise MemoryError
    return audit_line(path, "triage")


def slow(path: str, folder: str) -> str:
    """Note in a folder which worker this is, and take a minute."""
    (Path(folder) / f"started-{os.getpid()}").touch()
    time.sleep(60)
    return path
