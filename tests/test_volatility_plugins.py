"""``vol`` as a user runs it: our plugins, options and messages; QEMU is the oracle for what they show."""

from __future__ import annotations

import ast
import contextlib
import errno
import functools
import gc
import http.server
import importlib
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from fuzz.targets import run_command

pytest.importorskip("volatility3.framework", reason="volatility3 is absent")

from qcow2_forensics import open_vm_state
from qcow2_forensics.cli import demo
from tests import qemu
from tests.image_builder import Builder, Poke
from tests.tiers import every
from tests.volatility_tools import (
    BANNER,
    BANNERS,
    LOADED,
    PLUGINS,
    ROOT,
    SIZE,
    machine_image,
    new_context,
    plugin_rows,
    rows,
    stack,
    vol,
    warnings_of,
    without_vga,
)

SCAN = ("banners.Banners",)


class Saved(NamedTuple):
    image: Path
    dumps: dict[str, bytes]
    registers: list[dict[str, int]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A real machine's image with two memory snapshots, QEMU's dumps, and the registers of the second."""
    return Saved(*machine_image(tmp_path_factory.mktemp("machine")))


@pytest.fixture
def damaged(saved: Saved, tmp_path: Path) -> Callable[..., Path]:
    """A factory: a copy of the image with bytes written into an entry of its snapshot table."""

    def make(entry: int, inside: int, data: bytes) -> Path:
        path = tmp_path / "damaged.qcow2"
        path.write_bytes(saved.image.read_bytes())
        image = Poke(path)
        offset = image.get(64)
        for _ in range(entry):
            offset += _entry_length(image, offset)
        image.write(offset + inside, data)
        return path

    return make


def _entry_length(image: Poke, offset: int) -> int:
    length = 40 + image.get(offset + 36, 4) + image.get(offset + 12, 2) + image.get(offset + 14, 2)
    return -(-length // 8) * 8


# --- the plugins ---------------------------------------------------------------------------------


def test_vol_lists_our_plugins_and_options(tmp_path: Path) -> None:
    text = vol("-h", cwd=tmp_path).stdout
    for name in ("info.Info", "snapshots.Snapshots", "audit.Audit", "registers.Registers", "vmstatedump.VmStateDump"):
        assert f"qcow2.{name}" in text
    assert "--qcow2-snapshot" in text
    assert "could not be loaded" not in text or "qcow2" not in text.split("could not be loaded")[1]


def test_snapshots_are_those_qemu_lists(saved: Saved, tmp_path: Path) -> None:
    found = rows("-f", saved.image, "qcow2.snapshots.Snapshots", cwd=tmp_path)
    listed = json.loads(qemu.img("info", "--output=json", saved.image).text)["snapshots"]
    assert [(row["ID"], row["Name"], row["VM state bytes"]) for row in found] == [
        (item["id"], item["name"], item["vm-state-size"]) for item in listed
    ]
    assert [row["Chosen"] for row in found] == [False, True]
    assert all(row["Date"].startswith("20") for row in found)


@pytest.mark.slow
def test_snapshots_are_in_the_timeline_when_that_is_asked_for(saved: Saved, tmp_path: Path) -> None:
    arguments = ("timeliner.Timeliner", "--plugin-filter", "qcow2.snapshots", "--create-bodyfile")
    without = tmp_path / "without"
    without.mkdir()
    assert rows("-f", saved.image, *arguments, cwd=without) == []
    found = rows("-f", saved.image, *arguments, cwd=tmp_path, QCOW2_TIMELINE="1")
    assert sorted(row["Description"][:24] for row in found) == ["QCOW2 snapshot 1 'first'", "QCOW2 snapshot 2 'second"]
    times = [line.split("|")[-1] for line in (tmp_path / "volatility.body").read_text().splitlines()]
    listed = json.loads(qemu.img("info", "--output=json", saved.image).text)["snapshots"]
    assert sorted(times) == sorted(str(item["date-sec"]) for item in listed)


def test_changes_reads_the_earlier_memory_as_the_later_one_is_read(saved: Saved) -> None:
    from volatility3.framework import contexts
    from volatility3.plugins.qcow2.changes import Changes, KernelMemory

    memory = stack(saved.image, snapshot="second", assume="version=3", layout="pc.ram@0x0")
    context = memory.context
    assert type(memory).__name__ == "QemuRamLayer"
    state = KernelMemory(
        context, contexts.Module.create(context, "later", memory.name, 0, symbol_table_name="none").name
    )
    plugin = SimpleNamespace(context=context, config_path="plugins.Changes")
    earlier = Changes._memory(plugin, state, context.layers[memory.dependencies[0]], "first")
    assert earlier.read(LOADED, 4096) == saved.dumps["first"][LOADED : LOADED + 4096]
    assert earlier.config["layout"] == "pc.ram@0x0"
    assert context.layers[earlier.dependencies[0]].config["assume"] == "version=3"


@pytest.mark.slow
def test_a_saved_configuration_of_a_plugin_gives_the_same_rows_without_its_file(saved: Saved, tmp_path: Path) -> None:
    config = tmp_path / "saved.json"
    options = ("--qcow2-snapshot", "1", "-f", saved.image, "--save-config", str(config))
    first = rows(*options, "qcow2.registers.Registers", cwd=tmp_path)
    assert first
    assert rows("-c", str(config), "qcow2.registers.Registers", cwd=tmp_path) == first


def test_info_shows_the_layout(saved: Saved) -> None:
    found = plugin_rows("info.Info", saved.image)
    facts = {(row["Subject"], row["Item"]): row for row in found}
    assert facts["memory", "machine"]["Value"].startswith("pc-i440fx")
    assert facts["layout", "decided by"]["Value"] == "cmos, order by single"
    assert (facts["region", "pc.ram"]["Address"], facts["region", "pc.ram"]["Size"]) == (0, SIZE)
    assert facts["memory", "snapshot"]["Value"].startswith("2 'second'")


def test_info_of_an_image_without_memory_is_about_the_image(make_image: Callable[..., Path], tmp_path: Path) -> None:
    found = plugin_rows("info.Info", make_image("plain.qcow2", "1M"))
    assert {row["Subject"] for row in found} == {"image"}


def test_registers_are_those_qemu_shows(saved: Saved) -> None:
    found = plugin_rows("registers.Registers", saved.image)
    shown = saved.registers[0]
    listed = {row["Register"]: row["Value"] for row in found if row["CPU"] == 0}
    common = {name for name in shown if name in listed}
    assert {"cr0", "cr3", "cr4", "rip"} <= common
    assert {name: listed[name] for name in common} == {name: shown[name] for name in common}


def test_one_register_may_be_asked_for(saved: Saved, tmp_path: Path) -> None:
    found = plugin_rows("registers.Registers", saved.image, register=["CR3"])
    assert [row["Register"] for row in found] == ["cr3"]


@pytest.mark.slow
def test_vmstatedump_writes_what_qemu_dumped(saved: Saved, tmp_path: Path) -> None:
    found = rows("--qcow2-snapshot", "first", "-f", saved.image, "qcow2.vmstatedump.VmStateDump", cwd=tmp_path)
    assert found[0]["Bytes"] == SIZE
    assert without_vga((tmp_path / found[0]["File"]).read_bytes()) == without_vga(saved.dumps["first"])


@pytest.mark.slow
def test_vmstatedump_writes_the_stream_and_a_block(saved: Saved, tmp_path: Path) -> None:
    found = rows("-f", saved.image, "qcow2.vmstatedump.VmStateDump", "--form", "stream", cwd=tmp_path)
    with open_vm_state(saved.image, "2") as state:
        assert (tmp_path / found[0]["File"]).read_bytes() == state.read(0, state.size)
    found = rows("-f", saved.image, "qcow2.vmstatedump.VmStateDump", "--block", "pc.bios", cwd=tmp_path)
    data = (tmp_path / found[0]["File"]).read_bytes()
    assert len(data) == found[0]["Bytes"] == 256 * 1024
    assert data[-16:-11] == b"\xea\x5b\xe0\x00\xf0"  # the jump every PC BIOS starts with


@pytest.mark.slow
def test_vmstatedump_that_cannot_write_all_leaves_nothing_under_its_name(saved: Saved, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, before[1]))  # as a disk that is full: an error of write()
    try:
        done = vol("--qcow2-snapshot", "first", "-f", saved.image, "qcow2.vmstatedump.VmStateDump", cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 1
    assert "qcow2.vmstatedump: snapshot-1.raw is not written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def _dump_of_demo(folder: Path, progress: Callable[[float, str], None]) -> Path:
    """Run the plugin in this process on the demo's memory, with the file handler of ``vol``; return where it writes."""
    from volatility3 import cli, framework, plugins

    demo.write_files(folder)
    output = folder / "output"
    output.mkdir()
    framework.import_files(plugins, True)
    context = new_context()
    context.config["plugins.location"] = (folder / "demo.qcow2").as_uri()
    plugin = framework.list_plugins()["qcow2.vmstatedump.VmStateDump"](context, "plugins", progress)
    command = cli.CommandLine()
    command.output_dir = str(output)
    plugin.set_open_method(command.file_handler_class_factory())
    plugin.run().populate()
    return output


def test_an_interrupted_vmstatedump_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(percent: float, _: str) -> None:
        if percent > 50:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit, match=r"snapshot-2\.raw is not written: interrupted"):
        _dump_of_demo(tmp_path, interrupt)
    gc.collect()  # a handler that is still open would give its file a name now
    assert list((tmp_path / "output").iterdir()) == []


def test_a_vmstatedump_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    def end(percent: float, _: str) -> None:
        if percent > 50:
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        _dump_of_demo(tmp_path, end)
    assert ended.value.code == 128 + signal.SIGTERM
    gc.collect()
    assert list((tmp_path / "output").iterdir()) == []


@pytest.mark.parametrize("way", ["ended", "full"])
def test_an_index_that_is_not_written_to_its_end_leaves_nothing(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from volatility3.plugins.qcow2 import index_cache

    def stop(*_: object) -> None:
        if way == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(os, "replace", stop)
    with contextlib.suppress(SystemExit):
        index_cache._store(tmp_path / "cache" / "qcow2_x.cache", b"index")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_vmstatedump_on_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))

    try:
        with pytest.raises(SystemExit, match=r"snapshot-2\.raw is not written: File too large"):
            _dump_of_demo(tmp_path, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    gc.collect()
    assert list((tmp_path / "output").iterdir()) == []


def test_a_whole_vmstatedump_is_what_the_memory_command_writes(tmp_path: Path) -> None:
    output = _dump_of_demo(tmp_path, lambda *_: None)
    assert run_command(["memory", str(tmp_path / "demo.qcow2"), str(tmp_path / "memory.raw")])[0] == 0
    (written,) = output.iterdir()
    assert (written.name, written.read_bytes()) == ("snapshot-2.raw", (tmp_path / "memory.raw").read_bytes())


@pytest.mark.slow
def test_the_progress_line_shows_no_control_characters_of_the_image(
    damaged: Callable[..., Path], tmp_path: Path
) -> None:
    image = damaged(0, 40 + 24, b"\x1b")  # the ID of the first snapshot
    code = "import sys; from volatility3.cli import main; sys.argv[0] = 'vol'; main()"
    arguments = ["-p", PLUGINS, "--qcow2-snapshot", "index:0", "-f", image, "qcow2.vmstatedump.VmStateDump"]
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while piece := os.read(screen, 65536):
            shown += piece
    os.close(screen)
    assert process.wait(60) == 0, shown
    assert b"Writing snapshot-" in shown
    assert b"\x1b" not in shown


@pytest.mark.slow
def test_a_search_of_all_snapshots_finds_what_is_in_each(saved: Saved) -> None:
    found = plugin_rows("scan.Scan", saved.image, pattern="Linux version 9[^\n]+")
    assert [(row["Snapshot"], row["Address"]) for row in found] == [
        (name, address) for address in BANNERS for name in ("first", "second")
    ]
    assert {row["Text"] for row in found} == {BANNER.decode().rstrip()}
    strings = plugin_rows("scan.Scan", saved.image, strings=True, shortest=20)
    assert {row["Address"] for row in strings if row["Text"].startswith("Linux version 9")} == set(BANNERS)


def test_a_search_finds_what_only_one_snapshot_holds(saved: Saved) -> None:
    counts = [
        int.from_bytes(dump[address : address + 2], "little") for address in (0x10000,) for dump in saved.dumps.values()
    ]
    assert counts[0] != counts[1]
    pattern = "(?s)" + "".join(f"\\x{byte:02x}" for byte in counts[1].to_bytes(2, "little") + bytes(6))
    found = plugin_rows("scan.Scan", saved.image, pattern=pattern)
    assert {row["Snapshot"] for row in found if row["Address"] == 0x10000} == {"second"}


@pytest.mark.parametrize("settings", [{}, {"pattern": "a", "strings": True}, {"pattern": "("}])
def test_a_search_for_nothing_sensible_is_one_warning(
    saved: Saved, caplog: pytest.LogCaptureFixture, settings: dict[str, object]
) -> None:
    with warnings_of(caplog) as warnings:
        assert plugin_rows("scan.Scan", saved.image, **settings) == []
    assert len(warnings) == 1


def test_audit_lists_findings(saved: Saved, tmp_path: Path) -> None:
    image = tmp_path / "odd.qcow2"
    image.write_bytes(saved.image.read_bytes())
    Poke(image).write(72, (1).to_bytes(8, "big"))  # the dirty bit
    found = plugin_rows("audit.Audit", image, depth="triage", evidence=True)
    assert all({"Severity", "Code", "Count", "Offset", "Note"} <= set(row) for row in found)
    assert any(row["Code"].startswith("QCOW2-") for row in found)


@pytest.mark.slow
def test_text_from_evidence_is_escaped(damaged: Callable[..., Path], tmp_path: Path) -> None:
    image = damaged(0, 40 + 24 + 1, b"\x1b[31m")  # extra data of 24 bytes and an ID of one, then the name
    for plugin in ("qcow2.snapshots.Snapshots", "qcow2.info.Info", "qcow2.audit.Audit"):
        done = vol("-f", image, plugin, cwd=tmp_path)
        assert "\x1b" not in done.stdout + done.stderr
    assert r"\x1b[31m" in vol("-f", image, "qcow2.snapshots.Snapshots", cwd=tmp_path).stdout


# --- choosing ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_saved_configuration_pins_the_snapshot_and_gives_the_same(saved: Saved, tmp_path: Path) -> None:
    name = ("layerwriter.LayerWriter", "--layers", "primary")
    vol("--qcow2-snapshot", "first", "-f", saved.image, "--save-config", "saved.json", "-o", ".", *name, cwd=tmp_path)
    assert '"1"' in next(line for line in (tmp_path / "saved.json").read_text().splitlines() if "snapshot" in line)
    vol("-c", "saved.json", *name, cwd=tmp_path)
    other = vol("--qcow2-snapshot", "second", "-c", "saved.json", *name, cwd=tmp_path)
    assert "the saved configuration names snapshot '1'" in other.stderr
    for written in ("primary.raw", "primary-1.raw", "primary-2.raw"):
        assert without_vga((tmp_path / written).read_bytes()) == without_vga(saved.dumps["first"])


@pytest.mark.slow
def test_worker_processes_give_all_rows(saved: Saved, tmp_path: Path) -> None:
    found = rows("-f", saved.image, *SCAN, cwd=tmp_path)
    assert [row["Offset"] for row in found] == list(BANNERS)
    assert rows("--parallelism", "processes", "-f", saved.image, *SCAN, cwd=tmp_path) == found


@pytest.mark.slow
def test_volshell_takes_the_option(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("print('READ', layer_bytes(self))\n".replace("layer_bytes(self)", _SHELL))
    done = vol("--qcow2-snapshot", "1", "-f", saved.image, "--script", "script.py", program="volshell", cwd=tmp_path)
    offset = LOADED + 100
    assert saved.dumps["first"][offset : offset + 8].hex() in done.stdout


_SHELL = f"self.context.layers[self.current_layer].read({LOADED + 100}, 8).hex()"


# --- locations -----------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a web server over the test's folder."""
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.mark.slow
def test_other_locations_than_files_work(saved: Saved, tmp_path: Path, served: str) -> None:
    expected = rows("-f", saved.image, "qcow2.registers.Registers", cwd=tmp_path)
    image = tmp_path / "disk.qcow2"
    image.write_bytes(saved.image.read_bytes())
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.write(image, "disk.qcow2")
    (tmp_path / "cache").mkdir()
    for location in (f"{served}/disk.qcow2", f"jar:file:{tmp_path / 'packed.zip'}!disk.qcow2"):
        arguments = ("--single-location", location, "--cache-path", tmp_path / "cache")
        done = vol("-r", "json", *arguments, "qcow2.registers.Registers", cwd=tmp_path)
        if "offline" in done.stderr.lower() or ("http" in location and not done.stdout.strip().startswith("[")):
            pytest.fail(done.stderr)
        assert json.loads(done.stdout) == expected


# --- bad input -----------------------------------------------------------------------------------


def assert_warned(done: Any, *words: str) -> None:
    """One warning, at normal verbosity, and no traceback."""
    assert "Traceback" not in done.stderr + done.stdout
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1, done.stderr
    for word in words:
        assert word in warnings[0]


@pytest.mark.parametrize("plugin", every(2, [SCAN, ("qcow2.registers.Registers",)]))
def test_an_unknown_snapshot_is_one_warning(saved: Saved, tmp_path: Path, plugin: tuple[str, ...]) -> None:
    done = vol("--qcow2-snapshot", "nope", "-f", saved.image, *plugin, cwd=tmp_path)
    assert_warned(done, "no snapshot 'nope'", "1 (first), 2 (second)")


@pytest.mark.slow
def test_no_memory_state_is_one_warning(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image("plain.qcow2", "1M")
    assert_warned(vol("-f", image, *SCAN, cwd=tmp_path), "ordinary disk")
    assert_warned(vol("-f", image, "qcow2.vmstatedump.VmStateDump", cwd=tmp_path), "with memory")


@pytest.mark.slow
def test_a_truncated_image_is_one_warning(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "short.qcow2").write_bytes(saved.image.read_bytes()[: saved.image.stat().st_size // 2])
    assert_warned(vol("-f", "short.qcow2", *SCAN, cwd=tmp_path, every_stacker=True), "past the end of the file")


@pytest.mark.parametrize("size", [1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_absurd_sizes_are_reported_and_cost_nothing(damaged: Callable[..., Path], tmp_path: Path, size: int) -> None:
    image = damaged(1, 40, size.to_bytes(8, "big"))  # the size of the VM state
    assert stack(image).maximum_address >= 0
    for plugin in ("info.Info", "snapshots.Snapshots"):
        assert plugin_rows(plugin, image)


@pytest.mark.slow
def test_absurd_sizes_are_no_traceback(damaged: Callable[..., Path], tmp_path: Path) -> None:
    image = damaged(1, 40, b"\xff" * 8)
    assert "Traceback" not in vol("-f", image, *SCAN, cwd=tmp_path).stderr


@pytest.mark.parametrize("content", [b"", b"hello\n", b"QFI\xfb", b"QFI\xfb" + bytes(4096)])
@pytest.mark.parametrize("plugin", ["info.Info", "snapshots.Snapshots", "audit.Audit", "registers.Registers"])
def test_files_that_are_no_images_are_a_warning(
    content: bytes, plugin: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "odd").write_bytes(content)
    with warnings_of(caplog) as messages:
        found = plugin_rows(plugin, tmp_path / "odd")
    assert messages or found


@pytest.mark.slow
def test_a_file_that_is_no_image_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"QFI\xfb" + bytes(4096))
    for plugin in (SCAN, ("qcow2.info.Info",)):
        done = vol("-f", "odd", *plugin, cwd=tmp_path)
        assert "Traceback" not in done.stderr + done.stdout


def test_no_file_is_one_warning(tmp_path: Path) -> None:
    assert_warned(vol("qcow2.snapshots.Snapshots", cwd=tmp_path), "use -f")


def test_without_the_core_volatility_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Hide:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'qcow2_forensics': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    done = vol("frameworkinfo.FrameworkInfo", cwd=tmp_path, PYTHONPATH=str(tmp_path), QCOW2_FORENSICS_AUTOLOAD="0")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_every_module_survives_being_imported_by_volatility() -> None:
    for path in sorted((PLUGINS / "qcow2").glob("*.py")):
        if path.stem != "__init__":
            importlib.import_module(f"volatility3.plugins.qcow2.{path.stem}")


_BITMAPS = """
from typing import Any
from volatility3.framework import renderers
from .evidence import EvidencePlugin

class Bitmaps(EvidencePlugin):
    hidden = False

    def _rows(self) -> Any:
        return ((0, (entry.name, 1 << entry.granularity_bits)) for entry in self.image().bitmaps)

    def run(self) -> Any:
        return renderers.TreeGrid([("Name", str), ("Granularity", int)], self.guarded(self._rows))
"""


_MISTAKES = {
    "raises": ("raise ValueError('a mistake')", "is left out: ValueError('a mistake')"),
    "is no Python": ("def (", "is left out: SyntaxError("),
    "ends the interpreter": ("raise SystemExit(3)", "is left out: SystemExit(3)"),
    "asks for what is not installed": ("import not_installed", ""),
}


def _with_file(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Load Volatility's plugins with one more file in our folder; list what plugins there are, and use one of ours."""
    image = Builder().write(folder / "disk.qcow2")
    shutil.copytree(PLUGINS / "qcow2", folder / "plugins" / "qcow2")
    (folder / "plugins" / "qcow2" / "bitmaps.py").write_text(text)
    code = (
        "import volatility3.plugins as plugins; from volatility3 import framework\n"
        f"plugins.__path__.insert(0, {str(folder / 'plugins')!r})\n"
        "framework.import_files(plugins, True)\n"
        "print([name for name in framework.list_plugins() if name.startswith(('qcow2.', 'banners'))])\n"
        "from volatility3.framework import contexts, automagic; from volatility3.framework.interfaces import plugins\n"
        "context = contexts.Context()\n"
        f"context.config['automagic.LayerStacker.single_location'] = {image.as_uri()!r}\n"
        "found = framework.list_plugins()['qcow2.snapshots.Snapshots'](context, 'plugins')\n"
        "print(list(found._rows()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "QCOW2_FORENSICS_AUTOLOAD": "0"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)


def test_a_file_dropped_into_the_folder_is_a_plugin(tmp_path: Path) -> None:
    done = _with_file(_BITMAPS, tmp_path)
    assert {"banners.Banners", "qcow2.bitmaps.Bitmaps", "qcow2.info.Info"} <= set(
        ast.literal_eval(done.stdout.splitlines()[0])
    )
    assert done.stderr == ""


@pytest.mark.parametrize("mistake", _MISTAKES)
def test_a_file_that_fails_takes_no_other_plugin_away(mistake: str, tmp_path: Path) -> None:
    text, warning = _MISTAKES[mistake]
    done = _with_file(text, tmp_path)
    listed, rows = done.stdout.splitlines()
    assert "qcow2.bitmaps.Bitmaps" not in ast.literal_eval(listed)
    assert {"banners.Banners", "qcow2.info.Info", "qcow2.snapshots.Snapshots"} <= set(ast.literal_eval(listed))
    assert rows == "[]"
    assert warning in done.stderr


def test_loading_the_plugins_executes_only_what_volatility_has_to_see(tmp_path: Path) -> None:
    code = (
        "import sys; import volatility3.plugins as p; from volatility3 import framework\n"
        f"p.__path__.append({str(PLUGINS)!r})\n"
        "framework.import_files(p, True)\n"
        "assert 'volatility3.plugins.qcow2.stackers' in sys.modules\n"
        "print([name for name in ('numpy', 'qcow2_forensics') if name in sys.modules])\n"
        "package = 'volatility3.plugins.qcow2'\n"
        "later = [sys.modules[f'{package}.{name}'] for name in sys.modules[package]._LATER]\n"
        "print([module.__name__ for module in later if type(module).__name__ != '_LazyModule'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    loaded, executed = map(ast.literal_eval, done.stdout.splitlines())
    assert loaded == []
    assert executed == []
