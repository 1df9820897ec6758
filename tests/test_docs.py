"""Every ``console`` and ``python`` block of the pages runs, on images everybody can make.

A page's blocks run in order, in one folder that holds ``demo.qcow2`` (the built-in image), ``disk.qcow2`` and,
for docs/dfvfs.md, ``case.qcow2``: made here with QEMU, each with the deleted snapshot ``alpha``. Lines after a command are what it prints, in this order; ``...`` stands for
lines left out, and a line that ends with ``...`` is the start of one. A ``text`` block after a ``python`` block is what that prints.
The pages in ELSEWHERE are left out.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from qcow2_forensics.cli import demo
from tests import filesystems, qemu
from tests.test_residue import KEEP, deleted_image

ROOT = Path(__file__).parents[1]
NEEDS = {
    "README.md": ("volatility3", "plaso", "pytsk3"),
    "docs/dfvfs.md": ("plaso",),
    "docs/examine.md": ("pytsk3",),
    "docs/dissect.md": ("dissect.target", "dissect.extfs"),
    "docs/residue.md": (),
    "docs/tsk.md": ("pytsk3",),
    "docs/volatility.md": ("volatility3",),
}
# Their blocks need images of their own, or a cluster of machines, and do not run here.
ELSEWHERE = {"docs/fleet.md", "docs/recovery.md", "docs/states.md"}
_BLOCK = re.compile(r"^```(console|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PRELUDE = "import qcow2_forensics_autoload as hook; hook.install()\n"


class Block(NamedTuple):
    kind: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    for found in _BLOCK.finditer((ROOT / page).read_text()):
        yield Block(*found.groups())


def squeezed(line: str) -> str:
    return " ".join(line.split())


def check(printed: str, expected: list[str]) -> None:
    """Find each expected line, in order."""
    lines = iter([squeezed(line) for line in printed.splitlines()])
    for line in map(squeezed, expected):
        if line in ("", "..."):
            continue
        start = line.removesuffix("...").rstrip() if line.endswith("...") else None
        assert any(seen == line or (start is not None and seen.startswith(start)) for seen in lines), (line, printed)


def run(command: list[str], folder: Path) -> str:
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TZ": "UTC",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def run_console(text: str, folder: Path) -> None:
    """Run each ``$ `` line with the shell, and compare what follows it."""
    commands: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            commands.append((line[2:], []))
        else:
            commands[-1][1].append(line)
    for command, expected in commands:
        check(run(["bash", "-c", command], folder), expected)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images that every page may use."""
    qemu.need()
    demo.write_files(tmp_path)
    deleted_image(tmp_path)
    return tmp_path


def deleted_guest(folder: Path) -> None:
    """Make ``case.qcow2``: a partition with plan.txt, and the deleted snapshot ``alpha`` that has it too."""
    made = filesystems.make(folder, "ext4", populated=False)
    made.put("plan.txt", b"the plan\n")
    before, _ = filesystems.disk_of(folder, [made], "before.raw")
    later = made.copy("later.raw")
    later.put("more.txt", b"and more\n")
    after, _ = filesystems.disk_of(folder, [later], "after.raw")
    image = filesystems.states_of(folder / "case.qcow2", [("alpha", before), (None, after)])
    qemu.snapshot(image, "alpha", action="-d", opts=KEEP)


def test_every_page_with_blocks_is_run_or_named() -> None:
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))]
    with_blocks = {page for page in pages if any(block.kind != "text" for block in blocks(page))}
    assert with_blocks - ELSEWHERE == set(NEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("page", NEEDS)
def test_the_blocks_of_a_page_run_and_print_what_it_says(page: str, folder: Path) -> None:
    for name in NEEDS[page]:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"{name} is absent")
    if page == "docs/dfvfs.md":
        deleted_guest(folder)
    script = _PRELUDE  # a block goes on where the one before ended
    printed = ""
    for block in blocks(page):
        if block.kind == "console":
            run_console(block.text, folder)
        elif block.kind == "python":
            before = len(run([sys.executable, "-c", script], folder)) if script != _PRELUDE else 0
            script += block.text
            printed = run([sys.executable, "-c", script], folder)[before:]
        else:
            check(printed, block.text.splitlines())
