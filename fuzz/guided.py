"""Coverage-guided fuzzing of one target with atheris: ``python -m fuzz.guided read FOLDER [libFuzzer options]``.

FOLDER holds the growing corpus; it is filled from :func:`fuzz.corpus.make_small` when empty. For example
``python -m fuzz.guided audit /tmp/guided -max_total_time=3600 -artifact_prefix=/tmp/escapes/``.

Every module that a target reaches is imported under instrumentation before fuzzing starts, however
late the code itself imports it: what is imported later is invisible to libFuzzer. Each input is held
to the same budgets as in structured fuzzing, with more time, because instrumented code is slower.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import pkgutil
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import atheris

_MAX_BYTES = 1 << 20
_STRUCTURED = 0.7  # the share of mutations that know the format
_SLOWDOWN = 4  # of processor time, by instrumentation: measured 0.8 to 3.8, 2.5 for an audit
_VOLATILITY = Path(__file__).resolve().parent.parent / "plugins" / "volatility"


def load() -> None:
    """Import all of ours that is installed, instrumented, and of the frameworks nothing so."""
    with _instrumented("qcow2_forensics"):
        _walk("qcow2_forensics")
    for ours, framework in (("pytsk3_qcow2", "pytsk3"), ("dfvfs_qcow2", "dfvfs")):
        if _present(framework):
            with _instrumented(ours):
                _walk(ours)
    if _present("volatility3.framework"):
        import volatility3.plugins
        from volatility3.framework import constants
        from volatility3.framework.automagic import stacker  # noqa: F401 - and most of the framework
        from volatility3.plugins import timeliner  # noqa: F401

        for paths in (constants.PLUGINS_PATH, volatility3.plugins.__path__):
            paths.append(str(_VOLATILITY))
        with _instrumented("volatility3"):
            _walk("volatility3.plugins.qcow2")


@contextmanager
def _instrumented(package: str) -> Iterator[None]:
    kept, sys.stderr = sys.stderr, open(os.devnull, "w", encoding="ascii")  # noqa: SIM115 - a line for each module
    try:
        with atheris.instrument_imports(include=[package]):
            yield
    finally:
        sys.stderr.close()
        sys.stderr = kept


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _walk(package: str) -> None:
    """Import a package and every module below it, except programs."""
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def main() -> None:
    """Fill the corpus and hand over to libFuzzer."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    load()
    from . import budget, corpus, targets
    from .mutator import Mutator
    from .watch import Watch, watching

    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        with tempfile.TemporaryDirectory() as temporary:
            for path in corpus.make_small(Path(temporary)):
                (folder / path.name).write_bytes(path.read_bytes())
    logging.disable(logging.CRITICAL)  # frameworks warn of every damaged image
    for path in sorted(folder.glob("*.qcow*")):  # first use belongs to no input
        targets.run(name, path.read_bytes())
    budget.enforced = True
    budget.CPU_SECONDS *= _SLOWDOWN
    watch = Watch(writable=[Path(tempfile.gettempdir())])

    def one_input(data: bytes) -> None:
        for attempt in range(2):
            budget.restart()
            try:
                with watching(watch):
                    targets.run(name, data)
                break
            except budget.OverBudget:
                if attempt:  # the first time may have paid for a neighbour's caches
                    raise
        if seen := watch.take():
            raise targets.Escape("\n".join(seen))

    mutator_of = functools.lru_cache(maxsize=64)(Mutator)  # libFuzzer comes back to an input many times

    def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if data[:4] != b"QFI\xfb" or rng.random() > _STRUCTURED:
            return bytes(atheris.Mutate(data, max_size))
        return mutator_of(data).mutate(rng)[0][:max_size]

    options: list[Any] = [sys.argv[0], str(folder), f"-max_len={_MAX_BYTES}", "-timeout=60", *sys.argv[3:]]
    atheris.Setup(options, one_input, custom_mutator=custom_mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
