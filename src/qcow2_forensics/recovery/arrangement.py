"""L2 tables without an L1 table in the order of the guest's disk: content, file systems and order together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from ..census.arrays import U64
from ..format.lvm import Section
from ..limits import L1_ENTRIES, PLACEMENT_TRIALS
from ..residue.structure_detection import Geometry
from .allocation import Expected, PlacedDisk, VolumeMap, cluster_use
from .ext_volume import ext_expected, ext_map
from .ntfs_volume import ntfs_expected, ntfs_map
from .partition_map import partition_map
from .placement import Placement, Unplaced, Use, in_file_order, place
from .slot_evidence import EXACT, GUESSED, Votes
from .table_contents import TableReader, read_contents
from .volumes import PlacedVolume, VolumeBytes, Volumes, disk_size_of, first_volumes, volumes_of
from .xfs_volume import xfs_map

_ROUNDS = (
    8  # what was found in one may lead to more in the next: a volume inside another, a block that a file system has
)


class Arranged(NamedTuple):
    """L2 tables with a slot by evidence, the host offsets of the others, and all of them with those others in file order."""

    placements: tuple[Placement, ...]
    left: tuple[int, ...]
    in_file_order: tuple[Placement, ...]

    def ways(self, what: str) -> Iterator[tuple[str, tuple[Placement, ...], tuple[int, ...]]]:
        """Yield what a state is, its L2 tables and those without a place: the tables by evidence, then all in file order."""
        if self.placements:
            yield what, self.placements, self.left
        if len(self.in_file_order) > len(self.placements):
            yield f"{what}, tables without a known place in the order of the file", self.in_file_order, ()


def arranged(
    reader: TableReader,
    offsets: list[int],
    geometry: Geometry,
    known: Mapping[int, list[U64]],
    size: int | None,
    fixed: tuple[Placement, ...] = (),
) -> Arranged:
    """Return a slot for each L2 table for which there is evidence; ``size`` of the disk in bytes, None if not known.

    ``fixed`` are tables of known slot, which are returned too.
    """
    span = geometry.l2_span
    slots = -(-size // span) if size else L1_ENTRIES
    contents = read_contents(reader, offsets, size, [placed.offset for placed in fixed if not placed.slot])
    volumes = Volumes(contents.volumes, are_all=True)
    tables = contents.unplaced(span, slots, volumes)
    if not size:
        slots = _slots_by_content(reader, tables, span) or len(offsets)
    settled: Set[int] = frozenset()  # tables that have a place by their content
    sections: dict[bytes, Section] = {}
    more: dict[int, Votes] = {}  # by host offset: what file systems must have somewhere, found in a table
    for _ in range(_ROUNDS):
        found = place(tables, known, slots, geometry.cluster_size, fixed=fixed, ordered=False)
        disk = PlacedDisk(reader, {p.slot: p.offset for p in found.placements}, span)
        before = volumes, dict(more)
        volumes = volumes_of(disk, contents.volumes, sections)
        settled = {p.offset for p in found.placements}
        for offset, votes in _expected_votes(reader, tables, settled, disk, volumes.found, span).items():
            more[offset] = _joined(more.get(offset, {}), votes)
        if (volumes, more) == before:
            break
        is_sure = contents.are_starts_known and volumes.are_all
        tables = [_with_more(table, more, is_sure) for table in contents.unplaced(span, slots, volumes)]

    def use_of(placed: Mapping[int, int]) -> Use | None:
        return _use(reader, geometry, placed, contents.volumes, sections)

    placed = place(tables, known, slots, geometry.cluster_size, use_of, fixed=fixed)
    if placed.is_in_order:  # what the order gave a place may lead to more; none of it is sure
        disk = PlacedDisk(reader, {p.slot: p.offset for p in placed.placements}, span)
        guessed = _expected_votes(
            reader, tables, settled, disk, volumes_of(disk, contents.volumes, sections).found, span
        )
        if guessed:
            weak = {at: _weakened(votes) for at, votes in guessed.items()}
            tables = [_with_more(table, weak, False) for table in tables]
            placed = place(tables, known, slots, geometry.cluster_size, use_of, fixed=fixed)
    return Arranged(tuple(placed.placements), tuple(t.offset for t in placed.left), tuple(in_file_order(placed, slots)))


def _weakened(votes: Votes) -> Votes:
    return {slot: dict.fromkeys(kinds, GUESSED) for slot, kinds in votes.items()}


def _with_more(table: Unplaced, more: Mapping[int, Votes], is_sure: bool) -> Unplaced:
    """Return a table with what file systems that were read must have in it; ``is_sure`` where nothing they were read by is a guess."""
    expected = more.get(table.offset, {})
    sure = table.sure | expected.keys() if is_sure else table.sure - expected.keys()
    return table._replace(votes=_joined(table.votes, expected), sure=sure)


def use_by_file_systems(reader: TableReader, geometry: Geometry, placed: Mapping[int, int]) -> Use | None:
    """Return which clusters the file systems use, by the tables that are placed; None where none is found."""
    return _use(reader, geometry, placed, first_volumes([reader.head(placed[0])] if 0 in placed else []), {})


def _use(
    reader: TableReader,
    geometry: Geometry,
    placed: Mapping[int, int],
    first: Sequence[VolumeBytes],
    sections: dict[bytes, Section],
) -> Use | None:
    span = geometry.l2_span
    disk = PlacedDisk(reader, dict(placed), span)
    maps = _maps(disk, volumes_of(disk, first, sections).found)
    return (lambda free: cluster_use(maps, free, span, geometry.cluster_size)) if maps else None


def _expected_votes(
    reader: TableReader,
    tables: list[Unplaced],
    settled: Set[int],
    disk: PlacedDisk,
    volumes: Sequence[VolumeBytes],
    span: int,
) -> dict[int, dict[int, dict[str, float]]]:
    """Return what file systems must have at some places, found in tables that are not ``settled``: the bits by host offset.

    A clone of a file system has the same at the same distance from its own start. Unless what it must have there is known
    too, a table that has it may be of either.
    """
    waiting = PlacedDisk(reader, {at: table.offset for at, table in enumerate(tables)}, span)
    candidates = [at for at, table in enumerate(tables) if table.offset not in settled]
    expected = [list(_expected(PlacedVolume(disk, volume))) for volume in volumes]
    asked = [{(item.offset, item.what) for item in items} for items in expected]
    found: dict[int, dict[int, dict[str, float]]] = {}
    tried = 0
    for number, items in enumerate(expected):
        for item in items:
            at_ = volumes[number].place(item.offset, item.length)
            slot, inside = divmod(at_ or 0, span)
            if at_ is None or slot in disk.slots or inside + item.length > span:
                continue
            tried += len(candidates) * (1 + item.length // 512)
            if tried > PLACEMENT_TRIALS:
                return found
            clones = [
                volume.place(item.offset, item.length)
                for volume, others in zip(volumes, asked, strict=True)
                if (item.offset, item.what) not in others
            ]
            slots = {slot, *(clone // span for clone in clones if clone is not None and clone % span == inside)}
            for at in candidates:
                data = waiting.read(at * span + inside, item.length)
                if data is not None and item.matches(data):
                    votes = found.setdefault(tables[at].offset, {})
                    for possible in slots - disk.slots.keys():
                        votes.setdefault(possible, {})[item.what] = EXACT
    return found


def _joined(votes: Votes, more: Votes) -> Votes:
    return {slot: {**votes.get(slot, {}), **more.get(slot, {})} for slot in (*votes, *more)}


def _expected(volume: PlacedVolume) -> Iterator[Expected]:
    yield from ext_expected(volume, 0)
    yield from ntfs_expected(volume, 0)


def _slots_by_content(reader: TableReader, tables: list[Unplaced], span: int) -> int | None:
    """Return how many slots the disk has by its partition table or file system, None where nothing says so."""
    for table in tables:
        if table.votes and 0 not in table.votes:
            continue
        disk = PlacedDisk(reader, {0: table.offset}, span)
        implied = disk_size_of(lambda at, length, disk=disk: disk.read(at, length) or b"")  # type: ignore[misc]
        if implied is not None and 0 < implied[0] <= L1_ENTRIES * span:
            return max(-(-implied[0] // span), len(tables))
    return None


def _maps(disk: PlacedDisk, volumes: Sequence[VolumeBytes]) -> list[VolumeMap]:
    """Return what is known of the file systems in volumes, in one map for each piece of the disk."""
    found: list[VolumeMap] = []
    for volume in volumes:
        placed = PlacedVolume(disk, volume)
        whole = ext_map(placed, 0) or ntfs_map(placed, 0) or xfs_map(placed, 0)
        found += _pieces(whole, volume) if whole is not None else ()
    partitioned = partition_map(disk)
    return [*found, *([partitioned] if partitioned is not None else ())]


def _pieces(whole: VolumeMap, volume: VolumeBytes) -> Iterator[VolumeMap]:
    """Yield the parts of a map that are in one piece on the disk."""
    for start, length, below in volume.segments:
        first = -(-start // whole.block)
        bits = whole.bits[first : (start + length) // whole.block]
        if len(bits):
            yield VolumeMap(below + first * whole.block - start, whole.block, bits)
