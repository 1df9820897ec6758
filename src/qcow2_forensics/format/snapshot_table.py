"""The snapshot table ("Snapshots"): its entries, and how the table is read.

Reading stops at the first entry that cannot be parsed, which comes back as a problem.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ..limits import KiB, Limits
from ..text import decoded
from .extensions import Metadata
from .header import Header, padded
from .header_rules import INT64_MAX, SNAPSHOTS, Problem, snapshot_part

_CHUNK = 256 * KiB
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_SNAPSHOT_EXTRA = struct.Struct(">QQq")  # vm_state_size, disk_size, icount
SNAPSHOT_ENTRY_LENGTH = _SNAPSHOT.size  # 40
SNAPSHOT_KNOWN_EXTRA = _SNAPSHOT_EXTRA.size  # 24: bytes of extra data that have a meaning
_FIELDS = {  # where each is: offset in the entry and length, in bytes
    "l1_table_offset": (0, 8),
    "l1_size": (8, 4),
    "date": (16, 8),
    "date_sec": (16, 4),
    "date_nsec": (20, 4),
    "vm_clock_nsec": (24, 8),
    "vm_state_size32": (32, 4),
    "extra_data_size": (36, 4),
    "vm_state_size": (40, 8),
    "disk_size": (48, 8),
    "icount": (56, 8),
}


class SnapshotEntry(NamedTuple):
    """One entry of the snapshot table ("Snapshots"); ``index`` counts from 0 in table order.

    ``vm_state_size`` is the 64-bit field where the extra data has it, the 32-bit one elsewhere;
    ``disk_size`` and ``icount`` are None when the extra data does not reach them. Dates are
    seconds and nanoseconds since 1970 by the host's clock.
    """

    index: int  # type: ignore[assignment]  # hides a method of tuple that nobody calls on an entry
    offset: int  # file offset of this entry
    length: int  # bytes with extra data, ID and name, unpadded
    l1_table_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size32: int
    vm_state_size: int
    disk_size: int | None
    icount: int | None
    extra: bytes
    id_bytes: bytes
    name_bytes: bytes

    @property
    def id(self) -> str:
        """The ID as text; undecodable bytes become lone surrogates."""
        return decoded(self.id_bytes)

    @property
    def name(self) -> str:
        """The name as text; undecodable bytes become lone surrogates."""
        return decoded(self.name_bytes)

    @property
    def extra_length(self) -> int:
        return len(self.extra)

    def place_of(self, field: str) -> tuple[int, int]:
        """Return the file offset and the length of a field that the entry has, by the name used here or in the format."""
        extra_length = len(self.extra)
        if field == "id":
            at, length = SNAPSHOT_ENTRY_LENGTH + extra_length, len(self.id_bytes)
        elif field == "name":
            at, length = SNAPSHOT_ENTRY_LENGTH + extra_length + len(self.id_bytes), len(self.name_bytes)
        else:
            at, length = _FIELDS["vm_state_size32" if field == "vm_state_size" and extra_length < 8 else field]
        return self.offset + at, length


class SnapshotHead(NamedTuple):
    """The fixed 40 bytes of a snapshot table entry."""

    l1_table_offset: int
    l1_size: int
    id_length: int
    name_length: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size32: int
    extra_length: int

    @property
    def total_length(self) -> int:
        """Bytes of the whole entry, unpadded."""
        return SNAPSHOT_ENTRY_LENGTH + self.extra_length + self.id_length + self.name_length


def parse_snapshot_head(data: bytes) -> SnapshotHead:
    """Return the fixed part of an entry; ``data`` must be its 40 bytes."""
    return SnapshotHead._make(_SNAPSHOT.unpack(data))


def build_snapshot_entry(index: int, offset: int, head: SnapshotHead, tail: bytes) -> SnapshotEntry:
    """Return the entry from its fixed part and the bytes that follow it."""
    extra_length = head.extra_length
    name_at = extra_length + head.id_length
    if extra_length >= _SNAPSHOT_EXTRA.size:
        numbers: tuple[int, int | None, int | None] = _SNAPSHOT_EXTRA.unpack_from(tail)
    else:
        vm_state_size = int.from_bytes(tail[:8], "big") if extra_length >= 8 else head.vm_state_size32
        numbers = vm_state_size, int.from_bytes(tail[8:16], "big") if extra_length >= 16 else None, None
    return SnapshotEntry(
        index,
        offset,
        head.total_length,
        head.l1_table_offset,
        head.l1_size,
        head.date_sec,
        head.date_nsec,
        head.vm_clock_nsec,
        head.vm_state_size32,
        *numbers,
        tail[:extra_length],
        tail[extra_length:name_at],
        tail[name_at : name_at + head.name_length],
    )


def read_snapshot_table(image: Metadata) -> tuple[tuple[SnapshotEntry, ...], tuple[Problem, ...]]:
    """Parse the snapshot table up to the first entry that cannot be parsed."""
    header, limits = image.header, image.limits
    if header.version == 1 or header.nb_snapshots == 0:
        return (), ()
    if header.snapshots_offset == 0:
        place = header.offset_of("snapshots_offset") or 0
        return (), (_table_problem(place, "snapshots_offset", 0, "the snapshot table lies on the header", SNAPSHOTS),)
    if header.snapshots_offset % header.cluster_size or header.nb_snapshots > limits.snapshots:
        return (), ()  # the header's own problem says so
    found: list[SnapshotEntry] = []
    problems: list[Problem] = []
    window = Window(image)
    unaligned, most_l1 = header.cluster_size - 1, limits.l1_bytes // 8
    at = header.snapshots_offset
    for index in range(header.nb_snapshots):
        problem = _read_snapshot(window, index, at, found, limits, header)
        if problem is not None:
            problems.append(problem)
            break
        entry = found[-1]
        place = entry.l1_table_offset
        if not place or place & unaligned or place > INT64_MAX or entry.l1_size > most_l1:
            problems.extend(_snapshot_rules(header, limits, entry))
        at += padded(entry.length)
        if at - header.snapshots_offset > limits.snapshot_table_bytes:
            size = at - header.snapshots_offset
            text = "the snapshot table is too large"
            problems.append(
                _table_problem(at, "snapshot_table", size, text, SNAPSHOTS, limit=limits.snapshot_table_bytes)
            )
            break
    return tuple(found), tuple(problems)


class Window:
    """Forward reads in chunks: one read for a small table, bounded memory for a huge one."""

    def __init__(self, image: Metadata) -> None:
        self._image = image
        self._start = 0
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``, fewer only at the end of the file."""
        at = offset - self._start
        if at < 0 or at + length > len(self._data):
            self._start, at = offset, 0
            self._data = self._image.read(offset, max(length, _CHUNK))
        return self._data[at : at + length]


def _read_snapshot(
    window: Window, index: int, at: int, found: list[SnapshotEntry], limits: Limits, header: Header
) -> Problem | None:
    fixed = window.read(at, SNAPSHOT_ENTRY_LENGTH)
    if len(fixed) < SNAPSHOT_ENTRY_LENGTH:
        return _table_problem(at, "snapshot", index, f"snapshot table entry {index} lies past the end of the file")
    head = parse_snapshot_head(fixed)
    if head.extra_length > limits.snapshot_extra_bytes:
        text = f"snapshot table entry {index} has too much extra data"
        return _table_problem(
            at + _FIELDS["extra_data_size"][0],
            "extra_data_size",
            head.extra_length,
            text,
            limit=limits.snapshot_extra_bytes,
        )
    data = window.read(at, head.total_length)
    if len(data) < head.total_length:
        return _table_problem(at, "snapshot", index, f"snapshot table entry {index} reaches past the end of the file")
    if header.version >= 3 and head.extra_length < 16:
        text = f"snapshot table entry {index} lacks the extra data version 3 requires"
        return _table_problem(at + _FIELDS["extra_data_size"][0], "extra_data_size", head.extra_length, text)
    found.append(build_snapshot_entry(index, at, head, data[SNAPSHOT_ENTRY_LENGTH:]))
    return None


def _table_problem(at: int, field: str, value: int, message: str, *blocks: str, limit: int | None = None) -> Problem:
    parts = frozenset(blocks or (SNAPSHOTS,))
    return Problem("QCOW2-SNAPSHOT-TABLE-INVALID", message, field, value, at, parts, limit)


def _snapshot_rules(header: Header, limits: Limits, entry: SnapshotEntry) -> Iterator[Problem]:
    part = snapshot_part(entry.index)
    if entry.l1_table_offset % header.cluster_size or entry.l1_table_offset > INT64_MAX or not entry.l1_table_offset:
        text = f"the L1 table of snapshot table entry {entry.index} is at an impossible offset"
        yield _table_problem(entry.offset, "l1_table_offset", entry.l1_table_offset, text, part)
    if entry.l1_size * 8 > limits.l1_bytes:
        text = f"the L1 table of snapshot table entry {entry.index} is too large"
        yield _table_problem(
            entry.place_of("l1_size")[0], "l1_size", entry.l1_size, text, part, limit=limits.l1_bytes // 8
        )
