"""Walks the host clusters nothing refers to and says what they hold, as runs of one kind.

They are looked at twice: former tables say which place on a guest's disk the other clusters had.

Clusters are looked at many at a time: small ones are many, and a crafted file is full of what looks
like tables::

    batch    | guest data | guest data | L2 | zeros | guest data that begins as an ELF |
    pieces   [ data                   ] [l2]         [ data                      goes on in the next batch
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..census import Census
from ..format.image import Image
from ..limits import MiB
from ..reader.host_holes import host_runs
from . import content
from .former_guests import UNKNOWN, FormerGuests
from .former_tables import LOOKS, ClusterRows, FormerTables, Looks, Recogniser, Seen
from .model import Piece
from .structure_detection import Counts

_BATCH = 1 * MiB  # of clusters looked at together
_KINDS = ("free", "leaked", "trailing")


class _Stretch(NamedTuple):
    """Stored bytes of neighbouring clusters; only the file's last one may be cut."""

    offset: int
    length: int
    kind: int  # among _KINDS


def tables(image: Image, census: Census) -> Iterator[tuple[FormerTables, Seen]]:
    """Look at every cluster that nothing refers to, and yield those that look like tables, in file order.

    With them comes what was seen of all clusters that were looked at together: the entries in them.
    """
    recogniser = Recogniser(image, census)
    for clusters in _batches(image, census):
        seen = recogniser.look(clusters)
        found = seen.looks.looks != 0
        yield FormerTables(clusters.offsets[found], seen.looks.of(found)), seen


def unclaimed(image: Image, census: Census, former: FormerTables, guests: FormerGuests) -> Iterator[Piece]:
    """Yield what lies in clusters nothing refers to, in file order, zeros left out.

    Neighbouring clusters of guest-like data become one piece until a new file signature starts, or until the
    guest offsets that former tables give them do not follow each other.
    """
    scanner = _Scanner(image, former, guests)
    for clusters in _batches(image, census):
        yield from scanner.look(clusters)
    yield from scanner.end()


def _batches(image: Image, census: Census) -> Iterator[ClusterRows]:
    """Yield the clusters nothing refers to and that are not all zeros, many at a time."""
    batch: list[_Stretch] = []
    room = most = max(1, _BATCH // image.cluster_size) * image.cluster_size
    for stretch in _stretches(image, census):
        offset, stop = stretch.offset, stretch.offset + stretch.length
        while offset < stop:
            length = min(room, stop - offset)
            batch.append(_Stretch(offset, length, stretch.kind))
            offset, room = offset + length, room - length
            if room < image.cluster_size:
                yield from _read(image, batch)
                batch, room = [], most
    yield from _read(image, batch)


def _read(image: Image, stretches: list[_Stretch]) -> Iterator[ClusterRows]:
    """Yield the clusters of some stretches that are not all zeros, if there are any."""
    size = image.cluster_size
    table = np.asarray(stretches, dtype=np.intp).reshape(-1, 3)
    numbers = -(-table[:, 1] // size)
    data = b"".join(
        image.read(offset, length).ljust(-(-length // size) * size, b"\0") for offset, length, _ in stretches
    )
    rows = np.flatnonzero(np.frombuffer(data, np.uint64).reshape(-1, size // 8).any(axis=1))
    if len(rows):
        firsts = np.repeat(table[:, 0] - (np.cumsum(numbers) - numbers) * size, numbers)
        offsets = firsts[rows] + rows * size
        bytes_of = np.frombuffer(data, np.uint8).reshape(-1, size)
        whole = len(rows) == len(bytes_of)  # nothing to leave out, nothing to copy
        yield ClusterRows(offsets, bytes_of if whole else bytes_of[rows], np.repeat(table[:, 2], numbers)[rows])


def _stretches(image: Image, census: Census) -> Iterator[_Stretch]:
    size = image.cluster_size
    for offset, length, kind in _unclaimed(census):
        at = offset
        for run in host_runs(image.source, offset, min(length, image.file_size - offset)):
            at = max(run.offset // size * size, at)  # holes may be smaller than a cluster
            stop = min(-(-(run.offset + run.length) // size) * size, image.file_size)
            if at < stop and not run.is_hole:
                yield _Stretch(at, stop - at, kind)
                at = stop


def _unclaimed(census: Census) -> Iterator[_Stretch]:
    free = (_Stretch(offset, length, 0) for offset, length in census.free())
    leaked = (_Stretch(offset, length, 1) for offset, length in census.leaked())
    for offset, length, kind in heapq.merge(free, leaked):
        inside = max(0, min(length, census.end - offset))
        if inside:
            yield _Stretch(offset, inside, kind)
        if inside < length:
            yield _Stretch(offset + inside, length - inside, 2)


class _Scanner:
    """Makes pieces of batches of clusters, in file order."""

    def __init__(self, image: Image, former: FormerTables, guests: FormerGuests) -> None:
        self._image = image
        self._size = image.cluster_size
        self._former = former
        self._guests = guests
        self._open: tuple[Piece, Counts] | None = None  # data the next cluster may go on with, how often each byte came

    def look(self, clusters: ClusterRows) -> Iterator[Piece]:
        """Yield the pieces that end in a batch."""
        looks = self._former.at(clusters.offsets)
        guests = np.where(looks.looks != 0, UNKNOWN, self._guests.at(clusters.offsets))
        signatures = {row: name for row, name in content.signatures(clusters.data).items() if not looks.looks[row]}
        starts = self._starts(clusters, looks, guests, signatures)
        missing = np.maximum(0, clusters.offsets + self._size - self._image.file_size)
        lengths = np.add.reduceat(self._size - missing, starts)
        is_start = np.zeros(len(clusters.offsets), np.intp)
        is_start[starts] = 1
        counts = content.histograms(clusters.data, np.cumsum(is_start) - 1)
        counts[-1, 0] -= missing[-1]
        columns = (
            starts,
            clusters.offsets[starts],
            lengths,
            clusters.kinds[starts],
            counts[:, 1:].sum(axis=1),
            content.entropies(counts),
            guests[starts],
            *looks.of(starts),
        )
        heads = clusters.data[starts, :16].tobytes()
        for number, (row, offset, length, kind, nonzero, entropy, guest, look, entries, intact, zero_only) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            signature = signatures.get(row, "")
            piece = Piece(
                offset,
                length,
                _KINDS[kind],
                "vm-state" if signature == "QEMU VM state" else LOOKS[look],
                nonzero,
                entropy,
                signature,
                content.preview(heads[number * 16 : number * 16 + min(16, length)]),
                None if guest == UNKNOWN else guest,
                entries=entries,
                intact=intact,
                zero_only=zero_only,
            )
            if look:
                yield from self.end()
                yield piece
            else:
                yield from self._data(piece, counts[number])

    def end(self) -> Iterator[Piece]:
        """Yield the piece that is still open."""
        if self._open is not None:
            yield self._open[0]
            self._open = None

    def _data(self, piece: Piece, counts: Counts) -> Iterator[Piece]:
        if self._open is not None:
            before, so_far = self._open
            if self._continues(before, piece):
                counts = so_far + counts
                length, nonzero = before.length + piece.length, before.nonzero + piece.nonzero
                piece = replace(before, length=length, nonzero=nonzero, entropy=content.entropy_of(counts))
            else:
                yield from self.end()
        self._open = piece, counts

    def _continues(self, before: Piece, piece: Piece) -> bool:
        guest = None if before.guest_offset is None else before.guest_offset + before.length
        ends = before.offset + before.length, before.kind, guest
        return (piece.offset, piece.kind, piece.guest_offset) == ends and piece.signature in content.NO_START

    def _starts(self, clusters: ClusterRows, looks: Looks, guests: Counts, signatures: dict[int, str]) -> Counts:
        """Return the rows where a piece starts, the first among them."""
        table = looks.looks != 0
        shifts = np.where(guests == UNKNOWN, UNKNOWN, guests - clusters.offsets)
        start = table.copy()
        start[1:] |= table[:-1] | (np.diff(clusters.offsets) != self._size)
        start[1:] |= (np.diff(clusters.kinds) != 0) | (shifts[1:] != shifts[:-1])
        start[[row for row, name in signatures.items() if name not in content.NO_START]] = True
        start[0] = True
        return np.flatnonzero(start)
