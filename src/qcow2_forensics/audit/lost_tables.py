"""Rules about tables whose content is gone: one item for each table, however many entries are wrong for it.

::

    L1[3] -> L2 at 0x50000      holds zeros (punched), a refcount block, or file data now
             data               its clusters are still counted, and nothing refers to them: leaked
             data
    L1[4] -> L2 at 0x250000     the next table: up to here the leaked clusters are taken for its own
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from ..census import Tables
from ..census.arrays import I64, U64, Mask
from ..census.columns import big_endian
from ..findings import BoundedSample, Evidence, Severity
from ..limits import LEAKED_TABLES_SEARCHED
from ..reader.host_holes import host_runs
from ..residue import content
from ..residue.structure_detection import Geometry, l2_rows, refcount_rows
from ..text import size
from .entry_evidence import snapshot_id
from .facts import Facts
from .header_assumptions import extended_tables, other_entries, standard_tables
from .rules import Chapter, Depth, OneFinding

rule = Chapter(__name__, "Lost tables", depth=Depth.STANDARD)

_FEW = 4  # entries that are none: below, a table is damaged and not lost
_LEAKS = 8  # leaked clusters after a table of zeros: below, an interrupted write explains them
_MISREAD = {
    False: "L2 tables hold extended entries, the header says standard ones",
    True: "L2 tables hold standard entries, the header says extended ones",
}
_MISREAD_NOTE = (
    "consistent with a header that was rewritten with a wrong feature bit; with the right one the data can be read"
)
_SYMPTOMS = (
    "reserved-bits",
    "unaligned",
    "zero-flag-v2",
    "beyond-eof",
    "subcluster",
    "compressed-copied",
    "extended-bit-0",
)


@rule(
    "QCOW2-L2-TABLE-LOST",
    Severity.HIGH,
    "an L2 table holds something else now",
    note="the guest range reads as zeros or not at all, although its clusters are still counted: consistent with a host "
    "file in which ranges were punched or overwritten; the data may be found in the leaked clusters",
    when="an L2 table holds zeros and at least 8 leaked clusters lie between it and the next table, or at least half of "
    "its uncompressed entries, and 4, cannot be entries, or the header says extended entries and at least half of its second "
    "words name leaked clusters as standard entries do; one item for each table",
    harmless="in version 2 a table of zeros without leaked clusters is what discarded ranges leave, and is not reported",
)
def l2_table_lost(facts: Facts) -> Iterator[OneFinding]:
    census = facts.census
    leaks = int((census.check or {}).get("leaks", 0)) if not facts.header.external_data else 0
    if not leaks and not any(census.issues[kind].count for kind in _SYMPTOMS):
        return
    leaked = _Leaked(facts)
    found: BoundedSample[_Lost] = BoundedSample()
    is_extended = facts.header.extended_l2
    misread = 0  # tables that are sound with entries of the other kind
    for batch in census.tables():
        blank, foreign = _blank(batch), _foreign(facts, batch)
        if is_extended and leaks:
            standard = standard_tables(facts, batch.offsets, leaked.are)
            misread += int(standard.sum())
            foreign |= standard
        elif bool(foreign.any()) and not is_extended:
            misread += int(extended_tables(facts, batch.offsets[foreign]).sum())
        for row in np.flatnonzero(blank | foreign).tolist():
            offset = int(batch.offsets[row])
            count = leaked.behind(offset)
            if foreign[row] or count >= _LEAKS:
                found.add(_Lost(offset, int(batch.index[row]), int(batch.tree[row]), count), offset)
    if not found.count:
        return
    proposed = tuple(other_entries(facts)) if misread == found.count else ()
    title, note = (_MISREAD[is_extended], _MISREAD_NOTE) if proposed else ("", "")
    items = (_evidence(facts, lost) for lost in found.items)
    yield OneFinding([*proposed, *items], title=title, note=note, count=found.count)


class _Lost(NamedTuple):
    """A table that was lost: its host offset, the L1 slot and the state that name it, and leaked clusters after it."""

    offset: int
    slot: int
    tree: int
    leaked: int


def _blank(batch: Tables) -> Mask:
    words = batch.entries if batch.bitmaps is None else batch.entries | batch.bitmaps
    blank: Mask = np.count_nonzero(words, axis=1) == 0
    return blank


def _foreign(facts: Facts, batch: Tables) -> Mask:
    """Return which tables hold something that is no table of L2 entries."""
    columns = batch.columns
    odd = columns.reserved | ((columns.hosts & np.uint64(facts.cluster_size - 1)) != 0)
    if facts.header.version < 3 or facts.header.extended_l2:
        odd |= columns.bit_zero
    wrong = np.count_nonzero(odd, axis=1)
    plain = np.count_nonzero(
        (columns.entries != 0) & ~columns.compressed, axis=1
    )  # one in two words of anything is a compressed entry by its form
    foreign: Mask = (wrong >= _FEW) & (2 * wrong >= plain)
    # Refcounts of one have no bit that an entry may not have; they lead far past the end of the file.
    beyond = np.count_nonzero(columns.hosts >= np.uint64(facts.image.file_size), axis=1)
    likely = np.flatnonzero(~foreign & (beyond >= _FEW) & (2 * beyond >= plain))
    if len(likely):
        data = np.frombuffer(
            b"".join(
                facts.read(offset, facts.cluster_size).ljust(facts.cluster_size, b"\0")
                for offset in batch.offsets[likely].tolist()
            ),
            np.uint8,
        )
        foreign[likely] = refcount_rows(data.reshape(len(likely), -1), facts.header.refcount_order)
    return foreign


def _evidence(facts: Facts, lost: _Lost) -> Evidence:
    span, length = facts.header.l2_span, facts.cluster_size
    parts = [f"holds {_looks(facts, lost.offset)}"]
    if any(run.is_hole for run in host_runs(facts.image.source, lost.offset, length)):
        parts.append("the host file has a hole there")
    parts.append(f"{lost.leaked} leaked clusters between it and the next table")
    parts.append(f"maps {size(span)} of the guest disk")
    words, owner = f"L2 table of L1 entry {lost.slot}", snapshot_id(facts, lost.tree)
    return Evidence(words, "; ".join(parts), lost.offset, length, "L2", lost.slot * span, owner)


def _looks(facts: Facts, offset: int) -> str:
    """Return in words what a cluster holds that should be an L2 table."""
    data = facts.read(offset, facts.cluster_size)
    if not any(data):
        return "zeros"
    padded = data.ljust(facts.cluster_size, b"\0")
    if refcount_rows(np.frombuffer(padded, np.uint8).reshape(1, -1), facts.header.refcount_order)[0]:
        return "a refcount block"
    signature = content.signature(data)
    if signature or content.is_text(data):
        return signature or "text"
    return f"other data, {content.describe(data).entropy:.2f} bits of entropy per byte"


class _Leaked:
    """Leaked clusters by their place in the file, between the tables of the image."""

    def __init__(self, facts: Facts) -> None:
        runs = [] if facts.header.external_data else list(facts.census.leaked())
        self._size = facts.cluster_size
        self._starts = np.array([run.offset for run in runs], np.int64)
        lengths = np.array([run.length for run in runs], np.int64)
        self._totals: I64 = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
        self._tables = facts.census.named.offsets.astype(np.int64)
        self._end = facts.image.file_size

    def behind(self, table: int) -> int:
        """Return how many clusters are leaked between a table and the next one in the file."""
        at = int(np.searchsorted(self._tables, table, "right"))
        stop = int(self._tables[at]) if at < len(self._tables) else self._end
        return (self._until(stop) - self._until(table)) // self._size

    def are(self, hosts: U64) -> Mask:
        """Return which host offsets are those of leaked clusters."""
        if not len(self._starts):
            return np.zeros(len(hosts), np.bool_)
        places = hosts.astype(np.int64)
        at = np.maximum(np.searchsorted(self._starts, places, "right") - 1, 0)
        inside: Mask = (places >= self._starts[at]) & (places - self._starts[at] < np.diff(self._totals)[at])
        return inside

    def _until(self, offset: int) -> int:
        """Return how many leaked bytes lie before an offset."""
        at = int(np.searchsorted(self._starts, offset, "right"))
        if not at:
            return 0
        whole, inside = int(self._totals[at]), offset - int(self._starts[at - 1])
        length = int(self._totals[at] - self._totals[at - 1])
        return whole - length + min(inside, length)


@rule(
    "QCOW2-L1-TABLE-LOST",
    Severity.HIGH,
    "the L1 table is empty, and L2 tables are still counted",
    note="the whole disk reads as zeros, although its tables and data are there: consistent with an L1 table that was "
    "punched or overwritten",
    when="the active L1 table holds zeros only, and a leaked cluster holds sound L2 entries",
)
def l1_table_lost(facts: Facts) -> Iterator[OneFinding]:
    header, census = facts.header, facts.census
    length = header.l1_size * 8
    if not length or not int((census.check or {}).get("leaks", 0)) or header.external_data:
        return
    if bool((census.named.active > 0).any()):
        return
    found: BoundedSample[int] = BoundedSample()
    for offset in _leaked_tables(facts):
        found.add(offset, offset)
    if found.count:
        hole = any(run.is_hole for run in host_runs(facts.image.source, header.l1_table_offset, length))
        where = "zeros; the host file has a hole there" if hole else "zeros"
        items = [Evidence("L1 table holds", where, header.l1_table_offset, length, "L1")]
        items += [
            Evidence("leaked L2 table", None, offset, facts.cluster_size, "leaked clusters") for offset in found.items
        ]
        yield OneFinding(items, count=found.count)


def _leaked_tables(facts: Facts) -> Iterator[int]:
    """Yield the host offsets of leaked clusters that hold sound L2 entries."""
    geometry, size = Geometry.of(facts.image), facts.cluster_size
    clusters = (place for run in facts.census.leaked() for place in range(run.offset, run.offset + run.length, size))
    for place in islice(clusters, LEAKED_TABLES_SEARCHED):
        data = facts.read(place, size)
        rows = l2_rows(big_endian(data.ljust(size, b"\0")).reshape(1, -1), geometry)
        if rows.tables[0] and rows.telling[0]:
            yield place
    count = int(facts.census.leaked_runs[:, 1].sum()) // size
    facts.leave_out("leaked clusters not looked at for L2 tables", count - LEAKED_TABLES_SEARCHED)
