"""Many images: one line of JSON each, written as it completes; restartable; no image stops the run.

Each image is audited in a process of its own from a small pool, so that a crash (of the
interpreter, of a decompressor, by the kernel for want of memory) costs that one image. A line
carries the identity of what was audited, and a finished line is never written in part::

    {"schema": 1, "identity": {"path": ..., "size": ..., "mtime_ns": ..., "head_sha256": ...}, "image": ..., ...}
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from ..audit import audit
from ..errors import Qcow2Error, printable
from ..findings import Severity
from ..render import render_line
from ..resolver import Resolver
from .output import OutputExists, Progress, refuse_evidence

EXIT_DONE, EXIT_FINDINGS, EXIT_FAILED = 0, 1, 2
_HEAD = 65536  # bytes of each image that go into its identity
_PER_WORKER = 64  # images after which a worker is replaced: memory it grew by is given back
_CRASHED = "QCOW2-AUDIT-CRASHED"


def run_fleet(args: argparse.Namespace) -> int:
    """Audit every image the arguments name; write one line for each."""
    if args.format not in (None, "jsonl"):
        raise Qcow2Error("several images are reported as JSON lines: use --format jsonl")
    if args.passphrase_file and args.jobs > 1:
        raise Qcow2Error("--passphrase-file is for one image or one job")
    if args.resume and args.output:
        raise Qcow2Error("--resume already names the output; leave -o out")
    paths = _paths(args)
    if not paths:
        raise Qcow2Error("no images were named")
    with ExitStack() as stack:
        out, done = _output(args, stack)
        waiting = [path for path in paths if done.get(path) != _stamp(path)]
        skipped = len(paths) - len(waiting)
        worst: Severity | None = None
        failed = 0
        progress = stack.enter_context(Progress("audit", len(paths), unit="images"))
        progress.advance(skipped)
        for line in _lines(waiting, args.depth, args.jobs, tuple(args.backing_dir)):
            out.write(line + "\n")
            out.flush()
            progress.advance(1)
            severity, broken = _summary(line)
            failed += broken
            worst = severity if worst is None or (severity is not None and severity > worst) else worst
        out.flush()
    if failed:
        print(f"qcow2-forensics: {failed} of {len(waiting)} images could not be audited", file=sys.stderr)
    if args.fail_on is not None and worst is not None and worst >= args.fail_on:
        return EXIT_FINDINGS
    return EXIT_FAILED if failed else EXIT_DONE


def _paths(args: argparse.Namespace) -> list[str]:
    names = list(args.images)
    if args.files_from == "-":
        names += sys.stdin.read().splitlines()
    elif args.files_from:
        names += Path(args.files_from).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return list(dict.fromkeys(name for name in names if name.strip()))


def _output(args: argparse.Namespace, stack: ExitStack) -> tuple[TextIO, dict[str, list[int]]]:
    """Return where lines go, and what earlier runs finished: path to size and time of change."""
    if args.resume:
        path = Path(args.resume)
        refuse_evidence(path, args.images)
        done = _finished(path)
        return stack.enter_context(path.open("a", encoding="utf-8")), done
    if args.output:
        path = Path(args.output)
        refuse_evidence(path, args.images)
        if path.exists() and not args.force:
            raise OutputExists(path)
        return stack.enter_context(path.open("w", encoding="utf-8")), {}
    return sys.stdout, {}


def _finished(path: Path) -> dict[str, list[int]]:
    """Return what a file of lines already has, and cut off a last line that was not finished."""
    done: dict[str, list[int]] = {}
    if not path.exists():
        return done
    good = 0
    with path.open("rb") as stream:
        if stream.read(1) not in (b"", b"{"):  # nothing of ours, and nothing to cut off
            raise Qcow2Error(f"{printable(str(path))} is not a file of audit lines")
        stream.seek(0)
        for line in stream:
            if not line.endswith(b"\n"):
                break
            try:
                identity = json.loads(line)["identity"]
                done[identity["path"]] = [identity["size"], identity["mtime_ns"]]
            except (ValueError, KeyError, TypeError):
                raise Qcow2Error(f"{printable(str(path))} is not a file of audit lines") from None
            good += len(line)
    if good < path.stat().st_size:
        os.truncate(path, good)
    return done


def _stamp(path: str) -> list[int] | None:
    """Return size and time of change of an image, None when it cannot be looked at."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _summary(line: str) -> tuple[Severity | None, bool]:
    findings = json.loads(line)["findings"]
    worst = max((Severity.parse(finding["severity"]) for finding in findings), default=None)
    return worst, any(finding["code"] in ("QCOW2-UNREADABLE", _CRASHED) for finding in findings)


# --- the pool ------------------------------------------------------------------------------------


def audit_line(path: str, depth: str = "standard", folders: tuple[str, ...] = ()) -> str:
    """Audit one image and return its line; a plain function of plain values, for any worker pool."""
    identity = _identity(path)
    report = audit(path, depth, resolver=Resolver(folders=folders))
    data = json.loads(render_line(report))
    return json.dumps({"schema": data.pop("schema"), "identity": identity, **data}, separators=(",", ":"))


def _identity(path: str) -> dict[str, Any]:
    stamp = _stamp(path)
    identity: dict[str, Any] = {"path": path, "size": stamp and stamp[0], "mtime_ns": stamp and stamp[1]}
    try:
        with open(path, "rb") as stream:
            identity["head_sha256"] = hashlib.sha256(stream.read(_HEAD)).hexdigest()
    except (OSError, ValueError):
        identity["head_sha256"] = None
    return identity


def _lines(paths: Iterable[str], depth: str, jobs: int, folders: tuple[str, ...]) -> Iterator[str]:
    """Yield a line per image in order of completion."""
    waiting = list(reversed(list(paths)))
    suspects: list[str] = []
    while waiting:
        running: dict[Future[str], str] = {}
        # Not forked: a worker must not share our locks, our open files or our terminal's state.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(waiting)), context, max_tasks_per_child=_PER_WORKER) as pool:
            broken = False
            while running or (waiting and not broken):
                while waiting and not broken and len(running) < 2 * jobs:
                    path = waiting.pop()
                    try:
                        running[pool.submit(audit_line, path, depth, folders)] = path
                    except BrokenProcessPool:
                        waiting.append(path)
                        broken = True
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    path = running.pop(future)
                    try:
                        yield future.result()
                    except BrokenProcessPool:
                        # One of those that ran did it; each gets a pool of its own below.
                        suspects.append(path)
                        broken = True
                    except Exception as error:  # noqa: BLE001 - one image never stops the run; it is reported
                        yield _crashed(path, f"{type(error).__name__}: {error}")
        for path in suspects:
            yield _alone(path, depth, folders)
        suspects.clear()


def _alone(path: str, depth: str, folders: tuple[str, ...]) -> str:
    """Audit an image whose worker may have died, in a process nobody else depends on."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(audit_line, path, depth, folders).result()
        except BrokenProcessPool:
            return _crashed(path, "the worker process died")
        except Exception as error:  # noqa: BLE001 - as above
            return _crashed(path, f"{type(error).__name__}: {error}")


def _crashed(path: str, why: str) -> str:
    finding = {
        "code": _CRASHED,
        "severity": "High",
        "title": "the audit of this image did not finish",
        "note": "consistent with a defect here, or with an image that exhausts memory; nothing is known about it",
        "confidence": "certain",
        "scope": "",
        "explained_by": [],
        "count": 1,
        "evidence": [{"field": "error", "value": why}],
    }
    empty = {"depth": "", "image": {"path": path}, "check": None, "findings": [finding], "details": {}}
    return json.dumps({"schema": 1, "identity": _identity(path), **empty}, separators=(",", ":"))
