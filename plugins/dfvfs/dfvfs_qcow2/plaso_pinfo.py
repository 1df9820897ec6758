"""pinfo lists warnings of several files: in plaso 20260720 it ends with a TypeError as soon as two files have some.

It asks for the files with most warnings, and a count of warnings knows no order. Where it has none it gets
one; docs/dfvfs.md has the patch.
"""

from __future__ import annotations

from typing import Any

from plaso.containers import counts as stock


def _is_fewer(count: Any, other: Any) -> bool:
    return bool(count.number_of_events < other.number_of_events)


def register() -> None:
    """Give the counts an order where plaso does not."""
    count: Any = getattr(stock, "WarningCount", None)
    if count is None:
        return
    try:
        sorted([count(number_of_events=1), count(number_of_events=2)])
    except TypeError:
        count.__lt__ = _is_fewer


register()
