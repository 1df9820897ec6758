"""Wraps methods of classes that are not ours, once: the modules that do so end with it, and work by being imported."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def wrap_method(owner: Any, name: str, function: Any) -> None:
    """Replace a method by ``function(stock method, instance, ...)``, unless that was done before.

    The method of a class is given the class in place of an instance.
    """
    stock_method = getattr(owner, name)
    if getattr(stock_method, "knows_qcow_snapshots", False):
        return
    is_of_class = inspect.ismethod(stock_method)
    stock_method = stock_method.__func__ if is_of_class else stock_method

    @functools.wraps(stock_method)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(stock_method, self, *args, **kwargs)

    method.knows_qcow_snapshots = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(method) if is_of_class else method)
