"""One pass over a stream: what :class:`GuestMemory` is made of, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import Unsupported
from ..format.source import Source
from ..limits import Limits
from ..text import cut, listed, quoted
from . import layout
from .block_reader import read_pages
from .devices import DeviceStates
from .given_layout import Given
from .libvirt_domain import module_addresses
from .model import Block, Cpu, Device, Layout, Region
from .page_codecs import MISSING
from .page_index import RunIndex, build
from .sections import read_stream
from .system_ram import RamEvidence


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything that the stream shows; ``runs`` is parallel to ``blocks``."""

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


def _need_bases(blocks: tuple[Block, ...], runs: tuple[RunIndex, ...], page_size: int) -> None:
    """Raise :class:`Unsupported` for pages sent as differences to something that the stream does not hold."""
    for block, index in zip(blocks, runs, strict=True):
        lost = sorted(page for page, history in index.deltas.items() if history[0] == MISSING)
        if lost:
            named = listed([f"{page * page_size:#x}" for page in lost], 8)
            raise Unsupported(
                f"pages sent as differences (xbzrle) to what another stream holds: block {quoted(block.name)}, "
                f"offsets {named}"
            )


def analyse(source: Source, limits: Limits, allow_truncated: bool, given: Given) -> Analysis:
    """Index the RAM records, walk the devices and decide the layout."""
    stream = read_stream(source, limits, allow_truncated=allow_truncated)
    ram = stream.ram
    runs = tuple(build(ram.segments, len(ram.blocks), ram.stride))
    blocks = tuple(
        Block(item.name, item.size, item.address, item.pages_offset, min(item.size, index.recorded() * ram.page_size))
        for item, index in zip(ram.blocks, runs, strict=True)
    )
    _need_bases(blocks, runs, ram.page_size)
    numbers = {block.name: number for number, block in enumerate(blocks)}

    def read_block(name: str, offset: int, length: int) -> bytes:
        return read_pages(source, runs[numbers[name]], ram.page_size, offset, length, pad=True)

    states = DeviceStates(source, stream.devices_offset, limits) if stream.complete else None
    cpus = states.cpus() if states else ()
    cmos = states.clock_ram() if states else None
    bodies = [*stream.early, *(states.bodies("virtio-mem") if states else ())]
    domain = bytes(getattr(source, "domain", b""))
    facts = RamEvidence(stream.machine, blocks, cmos, read_block, cpus, bodies, module_addresses(domain, blocks))
    architecture, placed, regions = layout.place(facts, given)
    notes = [*placed.notes, *(cut(note) for note in stream.notes)]
    notes += states.notes if states else ()
    assumptions = list(placed.assumptions)
    placed_blocks = {region.block for region in regions}
    if ram.ignore_shared and (shared := [b.name for b in blocks if not b.recorded and b.name in placed_blocks]):
        assumptions.append(
            "shared memory was left out of the stream (x-ignore-shared), its content is in a file of the host: "
            + ", ".join(map(cut, shared))
        )
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
        layout=replace(placed, notes=tuple(notes), assumptions=tuple(assumptions)),
        devices=states.devices if states else (),
        cpus=cpus,
    )
