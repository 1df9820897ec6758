"""Everything nothing points at, gathered for one image: runs, streams, deleted snapshots."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..account.account import Account
from ..account.shown import ShownBytes
from ..account.streams import Decoded, decode_all
from ..census import Census, take_census
from ..census.arrays import U64, DistinctValues
from ..census.columns import big_endian, table_offsets
from ..errors import MissingFile, Qcow2Error, Unsupported
from ..format.bitmap_directory import BitmapEntry
from ..format.header import padded
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..format.source import Closing, PathOrSource, Source
from ..limits import (
    DEFAULT_LIMITS,
    DELETED_SNAPSHOTS_FOLLOWED,
    FORMER_BITMAP_TABLE_ENTRIES,
    FORMER_BITMAPS_FOLLOWED,
    FORMER_ENTRIES,
    Budget,
    Limits,
)
from ..reader.disk import Disk
from ..reader.opening import Passphrase, open_disk
from ..reader.resolver import Resolver
from ..reader.stand_in import misfit
from ..reader.stream import SourceStream
from ..reader.window import WindowSource
from . import hidden, readability, scan, slack, snapshot_entries, streams, structure_detection
from .accounted import accounted
from .data_file import data_file_residue
from .former_guests import former_guests
from .former_tables import FormerTables
from .model import Piece
from .snapshot_entries import DeletedSnapshot

_OFFSET = re.compile(r"0[xX][0-9a-fA-F]{1,16}")


class _Former(NamedTuple):
    """What is left of tables that nothing refers to."""

    tables: FormerTables
    snapshots: list[SnapshotEntry]
    bitmaps: list[BitmapEntry]


class FormerBitmaps(NamedTuple):
    """Host offsets of unclaimed clusters that removed bitmaps used; ``left_out`` counts tables that were not followed."""

    tables: set[int]
    bits: set[int]
    left_out: int


class Residue(Closing):
    """The residue of one image: a context manager over runs that can be read.

    ``census`` is taken when not given. Pieces are found while :meth:`pieces` is iterated; nothing
    of their content is kept.
    """

    def __init__(self, image: Image, *, census: Census | None = None, data: Source | None = None) -> None:
        self.image = image
        self.data = data  # the external data file, None where there is none or it is not opened
        self.entries_left_out = 0  # former snapshot and bitmap entries found and dropped: there were too many
        self.unseen: Qcow2Error | None = None  # why :meth:`pieces` left out what is inside of clusters in use
        self._given = census
        self._files = ExitStack()

    @cached_property
    def census(self) -> Census:
        """Who claims each host cluster; taken on first use when none was given."""
        return self._given or take_census(self.image, (*hidden.subscribers(self.image), ShownBytes))

    @cached_property
    def decoded(self) -> Decoded:
        """Which bytes the compressed streams take; each is decoded once."""
        return decode_all(self.image, self.census)

    @cached_property
    def account(self) -> Account:
        """What each byte of the image is, byte by byte."""
        if self.image.header.version == 1:
            return Account(self.image, None)
        return Account(self.image, self.census, self.decoded)

    # --- runs ----------------------------------------------------------------------------------

    def pieces(self) -> Iterator[Piece]:
        """Yield every piece of residue: slack first, then hidden bytes, then unclaimed clusters.

        Where compressed clusters are of a type that nothing decodes, the hidden bytes that depend on them are left
        out, and :attr:`unseen` says so.
        """
        yield from self.slack()
        try:
            yield from self.hidden()
        except Unsupported as error:
            self.unseen = error
        yield from self.unclaimed()

    def slack(self) -> Iterator[Piece]:
        """Yield what follows the header and tables in their clusters."""
        for function in (slack.header_slack, slack.header_padding, slack.l1_slack, slack.table_slack):
            yield from function(self.image)

    def hidden(self) -> Iterator[Piece]:
        """Yield bytes of clusters in use that no state shows."""
        if self.image.header.version == 1:
            yield from accounted(self.account)
            return
        yield from hidden.zero_flagged(self.image, self.census)
        yield from hidden.subclusters(self.image, self.census)
        yield from hidden.tail(self.image)
        if self.image.header.external_data and self.data is not None:
            yield from data_file_residue(self.image, self.data, strict=False)
        yield from streams.compressed_slack(self.image, self.decoded)  # what needs streams decoded comes last
        yield from accounted(self.account)

    def unclaimed(self) -> Iterator[Piece]:
        """Yield what lies in clusters nothing refers to."""
        if self.image.header.version == 1:
            return
        former = self._former
        guests = former_guests(self.image, self.census, former.tables, former.snapshots)
        yield from scan.unclaimed(self.image, self.census, former.tables, guests)

    @cached_property
    def _former(self) -> _Former:
        """What looks like a table or like an entry of one in all free space; every cluster is looked at once."""
        tables: list[FormerTables] = []
        snapshots: list[SnapshotEntry] = []
        bitmaps: list[BitmapEntry] = []
        for found, seen in scan.tables(self.image, self.census) if self.image.header.version > 1 else ():
            tables.append(found)
            snapshots += itertools.chain.from_iterable(seen.snapshots.values())
            more = list(itertools.chain.from_iterable(seen.bitmaps.values()))
            if len(snapshots) > 2 * FORMER_ENTRIES:
                snapshots = self._thinned(snapshots)
            self.entries_left_out += seen.left_out + max(0, len(bitmaps) + len(more) - FORMER_ENTRIES)
            bitmaps += more[: FORMER_ENTRIES - len(bitmaps)]
        return _Former(FormerTables.joined(tables), *self._with_slack(self._thinned(snapshots), bitmaps))

    def _thinned(self, snapshots: list[SnapshotEntry]) -> list[SnapshotEntry]:
        kept = snapshot_entries.most_plausible(self.image, snapshots, FORMER_ENTRIES)
        self.entries_left_out += len(snapshots) - len(kept)
        return kept

    # --- former entries ------------------------------------------------------------------------

    def entries(self) -> tuple[list[SnapshotEntry], list[BitmapEntry]]:
        """Return the former snapshot and bitmap entries in free space and after the live tables."""
        return self._former.snapshots, self._former.bitmaps

    def _with_slack(
        self, snapshots: list[SnapshotEntry], bitmaps: list[BitmapEntry]
    ) -> tuple[list[SnapshotEntry], list[BitmapEntry]]:
        """Add the entries after the live tables and leave out what is still live."""
        geometry = structure_detection.Geometry.of(self.image)
        for offset, data in self._table_tails():
            if data.strip(b"\0"):
                old = structure_detection.find_entries(data, offset, geometry)
                snapshots += old.snapshots
                bitmaps += old.bitmaps
                self.entries_left_out += old.left_out
        former = {(bitmap.name_bytes, bitmap.table_offset): bitmap for bitmap in bitmaps}
        for bitmap in self.image.bitmaps:
            former.pop((bitmap.name_bytes, bitmap.table_offset), None)
        return snapshot_entries.unknown_entries(self.image, snapshots), list(former.values())

    def _table_tails(self) -> Iterator[tuple[int, bytes]]:
        for offset, length in slack.table_tails(self.image):
            start = padded(offset)  # entries start on eight bytes of the file, wherever the last live one ends
            yield start, self.image.read(start, offset + length - start)

    def entry_at(self, offset: int) -> SnapshotEntry | None:
        """Return the former snapshot entry at a file offset; None when there is none.

        The same as the one among :meth:`entries`, without reading all free space for it.
        """
        start = offset // self.image.cluster_size * self.image.cluster_size
        if start < self.image.file_size and not self.census.owner(start):
            size = self.image.cluster_size
            behind = 0 if self.census.owner(start + size) else structure_detection.BEHIND
            places = [(start, self.image.read(start, size + behind))]
        else:
            places = [(at, data) for at, data in self._table_tails() if at <= offset < at + len(data)]
        geometry = structure_detection.Geometry.of(self.image)
        found = [
            structure_detection.snapshot_entry_at(data, offset - at, at, geometry)
            for at, data in places
            if offset % 8 == 0
        ]
        former = snapshot_entries.unknown_entries(self.image, [entry for entry in found if entry is not None])
        return former[0] if former else None

    def deleted_snapshots(self, *, read_data: bool = True) -> list[DeletedSnapshot]:
        """Return the deleted snapshots whose entries survive, and how much of each can be read."""
        if self.image.header.version == 1:
            return []  # the format has none
        snapshots, _ = self.entries()
        return readability.examine(
            self.image, snapshots, self.census, most=DELETED_SNAPSHOTS_FOLLOWED, read_data=read_data
        )

    @cached_property
    def former_bitmaps(self) -> FormerBitmaps:
        """The unclaimed clusters that the tables of removed bitmaps are in, and those that they name."""
        image = self.image
        budget = Budget("bytes of the tables of removed bitmaps", image.file_size, image.limits)
        tables, bits, left_out = DistinctValues(), DistinctValues(), 0
        places = sorted({(entry.table_offset, entry.table_size) for entry in self.entries()[1]})
        inside = [(offset, count) for offset, count in places if offset + count * 8 <= image.file_size]
        for number, (offset, count) in enumerate(inside):
            if number >= FORMER_BITMAPS_FOLLOWED or count > FORMER_BITMAP_TABLE_ENTRIES or count * 8 > budget.left:
                left_out += 1
                continue
            budget.spend(count * 8)
            tables.add(np.arange(offset, offset + count * 8, image.cluster_size, dtype=np.uint64))
            bits.add(table_offsets(big_endian(image.read(offset, count * 8)), image.header))
        return FormerBitmaps(self._unclaimed(tables.result()), self._unclaimed(bits.result()), left_out)

    def _unclaimed(self, offsets: U64) -> set[int]:
        """Return those of some host offsets where clusters begin that nothing refers to."""
        numbers = offsets // np.uint64(self.image.cluster_size)
        kept = (offsets % np.uint64(self.image.cluster_size) == 0) & (numbers < np.uint64(self.census.clusters))
        return set(offsets[kept][~self.census.is_claimed(numbers[kept])].tolist())

    # --- streams -------------------------------------------------------------------------------

    def read(self, piece: Piece, offset: int = 0, length: int | None = None) -> bytes:
        """Return bytes of a piece, counted from its start."""
        source = self._source(piece)
        length = piece.length - offset if length is None else min(length, piece.length - offset)
        start = piece.offset + offset
        return source.read(start, max(0, min(length, source.size - start)))

    def open(self, piece: Piece) -> io.RawIOBase:
        """Return a seekable file object over one piece."""
        return SourceStream(WindowSource(self._source(piece), piece.offset, piece.length))

    def _source(self, piece: Piece) -> Source:
        if piece.file != "data":
            return self.image.source
        if self.data is None:
            raise MissingFile("data", self.image.data_file_name or "")
        return self.data

    # --- life ----------------------------------------------------------------------------------

    def closing(self, close: Callable[[], object]) -> None:
        """Call ``close`` too when this object is closed."""
        self._files.callback(close)

    def close(self) -> None:
        """Close what was opened for this object."""
        self._files.close()


def residue(
    origin: PathOrSource | Image, *, resolver: Resolver | None = None, limits: Limits = DEFAULT_LIMITS
) -> Residue:
    """Open the residue of an image: what nothing points at, as pieces and as file objects.

    An external data file is looked at when ``resolver`` finds it. The disk need not be readable; raises
    where version or cluster size are unknown.
    """
    if isinstance(origin, Image):
        return Residue(origin)
    with ExitStack() as undo:
        image = Image(origin, limits=limits)
        undo.callback(image.close)
        if not image.has_geometry:
            image.require("disk")
        data = None
        if image.header.external_data and image.data_file_name:
            try:
                data, _ = (resolver or Resolver()).open(image.data_file_name, "data", image.source, image.source)
                if getattr(data, "stands_for", "") and misfit(data, "data", None, image):
                    getattr(data, "close", lambda: None)()
                    data = None
            except Qcow2Error:
                data = None  # the image's own residue can still be read
        found = Residue(image, data=data)
        found.closing(image.close)
        if data is not None:
            found.closing(getattr(data, "close", lambda: None))
        undo.pop_all()
        return found


def deleted_snapshots(origin: PathOrSource | Image, *, read_data: bool = True) -> list[DeletedSnapshot]:
    """Return the deleted snapshots of an image whose table entries survive."""
    with residue(origin) as found:
        return found.deleted_snapshots(read_data=read_data)


def open_deleted(origin: PathOrSource, wanted: str, passphrase: Passphrase = None) -> Disk:
    """Open a deleted snapshot by ID, name or entry offset; the same as ``open_disk("deleted:...")``."""
    return open_disk(origin, f"deleted:{wanted}", passphrase)


def select_deleted(image: Image, wanted: str) -> SnapshotEntry:
    """Return the entry of a deleted snapshot and make ``image`` refuse what it no longer owns.

    ``open_disk(snapshot="deleted:...")`` calls this; ``image`` must then be used for that disk only.
    """
    image.require("disk")
    found = Residue(image)
    entry = found.entry_at(int(wanted, 16)) if _OFFSET.fullmatch(wanted) else None
    # An entry chosen by its offset is not compared with the others: finding those reads all free space.
    former: list[SnapshotEntry] = []
    if entry is None:
        former, _ = found.entries()
        entry = snapshot_entries.choose_deleted([DeletedSnapshot(entry, False) for entry in former], wanted).entry
    readability.guard(image, entry, found.census, former)
    return entry
