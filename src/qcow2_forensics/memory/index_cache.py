"""The index of a stream as bytes: JSON for the few things, columns of integers for the many.

::

    "Q2GM"  u16 format version  u32 CRC-32 of the rest  u32 length of the JSON  JSON  columns

Nothing in it is executed or trusted: a cache that does not fit is an error, and the stream is
indexed again.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from array import array
from typing import Any, Final

from ..errors import FormatError, LimitExceeded
from ..limits import Limits
from .model import Block, Cpu, Device, Layout, Region
from .page_codecs import MISSING, is_special, offset_of
from .page_index import RunIndex
from .stream_analysis import Analysis

FORMAT_VERSION: Final = 4  # raise it with every change of meaning here, in layout or in devices
_MAGIC = b"Q2GM"
_HEADER = struct.Struct("<4sHII")


def dump(analysis: Analysis) -> bytes:
    """Return the bytes of an analysis."""
    text = json.dumps(
        {
            "stream_size": analysis.stream_size,
            "machine": analysis.machine,
            "architecture": analysis.architecture,
            "page_size": analysis.page_size,
            "stride": analysis.runs[0].stride,
            "complete": analysis.complete,
            "blocks": [
                [block.name, block.size, block.address, block.pages_offset, block.recorded, len(runs)]
                for block, runs in zip(analysis.blocks, analysis.runs, strict=True)
            ],
            "deltas": [sorted((page, *history) for page, history in runs.deltas.items()) for runs in analysis.runs],
            "regions": analysis.regions,
            "layout": [getattr(analysis.layout, name) for name in Layout.__slots__],
            "devices": [
                [device.name, device.instance, device.version, device.offset, device.length]
                for device in analysis.devices
            ],
            "cpus": [[cpu.index, cpu.architecture, dict(cpu.registers)] for cpu in analysis.cpus],
        },
        separators=(",", ":"),
    ).encode()
    columns = b"".join(_little(column) for runs in analysis.runs for column in (runs.first, runs.pages, runs.value))
    rest = text + columns
    return _HEADER.pack(_MAGIC, FORMAT_VERSION, zlib.crc32(rest), len(text)) + rest


def load(data: bytes, stream_size: int, limits: Limits) -> Analysis:
    """Return the analysis in ``data``, which must be of a stream of ``stream_size`` bytes."""
    if len(data) < _HEADER.size:
        raise _unfit("too short")
    magic, version, checksum, length = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != FORMAT_VERSION:
        raise _unfit("another format")
    rest = memoryview(data)[_HEADER.size :]
    if zlib.crc32(rest) != checksum or length > len(rest):
        raise _unfit("damaged")
    try:
        found = json.loads(bytes(rest[:length]))
        return _analysis(found, rest[length:], stream_size, limits)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, OverflowError) as error:
        raise _unfit("not what was written") from error


def _unfit(why: str) -> FormatError:
    return FormatError(f"cached memory index: {why}", field="cache")


def _analysis(found: Any, columns: memoryview, stream_size: int, limits: Limits) -> Analysis:
    if found["stream_size"] != stream_size:
        raise _unfit("of a stream of another size")
    page_size, stride = _number(found["page_size"]), _number(found["stride"])
    if page_size not in (1 << bits for bits in range(10, 17)) or stride not in (page_size, page_size + 8):
        raise _unfit("page size")
    blocks, runs = [], []
    if len(found["blocks"]) > limits.ram_blocks:
        raise LimitExceeded("ram_blocks", len(found["blocks"]), limits.ram_blocks)
    at = 0
    for (name, size, address, pages_offset, recorded, count), changed in zip(
        found["blocks"], found["deltas"], strict=True
    ):
        blocks.append(Block(_text(name), _number(size), _maybe(address), _maybe(pages_offset), _number(recorded)))
        length = 8 * _number(count)
        if at + 3 * length > len(columns):
            raise _unfit("columns end early")
        first, pages, value = (_column(columns[at + n * length : at + (n + 1) * length]) for n in range(3))
        _check(first, pages, value, -(-size // page_size), page_size, stride, stream_size)
        runs.append(RunIndex(first, pages, value, stride, dict(_history(item, stream_size) for item in changed)))
        at += 3 * length
    if at != len(columns):
        raise _unfit("columns go on")
    regions = tuple(Region(_number(a), _number(n), _text(block), _number(o)) for a, n, block, o in found["regions"])
    sizes = {block.name: block.size for block in blocks}
    end = 0
    for region in regions:
        if region.address < end or not region.length or region.block_offset + region.length > sizes[region.block]:
            raise _unfit("regions")
        end = region.end
    return Analysis(
        stream_size=stream_size,
        machine=_text(found["machine"]),
        architecture=_text(found["architecture"]),
        page_size=page_size,
        complete=found["complete"] is True,
        blocks=tuple(blocks),
        runs=tuple(runs),
        regions=regions,
        layout=_layout(*found["layout"]),
        devices=tuple(
            Device(_text(name), _number(instance), _number(version), _number(offset), _number(length))
            for name, instance, version, offset, length in found["devices"]
        ),
        cpus=tuple(
            Cpu(_number(index), _text(kind), {_text(name): _number(value) for name, value in registers.items()})
            for index, kind, registers in found["cpus"]
        ),
    )


def _history(item: Any, stream_size: int) -> tuple[int, tuple[int, ...]]:
    page, base, *offsets = item
    if not isinstance(base, int) or base >= stream_size or not offsets:
        raise ValueError("not a history")
    if is_special(base) and not 0 <= offset_of(base) < stream_size:
        raise ValueError("not a history")
    return _number(page), (base, *map(_number, offsets))


def _layout(method: object, order: object, below: object, above: object, *lists: Any) -> Layout:
    notes, assumptions, unplaced, reasons, checks = (tuple(map(_text, words)) for words in lists[:-1])
    doubts = tuple((_number(address), _number(length)) for address, length in lists[-1])
    return Layout(
        _text(method), _text(order), _number(below), _number(above),
        notes, assumptions, unplaced, reasons, checks, doubts,
    )  # fmt: skip


def _check(
    first: array[int], pages: array[int], value: array[int], limit: int, page_size: int, stride: int, stream_size: int
) -> None:
    end = 0
    for start, count, what in zip(first, pages, value, strict=True):
        if start < end or count < 1 or start + count > limit or what == MISSING:
            raise _unfit("runs")
        if what >= 0:
            if what + (count - 1) * stride + page_size > stream_size:
                raise _unfit("runs outside of the stream")
        elif what < MISSING and (count != 1 or not 0 <= offset_of(what) < stream_size):  # as is_special() has it
            raise _unfit("encoded pages outside of the stream")
        end = start + count


def _little(column: array[int]) -> bytes:
    if sys.byteorder == "little":
        return column.tobytes()
    swapped = array("q", column)
    swapped.byteswap()
    return swapped.tobytes()


def _column(data: memoryview) -> array[int]:
    column = array("q")
    column.frombytes(data)
    if sys.byteorder != "little":
        column.byteswap()
    return column


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ValueError("not a number")
    return value


def _maybe(value: object) -> int | None:
    return None if value is None else _number(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value
