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
from typing import TYPE_CHECKING, Any

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
)
from .format.image import Image
from .format.snapshot_table import SnapshotEntry
from .format.source import FileSource, Source, StreamSource
from .limits import DEFAULT_LIMITS, Limits
from .reader.disk import Disk, Extent
from .reader.mapping import Kind
from .reader.opening import latest_vm_state, leftover_vm_state, open_disk, open_image, open_vm_state
from .reader.states import Leftover
from .reader.stream import SourceStream
from .reader.vm_state import VmState

if TYPE_CHECKING:
    from .audit import audit, audit_path
    from .compare.ranges import compare
    from .findings import Evidence, Finding, Report, Severity, __version__
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
    from .reader.resolver import Resolver

__all__ = [
    "DEFAULT_LIMITS",
    "KERNEL_SYMBOLS",
    "Disk",
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
    "Leftover",
    "LimitExceeded",
    "Limits",
    "Locked",
    "Match",
    "MissingFile",
    "NotQcow2",
    "Qcow2Error",
    "ReadError",
    "Report",
    "Resolver",
    "Severity",
    "SnapshotEntry",
    "SnapshotNotFound",
    "Source",
    "SourceStream",
    "StreamSource",
    "Unsupported",
    "VmState",
    "__version__",
    "audit",
    "audit_path",
    "compare",
    "find_kernel",
    "find_stream",
    "latest_vm_state",
    "leftover_vm_state",
    "open_disk",
    "open_guest_memory",
    "open_image",
    "open_vm_state",
    "pattern_finder",
    "place_linux",
    "scan_memories",
    "uses_five_levels",
]

# Names whose modules take time to import and are not needed to read a disk: loaded on first use.
_LAZY = {
    "Evidence": "findings",
    "Finder": "memory",
    "Finding": "findings",
    "GuestMemory": "memory",
    "KERNEL_SYMBOLS": "memory",
    "Match": "memory",
    "Report": "findings",
    "Resolver": "reader.resolver",
    "Severity": "findings",
    "__version__": "findings",
    "audit": "audit",
    "audit_path": "audit",
    "compare": "compare",
    "find_kernel": "memory",
    "find_stream": "memory",
    "open_guest_memory": "memory",
    "pattern_finder": "memory",
    "place_linux": "memory",
    "scan_memories": "memory",
    "uses_five_levels": "memory",
}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # here: what most need is there without it

    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


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
