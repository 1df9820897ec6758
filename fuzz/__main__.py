"""Run structured fuzzing: ``python -m fuzz [--cases N | --seconds S] [--targets read,audit] [--seed X]``.

Every case runs in a worker process under a time and memory budget. An escape (an exception that
is not ours, too much time or memory, a dead worker) is written to ``--save`` with the seed and
the base image that repeat it. Exit code 1 when there was one.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import logging
import multiprocessing
import random
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from . import budget, corpus, differential
from .mutator import Mutator
from .targets import TARGETS, run
from .watch import Watch, watching

HANG_SECONDS = 60  # of real time, for one target
BATCH = 500


class Hang(BaseException):
    """A case did not end; not an Exception, so that nothing takes it for a failed read."""


def _alarm(_signal: int, _frame: object) -> None:
    raise Hang(f"no answer in {HANG_SECONDS} s")


def case_data(bases: dict[str, bytes], seed: int) -> tuple[str, bytes, list[str]]:
    """Return the base's name, the mutated image and what was changed, for one seed."""
    rng = random.Random(seed)
    name = rng.choice(sorted(bases))
    data, changes = _mutator(name, bases[name]).mutate(rng)
    return name, data, changes


_mutators: dict[str, Mutator] = {}


def _mutator(name: str, data: bytes) -> Mutator:
    if name not in _mutators:
        random.seed(name)
        _mutators[name] = Mutator(data)
    return _mutators[name]


def escape_of(target: str, data: bytes) -> str:
    """Put one image through one target; return what escaped, empty when nothing did."""
    with watching(Watch(writable=[Path(tempfile.gettempdir())])) as watch:
        for attempt in range(2):
            budget.restart()
            signal.alarm(HANG_SECONDS)
            try:
                run(target, data)
            except budget.OverBudget:
                if attempt:  # the first time may have paid for a neighbour's caches
                    return traceback.format_exc(limit=-6)
                continue
            except BaseException:  # noqa: BLE001 - whatever escapes is what we look for
                return traceback.format_exc(limit=-8)
            finally:
                signal.alarm(0)
            break
    return "\n".join(watch.take())


def prepare(bases: dict[str, bytes], targets: list[str]) -> None:
    """Run every target once on whole images, so that imports and first-use costs belong to no case."""
    faulthandler.enable()
    logging.disable(logging.CRITICAL)  # frameworks warn of every damaged image
    signal.signal(signal.SIGALRM, _alarm)
    for target in targets:
        for name in sorted(bases):
            run(target, bases[name])
    budget.enforced = True


def _worker(pipe: Connection, bases: dict[str, bytes], seeds: range, targets: list[str]) -> None:
    prepare(bases, targets)
    for seed in seeds:
        name, data, changes = case_data(bases, seed)
        for target in targets:
            pipe.send(("at", seed, target))
            problem = escape_of(target, data)
            if problem:
                pipe.send(("escape", seed, target, name, changes, problem))
    pipe.send(("done",))


def _batch(bases: dict[str, bytes], seeds: range, targets: list[str]) -> tuple[list[dict[str, object]], int]:
    """Run one batch in a process of its own; return the escapes and the first seed not run."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_worker, args=(theirs, bases, seeds, targets))
    process.start()
    theirs.close()
    escapes: list[dict[str, object]] = []
    at: tuple[int, str] = (seeds.start, "")
    while True:
        try:
            if not ours.poll(HANG_SECONDS * 3):
                process.kill()
                break
            message = ours.recv()
        except EOFError:
            break
        if message[0] == "done":
            process.join()
            return escapes, seeds.stop
        if message[0] == "at":
            at = message[1:]
        else:
            escapes.append(dict(zip(("seed", "target", "base", "changes", "problem"), message[1:], strict=True)))
    process.join()
    if not at[1]:
        raise SystemExit(f"no case could be run: the worker ended with {process.exitcode}")
    problem = f"worker ended with {process.exitcode}"
    name, _, changes = case_data(bases, at[0])
    escapes.append({"seed": at[0], "target": at[1], "base": name, "changes": changes, "problem": problem})
    return escapes, at[0] + 1


def main() -> int:
    """Run, save escapes, print figures."""
    parser = argparse.ArgumentParser(
        prog="fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seconds", type=float, help="run for this long instead of a number of cases")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the first case; the others count up (default: by clock)"
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"any of {','.join(TARGETS)}")
    parser.add_argument("--differential", type=int, default=0, metavar="N", help="then compare N images with QEMU")
    parser.add_argument("--save", type=Path, help="folder for the images that escaped")
    args = parser.parse_args()
    seed = int(time.time()) * 1000 if args.seed is None else args.seed
    targets = args.targets.split(",")
    print(f"seed {seed}, targets {', '.join(targets)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bases = {path.name: path.read_bytes() for path in corpus.make(Path(folder) / "corpus")}
        escapes: list[dict[str, object]] = []
        kinds: collections.Counter[str] = collections.Counter()
        done, started = 0, time.monotonic()
        deadline = started + (args.seconds or 0)
        while time.monotonic() < deadline if args.seconds else done < args.cases:
            count = BATCH if args.seconds else min(BATCH, args.cases - done)
            found, reached = _batch(bases, range(seed + done, seed + done + count), targets)
            for escape in found:
                # Of each kind only the first is shown in full; all are counted and saved.
                kind = f"{escape['target']}: {str(escape['problem']).strip().splitlines()[-1][:100]}"
                kinds[kind] += 1
                if kinds[kind] == 1:
                    print(json.dumps({**escape, "problem": str(escape["problem"])[-1500:]}), flush=True)
            escapes += found
            done = reached - seed
            print(f"{done} images, {len(escapes)} escapes, {time.monotonic() - started:.0f} s", flush=True)
        differences = differential.run(bases, seed, args.differential, Path(folder)) if args.differential else []
        for escape in [*escapes, *differences]:
            if args.save:
                args.save.mkdir(parents=True, exist_ok=True)
                _, data, _ = case_data(bases, int(str(escape["seed"])))
                (args.save / f"{escape['target']}-{escape['seed']}.qcow2").write_bytes(data)
    for kind, count in kinds.most_common():
        print(f"{count} times {kind}")
    print(f"{done * len(targets)} runs of {done} images, {len(escapes)} escapes")
    return 1 if escapes or differences else 0


if __name__ == "__main__":
    sys.exit(main())
