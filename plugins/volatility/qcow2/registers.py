"""The plugin ``qcow2.registers.Registers``."""

from __future__ import annotations

from collections.abc import Iterator

from volatility3.framework import interfaces
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints

from . import common
from .evidence import EvidencePlugin, Row


class Registers(EvidencePlugin):
    """Lists the registers of each virtual processor, which no raw memory dump has.

    They come from the device sections of the memory stream: control registers, which lead to the page
    tables in use, and the instruction pointer.
    """

    hidden = False
    columns = (("CPU", int), ("Architecture", str), ("Register", str), ("Value", format_hints.Hex))

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        return [
            *super().get_requirements(),
            requirements.ListRequirement(
                name="register", element_type=str, description="Only these registers", optional=True, default=[]
            ),
        ]

    def _rows(self) -> Iterator[Row]:
        from qcow2_forensics.text import printable

        memory = self.stream().memory()
        if not memory.cpus:
            common.warn("the memory stream does not describe its processors")
        wanted = {name.lower() for name in self.config.get("register", None) or ()}
        for cpu in memory.cpus:
            for name, value in cpu.registers.items():
                if not wanted or name in wanted:
                    yield 0, (cpu.index, printable(cpu.architecture), printable(name), format_hints.Hex(value))
