"""Wraps methods of classes that are not ours, once: the modules that do so end with it, and work by being imported."""

from __future__ import annotations

import functools
from typing import Any


def wrap_method(owner: Any, name: str, function: Any) -> None:
    """Replace a method by ``function(stock method, instance, ...)``, unless that was done before."""
    stock_method = getattr(owner, name)
    if getattr(stock_method, "knows_qcow_snapshots", False):
        return

    @functools.wraps(stock_method)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(stock_method, self, *args, **kwargs)

    method.knows_qcow_snapshots = True  # type: ignore[attr-defined]
    setattr(owner, name, method)
