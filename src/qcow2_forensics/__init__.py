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
from .format.source import FileSource, Source, StreamSource
from .limits import DEFAULT_LIMITS, Limits
from .reader.disk import Disk, Extent
from .reader.mapping import Kind
from .reader.opening import open_disk, open_image, open_vm_state
from .reader.stream import SourceStream
from .reader.vm_state import VmState

if TYPE_CHECKING:
    from .audit import audit, audit_path
    from .compare.ranges import compare
    from .findings import Evidence, Finding, Report, Severity, __version__
    from .memory import GuestMemory, open_guest_memory
    from .reader.resolver import Resolver

__all__ = [
    "DEFAULT_LIMITS",
    "Disk",
    "Evidence",
    "Extent",
    "FileSource",
    "Finding",
    "ForbiddenReference",
    "FormatError",
    "GuestMemory",
    "Image",
    "Kind",
    "LimitExceeded",
    "Limits",
    "Locked",
    "MissingFile",
    "NotQcow2",
    "Qcow2Error",
    "ReadError",
    "Report",
    "Resolver",
    "Severity",
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
    "open_disk",
    "open_guest_memory",
    "open_image",
    "open_vm_state",
]

# Names whose modules take time to import and are not needed to read a disk: loaded on first use.
_LAZY = {
    "__version__": "findings",
    "Evidence": "findings",
    "Finding": "findings",
    "GuestMemory": "memory",
    "Report": "findings",
    "Resolver": "reader.resolver",
    "Severity": "findings",
    "audit": "audit",
    "audit_path": "audit",
    "compare": "compare",
    "open_guest_memory": "memory",
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
