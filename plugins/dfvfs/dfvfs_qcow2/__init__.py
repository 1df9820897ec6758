"""qcow2-forensics as the QCOW back-end of dfVFS and plaso.

``import dfvfs_qcow2`` is all it takes: from then on dfVFS reads QCOW images of every version with
this reader in place of its built-in one, in programs that were imported before as well as after.
The type indicator stays ``QCOW`` and the path specifications of the active state stay what they
are, so a ``.plaso`` file made with this back-end is readable everywhere.

An internal snapshot is the path specification ``... > QCOW > ENCODED_STREAM``; see :mod:`.names`::

    import dfvfs_qcow2

    for path_spec in dfvfs_qcow2.snapshot_path_specs(qcow_path_spec):
        file_object = resolver.Resolver.OpenFileObject(path_spec)

    for finding in dfvfs_qcow2.findings(qcow_path_spec):
        print(finding.severity.label, finding.code, finding.title)

Nothing of dfVFS is imported here; each part is put in place when the module it replaces has been
imported (see :mod:`qcow2_forensics_autoload`). To import this package is to ask for it, whatever the
environment variable says that switches the hook off.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import qcow2_forensics_autoload

if TYPE_CHECKING:
    from .inspection import (
        audit,
        deleted_snapshots,
        findings,
        recovered_path_spec,
        recovered_states,
        snapshot_path_specs,
        snapshots,
    )

__all__ = [
    "audit",
    "deleted_snapshots",
    "findings",
    "is_active",
    "recovered_path_spec",
    "recovered_states",
    "snapshot_path_specs",
    "snapshots",
]

_LAZY = frozenset(__all__) - {"is_active"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from . import inspection

        return getattr(inspection, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_active() -> bool:
    """Return whether dfVFS's resolver opens QCOW path specifications with this back-end in this process."""
    manager = sys.modules.get("dfvfs.resolver_helpers.manager")
    ours = sys.modules.get(f"{__name__}.resolver_helper")
    if manager is None or ours is None:
        return False
    try:
        helper = manager.ResolverHelperManager.GetHelper("QCOW")
    except KeyError:
        return False
    return isinstance(helper, ours.QCOWResolverHelper)


qcow2_forensics_autoload.wait_for("dfvfs", "plaso")
