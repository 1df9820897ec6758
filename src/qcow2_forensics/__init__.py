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

    from .audit import audit as audit
    from .audit import audit_path as audit_path
    from .compare import compare as compare
    from .errors import ForbiddenReference as ForbiddenReference
    from .errors import FormatError as FormatError
    from .errors import LimitExceeded as LimitExceeded
    from .errors import Locked as Locked
    from .errors import MissingFile as MissingFile
    from .errors import NotQcow2 as NotQcow2
    from .errors import Qcow2Error as Qcow2Error
    from .errors import ReadError as ReadError
    from .errors import SnapshotNotFound as SnapshotNotFound
    from .errors import Unsupported as Unsupported
    from .errors import reason as reason
    from .findings import Evidence as Evidence
    from .findings import Finding as Finding
    from .findings import Report as Report
    from .findings import Severity as Severity
    from .format.header import Crypt as Crypt
    from .format.image import Image as Image
    from .format.snapshot_table import SnapshotEntry as SnapshotEntry
    from .format.source import FileSource as FileSource
    from .format.source import PathOrSource as PathOrSource
    from .format.source import Source as Source
    from .format.source import StreamSource as StreamSource
    from .format.source import as_source as as_source
    from .format.source import source_name as source_name
    from .limits import DEFAULT_LIMITS as DEFAULT_LIMITS
    from .limits import Limits as Limits
    from .memory import KERNEL_SYMBOLS as KERNEL_SYMBOLS
    from .memory import Finder as Finder
    from .memory import GuestMemory as GuestMemory
    from .memory import Match as Match
    from .memory import find_kernel as find_kernel
    from .memory import find_stream as find_stream
    from .memory import open_guest_memory as open_guest_memory
    from .memory import pattern_finder as pattern_finder
    from .memory import place_linux as place_linux
    from .memory import scan_memories as scan_memories
    from .memory import uses_five_levels as uses_five_levels
    from .reader.damage_options import ASSUME_VARIABLE as ASSUME_VARIABLE
    from .reader.damage_options import VIRTUAL_SIZE_VARIABLE as VIRTUAL_SIZE_VARIABLE
    from .reader.damage_options import assumptions_from_environment as assumptions_from_environment
    from .reader.damage_options import parse_assumptions as parse_assumptions
    from .reader.damage_options import parse_size as parse_size
    from .reader.damage_options import virtual_size_from_environment as virtual_size_from_environment
    from .reader.disk import Disk as Disk
    from .reader.disk import EofPolicy as EofPolicy
    from .reader.disk import Extent as Extent
    from .reader.disk import Layer as Layer
    from .reader.mapping import Kind as Kind
    from .reader.mapping import Run as Run
    from .reader.memory_choice import MemoryChoice as MemoryChoice
    from .reader.memory_choice import choose_memory as choose_memory
    from .reader.memory_choice import leftover_name as leftover_name
    from .reader.memory_choice import memory_before as memory_before
    from .reader.memory_choice import recovered_memory as recovered_memory
    from .reader.named_files import NamedFiles as NamedFiles
    from .reader.named_files import named_files as named_files
    from .reader.opening import MissingPolicy as MissingPolicy
    from .reader.opening import Passphrase as Passphrase
    from .reader.opening import leftover_vm_state as leftover_vm_state
    from .reader.opening import memory_snapshots as memory_snapshots
    from .reader.opening import open_disk as open_disk
    from .reader.opening import open_image as open_image
    from .reader.opening import open_vm_state as open_vm_state
    from .reader.passphrases import KEY_FILE_VARIABLE as KEY_FILE_VARIABLE
    from .reader.passphrases import PASSPHRASE_VARIABLE as PASSPHRASE_VARIABLE
    from .reader.passphrases import passphrases_from_environment as passphrases_from_environment
    from .reader.passphrases import passphrases_from_files as passphrases_from_files
    from .reader.references import Role as Role
    from .reader.references import base_name as base_name
    from .reader.references import json_options as json_options
    from .reader.references import parse_reference as parse_reference
    from .reader.resolver import ALONE_VARIABLE as ALONE_VARIABLE
    from .reader.resolver import BACKING_VARIABLE as BACKING_VARIABLE
    from .reader.resolver import Remedies as Remedies
    from .reader.resolver import Resolver as Resolver
    from .reader.resolver import folders_from_environment as folders_from_environment
    from .reader.signals import ended_by_signals as ended_by_signals
    from .reader.signals import signals_wait as signals_wait
    from .reader.states import SnapshotName as SnapshotName
    from .reader.states import assuming as assuming
    from .reader.states import is_recovered_state as is_recovered_state
    from .reader.stream import SourceStream as SourceStream
    from .reader.vm_state import VmState as VmState
    from .reader.writer import cache_file as cache_file
    from .residue import residue as residue
    from .text import __version__ as __version__

# Every name is imported at its first use: importing the package takes no time, and the command starts where Ctrl-C is
# handled before anything is imported that takes time. A test holds this table to the imports above.
_NAMES = {  # by the module that has them
    "audit": "audit audit_path",
    "compare": "compare",
    "errors": "ForbiddenReference FormatError LimitExceeded Locked MissingFile NotQcow2 Qcow2Error ReadError "
    "SnapshotNotFound Unsupported reason",
    "findings": "Evidence Finding Report Severity",
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
    "reader.signals": "ended_by_signals signals_wait",
    "reader.states": "SnapshotName assuming is_recovered_state",
    "reader.stream": "SourceStream",
    "reader.vm_state": "VmState",
    "reader.writer": "cache_file",
    "residue": "residue",
    "text": "__version__",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
_MODULES = ("errors", "format", "limits", "reader", "text")  # also there as attributes

if not TYPE_CHECKING:  # type checkers take the imports above as the public names
    __all__ = list(_HOMES)


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


__getattr__ = at_first_use(__name__, _HOMES | dict.fromkeys(_MODULES, ""))


def __dir__() -> list[str]:
    return sorted(_HOMES)


class _Package(ModuleType):
    """Keeps ``audit``, ``compare`` and ``residue`` the functions when their packages are imported.

    Importing ``qcow2_forensics.audit`` would set the attribute ``audit`` of this package to what was imported;
    the public name is that of the function inside, which is looked up at first use.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and _HOMES.get(name) == name):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
