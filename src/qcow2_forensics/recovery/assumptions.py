"""Header fields that the examiner states differently: a header rewritten by a faulty tool or by hand.

Nothing is written; the image is read as if its header said so.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import FormatError
from ..format.codecs import known_codecs
from ..format.header import Compression, Incompatible
from ..format.image import Image
from ..format.source import Source
from ..reader.damage_options import ASSUMPTIONS
from .patched_source import PatchedSource

_VERSION_AT, _CLUSTER_BITS_AT, _FEATURES_AT, _COMPRESSION_AT = 4, 20, 72, 104
_SHORT_HEADER = 104  # bytes of a version 3 header without a compression type


def assumed(source: Source, assume: Mapping[str, str]) -> Source:
    """Return ``source`` read as if its header had the fields in ``assume``, one of :data:`ASSUMPTIONS` each."""
    for key, value in assume.items():
        if value not in ASSUMPTIONS.get(key, ()):
            choices = ", ".join(f"{name}={'|'.join(values)}" for name, values in ASSUMPTIONS.items())
            raise ValueError(f"{key}={value} is nothing that can be assumed; choose from {choices}")
    image = Image(source, owns_source=False)
    header = image.header
    if assume and header.version == 1:
        raise FormatError("a version 1 header has other fields; nothing can be assumed of it", offset=_VERSION_AT)
    patches: list[tuple[int, bytes]] = []
    version = int(assume.get("version", header.version))
    if version != header.version:
        patches.append((_VERSION_AT, version.to_bytes(4, "big")))
    if "cluster-size" in assume:
        bits = int(assume["cluster-size"]).bit_length() - 1
        patches.append((_CLUSTER_BITS_AT, bits.to_bytes(4, "big")))
    features = header.incompatible_features
    if version < 3 and ("compression" in assume or "extended-l2" in assume):
        raise FormatError("a version 2 header has no such field; assume version=3 as well", offset=_VERSION_AT)
    if "extended-l2" in assume:
        features = _flag(features, Incompatible.EXTENDED_L2, on=assume["extended-l2"] == "on")
    if "compression" in assume:
        kind = next(codec.number for codec in known_codecs() if codec.name == assume["compression"])
        features = _flag(features, Incompatible.COMPRESSION_TYPE, on=kind != Compression.ZLIB)
        if header.header_length <= _SHORT_HEADER:
            if kind != Compression.ZLIB:
                raise FormatError(
                    f"the header of {header.header_length} bytes has no room for a compression type", offset=100
                )
        else:
            patches.append((_COMPRESSION_AT, bytes([kind])))
    if features != header.incompatible_features:
        patches.append((_FEATURES_AT, int(features).to_bytes(8, "big")))
    return PatchedSource(source, patches)


def _flag(features: int, bit: Incompatible, *, on: bool) -> int:
    return features | bit if on else features & ~bit
