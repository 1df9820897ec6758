"""Writers by the layout of the images they make, for images whose header does not say more.

What each writer puts after the header, in clusters::

    QEMU, since 1.1    refcount table, refcount block, L1, L2, data
    QEMU, before 1.1   L1, refcount table, refcount block, L2, data          version 2
    Xen Orchestra      refcount table, all refcount blocks, L1, all L2, data version 2
    mkimg (FreeBSD)    L1, refcount table, all L2, all refcount blocks, data version 2, 64 KiB
    e2image            L1, refcount table, one cluster unused, L2, ...       version 2, block size of the file system
    crosvm             L1, refcount table, ...                               version 3, header of 104 bytes
"""

from __future__ import annotations

from typing import NamedTuple

from ..format.entries import named_offset, parse_entries
from ..format.header import QCOW1_HEADER_LENGTH, V2_HEADER_LENGTH, V3_HEADER_LENGTH, padded
from .facts import Facts


class WriterLayout(NamedTuple):
    """A writer, and the header field whose value shows it."""

    writer: str
    field: str


def layout(facts: Facts) -> WriterLayout | None:
    """Return the writer whose layout an image has, None where it is that of none."""
    version = facts.header.version
    if version == 1:
        return _version1(facts)
    tables = _Tables.of(facts)
    if tables.refcount_table == tables.size:
        return _refcounts_first(facts, tables)
    if tables.l1 == tables.size and tables.refcount_table == tables.behind_l1:
        return _version3(facts) if version == 3 else _l1_first(facts, tables)
    return None


class _Tables(NamedTuple):
    """Where an image's tables are, in bytes; 0 for one that is not there."""

    size: int  # of a cluster
    l1: int
    behind_l1: int  # the first cluster that begins after it
    refcount_table: int
    behind_refcount_table: int
    first_block: int
    first_l2: int
    second_l2: int

    @classmethod
    def of(cls, facts: Facts) -> _Tables:
        header, size = facts.header, facts.cluster_size
        first, second = _first_two(facts, header.l1_table_offset, header.l1_size)
        return cls(
            size,
            header.l1_table_offset,
            -(-(header.l1_table_offset + header.l1_size * 8) // size) * size,
            header.refcount_table_offset,
            header.refcount_table_offset + header.refcount_table_clusters * size,
            _first_two(facts, header.refcount_table_offset, 1)[0],
            first,
            second,
        )


def _first_two(facts: Facts, offset: int, count: int) -> tuple[int, int]:
    """Return the first two pointers that a table holds, among its first 4,096 entries; 0 for none."""
    data = facts.read(offset, min(count, 4096) * 8)
    found = filter(None, map(named_offset, parse_entries(data[: len(data) // 8 * 8])))
    return next(found, 0), next(found, 0)


def _version1(facts: Facts) -> WriterLayout | None:
    header = facts.header
    has_name = header.backing_file_offset == QCOW1_HEADER_LENGTH
    behind_name = QCOW1_HEADER_LENGTH + (header.backing_file_size if has_name else 0)
    bits = header.cluster_bits, header.l2_bits
    if header.l1_table_offset == padded(behind_name) and bits in ((12, 9), (9, 12)):
        return WriterLayout("QEMU's QCOW version 1 writer", "l1_table_offset")
    if header.l1_table_offset == header.cluster_size and bits == (12, 9):
        return WriterLayout("FreeBSD's mkimg (version 1)", "l1_table_offset")
    return None


def _refcounts_first(facts: Facts, tables: _Tables) -> WriterLayout | None:
    # QEMU itself wrote bytes of version 3 after the header of version 2 for years.
    is_bare = facts.header.version == 2 and not any(facts.read(V2_HEADER_LENGTH, 4096 - V2_HEADER_LENGTH))
    if not is_bare:
        writer = "QEMU, as it creates images"
    elif tables.first_l2 == tables.behind_l1 and tables.second_l2 == tables.first_l2 + tables.size:
        writer = "Xen Orchestra's streaming writer"
    else:
        writer = "QEMU or Xen Orchestra's streaming writer"
    return WriterLayout(writer, "refcount_table_offset")


def _l1_first(facts: Facts, tables: _Tables) -> WriterLayout | None:
    if tables.first_block == tables.behind_refcount_table:
        return WriterLayout("QEMU before 1.1", "l1_table_offset")
    if tables.first_l2 == tables.behind_refcount_table and facts.header.cluster_bits == 16:
        return WriterLayout("FreeBSD's mkimg (version 2)", "l1_table_offset")
    if tables.first_l2 == tables.behind_refcount_table + tables.size:
        return WriterLayout("e2image of e2fsprogs", "l1_table_offset")
    return None


def _version3(facts: Facts) -> WriterLayout | None:
    if facts.header.header_length == V3_HEADER_LENGTH and not facts.image.extensions:
        return WriterLayout("the crosvm family (crosvm, Cloud Hypervisor)", "l1_table_offset")
    return None


def counts_nothing(facts: Facts) -> bool:
    """Whether the first refcount block gives the header, a table or itself no reference, as some libraries leave it."""
    header = facts.header
    if header.version < 2 or header.refcount_order > 6:
        return False
    block = _first_two(facts, header.refcount_table_offset, 1)[0]
    if not block or block >= facts.image.file_size:
        return False
    bits = header.refcount_bits
    return not any(facts.read(block, max(1, 4 * bits // 8)))
