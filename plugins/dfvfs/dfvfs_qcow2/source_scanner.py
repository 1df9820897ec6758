"""The scan finds QCOW images in volumes: logical volumes, partitions, the disk in an E01.

The stock scan looks for images in files of the operating system alone. What holds a volume system or a
file system is what the stock scan says it is: an image is only looked for where it finds nothing, so that a
guest cannot hide its disk behind four bytes.

Snapshots are nodes below that of their image where ``DFVFS_QCOW2_SNAPSHOTS`` or the scanner's attribute
``qcow_snapshots`` asks for them. Volume scanners scan them one by one and want no nodes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from dfvfs.helpers import source_scanner as stock
from dfvfs.lib import definitions
from dfvfs.lib import errors as dfvfs_errors
from dfvfs.path import factory
from dfvfs.resolver import resolver

from qcow2_forensics import Qcow2Error
from qcow2_forensics.text import printable

from .inspection import open_image, snapshot_path_spec
from .selection import Selection, selection_from_environment
from .sources import begins_as_image, display_name
from .wrapping import wrap_method

logger = logging.getLogger("dfvfs_qcow2")


def _scan_for_volume_system(stock_method: Any, scanner: Any, source_path_spec: Any) -> Any:
    """Return the QCOW path specification of an image in a volume in which there is nothing else."""
    found = stock_method(scanner, source_path_spec)
    if found is not None or not _begins_with_magic(scanner, source_path_spec):
        return found
    if scanner.ScanForFileSystem(source_path_spec) is not None:
        return None
    path_spec = factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_QCOW, parent=source_path_spec)
    try:
        resolver.Resolver.OpenFileObject(path_spec, resolver_context=scanner._resolver_context)
    except (OSError, dfvfs_errors.Error) as error:
        logger.warning("the image in %s is not read: %s", printable(display_name(source_path_spec)), error)
        return None
    return path_spec


def _begins_with_magic(scanner: Any, path_spec: Any) -> bool:
    if not path_spec.HasParent() or path_spec.type_indicator == definitions.TYPE_INDICATOR_VSHADOW:
        return False
    context = scanner._resolver_context
    return begins_as_image(lambda: resolver.Resolver.OpenFileObject(path_spec, resolver_context=context))


_nodes_wanted: ContextVar[bool] = ContextVar("qcow_snapshot_nodes", default=True)


@contextmanager
def without_snapshots() -> Iterator[None]:
    """Add no nodes for snapshots inside the block."""
    token = _nodes_wanted.set(False)
    try:
        yield
    finally:
        _nodes_wanted.reset(token)


def _scan(stock_method: Any, scanner: Any, scan_context: Any, *args: Any, **kwargs: Any) -> None:
    stock_method(scanner, scan_context, *args, **kwargs)
    text = getattr(scanner, "qcow_snapshots", None)
    selection = Selection(text) if text else selection_from_environment()
    if _nodes_wanted.get() and selection is not None and selection.wants_any:
        for node in list(images(scan_context.GetRootScanNode())):
            if not scan_context.IsLockedScanNode(node.path_spec):
                _add_snapshots(scanner, scan_context, node, selection)


def images(scan_node: Any) -> Iterator[Any]:
    """Yield the scan nodes of QCOW images at and below a node, outermost first."""
    pending = [scan_node] if scan_node is not None else []
    while pending:
        node = pending.pop(0)
        if node.type_indicator == definitions.TYPE_INDICATOR_QCOW:
            yield node
        pending.extend(node.sub_nodes)


def _add_snapshots(scanner: Any, scan_context: Any, node: Any, selection: Selection) -> None:
    try:
        chosen = selection.choose(open_image(node.path_spec, scanner._resolver_context))
    except (OSError, Qcow2Error) as error:
        logger.warning("%s: no snapshots are scanned: %s", printable(display_name(node.path_spec)), error)
        return
    for entry in chosen:
        path_spec = snapshot_path_spec(node.path_spec, entry)
        if scan_context.HasScanNode(path_spec):
            continue
        snapshot = scan_context.AddScanNode(path_spec, node)
        try:
            scanner._ScanNode(scan_context, snapshot)
        except (OSError, dfvfs_errors.Error) as error:
            logger.warning("%s: %s", printable(display_name(path_spec)), error)


wrap_method(stock.SourceScanner, "Scan", _scan)
wrap_method(stock.SourceScanner, "ScanForVolumeSystem", _scan_for_volume_system)
