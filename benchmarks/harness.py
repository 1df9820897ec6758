"""What every benchmark shares: cases, interleaved repeats, medians, ratios with their spread.

A case runs the same work through several readers, one after the other, round by round, so that
whatever else the machine does hits all of them. The first reader named is the yardstick; ratios
are its time over the reader's, so above 1 is faster than the yardstick.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Work = Callable[[], object]


@dataclass
class Case:
    """One piece of work; ``readers`` maps names to it, ``count`` is what one run processes."""

    name: str
    readers: dict[str, Work]
    count: int = 0
    unit: str = "bytes"
    times: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


HEADING = "| case | reader | median | rate | ratio | quartiles |\n|---|---|---:|---:|---:|---|"


def processor_time() -> float:
    """Return the seconds of processor time that this process and those it has waited for have used."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


CLOCKS = {"wall": time.perf_counter, "cpu": processor_time}


def tool(*words: object, check: bool = True) -> int:
    """Run a tool, without what it prints, and return its exit code."""
    return subprocess.run([str(word) for word in words], check=check, stdout=subprocess.DEVNULL).returncode


def run(cases: Iterable[Case], *, repeats: int = 5, clock: Callable[[], float] = time.perf_counter) -> list[Case]:
    """Run every case ``repeats`` times after one warm-up round, printing each as it is done.

    A failing reader is noted, and left out of the further rounds. ``clock`` is :func:`processor_time` for
    ratios on a machine that others use too; what runs on several cores at once then counts for each.
    """
    done = []
    for case in cases:
        for round_number in range(repeats + 1):
            for name, work in case.readers.items():
                if name in case.errors:
                    continue
                gc.collect()
                started = clock()
                try:
                    work()
                except Exception as error:  # noqa: BLE001 - a peer may fail in its own ways
                    case.errors[name] = f"{type(error).__name__}: {error}"[:120]
                    continue
                if round_number:
                    case.times.setdefault(name, []).append(clock() - started)
        print(table(case), flush=True)
        done.append(case)
    return done


def rows(case: Case) -> list[dict[str, Any]]:
    """Return one row a reader: median time, and ratio to the yardstick with its quartiles."""
    yardstick = next(iter(case.readers))
    base = case.times.get(yardstick, [])
    shown = []
    for name in case.readers:
        times = case.times.get(name)
        row: dict[str, Any] = {"case": case.name, "reader": name}
        if not times:
            row["error"] = case.errors.get(name, "not run")
        else:
            ratios = sorted(b / t for b, t in zip(base, times, strict=False))
            row["median_s"] = statistics.median(times)
            row["ratio"] = statistics.median(ratios) if ratios else None
            row["spread"] = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]] if ratios else None
            row["rate"] = case.count / row["median_s"] if case.count else None
            row["unit"] = case.unit
        shown.append(row)
    return shown


def table(case: Case) -> str:
    """Return the results of a case as rows of a Markdown table."""
    lines = []
    for row in rows(case):
        if "error" in row:
            lines.append(f"| {row['case']} | {row['reader']} | | | | {row['error']} |")
            continue
        rate = "" if row["rate"] is None else _rate(row["rate"], row["unit"])
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        spread = "" if row["spread"] is None else f"{row['spread'][0]:.2f} to {row['spread'][1]:.2f}"
        lines.append(
            f"| {row['case']} | {row['reader']} | {row['median_s'] * 1000:.1f} ms | {rate} | {ratio} | {spread} |"
        )
    return "\n".join(lines)


def _rate(rate: float, unit: str) -> str:
    return f"{rate / 2**20:.0f} MiB/s" if unit == "bytes" else f"{1e6 / rate:.2f} us each"


def environment() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "system": platform.system(),
    }


def write_json(cases: Iterable[Case], path: str) -> None:
    """Write every single time measured, for later comparison."""
    found = [{"name": case.name, "times": case.times, "errors": case.errors, "rows": rows(case)} for case in cases]
    with open(path, "w", encoding="utf-8") as out:
        json.dump({"environment": environment(), "cases": found}, out, indent=1)
