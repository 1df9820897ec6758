"""``qcow2-forensics doctor``: whether the plug-in works in each framework here, and if not, why.

Every answer comes from the framework itself, imported as its own tools import it, and opens the small
image that the package holds (the one of ``demo``). What is installed but does not work is shown with
its error.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..text import printable
from . import add_format_argument
from .demo import write_files

HELP = "show whether the plug-in works in Volatility 3, dfVFS, plaso, pytsk3 and dissect"
DESCRIPTION = (
    "Open a small built-in image through each framework of this environment, and show whether the "
    "plug-in works and what to do if not. Exit code 0: active in every framework that is installed; 1: not."
)
EPILOG = """examples:
  qcow2-forensics doctor
  qcow2-forensics doctor --format json
"""

_HOOK = "qcow2_forensics_autoload"
_VARIABLE = "QCOW2_FORENSICS_AUTOLOAD"
_VOL = "import sys; sys.argv[0] = 'vol'; from volatility3.cli import main; main()"
_SAMPLE = "the built-in sample image does not read as it should"
_PARTITION = 2048 * 512  # where the ext4 file system of the sample starts
_SECONDS = 120  # for one framework


@dataclass(frozen=True, slots=True)
class PlugIn:
    """The plug-in in one framework. ``version`` is None where the framework is not installed."""

    framework: str
    version: str | None
    active: bool
    where: str  # what makes it active: a folder or a module's file
    problem: str  # why it is not, as far as the framework says
    advice: str  # what to type


@dataclass(frozen=True, slots=True)
class Library:
    """One optional library; ``version`` is None where it is not installed."""

    name: str
    version: str | None
    purpose: str
    advice: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything doctor found out."""

    version: str
    python: str
    executable: str
    hook: str  # "running", "off" or "missing"
    hook_file: str
    plugin_folder: str
    frameworks: tuple[PlugIn, ...]
    libraries: tuple[Library, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether the plug-in is active in every framework that is installed."""
        return all(part.active for part in self.frameworks if part.version is not None)


class _Inactive(Exception):
    """The plug-in is not active; the message says what was seen."""


def diagnose() -> Diagnosis:
    """Import each installed framework and ask it who reads QCOW2 images."""
    hook, hook_file, folder = _hook()
    again = "pip install --force-reinstall qcow2-forensics"
    with tempfile.TemporaryDirectory(prefix="qcow2-forensics-") as temporary:
        write_files(Path(temporary))
        sample = os.path.join(temporary, "demo.qcow2")
        frameworks = (
            _examine("Volatility 3", "volatility3", "volatility", _volatility, sample, f"vol -p {folder} ..."),
            _examine("dfVFS", "dfvfs", "dfvfs", _dfvfs, sample, "import dfvfs_qcow2 before dfvfs is used"),
            _examine("plaso", "plaso", "plaso", _plaso, sample, "python -m dfvfs_qcow2 log2timeline ..."),
            _examine("pytsk3", "pytsk3", "tsk", _pytsk3, sample, again),
            _examine("dissect", "dissect.target", "dissect", _dissect, sample, _dissect_by_hand()),
        )
    return Diagnosis(
        version=_version("qcow2-forensics") or "not installed, run from a checkout",
        python=platform.python_version(),
        executable=sys.executable,
        hook=hook,
        hook_file=hook_file,
        plugin_folder=folder,
        frameworks=frameworks,
        libraries=(
            _library("numpy", "numpy", "guest memory, the full audit", ""),
            _library("cryptography", "cryptography", "encrypted images", "luks"),
            _library("zlib_ng", "zlib-ng", "faster zlib clusters", "fast"),
            _library("lzallright", "lzallright", "libvirt save files of lzop", "lzop"),
            _library("mfusepy", "mfusepy", "mounting states as files", "mount"),
            _zstd(),
        ),
    )


def _hook() -> tuple[str, str, str]:
    # Asked first: importing every framework makes the hook leave the import system.
    try:
        module = importlib.import_module(_HOOK)
    except ImportError:
        return "missing", "", ""
    if module.is_installed():
        state = "running"
    else:
        state = "off" if os.environ.get(_VARIABLE) else "missing"
    return state, str(module.__file__), str(module.plugin_folder())


def _examine(framework: str, name: str, extra: str, ask: Callable[[str], str], sample: str, otherwise: str) -> PlugIn:
    if not _is_there(name):
        return PlugIn(framework, None, False, "", "not installed", f"pip install 'qcow2-forensics[{extra}]'")
    version = _version(name) or "unknown version"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        try:
            where = ask(sample)
        except Exception as error:  # noqa: BLE001 - whatever a framework or the plug-in raises is the diagnosis
            why = str(error) if isinstance(error, _Inactive) else f"{type(error).__name__}: {error}"
            return PlugIn(framework, version, False, "", _seen(why, caught), _advice(otherwise))
    return PlugIn(framework, version, True, where, "", "")


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package it would be in
        return False


def _seen(why: str, caught: list[warnings.WarningMessage]) -> str:
    # The import hook shows what went wrong as a warning that no filter hides.
    warnings_shown = [str(message.message) for message in caught if "qcow2-forensics" in str(message.message)]
    return "; ".join([why, *warnings_shown])


def _advice(otherwise: str) -> str:
    if os.environ.get(_VARIABLE):
        return f"unset {_VARIABLE}, or: {otherwise}"
    return otherwise


def _volatility(sample: str) -> str:
    constants = importlib.import_module("volatility3.framework.constants")
    folders = [Path(path) / "qcow2" for path in constants.PLUGINS_PATH]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise _Inactive("no folder of its plugin path holds our plugins")
    importlib.import_module("volatility3.plugins")
    for path in sorted(folder.glob("[!_]*.py")):
        importlib.import_module(f"volatility3.plugins.qcow2.{path.stem}")
    # In a process of its own, as "vol" runs: what it registers is registered once for a process.
    command = [sys.executable, "-c", _VOL, "-q", "-f", sample]
    done = subprocess.run(
        [*command, "qcow2.snapshots.Snapshots"], capture_output=True, text=True, check=False, timeout=_SECONDS
    )
    if "intrusion" not in done.stdout:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise _Inactive(f"{_SAMPLE}: {last}")
    return str(folder.parent)


def _dfvfs(sample: str) -> str:
    resolver = importlib.import_module("dfvfs.resolver.resolver").Resolver
    manager = importlib.import_module("dfvfs.resolver_helpers.manager")
    reader = type(manager.ResolverHelperManager.GetHelper("QCOW"))
    if not reader.__module__.startswith("dfvfs_qcow2."):
        raise _Inactive(f"QCOW images are read by {reader.__module__}")
    scanner = importlib.import_module("dfvfs.helpers.volume_scanner")
    options = scanner.VolumeScannerOptions()
    options.partitions = ["all"]
    root = scanner.VolumeScanner().GetBasePathSpecs(sample, options=options)[0]
    if "home" not in [entry.name for entry in resolver.OpenFileEntry(root).sub_file_entries]:
        raise _Inactive(_SAMPLE)
    return str(importlib.import_module(reader.__module__).__file__)


def _plaso(sample: str) -> str:
    importlib.import_module("plaso.cli.log2timeline_tool")
    importlib.import_module("plaso.cli.image_export_tool")
    return _dfvfs(sample)


def _pytsk3(sample: str) -> str:
    pytsk3 = importlib.import_module("pytsk3")
    ours = importlib.import_module("pytsk3_qcow2")
    for image in ours.states(sample):
        pytsk3.FS_Info(image, offset=_PARTITION).open_dir("/home/alice")
        image.close()
    return str(ours.__file__)


def _dissect_by_hand() -> str:
    found = importlib.util.find_spec("dissect_qcow2")
    folder = os.path.dirname(found.origin) if found is not None and found.origin else "dissect_qcow2"
    return f"export DISSECT_PLUGINS={os.path.join(folder, 'plugin.py')}"


def _dissect(sample: str) -> str:
    containers = importlib.import_module("dissect.target.container")
    with containers.open(sample) as opened:
        module = type(opened).__module__
        if not module.startswith("dissect_qcow2."):
            raise _Inactive(f"QCOW2 images are read by {module}")
        opened.seek(_PARTITION + 1024 + 56)
        if opened.read(2) != b"\x53\xef":  # the magic of an ext4 superblock
            raise _Inactive(_SAMPLE)
    return str(importlib.import_module(module).__file__)


def _library(name: str, distribution: str, purpose: str, extra: str) -> Library:
    advice = f"pip install 'qcow2-forensics[{extra}]'" if extra else f"pip install {distribution}"
    try:
        importlib.import_module(name)
    except (ImportError, OSError):  # OSError: the library it wraps is absent
        return Library(distribution, None, purpose, advice)
    return Library(distribution, _version(distribution) or "unknown version", purpose, "")


def _zstd() -> Library:
    if sys.version_info >= (3, 14) and importlib.util.find_spec("compression.zstd") is not None:
        return Library("zstd", f"Python {platform.python_version()}", "zstd clusters", "")
    return _library("backports.zstd", "backports.zstd", "zstd clusters", "")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


_HOOK_STATES = {
    "running": "running, from {file}",
    "off": f"switched off by {_VARIABLE}={{value}}",
    "missing": "not running: pip install qcow2-forensics into the environment of the tool",
}


def as_text(diagnosis: Diagnosis) -> str:
    """Return the diagnosis as lines for a person."""
    hook = _HOOK_STATES[diagnosis.hook].format(file=diagnosis.hook_file, value=os.environ.get(_VARIABLE, ""))
    lines = [
        f"qcow2-forensics {diagnosis.version}",
        f"Python {diagnosis.python}, {diagnosis.executable}",
        f"auto-load hook: {hook}",
        "",
    ]
    for part in diagnosis.frameworks:
        state = "active" if part.active else "NOT ACTIVE" if part.version else "-"
        lines.append(f"{part.framework:<14} {part.version or 'not installed':<18} {state:<11} {part.where}".rstrip())
        if part.version and part.problem:
            lines.append(f"{'':<14} seen: {part.problem}")
        if part.advice:
            lines.append(f"{'':<14} type: {part.advice}")
    lines.append("")
    for library in diagnosis.libraries:
        lines.append(f"{library.name:<14} {library.version or 'not installed':<18} {library.purpose}")
        if library.advice:
            lines.append(f"{'':<14} type: {library.advice}")
    if diagnosis.plugin_folder:
        lines += ["", f"Volatility's plugin path by hand: vol -p {diagnosis.plugin_folder} ..."]
    return "\n".join(printable(line) for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``doctor`` takes."""
    add_format_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; 0 when the plug-in is active in every framework that is installed."""
    diagnosis = diagnose()
    if arguments.format == "json":
        print(json.dumps({**asdict(diagnosis), "healthy": diagnosis.is_healthy}, indent=2))
    else:
        print(as_text(diagnosis))
    return 0 if diagnosis.is_healthy else 1
