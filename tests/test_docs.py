"""Every ``console``, ``sh`` and ``python`` block of the pages runs, on images everybody can make.

A page's blocks run in order, in one folder that holds ``demo.qcow2`` (the built-in image), ``disk.qcow2`` and,
for docs/dfvfs.md and docs/tsk.md, ``case.qcow2``: made here with QEMU, each with the deleted snapshot ``alpha``. Lines after a command are what it prints, in this order; ``...`` stands for
lines left out, and a line that ends with ``...`` is the start of one. A ``text`` block after a ``python`` block is what that prints.
What ELSEWHERE lists is left out; a command that is refused prints its sentence first, and ends with 2.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from qcow2_forensics.cli import demo
from tests import filesystems, qemu
from tests.image_builder import Builder
from tests.test_residue import KEEP, deleted_image

ROOT = Path(__file__).parents[1]
NEEDS = {
    "README.md": ("volatility3", "plaso", "pytsk3"),
    "docs/dfvfs.md": ("plaso",),
    "docs/examine.md": ("pytsk3",),
    "docs/dissect.md": ("dissect.target", "dissect.extfs"),
    "docs/fleet.md": (),
    "docs/recovery.md": (),
    "docs/states.md": (),
    "docs/residue.md": (),
    "docs/tsk.md": ("pytsk3",),
    "docs/volatility.md": ("volatility3",),
}
# Commands that do not run here, by how their line or block begins, and why.
ELSEWHERE = {
    "python3 -m venv": ".ci/run runs the README's line, and lints with CONTRIBUTING's",
    ".venv/bin/ruff": ".ci/run",
    "pip install": "tests/test_packaging.py installs the wheel; a test fetches nothing",
    "qcow2-forensics mount": "tests/test_mount.py: it needs /dev/fuse",
    "fls -r -o 2048 /mnt": "tests/test_mount.py",
    "sudo mount": "it needs root and a loop device",
    "vol -f /mnt": "it needs a Windows guest",
    "cp --sparse=auto /mnt": "tests/test_mount.py",
    "qcow2-forensics serve": "tests/test_nbdkit.py: it runs until it is ended",
    "qemu-img convert -O raw 'nbd+unix": "tests/test_nbdkit.py",
    "python benchmarks/run.py": "tests/test_benchmarks.py runs --smoke",
    "apt-get download": "it fetches a kernel, or its symbols",
    "dpkg-deb": "the same",
    "export QCOW2_GUEST_KERNEL": "the same",
    "python tools/make_guest_disks.py": "tests/test_make_guest_disks.py",
    "export QCOW2_VMLINUX": "the same",
    ".venv/bin/python -m pytest -m slow tests/test_guest_memory_elf.py": "it is the test",
    "qcow2-forensics memory case.qcow2": "tests/test_guest_memory_elf.py: it needs a kernel's symbols",
    "drgn": "tests/test_guest_memory_elf.py",
    "docker": "it needs Docker and OpenRelik",
    "pytest tests/test_openrelik_worker.py": "it is the test",
    "log2timeline --storage_file case.plaso disk.qcow2": "tests/test_plaso.py",
    "log2timeline --qcow_snapshots changed": "tests/test_plaso_changed.py",
    "python -m dfvfs_qcow2 log2timeline": "tests/test_plaso.py",
    "vol -q -s symbols -f case.qcow2 qcow2.changes": "it needs a kernel's symbols",
    "vol -q -f case.qcow2 qcow2.scan": "tests/test_volatility_plugins.py",
    "python examples/pytsk3_list_states.py": "tests/test_examples.py",
    "qcow2-forensics diff case.qcow2 --from before-incident": "tests/test_diff_files.py",
    "qcow2-forensics diff yesterday.qcow2 today.qcow2": "tests/test_diff_sides.py",
    "qcow2-forensics diff seized.qcow2 restored.raw": "the same",
    "qcow2-forensics diff disk.qcow2 --from bitmap": "the same",
    "qcow2-forensics diff server.qcow2": "tests/test_guest_volumes.py",
    "qcow2-forensics diff wiped.qcow2": "the same",
    "import json\nimport sys\nfrom pathlib import Path\n\nfrom dask": "tests/test_cli_audit.py runs it",
}
_COMMAND = re.compile(r"^(?:\$ .*|(?:qcow2-forensics|vol|log2timeline|psteal|pip|python3?|docker) .*)$", re.MULTILINE)
_UNNAMED = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^```(console|python|text|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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


def run(command: list[str], folder: Path, *, refused: bool = False) -> str:
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TZ": "UTC",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == (2 if refused else 0), (command, done.stdout, done.stderr)
    return done.stderr if refused else done.stdout


def run_console(text: str, folder: Path) -> None:
    """Run each ``$ `` line with the shell, and compare what follows it."""
    commands: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            commands.append((line[2:], []))
        else:
            commands[-1][1].append(line)
    for command, expected in commands:
        if command.startswith("jq ") and not shutil.which("jq"):
            continue
        refused = bool(expected) and expected[0].startswith("qcow2-forensics: ")
        check(run(["bash", "-c", command], folder, refused=refused), expected)


def is_elsewhere(text: str) -> bool:
    """Whether a line or a block is one of those that do not run here."""
    return text.startswith(tuple(ELSEWHERE))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images that every page may use."""
    qemu.need()
    demo.write_files(tmp_path)
    deleted_image(tmp_path)
    return tmp_path


def demo_as_disk(folder: Path) -> None:
    """Make ``disk.qcow2`` the demo's image."""
    shutil.copyfile(folder / "demo.qcow2", folder / "disk.qcow2")


def headless(folder: Path) -> None:
    """Make ``damaged.qcow2``, the demo's image with its first cluster overwritten."""
    (folder / "damaged.qcow2").write_bytes(bytes(65536) + (folder / "demo.qcow2").read_bytes()[65536:])


def ambiguous(folder: Path) -> None:
    """Make ``hostile.qcow2``, in which an ID is one of the words for a state."""
    builder = Builder(size=1 << 20)
    table = builder.put(bytes(65536))
    builder.snapshot(b"index:1", b"first", l1_offset=table, l1_size=1)
    builder.snapshot(b"2", b"second", l1_offset=table, l1_size=1).write(folder / "hostile.qcow2")


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


def demo_as_case(folder: Path) -> None:
    """Make ``case.qcow2`` the demo's image."""
    shutil.copyfile(folder / "demo.qcow2", folder / "case.qcow2")


PREPARE = {
    "README.md": demo_as_disk,
    "docs/dfvfs.md": deleted_guest,
    "docs/recovery.md": headless,
    "docs/states.md": ambiguous,
    "docs/tsk.md": demo_as_case,
}


def pages() -> list[str]:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def test_every_block_is_run_or_named_with_a_reason() -> None:
    for page in pages():
        for block in blocks(page):
            if page in NEEDS or block.kind == "text":
                continue
            lines = [line for line in block.text.splitlines() if line.strip()]
            assert all(map(is_elsewhere, lines)), (page, block)


def test_every_fence_is_of_a_kind_that_is_looked_at() -> None:
    for page in pages():
        kinds = re.findall(r"^```(\S*)$", (ROOT / page).read_text(), re.MULTILINE)
        assert set(kinds) <= {"", "console", "python", "text", "sh", "json"}, page


def test_no_command_hides_in_a_block_without_a_language() -> None:
    for page in pages():
        # The end of a block and the start of the next look alike: those with a language go first.
        text = re.sub(r"^```\w+\n.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        for block in _UNNAMED.findall(text):
            for command in _COMMAND.findall(block):
                assert is_elsewhere(command.removeprefix("$ ")), (page, command)


def test_no_reason_is_kept_for_a_command_that_is_gone() -> None:
    text = "\n".join((ROOT / page).read_text() for page in pages())
    assert not [start for start in ELSEWHERE if start not in text]


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
    if page in PREPARE:
        PREPARE[page](folder)
    script = _PRELUDE  # a block goes on where the one before ended
    printed = ""
    for block in blocks(page):
        if block.kind == "console":
            run_console(block.text, folder)
        elif block.kind == "sh":
            for line in block.text.splitlines():
                if not is_elsewhere(line):
                    run(["bash", "-c", line], folder)
        elif is_elsewhere(block.text):
            continue
        elif block.kind == "python":
            before = len(run([sys.executable, "-c", script], folder)) if script != _PRELUDE else 0
            script += block.text
            printed = run([sys.executable, "-c", script], folder)[before:]
        else:
            check(printed, block.text.splitlines())
