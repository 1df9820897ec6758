"""Which L2 tables continue each other: the clusters where one ends are followed in the file by those where the other begins.

::

    in the file   ... | last cluster of A | table B | first cluster of B | ...
    on the disk   A in slot 7, so B in slot 8

A guest writes its disk in stretches, and clusters are allocated in the order in which they are written, so that a write over
the boundary of two tables leaves its clusters beside each other, with nothing but tables between. It is no
proof: a guest may stop writing at the very end of one table and go on at the very start of another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..census.arrays import I64, U64, distinct
from ..census.columns import is_packed, named_offsets

_TABLES_BETWEEN = 4  # clusters between: an L2 table, a refcount block, and their copies after a snapshot
_VERSIONS = 256  # pairs of two tables and their versions in snapshots: crafted tables repeat


def host_offsets(entries: U64, cluster_size: int) -> I64:
    """Return where in the file the cluster or the stream of each entry starts; 0 for none."""
    streams = np.uint64((1 << 62 - (cluster_size.bit_length() - 9)) - 1)
    return np.where(is_packed(entries), entries & streams, named_offsets(entries)).astype(np.int64)


def continuations(tables: Sequence[U64], cluster_size: int) -> list[tuple[int, int]]:
    """Return pairs of numbers of tables, (entries,) each: the second goes on where the first ends."""
    ends = _by_offset(tables, -1, cluster_size)
    begins = _by_offset(tables, 0, cluster_size)
    last, first = distinct(ends[:, 0]), distinct(begins[:, 0])
    at = np.searchsorted(first, last, "right")
    last, at = last[at < len(first)], at[at < len(first)]
    near = first[at] - last <= (1 + _TABLES_BETWEEN) * cluster_size
    last, next_ = last[near], first[at[near]]
    apart = np.zeros(len(last), np.bool_)  # something else that a table names is between
    for entries in tables if len(last) else ():
        hosts = host_offsets(entries, cluster_size)
        pair = np.searchsorted(last, hosts, "left") - 1
        between = (pair >= 0) & (hosts < next_[pair])
        apart[pair[between]] = True
    result: list[tuple[int, int]] = []
    for end, begin in zip(last[~apart].tolist(), next_[~apart].tolist(), strict=True):
        befores, afters = _at(ends, end), _at(begins, begin)
        if len(befores) * len(afters) <= _VERSIONS:
            result += [(one, other) for one in befores for other in afters if one != other]
    return result


def _at(rows: I64, host: int) -> list[int]:
    low, high = np.searchsorted(rows[:, 0], [host, host + 1])
    numbers: list[int] = rows[low:high, 1].tolist()
    return numbers


def _by_offset(tables: Sequence[U64], column: int, cluster_size: int) -> I64:
    """Return (tables, 2) the host offset of one entry of each table that has it, and the table's number, by offset."""
    entries = np.array([table[column] for table in tables], np.uint64)
    hosts = host_offsets(entries, cluster_size)
    used = np.flatnonzero(hosts)
    rows = np.stack([hosts[used], used], axis=1)
    ordered: I64 = rows[np.argsort(rows[:, 0], kind="stable")]
    return ordered


def written_in_order(tables: Sequence[U64], cluster_size: int) -> bool:
    """Whether the clusters of tables, given in the order of the file, follow each other in the same order.

    Compressed streams and plain clusters are two sequences: a stream goes on in the last cluster of streams, which may be
    before plain clusters that were written earlier.
    """
    ends = {False: 0, True: 0}
    for entries in tables:
        hosts = host_offsets(entries, cluster_size)
        packed = is_packed(entries)
        for kind, end in ends.items():
            some = hosts[(packed == kind) & (hosts != 0)]
            if len(some) and (some[0] <= end or np.any(np.diff(some) <= 0)):
                return False
            ends[kind] = int(some[-1]) if len(some) else end
    return True
