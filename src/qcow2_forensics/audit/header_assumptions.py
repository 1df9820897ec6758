"""Proposes another header field where the image's own tables and streams contradict the one it has.

Nothing is decided here: the examiner reads the image with ``--assume``, and the evidence item says with what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..census.arrays import U64, Mask
from ..census.columns import is_packed, named_offsets, table_words
from ..errors import Qcow2Error
from ..findings import Evidence
from ..format.codecs import Codec
from ..format.header import Header
from ..format.header_rules import header_problems
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
    """Yield that L2 entries of the other kind can be assumed: extended ones, or standard ones."""
    is_extended = facts.header.extended_l2
    choice = "extended-l2=off" if is_extended else "extended-l2=on"
    yield from _first(facts, (choice,), lambda header: header.extended_l2 != is_extended)


def proposed(facts: Facts, choice: str) -> Iterator[Evidence]:
    """Yield that a field can be assumed; nothing where the header is not valid with it."""
    yield from _first(facts, (choice,), lambda header: not list(header_problems(header, facts.limits, [])))


def extended_tables(facts: Facts, offsets: U64) -> Mask:
    """Return which tables hold sound extended L2 entries, of an image whose header says that they are standard."""
    geometry = Geometry.of(facts.image)._replace(extended_l2=True, version=3)
    return l2_rows(table_words(facts.image, offsets, facts.cluster_size), geometry).tables


def standard_tables(facts: Facts, offsets: U64, are_leaked: Callable[[U64], Mask]) -> Mask:
    """Return which tables hold sound standard L2 entries, of an image whose header says that they are extended.

    Every second of them would be a bitmap then, and the cluster that it names leaked, which ``are_leaked`` says of
    host offsets. No bitmap names leaked clusters but by chance.
    """
    words = table_words(facts.image, offsets, facts.cluster_size)
    second = words[:, 1::2]
    used = (second != 0) & ~is_packed(second)
    leaked = used & are_leaked(named_offsets(second).ravel()).reshape(second.shape)
    counts, leaks = np.count_nonzero(used, axis=1), np.count_nonzero(leaked, axis=1)
    sound = l2_rows(words, Geometry.of(facts.image)._replace(extended_l2=False)).tables
    found: Mask = sound & (leaks > 0) & (2 * leaks >= counts)
    return found


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
