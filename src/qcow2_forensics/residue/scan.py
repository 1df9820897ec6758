"""Walks the host clusters nothing refers to and says what they hold, as runs of one kind."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .. import structures
from ..census import Census
from ..host_holes import host_runs
from ..image import Image
from ..limits import MiB
from ..structures import BitmapEntry, SnapshotEntry
from . import content, tables
from .pieces import Piece
from .tables import Geometry

_CHUNK = 8 * MiB
_TARGETS = 64  # of a former table, read to see whether they still hold bytes


class Found(NamedTuple):
    """One cluster of interest: the piece, and the entries it holds when it is a table of them."""

    piece: Piece
    snapshots: tuple[SnapshotEntry, ...] = ()
    bitmaps: tuple[BitmapEntry, ...] = ()


def unclaimed(image: Image, census: Census) -> Iterator[Found]:
    """Yield what lies in clusters nothing refers to, in file order, zeros left out.

    Neighbouring clusters of guest-like data become one piece until a new file signature starts.
    """
    for offset, length, kind in heapq.merge(
        ((offset, length, "free") for offset, length in census.free()),
        ((offset, length, "leaked") for offset, length in census.leaked()),
    ):
        inside = max(0, min(length, census.end - offset))
        if inside:
            yield from _Scanner(image, census, kind).scan(offset, inside)
        if inside < length:
            yield from _Scanner(image, census, "trailing").scan(offset + inside, length - inside)


class _Scanner:
    """Gathers one stretch of unclaimed clusters into pieces."""

    def __init__(self, image: Image, census: Census, kind: str) -> None:
        self._image = image
        self._census = census
        self._kind = kind
        self._geometry = Geometry.of(image)
        self._cluster_size = image.cluster_size
        self._start = 0
        self._length = 0
        self._counts = np.zeros(256, np.int64)
        self._signature = ""
        self._first = ""

    def scan(self, offset: int, length: int) -> Iterator[Found]:
        size = self._cluster_size
        length = min(length, self._image.file_size - offset)
        at = offset
        for run in host_runs(self._image.source, offset, length):
            if run.is_hole:
                continue
            at = max(run.offset // size * size, at)  # holes may be smaller than a cluster
            stop = run.offset + run.length
            while at < stop:
                step = min(max(_CHUNK, size), -(-(stop - at) // size) * size)
                data = self._image.read(at, step)
                for place in range(0, len(data), size):
                    yield from self._cluster(at + place, data[place : place + size])
                at += step
        yield from self._flush()

    def _cluster(self, offset: int, data: bytes) -> Iterator[Found]:
        counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        if counts[0] == len(data):
            yield from self._flush()
            return
        found = self._table(offset, data, counts)
        if found is not None:
            yield from self._flush()
            yield found
            return
        signature = content.signature(data)
        if self._length and (signature or offset != self._start + self._length):
            yield from self._flush()
        if not self._length:
            self._start, self._signature, self._first = offset, signature, content.preview(data)
        self._length += len(data)
        self._counts += counts

    def _flush(self) -> Iterator[Found]:
        if self._length:
            counts = self._counts
            yield Found(
                Piece(
                    self._start,
                    self._length,
                    self._kind,
                    "vm-state" if self._signature == "QEMU VM state" else "data",
                    int(counts[1:].sum()),
                    content.entropy_of(counts),
                    self._signature,
                    self._first,
                )
            )
            self._length = 0
            self._counts = np.zeros(256, np.int64)

    def _table(self, offset: int, data: bytes, counts: npt.NDArray[np.int64]) -> Found | None:
        geometry = self._geometry
        snapshots, bitmaps = tables.find_entries(data, offset, geometry)
        looks, facts = "", None
        if snapshots:
            looks = "snapshot-table"
        elif bitmaps:
            looks = "bitmap-directory"
        else:
            looks, facts = self._mapping(data)
            if facts is None and tables.looks_like_refcounts(data, self._image.header.refcount_order):
                looks = "refcounts"
        if not looks:
            return None
        nonzero = len(data) - int(counts[0])
        piece = Piece(
            offset,
            len(data),
            self._kind,
            looks,
            nonzero,
            content.entropy_of(counts),
            first=content.preview(data),
            entries=facts.entries if facts is not None else len(snapshots) + len(bitmaps),
            intact=self._free_targets(facts) if facts is not None else 0,
            zero_only=facts is not None and facts.zero_plain == facts.entries,
        )
        return Found(piece, tuple(snapshots), tuple(bitmaps))

    def _mapping(self, data: bytes) -> tuple[str, tables.TableFacts | None]:
        if len(data) < self._cluster_size:
            data = data.ljust(self._cluster_size, b"\0")
        l1 = tables.parse_l1(data, self._geometry)
        if l1 is not None and self._targets_are_refcounts(data, l1):
            return "refcount-table", l1
        if l1 is not None and self._targets_are_tables(l1):
            return "l1", l1
        l2 = tables.parse_l2(data, self._geometry)
        # One lone word may be anything: a small number, a flag.
        if l2 is not None and (l2.entries > 1 or (l2.targets.size and not l2.zero_plain)):
            return "l2", l2
        return "", None

    def _targets_are_tables(self, facts: tables.TableFacts) -> bool:
        for offset in facts.targets[:8].tolist():
            data = self._image.read(offset, self._cluster_size)
            if tables.parse_l2(data, self._geometry) is None:
                return False
        return True

    def _targets_are_refcounts(self, data: bytes, facts: tables.TableFacts) -> bool:
        order = self._image.header.refcount_order
        if tables.words_of(data)[facts.indices[0]] & np.uint64(structures.COPIED):
            return False  # refcount tables have no flags
        first = self._image.read(int(facts.targets[0]), self._cluster_size)
        return tables.looks_like_refcounts(first, order)

    def _free_targets(self, facts: tables.TableFacts) -> int:
        """Return how many targets nothing live uses and that still hold bytes; a sample's worth."""
        numbers = (facts.targets // np.uint64(self._cluster_size)).astype(np.intp)
        numbers = numbers[numbers < self._census.clusters]
        free = numbers[~self._census.is_claimed(numbers)][:_TARGETS]
        return sum(any(self._image.read(number * self._cluster_size, self._cluster_size)) for number in free.tolist())
