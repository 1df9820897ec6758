"""The scan finds QCOW images in volumes: logical volumes, partitions, the disk in an E01.

The stock scan looks for images in files of the operating system alone. What holds a volume system or a
file system is what the stock scan says it is: an image is only looked for where it finds nothing, so that a
guest cannot hide its disk behind four bytes.
"""

from __future__ import annotations

import logging
from typing import Any

from dfvfs.helpers import source_scanner as stock
from dfvfs.lib import definitions
from dfvfs.lib import errors as dfvfs_errors
from dfvfs.path import factory
from dfvfs.resolver import resolver

from qcow2_forensics.text import printable

from .sources import display_name
from .wrapping import wrap_method

_MAGIC = b"QFI\xfb"

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
    try:
        file_object = resolver.Resolver.OpenFileObject(path_spec, resolver_context=scanner._resolver_context)
        if file_object is None:
            return False
        file_object.seek(0)
        return bool(file_object.read(len(_MAGIC)) == _MAGIC)
    except (OSError, dfvfs_errors.Error):
        return False


def register() -> None:
    """Wrap the method, once."""
    wrap_method(stock.SourceScanner, "ScanForVolumeSystem", _scan_for_volume_system)


register()
