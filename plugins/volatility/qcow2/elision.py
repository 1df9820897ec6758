"""When a scanner may skip zeros, with the reason why its results stay the same.

There are two ways to skip, and each needs its own proof:

* ``INSIDE``: leave out the inside of long zero runs, but for the scanner's overlap at both ends.
  Right when no match, and nothing looked at on the way to one, can span so many zeros, and nothing
  before a match is looked at: chunks begin elsewhere than without skipping. For the three scanners
  of Volatility that search for bytes this is read off the pattern.
* ``WHOLE``: leave out chunks that are nothing but zeros, of the same grid of chunks as ever. Right
  for every scanner that keeps no state and finds nothing in such a chunk, which is tried once.

A scanner that keeps state gets everything.
"""

from __future__ import annotations

import enum
import re
from typing import Any

from volatility3.framework import interfaces
from volatility3.framework.layers import scanners

_NO_ZERO = {"CATEGORY_DIGIT", "CATEGORY_SPACE", "CATEGORY_WORD"}


class Skip(enum.Enum):
    """What may be left out."""

    NOTHING = enum.auto()
    WHOLE = enum.auto()
    INSIDE = enum.auto()


def allowed(scanner: interfaces.layers.ScannerInterface) -> Skip:
    """Return what this scanner may skip; ``WHOLE`` still has to be tried with :func:`finds_zeros`."""
    zeros = zeros_in_a_match(scanner)
    if zeros is not None and zeros < scanner.overlap and not finds_zeros(scanner, 2 * scanner.overlap):
        return Skip.INSIDE
    # Volatility's word for "keeps no state"; its YaraScanner keeps none either but cannot be pickled.
    if scanner.thread_safe or type(scanner).__name__ == "YaraScanner":
        return Skip.WHOLE
    return Skip.NOTHING


def finds_zeros(scanner: interfaces.layers.ScannerInterface, length: int) -> bool:
    """Return whether the scanner yields anything for that many zeros."""
    return next(iter(scanner(bytes(length), 0)), None) is not None


def zeros_in_a_match(scanner: interfaces.layers.ScannerInterface) -> int | None:
    """Return the most zero bytes that can belong to a match of the scanner; None when unbounded or unknown."""
    kind = type(scanner)
    if kind is scanners.BytesScanner:
        return int(scanner.needle.count(0))
    if kind is scanners.RegExScanner:
        return zeros_in_a_pattern(scanner.regex.pattern, scanner.regex.flags)
    if kind is scanners.MultiStringScanner:
        pattern = getattr(scanner, "_regex", None)
        return zeros_in_a_pattern(pattern, 0) if isinstance(pattern, bytes) else None
    return None


def zeros_in_a_pattern(pattern: bytes, flags: int) -> int | None:
    """Return the most zero bytes a match of a regular expression can hold or look at, None when unbounded."""
    parser = getattr(re, "_parser", None)
    if parser is None:
        return None
    try:
        return _zeros(parser.parse(pattern, flags))
    except (_UnboundedError, RecursionError, re.error):
        return None


class _UnboundedError(Exception):
    """No bound, or a construct whose bound is not worked out here."""


def _zeros(tree: Any) -> int:
    return sum(_zeros_of(str(code), value) for code, value in tree)


def _zeros_of(code: str, value: Any) -> int:
    """Return the bound of one node of the parsed pattern."""
    if code == "LITERAL":
        return int(value == 0)
    if code == "NOT_LITERAL":
        return int(value != 0)
    if code == "ANY":
        return 1
    if code == "IN":
        return int(any(_may_be_zero(str(kind), item) for kind, item in value))
    if code == "BRANCH":
        return max(_zeros(branch) for branch in value[1])
    if code in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        most, once = int(value[1]), _zeros(value[2])
        if once and most >= 1 << 16:
            raise _UnboundedError
        return most * once if once else 0
    if code == "SUBPATTERN":
        return _zeros(value[3])
    if code == "ATOMIC_GROUP":
        return _zeros(value)
    if code in ("ASSERT", "ASSERT_NOT") and value[0] > 0:
        return _zeros(value[1])
    # What looks back, as boundaries of words do, and anchors depend on where a chunk is cut; references on what was matched.
    raise _UnboundedError


def _may_be_zero(kind: str, item: Any) -> bool:
    if kind == "LITERAL":
        return bool(item == 0)
    if kind == "RANGE":
        return bool(item[0] == 0)
    # A negated set, or a category: only these three are known to be without the zero byte.
    return not (kind == "CATEGORY" and str(item) in _NO_ZERO)
