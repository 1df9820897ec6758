"""Which parameters of a large matrix the README's test command runs; the rest is left to ``-m slow``.

A matrix is thinned by naming what stays quick, or by taking every nth row::

    @pytest.mark.parametrize("ident", quick(IMAGES, hostile.REPRESENTATIVE))
    @pytest.mark.parametrize("scenario", every(9, PLAIN), ids=...)

No row is dropped: the others carry the mark ``slow``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeVar

import pytest
from _pytest.mark.structures import ParameterSet

T = TypeVar("T")


def quick(rows: Iterable[T], chosen: Collection[T], *, unpack: bool = False) -> list[ParameterSet]:
    """Return all rows, those that are not ``chosen`` marked slow; what is chosen must be among them."""
    rows = list(rows)
    missing = [row for row in chosen if row not in rows]
    assert not missing, missing
    return [_row(row, slow=row not in chosen, unpack=unpack) for row in rows]


def every(step: int, rows: Iterable[T], *, unpack: bool = False) -> list[ParameterSet]:
    """Return all rows, all but each ``step``-th, from the first on, marked slow; ``unpack`` rows of several values."""
    return [_row(row, slow=number % step != 0, unpack=unpack) for number, row in enumerate(rows)]


def _row(row: T, *, slow: bool, unpack: bool = False) -> ParameterSet:
    values = row if unpack and isinstance(row, tuple) else (row,)
    return pytest.param(*values, marks=[pytest.mark.slow] if slow else [])
