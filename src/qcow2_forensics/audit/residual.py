"""Rules about bytes no state of the disk shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..findings import EVIDENCE_LIMIT, BoundedSample, Evidence, Severity
from ..format.bitmap_directory import BitmapEntry
from ..format.snapshot_table import SnapshotEntry
from ..limits import DELETED_SNAPSHOTS_FOLLOWED, RESIDUE_RANGES_DRAWN
from ..residue import Piece
from ..text import plural, snapshot_date
from .facts import Facts
from .residue_evidence import evidence_of
from .rules import QEMU_MADE, Chapter, Depth, OneFinding, RuleFunction

if TYPE_CHECKING:
    from ..residue import DeletedSnapshot

rule = Chapter(__name__, "Residual data", depth=Depth.DEEP)

_METADATA = ("l1", "l2", "refcount-table", "refcounts", "snapshot-table", "bitmap-directory", "bitmap")


# --- one pass over everything unclaimed ----------------------------------------------------------


class Group:
    """Pieces of one kind: a selection spread over the file, and what all of them add up to.

    The telling ones are kept first: data with a signature, and tables that lead to data.
    """

    def __init__(self) -> None:
        self._telling: BoundedSample[Piece] = BoundedSample()
        self._others: BoundedSample[Piece] = BoundedSample()
        self.nonzero = 0

    @property
    def count(self) -> int:
        """How many pieces there were."""
        return self._telling.count + self._others.count

    @property
    def telling(self) -> int:
        """How many of them were telling."""
        return self._telling.count

    @property
    def kept(self) -> list[Piece]:
        """The pieces to be listed, in the order of the file."""
        chosen = [*self._telling.items, *self._others.items][:EVIDENCE_LIMIT]
        return sorted(chosen, key=lambda piece: piece.offset)

    def add(self, piece: Piece) -> None:
        """Take in a piece."""
        self._selection(piece).add(piece, piece.offset)
        self.nonzero += piece.nonzero

    def remove(self, piece: Piece) -> None:
        """Take a piece that was kept out again."""
        self._selection(piece).remove(piece)
        self.nonzero -= piece.nonzero

    def include(self, other: Group) -> None:
        """Take in another group."""
        for mine, theirs in ((self._telling, other._telling), (self._others, other._others)):
            for piece in theirs.items:
                mine.add(piece, piece.offset)
            mine.count += theirs.count - len(theirs.items)
        self.nonzero += other.nonzero

    def _selection(self, piece: Piece) -> BoundedSample[Piece]:
        return self._telling if is_telling(piece) else self._others


def is_telling(piece: Piece) -> bool:
    """Whether a piece is more than bytes that are not zero: recognised content, or a table that leads to data."""
    return bool(piece.signature) or (piece.intact > 0 and not piece.zero_only)


@dataclass
class _Survey:
    groups: defaultdict[tuple[str, str], Group] = field(default_factory=lambda: defaultdict(Group))
    snapshots: list[SnapshotEntry] = field(default_factory=list)
    bitmaps: list[BitmapEntry] = field(default_factory=list)
    deleted: list[DeletedSnapshot] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)  # (offset, length) of the first pieces

    def mark_bitmaps(self, clusters: set[int], size: int, taken_for: Iterable[str]) -> None:
        """Have the pieces kept that are wholly in clusters of bitmaps look like bitmaps, where they look like something else."""
        for (kind, look), group in list(self.groups.items()) if clusters else ():
            if look not in taken_for:
                continue
            for piece in group.kept:
                if clusters.issuperset(range(piece.offset, piece.offset + piece.length, size)):
                    group.remove(piece)
                    self.groups[kind, "bitmap"].add(replace(piece, looks="bitmap"))

    def of(self, kinds: Iterable[str], looks: Iterable[str]) -> Group:
        """Return the groups of some kinds and looks as one."""
        merged = Group()
        for kind in kinds:
            for look in looks:
                group = self.groups.get((kind, look))
                if group is not None:
                    merged.include(group)
        return merged


def survey_of(facts: Facts) -> _Survey:
    """Return what a deep look at everything unclaimed found; made once per audit."""
    return facts.once(_survey)


def _survey(facts: Facts) -> _Survey:
    from ..residue import Residue  # only a deep audit looks, and only there is the code loaded
    from ..residue.readability import examine

    residue = Residue(facts.image, census=facts.census)
    survey = _Survey()
    for piece in residue.unclaimed():
        survey.groups[piece.kind, piece.looks].add(piece)
        if len(survey.ranges) < RESIDUE_RANGES_DRAWN:
            survey.ranges.append((piece.offset, piece.length))
    survey.snapshots, survey.bitmaps = residue.entries()
    facts.leave_out("former snapshot entries that were found and not looked at", residue.entries_left_out)
    bitmaps = residue.former_bitmaps
    facts.leave_out("tables of former bitmaps that were not followed", bitmaps.left_out)
    survey.mark_bitmaps(bitmaps.tables | bitmaps.bits, facts.cluster_size, ("data", "l2"))
    # The table of one bitmap may name what became the table of another, as an L1 table names L2 tables.
    survey.mark_bitmaps(bitmaps.tables, facts.cluster_size, ("l1",))
    survey.deleted = examine(facts.image, survey.snapshots, facts.census, most=DELETED_SNAPSHOTS_FOLLOWED)
    not_followed = sum(not item.followed for item in survey.deleted)
    facts.leave_out("former snapshot entries whose tables were not followed", not_followed)
    return survey


def finding_of(group: Group, severity: Severity | None = None, title: str = "", note: str = "") -> Iterator[OneFinding]:
    if group.count:
        evidence = [evidence_of(piece) for piece in group.kept]
        yield OneFinding(evidence, severity=severity, title=title, note=note, count=group.count)


@rule(
    "QCOW2-RESIDUAL-CLUSTERS",
    Severity.MEDIUM,
    "free clusters hold data",
    note="consistent with remains of deleted snapshots, or of discarded or overwritten data",
    when="a cluster that nothing refers to, and whose refcount is 0 or cannot be read, is not all zeros; Low where it "
    "is a former table",
    harmless="QEMU leaves former L1, L2 and bitmap tables and overwritten compressed clusters behind in ordinary use",
    validated=QEMU_MADE,
)
def residual_clusters(facts: Facts) -> Iterator[OneFinding]:
    survey = survey_of(facts)
    titles, note = ("", "free clusters hold former tables"), ""
    if not facts.census.refcounts.known:
        titles = ("clusters nothing refers to hold data", "clusters nothing refers to hold tables")
        note = (
            "the header leads to no refcounts, so that these clusters may be free or not; the refcount "
            "tables themselves may be among them"
        )
    yield from finding_of(survey.of(["free"], ["data", "vm-state"]), None, titles[0], note)
    yield from finding_of(survey.of(["free"], _METADATA), Severity.LOW, titles[1], note)


@rule(
    "QCOW2-LEAKED-DATA",
    Severity.MEDIUM,
    "leaked clusters hold data",
    note="counted as used, and no state shows it: consistent with an interrupted operation, or with data hidden where "
    "later writes do not reach it",
    when="a cluster with a refcount above 0 that nothing refers to is not all zeros",
    harmless="crashes leave such clusters",
    explained_by=("QCOW2-DIRTY",),
)
def leaked_data(facts: Facts) -> Iterator[OneFinding]:
    yield from finding_of(survey_of(facts).of(["leaked"], ["data", "vm-state", *_METADATA]))


@rule(
    "QCOW2-TRAILING-DATA",
    Severity.MEDIUM,
    "data after the end of the image",
    note="consistent with appended data, with concatenated files, or with clusters abandoned at the end",
    when="bytes after the last referenced or counted cluster are not zeros",
    harmless="former tables at the end are Low; zeros there are common and not reported",
)
def trailing_data(facts: Facts) -> Iterator[OneFinding]:
    survey = survey_of(facts)
    yield from finding_of(survey.of(["trailing"], ["data", "vm-state"]))
    yield from finding_of(survey.of(["trailing"], _METADATA), Severity.LOW, "former tables after the image's end")


# --- former tables -------------------------------------------------------------------------------


def _tables(looks: str) -> RuleFunction:
    """Return a rule that lists former tables of one kind."""

    def function(facts: Facts) -> Iterator[OneFinding]:
        group = survey_of(facts).of(["free", "leaked", "trailing"], [looks])
        if group.count:
            severity = None if group.telling else Severity.LOW
            evidence = [evidence_of(piece)._replace(value=_contents(piece)) for piece in group.kept]
            yield OneFinding(evidence, severity=severity, confidence="likely", count=group.count)

    return function


def _contents(piece: Piece) -> str:
    return (
        f"{plural(piece.entries, 'entry', 'entries')}, {piece.intact} of their first targets unused since and not empty"
    )


rule(
    "QCOW2-RESIDUAL-L1",
    Severity.MEDIUM,
    "a former L1 table",
    note="consistent with a former active table, or with that of a deleted snapshot",
    when="a cluster that nothing refers to holds only valid L1 entries that lead to L2 tables; Low when all of these are "
    "still in use or empty",
    harmless="growing a disk moves its L1 table",
    validated=QEMU_MADE,
)(_tables("l1"))


rule(
    "QCOW2-RESIDUAL-L2",
    Severity.MEDIUM,
    "a former L2 table",
    note="consistent with a former mapping of the guest's disk",
    when="a cluster that nothing refers to holds only valid L2 entries; Low when nothing is left of what they name",
    harmless="tables of zero flags alone are common",
    validated=QEMU_MADE,
)(_tables("l2"))


@rule(
    "QCOW2-RESIDUAL-SNAPSHOT-ENTRY",
    Severity.MEDIUM,
    "an entry of a former snapshot table",
    note="consistent with a deleted snapshot; entries of live snapshots in older copies of the table are left out",
    when="free space or table slack parses as a snapshot table entry that no live snapshot equals",
    validated=QEMU_MADE,
)
def residual_snapshot_entry(facts: Facts) -> Iterator[OneFinding]:
    found = survey_of(facts).deleted
    if found:
        listed: BoundedSample[SnapshotEntry] = BoundedSample()
        for item in sorted(found, key=lambda item: not item.l1_intact):  # those that lead to tables first
            listed.add(item.entry, item.entry.l1_table_offset)
        yield OneFinding(map(_entry_evidence, listed.items), count=len(found))


def _entry_evidence(entry: SnapshotEntry) -> Evidence:
    words = f"ID {entry.id}, {snapshot_date(entry.date_sec, entry.date_nsec)}, L1 table at {entry.l1_table_offset:#x}, name {entry.name}"
    return Evidence("snapshot", words, entry.offset, entry.length, "former snapshot table", snapshot=entry.id)


@rule(
    "QCOW2-RECOVERABLE-SNAPSHOT",
    Severity.HIGH,
    "a deleted snapshot can be read",
    note="no snapshot table lists it, and its tables are intact: consistent with a deleted snapshot, or with a damaged "
    "snapshot table. It opens as deleted:OFFSET. A cluster that was freed and then mapped again at the same place looks "
    "unchanged",
    when="a former entry's L1 and L2 tables are intact and no cluster belongs to anything else; Medium when a part is",
    validated=QEMU_MADE,
)
def recoverable_snapshot(facts: Facts) -> Iterator[OneFinding]:
    for item in survey_of(facts).deleted:
        if not item.l1_intact or not item.intact + item.shared + item.compressed:
            continue
        entry = item.entry
        evidence = [
            Evidence("open_as", item.selector, entry.offset, entry.length, "former snapshot table", snapshot=entry.id),
            Evidence("name", entry.name, entry.offset, entry.length, "former snapshot table", snapshot=entry.id),
            Evidence("readable_fraction", round(item.readable, 4), snapshot=entry.id),
            Evidence("rewritable_fraction", round(item.rewritable, 4), snapshot=entry.id),
            Evidence("l2_tables", item.l2_tables, entry.l1_table_offset, entry.l1_size * 8, "former L1 table"),
            Evidence("lost_l2_tables", item.lost_tables),
            Evidence("intact_clusters", item.intact),
            Evidence("shared_clusters", item.shared),
            Evidence("zeroed_clusters", item.zeroed),
            Evidence("reused_clusters", item.reused),
        ]
        yield OneFinding(
            evidence,
            severity=None if item.complete else Severity.MEDIUM,
            title="" if item.complete else "a deleted snapshot can be read in part",
            confidence="likely",
        )


@rule(
    "QCOW2-RESIDUAL-BITMAP-DIR",
    Severity.LOW,
    "an entry of a former bitmap directory",
    note="consistent with a removed backup or checkpoint bitmap",
    when="free space or table slack parses as a bitmap directory entry that is not a live one",
    harmless="normal after backups",
    validated=QEMU_MADE,
)
def residual_bitmap_dir(facts: Facts) -> Iterator[Evidence]:
    for entry in survey_of(facts).bitmaps:
        words = f"granularity {entry.granularity}, table at {entry.table_offset:#x}, name {entry.name}"
        yield Evidence("bitmap", words, entry.offset, entry.length, "former bitmap directory")
