"""``demo``: a small real image, and what each front door makes of it."""

from __future__ import annotations

import argparse
import importlib.resources
import importlib.util
import lzma
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..reader.writer import atomic_writer
from ..text import plural

_LINES_SHOWN = 24
_WIDTH_SHOWN = 200  # of an error line
_SECONDS = 300

HELP = "write a small evidence image and run every front door on it"
DESCRIPTION = (
    "Write a small evidence image to a folder, then run the audit, Volatility 3, dfVFS, plaso and "
    "pytsk3 on it, as far as they are installed, and show what each finds."
)
EPILOG = """examples:
  qcow2-forensics demo
  qcow2-forensics demo /tmp/case --only audit

The image was made with QEMU: an ext4 partition in three states, two of them internal snapshots, one
with the memory of a running machine.
"""


class Step(NamedTuple):
    """One front door: what a user would type, the module it needs, and the extra that brings it."""

    title: str
    command: str
    module: str
    extra: str


_STEPS = (
    Step("audit", "qcow2-forensics audit demo.qcow2", "qcow2_forensics", ""),
    Step("diff", "qcow2-forensics diff demo.qcow2 --from baseline --to active --files", "pytsk3", "tsk"),
    Step("pytsk3", "python list_pytsk3.py demo.qcow2", "pytsk3", "tsk"),
    Step("volatility", "vol -q -f demo.qcow2 qcow2.snapshots.Snapshots", "volatility3", "volatility"),
    Step("volatility", "vol -q -f demo.qcow2 banners.Banners", "volatility3", "volatility"),
    Step("dfvfs", "python list_dfvfs.py demo.qcow2", "dfvfs", "dfvfs"),
    Step(
        "plaso",
        "psteal --unattended --qcow_snapshots all --source demo.qcow2 -o dynamic -w timeline.csv",
        "plaso",
        "plaso",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``demo`` takes."""
    parser.add_argument("folder", metavar="DIR", nargs="?", default="qcow2-demo", help="default: ./qcow2-demo")
    parser.add_argument("--only", choices=sorted({step.title for step in _STEPS}), help="run one front door only")


def run(args: argparse.Namespace) -> int:
    """Write the image, run the front doors, and summarise."""
    folder = Path(args.folder)
    write_files(folder)
    print(f"{folder / 'demo.qcow2'}: an ext4 disk in three states (baseline, intrusion with memory, active)")
    outcomes = [(step, _run_step(step, folder)) for step in _STEPS if args.only in (None, step.title)]
    print("\nSummary")
    for step, outcome in outcomes:
        print(f"  {outcome:<14} {step.command}")
    return 2 if any(outcome == "failed" for _, outcome in outcomes) else 0


def write_files(folder: Path) -> None:
    """Write the image and the two scripts; what an earlier run left is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    data = importlib.resources.files("qcow2_forensics") / "data"
    with atomic_writer(folder / "demo.qcow2", force=True) as out:
        out.write(lzma.decompress((data / "demo.qcow2.xz").read_bytes()))
    for name in ("list_pytsk3.py", "list_dfvfs.py"):
        with atomic_writer(folder / name, force=True) as out:
            out.write((data / name).read_bytes())
    for leftover in (*folder.glob("timeline.csv"), *folder.glob("*.plaso"), *folder.glob("psteal-*.log.gz")):
        leftover.unlink()


def _run_step(step: Step, folder: Path) -> str:
    print(f"\n$ {step.command}", flush=True)
    if importlib.util.find_spec(step.module) is None:
        print(f"  not installed; pip install 'qcow2-forensics[{step.extra}]'")
        return "not installed"
    command = _resolve(step.command)
    if command is None:
        print(f"  {step.command.partition(' ')[0]} is not on the path of this environment")
        return "not installed"
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"  gave no answer in {_SECONDS} seconds")
        return "failed"
    lines = list(_shown(step, done.stdout, folder))
    for line in lines[:_LINES_SHOWN]:
        print(f"  {line}")
    if len(lines) > _LINES_SHOWN:
        print(f"  ... {plural(len(lines) - _LINES_SHOWN, 'more line')}")
    if done.returncode:
        print("\n".join(f"  {line[:_WIDTH_SHOWN]}" for line in done.stderr.strip().splitlines()[-5:]))
        return "failed"
    return "done"


def _resolve(command: str) -> list[str] | None:
    """Return the words of a command with the program of this very environment."""
    name, *arguments = shlex.split(command)
    if name == "python":
        return [sys.executable, *arguments]
    if name == "qcow2-forensics":
        return [sys.executable, "-m", "qcow2_forensics", *arguments]
    beside = os.path.dirname(sys.executable)
    for candidate in (name, f"{name}.py"):  # plaso's scripts had the suffix in older releases
        found = shutil.which(candidate, path=beside) or shutil.which(candidate)
        if found:
            return [found, *arguments]
    return None


def _shown(step: Step, output: str, folder: Path) -> Iterator[str]:
    """Yield the lines worth showing of one step's output."""
    if step.title != "plaso":
        yield from output.strip().splitlines()
        return
    timeline = folder / "timeline.csv"
    if not timeline.exists():
        return
    rows = timeline.read_text(errors="replace").splitlines()
    yield f"{max(0, len(rows) - 1)} events in {timeline.name}; among them:"
    for word in (".cache_helper", "secret_key.txt", "readme.txt"):
        yield from [row for row in rows if word in row][:2]
