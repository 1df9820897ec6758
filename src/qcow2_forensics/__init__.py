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
    from .reader.references import Role, base_name, json_options, parse_reference
    from .reader.resolver import (
        ALONE_VARIABLE,
        BACKING_VARIABLE,
        Remedies,
        Resolver,
        folders_from_environment,
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
_NAMES = {  # by the module that has them
    "audit": "audit audit_path",
    "compare": "compare",
    "errors": "ForbiddenReference FormatError LimitExceeded Locked MissingFile NotQcow2 Qcow2Error ReadError "
    "SnapshotNotFound Unsupported reason",
    "findings": "Evidence Finding Report Severity __version__",
    "format.header": "Crypt",
    "format.image": "Image",
    "format.snapshot_table": "SnapshotEntry",
    "format.source": "FileSource PathOrSource Source StreamSource as_source source_name",
    "limits": "DEFAULT_LIMITS Limits",
    "memory": "Finder GuestMemory KERNEL_SYMBOLS Match find_kernel find_stream open_guest_memory pattern_finder place_linux "
    "scan_memories uses_five_levels",
    "reader.damage_options": "ASSUME_VARIABLE VIRTUAL_SIZE_VARIABLE assumptions_from_environment parse_assumptions parse_size "
    "virtual_size_from_environment",
    "reader.disk": "Disk EofPolicy Extent Layer",
    "reader.mapping": "Kind Run",
    "reader.memory_choice": "MemoryChoice choose_memory leftover_name memory_before recovered_memory",
    "reader.named_files": "NamedFiles named_files",
    "reader.opening": "MissingPolicy Passphrase leftover_vm_state memory_snapshots open_disk open_image open_vm_state",
    "reader.passphrases": "KEY_FILE_VARIABLE PASSPHRASE_VARIABLE passphrases_from_environment passphrases_from_files",
    "reader.references": "Role base_name json_options parse_reference",
    "reader.resolver": "ALONE_VARIABLE BACKING_VARIABLE Remedies Resolver folders_from_environment",
    "reader.states": "SnapshotName assuming is_recovered_state",
    "reader.stream": "SourceStream",
    "reader.vm_state": "VmState",
    "reader.writer": "cache_file ended_by_signals",
}
_LAZY = {name: home for home, names in _NAMES.items() for name in names.split()}

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
