"""Proposes another header field where the image's own tables and streams contradict the one it has.

Nothing is decided here: the examiner reads the image with ``--assume``, and the evidence item says with what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..census.columns import U64, Mask, big_endian
from ..errors import Qcow2Error
from ..findings import Evidence
from ..format.codecs import Codec
from ..format.header import Header
from ..format.image import Image
from ..residue.structure_detection import Geometry, l2_rows
from .facts import Facts

READ_AS = "read_as"  # the field of an evidence item whose value is what --assume takes


def other_compression(facts: Facts, codec: Codec) -> Iterator[Evidence]:
    """Yield what to assume so that streams are decoded by ``codec``; nothing where the header has no room for it."""
    yield from _first(
        facts,
        (f"compression={codec.name}", "version=3"),
        lambda header: header.compression_type == codec.number,
    )


def other_version(facts: Facts) -> Iterator[Evidence]:
    """Yield that version 3 can be assumed where the fields of that version are there and valid."""
    if facts.header.version < 3:  # the bytes of a version 2 header there are an extension, or zeros
        yield from _first(facts, ("version=3",), lambda header: header.header_length > 0)


def other_entries(facts: Facts) -> Iterator[Evidence]:
    """Yield that extended L2 entries can be assumed."""
    yield from _first(facts, ("extended-l2=on",), lambda header: header.extended_l2)


def extended_tables(facts: Facts, offsets: U64) -> Mask:
    """Return which tables hold sound extended L2 entries, of an image whose header says that they are standard."""
    geometry = Geometry.of(facts.image)._replace(extended_l2=True, version=3)
    size = facts.cluster_size
    data = b"".join(facts.read(offset, size).ljust(size, b"\0") for offset in offsets.tolist())
    return l2_rows(big_endian(data).reshape(len(offsets), -1), geometry).tables


def _first(facts: Facts, choices: tuple[str, ...], fits: Callable[[Header], bool]) -> Iterator[Evidence]:
    """Yield the first of some assumptions under which the header is valid and fits."""
    from ..recovery import assumed  # many modules, and needed only where the tables contradict the header

    for choice in choices:
        key, _, value = choice.partition("=")
        try:
            image = Image(assumed(facts.image.source, {key: value}), owns_source=False)
        except (Qcow2Error, ValueError):  # no valid header, or nothing that can be assumed
            continue
        if fits(image.header):
            yield Evidence(READ_AS, choice, 0, image.header.header_length, "header")
            return
