"""Display names say which snapshot and which inner image a file is in, as they do for shadow copies."""

from __future__ import annotations

from typing import Any

from plaso.engine import path_helper as stock

from .names import labels_of
from .wrapping import wrap_method


def _display_name(stock_method: Any, helper: Any, path_spec: Any) -> str | None:
    """Return the display name of a path specification, with the snapshot and the inner image it is in."""
    name: str | None = stock_method(helper, path_spec)
    return None if name is None else f"{labels_of(path_spec)}{name}"


wrap_method(stock.PathHelper, "GetDisplayNameForPathSpec", _display_name)
