"""QCOW2 disk images as evidence: read everything QEMU reads, and say what the image hides.

::

    import qcow2_forensics as q

    with q.open_disk("disk.qcow2", snapshot="before-incident") as disk:
        disk.read(0, 512)
    report = q.audit("disk.qcow2")

Reading needs nothing but the standard library and zstd; numpy is imported only by the auditor and
by guest memory, on first use.
"""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False  # type checkers know the name; the module typing takes time to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .audit import audit, audit_path
    from .compare.ranges import compare
    from .errors import (
        ForbiddenReference,
        FormatError,
        LimitExceeded,
        Locked,
        MissingFile,
        NotQcow2,
        Qcow2Error,
        ReadError,
        SnapshotNotFound,
        Unsupported,
        reason,
    )
    from .findings import Evidence, Finding, Report, Severity, __version__
    from .format.header import Crypt
    from .format.image import Image
    from .format.snapshot_table import SnapshotEntry
    from .format.source import FileSource, PathOrSource, Source, StreamSource, as_source, source_name
    from .limits import DEFAULT_LIMITS, Limits
    from .memory import (
        KERNEL_SYMBOLS,
        Finder,
        GuestMemory,
        Match,
        find_kernel,
        find_stream,
        open_guest_memory,
        pattern_finder,
        place_linux,
        scan_memories,
        uses_five_levels,
    )
    from .reader.damage_options import (
        ASSUME_VARIABLE,
        VIRTUAL_SIZE_VARIABLE,
        assumptions_from_environment,
        parse_assumptions,
        parse_size,
        virtual_size_from_environment,
    )
    from .reader.disk import Disk, EofPolicy, Extent, Layer
    from .reader.mapping import Kind, Run
    from .reader.memory_choice import (
        MemoryChoice,
        choose_memory,
        leftover_name,
        memory_before,
        recovered_memory,
    )
    from .reader.named_files import NamedFiles, named_files
    from .reader.opening import (
        MissingPolicy,
        Passphrase,
        leftover_vm_state,
        memory_snapshots,
        open_disk,
        open_image,
        open_vm_state,
    )
    from .reader.passphrases import (
        KEY_FILE_VARIABLE,
        PASSPHRASE_VARIABLE,
        passphrases_from_environment,
        passphrases_from_files,
    )
    from .reader.references import json_options
    from .reader.resolver import (
        ALONE_VARIABLE,
        BACKING_VARIABLE,
        Remedies,
        Resolver,
        Role,
        base_name,
        folders_from_environment,
        parse_reference,
    )
    from .reader.states import SnapshotName, assuming, is_recovered_state
    from .reader.stream import SourceStream
    from .reader.vm_state import VmState
    from .reader.writer import cache_file, ended_by_signals

__all__ = [
    "ALONE_VARIABLE",
    "ASSUME_VARIABLE",
    "BACKING_VARIABLE",
    "DEFAULT_LIMITS",
    "KERNEL_SYMBOLS",
    "KEY_FILE_VARIABLE",
    "PASSPHRASE_VARIABLE",
    "VIRTUAL_SIZE_VARIABLE",
    "Crypt",
    "Disk",
    "EofPolicy",
    "Evidence",
    "Extent",
    "FileSource",
    "Finder",
    "Finding",
    "ForbiddenReference",
    "FormatError",
    "GuestMemory",
    "Image",
    "Kind",
    "Layer",
    "LimitExceeded",
    "Limits",
    "Locked",
    "Match",
    "MemoryChoice",
    "MissingFile",
    "MissingPolicy",
    "NamedFiles",
    "NotQcow2",
    "Passphrase",
    "PathOrSource",
    "Qcow2Error",
    "ReadError",
    "Remedies",
    "Report",
    "Resolver",
    "Role",
    "Run",
    "Severity",
    "SnapshotEntry",
    "SnapshotName",
    "SnapshotNotFound",
    "Source",
    "SourceStream",
    "StreamSource",
    "Unsupported",
    "VmState",
    "__version__",
    "as_source",
    "assuming",
    "assumptions_from_environment",
    "audit",
    "audit_path",
    "base_name",
    "cache_file",
    "choose_memory",
    "compare",
    "ended_by_signals",
    "find_kernel",
    "find_stream",
    "folders_from_environment",
    "is_recovered_state",
    "json_options",
    "leftover_name",
    "leftover_vm_state",
    "memory_before",
    "memory_snapshots",
    "named_files",
    "open_disk",
    "open_guest_memory",
    "open_image",
    "open_vm_state",
    "parse_assumptions",
    "parse_reference",
    "parse_size",
    "passphrases_from_environment",
    "passphrases_from_files",
    "pattern_finder",
    "place_linux",
    "reason",
    "recovered_memory",
    "scan_memories",
    "source_name",
    "uses_five_levels",
    "virtual_size_from_environment",
]

# Every name is loaded on first use: importing the package takes no time, and the command's start-up has a place
# that handles Ctrl-C before anything is imported that takes time.
_LAZY = {
    "ALONE_VARIABLE": "reader.resolver",
    "ASSUME_VARIABLE": "reader.damage_options",
    "BACKING_VARIABLE": "reader.resolver",
    "Crypt": "format.header",
    "DEFAULT_LIMITS": "limits",
    "Disk": "reader.disk",
    "EofPolicy": "reader.disk",
    "Evidence": "findings",
    "Extent": "reader.disk",
    "FileSource": "format.source",
    "Finder": "memory",
    "Finding": "findings",
    "ForbiddenReference": "errors",
    "FormatError": "errors",
    "GuestMemory": "memory",
    "Image": "format.image",
    "KERNEL_SYMBOLS": "memory",
    "KEY_FILE_VARIABLE": "reader.passphrases",
    "Kind": "reader.mapping",
    "Layer": "reader.disk",
    "LimitExceeded": "errors",
    "Limits": "limits",
    "Locked": "errors",
    "Match": "memory",
    "MemoryChoice": "reader.memory_choice",
    "MissingFile": "errors",
    "MissingPolicy": "reader.opening",
    "NamedFiles": "reader.named_files",
    "NotQcow2": "errors",
    "Passphrase": "reader.opening",
    "PASSPHRASE_VARIABLE": "reader.passphrases",
    "PathOrSource": "format.source",
    "Qcow2Error": "errors",
    "ReadError": "errors",
    "Remedies": "reader.resolver",
    "Report": "findings",
    "Resolver": "reader.resolver",
    "Role": "reader.resolver",
    "Run": "reader.mapping",
    "Severity": "findings",
    "SnapshotEntry": "format.snapshot_table",
    "SnapshotName": "reader.states",
    "SnapshotNotFound": "errors",
    "Source": "format.source",
    "SourceStream": "reader.stream",
    "StreamSource": "format.source",
    "Unsupported": "errors",
    "VIRTUAL_SIZE_VARIABLE": "reader.damage_options",
    "VmState": "reader.vm_state",
    "__version__": "findings",
    "as_source": "format.source",
    "assuming": "reader.states",
    "assumptions_from_environment": "reader.damage_options",
    "audit": "audit",
    "audit_path": "audit",
    "base_name": "reader.resolver",
    "choose_memory": "reader.memory_choice",
    "compare": "compare",
    "cache_file": "reader.writer",
    "ended_by_signals": "reader.writer",
    "find_kernel": "memory",
    "find_stream": "memory",
    "folders_from_environment": "reader.resolver",
    "is_recovered_state": "reader.states",
    "json_options": "reader.references",
    "leftover_name": "reader.memory_choice",
    "leftover_vm_state": "reader.opening",
    "memory_before": "reader.memory_choice",
    "memory_snapshots": "reader.opening",
    "named_files": "reader.named_files",
    "open_disk": "reader.opening",
    "open_guest_memory": "memory",
    "open_image": "reader.opening",
    "open_vm_state": "reader.opening",
    "parse_assumptions": "reader.damage_options",
    "parse_reference": "reader.resolver",
    "parse_size": "reader.damage_options",
    "passphrases_from_environment": "reader.passphrases",
    "passphrases_from_files": "reader.passphrases",
    "pattern_finder": "memory",
    "place_linux": "memory",
    "reason": "errors",
    "recovered_memory": "reader.memory_choice",
    "scan_memories": "memory",
    "source_name": "format.source",
    "uses_five_levels": "memory",
    "virtual_size_from_environment": "reader.damage_options",
}

_MODULES = ("errors", "format", "limits", "reader", "text")  # also there as attributes


def at_first_use(package: str, homes: dict[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package: it imports a name from its module, or a module whose home is ``""``."""

    def attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        import importlib

        if not homes[name]:
            return importlib.import_module(f".{name}", package)
        value = getattr(importlib.import_module(f".{homes[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    return attribute


__getattr__ = at_first_use(__name__, _LAZY | dict.fromkeys(_MODULES, ""))


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps ``audit`` and ``compare`` the functions when their modules are imported.

    Importing ``qcow2_forensics.audit`` sets the attribute ``audit`` of this package to the module;
    the public name is that of the function inside.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _LAZY.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
