"""Gives dfVFS's resolver our file objects for QCOW, and for the snapshots of a QCOW image.

The built-in ENCODED_STREAM helper keeps every encoding method but ours.
"""

from __future__ import annotations

from typing import Any

from dfvfs.lib import definitions
from dfvfs.resolver_helpers import encoded_stream_resolver_helper, manager, resolver_helper

from . import credentials as _credentials  # noqa: F401 - what opens images can unlock them
from . import path_spec as _path_spec  # noqa: F401
from .file_io import QCOWFile, QCOWSnapshotFile
from .names import PREFIX
from .vfs import QCOWFileSystem

_Stock: Any = resolver_helper.ResolverHelper
_StockEncodedStream: Any = encoded_stream_resolver_helper.EncodedStreamResolverHelper


class QCOWResolverHelper(_Stock):
    """QCOW image resolver helper."""

    TYPE_INDICATOR = definitions.TYPE_INDICATOR_QCOW

    def NewFileObject(self, resolver_context: Any, path_spec: Any) -> QCOWFile:  # noqa: N802
        """Return a file object of the image's active state, not opened yet."""
        return QCOWFile(resolver_context, path_spec)

    def NewFileSystem(self, resolver_context: Any, path_spec: Any) -> QCOWFileSystem:  # noqa: N802
        """Return the file system that says whether the image is locked."""
        return QCOWFileSystem(resolver_context, path_spec)


class EncodedStreamResolverHelper(_StockEncodedStream):
    """Encoded stream resolver helper that also knows snapshots of QCOW images."""

    def NewFileObject(self, resolver_context: Any, path_spec: Any) -> Any:  # noqa: N802
        """Return a file object, ours for our encoding method."""
        method = getattr(path_spec, "encoding_method", None)
        if isinstance(method, str) and method.startswith(PREFIX):
            return QCOWSnapshotFile(resolver_context, path_spec)
        return super().NewFileObject(resolver_context, path_spec)


def register() -> None:
    """Replace the built-in helpers; the one for QCOW is missing where pyqcow is not installed."""
    helpers = manager.ResolverHelperManager
    for helper in (QCOWResolverHelper(), EncodedStreamResolverHelper()):
        try:
            known = helpers.GetHelper(helper.TYPE_INDICATOR)
        except KeyError:
            known = None
        if isinstance(known, type(helper)):
            continue
        if known is not None:
            helpers.DeregisterHelper(known)
        helpers.RegisterHelper(helper)


register()
