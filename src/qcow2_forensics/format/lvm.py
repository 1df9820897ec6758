"""LVM2: where the logical volumes of a disk are, by the metadata of its physical volumes.

A physical volume starts with a label that leads to a header, the header to a metadata area, and that
to a text that describes the whole volume group, so that any of its physical volumes will do::

    sector 0-3   "LABELONE" ... "LVM2 001"
    header       UUID, size, data areas, metadata areas          (offset, size) each, ended by zeros
    metadata     " LVM2 x[5A%r0N*>" ... (offset, size, CRC) of the text, in a ring after 512 bytes

Linear and striped volumes are mapped, over as many physical volumes as the disk has. Others (thin, RAID,
cache) are named with the reason why they are not.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple, Protocol, TypeAlias

from ..limits import LVM_AREAS, LVM_DEPTH, LVM_SEGMENTS, LVM_TEXT_BYTES, LVM_TEXT_READS, LVM_VOLUMES, Budget
from ..text import decoded, quoted
from .header import SECTOR

_LABEL_SECTORS = 4
_MDA_HEADER = 512
_MDA_MAGIC = b" LVM2 x[5A%r0N*>"
_MDA_IGNORED = 1
_CRC_START = 0xF597A6CF
_MOST = 1 << 62  # of a number, so that places stay numbers of 64 bits: sectors of a disk are fewer

Value: TypeAlias = "str | int | list[str | int] | dict[str, Value]"
Section: TypeAlias = "dict[str, Value]"


class PositionalReader(Protocol):
    """Positional bytes of one volume."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes, fewer only at the end; raises ``Qcow2Error`` or ``OSError``."""
        ...


class Segment(NamedTuple):
    """``length`` bytes at ``start`` of a volume are at ``below`` of what it is made of."""

    start: int
    length: int
    below: int


class PhysicalVolume(NamedTuple):
    """A physical volume, by its UUID without dashes, and the newest metadata text it holds."""

    uuid: str
    metadata: Section


class LogicalVolume(NamedTuple):
    """A logical volume, in ``parts`` of physical volumes, which are named by their UUID.

    Where there is a reason ``why`` it cannot be read, ``parts`` say only where its bytes are.
    """

    group: str
    name: str
    size: int
    parts: tuple[tuple[str, Segment], ...]
    why: str
    is_elsewhere: bool = False  # a part of it is on a physical volume of another disk
    physical: str = ""  # the UUID of the first physical volume of its group on this disk


class LvmError(ValueError):
    """The label is there, and what it points to is not LVM metadata."""


class Texts:
    """Metadata texts of one disk, each parsed once: every physical volume of a group holds the same.

    ``sections`` keeps what was parsed, by its SHA-256, for a disk that is looked at again.
    """

    def __init__(self, sections: dict[bytes, Section] | None = None) -> None:
        self._read = Budget.up_to("bytes read of LVM metadata", LVM_TEXT_READS * LVM_TEXT_BYTES)
        self._parsed = Budget.up_to("bytes of different LVM metadata", LVM_TEXT_BYTES)
        self._sections = {} if sections is None else sections

    def read(self, reader: PositionalReader, offset: int, length: int) -> bytes:
        """Return bytes of a text; raises :class:`LimitExceeded` where texts are read again and again."""
        self._read.spend(length)
        return reader.read(offset, length)

    def parse(self, text: bytes) -> Section:
        """Return a text as nested dictionaries; raises :class:`LvmError` and :class:`LimitExceeded`."""
        key = hashlib.sha256(text).digest()
        if key not in self._sections:
            self._parsed.spend(len(text))
            self._sections[key] = parse(decoded(text.rstrip(b"\0")))
        return self._sections[key]


class MissingPart(LvmError):
    """A part of a logical volume is on a physical volume that is not on this disk."""


def _label_at(head: bytes) -> int | None:
    for at in range(0, _LABEL_SECTORS * SECTOR, SECTOR):
        if head[at : at + 8] == b"LABELONE" and head[at + 24 : at + 32] == b"LVM2 001":
            return at
    return None


def physical_volume(reader: PositionalReader, known: Texts | None = None) -> PhysicalVolume | None:
    """Return the physical volume in a volume, None when there is none; ``known`` are the texts of its disk so far.

    Raises :class:`LvmError`, and :class:`LimitExceeded` where the disk has more metadata than any group.
    """
    known = known or Texts()
    head = reader.read(0, (_LABEL_SECTORS + 1) * SECTOR)
    label = _label_at(head)
    if label is None:
        return None
    (start,) = struct.unpack_from("<I", head, label + 20)
    header = head[label + start : label + start + SECTOR]
    if not 32 <= start < SECTOR or len(header) < 40:
        raise LvmError(f"its label leads to a header at {start}")
    uuid = header[:32].decode("ascii", "replace")
    texts: list[Section] = []
    problems: list[str] = []
    for offset, size in _metadata_areas(header):
        try:
            texts.extend(_texts(reader, offset, size, known))
        except LvmError as error:
            problems.append(str(error))
    if not texts:
        raise LvmError(problems[0] if problems else "it holds no metadata area")
    return PhysicalVolume(uuid, max(texts, key=_sequence))


def _metadata_areas(header: bytes) -> Iterator[tuple[int, int]]:
    lists = 0
    for at in range(40, min(len(header) - 15, 40 + LVM_AREAS * 16), 16):
        offset, size = struct.unpack_from("<QQ", header, at)
        if offset == 0:
            lists += 1
            if lists == 2:
                return
        elif lists == 1:
            yield offset, size


def _texts(reader: PositionalReader, area: int, area_size: int, known: Texts) -> Iterator[Section]:
    header = reader.read(area, _MDA_HEADER) if area + _MDA_HEADER <= reader.size else b""
    if len(header) < _MDA_HEADER or header[4:20] != _MDA_MAGIC:
        raise LvmError(f"its metadata area at {area:#x} has no LVM2 header")
    _, start, size = struct.unpack_from("<IQQ", header, 20)
    if start != area or size != area_size or size <= _MDA_HEADER or area + size > reader.size:
        raise LvmError(f"its metadata area at {area:#x} claims {size} bytes at {start:#x}")
    offset, length, checksum, flags = struct.unpack_from("<QQII", header, 40)
    if not offset or flags & _MDA_IGNORED:
        return
    if not _MDA_HEADER <= offset < size or length > min(size - _MDA_HEADER, LVM_TEXT_BYTES):
        raise LvmError(f"its metadata text is {length} bytes at {offset:#x} of an area of {size} bytes")
    first = min(length, size - offset)
    text = known.read(reader, area + offset, first)
    if length > first:  # the ring starts again after its header
        text += known.read(reader, area + _MDA_HEADER, length - first)
    if zlib.crc32(text, _CRC_START ^ 0xFFFF_FFFF) ^ 0xFFFF_FFFF != checksum:
        raise LvmError("the checksum of its metadata text does not match")
    yield known.parse(text)


# --- the metadata text -------------------------------------------------------------------------------

# Possessive: a string without an end must not be kept character by character for another try.
_TOKEN = re.compile(r'\s+|#[^\n]*|("(?:[^"\\]++|\\.)*+"|-?\d+|[A-Za-z0-9_.+-]+|[{}\[\]=,])', re.ASCII)


def parse(text: str) -> Section:
    """Return a metadata text as nested dictionaries; raises :class:`LvmError`."""
    root: Section = {}
    open_sections = [root]
    tokens = _tokens(text)
    for word in tokens:
        if word == "}" and len(open_sections) > 1:
            open_sections.pop()
            continue
        follows = next(tokens, "")
        if follows == "{" and len(open_sections) <= LVM_DEPTH:
            section: Section = {}
            open_sections[-1][word] = section
            open_sections.append(section)
        elif follows == "=":
            open_sections[-1][word] = _value(tokens)
        else:
            raise LvmError(f"its metadata text has {quoted(follows[:20])} after {quoted(word[:20])}")
    if len(open_sections) > 1:
        raise LvmError("its metadata text ends inside a section")
    return root


def _tokens(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise LvmError(f"its metadata text has {quoted(text[at : at + 20])}")
        at = found.end()
        if found[1] is not None:
            yield found[1]


def _value(tokens: Iterator[str]) -> Value:
    word = next(tokens, "")
    if word != "[":
        return _scalar(word)
    items: list[str | int] = []
    for item in tokens:
        if item == "]":
            return items
        if item != ",":
            items.append(_scalar(item))
    raise LvmError("its metadata text ends inside a list")


def _scalar(word: str) -> str | int:
    if word.startswith('"'):
        return re.sub(r"\\(.)", r"\1", word[1:-1])
    try:
        return int(word)
    except ValueError:
        raise LvmError(f"its metadata text has {quoted(word[:20])} for a value") from None


def _sequence(metadata: Section) -> int:
    groups = [section for section in metadata.values() if isinstance(section, dict)]
    return max((_number(section, "seqno") for section in groups), default=-1)


def _number(section: Mapping[str, Value], key: str) -> int:
    value = section.get(key)
    if not isinstance(value, int) or not 0 <= value < _MOST:
        raise LvmError(f"its metadata text has no number {quoted(key)} where one belongs")
    return value


def _sections(section: Mapping[str, Value], key: str) -> dict[str, Section]:
    inner = section.get(key)
    named = inner.items() if isinstance(inner, dict) else ()
    return {name: value for name, value in named if isinstance(value, dict)}


# --- logical volumes ---------------------------------------------------------------------------------


def logical_volumes(physical: Iterable[PhysicalVolume]) -> Iterator[LogicalVolume]:
    """Yield the visible logical volumes of all groups, in the order of the text.

    Raises :class:`LvmError`, and :class:`LimitExceeded` where crafted ones share their parts.
    """
    volumes = list(physical)
    newest: dict[str, tuple[str, Section]] = {}
    for volume in volumes:
        for name, group in volume.metadata.items():
            if not isinstance(group, dict) or "extent_size" not in group:
                continue
            key = str(group.get("id", name))
            if key not in newest or _number(group, "seqno") > _number(newest[key][1], "seqno"):
                newest[key] = name, group
    here = dict.fromkeys(volume.uuid for volume in volumes)
    for name, group in newest.values():
        yield from _of_group(name, group, here)


def _of_group(group_name: str, group: Section, here: Mapping[str, None]) -> Iterator[LogicalVolume]:
    """Yield the volumes of a group; ``here`` are the physical volumes of this disk."""
    extent = _number(group, "extent_size") * SECTOR
    starts: dict[str, tuple[str | None, int, str]] = {}
    for alias, physical in _sections(group, "physical_volumes").items():
        shown = str(physical.get("id", ""))
        uuid = shown.replace("-", "")
        starts[alias] = uuid if uuid in here else None, _number(physical, "pe_start") * SECTOR, shown
    held = {uuid for uuid, _, _ in starts.values()}
    first_held = next((uuid for uuid in here if uuid in held), "")
    described = _sections(group, "logical_volumes")
    budget = LVM_SEGMENTS
    looked_at = Budget.up_to("segments of LVM volumes that are not read", LVM_SEGMENTS)
    # The rest are parts of these.
    visible = [name for name, volume in described.items() if "VISIBLE" in _words(volume, "status")]
    for name in islice(visible, LVM_VOLUMES):
        volume = described[name]
        size = sum(_number(segment, "extent_count") for segment in _segments(volume)) * extent
        why = ""
        is_elsewhere = False
        parts: list[tuple[str, Segment]] = []
        for segment in _segments(volume):
            try:
                parts += islice(_parts(segment, extent, starts), budget - len(parts) + 1)
            except LvmError as error:
                is_elsewhere |= isinstance(error, MissingPart)
                why = why or str(error)
        if not why and len(parts) > budget:
            raise LvmError(f"it has more than {LVM_SEGMENTS} pieces")
        if not why and size >= _MOST:
            why = "it claims to be larger than any disk"
        if why:
            parts = list(islice(_all_parts(name, described, extent, starts, looked_at), budget))
        elif not parts:
            why = "it has no segments"
        budget -= len(parts)
        yield LogicalVolume(group_name, name, size, tuple(parts), why, is_elsewhere, first_held)
    if len(visible) > LVM_VOLUMES:
        raise LvmError(f"it has {len(visible)} logical volumes, of which {LVM_VOLUMES} are looked into")


def _words(section: Section, key: str) -> list[str | int]:
    found = section.get(key)
    return found if isinstance(found, list) else []


def _segments(volume: Section) -> list[Section]:
    found = [value for key, value in volume.items() if key.startswith("segment") and isinstance(value, dict)]
    return sorted(found, key=lambda segment: _number(segment, "start_extent"))


# By the name in the text: the UUID where it is on this disk, where its extents start, and the UUID as it is shown.
_Starts: TypeAlias = Mapping[str, "tuple[str | None, int, str]"]


def _parts(segment: Section, extent: int, starts: _Starts) -> Iterator[tuple[str, Segment]]:
    """Yield where one segment's bytes are, in the order of the logical volume."""
    kind = segment.get("type")
    if kind not in ("striped", "linear"):
        raise LvmError(f"it is of LVM type {quoted(str(kind)[:40])}, which is not read")
    first, length = _number(segment, "start_extent") * extent, _number(segment, "extent_count") * extent
    stripes = segment.get("stripes")
    count = _number(segment, "stripe_count")
    if not isinstance(stripes, list) or count < 1 or len(stripes) != 2 * count:
        raise LvmError("its list of stripes is incomplete")
    places: list[tuple[str, int]] = []
    for alias, at in zip(stripes[::2], stripes[1::2], strict=True):
        uuid, start, shown = starts.get(str(alias), (None, 0, str(alias)))
        if uuid is None:
            raise MissingPart(f"part of it is on physical volume {shown[:40]}, which is not on this disk")
        if not isinstance(at, int) or at < 0:
            raise LvmError("its list of stripes is incomplete")
        places.append((uuid, start + at * extent))
    step = length if count == 1 else _number(segment, "stripe_size") * SECTOR
    if step < SECTOR:
        raise LvmError("its stripes have no size")
    for number, at in enumerate(range(0, length, step)):
        uuid, start = places[number % count]
        yield uuid, Segment(first + at, min(step, length - at), start + number // count * step)


def _all_parts(
    name: str, described: Mapping[str, Section], extent: int, starts: _Starts, looked_at: Budget
) -> Iterator[tuple[str, Segment]]:
    """Yield where the bytes of a volume and of the hidden ones it is made of are, as far as they are on this disk."""
    wanted, seen = [name], {name}
    for volume in wanted:
        for segment in _segments(described[volume]):
            looked_at.spend(1)
            try:
                yield from _parts(segment, extent, starts)
            except LvmError:
                continue
            finally:
                values = [
                    item for value in segment.values() for item in (value if isinstance(value, list) else [value])
                ]
                named = {str(value) for value in values if isinstance(value, str)} & described.keys()
                wanted += sorted(named - seen)
                seen |= named
