"""What a guest memory is, as plain data and in lines: snapshot, layout, registers, kernel and its symbols."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..text import cut, plural, printable, size

if TYPE_CHECKING:
    from ..memory import GuestMemory

_CPUS_SHOWN = 8


def snapshot_of(memory: GuestMemory) -> str | None:
    """Return which snapshot the memory is of, in words; None for a stream that is in none."""
    from ..reader.vm_state import VmState

    state = memory.source
    if not isinstance(state, VmState):
        return None
    return state.unlisted if state.snapshot is None else f"{cut(state.snapshot.id)} ({cut(state.snapshot.name)})"


def layout_facts(memory: GuestMemory) -> dict[str, Any]:
    """Return where the RAM lies, why, and what is missing of it."""
    layout = memory.layout
    return {
        "snapshot": snapshot_of(memory),
        "machine": memory.machine,
        "regions": [
            {"address": region.address, "length": region.length, "block": region.block, "reason": reason}
            for region, reason in zip(memory.regions, layout.reasons, strict=True)
        ],
        "notes": list(layout.notes),
        "assumptions": list(layout.assumptions),
        "checks": list(layout.checks),
        "doubts": [{"address": address, "length": length} for address, length in layout.doubts],
        "missing_bytes": memory.missing,
        "complete": memory.complete,
    }


def processor_facts(memory: GuestMemory) -> dict[str, Any]:
    """Return the processors, devices and kernel; registers are hexadecimal texts, as JSON has no numbers of 64 bits."""
    from ..memory import kernel

    found = kernel.find_kernel(memory)
    return {
        "architecture": memory.architecture,
        "ram_bytes": sum(region.length for region in memory.regions),
        "stream_bytes": memory.source.size,
        "processors": [
            {
                "index": cpu.index,
                "architecture": cpu.architecture,
                "registers": {name: f"{value:#x}" for name, value in cpu.registers.items()},
            }
            for cpu in memory.cpus
        ],
        "five_level_paging": kernel.uses_five_levels(memory),
        "devices": list(dict.fromkeys(device.name for device in memory.devices)),
        "kernel": None if found is None else {**asdict(found), "commands": list(found.commands)},
    }


def layout_lines(facts: Mapping[str, Any], *, zeros: bool = False) -> Iterator[str]:
    """Yield the lines about :func:`layout_facts`; ``zeros`` says that missing RAM was written as zeros."""
    yield f"snapshot: {printable(facts['snapshot'] or 'none, the file is a stream itself')}"
    for region in facts["regions"]:
        end = region["address"] + region["length"] - 1
        yield f"  {region['address']:#014x} - {end:#014x}  {printable(region['block'])}"
    for assumption in facts["assumptions"]:
        yield f"assumed: {printable(assumption)}"
    for check in facts["checks"]:
        yield f"checked: {printable(check)}"
    if facts["missing_bytes"]:
        yield f"{facts['missing_bytes']} bytes of RAM are not in the stream" + (": zeros" if zeros else "")


def processor_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about :func:`processor_facts`."""
    from ..memory.model import REGISTERS_SHOWN  # here: it brings numpy

    yield f"stream: {'complete' if facts['complete'] else 'cut off'}, {size(facts['stream_bytes'])}"
    for cpu in facts["processors"][:_CPUS_SHOWN]:
        known = [f"{name} {cpu['registers'][name]}" for name in REGISTERS_SHOWN if name in cpu["registers"]]
        yield f"processor {cpu['index']} ({printable(cpu['architecture'])}): {', '.join(known) or 'no registers'}"
    if len(facts["processors"]) > _CPUS_SHOWN:
        yield f"and {plural(len(facts['processors']) - _CPUS_SHOWN, 'more processor')}"
    kernel = facts["kernel"]
    if kernel is None:
        yield "kernel: neither a Linux banner nor the debug record of a Windows kernel was found"
        return
    yield f"kernel: {kernel['system']}, at {kernel['address']:#x}: {printable(kernel['identity'])}"
    yield f"symbols: {printable(kernel['symbol_file'])} below a folder of Volatility's -s"
    for command in kernel["commands"]:
        yield f"  {command}"
