"""The plugin ``qcow2.info.Info``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from volatility3.framework.renderers import format_hints

from . import choice, common
from .evidence import EvidencePlugin, Row, Stream, hexadecimal

if TYPE_CHECKING:
    from qcow2_forensics import GuestMemory, Image

# Subject, item, value, address and size; values are escaped already, as the core's own sentences are.
Facts = Iterator[tuple[str, str, str, int | None, int | None]]


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
        for part in facts:
            for subject, item, value, address, size in part:
                yield 0, (subject, printable(item), value, hexadecimal(address), hexadecimal(size))


def _image_facts(image: Image) -> Facts:
    from qcow2_forensics.text import printable

    header = image.header
    yield "image", "file", printable(image.name), None, image.file_size
    yield "image", "version", str(header.version), None, None
    yield "image", "virtual disk", "", None, header.size
    yield "image", "cluster", "", None, image.cluster_size
    count = str(len(image.snapshots))
    if image.unreadable("snapshots"):
        count = f"unknown: {count} can be read"
    yield "image", "snapshots", count, None, None
    for name, value in (("backing file", image.backing_name), ("data file", image.data_file_name)):
        if name.replace(" ", "_") in image.unreadable_facts:
            yield "image", name, "unknown: it cannot be read", None, None
        elif value is not None:
            yield "image", name, printable(value), None, None
    if image.encryption:
        yield "image", "encryption", image.encryption, None, None
    for problem in image.problems:
        yield "image", "problem", problem.message, problem.offset, None


_HINTS = ("cr3", "lstar", "gs_base", "kernel_gs_base")  # what leads to a kernel: of use where no plugin finds it


def _kernel_facts(memory: GuestMemory) -> Facts:
    """Yield which kernel is in the memory, and which symbols Volatility needs for it."""
    from qcow2_forensics import find_kernel, uses_five_levels
    from qcow2_forensics.text import printable

    for cpu in memory.cpus[:1]:
        for name in _HINTS:
            if value := cpu.registers.get(name):
                yield "processor", name, "", value, None
    if any(cpu.runs_nested_guest for cpu in memory.cpus):
        yield (
            "processor",
            "nested",
            "a guest of this guest was running; the registers are those of the inner one",
            None,
            None,
        )
    if uses_five_levels(memory):
        yield "processor", "paging", "five levels (LA57)", None, None
    found = find_kernel(memory)
    if found is None:
        yield "kernel", "not found", "neither a Linux banner nor the debug record of a Windows kernel", None, None
        return
    yield "kernel", found.system, printable(found.identity), found.address, None
    yield "symbols", "file", f"{printable(found.symbol_file)} below a folder of Volatility's -s", None, None
    if found.package:
        yield "symbols", "package", found.package, None, None
    for command in found.commands:
        yield "symbols", "command", command, None, None


def _memory_facts(stream: Stream, memory: GuestMemory) -> Facts:
    from qcow2_forensics.text import printable

    layout = memory.layout
    if stream.snapshot is not None:
        yield "memory", "snapshot", choice.describe(stream.snapshot), None, None
    elif stream.unlisted:
        yield "memory", "snapshot", stream.unlisted, None, None
    yield "memory", "stream", "complete" if memory.complete else "cut off", None, stream.source.size
    yield "memory", "machine", printable(memory.machine) or "not recorded", None, None
    yield "memory", "architecture", memory.architecture or "unknown", None, None
    yield "memory", "processors", str(len(memory.cpus)), None, None
    yield "layout", "decided by", f"{layout.method}, order by {layout.order}", None, None
    for note in layout.notes:
        yield "layout", "because", note, None, None
    for assumption in layout.assumptions:
        yield "layout", "assumed", assumption, None, None
    for check in layout.checks:
        yield "layout", "checked", check, None, None
    for address, length in layout.doubts:
        yield "layout", "in doubt", "", address, length
    for region, reason in zip(memory.regions, layout.reasons, strict=True):
        where = f"from block offset {region.block_offset:#x}: {reason}"
        yield "region", region.block, where, region.address, region.length
    placed = {region.block for region in memory.regions}
    for block in memory.blocks:
        where = "placed" if block.name in placed else "at no known address"
        yield "block", block.name, f"{where}, {block.recorded:#x} bytes recorded", None, block.size
    for device in memory.devices:
        yield (
            "device",
            device.name,
            f"instance {device.instance}, version {device.version}",
            device.offset,
            device.length,
        )
