"""Stacks the page tables of a Linux guest without scanning its memory and without reading its symbols twice.

Volatility looks for a kernel by scanning all of memory, and its stackers read the whole symbol file for a layer that
is then built anew and given symbols of its own. The processors in the stream say where the kernel lies, so
a few addresses from the symbol file are enough here, and Volatility reads the file once. Where the registers
do not show the kernel this stacker declines, and Volatility's own come after it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from volatility3.framework import constants, exceptions, interfaces
from volatility3.framework.automagic import symbol_cache
from volatility3.framework.layers import intel, resources

from . import common, ram

if TYPE_CHECKING:
    from qcow2_forensics import GuestMemory

BANNER_KEY = "kernel_banner"  # of a layer's configuration: with it Volatility's symbol finder does not scan
_IDENTITY = 1024  # bytes of a banner at most
_KEPT = 4  # symbol files whose addresses are remembered in this process

FIVE_LEVELS = (
    "the guest uses five levels of page tables (LA57), which Volatility's own layers do not read (seen with 2.28): plugins "
    "find nothing, on raw dumps too. A Linux guest is read here when its symbols are known and its registers show the kernel"
)

_addresses: dict[str, dict[str, int]] = {}


class FiveLevelIntel32e(intel.Intel32e):
    """A 64-bit address space of five levels of page tables (LA57), which Volatility 2.28 does not have."""

    _maxphyaddr = 52
    _maxvirtaddr = 57
    _structure = [("page map layer 5", 9, False), *intel.Intel32e._structure]  # noqa: RUF012 - as in its parent


class QemuLinuxStacker(interfaces.automagic.StackerLayerInterface):
    """Stacks the kernel's address space on guest memory whose processors show where the kernel lies."""

    stack_order = 33  # before Volatility's own for Linux
    exclusion_list = ["mac", "windows"]  # noqa: RUF012 - as in its parent

    @classmethod
    def stack(
        cls,
        context: interfaces.context.ContextInterface,
        layer_name: str,
        progress_callback: constants.ProgressCallback = None,
    ) -> interfaces.layers.DataLayerInterface | None:
        """Return the kernel's address space; None where the registers do not show it or its symbols are not known."""
        from qcow2_forensics import uses_five_levels

        memory = context.layers[layer_name]
        if not isinstance(memory, ram.QemuRamLayer):
            return None
        found = identify(memory.view)
        if found is None:
            return None
        identifier, symbol_file = found
        settings = place(memory.view, identifier, addresses(symbol_file))
        if settings is None:
            if uses_five_levels(memory.view):
                common.warn(FIVE_LEVELS)
            common.vollog.info("The registers do not show where the kernel lies; Volatility scans for it")
            return None
        kind, values = settings
        name = context.layers.free_layer_name("IntelLayer")
        values |= {"memory_layer": layer_name, BANNER_KEY: identifier.decode("latin-1")}
        path = common.configure(context, "IntelHelper", name, **values)
        return kind(context, path, name, {"os": "Linux"})


def identify(memory: GuestMemory) -> tuple[bytes, str] | None:
    """Return the identifier of the Linux kernel in memory and the location of its symbols; None when there are none."""
    from qcow2_forensics import find_kernel

    found = find_kernel(memory, everywhere=False)
    if found is None or found.system != "linux":
        return None
    known = symbol_cache.load_cache_manager().get_identifier_dictionary(operating_system="linux")
    content = memory.read(found.address, _IDENTITY, pad=True)
    return next(((key, place) for key, place in known.items() if key and place and content.startswith(key)), None)


def place(
    memory: GuestMemory, identifier: bytes, symbols: dict[str, int]
) -> tuple[type[intel.Intel32e], dict[str, Any]] | None:
    """Return the kind of the kernel's address space and its settings; None where the registers do not show it."""
    from qcow2_forensics import place_linux

    found = place_linux(memory, symbols, identifier.rstrip(b"\0"))
    if found is None:
        return None
    kind = FiveLevelIntel32e if found.levels == 5 else intel.Intel32e
    return kind, {"page_map_offset": found.page_table, "kernel_virtual_offset": found.virtual_shift}


def addresses(location: str) -> dict[str, int]:
    """Return the addresses that matter here from a symbol file; it is not parsed, which is what takes the time."""
    from qcow2_forensics import KERNEL_SYMBOLS

    if location not in _addresses:
        while len(_addresses) >= _KEPT:
            del _addresses[next(iter(_addresses))]
        try:
            with resources.ResourceAccessor().open(location) as file:
                text = file.read().decode("utf-8")
        except (OSError, EOFError, ValueError, exceptions.VolatilityException) as error:
            common.vollog.info("The symbol file %s cannot be read: %s", location, error)
            return {}
        _addresses[location] = _find(text, KERNEL_SYMBOLS)
    return _addresses[location]


def _find(text: str, names: Iterable[str]) -> dict[str, int]:
    """Return the addresses of symbols in the text of a symbol file."""
    found: dict[str, int] = {}
    decoder = json.JSONDecoder()
    for match in re.finditer(rf'"({"|".join(map(re.escape, names))})"\s*:\s*(?=\{{)', text):
        try:
            symbol, _ = decoder.raw_decode(text, match.end())
        except ValueError:
            continue
        address = symbol.get("address")
        if isinstance(address, int):
            found.setdefault(match[1], address)
    return found
