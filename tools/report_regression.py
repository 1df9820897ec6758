#!/usr/bin/env python3
"""Writes what the command line says about a fixed set of 200 images, so that two versions can be compared.

    python tools/report_regression.py make FOLDER             make the images (needs qemu-img and the tests' builders)
    python tools/report_regression.py run FOLDER OUT.json     JSON of audit, info, map, snapshots and diff for each
    python tools/report_regression.py compare OLD.json NEW.json        each kind of difference, with counts

``run`` uses whatever ``qcow2_forensics`` is on the path: set PYTHONPATH to another checkout for the earlier version.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_COUNT = 200
_COMMANDS = (
    ("audit", "--format", "json"),
    ("audit", "--depth", "deep", "--format", "json"),
    ("info", "--format", "json"),
    ("map", "--format", "json"),
    ("snapshots", "--format", "json"),
    ("snapshots", "--deleted", "--format", "json"),
    ("diff", "--format", "json"),
)
_VOLATILE = re.compile(r"0x[0-9a-f]{12,}|\d+\.\d+ s\b")


def make(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from fuzz import corpus
    from tests import damage, hostile

    folder.mkdir(parents=True, exist_ok=True)
    healthy = folder / "healthy"
    corpus.make(healthy)
    crafted = folder / "hostile"
    crafted.mkdir(exist_ok=True)
    for ident in hostile.IMAGES:
        (crafted / ident).mkdir(exist_ok=True)
        hostile.build(ident, crafted / ident)
    (folder.parent / "report_bases").mkdir(exist_ok=True)
    bases = damage.Bases(folder.parent / "report_bases")
    damaged = folder / "damaged"
    damaged.mkdir(exist_ok=True)
    made = len(images(folder))
    for seed in range(_COUNT - made):
        place = damaged / f"{seed:03}"
        place.mkdir(exist_ok=True)
        damage.damaged(seed, bases, place)


def images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".qcow2", ".qcow"))


def run(folder: Path, out: Path) -> None:
    from qcow2_forensics.cli import main

    results: dict[str, Any] = {}
    for path in images(folder):
        for command in _COMMANDS:
            stdout, stderr = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                try:
                    code: object = main([command[0], str(path), *command[1:]])
                except SystemExit as error:
                    code = error.code
                except Exception:  # noqa: BLE001 - an internal error is an answer to compare too
                    code = traceback.format_exc().splitlines()[-1]
            text = stdout.getvalue()
            try:
                shown: object = json.loads(text)
            except ValueError:
                shown = text
            results[f"{path.relative_to(folder)} {' '.join(command)}"] = [code, shown, stderr.getvalue()]
    out.write_text(json.dumps(results, indent=1, sort_keys=True))


def compare(old: Path, new: Path) -> int:
    """Print every kind of difference, in how many outputs it is, and the first of each."""
    before, after = json.loads(old.read_text()), json.loads(new.read_text())
    kinds: dict[str, list[str]] = {}
    different: set[str] = set()
    for key in sorted(before.keys() | after.keys()):
        image, command = key.split(" ", 1)
        pairs = zip(("exit code", "", "stderr"), before.get(key, (None,) * 3), after.get(key, (None,) * 3), strict=True)
        for part, left, right in pairs:
            for place, what in _differences(part, _by_code(left), _by_code(right)):
                different.add(key)
                kinds.setdefault(f"{command}: {place}", []).append(f"{image}: {what}")
    for kind, found in sorted(kinds.items()):
        print(f"{kind}  ({len({item.partition(': ')[0] for item in found})} images, {len(found)} places)")
        print(f"    {found[0]}")
    print(f"{len(different)} of {len(before)} outputs differ, in {len(kinds)} kinds")
    return 1 if different else 0


def _by_code(shown: Any) -> Any:
    """Return an output with its findings by code, so that a new one does not shift the others."""
    if not isinstance(shown, dict) or "findings" not in shown:
        return shown
    codes: dict[str, list[Any]] = {}
    for finding in shown["findings"]:
        codes.setdefault(finding["code"], []).append(finding)
    return shown | {"findings": codes}


def _differences(place: str, before: Any, after: Any) -> Iterator[tuple[str, str]]:
    """Yield the kind of each difference, a place without the numbers of rows, and what it is."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            if key in before and key in after:
                yield from _differences(f"{place}.{key}", before[key], after[key])
            else:
                where, value = ("new", after[key]) if key in after else ("gone", before[key])
                yield f"{place}.{key} {where}", f"{value!r:.150}"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for left, right in zip(before, after, strict=True):
            yield from _differences(f"{place}[]", left, right)
    elif before != after and not (
        isinstance(before, str) and _VOLATILE.sub("", before) == _VOLATILE.sub("", str(after))
    ):
        yield place, f"{before!r:.150} -> {after!r:.150}"


def run_command_line() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "make":
        make(Path(sys.argv[2]))
        return 0
    if len(sys.argv) == 4 and sys.argv[1] == "run":
        run(Path(sys.argv[2]), Path(sys.argv[3]))
        return 0
    if len(sys.argv) == 4 and sys.argv[1] == "compare":
        return compare(Path(sys.argv[2]), Path(sys.argv[3]))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(run_command_line())
