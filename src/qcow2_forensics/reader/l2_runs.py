"""Decodes the entries of an L2 table into runs, one generator per entry format.

Each yields the runs of one slice of a table between two guest offsets and raises
:class:`FormatError` at an entry that QEMU cannot read either. ``host`` arithmetic is relative to
the offset inside the first cluster.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..format.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    QCOW1_COMPRESSED,
    SUBCLUSTERS,
    ZERO,
    compressed_descriptor,
    qcow1_compressed_descriptor,
)
from ..format.header import SECTOR
from .runs import Kind, Run

if TYPE_CHECKING:
    from .mapping import Mapping

HIGHEST = 1 << 55  # of the bits of a host offset: entries counted up from there could run into the reserved bits


def standard_runs(mapping: Mapping, entries: array[int], number: int, offset: int, stop: int) -> Iterator[Run]:
    """Yield the runs of a slice of 8-byte entries ("L2 table entry")."""
    bits, size, mask = mapping.cluster_bits, mapping.cluster_size, mapping.slice_mask
    special = COMPRESSED | ZERO | (OFFSET_MASK & (size - 1))
    while offset < stop:
        index = (offset >> bits) & mask
        entry = entries[index]
        inside = offset & (size - 1)
        if entry & COMPRESSED:
            run_end = min(stop, offset - inside + size)
            yield _compressed(mapping, entry, offset, run_end - offset)
            offset = run_end
            continue
        last = ((stop - 1) >> bits) & mask
        # The usual case: entries that continue the first one, as a cluster or as nothing.
        at_zero = mapping.data_file and entry & COPIED and not entry & ZERO  # a cluster of the data file's first byte
        step = size if entry & OFFSET_MASK or at_zero else 0
        index = index + 1 if entry & HIGHEST else sequence_end(entries, index + 1, last + 1, step)
        run_end = min(stop, (number << mapping.slice_shift) + (index << bits))
        host = entry & OFFSET_MASK
        if entry & special or mapping.data_file:
            kind, start = _special(mapping, entry, offset, inside)
        elif host:
            kind, start = Kind.DATA, host + inside
        else:
            kind, start = Kind.HOLE, None
        yield Run(offset, run_end - offset, kind, start)
        offset = run_end


def _special(mapping: Mapping, entry: int, offset: int, inside: int) -> tuple[Kind, int | None]:
    """Classify an entry that is not plain data or nothing; raise for what QEMU cannot read."""
    host = entry & OFFSET_MASK
    if entry & ZERO:
        if mapping.version < 3:
            raise mapping.bad_entry(offset, "has the zero flag, which version 2 does not know")
        kind = Kind.ZERO
    elif host or (entry & COPIED and mapping.data_file):
        kind = Kind.DATA
    else:
        return Kind.HOLE, None
    if not host and kind == Kind.ZERO:
        return kind, None
    _check_host(mapping, host, offset, inside)
    return kind, host + inside


def _check_host(mapping: Mapping, host: int, offset: int, inside: int) -> None:
    if host & (mapping.cluster_size - 1):
        raise mapping.bad_entry(offset, f"names the unaligned host offset {host:#x}")
    if mapping.data_file and host != offset - inside:
        raise mapping.bad_entry(offset, f"maps to {host:#x} in the data file, not to its guest offset")


def extended_runs(mapping: Mapping, entries: array[int], number: int, offset: int, stop: int) -> Iterator[Run]:
    """Yield the runs of a slice of 16-byte entries ("Extended L2 Entries")."""
    bits, size, mask = mapping.cluster_bits, mapping.cluster_size, mapping.slice_mask
    subcluster = size // SUBCLUSTERS
    full = 0xFFFF_FFFF
    special = HIGHEST | (OFFSET_MASK & (size - 1))
    while offset < stop:
        index = (offset >> bits) & mask
        entry, bitmap = entries[2 * index], entries[2 * index + 1]
        inside = offset & (size - 1)
        run_end = min(stop, offset - inside + size)
        if entry & COMPRESSED:
            yield _compressed(mapping, entry, offset, run_end - offset)
            offset = run_end
            continue
        if bitmap == full and entry & OFFSET_MASK and not (entry & special or mapping.data_file):
            # The usual case: whole clusters, one after the other in the file.
            last, expected = ((stop - 1) >> bits) & mask, entry + size
            index += 1
            while index <= last and entries[2 * index] == expected and entries[2 * index + 1] == full:
                expected += size
                index += 1
            run_end = min(stop, (number << mapping.slice_shift) + (index << bits))
            yield Run(offset, run_end - offset, Kind.DATA, (entry & OFFSET_MASK) + inside)
            offset = run_end
            continue
        allocated, zeros = bitmap & full, bitmap >> 32
        host = entry & OFFSET_MASK
        present = bool(host) or bool(mapping.data_file and entry & COPIED)
        if allocated & zeros:
            raise mapping.bad_entry(offset, "has subclusters that are both allocated and zero")
        if allocated and not present:
            raise mapping.bad_entry(offset, "has allocated subclusters without a cluster")
        if present and (host & (size - 1) or mapping.data_file):
            _check_host(mapping, host, offset, inside)
        while offset < run_end:
            at = (offset & (size - 1)) // subcluster
            bit = 1 << at
            kind = Kind.DATA if allocated & bit else Kind.ZERO if zeros & bit else Kind.HOLE
            same = allocated if kind == Kind.DATA else zeros if kind == Kind.ZERO else ~(allocated | zeros)
            at += 1
            while at < SUBCLUSTERS and same >> at & 1:
                at += 1
            piece_end = min(run_end, offset - (offset & (size - 1)) + at * subcluster)
            start = host + (offset & (size - 1)) if present else None
            yield Run(offset, piece_end - offset, kind, start)
            offset = piece_end


def qcow1_runs(mapping: Mapping, entries: array[int], number: int, offset: int, stop: int) -> Iterator[Run]:
    """Yield the runs of a slice of a version 1 table."""
    bits, size, mask = mapping.cluster_bits, mapping.cluster_size, mapping.slice_mask
    while offset < stop:
        index = (offset >> bits) & mask
        entry = entries[index]
        inside = offset & (size - 1)
        if entry & QCOW1_COMPRESSED:
            length = min(stop, offset - inside + size) - offset
            host, stored = qcow1_compressed_descriptor(entry, bits)
            yield Run(offset, length, Kind.COMPRESSED, host, stored)
            offset += length
            continue
        if entry % SECTOR:
            raise mapping.bad_entry(offset, f"names the unaligned host offset {entry:#x}")
        last = ((stop - 1) >> bits) & mask
        index = index + 1 if entry & HIGHEST else sequence_end(entries, index + 1, last + 1, size if entry else 0)
        run_end = min(stop, (number << mapping.slice_shift) + (index << bits))
        if entry:
            yield Run(offset, run_end - offset, Kind.DATA, entry + inside)
        else:
            yield Run(offset, run_end - offset, Kind.HOLE)
        offset = run_end


def _compressed(mapping: Mapping, entry: int, offset: int, length: int) -> Run:
    if mapping.data_file:
        raise mapping.bad_entry(offset, "is compressed, which an external data file cannot hold")
    host, size = compressed_descriptor(entry, mapping.cluster_bits)
    return Run(offset, length, Kind.COMPRESSED, host, size)


# --- how far entries continue each other: asked for every table, so it runs at the speed of C --------------

_WIDEST = 8192  # entries looked at in one go: a slice of an L2 table


def sequence_end(entries: array[int], index: int, stop: int, step: int) -> int:
    """Return the first index from ``index`` on whose entry is not ``step`` above the one before it, at most ``stop``.

    ``step`` is small enough for a run not to leave 64 bits.
    """
    expected = entries[index - 1] + step
    near = min(stop, index + 4)
    while index < near:
        if entries[index] != expected:
            return index
        expected += step
        index += 1
    width = 16  # grows, so that short runs cost little and long ones are found at the speed of C
    if index < stop and entries[stop - 1] == expected + (stop - 1 - index) * step:
        width = stop - index  # most likely all of them
    while index < stop:
        width = min(width, stop - index, _WIDEST)
        if _is_steady(entries, index, width, step):
            index += width
            width *= 4
        elif width == 1:
            break
        else:
            width = -(-width // 4)
    return index


def _is_steady(entries: array[int], index: int, width: int, step: int) -> bool:
    """Whether each of ``width`` entries is ``step`` above the one before it."""
    if not step:
        return entries[index : index + width] == array("Q", [entries[index - 1]]) * width
    # As one long number each: subtracting all entries at once is ten times faster than counting up.
    # The first entry is the lowest digit, so the first that differs shows, whatever follows it.
    return _number(entries[index : index + width]) - _number(entries[index - 1 : index + width - 1]) == step * (
        _ONES >> 64 * (_WIDEST - width)
    )


def _number(entries: array[int]) -> int:
    return int.from_bytes(entries if sys.byteorder == "little" else entries[::-1], sys.byteorder)


_ONES = _number(array("Q", [1]) * _WIDEST)
