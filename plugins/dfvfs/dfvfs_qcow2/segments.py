"""dfimagetools keeps the files of each state apart: path segments say which snapshot and which inner image they are in.

Its lister is a volume scanner that names only partitions and volumes, so that one state's file would be written
over another's. It is wrapped when it scans, because there is no module of dfVFS to wait for.
"""

from __future__ import annotations

from typing import Any

from .names import folder, image_name, key_of
from .wrapping import wrap_method

_METHOD = "_GetBasePathSegments"


def _segments(stock_method: Any, lister: Any, path_spec: Any) -> list[str]:
    segments: list[str] = stock_method(lister, path_spec)
    if path_spec is None:
        return segments
    key = key_of(path_spec)
    if key is not None:
        segments.append(folder(key))
    elif path_spec.type_indicator == "QCOW" and image_name(path_spec):
        segments.append("qcow2-image")
    return segments


def label_segments(scanner: Any) -> None:
    """Let a scanner that names where files are name snapshots too; others are left alone."""
    if hasattr(type(scanner), _METHOD):
        wrap_method(type(scanner), _METHOD, _segments)
