"""What every mutated image is put through, and what may come out of it.

A target takes a :class:`Case` and uses the public interface as its users would. Each call may end
in a :class:`Qcow2Error` (adapters: in what their framework expects) within its budget; anything
else is an escape.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import qcow2_forensics as q
from qcow2_forensics.format.source import BytesSource, Source
from qcow2_forensics.limits import MiB
from qcow2_forensics.reader.bitmaps import dirty_ranges

from . import budget

_ROOT = Path(__file__).resolve().parent.parent
_READ_LIMIT = MiB + 256 * 1024  # guest bytes read per view: what is decoded is streamed, not kept
_PIECES = 2000  # extents looked at per view
_HOSTILE_MARKUP = ("<script", "<img", "<svg/", "onerror=", "javascript:")


class Escape(AssertionError):
    """Something came out that may not: unescaped text, an unparseable document, a wrong exit code."""


class Case:
    """One image: its bytes, and the same as a file in a folder of its own for those who need names."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.source: Source = BytesSource(data, "fuzzed.qcow2")

    @cached_property
    def folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="fuzz-"))

    @cached_property
    def path(self) -> Path:
        path = self.folder / "fuzzed.qcow2"
        path.write_bytes(self.data)
        return path

    def close(self) -> None:
        if "folder" in self.__dict__:
            shutil.rmtree(self.folder, ignore_errors=True)


def _call(what: str, work: Callable[[], object], *allowed: type[BaseException]) -> None:
    with budget.of(what):
        try:
            work()
        except (q.Qcow2Error, *allowed):
            pass


def _view(source: Source, snapshot: Any, eof: Any) -> None:
    disk = q.open_disk(source, snapshot, passphrase="fuzz", missing="zeros", eof=eof)
    _call("extents", lambda: list(itertools.islice(disk.extents(), _PIECES)))
    for offset in (0, 512, max(0, disk.size - 4096), disk.size // 2 & ~511):
        _call("read", lambda at=offset: disk.read(at, 4096))
    done = 0
    while done < min(disk.size, _READ_LIMIT):
        _call("read", lambda at=done: disk.read(at, 65536))
        done += 65536


def read(case: Case) -> None:
    """Open, map and read the active state and the first snapshots, strictly and as QEMU does."""
    with q.open_image(case.source) as image:
        _call("problems", lambda: image.problems)
        entries = image.snapshots[:3]
        for bitmap in image.bitmaps[:3]:
            _call("bitmap", lambda entry=bitmap: list(itertools.islice(dirty_ranges(image, entry), _PIECES)))
    for eof in ("strict", "zeros"):
        for snapshot in (None, *entries):
            try:
                _view(case.source, snapshot, eof)
            except q.Qcow2Error:
                pass


def vm_state(case: Case) -> None:
    """Read the VM state and index the guest's memory."""
    _call("vm state", lambda: q.open_vm_state(case.source, passphrase="fuzz").read(0, MiB))

    def memory() -> None:
        guest = q.open_guest_memory(case.source, passphrase="fuzz")
        for region in itertools.islice(guest.regions, 4):
            _call("memory", lambda r=region: guest.read(r.address, min(r.length, 65536)))

    _call("guest memory", memory)


def audit(case: Case) -> None:
    """Audit at every depth: never an exception."""
    for depth in ("triage", "standard", "deep"):
        with budget.of(f"audit {depth}"):
            q.audit(case.source, depth=depth).to_json()


def compare(case: Case) -> None:
    """Compare each snapshot with the active state."""
    with q.open_image(case.source) as image:
        entries = image.snapshots[:2]
    for entry in entries:

        def differences(wanted: Any = entry) -> None:
            before = q.open_disk(case.source, wanted, passphrase="fuzz", missing="zeros")
            after = q.open_disk(case.source, passphrase="fuzz", missing="zeros")
            if max(before.size, after.size) <= 64 * MiB:
                list(itertools.islice(q.compare(before, after), _PIECES))

        _call("compare", differences)


def residue(case: Case) -> None:
    """Collect the residue, read it, and list deleted snapshots."""

    def collect() -> None:
        with q.residue(case.source) as found:
            for piece in itertools.islice(found.pieces(), _PIECES):
                found.read(piece, 0, 4096)
            found.deleted_snapshots()

    _call("residue", collect)


def recovery(case: Case) -> None:
    """List recovered states; map and read the best of them with their confidence."""
    from qcow2_forensics import recovery as module

    states: list[module.RecoveredState] = []
    _call("recovered states", lambda: states.extend(module.recovered_states(case.source)))
    for number, _state in enumerate(states[:2], 1):

        def use(wanted: int = number) -> None:
            disk, _ = module.open_recovered(case.source, wanted)
            pieces = list(itertools.islice(module.confidence_of(disk), _PIECES))
            if any(one.offset + one.length != two.offset for one, two in itertools.pairwise(pieces)):
                raise Escape(f"recovered:{wanted}: the confidence does not tile the disk")
            for offset in (0, disk.size // 2 & ~511, max(0, disk.size - 4096)):
                _call("recovered read", lambda at=offset, of=disk: of.read(at, 4096))

        _call("recovered state", use)


def img_info(case: Case) -> None:
    """Open the file system through pytsk3."""
    import pytsk3

    import pytsk3_qcow2

    def use() -> None:
        image = pytsk3_qcow2.Img_Info(case.source, passphrase="fuzz")
        for offset in (0, 4096):
            _call("Img_Info.read", lambda at=offset: image.read(at, 4096), OSError)
        # libtsk turns every exception of a read into RuntimeError.
        _call("FS_Info", lambda: pytsk3.FS_Info(image), OSError, RuntimeError)

    _call("Img_Info", use, OSError)


def dfvfs(case: Case) -> None:
    """Open and read through dfVFS: the active state and every snapshot."""
    from dfvfs.lib import definitions
    from dfvfs.lib import errors as dfvfs_errors
    from dfvfs.path import factory
    from dfvfs.resolver import context, resolver

    import dfvfs_qcow2

    spec = factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_OS, location=str(case.path))
    spec = factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_QCOW, parent=spec)
    specs = [spec]

    def snapshots() -> None:
        specs.extend(dfvfs_qcow2.snapshot_path_specs(spec)[:3])

    expected = (OSError, dfvfs_errors.BackEndError)
    _call("dfVFS snapshots", snapshots, *expected)
    resolver_context = context.Context()

    def use(wanted: Any) -> None:
        file_object = resolver.Resolver.OpenFileObject(wanted, resolver_context=resolver_context)
        size = file_object.get_size()
        for offset in (0, 5, 4096, 65500, max(0, size - 100), size + 5):
            file_object.seek(offset)
            _call("dfVFS read", lambda: file_object.read(4096), OSError)

    for wanted in specs:
        _call("dfVFS open", lambda w=wanted: use(w), *expected)


def volatility(case: Case) -> None:
    """Stack Volatility's layers on the image and read them."""
    stackers, layers, stacker, contexts, exceptions, physical = _volatility()

    def context_of() -> Any:
        context = contexts.Context()
        context.layers.add_layer(physical.BufferDataLayer(context, "Bytes", "Bytes", case.data))
        return context

    def stack() -> None:
        context = context_of()
        kinds = [stackers.Qcow2Stacker, stackers.QemuRamStacker]
        top = context.layers[stacker.LayerStacker.stack_layer(context, "Bytes", kinds)[0]]
        _look(top)

    def disk() -> None:
        context = context_of()
        context.config["Disk.base_layer"] = "Bytes"
        layer = layers.Qcow2DiskLayer(context, "Disk", "Disk")
        context.layers.add_layer(layer)
        _look(layer)

    def _look(layer: Any) -> None:
        size = layer.maximum_address + 1
        for offset in (0, 4096, max(0, size - 4096)):
            _call("layer read", lambda at=offset: layer.read(at, 4096), exceptions.InvalidAddressException)
            _call("layer read", lambda at=offset: layer.read(at, 65536, pad=True))
        _call(
            "layer mapping",
            lambda: list(itertools.islice(layer.mapping(0, min(size, MiB)), _PIECES)),
            exceptions.InvalidAddressException,
        )

    _call("stack", stack, exceptions.LayerException)
    _call("disk layer", disk, exceptions.LayerException)


def _volatility() -> tuple[Any, ...]:
    import volatility3.plugins
    from volatility3.framework import constants, contexts, exceptions
    from volatility3.framework.automagic import stacker
    from volatility3.framework.layers import physical

    folder = str(_ROOT / "plugins" / "volatility")
    for paths in (constants.PLUGINS_PATH, volatility3.plugins.__path__):
        if folder not in paths:
            paths.append(folder)
    from volatility3.plugins.qcow2 import layers, stackers

    return stackers, layers, stacker, contexts, exceptions, physical


# --- the command line ------------------------------------------------------------------------------


def _commands(case: Case) -> list[list[str]]:
    path, out = str(case.path), case.folder
    return [
        ["info", path],
        ["info", path, "--format", "json"],
        ["snapshots", path],
        ["snapshots", path, "--deleted", "--format", "jsonl"],
        ["map", path],
        ["map", path, "--format", "json", "--eof", "zeros"],
        ["audit", path],
        ["audit", path, "-v", "--depth", "deep"],
        ["audit", path, "--format", "html"],
        ["audit", path, "--format", "csv"],
        ["audit", path, "--format", "jsonl", "--depth", "triage"],
        ["timeline", path, "--no-files"],
        ["timeline", path, "--format", "jsonl"],
        ["diff", path],
        ["diff", path, "--files", "--format", "jsonl"],
        ["residue", path, str(out / "residue")],
        ["memory", path, str(out / "memory.raw")],
        ["export", path, str(out / "disk.raw"), "--no-hash"],
        ["snapshots", path, "--recovered", "--format", "json"],
        ["export", path, str(out / "salvaged.raw"), "--no-hash", "--salvage", "--mapfile", str(out / "salvaged.map")],
        ["timeline", path, "--format", "html"],
        ["diff", path, "--format", "html"],
        ["examine", path, str(out / "examined"), "--last", "1"],
    ]


_AT_ONCE = 4  # commands run per image, chosen by its bytes
_LARGEST = 64 * MiB  # disks above this are neither exported nor mapped: honest work


def command_line(case: Case) -> None:
    """Run some of the commands in this process; their output must be safe and whole."""
    number = zlib.crc32(case.data)
    commands = _commands(case)
    for step in range(_AT_ONCE):
        arguments = commands[(number + step * 5) % len(commands)]
        if arguments[0] in ("export", "map", "diff") and _is_large(case):
            continue
        with budget.of(" ".join((arguments[0], *arguments[2:]))):
            code, out, err = run_command(arguments)
        check_output(arguments, code, out, err)


def _is_large(case: Case) -> bool:
    with contextlib.suppress(q.Qcow2Error), q.open_image(case.source) as image:
        return max([image.disk_size, *(entry.disk_size or 0 for entry in image.snapshots)]) > _LARGEST
    return False


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    """Run the command line in this process; return its exit code and what it printed."""
    from qcow2_forensics.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def check_output(arguments: list[str], code: int, out: str, err: str) -> None:
    """Raise :class:`Escape` when a command printed what could fool or hurt its reader."""
    if code not in (0, 1, 2):
        raise Escape(f"{arguments}: exit code {code}")
    if "Traceback" in err:
        raise Escape(f"{arguments}: {err}")
    for name, text in (("out", out), ("err", err)):
        bad = {character for character in text if not character.isprintable() and character != "\n"}
        if "csv" in arguments:
            bad -= {"\r"}  # ends the lines of CSV
        if bad:
            raise Escape(f"{arguments}: std{name} has {sorted(map(ascii, bad))}")
    if "html" in arguments and any(word in out.lower() for word in _HOSTILE_MARKUP[:3]):
        raise Escape(f"{arguments}: markup from evidence")
    if code == 0 and "json" in arguments:
        json.loads(out)
    if "jsonl" in arguments:
        for line in out.splitlines():
            json.loads(line)


TARGETS: dict[str, Callable[[Case], None]] = {
    "read": read,
    "vm_state": vm_state,
    "audit": audit,
    "compare": compare,
    "residue": residue,
    "recovery": recovery,
    "img_info": img_info,
    "dfvfs": dfvfs,
    "volatility": volatility,
    "command_line": command_line,
}


def run(name: str, data: bytes) -> None:
    """Put one image through one target."""
    case = Case(data)
    try:
        TARGETS[name](case)
    except q.Qcow2Error:
        pass
    finally:
        case.close()
        sys.stdout.flush()
