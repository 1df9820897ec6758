"""The plugin ``qcow2.info.Info``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from volatility3.framework.renderers import format_hints

from . import choice, common
from .evidence import EvidencePlugin, FoundStream, Row, hexadecimal

if TYPE_CHECKING:
    from qcow2_forensics import GuestMemory, Image


class Fact(NamedTuple):
    """A row; the value is escaped already, as the core's own sentences are."""

    subject: str
    item: str
    value: str = ""
    address: int | None = None
    size: int | None = None


Facts = Iterator[Fact]


class Info(EvidencePlugin):
    """Shows what a QCOW2 image or QEMU memory stream is, and how its memory is laid out."""

    hidden = False
    columns = (
        ("Subject", str),
        ("Item", str),
        ("Value", str),
        ("Address", format_hints.Hex),
        ("Size", format_hints.Hex),
    )

    def _rows(self) -> Iterator[Row]:
        from qcow2_forensics import NotQcow2, Qcow2Error
        from qcow2_forensics.text import printable

        try:
            image = self.image()
        except NotQcow2:
            image = None
        facts: list[Facts] = [] if image is None else [_image_facts(image)]
        try:
            stream = self.stream()
            memory = stream.memory()
            facts += [_memory_facts(stream, memory), _kernel_facts(memory)]
        except (Qcow2Error, ImportError) as error:
            common.warn(f"no memory is shown: {error}")
        for fact in chain(*facts):
            shown = fact.subject, printable(fact.item), fact.value
            yield 0, (*shown, hexadecimal(fact.address), hexadecimal(fact.size))


def _image_facts(image: Image) -> Facts:
    from qcow2_forensics.text import printable

    header = image.header
    yield Fact("image", "file", printable(image.name), None, image.file_size)
    yield Fact("image", "version", str(header.version))
    yield Fact("image", "virtual disk", size=header.size)
    yield Fact("image", "cluster", size=image.cluster_size)
    count = str(len(image.snapshots))
    if image.unreadable("snapshots"):
        count = f"unknown: {count} can be read"
    yield Fact("image", "snapshots", count)
    for name, value in (("backing file", image.backing_name), ("data file", image.data_file_name)):
        if name.replace(" ", "_") in image.unreadable_facts:
            yield Fact("image", name, "unknown: it cannot be read")
        elif value is not None:
            yield Fact("image", name, printable(value))
    if image.encryption:
        yield Fact("image", "encryption", image.encryption)
    for problem in image.problems:
        yield Fact("image", "problem", problem.message, problem.offset)


_HINTS = ("cr3", "lstar", "gs_base", "kernel_gs_base")  # what leads to a kernel: of use where no plugin finds it


def _kernel_facts(memory: GuestMemory) -> Facts:
    """Yield which kernel is in the memory, and which symbols Volatility needs for it."""
    from qcow2_forensics import find_kernel, uses_five_levels
    from qcow2_forensics.text import printable

    for cpu in memory.cpus[:1]:
        for name in _HINTS:
            if value := cpu.registers.get(name):
                yield Fact("processor", name, "", value)
    if any(cpu.runs_nested_guest for cpu in memory.cpus):
        yield Fact("processor", "nested", "a guest of this guest was running; the registers are those of the inner one")
    if uses_five_levels(memory):
        yield Fact("processor", "paging", "five levels (LA57)")
    found = find_kernel(memory)
    if found is None:
        yield Fact("kernel", "not found", "neither a Linux banner nor the debug record of a Windows kernel")
        return
    yield Fact("kernel", found.system, printable(found.identity), found.address)
    yield Fact("symbols", "file", f"{printable(found.symbol_file)} below a folder of Volatility's -s")
    if found.package:
        yield Fact("symbols", "package", found.package)
    for command in found.commands:
        yield Fact("symbols", "command", command)


def _memory_facts(stream: FoundStream, memory: GuestMemory) -> Facts:
    from qcow2_forensics.text import printable

    layout = memory.layout
    if stream.snapshot is not None:
        yield Fact("memory", "snapshot", choice.describe(stream.snapshot))
    elif stream.unlisted:
        yield Fact("memory", "snapshot", stream.unlisted)
    yield Fact("memory", "stream", "complete" if memory.complete else "cut off", None, stream.source.size)
    yield Fact("memory", "machine", printable(memory.machine) or "not recorded")
    yield Fact("memory", "architecture", memory.architecture or "unknown")
    yield Fact("memory", "processors", str(len(memory.cpus)))
    yield Fact("layout", "decided by", f"{layout.method}, order by {layout.order}")
    for note in layout.notes:
        yield Fact("layout", "because", note)
    for assumption in layout.assumptions:
        yield Fact("layout", "assumed", assumption)
    for check in layout.checks:
        yield Fact("layout", "checked", check)
    for address, length in layout.doubts:
        yield Fact("layout", "in doubt", "", address, length)
    for region, reason in zip(memory.regions, layout.reasons, strict=True):
        where = f"from block offset {region.block_offset:#x}: {reason}"
        yield Fact("region", region.block, where, region.address, region.length)
    placed = {region.block for region in memory.regions}
    for block in memory.blocks:
        where = "placed" if block.name in placed else "at no known address"
        yield Fact("block", block.name, f"{where}, {block.recorded:#x} bytes recorded", None, block.size)
    for device in memory.devices:
        what = f"instance {device.instance}, version {device.version}"
        yield Fact("device", device.name, what, device.offset, device.length)
