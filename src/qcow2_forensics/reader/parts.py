"""What a range of a disk is made of through its whole chain, and how that becomes bytes.

Parts tile a guest range; each says which layer holds it and, where the bytes of a file are the guest's
as they are, in which source and where. They are found once for a span of the disk and kept, so that
reading a chain of any depth costs one look-up and one gather::

    guest    | part | part |  part  | part  |
    from     | top  | base |  top   | zeros |    what Parts keeps for a span
    buffer   |......|......|........|0000000|    each read to its place, by one system call
"""

from __future__ import annotations

import functools
import io
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, TypeAlias, cast

from ..errors import Qcow2Error
from ..format.source import Source
from .chain_layers import Layer, RawDisk
from .runs import Kind

_SPAN_CLUSTER_BITS = 4  # sixteen clusters are looked at together: what the first random read of a span pays for
_SPAN_BITS_MIN = 16
_PARTS_KEPT = 128  # of one span: a read in one of more parts (subclusters, as a rule) finds only what it needs
_PART_COST = 256  # bytes of memory, for the cache's budget
_ZEROS = memoryview(bytes(1 << 16))
_ALLOCATE_MIN = 1 << 16  # bytes below which zeros cost less than the call that does without them


class Gatherable(Protocol):
    """A source that can read into a buffer of the caller's, as :class:`FileSource` does."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int, /) -> bytes: ...

    def read_into(self, offset: int, buffer: memoryview, /) -> int: ...


class Part(NamedTuple):
    """``length`` guest bytes at ``offset`` of one kind, held by the layer ``depth`` below the top.

    ``host_offset`` and ``size`` are those of a :class:`Run`. ``source`` is set where the bytes at
    ``host_offset`` are the guest's as they are: neither encrypted nor in a layer that is read otherwise.
    """

    offset: int
    length: int
    kind: Kind
    host_offset: int | None
    size: int
    depth: int
    source: Gatherable | None


Prepare: TypeAlias = Callable[[list[Part], int], int]


class Parts:
    """The parts of one disk, kept for spans of sixteen clusters, first in, first out.

    A span is looked up as a whole. Where that meets a fault, or too many parts to keep, reads in it look
    up their own range only: a fault is reported to those who read there, and to nobody else.
    """

    def __init__(self, cluster_bits: int, budget: int) -> None:
        self.shift = max(cluster_bits + _SPAN_CLUSTER_BITS, _SPAN_BITS_MIN)
        self.spans: dict[int, list[Part]] = {}  # empty where a span has a fault, or too many parts to keep
        self._order: deque[int] = deque()
        self._held = 0
        self._most = max(16 * _PARTS_KEPT, budget // _PART_COST)

    def _keep(self, number: int, span: list[Part]) -> None:
        """Keep a span and let the oldest go. Without a lock: threads that race may drop more than they have to."""
        self.spans[number] = span
        self._order.append(number)
        self._held += 1 + len(span)
        while self._held > self._most or len(self._order) > self._most:
            try:
                oldest = self._order.popleft()
            except IndexError:  # another thread was here, and the count is off
                self.spans.clear()
                self._held = 0
                return
            self._held -= 1 + len(self.spans.pop(oldest, ()))

    def around(self, offset: int) -> Part | None:
        """Return the whole part that holds an offset, None where its span is not kept."""
        span = self.spans.get(offset >> self.shift)
        return span[bisect_right(span, (offset, 1 << 64)) - 1] if span else None

    def find(self, find: Callable[[int, int], list[Part]], offset: int, length: int) -> list[Part]:
        """Return the parts that tile a range; ``find`` looks them up where they are not known."""
        shift, end = self.shift, offset + length
        found: list[Part] = []
        for number in range(offset >> shift, ((end - 1) >> shift) + 1):
            span = self.spans.get(number)
            if span is None:
                try:
                    span = find(number << shift, 1 << shift)
                except (Qcow2Error, OSError):
                    span = []
                self._keep(number, span if len(span) <= _PARTS_KEPT else [])
            if not span:
                return find(offset, length)
            if found:
                joined = _joined(found[-1], span[0])
                if joined is not None:
                    found[-1] = joined
                    found.extend(span[1:])
                    continue
                found.extend(span)
            else:
                # The range may start anywhere in its first span.
                found = span[bisect_right(span, (offset, 1 << 64)) - 1 :]
        first, last = found[0], found[-1]
        if first.offset < offset:
            found[0] = _cut(first, offset, first.offset + first.length)
            last = found[-1]
        if last.offset + last.length > end:
            while found[-1].offset >= end:
                found.pop()
            last = found[-1]
            if last.offset + last.length > end:
                found[-1] = _cut(last, last.offset, end)
        return found


def gatherable(source: Source) -> Gatherable | None:
    """Return a source that reads into buffers, None for one that only gives bytes."""
    # Of its own class: a wrapper that refuses or replaces ranges passes other names on to the source behind it.
    if not hasattr(type(source), "read_into") or not hasattr(os, "preadv"):
        return None
    return cast("Gatherable", source)  # the rest of the protocol is any source's


def layer_parts(layer: Layer, depth: int, offset: int, length: int) -> Iterator[Part]:
    """Yield the parts of a layer at the bottom of a chain, as its own map has them."""
    source = gatherable(layer.source) if isinstance(layer, RawDisk) else None
    for extent in layer.extents(offset, length):
        kind = Kind.DATA if extent.kind == Kind.DATA else Kind.ZERO
        yield Part(extent.offset, extent.length, kind, extent.host_offset, 0, depth, source)


def _cut(part: Part, start: int, end: int) -> Part:
    host = part.host_offset
    if host is not None and part.kind != Kind.COMPRESSED:
        host += start - part.offset
    return Part(start, end - start, part.kind, host, part.size, part.depth, part.source)


def _joined(first: Part, second: Part) -> Part | None:
    """Return two neighbours as one part, where they are: both zeros, or bytes that follow each other in a source."""
    if first.kind != second.kind or first.depth != second.depth or first.source is not second.source:
        return None
    if first.kind == Kind.DATA and first.host_offset is not None and second.host_offset is not None:
        follows = first.host_offset + first.length == second.host_offset
    else:
        follows = first.kind == Kind.ZERO
    if not follows:
        return None
    return Part(first.offset, first.length + second.length, *first[2:])


def gathered(parts: list[Part], piece: Callable[[Part], bytes], prepare: Prepare) -> bytes:
    """Return the bytes of ``parts``, which tile a range, as one piece that is never copied.

    ``piece`` returns the bytes of a part that cannot be read straight into its place.
    """
    start, last = parts[0].offset, parts[-1]
    # A bytes object nobody else knows, which is filled before anybody does: BytesIO hands it out as it is.
    buffer = io.BytesIO(_allocate(last.offset + last.length - start))
    with buffer.getbuffer() as view:
        fill(view, parts, piece, prepare)
    return buffer.getvalue()


def fill(view: memoryview, parts: list[Part], piece: Callable[[Part], bytes], prepare: Prepare) -> None:
    """Write the bytes of ``parts`` to their places in ``view``, all of it.

    ``prepare`` starts to decode compressed parts from an index on, and returns the index it came to.
    """
    start, at, prepared, place = parts[0].offset, 0, 0, view[:0]
    try:
        for index, (offset, length, kind, host, _, _, source) in enumerate(parts):
            if offset - start != at:
                raise AssertionError(f"parts leave a gap or overlap at guest offset {offset:#x}")
            place, at = view[at : at + length], at + length
            if source is not None and host is not None:
                if source.read_into(host, place) == length:
                    continue
            elif kind == Kind.ZERO:
                for zeroed in range(0, length, len(_ZEROS)):
                    place[zeroed : zeroed + len(_ZEROS)] = _ZEROS[: length - zeroed]
                continue
            elif kind == Kind.COMPRESSED and index >= prepared:
                prepared = prepare(parts, index)
            place[:] = piece(parts[index])
    except BaseException:
        place.release()  # the traceback keeps it, and a buffer in use complains when it goes
        raise
    if at != len(view):
        raise AssertionError(f"parts end at guest offset {start + at:#x}, {len(view) - at} bytes early")


def _allocate(length: int) -> bytes:
    """Return a new bytes object of ``length`` whose content is undefined: :func:`fill` writes all of it.

    Filling it with zeros first would take a seventh of the time of a fragmented read. Where CPython's
    documented way to do without is not to be had, it is zeros.
    """
    if length < _ALLOCATE_MIN:
        return bytes(length)
    allocate = _allocator()
    return bytes(length) if allocate is None else allocate(None, length)


@functools.cache
def _allocator() -> Callable[[None, int], bytes] | None:
    """Return ``PyBytes_FromStringAndSize``, which leaves the content undefined when it is given no string."""
    try:
        import ctypes  # here: it takes as long to import as the reader, and most reads have one part

        allocate = ctypes.pythonapi.PyBytes_FromStringAndSize
    except (ImportError, AttributeError):  # no ctypes, or not CPython
        return None
    allocate.restype = ctypes.py_object
    allocate.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t)
    return allocate
