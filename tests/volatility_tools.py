"""Volatility for the tests: its library with our plugin folder, and ``vol`` as a user runs it."""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import machines, qemu
from tests.machines import MiB

pytest.importorskip("volatility3.framework", reason="volatility3 is absent")

import volatility3.plugins
from volatility3 import framework
from volatility3.framework import constants, contexts, interfaces
from volatility3.framework.automagic import stacker
from volatility3.framework.layers import physical

__all__ = ["common", "content", "elision", "index_cache", "layers", "ram", "stackers"]

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ROOT / "plugins" / "volatility"
LOADED = 20 * MiB  # where the loader put its bytes; the same content as machines.loaded(0, LENGTH)
LENGTH = 3 * MiB
SIZE = 64 * MiB
BANNER = b"Linux version 9.8.7 (nobody@nowhere) #1\n"
BANNERS = (40 * MiB, 50 * MiB - 20, 60 * MiB - 2)  # two of them cross a page, and so two records of the stream

if str(PLUGINS) not in constants.PLUGINS_PATH:
    constants.PLUGINS_PATH.append(str(PLUGINS))
if str(PLUGINS) not in volatility3.plugins.__path__:
    volatility3.plugins.__path__.append(str(PLUGINS))

from volatility3.plugins.qcow2 import (  # noqa: E402 - needs the path above
    common,
    content,
    elision,
    index_cache,
    layers,
    ram,
    stackers,
)


def machine_image(folder: Path) -> tuple[Path, dict[str, bytes], list[dict[str, int]]]:
    """Make an image with the memory of a real machine twice; return it, QEMU's own dumps, and the last registers."""
    qemu.need("qemu-system-x86_64")
    (folder / "banner").write_bytes(BANNER.ljust(4096, b"\0"))
    args = ["-M", "pc", "-m", "64"]
    for address in BANNERS:
        args += ["-device", f"loader,file={folder / 'banner'},addr={address:#x},force-raw=on"]
    machine = machines.Machine("pc-64M", tuple(args), ((LOADED, LENGTH),))
    dumps = {}
    with machines.running(machine, folder) as running:
        for name in ("first", "second"):
            running.ask("stop")
            dumps[name] = running.memory(0, SIZE)
            registers = running.registers()
            running.save(name)
            running.ask("cont")
            before = running.memory(machines.COUNTED[0], 2)
            while running.memory(machines.COUNTED[0], 2) == before:
                pass  # the boot sector counts on: the two memories differ
    return folder / "disk.qcow2", dumps, registers


def without_vga(data: bytes) -> bytes:
    """Blank the VGA window, where the stream holds the RAM behind it and QEMU dumps the device."""
    return data[:0xA0000] + bytes(0x20000) + data[0xC0000:]


def new_context(**options: object) -> interfaces.context.ContextInterface:
    """Return a context with ``--qcow2-...`` options set, by their names without the prefix."""
    context = contexts.Context()
    for name, value in options.items():
        context.config[f"automagic.Qcow2Options.qcow2_{name}"] = value
    return context


def add_file(context: interfaces.context.ContextInterface, location: str, name: str = "FileLayer") -> str:
    context.config[f"{name}.location"] = location
    context.layers.add_layer(physical.FileLayer(context, name, name))
    return name


def add_bytes(context: interfaces.context.ContextInterface, data: bytes, name: str = "Bytes") -> str:
    context.layers.add_layer(physical.BufferDataLayer(context, name, name, data))
    return name


def stack(path: Path, **options: object) -> interfaces.layers.DataLayerInterface:
    """Stack our layers, and only ours, on a file; return the topmost."""
    context = new_context(**options)
    add_file(context, path.as_uri())
    kinds = [stackers.Qcow2Stacker, stackers.QemuRamStacker]
    return context.layers[stacker.LayerStacker.stack_layer(context, "FileLayer", kinds)[0]]


def ram_over(data: bytes, **options: object) -> ram.QemuRamLayer:
    """Return the memory layer over a stream held as bytes."""
    context = new_context(**options)
    context.config["Ram.base_layer"] = add_bytes(context, data)
    layer = ram.QemuRamLayer(context, "Ram", "Ram")
    context.layers.add_layer(layer)
    return layer


@contextmanager
def warnings_of(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Collect the warnings our modules show, also those shown before."""
    common._shown.clear()
    caplog.clear()
    found: list[str] = []
    with caplog.at_level(logging.WARNING):
        yield found
    found += [record.getMessage() for record in caplog.records if "qcow2" in record.name]


def plugin_rows(name: str, path: Path, **settings: object) -> list[dict[str, Any]]:
    """Run one of our plugins in this process and return its rows; options of Volatility start with ``qcow2_``."""
    framework.import_files(volatility3.plugins, True)
    context = new_context(**{key[6:]: value for key, value in settings.items() if key.startswith("qcow2_")})
    context.config["automagic.LayerStacker.single_location"] = path.as_uri()
    kind = framework.list_plugins()[f"qcow2.{name}"]
    for requirement in kind.get_requirements():
        if requirement.default is not None:
            context.config[f"plugins.{requirement.name}"] = requirement.default
    for key, value in settings.items():
        if not key.startswith("qcow2_"):
            context.config[f"plugins.{key}"] = value
    grid = kind(context, "plugins").run()
    found: list[dict[str, Any]] = []

    def collect(node: Any, _: None) -> None:
        found.append({column.name: value for column, value in zip(grid.columns, node.values, strict=True)})

    grid.populate(collect, None)
    return found


@functools.cache
def _cache() -> str:
    """A cache folder for this run: the user's own would be changed by our symbols."""
    folder = tempfile.mkdtemp(prefix="volatility-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def vol(
    *arguments: str | Path, cwd: Path, program: str = "vol", every_stacker: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``vol`` with our plugin folder, and without the test machine's own settings."""
    module = "volatility3.cli" if program == "vol" else "volatility3.cli.volshell"
    code = f"import sys; from {module} import main; sys.argv[0] = {program!r}; main()"
    variables = {key: value for key, value in os.environ.items() if not key.startswith("QCOW2_")}
    variables |= {"PYTHONPATH": str(ROOT / "src"), **environment}
    command = [sys.executable, "-c", code]
    if not every_stacker:  # the others look for kernels, which takes seconds and finds none
        command += ["--stackers", "Qcow2Stacker", "QemuRamStacker"]
    command += ["-q", "-p", str(PLUGINS), "--cache-path", _cache(), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,  # plugins that load symbols take a minute where the machine is busy
        check=False,
        stdin=subprocess.DEVNULL,
    )


def rows(*arguments: str | Path, cwd: Path, **environment: str) -> list[dict[str, Any]]:
    """Run a plugin and return its rows."""
    done = vol("-r", "json", *arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found
