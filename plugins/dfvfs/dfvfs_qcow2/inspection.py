"""What an image says about itself, by path specification: snapshots, findings.

The functions take a QCOW path specification, or any that leads through one: the innermost image
is meant.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from dfvfs.lib import definitions
from dfvfs.path import factory
from dfvfs.resolver import resolver as dfvfs_resolver

from qcow2_forensics import Image, SnapshotEntry, virtual_size_from_environment
from qcow2_forensics.text import printable

from .names import SnapshotKey, qcow_path_specs
from .opening import only_os_errors
from .references import PathSpecResolver
from .sources import open_image_source, open_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcow2_forensics import Finding, Report
    from qcow2_forensics.recovery import RecoveredState
    from qcow2_forensics.residue import DeletedSnapshot

logger = logging.getLogger("dfvfs_qcow2")


def open_image(path_spec: Any, resolver_context: Any = None) -> Image:
    """Open the metadata of the image; raises OSError."""
    qcow = _innermost(path_spec)
    with only_os_errors():
        return Image(open_image_source(qcow.parent, _context(resolver_context))[1])


def snapshots(path_spec: Any, resolver_context: Any = None) -> tuple[SnapshotEntry, ...]:
    """Return the entries of the image's snapshot table; raises OSError.

    Where the table can be read in part, what can be read is returned, with a warning to the log.
    """
    with only_os_errors():
        image = open_image(path_spec, resolver_context)
        problem = image.unreadable("snapshots")
        if problem is not None and not image.snapshots:
            raise problem.error()
        if problem is not None:
            logger.warning("%s: snapshots are missing: %s", printable(image.name), problem.error())
        return image.snapshots


def deleted_snapshots(path_spec: Any, resolver_context: Any = None) -> list[DeletedSnapshot]:
    """Return the deleted snapshots whose entries survive, and how much of each; raises OSError.

    Everything in the image that nothing points at is read for it.
    """
    from qcow2_forensics.residue import deleted_snapshots as find

    with only_os_errors():
        return find(open_image(path_spec, resolver_context), read_data=False)


def recovered_states(path_spec: Any, resolver_context: Any = None) -> list[RecoveredState]:
    """Return the disks that can be put together from what is left of a damaged image; raises OSError.

    The whole file is read for it. Of an image without a header there is a QCOW path specification too.
    """
    from qcow2_forensics.recovery import recovered_states as find

    with only_os_errors():
        _, source = open_image_source(_innermost(path_spec).parent, _context(resolver_context))
        found = find(source, virtual_size=virtual_size_from_environment())
    return [state for state in found if not state.is_memory]


def recovered_path_spec(path_spec: Any, state: RecoveredState) -> Any:
    """Return the path specification of a recovered state of the image."""
    return _state_path_spec(path_spec, SnapshotKey.of_recovered(state))


def snapshot_path_spec(path_spec: Any, entry: SnapshotEntry) -> Any:
    """Return the path specification of a snapshot of the image, also of a deleted one."""
    return _state_path_spec(path_spec, SnapshotKey.of(entry))


def _state_path_spec(path_spec: Any, key: SnapshotKey) -> Any:
    return factory.Factory.NewPathSpec(
        definitions.TYPE_INDICATOR_ENCODED_STREAM,
        encoding_method=key.encoding_method,
        parent=_innermost(path_spec),
    )


def snapshot_path_specs(path_spec: Any, resolver_context: Any = None) -> list[Any]:
    """Return the path specifications of all snapshots of the image, in table order; raises OSError."""
    return [snapshot_path_spec(path_spec, entry) for entry in snapshots(path_spec, resolver_context)]


def audit(path_spec: Any, resolver_context: Any = None, depth: str = "standard") -> Report:
    """Audit the image and return the whole report; raises OSError only if it cannot be opened."""
    import qcow2_forensics

    qcow = _innermost(path_spec)
    context = _context(resolver_context)
    with only_os_errors():
        source = open_source(qcow.parent, context)
        report: Report = qcow2_forensics.audit(source, depth=depth, resolver=PathSpecResolver(context))
        return report


def findings(path_spec: Any, resolver_context: Any = None, depth: str = "standard") -> Sequence[Finding]:
    """Return the findings of an audit of the image."""
    return audit(path_spec, resolver_context, depth).findings


def _innermost(path_spec: Any) -> Any:
    for qcow in qcow_path_specs(path_spec):
        return qcow
    raise ValueError("the path specification leads through no QCOW image")


def _context(resolver_context: Any) -> Any:
    # The default context has no public name.
    return resolver_context or dfvfs_resolver.Resolver._resolver_context
