"""What the domain description in a libvirt save file says about memory modules.

The description is XML from evidence. It is searched for the few elements that matter and never handed to
a parser that follows entities.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice

from ..limits import LIBVIRT_DESCRIPTION_BYTES, LIBVIRT_MEMORY_ELEMENTS
from .model import Block

_MEMORY = re.compile(rb"<memory model=['\"](?:dimm|nvdimm)['\"](?:(?!</memory>).)*</memory>", re.DOTALL)
_ALIAS = re.compile(rb"<alias name=['\"]([A-Za-z0-9_-]{1,64})['\"]")
_BASE = re.compile(rb"<address type=['\"]dimm['\"][^>]*\bbase=['\"](0x[0-9a-fA-F]{1,16})['\"]")
_SIZE = re.compile(rb"<target>(?:(?!</target>).)*?<size unit=['\"](KiB|MiB|GiB)['\"]>([0-9]{1,15})</size>", re.DOTALL)
_UNITS = {b"KiB": 1 << 10, b"MiB": 1 << 20, b"GiB": 1 << 30}


def module_addresses(domain: bytes, blocks: Sequence[Block]) -> dict[str, int]:
    """Return the addresses of modules by the names of their RAM blocks, {} without a description.

    libvirt names a module's block after its alias: ``memdimm0`` for ``dimm0``. A module without an alias is
    known by its size, where no other has it.
    """
    found: dict[str, int] = {}
    nameless: list[tuple[int, int]] = []
    names = {block.name.rpartition("/")[2]: block for block in blocks}
    for element in islice(_MEMORY.finditer(domain[:LIBVIRT_DESCRIPTION_BYTES]), LIBVIRT_MEMORY_ELEMENTS):
        base = _BASE.search(element[0])
        if base is None:
            continue
        address = int(base[1], 16)
        alias = _ALIAS.search(element[0])
        block = names.get("mem" + alias[1].decode()) if alias is not None else None
        if block is not None:
            found[block.name] = address
        elif size := _SIZE.search(element[0]):
            nameless.append((int(size[2]) * _UNITS[size[1]], address))
    for size_wanted, address in nameless:
        fits = [block for block in blocks if block.size == size_wanted and block.name not in found]
        if len(fits) == 1 and [size for size, _ in nameless].count(size_wanted) == 1:
            found[fits[0].name] = address
    return found
