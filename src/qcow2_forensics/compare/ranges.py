"""Which guest ranges differ between two states: from the mappings first, from the bytes last.

Two states of one image share most of their clusters, and two L1 tables that name the same L2 table
share everything under it. Such ranges are equal without being read::

    before   L1: [ T1 | T2 | T3 | -- ]       T1, T2 equal: skipped at once
    after    L1: [ T1 | T2 | T9 | -- ]       T3 / T9: entries compared
                             |
             L2: [ A | B | C ] / [ A | X | C ]   A, C equal: skipped; B / X read and compared

so that the cost is metadata plus the clusters that the two states do not share.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import NamedTuple

from ..errors import Qcow2Error, reason
from ..format.header import SECTOR, Crypt
from ..limits import MiB
from ..reader.disk import Disk, Layer, RawDisk, images_of, layers_of
from ..reader.mapping import Kind
from ..reader.runs import joined
from ..reader.salvage import unmappable_until
from .differing_tables import DifferingTables

_CHUNK = 1 * MiB  # read of each side at a time
_WINDOW_CLUSTERS = 4096  # after which L1 tables are compared again, and progress is reported
_WINDOW_BYTES = 64 * MiB  # at least, so that tiny clusters do not mean tiny windows
_BLOCK = 4096  # compared before its sectors are
_NEVER = 2**64  # past the end of any disk


class Change(enum.StrEnum):
    """What became of a range between the first state and the second."""

    CHANGED = "changed"  # both states store bytes, and they differ
    WRITTEN = "written"  # the first state holds nothing there, which reads as zeros
    ZEROED = "zeroed"  # the second state holds nothing there, which reads as zeros
    ADDED = "added"  # past the end of the first state's disk
    REMOVED = "removed"  # past the end of the second state's disk
    MARKED = "marked"  # a bitmap marks it as written to; the bytes from before are not known
    UNREADABLE = "unreadable"  # one of them cannot be read: whether they differ is unknown


class Difference(NamedTuple):
    """``length`` guest bytes at ``offset``, whole sectors; ``note`` says why a range is unreadable."""

    offset: int
    length: int
    change: Change
    note: str = ""

    @property
    def end(self) -> int:
        return self.offset + self.length


class _Piece(NamedTuple):
    """``length`` guest bytes and where they are stored; equal ``content`` means equal bytes.

    None is zeros, stored nowhere. ``stored`` is set where there are bytes to read.
    """

    offset: int
    length: int
    content: tuple[object, ...] | None
    stored: bool


# Layers not to look into, by id(): two states that reach one of them at the same offset are equal there.
_Opaque = dict[int, tuple[object, ...]]


def compare(before: Layer, after: Layer, *, progress: Callable[[int], None] | None = None) -> Iterator[Difference]:
    """Yield the ranges where ``after`` differs from ``before``, in order, whole sectors, coalesced.

    Takes two states of one image, an overlay and its backing disk, or any two disks. Where one disk
    is longer the rest of it is one difference. What cannot be read is yielded as such, with the
    reason; it never passes as equal, except where both share the table or the bytes that cannot be
    read: those are not looked at. ``progress`` is called with the number of further bytes that are settled.
    """
    yield from _compare(before, after, _unequal_bytes, progress)


def possible_differences(before: Layer, after: Layer) -> Iterator[Difference]:
    """Yield the ranges whose bytes may differ, in order, coalesced: what the mappings alone do not prove equal.

    No content is read, so this costs metadata only; the ranges include those of :func:`compare`.
    """
    yield from _compare(before, after, _unread, None)


# Says which parts of a range that the mappings do not prove equal are differences.
_Settle = Callable[[Layer, Layer, Difference], Iterable[Difference]]


def _compare(
    before: Layer, after: Layer, settle: _Settle, progress: Callable[[int], None] | None
) -> Iterator[Difference]:
    common = min(before.size, after.size)
    mapped = min([common, *(layer.mapped_end for layer in (before, after) if isinstance(layer, Disk))])
    found = _differences(before, after, mapped, settle, progress)
    yield from joined(chain(found, _past_tables(before, after, mapped, common, progress)), _join)
    if before.size > common:
        yield Difference(common, before.size - common, Change.REMOVED)
    elif after.size > common:
        yield Difference(common, after.size - common, Change.ADDED)


def _differences(
    before: Layer, after: Layer, end: int, settle: _Settle, progress: Callable[[int], None] | None
) -> Iterator[Difference]:
    shared_until, left_open = _proofs(before, after)
    opaque = _common_layers(before, after)
    cluster = max(_cluster_size(before), _cluster_size(after))
    window = smallest = max(_WINDOW_CLUSTERS * cluster, _WINDOW_BYTES)
    position = 0
    while position < end:
        settled = position
        position = min(end, shared_until(position))
        stop = min(end, position + window)
        window *= 2  # a few clusters of tables can describe petabytes
        for low, high in left_open(position, stop):
            for candidate in _candidates(before, after, low, high, cluster, opaque):
                if candidate.change is Change.UNREADABLE:
                    yield candidate
                else:
                    window = smallest
                    yield from settle(before, after, candidate)
        position = stop
        if progress is not None:
            progress(position - settled)


def _past_tables(
    before: Layer, after: Layer, start: int, end: int, progress: Callable[[int], None] | None
) -> Iterator[Difference]:
    """Yield what lies past the end of the L1 table of a snapshot that says it has more."""
    if start < end:
        try:
            before.read(start, SECTOR), after.read(start, SECTOR)
        except Qcow2Error as error:
            yield Difference(start, end - start, Change.UNREADABLE, reason(error))
        if progress is not None:
            progress(end - start)


# --- what the mappings prove -------------------------------------------------------------------


def _file(layer: Layer) -> object:
    """Return what identifies the file that ``layer`` stores its own bytes in."""
    source = layer.host if isinstance(layer, Disk) else getattr(layer, "source", layer)
    return getattr(source, "identity", None) or id(source)


def _tables(disk: Disk) -> tuple[object, ...]:
    """Return what must be equal of two disks for one L2 table to mean the same in both, over equal backing disks."""
    source = disk.image.source
    return getattr(source, "identity", None) or id(source), _file(disk), disk.eof, disk.unbacked is not None


def _keys(layer: Layer | None) -> Iterator[tuple[object, ...]]:
    """Yield a key for each layer from the bottom of the chain up: equal keys are equal disks."""
    below: tuple[object, ...] = ()
    for member in reversed(list(layers_of(layer))):
        tables: tuple[object, ...] = ()
        if isinstance(member, Disk):
            tables = (*_tables(member), member.mapping.l1_table_offset, member.mapping.l1_size, member.mapped_end)
        below = (type(member), _file(member), member.size, tables, below)
        yield below


def _common_layers(before: Layer, after: Layer) -> _Opaque:
    """Return the layers of either chain that the other one holds too, and their keys."""
    keys = [list(_keys(layer)) for layer in (before, after)]
    both = set(keys[0]) & set(keys[1])
    members = [reversed(list(layers_of(layer))) for layer in (before, after)]
    return {
        id(member): key for side in (0, 1) for member, key in zip(members[side], keys[side], strict=True) if key in both
    }


def _cluster_size(layer: Layer) -> int:
    return max((member.image.cluster_size for member in images_of(layer)), default=SECTOR)


def _proofs(
    before: Layer, after: Layer
) -> tuple[Callable[[int], int], Callable[[int, int], Iterable[tuple[int, int]]]]:
    """Return two functions: how far from an offset L1 tables alone prove equality, and which parts of a range L2 tables do not."""
    one, two = list(_keys(before)), list(_keys(after))
    for over, backing, under in ((after, two[:-1], one), (before, one[:-1], two)):
        if isinstance(over, Disk) and backing == under:
            differing = DifferingTables(over.mapping, None, one_file=True, blank_from=_NEVER)
            return over.mapping.unmapped_until, differing.ranges
    if isinstance(before, Disk) and isinstance(after, Disk):
        first, second = before.mapping, after.mapping
        unbacked = before.unbacked is not None or after.unbacked is not None
        if _tables(before) == _tables(after) and one[:-1] == two[:-1]:
            blank_from = _NEVER if unbacked else before.backing.size if before.backing is not None else 0
            differing = DifferingTables(first, second, one_file=True, blank_from=blank_from)
            return partial(first.shared_until, second), differing.ranges
        alike = (first.table_span, first.cluster_size) == (second.table_span, second.cluster_size)
        if alike and len(one) == len(two) == 1 and not unbacked:
            return lambda offset: offset, DifferingTables(first, second, one_file=False, blank_from=0).ranges
    return lambda offset: offset, lambda start, end: [(start, end)]


def _pieces(layer: Layer, offset: int, length: int, opaque: _Opaque) -> Iterator[_Piece]:
    """Tile a range of ``layer`` with pieces, without looking into the layers of ``opaque``."""
    if id(layer) in opaque or not isinstance(layer, Disk):
        # A raw file's bytes may also be what a qcow2 with an external data file maps.
        where = opaque.get(id(layer)) or ("raw" if isinstance(layer, RawDisk) else "foreign", _file(layer), "")
        yield _Piece(offset, length, (*where, offset), True)
        return
    encrypted = layer.image.header.crypt_method != Crypt.NONE  # with keys of its own, also where it shares a data file
    file = ("encrypted", *_tables(layer)) if encrypted else ("raw", _file(layer))
    mapped = max(offset, min(offset + length, layer.mapped_end))
    for run in layer.mapping.runs(offset, mapped - offset):
        if run.kind == Kind.DATA:
            end = (run.host_offset or 0) + run.length
            past_end = layer.eof if end > layer.host.size else ""
            yield _Piece(run.offset, run.length, (*file, past_end, run.host_offset), True)
        elif run.kind == Kind.COMPRESSED:
            inside = run.offset & (layer.image.cluster_size - 1)
            packed = ("compressed", _file(layer), layer.eof, run.host_offset, run.size, inside)
            yield _Piece(run.offset, run.length, packed, True)
        elif run.kind == Kind.ZERO:
            yield _Piece(run.offset, run.length, None, False)
        elif layer.backing is None and layer.unbacked is not None:
            yield _Piece(run.offset, run.length, ("unbacked", *_tables(layer), run.offset), True)
        else:
            below = min(run.length, layer.backing.size - run.offset) if layer.backing is not None else 0
            if layer.backing is not None and below > 0:
                yield from _pieces(layer.backing, run.offset, below, opaque)
            rest = max(0, below)
            if rest < run.length:
                yield _Piece(run.offset + rest, run.length - rest, None, False)
    if mapped < offset + length:
        layer.read(mapped, SECTOR)  # raises: what lies past the L1 table of a snapshot is unknown


def _unproven(before: Layer, after: Layer, start: int, end: int, cluster: int, opaque: _Opaque) -> Iterator[Difference]:
    """Yield the parts of a range whose pieces are not the same in both, or may not be."""
    while start < end:
        try:
            lefts = _pieces(before, start, end - start, opaque)
            rights = _pieces(after, start, end - start, opaque)
            left, right = next(lefts), next(rights)
            while True:
                length = min(left.length, right.length)
                if left.content != right.content:
                    yield Difference(left.offset, length, _change(left, right))
                start = left.offset + length
                if start >= end:
                    return
                left = _rest(left, length) if left.length > length else next(lefts)
                right = _rest(right, length) if right.length > length else next(rights)
        except Qcow2Error as error:
            until = max(unmappable_until(layer, start, end) for layer in (before, after))
            until = min(end, max(until, (start // cluster + 1) * cluster))
            yield Difference(start, until - start, Change.UNREADABLE, reason(error))
            start = until


def _change(left: _Piece, right: _Piece) -> Change:
    if left.stored:
        return Change.CHANGED if right.stored else Change.ZEROED
    return Change.WRITTEN


def _rest(piece: _Piece, taken: int) -> _Piece:
    """Return a piece without its first bytes; places in a file move on with it."""
    content = piece.content
    if content is not None:
        *where, place = content
        content = (*where, place + taken) if isinstance(place, int) else content
    return _Piece(piece.offset + taken, piece.length - taken, content, piece.stored)


def _candidates(
    before: Layer, after: Layer, start: int, end: int, cluster: int, opaque: _Opaque
) -> Iterator[Difference]:
    """Yield the ranges that the mappings do not prove equal."""
    for outer in _unproven(before, after, start, end, cluster, opaque):
        if opaque and outer.change is not Change.UNREADABLE:
            # What differs from a shared layer may still be proved equal by looking into that layer.
            yield from _unproven(before, after, outer.offset, outer.end, cluster, {})
        else:
            yield outer


# --- what the bytes say ------------------------------------------------------------------------


def _unread(before: Layer, after: Layer, candidate: Difference) -> Iterator[Difference]:  # noqa: ARG001
    """Take a range as different without reading it."""
    yield candidate


def _unequal_bytes(before: Layer, after: Layer, candidate: Difference) -> Iterator[Difference]:
    for offset in range(candidate.offset, candidate.end, _CHUNK):
        yield from _unequal_chunk(before, after, offset, min(_CHUNK, candidate.end - offset), candidate.change)


def _unequal_chunk(before: Layer, after: Layer, offset: int, length: int, change: Change) -> Iterator[Difference]:
    try:
        left, right = before.read(offset, length), after.read(offset, length)
    except Qcow2Error as error:
        if length <= _BLOCK:
            yield Difference(offset, length, Change.UNREADABLE, reason(error))
            return
        middle = max(_BLOCK, length // 2 // _BLOCK * _BLOCK)
        yield from _unequal_chunk(before, after, offset, middle, change)
        yield from _unequal_chunk(before, after, offset + middle, length - middle, change)
        return
    for start, stop in unequal_sectors(left, right):
        yield Difference(offset + start, stop - start, change)


def unequal_sectors(left: bytes, right: bytes) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the runs of sectors in which two equally long pieces differ."""
    if left == right:
        return
    started: int | None = None
    for block in range(0, len(left), _BLOCK):
        size = min(_BLOCK, len(left) - block)
        if left[block : block + size] == right[block : block + size]:
            if started is not None:
                yield started, block
                started = None
            continue
        for at in range(block, block + size, SECTOR):
            if left[at : at + SECTOR] != right[at : at + SECTOR]:
                started = at if started is None else started
            elif started is not None:
                yield started, at
                started = None
    if started is not None:
        yield started, len(left)


def _join(first: Difference, second: Difference) -> Difference | None:
    if first.end != second.offset or first.change is not second.change:
        return None
    return first._replace(length=first.length + second.length)  # the first reason is given for all
