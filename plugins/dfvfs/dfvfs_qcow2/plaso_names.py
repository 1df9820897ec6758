"""Display names say which snapshot and which inner image a file is in, as they do for shadow copies."""

from __future__ import annotations

from typing import Any

from plaso.engine import path_helper as stock

from .names import labels_of


def register() -> None:
    """Wrap the class method, once."""
    stock_method = stock.PathHelper.GetDisplayNameForPathSpec
    if getattr(stock_method, "knows_qcow_snapshots", False):
        return
    stock_function = stock_method.__func__

    def get_display_name(cls: Any, path_spec: Any) -> str | None:
        """Return the display name of a path specification, with the snapshot and the inner image it is in."""
        name: str | None = stock_function(cls, path_spec)
        return None if name is None else f"{labels_of(path_spec)}{name}"

    get_display_name.knows_qcow_snapshots = True  # type: ignore[attr-defined]
    stock.PathHelper.GetDisplayNameForPathSpec = classmethod(get_display_name)


register()
