"""Bytes of an external data file that the image does not show.

Every guest cluster has its place in the data file at its own guest offset, whether an entry shows it or not::

    L2 entries   [ data | zeros | nothing | data ]
    data file    | .... | xxxxx | ....... | .... |  xxxxx     x: bytes nobody is shown
                          zero-flagged               beyond-disk
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..account.data_file import NOTHING, ZEROS, Ranges, unshown
from ..format.image import Image
from ..format.source import Source
from ..reader.host_holes import host_runs
from ..reader.mapping import Mapping
from .host_ranges import HostRange, pieces
from .model import Piece

_KINDS = {ZEROS: "zero-flagged", NOTHING: "unmapped"}


def data_file_residue(image: Image, data: Source, *, strict: bool = True) -> Iterator[Piece]:
    """Yield bytes of an external data file that the image does not show.

    ``kind`` is ``zero-flagged`` where an entry says zeros, ``unmapped`` where the image has nothing, and
    ``beyond-disk`` past the end of the disk. An entry that cannot be read raises
    :class:`FormatError` where its turn comes; when not ``strict`` it shows nothing.
    """
    ranges = _hidden(image, data, strict)
    for piece in pieces(data.read, ranges, image.cluster_size):
        yield replace(piece, file="data")


def _hidden(image: Image, data: Source, strict: bool) -> Iterator[HostRange]:
    """Yield the ranges of the data file that the image does not show and that may hold bytes."""
    end = min(image.disk_size, data.size)
    mapping = Mapping(image, image.header.l1_table_offset, image.header.l1_size)
    for ranges in unshown(mapping, end, strict):
        yield from _stored(data, ranges, image.cluster_size)
    if data.size > image.disk_size:
        behind = np.asarray([[image.disk_size], [data.size], [NOTHING]])
        for found in _stored(data, Ranges(*behind), image.cluster_size):
            yield found._replace(kind="beyond-disk", guest_offset=None)


def _stored(data: Source, ranges: Ranges, size: int) -> Iterator[HostRange]:
    """Yield the ranges of the data file, without the clusters of them that the file system keeps as holes."""
    if not len(ranges.starts):
        return
    first, last = int(ranges.starts[0]), int(ranges.stops[-1])
    done = first
    for run in host_runs(data, first, last - first):
        # Holes may be smaller than a cluster.
        begin, end = max(done, run.offset // size * size), -(-(run.offset + run.length) // size) * size
        if run.is_hole or begin >= end:
            continue
        done = end
        low = int(np.searchsorted(ranges.stops, begin, side="right"))
        high = int(np.searchsorted(ranges.starts, end, side="left"))
        columns = (column[low:high].tolist() for column in ranges)
        for start, stop, kind in zip(*columns, strict=True):
            at, until = max(start, begin), min(stop, end)
            yield HostRange(at, until - at, _KINDS[kind], at)
