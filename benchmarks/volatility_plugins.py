"""Every ``linux.*`` plugin of Volatility on a snapshot in a QCOW2 image and on the raw dump of the same memory.

Rows must be equal; CPU seconds and the most resident memory are those of whole ``vol`` processes::

    python benchmarks/volatility_plugins.py IMAGE SNAPSHOT SYMBOLS [--plugins PREFIX ...] [--json FILE]

``SYMBOLS`` is a folder as for ``vol -s``. The raw dump is written by ``qcow2-forensics memory`` unless ``--raw`` names one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import qcow2_forensics as q

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ROOT / "plugins" / "volatility"
_RUN = "import sys; from volatility3.cli import main; sys.argv[0] = 'vol'; main()"


class Run:
    """One finished process: what it printed, its CPU seconds and its most resident memory in MB."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        environment = {**os.environ, "QCOW2_FORENSICS_AUTOLOAD": "0", "PYTHONPATH": str(ROOT / "src")}
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-c", _RUN, *arguments], stdout=out, stderr=err, cwd=folder, env=environment
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = status
        self.status = os.waitstatus_to_exitcode(status)
        self.cpu = usage.ru_utime + usage.ru_stime
        self.resident = usage.ru_maxrss / 1000
        self.errors = (folder / "err").read_text(errors="replace")
        text = (folder / "out").read_text(errors="replace")
        self.rows: Any = json.loads(text) if self.status == 0 and text.strip() else None


def plugins_of(prefixes: list[str]) -> list[str]:
    """Return the names of Volatility's plugins that start with one of the prefixes and need nothing else."""
    import volatility3.plugins
    from volatility3 import framework

    framework.import_files(volatility3.plugins, True)
    found = framework.list_plugins()
    names = sorted(name for name in found if name.startswith(tuple(prefixes)))
    deprecated = {
        name for name in names if name.startswith("linux.") and name.replace("linux.", "linux.malware.") in found
    }
    return [
        name
        for name in names
        if name not in deprecated
        and not any(
            not item.optional
            and item.default is None
            and type(item).__name__ in ("StringRequirement", "ListRequirement")
            for item in found[name].get_requirements()
        )
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("snapshot")
    parser.add_argument("symbols", type=Path)
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--plugins", nargs="+", default=["linux."])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = args.raw
        if raw is None:
            raw = folder / "memory.raw"
            with q.open_guest_memory(args.image, args.snapshot) as memory, raw.open("wb") as out:
                for at in range(0, memory.size, 1 << 24):
                    out.write(memory.read(at, min(1 << 24, memory.size - at), pad=True))
        common = ["-q", "-r", "json", "-s", str(args.symbols.resolve()), "--cache-path", str(folder / "cache")]
        (folder / "cache").mkdir()
        sides = {
            "raw": [*common, "-f", str(raw.resolve())],
            "qcow2": [*common, "-p", str(PLUGINS), "--qcow2-snapshot", args.snapshot, "-f", str(args.image.resolve())],
        }
        Run([*sides["raw"], "linux.pslist"], folder)  # fills Volatility's cache of symbol files
        results = []
        for plugin in plugins_of(args.plugins):
            started = time.monotonic()
            runs = {side: Run([*arguments, plugin], folder) for side, arguments in sides.items()}
            one, two = runs["raw"], runs["qcow2"]
            same = (one.status, one.rows) == (two.status, two.rows)
            result = {
                "plugin": plugin,
                "equal": same,
                "rows": len(one.rows) if isinstance(one.rows, list) else None,
                "raw_cpu": one.cpu,
                "qcow2_cpu": two.cpu,
                "raw_mb": one.resident,
                "qcow2_mb": two.resident,
            }
            results.append(result)
            print(
                f"{plugin:55} {'equal' if same else 'DIFFER':7} rows {result['rows']}  CPU {one.cpu:6.2f} {two.cpu:6.2f}  "
                f"MB {one.resident:4.0f} {two.resident:4.0f}  ({time.monotonic() - started:.0f} s)",
                flush=True,
            )
            if not same or one.rows is None:
                print("   ", (two.errors or one.errors).strip().splitlines()[-1:], flush=True)
        ratios = [item["qcow2_cpu"] / item["raw_cpu"] for item in results]
        print(
            f"{len(results)} plugins, {sum(item['equal'] for item in results)} equal; CPU ratio qcow2/raw: median "
            f"{statistics.median(ratios):.2f}, highest {max(ratios):.2f}; most MB above raw "
            f"{max(item['qcow2_mb'] - item['raw_mb'] for item in results):.0f}"
        )
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
        return 0 if all(item["equal"] for item in results) else 1


if __name__ == "__main__":
    sys.exit(main())
