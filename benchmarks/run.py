"""Run the benchmarks: ``python benchmarks/run.py [--smoke] [--only reader,audit] [--json FILE]``.

Images are made with the real tools in a temporary folder (or ``--folder``, kept for the next
run). Ratios compare medians of one run; look at the quartiles before believing a small one.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import harness

GROUPS = ("reader", "audit", "compare", "guest_memory", "mount", "log2timeline", "volatility")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny images and one repeat: shows that everything runs")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"groups to run (default: {','.join(GROUPS)})")
    parser.add_argument("--case", default="", help="run only the cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--clock",
        choices=tuple(harness.CLOCKS),
        default="wall",
        help="cpu: processor time, for a machine that is shared",
    )
    parser.add_argument("--json", help="also write every time measured to this file")
    parser.add_argument("--folder", help="where the images are made and kept (default: a temporary folder)")
    args = parser.parse_args()
    done: list[harness.Case] = []
    print(harness.HEADING)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for group in args.only.split(","):
            try:
                module = importlib.import_module(group)
                wanted = (case for case in module.cases(folder, smoke=args.smoke) if args.case in case.name)
                done += harness.run(wanted, repeats=1 if args.smoke else args.repeats, clock=harness.CLOCKS[args.clock])
            except ImportError as error:  # a peer, or the evidence, is not there
                print(f"{group}: not run, {error}", file=sys.stderr)
    if args.json:
        harness.write_json(done, args.json)
    ours = [case.name for case in done for name in case.errors if name.startswith("qcow2-forensics")]
    if ours:
        print(f"our own reader failed in: {', '.join(ours)}", file=sys.stderr)
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main())
