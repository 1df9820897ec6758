"""The command line: called in this process, or run in one of its own, which takes a tenth of a second more.

Most tests ask what a command prints, writes and returns, and call it. What depends on the process, such as its standard
files, its terminal or what it imports, needs one of its own.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from qcow2_forensics.cli import main
from qcow2_forensics.cli.notes import repeat_notes

ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("QCOW2_PASSPHRASE")} | {
    "PYTHONPATH": os.pathsep.join(sys.path)
}
COMMAND = [sys.executable, "-m", "qcow2_forensics"]


class Done(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str


def called(*arguments: object, **environment: str) -> Done:
    """Call the command in this process, as if it had no terminal."""
    repeat_notes()
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, Path(os.devnull).open() as nothing:
        for name in os.environ.keys() - ENVIRONMENT.keys():
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        for name, stream in (("stdin", nothing), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, stream)
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # of argparse
            code = end.code if isinstance(end.code, int) else 1
    return Done(code, *(stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)))  # type: ignore[attr-defined]


def run(*arguments: object, **environment: str) -> Done:
    """Run the command in a process of its own without a terminal."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
        env=ENVIRONMENT | environment,
    )
    return Done(done.returncode, *(data.decode("utf-8", "replace") for data in (done.stdout, done.stderr)))
