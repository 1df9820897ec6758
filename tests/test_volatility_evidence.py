"""Volatility's own plugins on the evidence case: a real Linux guest, two snapshots with memory.

The peer is the same plugin on a raw dump, whose bytes carry the hashes of QEMU's own ``pmemsave``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("volatility3.framework", reason="volatility3 is absent")

from tests.conftest import EvidenceCase
from tests.volatility_tools import stack, vol

pytestmark = pytest.mark.slow  # whole runs of vol over the case; test_volatility.py has the essentials

BEFORE, DURING = "before-incident", "during-incident"
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def raw(evidence: EvidenceCase, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The memory of both snapshots as raw files, proven to be what QEMU's pmemsave wrote."""
    folder = tmp_path_factory.mktemp("raw")
    paths = {}
    for name in (BEFORE, DURING):
        layer = stack(evidence.image, snapshot=name)
        known = evidence.truth["guest_memory"][name]
        data = layer.read(0, known["size"])
        for part in known["ranges"]:
            piece = data[part["address"] : part["address"] + part["length"]]
            assert hashlib.sha256(piece).hexdigest() == part["sha256"]
        paths[name] = folder / f"{name}.raw"
        paths[name].write_bytes(data)
    return paths


@pytest.fixture
def run(evidence: EvidenceCase, tmp_path: Path) -> Run:
    """Run a plugin as JSON with the case's symbols and every stacker."""

    def runner(*arguments: str | Path, warnings: bool = False) -> list[dict[str, Any]]:
        done = vol("-s", evidence.symbols, "-r", "json", *arguments, cwd=tmp_path, every_stacker=True)
        assert done.returncode == 0, done.stderr
        assert ("WARNING" in done.stderr) == warnings, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    return runner


def test_the_latest_snapshot_shows_the_hidden_process(evidence: EvidenceCase, run: Run) -> None:
    found = run("-f", evidence.image, "linux.pslist.PsList", warnings=True)
    assert ".cache_helper" in {row["COMM"] for row in found}


@pytest.mark.parametrize("snapshot", [BEFORE, DURING])
def test_processes_are_those_of_qemus_dump(
    evidence: EvidenceCase, raw: dict[str, Path], run: Run, snapshot: str
) -> None:
    found = run("--qcow2-snapshot", snapshot, "-f", evidence.image, "linux.pslist.PsList")
    assert found == run("-f", raw[snapshot], "linux.pslist.PsList")
    assert len(found) > 40
    assert (".cache_helper" in {row["COMM"] for row in found}) == (snapshot == DURING)


PLUGINS = {
    "banners": (BEFORE, "banners.Banners"),
    "malfind": (DURING, "linux.malware.malfind.Malfind"),
    "yarascan": (DURING, "yarascan.YaraScan", "--yara-string", "C2-CALLBACK"),
    "regexscan": (DURING, "regexscan.RegExScan", "--pattern", "C2-CALL[A-Z]+"),
}
FINDS = {"banners", "yarascan", "regexscan"}


@pytest.mark.parametrize("name", PLUGINS)
def test_other_plugins_give_what_they_give_on_qemus_dump(
    evidence: EvidenceCase, raw: dict[str, Path], run: Run, name: str
) -> None:
    snapshot, *plugin = PLUGINS[name]
    found = run("--qcow2-snapshot", snapshot, "-f", evidence.image, *plugin)
    assert found == run("-f", raw[snapshot], *plugin)
    assert bool(found) or name not in FINDS


def test_a_saved_configuration_gives_the_same_processes(evidence: EvidenceCase, run: Run) -> None:
    plugin = "linux.pslist.PsList"
    found = run("--qcow2-snapshot", "1", "-f", evidence.image, "--save-config", "saved.json", plugin)
    assert run("-c", "saved.json", plugin) == found


def test_the_registers_place_the_kernel_and_nothing_is_scanned_for(evidence: EvidenceCase, tmp_path: Path) -> None:
    arguments = ("-vvvv", "-s", evidence.symbols, "-f", evidence.image, "linux.pslist.PsList", "--pid", "1")
    done = vol(*arguments, cwd=tmp_path, every_stacker=True)
    assert done.returncode == 0, done.stderr
    assert "using QemuLinuxStacker" in done.stderr
    assert "using LinuxIntel" not in done.stderr.partition("using QemuLinuxStacker")[0].replace(
        "Attempting to stack", ""
    )


def test_worker_processes_find_every_banner(evidence: EvidenceCase, raw: dict[str, Path], run: Run) -> None:
    found = run("--parallelism", "processes", "--qcow2-snapshot", "2", "-f", evidence.image, "banners.Banners")
    assert found == run("-f", raw[DURING], "banners.Banners")
    assert found


def test_what_changed_between_two_memories_is_the_intruders_process(evidence: EvidenceCase, run: Run) -> None:
    plugins = ("linux.pslist", "linux.lsmod", "linux.malware.hidden_modules")
    arguments = ("--qcow2-snapshot", DURING, "-f", evidence.image, "qcow2.changes.Changes", "--plugins", *plugins)
    (row,) = run(*arguments)
    assert (row["Change"], row["Plugin"]) == ("appeared", "linux.pslist.PsList")
    assert "COMM=.cache_helper" in row["Row"]
