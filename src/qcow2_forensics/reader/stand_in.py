"""Whether a file can be the one that a name in an image leads to, as far as the image describes it."""

from __future__ import annotations

from ..format.header import SECTOR
from ..format.image import Image
from ..format.source import Source
from .foreign import probe
from .references import Role

_FOOTER = b"conectix"  # of a fixed VHD, whose only mark is at its end


def misfit(source: Source, role: Role, recorded: str | None, image: Image) -> str:
    """Return why ``source`` cannot be the file that ``image`` names; empty when it can.

    ``recorded`` is the format the image, or the name itself, says it has.
    """
    if role == "data":
        if image.header.raw_data_file and source.size < image.disk_size:
            return f"it has {source.size} bytes, and the disk {image.disk_size}"
        return "it is empty" if source.size == 0 else ""
    if source.size == 0:
        return "it is empty"
    if recorded is None:
        return ""
    found = probe(source)
    if found == "raw" and recorded == "vpc" and source.read(max(0, source.size - SECTOR), 8) == _FOOTER:
        return ""
    return "" if found == recorded else f"it starts as {found}, and {recorded} is recorded"
