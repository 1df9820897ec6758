"""log2timeline with the stock QCOW back-end and with ours, and the reads of libyal through dfVFS.

``run.py`` has the times. As a script this compares events too, on every kind of image::

    python benchmarks/log2timeline.py                  # the table of docs/dfvfs.md: events, by both
    python benchmarks/log2timeline.py --megabytes 250 --files 6000 --repeat 5 "plain qcow2" "zlib, version 2"

For each image the stock back-end and ours take turns. "events" are psort's lines, "same" says that
they are those of the raw disk, sorted. Ratios are of the medians of CPU time, workers included,
which other programs on the machine disturb less than wall time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from harness import Case
from tests import plaso_tools

from qcow2_forensics.limits import MiB

_BLOCK = 64  # bytes, what libyal's libraries read at once


def cases(folder: Path, *, smoke: bool = False) -> Iterator[Case]:
    """Yield the reads of libyal, through the file objects, and whole runs on the images that both back-ends read."""
    disk = plaso_tools.make_disk(folder, 10 if smoke else 300)
    names = ("plain qcow2",) if smoke else ("plain qcow2", "zlib, version 2")
    images = {name: plaso_tools.VARIANTS[name](folder, disk) for name in names}
    span = MiB if smoke else 16 * MiB
    files = {"pyqcow": _pyqcow, "dfVFS with qcow2-forensics": _file_object}
    readers = {name: _sequential(opened(images["plain qcow2"].path), span) for name, opened in files.items()}
    yield Case("sequential 64 bytes, file objects", readers, span // _BLOCK, "reads")
    for name, variant in images.items():
        runs = {"stock back-end": _timeline(variant, active=False), "qcow2-forensics": _timeline(variant, active=True)}
        yield Case(f"log2timeline, {name}", runs)


def _sequential(file: Any, span: int) -> Callable[[], None]:
    def work() -> None:
        file.seek(0)
        for _ in range(span // _BLOCK):
            file.read(_BLOCK)

    return work


def _pyqcow(path: Path) -> Any:
    import pyqcow

    file = pyqcow.file()
    file.open(str(path))
    return file


def _file_object(path: Path) -> Any:
    from dfvfs.lib import definitions
    from dfvfs.path import factory
    from dfvfs.resolver import resolver

    import dfvfs_qcow2  # noqa: F401 - which puts our back-end in place

    new = factory.Factory.NewPathSpec
    place = new(definitions.TYPE_INDICATOR_OS, location=str(path))
    return resolver.Resolver.OpenFileObject(new(definitions.TYPE_INDICATOR_QCOW, parent=place))


def _timeline(variant: plaso_tools.Variant, *, active: bool) -> Callable[[], None]:
    def work() -> None:
        with tempfile.TemporaryDirectory() as out:
            done = plaso_tools.log2timeline(variant, Path(out), active=active)
        if done.rc or not done.lines:
            raise RuntimeError(done.output[-120:])

    return work


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("variants", nargs="*", default=list(plaso_tools.VARIANTS), help="names of image kinds")
    parser.add_argument("--megabytes", type=int, default=32, help="size of the disk")
    parser.add_argument("--files", type=int, default=300, help="number of files besides the logs")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each back-end per image")
    parser.add_argument("--start-method", default="fork", choices=("fork", "spawn", "forkserver"))
    parser.add_argument("--only-ours", action="store_true", help="leave the stock back-end out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qcow2-plaso-") as name:
        folder = Path(name)
        disk = plaso_tools.make_disk(folder, options.files, options.megabytes << 20)
        expected = plaso_tools.log2timeline(plaso_tools.Variant(disk), folder / "expected", active=False).lines
        print(f"raw disk, stock tools: {len(expected)} events\n")
        print("| image | stock events | ours | same as raw | stock CPU s | our CPU s | ratio |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for variant_name in options.variants:
            compare(variant_name, disk, expected, options)
    return 0


def compare(name: str, disk: Path, expected: list[str], options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="variant-", dir=disk.parent) as place:
        variant = plaso_tools.VARIANTS[name](Path(place), disk)
        runs: dict[bool, list[plaso_tools.Run]] = {False: [], True: []}
        for turn in range(options.repeat):
            for active in (True,) if options.only_ours else ((False, True) if turn % 2 else (True, False)):
                with tempfile.TemporaryDirectory(prefix="run-", dir=place) as out:
                    run = plaso_tools.log2timeline(variant, Path(out), active=active, start_method=options.start_method)
                runs[active].append(run)
    stock, ours = runs[False], runs[True]
    events = [
        str(len(plaso_tools.evidence_lines(r[0].lines))) if r and r[0].rc == 0 else "fails" if r else ""
        for r in (stock, ours)
    ]
    cpu = [statistics.median(run.cpu for run in r) if r else 0.0 for r in (stock, ours)]
    same = all(plaso_tools.evidence_lines(run.lines) == expected for run in ours)
    ratio = f"{cpu[1] / cpu[0]:.2f}" if stock and events[0] != "fails" else ""
    print(
        f"| {name} | {events[0]} | {events[1]} | {'yes' if same else 'NO'} | {cpu[0]:.1f} | {cpu[1]:.1f} | {ratio} |",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
