"""Decodes every compressed cluster once and says which streams do not give exactly one cluster."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from ..account.streams import Decoded, decode_all
from ..census import Tables
from ..census.arrays import distinct, is_among
from ..census.columns import compressed_extents
from ..census.issues import spread
from ..errors import Qcow2Error
from ..findings import Evidence
from ..format.codecs import Codec, codec_of, known_codecs
from ..format.entries import compressed_descriptor
from ..format.header import SECTOR
from ..limits import SAMPLES
from .entry_evidence import item_evidence
from .facts import Facts
from .header_assumptions import other_compression
from .overlap import evenly
from .rules import Deferred, OneFinding

_SHOWN = 20  # of those, listed


def decoded_streams(facts: Facts) -> Decoded:
    """Return what decoding every live stream showed; for :meth:`Facts.once`."""
    return decode_all(facts.image, facts.census)


def undecodable(facts: Facts) -> Iterator[Deferred | OneFinding]:
    """Yield the compressed entries whose stream is bad, too short, or too long.

    All of them are one finding where another compression type decodes them. :class:`LimitExceeded`
    follows them where decoding every stream would take too long.
    """
    decoded = facts.once(decoded_streams)
    other = _other_type(facts, decoded)
    if other is not None:
        yield _mistaken(facts, decoded, other)
        return
    lost = compressed_extents(decoded.failed, facts.header)[0] >= np.uint64(
        facts.image.file_size
    )  # zeros do not decode
    faulty = [entry for entry in decoded.failed[~lost].tolist() if _fault(facts, entry)]
    bad = distinct(np.concatenate((decoded.failed[lost], np.asarray(faulty, np.uint64))))
    if len(bad):
        for tables in facts.census.tables():
            places, width = np.flatnonzero(is_among(tables.entries, bad)), tables.entries.shape[1]
            shown = spread(places, places // width)
            for more, place in zip(range(len(shown) - 1, -1, -1), shown.tolist(), strict=True):
                row, column = divmod(place, width)
                count = 1 if more else 1 + len(places) - len(shown)
                yield Deferred(partial(_evidence, facts, tables, row, column), int(tables.offsets[row]), count)
    if decoded.stopped is not None:
        raise decoded.stopped


def _other_type(facts: Facts, decoded: Decoded) -> Codec | None:
    """Return the codec that decodes the streams which the header's own does not; None where none does."""
    failed = evenly(decoded.failed, SAMPLES).tolist()
    for codec in known_codecs():
        if codec.number != facts.header.compression_type and failed:
            streams = (compressed_descriptor(entry, facts.header.cluster_bits) for entry in failed)
            if all(_decodes(codec, facts.read(*stream), facts.cluster_size) for stream in streams):
                return codec
    return None


def _decodes(codec: Codec, stored: bytes, size: int) -> bool:
    try:
        return bool(stored) and len(codec.decode(stored, size)) == size
    except (ValueError, Qcow2Error):
        return False


def _mistaken(facts: Facts, decoded: Decoded, other: Codec) -> OneFinding:
    """Return the finding that the header names the wrong compression type."""
    own, name = codec_of(facts.header.compression_type).name, other.name
    evidence = [facts.field("incompatible_features"), facts.field("compression_type")]
    if len(decoded.failed) == len(facts.census.compressed_entries):  # else some would no longer decode
        evidence += other_compression(facts, other)
    for entry in evenly(decoded.failed, _SHOWN).tolist():
        host, length = compressed_descriptor(entry, facts.header.cluster_bits)
        evidence.append(Evidence(f"stream that decodes as {name}", None, host, length, "compressed cluster"))
    note = (
        "consistent with a header that was rewritten with another compression type; with that type the data can be read"
    )
    title = f"compressed clusters are {name}, the header says {own}"
    return OneFinding(evidence, title=title, note=note, count=len(decoded.failed))


def _evidence(facts: Facts, tables: Tables, row: int, column: int) -> Evidence:
    item = tables.item(row, column)
    host, length = compressed_descriptor(item.value, tables.cluster_bits)
    return item_evidence(facts, item, f"entry of a stream at {host:#x}, {length} bytes: {_fault(facts, item.value)}")


def _fault(facts: Facts, entry: int) -> str | None:
    offset, size = compressed_descriptor(entry, facts.header.cluster_bits)
    stored = facts.read(offset, size)
    cut = f"; {size - len(stored)} bytes lie past the end of the file" if len(stored) < size else ""
    stored = stored.ljust(size if stored else SECTOR, b"\0")  # of zeros alone a sector is enough to fail
    codec = codec_of(facts.header.compression_type)
    try:
        codec.decode(stored, facts.cluster_size)
    except ValueError as error:
        return f"{error}{cut}"
    return (
        f"the {codec.name} stream gives more than a cluster" if _is_longer(codec, stored, facts.cluster_size) else None
    )


def _is_longer(codec: Codec, stored: bytes, size: int) -> bool:
    """Whether a stream that decodes goes on after one cluster, where the reader keeps the first cluster of it."""
    try:
        return codec.cuts and bool(codec.decode(stored, size + 1))
    except ValueError:
        return False
