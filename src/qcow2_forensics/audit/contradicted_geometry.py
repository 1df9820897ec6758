"""Rules about header fields that say how tables are read, and that the tables themselves contradict.

The active L1 table starts where the header says and L2 tables start where it says, whatever the cluster size is, so that
the first entries of each can be read with a wrong header too. What they imply is believed where the refcounts agree::

    cluster size     16 host offsets or more, and not one more bit of them is 0 in all; or streams that decode to it
    entries          the words that would be bitmaps are entries: clusters in use, or streams that decode
    refcount width   the header, the L1 table and the refcounts' own clusters are counted once each

Nothing is proposed for an image whose check finds nothing wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ..findings import Evidence, Severity
from ..format.entries import (
    has_reserved_l1_bits,
    has_reserved_l2_bits,
    is_compressed,
    named_offset,
    refcount_block_offset,
)
from ..format.header import SECTOR
from ..text import size
from .facts import Facts
from .header_assumptions import proposed
from .rules import Chapter, Depth, OneFinding

if TYPE_CHECKING:
    from ..recovery.refcounts import FoundRefcounts

rule = Chapter(__name__, "Header fields that the tables contradict", depth=Depth.STANDARD)

_LEAST = 16  # different host offsets: by chance all of them are multiples of twice the cluster size once in 65,536
_STREAMS = 4  # compressed clusters that have to decode
_L1_ENTRIES = 4096  # that are looked at
_TABLES = 64  # L2 tables of which the first sector is read
_LEAST_EXTENDED = 14  # cluster_bits below which no header may claim extended entries
_BITS = range(9, 22)
_ORDERS = range(7)


class _Sample(NamedTuple):
    """What the active L1 table names, and the words at the start of some of that. ``is_sound`` says that L1 entries are such."""

    tables: tuple[int, ...]
    words: tuple[int, ...]
    is_sound: bool


@rule(
    "QCOW2-GEOMETRY-CONTRADICTED",
    Severity.HIGH,
    "tables contradict the header on how they are read",
    note="consistent with a header that was rewritten with a wrong field; with the right one the data can be read",
    when="16 host offsets or more in the active L1 table and the first sectors of its L2 tables, or 4 compressed streams, imply "
    "another cluster size, or standard entries under the flag of extended ones, and refcounts read that way count them; or "
    "the header's cluster, the L1 table and the refcounts themselves are counted once each with one other refcount width only",
    needs="header",
)
def geometry_contradicted(facts: Facts) -> Iterator[OneFinding]:
    header = facts.header
    if header.version not in (2, 3) or header.external_data or _is_clean(facts):
        return
    sample = _sample(facts)
    if not sample.is_sound or not sample.tables:
        return
    bits = _implied_bits(facts, sample)
    if bits is not None and bits != header.cluster_bits:
        found = tuple(proposed(facts, f"cluster-size={1 << bits}"))
        if found:
            items = (
                *found,
                Evidence("cluster_bits", header.cluster_bits, 20, 4, "header"),
                Evidence("cluster size that the tables imply", size(1 << bits)),
            )
            yield OneFinding(items, title="tables are of another cluster size than the header states")
    elif header.extended_l2 and _are_standard(facts, sample):
        found = tuple(proposed(facts, "extended-l2=off"))
        if found:
            title = "L2 tables hold standard entries, the header says extended ones"
            yield OneFinding(
                (*found, Evidence("incompatible_features", hex(header.incompatible_features), 72, 8)), title=title
            )
    elif header.version == 3 and (order := _implied_order(facts, sample)) is not None:
        yield OneFinding(
            (
                Evidence("refcount_order", header.refcount_order, 96, 4, "header"),
                Evidence("refcount_order that the refcounts imply", order),
            ),
            severity=Severity.MEDIUM,
            title="refcounts are of another width than the header states",
            note="consistent with a header that was rewritten with a wrong field; the disk is read without refcounts, but what "
            "is free, leaked or damaged is not known with the wrong width",
        )


def _is_clean(facts: Facts) -> bool:
    """Whether the image's check finds nothing, so that its tables agree with its header."""
    if not facts.has_census or facts.image.header_problems or facts.census_error is not None:
        return False
    census = facts.census
    return not census.corruptions and not int((census.check or {"leaks": 1}).get("leaks", 0))


def _sample(facts: Facts) -> _Sample:
    header, end = facts.header, facts.image.file_size
    count = min(header.l1_size, _L1_ENTRIES)
    data = facts.read(header.l1_table_offset, 8 * count)
    entries = [int.from_bytes(data[at : at + 8], "big") for at in range(0, len(data) - 7, 8)]
    used = [entry for entry in entries if entry]
    is_sound = not any(has_reserved_l1_bits(entry) or named_offset(entry) >= end for entry in used)
    tables = tuple(dict.fromkeys(named_offset(entry) for entry in used)) if is_sound else ()
    words: list[int] = []
    for offset in tables[:: -(-len(tables) // _TABLES) or 1]:
        sector = facts.read(offset, SECTOR)
        words += (int.from_bytes(sector[at : at + 8], "big") for at in range(0, len(sector) - 7, 8))
    return _Sample(tables, tuple(words), is_sound)


def _is_standard(word: int, end: int) -> bool:
    """Whether a word is an entry with a host cluster of its own in the file."""
    return not is_compressed(word) and not has_reserved_l2_bits(word) and 0 < named_offset(word) < end


def _implied_bits(facts: Facts, sample: _Sample) -> int | None:
    """Return the cluster_bits that host offsets or streams imply and that the refcounts agree with, None where nothing does."""
    header, end = facts.header, facts.image.file_size
    entries = [word for word in sample.words[:: 2 if header.extended_l2 else 1] if word]
    packed = [word for word in entries if is_compressed(word)]
    if len(packed) == len(entries) and len(packed) >= _STREAMS:
        from ..recovery.geometry import decoded_size

        decoded = decoded_size(facts.image.source, packed[: 2 * _STREAMS], _STREAMS)
        return decoded[0] if decoded is not None and _are_counted(facts, decoded[0], sample.tables) else None
    hosts = {named_offset(word) for word in entries if _is_standard(word, end)}
    are_entries = all(is_compressed(word) or not named_offset(word) or _is_standard(word, end) for word in entries)
    if len(hosts) < _LEAST or not are_entries:
        return None
    joined = 0
    for offset in (*hosts, *sample.tables, header.l1_table_offset, header.refcount_table_offset):
        joined |= offset
    bits = (joined & -joined).bit_length() - 1
    return bits if bits in _BITS and _are_counted(facts, bits, (*sample.tables, *hosts)) else None


def _are_standard(facts: Facts, sample: _Sample) -> bool:
    """Whether what would be bitmaps of extended entries are entries: streams that decode, or clusters that are counted.

    With clusters of 16 KiB and more the latter is what QCOW2-L2-TABLE-LOST finds, in all of a table.
    """
    header, end = facts.header, facts.image.file_size
    second = [word for word in sample.words[1::2] if word]
    if header.cluster_bits not in _BITS:
        return False
    if len(second) >= _STREAMS and all(map(is_compressed, second)):
        from ..recovery.geometry import decoded_size

        decoded = decoded_size(facts.image.source, second[: 2 * _STREAMS], _STREAMS)
        return decoded is not None and decoded[0] == header.cluster_bits
    if header.cluster_bits >= _LEAST_EXTENDED or not all(_is_standard(word, end) for word in second):
        return False
    hosts = {named_offset(word) for word in second}
    return len(hosts) >= _LEAST and _are_counted(facts, header.cluster_bits, (*sample.tables, *hosts))


def _implied_order(facts: Facts, sample: _Sample) -> int | None:
    """Return the one other refcount_order with which the clusters of the metadata are counted, None for the header's own."""
    header = facts.header
    if header.cluster_bits not in _BITS or _counts_itself(
        facts, header.cluster_bits, header.refcount_order, sample.tables
    ):
        return None
    fitting = [
        order
        for order in _ORDERS
        if order != header.refcount_order and _counts_itself(facts, header.cluster_bits, order, sample.tables)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _refcounts(facts: Facts, bits: int, order: int) -> FoundRefcounts:
    from ..recovery.refcounts import FoundRefcounts

    header = facts.header
    length = min(header.refcount_table_clusters << bits, facts.image.file_size)
    return FoundRefcounts(facts.image.source, header.refcount_table_offset, length, 1 << bits, order)


def _are_counted(facts: Facts, bits: int, offsets: tuple[int, ...]) -> bool:
    """Whether refcounts read with a cluster size count the metadata once and some other clusters at all."""
    order = facts.header.refcount_order if facts.header.version == 3 else 4
    refcounts = _refcounts(facts, bits, order)
    return _counts_itself(facts, bits, order, ()) and all(refcounts.of(offset) for offset in offsets)


def _counts_itself(facts: Facts, bits: int, order: int, tables: tuple[int, ...]) -> bool:
    """Whether the header, the L1 table, the refcount table and its first blocks have the refcount 1, and L2 tables any."""
    header, refcounts = facts.header, _refcounts(facts, bits, order)
    starts = range(header.refcount_table_offset, header.refcount_table_offset + 8 * _TABLES, 8)
    entries = [facts.read(at, 8) for at in starts[: (header.refcount_table_clusters << bits) // 8]]
    blocks = {refcount_block_offset(int.from_bytes(entry, "big")) for entry in entries}
    once = {0, header.l1_table_offset, header.refcount_table_offset, *blocks}
    return all(refcounts.of(offset) == 1 for offset in once) and all(
        refcounts.of(offset) for offset in tables[:_TABLES]
    )
