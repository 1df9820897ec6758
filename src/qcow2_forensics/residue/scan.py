"""Walks the host clusters nothing refers to and says what they hold, as runs of one kind.

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
from ..census.columns import big_endian
from ..format.bitmap_directory import BitmapEntry
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..limits import MiB
from ..reader.host_holes import host_runs
from . import content
from .former_tables import LOOKS, Clusters, Recogniser, Seen
from .model import Piece
from .structure_detection import Counts

_BATCH = 1 * MiB  # of clusters looked at together
_KINDS = ("free", "leaked", "trailing")


class Found(NamedTuple):
    """One cluster of interest: the piece, and the entries it holds when it is a table of them."""

    piece: Piece
    snapshots: tuple[SnapshotEntry, ...] = ()
    bitmaps: tuple[BitmapEntry, ...] = ()


class _Stretch(NamedTuple):
    """Stored bytes of neighbouring clusters; only the file's last one may be cut."""

    offset: int
    length: int
    kind: int  # among _KINDS


def unclaimed(image: Image, census: Census) -> Iterator[Found]:
    """Yield what lies in clusters nothing refers to, in file order, zeros left out.

    Neighbouring clusters of guest-like data become one piece until a new file signature starts.
    """
    scanner = _Scanner(image, census)
    batch: list[_Stretch] = []
    room = most = max(1, _BATCH // image.cluster_size) * image.cluster_size
    for stretch in _stretches(image, census):
        offset, stop = stretch.offset, stretch.offset + stretch.length
        while offset < stop:
            length = min(room, stop - offset)
            batch.append(_Stretch(offset, length, stretch.kind))
            offset, room = offset + length, room - length
            if room < image.cluster_size:
                yield from scanner.look(batch)
                batch, room = [], most
    yield from scanner.look(batch)
    yield from scanner.end()


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
    """Looks at batches of clusters, in file order, and gathers pieces."""

    def __init__(self, image: Image, census: Census) -> None:
        self._image = image
        self._size = image.cluster_size
        self._recogniser = Recogniser(image, census)
        self._open: tuple[Piece, Counts] | None = None  # data the next cluster may go on with, how often each byte came

    def look(self, stretches: list[_Stretch]) -> Iterator[Found]:
        """Yield the pieces that end in a batch."""
        clusters, kinds = self._read(stretches)
        if not len(kinds):
            return
        seen = self._recogniser.look(clusters)
        signatures = {row: name for row, name in content.signatures(clusters.data).items() if not seen.looks[row]}
        starts = self._starts(clusters, kinds, seen, list(signatures))
        missing = np.maximum(0, clusters.offsets + self._size - self._image.file_size)
        lengths = np.add.reduceat(self._size - missing, starts)
        is_start = np.zeros(len(kinds), np.intp)
        is_start[starts] = 1
        counts = content.histograms(clusters.data, np.cumsum(is_start) - 1)
        counts[-1, 0] -= missing[-1]
        columns = (
            starts,
            clusters.offsets[starts],
            lengths,
            kinds[starts],
            seen.looks[starts],
            counts[:, 1:].sum(axis=1),
            content.entropies(counts),
            seen.entries[starts],
            seen.intact[starts],
            seen.zero_only[starts],
        )
        heads = clusters.data[starts, :16].tobytes()
        for number, (row, offset, length, kind, looks, nonzero, entropy, entries, intact, zero_only) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            signature = signatures.get(row, "")
            piece = Piece(
                offset,
                length,
                _KINDS[kind],
                "vm-state" if signature == "QEMU VM state" else LOOKS[looks],
                nonzero,
                entropy,
                signature,
                content.preview(heads[number * 16 : number * 16 + min(16, length)]),
                entries=entries,
                intact=intact,
                zero_only=zero_only,
            )
            if looks:
                yield from self.end()
                yield Found(piece, tuple(seen.snapshots.get(row, ())), tuple(seen.bitmaps.get(row, ())))
            else:
                yield from self._data(piece, counts[number])

    def end(self) -> Iterator[Found]:
        """Yield the piece that is still open."""
        if self._open is not None:
            yield Found(self._open[0])
            self._open = None

    def _data(self, piece: Piece, counts: Counts) -> Iterator[Found]:
        if self._open is not None:
            before, so_far = self._open
            if (piece.offset, piece.kind, piece.signature) == (before.offset + before.length, before.kind, ""):
                counts = so_far + counts
                length, nonzero = before.length + piece.length, before.nonzero + piece.nonzero
                piece = replace(before, length=length, nonzero=nonzero, entropy=content.entropy_of(counts))
            else:
                yield from self.end()
        self._open = piece, counts

    def _read(self, stretches: list[_Stretch]) -> tuple[Clusters, Counts]:
        """Return the clusters that are not all zeros, and the kind of each."""
        size, image = self._size, self._image
        table = np.asarray(stretches, dtype=np.intp).reshape(-1, 3)
        numbers = -(-table[:, 1] // size)
        data = b"".join(
            image.read(offset, length).ljust(-(-length // size) * size, b"\0") for offset, length, _ in stretches
        )
        words = big_endian(data).reshape(-1, size // 8)
        firsts = np.repeat(table[:, 0] - (np.cumsum(numbers) - numbers) * size, numbers)
        rows = np.flatnonzero(words.any(axis=1))
        offsets = (firsts + np.arange(len(words)) * size)[rows]
        clusters = Clusters(offsets, np.frombuffer(data, np.uint8).reshape(-1, size)[rows], words[rows])
        return clusters, np.repeat(table[:, 2], numbers)[rows]

    def _starts(self, clusters: Clusters, kinds: Counts, seen: Seen, signed: list[int]) -> Counts:
        """Return the rows where a piece starts, the first among them."""
        table = seen.looks != 0
        start = table.copy()
        start[1:] |= table[:-1] | (np.diff(clusters.offsets) != self._size) | (np.diff(kinds) != 0)
        start[signed] = True
        start[0] = True
        return np.flatnonzero(start)
