"""The address space of a Linux guest, placed by registers: Volatility's own layer reads through it."""

from __future__ import annotations

import pytest

pytest.importorskip("volatility3.framework", reason="volatility3 is absent")

from volatility3.framework import contexts
from volatility3.framework.layers import intel, physical

from tests.test_guest_memory_kernel_place import BANNER, IDT, SYMBOLS, VIRTUAL, guest
from tests.volatility_tools import common  # loads our plugins

from volatility3.plugins.qcow2 import linux_kernel  # isort: skip

assert common


@pytest.mark.parametrize("levels", [4, 5])
def test_the_kernel_is_read_through_four_levels_of_page_tables_and_through_five(levels: int) -> None:
    memory = guest(levels)
    found = linux_kernel.place(memory, BANNER, SYMBOLS)
    assert found is not None
    kind, settings = found
    assert kind is (linux_kernel.FiveLevelIntel32e if levels == 5 else intel.Intel32e)
    context = contexts.Context()
    context.layers.add_layer(physical.BufferDataLayer(context, "Memory", "Memory", bytes(memory.content)))
    for key, value in {"memory_layer": "Memory", **settings}.items():
        context.config[f"Kernel.{key}"] = value
    layer = kind(context, "Kernel", "Kernel", {"os": "Linux"})
    context.layers.add_layer(layer)
    assert layer.read(SYMBOLS["linux_banner"] + VIRTUAL, len(BANNER)) == BANNER
    assert layer.is_valid(IDT)
    assert not layer.is_valid(0x1000)
    assert not layer.is_valid(SYMBOLS["linux_banner"])
    rebuilt = layer.build_configuration()
    assert rebuilt["page_map_offset"] == settings["page_map_offset"]


def test_a_kernel_that_the_registers_do_not_show_is_left_to_volatility() -> None:
    assert linux_kernel.place(guest(), b"Linux version 9", SYMBOLS) is None
    assert linux_kernel.place(guest(), BANNER, {}) is None
