"""Many images: one line of JSON each, written as it completes; restartable; no image stops the run.

Each image is audited in a process of its own from a small pool, so that a crash (of the
interpreter, of a decompressor, by the kernel for want of memory) costs that one image. A line
carries the identity of what was audited, and a finished line is never written in part::

    {"schema": 1, "tool": ..., "identity": {"path": ..., "size": ..., "mtime_ns": ..., "head_sha256": ...}, "image": ..., ...}
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TextIO

from ..audit import audit
from ..errors import Qcow2Error, reason
from ..findings import SCHEMA_VERSION, Evidence, Finding, Report, Severity
from ..format.source import FileSource
from ..reader.resolver import COMMAND_LINE, Resolver
from ..reader.writer import atomic_writer, refuse_evidence
from ..render.fleet_page import render_fleet
from ..render.page import run_facts
from ..render.plain import render_text
from ..render.rows import render_csv, without_pictures
from ..text import TOOL, cut, plural
from . import EXIT_DONE, EXIT_FAILED, EXIT_FINDINGS, complain
from .audit import DEPTHS, LIMITED, left_out
from .case import files_of, run_of, wants_run
from .output import Progress

_HEAD = 65536  # bytes of each image that go into its identity
_PER_WORKER = 64  # images after which a worker is replaced: memory it grew by is given back
_CRASHED = "QCOW2-AUDIT-CRASHED"


def run_fleet(args: argparse.Namespace) -> int:
    """Audit every image the arguments name; write one line for each."""
    if args.format == "json":
        raise Qcow2Error("several images are no single JSON document: use --format jsonl, text, csv or html")
    if args.format not in (None, "jsonl") and args.resume:
        raise Qcow2Error(f"--resume appends JSON lines: leave --format {args.format} out")
    if args.resume and args.output:
        raise Qcow2Error("--resume already names the output; leave -o out")
    paths = _paths(args)
    if not paths:
        raise Qcow2Error("no images were named")
    facts = run_of(args, (), datetime.now(UTC))
    work = functools.partial(
        audit_line,
        depth=args.depth,
        folders=tuple(args.backing_dir),
        hashed=args.hash,
        run=facts if args.hash or wants_run(args) else None,
    )
    evidence = list(paths)  # and what the images refer to, as far as it was read
    with ExitStack() as stack:
        out, done = _output(args, evidence, stack)
        waiting = [path for path in paths if not _is_done(done.get(path), path, args.depth, args.hash)]
        reports: list[dict[str, Any]] = []  # for the page, which needs all of them
        results = [done[path] for path in paths if path not in set(waiting)]
        progress = stack.enter_context(Progress("audit", len(paths), unit="images"))
        progress.advance(len(results))
        incomplete = 0
        for line in lines(waiting, work, args.jobs):
            report = json.loads(line)
            evidence += report["details"].get("files", ())
            if args.format == "html":
                reports.append(report)
            else:
                out.write(_shown(line, report, args, is_first=not results))
                out.flush()
            progress.advance(1)
            results.append(_result(report))
            incomplete += any(left_out(Report.from_dict(report)))
        if args.format == "html":
            out.write(render_fleet(reports, extra=run_facts(facts)))
    failed = sum(result.failed for result in results)
    complain(_summary(results))
    if incomplete:
        complain(
            f"{plural(incomplete, 'report')} of this run {'lists' if incomplete == 1 else 'list'} less "
            f"than was found: see the counts of findings, and {LIMITED}"
        )
    if failed:
        complain(f"{failed} of {plural(len(paths), 'image')} could not be audited")
    if args.fail_on is not None and any(result.worst >= args.fail_on for result in results):
        return EXIT_FINDINGS
    return EXIT_FAILED if failed else EXIT_DONE


def _shown(line: str, report: dict[str, Any], args: argparse.Namespace, *, is_first: bool) -> str:
    """Return one image's part of the output."""
    if args.format == "text":
        return ("" if is_first else "\n") + render_text(Report.from_dict(report), items=100 if args.verbose else 5)
    if args.format == "csv":
        rows = render_csv([Report.from_dict(report)])
        return rows if is_first else rows.partition("\r\n")[2]  # one header for all
    return line + "\n"


def _summary(results: list[Result]) -> str:
    """Return one sentence: how many images, and how many have which severity as their worst."""
    worst = Counter(result.worst for result in results)
    parts = [f"{worst[severity]} {severity.label}" for severity in sorted(Severity, reverse=True) if worst[severity]]
    parts += [f"{worst[-1]} without findings"] if worst[-1] else []
    return f"{plural(len(results), 'image')}, by {'its' if len(results) == 1 else 'their'} worst finding: {', '.join(parts)}"


def _paths(args: argparse.Namespace) -> list[str]:
    names = list(args.images)
    if args.files_from == "-":
        names += _listed(sys.stdin.buffer.read())
    elif args.files_from:
        names += _listed(Path(args.files_from).read_bytes())
    return list(dict.fromkeys(name for name in names if name.strip()))


def _listed(data: bytes) -> list[str]:
    """Return the lines of a list; file names may hold all other characters that end lines of text."""
    return [os.fsdecode(line.removesuffix(b"\r")) for line in data.split(b"\n")]


class Result(NamedTuple):
    """What matters of a finished line: which bytes it is about, how deep, and how bad."""

    size: int | None
    mtime_ns: int | None
    depth: str
    worst: int  # severity, -1 without findings
    failed: bool
    hashed: bool  # it has the SHA-256 of the whole file


def _result(line: dict[str, Any]) -> Result:
    identity, findings = line["identity"], line["findings"]
    worst = max((int(Severity.parse(finding["severity"])) for finding in findings), default=-1)
    failed = any(finding["code"] in ("QCOW2-UNREADABLE", _CRASHED) for finding in findings)
    hashed = any("sha256" in file for file in line["details"].get("run", {}).get("files", ()))
    return Result(identity["size"], identity["mtime_ns"], line["depth"], worst, failed, hashed)


def _is_done(result: Result | None, path: str, depth: str, hashed: bool) -> bool:
    """Whether an earlier line is about this very file, and read at least as much of it."""
    if result is None or result.size is None or result.depth not in DEPTHS[DEPTHS.index(depth) :]:
        return False
    if hashed and not result.hashed:
        return False
    return [result.size, result.mtime_ns] == _stamp(path)


def _output(args: argparse.Namespace, evidence: list[str], stack: ExitStack) -> tuple[TextIO, dict[str, Result]]:
    """Return where lines go, and what earlier runs finished."""
    if args.resume:
        path = Path(args.resume)
        refuse_evidence(path, evidence)
        done = _finished(path)
        return stack.enter_context(path.open("a", encoding="utf-8")), done
    if args.output:
        # Its name says that it is whole; --resume is for what may be interrupted.
        file = stack.enter_context(atomic_writer(args.output, force=args.force, evidence=evidence))
        return io.TextIOWrapper(file, encoding="utf-8", write_through=True), {}
    return sys.stdout, {}


def _finished(path: Path) -> dict[str, Result]:
    """Return what a file of lines already has, and cut off a last line that was not finished."""
    done: dict[str, Result] = {}
    if not path.exists():
        return done
    good = 0
    with path.open("rb") as stream:
        if stream.read(1) not in (b"", b"{"):  # nothing of ours, and nothing to cut off
            raise Qcow2Error(f"{cut(str(path))} is not a file of audit lines")
        stream.seek(0)
        for line in stream:
            if not line.endswith(b"\n"):
                break
            try:
                data = json.loads(line)
                done[data["identity"]["path"]] = _result(data)
            except (ValueError, KeyError, TypeError):
                raise Qcow2Error(f"{cut(str(path))} is not a file of audit lines") from None
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


# --- the pool ------------------------------------------------------------------------------------


def audit_line(
    path: str,
    depth: str = "standard",
    folders: tuple[str, ...] = (),
    *,
    hashed: bool = False,
    run: Mapping[str, Any] | None = None,
) -> str:
    """Audit one image and return its line; a plain function of plain values, for any worker pool.

    ``run`` are facts of the case for the line, with the files that were read, and their SHA-256 where ``hashed``.
    """
    identity = _identity(path)
    report = audit(path, depth, resolver=Resolver(folders=folders, remedies=COMMAND_LINE))
    data = without_pictures(report).to_dict()
    if run is not None:
        files = files_of((path, *report.details.get("files", ())), hashed=hashed)
        data["details"]["run"] = {**run, "files": files}
    return _line(identity, data)


def _line(identity: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    head = {"schema": SCHEMA_VERSION, "tool": TOOL, "identity": identity}
    return json.dumps({**head, **data}, separators=(",", ":"))


def _identity(path: str) -> dict[str, Any]:
    stamp = _stamp(path)
    identity: dict[str, Any] = {"path": path, "size": stamp and stamp[0], "mtime_ns": stamp and stamp[1]}
    try:
        source = FileSource(path)  # waits for no FIFO's writer
    except (Qcow2Error, OSError, ValueError):
        return {**identity, "head_sha256": None}
    try:
        identity["head_sha256"] = hashlib.sha256(source.read(0, _HEAD)).hexdigest()
    except OSError:
        identity["head_sha256"] = None
    finally:
        source.close()
    return identity


Work = Callable[[str], str]


def lines(paths: Iterable[str], work: Work, jobs: int) -> Iterator[str]:
    """Yield a line per image in order of completion; ``work`` must be picklable."""
    waiting = list(reversed(list(paths)))
    while waiting:
        suspects: list[str] = []
        with _pool(min(jobs, len(waiting))) as pool:
            yield from _until_broken(pool, waiting, suspects, work, 2 * jobs)
        # A worker died. One of the images that ran did it: each of them gets a process of its own.
        for path in suspects:
            with _pool(1) as pool:
                lost: list[str] = []
                yield from _until_broken(pool, [path], lost, work, 1)
            if lost:
                yield _crashed(path, "the worker process died")


def _until_broken(
    pool: ProcessPoolExecutor, waiting: list[str], suspects: list[str], work: Work, ahead: int
) -> Iterator[str]:
    """Work off ``waiting`` until it is empty or a worker died; ``suspects`` ran when it did."""
    running: dict[Future[str], str] = {}
    # Ctrl-C inside concurrent.futures.wait() can leave a lock held that the pool needs to end; a queue's get() is safe.
    finished: SimpleQueue[Future[str]] = SimpleQueue()
    while running or (waiting and not suspects):
        while waiting and not suspects and len(running) < ahead:
            path = waiting.pop()
            try:
                with _interrupts_held():  # submitting starts workers
                    future = pool.submit(work, path)
                    running[future] = path
                    future.add_done_callback(finished.put)
            except BrokenProcessPool:
                suspects.append(path)
        if not running:
            return
        future = finished.get()
        path = running.pop(future)
        try:
            yield future.result()
        except BrokenProcessPool:
            suspects.append(path)
        except Exception as error:  # noqa: BLE001 - one image never stops the run; it is reported
            yield _crashed(path, f"{type(error).__name__}: {reason(error)}")


@contextlib.contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose workers are ended, not waited for, when the run is interrupted."""
    # Not forked: a worker must not share our locks, our open files or our terminal's state.
    context = multiprocessing.get_context("spawn")
    known = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, context, _end_with_parent, max_tasks_per_child=_PER_WORKER)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - known:
            process.terminate()
        raise
    finally:
        pool.shutdown()


def _end_with_parent() -> None:
    """Have a worker end when the run is killed, instead of waiting for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    os._exit(1)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start processes and threads that do not get Ctrl-C, for the main thread to decide."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _crashed(path: str, why: str) -> str:
    finding = Finding(
        _CRASHED,
        Severity.HIGH,
        "the audit of this image did not finish",
        "consistent with a defect here, or with an image that exhausts memory; nothing is known about it",
        (Evidence("error", why),),
        count=1,
    )
    return _line(_identity(path), Report({"path": path}, (finding,), depth="").to_dict())
