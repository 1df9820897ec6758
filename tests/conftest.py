"""Fixtures every test may use: image factories in a temporary folder, and the evidence case."""

from __future__ import annotations

import contextlib
import gc
import json
import lzma
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import qemu

# How many examples a property test runs: few in the README's command, many in the slow tests.
QUICK_EXAMPLES, THOROUGH_EXAMPLES = 12, 100
LONG = 2.0  # seconds of processor time; what takes more is named at the end of a quick run, and fails nothing


def pytest_configure(config: pytest.Config) -> None:
    """Choose the number of examples by the tier that runs; ``-m ""`` runs both. Let what tests start be interrupted.

    Compiled modules are kept even where the environment says not to: otherwise each command that a test starts would
    compile all of ours again, which takes as long as most of them run.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs; programs inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile(
        "tier",
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        max_examples=THOROUGH_EXAMPLES if _is_thorough(config) else QUICK_EXAMPLES,
        derandomize="CI" in os.environ,
        print_blob="CI" in os.environ,
    )
    settings.load_profile("tier")


def _is_thorough(config: pytest.Config) -> bool:
    return config.option.markexpr != "not slow"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Have three workers for two processors in the quick tier: its tests wait for disks and for what they start."""
    return None if _is_thorough(config) else (os.cpu_count() or 1) * 3 // 2


def pytest_itemcollected(item: pytest.Item) -> None:
    """Put property tests into both tiers, which run different numbers of examples, and the evidence case into the slow one."""
    if "evidence" in getattr(item, "fixturenames", ()):
        item.add_marker("slow")
    if _is_thorough(item.config) and getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
        item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Leave the collected tests out of garbage collections: they stay to the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note how much processor time a test takes, with that of the programs it runs."""
    before = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        item.user_properties.append(("processor time", sum(os.times()[:4]) - before))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print one line for each reason tests were skipped, and one for each test that may be too long for the quick tier."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.getreports("skipped")
        if isinstance(report.longrepr, tuple)
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
    for report in [] if _is_thorough(config) else terminalreporter.getreports("passed"):
        seconds = dict(report.user_properties).get("processor time", 0)
        if seconds > LONG:
            terminalreporter.write_line(f"took {seconds:.1f} s of processor time, slow? {report.nodeid}")


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """UTC as the time zone of this process: FAT keeps local times, and tools print them."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture(scope="session", autouse=True)
def _templates(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what :mod:`tests.qemu` makes once and copies in a folder that the workers of one run share."""
    base = tmp_path_factory.getbasetemp()
    qemu.templates = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "templates"
    qemu.templates.mkdir(exist_ok=True)


class _Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments, **options))
        except Exception as error:  # noqa: BLE001 - it is the caller's
            future.set_exception(error)
        return future


@pytest.fixture
def without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have many images audited in this process: each worker takes a third of a second to start."""
    monkeypatch.setattr("qcow2_forensics.cli.fleet._pool", lambda _jobs: contextlib.nullcontext(_Here()))


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[..., Path]:
    """A factory: ``make_image("name.qcow2", "1M", "write -P 1 0 64k", cluster_size="4k")``.

    Creates an image with qemu-img, then runs the qemu-io commands on it.
    """
    qemu.need()

    def make(name: str = "disk.qcow2", size: int | str = "1M", *commands: str, **options: Any) -> Path:
        path = qemu.create(tmp_path / name, size, **options)
        if commands:
            qemu.io(path, *commands, fmt=options.get("fmt", "qcow2"), secret=options.get("secret"))
        return path

    return make


@pytest.fixture
def base_image(make_image: Callable[..., Path]) -> Path:
    """A 1 MiB disk of 64 KiB clusters whose first three hold 0x11, 0x22 and 0x33, made by QEMU.

    Layout: header 0, refcount table 0x10000, refcount block 0x20000, L1 0x30000, L2 0x40000,
    data 0x50000 to 0x80000.
    """
    writes = ("write -P 0x11 0 64k", "write -P 0x22 64k 64k", "write -P 0x33 128k 64k")
    return make_image("base.qcow2", "1M", *writes, cluster_size="64k")


@dataclass(frozen=True)
class EvidenceCase:
    """The evidence case: a disk with two memory snapshots, what is known to be true of it, symbols."""

    image: Path
    truth: dict[str, Any]
    symbols: Path  # folder for Volatility's -s, holding linux/*.json.xz


@pytest.fixture(scope="session")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> EvidenceCase:
    """The case that QCOW2_EVIDENCE points to, decompressed once per run."""
    folder = os.environ.get("QCOW2_EVIDENCE")
    if not folder or not (Path(folder) / "case.qcow2.xz").is_file():
        pytest.skip("the evidence case is absent: set QCOW2_EVIDENCE to its folder")
    source = Path(folder)
    target = tmp_path_factory.mktemp("evidence")
    image = target / "case.qcow2"
    with lzma.open(source / "case.qcow2.xz") as packed, image.open("wb") as out:
        shutil.copyfileobj(packed, out, 1 << 20)
    symbols = target / "symbols"
    (symbols / "linux").mkdir(parents=True)
    for item in source.glob("*.json.xz"):
        shutil.copyfile(item, symbols / "linux" / item.name)
    return EvidenceCase(image, json.loads((source / "truth.json").read_text()), symbols)
