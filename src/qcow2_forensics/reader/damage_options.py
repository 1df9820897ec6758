"""What an examiner states about a damaged image: header fields to assume, and the size of a disk.

``QCOW2_ASSUME`` and ``QCOW2_VIRTUAL_SIZE`` state the same for tools that take no options of ours, and for worker
processes.
"""

from __future__ import annotations

import os

from ..errors import Qcow2Error
from ..format.codecs import known_codecs
from ..text import printable

ASSUME_VARIABLE = "QCOW2_ASSUME"
VIRTUAL_SIZE_VARIABLE = "QCOW2_VIRTUAL_SIZE"

# Header fields that can be assumed, and the values of each.
ASSUMPTIONS = {
    "compression": tuple(codec.name for codec in known_codecs()),
    "extended-l2": ("on", "off"),
    "version": ("2", "3"),
    "cluster-size": tuple(str(1 << bits) for bits in range(9, 22)),
}


def parse_size(text: str) -> int:
    """Return a number of bytes written as ``4096``, ``64K``, ``20G`` or ``1.5T``; raises :class:`Qcow2Error`."""
    units = {unit: 1024**power for power, unit in enumerate("BKMGTPE")}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "B")
    try:
        count = float(number) * units[unit]
    except ValueError:
        count = -1
    if not 0 < count < 1 << 63:
        raise Qcow2Error(f"{printable(text)} is not a size; write it as 4096, 64K or 20G")
    return int(count)


def parse_assumptions(text: str) -> dict[str, str]:
    """Return header fields written as ``extended-l2=on,version=3``; raises :class:`Qcow2Error` for any other."""
    fields: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if value not in ASSUMPTIONS.get(name, ()):
            known = ", ".join(f"{field}={'|'.join(values)}" for field, values in ASSUMPTIONS.items())
            raise Qcow2Error(f"{printable(item)} cannot be assumed; choose from {known}")
        fields[name] = value
    return fields


def assumptions_from_environment() -> dict[str, str]:
    """Return the header fields that ``QCOW2_ASSUME`` states, none where it is not set; raises :class:`Qcow2Error`."""
    return parse_assumptions(os.environ.get(ASSUME_VARIABLE, ""))


def virtual_size_from_environment() -> int | None:
    """Return the size that ``QCOW2_VIRTUAL_SIZE`` states, None where it is not set; raises :class:`Qcow2Error`."""
    text = os.environ.get(VIRTUAL_SIZE_VARIABLE)
    return parse_size(text) if text else None
