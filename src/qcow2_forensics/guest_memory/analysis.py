"""One pass over a stream: what :class:`GuestMemory` stands on, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import ReadError, printable
from ..limits import Limits
from ..source import Source
from . import layout
from .devices import DeviceStates
from .grammar import read_stream
from .index import MISSING, RunIndex, build
from .model import Block, Cpu, Device, Layout, NotInMemory, Region

_PIECE = 4096  # pages taken from the stream at once


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything that was learnt from a stream; ``runs`` is parallel to ``blocks``."""

    stream_size: int
    machine: str
    architecture: str
    page_size: int
    complete: bool
    blocks: tuple[Block, ...]
    runs: tuple[RunIndex, ...]
    regions: tuple[Region, ...]
    layout: Layout
    devices: tuple[Device, ...]
    cpus: tuple[Cpu, ...]


def analyse(source: Source, limits: Limits, allow_truncated: bool) -> Analysis:
    """Index the RAM records, walk the devices and decide the layout."""
    stream = read_stream(source, limits, allow_truncated=allow_truncated)
    ram = stream.ram
    runs = tuple(build(ram.segments, len(ram.blocks), ram.stride))
    blocks = tuple(
        Block(item.name, item.size, item.address, item.pages_offset, min(item.size, index.recorded() * ram.page_size))
        for item, index in zip(ram.blocks, runs, strict=True)
    )
    numbers = {block.name: number for number, block in enumerate(blocks)}

    def read_block(name: str, offset: int, length: int) -> bytes:
        return read_pages(source, runs[numbers[name]], ram.page_size, offset, length, pad=True)

    states = DeviceStates(source, stream.devices_offset, limits) if stream.complete else None
    cpus = states.cpus() if states else ()
    cmos = states.clock_ram() if states else None
    hint = cpus[0].architecture if cpus else ""
    bodies = [*stream.early, *(states.bodies("virtio-mem") if states else ())]
    facts = layout.Facts(stream.machine, blocks, cmos, read_block, hint, bodies)
    architecture, placed, regions = layout.place(facts)
    notes = [*placed.notes, *(printable(note) for note in stream.notes)]
    if ram.ignore_shared:
        notes.append("shared memory was left out of the stream (x-ignore-shared)")
    if not stream.complete:
        notes.append("the stream ends early: devices are missing, and perhaps RAM")
    return Analysis(
        stream_size=source.size,
        machine=stream.machine,
        architecture=architecture,
        page_size=ram.page_size,
        complete=stream.complete,
        blocks=blocks,
        runs=runs,
        regions=regions,
        layout=replace(placed, notes=tuple(notes)),
        devices=states.devices if states else (),
        cpus=cpus,
    )


def read_pages(
    source: Source, index: RunIndex, page_size: int, offset: int, length: int, *, pad: bool, address: int | None = None
) -> bytes:
    """Return bytes of one block, stripping the word before each page.

    Pages the stream never recorded read as zeros with ``pad`` and raise :class:`NotInMemory` without;
    ``address`` is what the error calls ``offset``.
    """
    first = offset // page_size
    pages = -(-(offset + length) // page_size) - first
    pieces: list[bytes] = []
    for run in index.runs(first, pages):
        if run.value >= 0:
            pieces.extend(_data(source, run.value, run.pages, page_size, index.stride))
        elif run.value == MISSING and not pad:
            where = (offset if address is None else address) - offset + max(offset, run.first * page_size)
            raise NotInMemory("the stream does not hold this memory", address=where, length=length)
        else:
            fill = b"\0" if run.value == MISSING else bytes([-1 - run.value])
            pieces.append(fill * (run.pages * page_size))
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    skip = offset - first * page_size
    return data if skip == 0 and len(data) == length else data[skip : skip + length]


def _data(source: Source, value: int, pages: int, page_size: int, stride: int) -> Sequence[bytes]:
    pieces = []
    while pages:
        count = min(pages, _PIECE)
        wanted = (count - 1) * stride + page_size
        raw = source.read(value, wanted)
        if len(raw) < wanted:
            raise ReadError("the migration stream ends early", offset=value, length=wanted)
        if count > 1 and stride != page_size:
            raw = np.ndarray((count, page_size), np.uint8, raw, 0, (stride, 1)).tobytes()
        pieces.append(raw)
        value += count * stride
        pages -= count
    return pieces
