"""log2timeline with the stock QCOW back-end and with ours, side by side, on every kind of image.

    python benchmarks/dfvfs.py                         # the table of docs/dfvfs.md: events, by both
    python benchmarks/dfvfs.py --megabytes 250 --files 6000 --repeat 5 "plain qcow2" "zlib, version 2"

For each image the stock back-end and ours take turns. "events" are psort's lines, "same" says that
they are those of the raw disk, sorted. Ratios are of the medians of CPU time, workers included,
which other programs on the machine disturb less than wall time.

Run as a file, never with this folder on the module path: its name is that of the real dfvfs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

# This folder holds a module named dfvfs; the repository's own folder is what is needed.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tests import plaso_tools  # noqa: E402


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
