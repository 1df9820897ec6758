"""A disk of which some cannot be read: the rest of it, zeros in between, and a list of what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from ..errors import FormatError, Locked, Qcow2Error, ReadError
from ..format.header import SECTOR
from .chain_layers import Extent
from .disk import Disk, Layer, RawDisk, images_of, layers_of
from .runs import Kind, joined

_L2_ENTRY = "l2_entry"  # the field of errors that concern one cluster; others concern all that a table maps


class Missing(NamedTuple):
    """Guest bytes that cannot be read, and the reason."""

    offset: int
    length: int
    why: str


def unmappable_until(layer: Layer | None, offset: int, end: int) -> int:
    """Return up to where ``layer`` cannot map anything from ``offset`` on; ``offset`` itself where it can.

    A medium that fails breaks no mapping: what is beside the failing sector may be readable.
    """
    while isinstance(layer, Disk) and offset < min(end, layer.size):
        if offset >= layer.mapped_end:
            return min(end, layer.size)
        try:
            run = next(layer.mapping.runs(offset, end - offset))
        except (Qcow2Error, OSError):
            return layer.mapping.broken_until(offset, end)
        if run.kind != Kind.HOLE:
            break
        layer, end = layer.backing, run.offset + run.length
    return offset


def read_with_zeros(disk: Layer, offset: int, length: int, report: Callable[[Missing], object]) -> bytes:
    """Return a range, fewer bytes only at the end of the disk; what cannot be read is zeros, and reported.

    A fault of the format costs the cluster, or the table, it is in; one of the medium the sector. A
    missing key is still an error: nothing would be left.
    """
    pieces = []
    for piece in _pieces(disk, offset, length):
        if isinstance(piece, Missing):
            report(piece)
        pieces.append(bytes(piece.length) if isinstance(piece, Missing) else piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _pieces(disk: Layer, offset: int, length: int) -> Iterator[bytes | Missing]:
    """Yield the bytes of a range in order, and what is missing, halving it down to units that are read as a whole."""
    end = min(offset + length, disk.size)
    while offset < end:
        try:
            yield disk.read(offset, end - offset)
            return
        except Locked:
            raise
        except (Qcow2Error, OSError) as error:
            stop = unmappable_until(disk, offset, end)
            if stop == offset:
                unit = SECTOR if _is_cut_anywhere(error) else _unit(disk)
                middle = (offset + (end - offset) // 2) // unit * unit
                if middle <= offset:
                    middle = offset // unit * unit + unit  # a range that begins inside a unit ends with it
                if middle < end:
                    yield from _pieces(disk, offset, middle - offset)
                    offset = middle
                    continue
                stop = end
            yield Missing(offset, stop - offset, str(error))
            offset = stop


class SalvagedDisk:
    """Reads a disk as far as that is possible: what cannot be read is zeros, and in :attr:`missing`.

    Threads may share it.
    """

    depth = 1

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.size = disk.size
        self._found: list[Missing] = []

    @property
    def missing(self) -> list[Missing]:
        """What was met so far that cannot be read, in order, neighbours of one reason joined."""
        return list(_merged(sorted(set(self._found))))

    def read(self, offset: int, length: int, /) -> bytes:
        """Return ``length`` bytes, fewer only at the end of the disk."""
        return read_with_zeros(self.disk, offset, length, self._found.append)

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Yield extents that tile the range; what the tables do not say is MISSING."""
        end = self.size if length is None else min(self.size, offset + length)
        while offset < end:
            try:
                for extent in self.disk.extents(offset, end - offset):
                    if extent.kind == Kind.MISSING:
                        self._found.append(Missing(extent.offset, extent.length, self._unbacked(extent.depth)))
                    yield extent
                    offset = extent.offset + extent.length
            except Locked:
                raise
            except (Qcow2Error, OSError) as error:
                unit = self._broken_unit(offset)
                stop = min(end, (offset // unit + 1) * unit)
                self._found.append(Missing(offset, stop - offset, str(error)))
                yield Extent(offset, stop - offset, Kind.MISSING, None, 0)
                offset = stop

    def close(self) -> None:
        """Close the disk."""
        self.disk.close()

    def _broken_unit(self, offset: int) -> int:
        """Return the size of the aligned unit that a fault of the tables at ``offset`` takes away."""
        if offset >= self.disk.mapped_end:
            return 1 << 64
        cluster = min(layer.image.cluster_size for layer in images_of(self.disk))
        try:
            next(self.disk.mapping.runs(offset, 1))
        except FormatError as error:
            return cluster if error.field == _L2_ENTRY else self.disk.mapping.slice_span
        except OSError:
            return self.disk.mapping.slice_span
        return cluster  # a layer below, while the ones above may hold what is beside it

    def _unbacked(self, depth: int) -> str:
        """Return why the backing file of the layer ``depth`` below the top is missing."""
        layer = next(islice(layers_of(self.disk), depth, None), None)
        why = layer.unbacked if isinstance(layer, Disk) else None
        return str(why or "the backing file is missing")


def mapfile(size: int, missing: Iterable[Missing], created_by: str) -> Iterator[str]:
    """Yield the lines of a map in GNU ddrescue's format: ``+`` for what was read, ``-`` for what is missing."""
    yield f"# Mapfile. Created by {created_by}"
    yield "# current_pos  current_status  current_pass"
    yield f"0x{size:08X}     +               1"
    yield "#      pos        size  status"
    at = 0
    for offset, length, _ in _merged(item._replace(why="") for item in missing):
        if offset > at:
            yield f"0x{at:08X}  0x{offset - at:08X}  +"
        yield f"0x{offset:08X}  0x{length:08X}  -"
        at = offset + length
    if at < size:
        yield f"0x{at:08X}  0x{size - at:08X}  +"


def _merged(found: Iterable[Missing]) -> Iterator[Missing]:
    return joined(found, _join)


def _join(first: Missing, second: Missing) -> Missing | None:
    end = first.offset + first.length
    if second.offset < end:  # met twice, by the map and by a read
        return first._replace(length=max(end, second.offset + second.length) - first.offset)
    if second.offset == end and second.why == first.why:
        return first._replace(length=first.length + second.length)
    return None


def _unit(disk: Layer) -> int:
    """Return the bytes that a chain reads or refuses as a whole: the smallest cluster, or subcluster, in it."""
    unit = 1 << 21
    for layer in layers_of(disk):
        if not isinstance(layer, Disk):
            return unit if isinstance(layer, RawDisk) else SECTOR
        header = layer.image.header
        if header.version == 1:  # its clusters may be anywhere: the end of the file may cut one at any sector
            return SECTOR
        unit = min(unit, header.cluster_size // 32 if header.extended_l2 else header.cluster_size)
    return unit


def _is_cut_anywhere(error: Exception) -> bool:
    """Whether the sectors beside an unreadable one may be readable, though they are of one cluster."""
    if isinstance(error, FormatError):
        return error.field == "encrypted cluster"
    return isinstance(error, ReadError) or not isinstance(error, Qcow2Error)
