"""Free clusters are looked at many at a time; each is reported as what it is when looked at alone.

The oracle is the format's rules written out one entry after another, in plain Python.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_forensics.census import take_census
from qcow2_forensics.format.image import Image
from qcow2_forensics.format.snapshot_table import SnapshotEntry
from qcow2_forensics.format.source import BytesSource, FileSource, Source
from qcow2_forensics.residue import Residue, content, former_clusters, former_tables, scan, structure_detection
from qcow2_forensics.residue.model import Piece
from tests.image_builder import COMPRESSED, COPIED, Builder

SIZE = 512
FILE = 64 * SIZE
GEOMETRY = structure_detection.Geometry(3, 9, FILE)
GEOMETRIES = {
    "version 3": GEOMETRY,
    "version 2": GEOMETRY._replace(version=2),
    "subclusters": GEOMETRY._replace(extended_l2=True),
    "data file": GEOMETRY._replace(external_data=True),
}
ZERO = 1


# --- the rules, an entry at a time -----------------------------------------------------------------


def _plain_is_sound(entry: int, geometry: structure_detection.Geometry) -> bool:
    flagged = geometry.version >= 3 and not geometry.extended_l2
    host = entry & 0x00FF_FFFF_FFFF_FE00
    if entry & ~(0x00FF_FFFF_FFFF_FE00 | COPIED | (ZERO if flagged else 0)):
        return False
    if host == 0:
        return flagged and entry == ZERO
    return geometry.external_data or (host % geometry.cluster_size == 0 and host < geometry.file_size)


def _stream_is_sound(entry: int, geometry: structure_detection.Geometry) -> bool:
    host = entry & ((1 << (70 - geometry.cluster_bits)) - 1)
    return not entry & COPIED and host < geometry.file_size


def _l2_is_sound(words: list[int], geometry: structure_detection.Geometry) -> bool:
    pairs = zip(words[::2], words[1::2], strict=True) if geometry.extended_l2 else ((word, 0) for word in words)
    for entry, bitmap in pairs:
        if entry & COMPRESSED:
            if bitmap or not _stream_is_sound(entry, geometry):
                return False
        elif entry and not _plain_is_sound(entry, geometry):
            return False
        allocated, zeros = bitmap & 0xFFFF_FFFF, bitmap >> 32
        if allocated & zeros or (allocated and not entry):
            return False
    return any(words)


def _l1_is_sound(words: list[int], geometry: structure_detection.Geometry) -> bool:
    hosts = [word & ~COPIED for word in words if word]
    fine = all(host and host % geometry.cluster_size == 0 and host < geometry.file_size for host in hosts)
    return fine and len(set(hosts)) == len(hosts) > 0


def _counts_are_likely(data: bytes, order: int) -> bool:
    def of(width: int) -> bool:
        counts = [int.from_bytes(data[at : at + width], "big") for at in range(0, len(data), width)]
        used = [count for count in counts if count]
        most = max(used.count(count) for count in range(1, 2 if width == 1 else 9))
        return len(used) >= 4 and max(used) <= 64 and most * 2 >= len(used)

    return any(of(width) for width in ((1, 2, 4, 8) if order == 3 else (2, 4, 8)))


HOSTS = st.integers(0, 66).map(lambda number: number * SIZE)
ENTRIES = st.one_of(
    st.just(0),
    st.builds(lambda host, flags: host | flags, HOSTS, st.sampled_from([0, COPIED, ZERO, 2, 1 << 56])),
    st.builds(lambda host, flags: host | flags | COMPRESSED, st.integers(0, FILE + 9), st.sampled_from([0, COPIED])),
)
BITMAPS = st.sampled_from([0, 1, 1 << 32, 1 << 32 | 1, 1 << 33 | 1])
# Few different words, so that tables that are sound to the end come about.
CLUSTERS = st.lists(ENTRIES, min_size=1, max_size=3).flatmap(
    lambda words: st.lists(st.sampled_from(words), min_size=64, max_size=64)
)
PAIRS = st.tuples(CLUSTERS, st.lists(BITMAPS, min_size=64, max_size=64)).map(
    lambda both: [word for pair in zip(both[0][:32], both[1][:32], strict=True) for word in pair]
)
COUNTERS = st.lists(st.sampled_from([0, 1, 1, 2, 64, 65]), min_size=64, max_size=64)


@pytest.mark.parametrize("name", GEOMETRIES)
@given(rows=st.lists(CLUSTERS | PAIRS | COUNTERS, min_size=1, max_size=6))
def test_rows_are_sound_tables_exactly_when_each_entry_is(name: str, rows: list[list[int]]) -> None:
    geometry, words = GEOMETRIES[name], np.asarray(rows, dtype=np.uint64)
    level2, level1 = structure_detection.l2_rows(words, geometry), structure_detection.l1_rows(words, geometry)
    assert level2.tables.tolist() == [_l2_is_sound(row, geometry) for row in rows]
    assert level1.tables.tolist() == [_l1_is_sound(row, geometry) for row in rows]
    for rule, found in ((structure_detection.l2_rows, level2), (structure_detection.l1_rows, level1)):
        assert set(np.flatnonzero(found.tables)) <= set(structure_detection.judged(rule, words, geometry)[0])
    for number in range(len(rows)):
        alone = structure_detection.l2_rows(words[number : number + 1], geometry)
        assert alone.tables[0] == level2.tables[number]
        assert alone.targets.tolist() == [level2.targets[number].tolist()]


@pytest.mark.parametrize("order", [3, 4, 6])
@given(rows=st.lists(COUNTERS, min_size=1, max_size=5), width=st.sampled_from([1, 2, 4, 8]))
def test_rows_are_refcount_blocks_exactly_when_their_counts_are_small_and_mostly_the_same(
    order: int, rows: list[list[int]], width: int
) -> None:
    data = b"".join(b"".join(count.to_bytes(width, "big") for count in row) * (8 // width) for row in rows)
    found = structure_detection.refcount_rows(np.frombuffer(data, np.uint8).reshape(-1, SIZE), order)
    assert found.tolist() == [_counts_are_likely(data[at : at + SIZE], order) for at in range(0, len(data), SIZE)]


@given(st.lists(st.sampled_from([b"", *(bytes(at) + magic for at, magic, _ in content.SIGNATURES)]), max_size=5))
def test_signatures_of_rows_are_those_of_each(heads: list[bytes]) -> None:
    heads += [b"MZ".ljust(60, b"\0") + b"\x40\0\0\0PE\0\0", bytes(510) + b"\x55\xaa", bytes(0x438) + b"\x53\xef"]
    rows = [head.ljust(65536, b"\0") for head in heads]
    each = {number: name for number, row in enumerate(rows) if (name := content.signature(row))}
    assert content.signatures(np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 65536)) == each


# --- pieces -----------------------------------------------------------------------------------------


def _image(clusters: Iterable[bytes]) -> bytes:
    """An image of 512-byte clusters with some more behind its own."""
    with tempfile.TemporaryDirectory() as name:
        data = Builder(cluster_bits=9, size=1 << 20).write(Path(name) / "disk").read_bytes()
    return data.ljust(-(-len(data) // SIZE) * SIZE, b"\0") + b"".join(clusters)


BLANK = _image([])


def _found(source: Source) -> list[Piece]:
    return list(Residue(Image(source)).unclaimed())


def _entries(source: Source) -> list[SnapshotEntry]:
    """Return the snapshot entries in free space, those of equal entries too."""
    image = Image(source)
    each = (seen.snapshots.values() for _, seen in scan.tables(image, take_census(image)))
    return [entry for found in each for entries in found for entry in entries]


def _words(*words: int) -> bytes:
    return struct.pack(f">{len(words)}Q", *words).ljust(SIZE, b"\0")


def _snapshot_entry() -> bytes:
    fixed = struct.pack(">QIHHIIQII", 512, 1, 1, 4, 0, 0, 0, 0, 16)
    return (fixed + struct.pack(">QQ", 0, 1 << 20) + b"7gone").ljust(SIZE, b"\0")


_AT = len(BLANK)
KINDS = {
    "zeros": bytes(SIZE),
    "text": b"the quick brown fox jumps over the lazy dog ".ljust(SIZE, b"."),
    "elf": b"\x7fELF".ljust(SIZE, b"\x90"),
    "boot": bytes(510) + b"\x55\xaa",
    "l2": _words(_AT | COPIED, _AT + SIZE | COPIED, 1),
    "zero flags": _words(1, 1),
    "l1": _words(_AT + 4 * SIZE | COPIED),
    "refcounts": b"\0\1" * 256,
    "snapshot": _snapshot_entry(),
    "vm state": b"QEVM\0\0\0\3".ljust(SIZE, b"v"),
}


@given(
    names=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=30),
    cut=st.integers(0, SIZE - 1),
    clusters=st.integers(1, 7),
)
def test_pieces_are_the_same_however_many_clusters_are_looked_at_together(
    names: list[str], cut: int, clusters: int
) -> None:
    data = _image(KINDS[name] for name in names)
    source = BytesSource(data[: len(data) - cut])
    whole = _found(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_BATCH", clusters * SIZE)
        patch.setattr(former_clusters, "_READ", clusters * SIZE)
        assert _found(source) == whole
    _tile(whole, data[: len(data) - cut])


def _tile(found: list[Piece], data: bytes) -> None:
    """Hold pieces against the bytes: they rise, none is lost that is not zero, and their facts are counted."""
    at = len(BLANK)
    for piece in found:
        assert not any(data[at : piece.offset])
        here = data[piece.offset : piece.offset + piece.length]
        facts = content.describe(here)
        assert (piece.nonzero, piece.first) == (facts.nonzero, here[:16].hex(" "))
        assert piece.entropy == pytest.approx(facts.entropy)
        assert piece.signature == (facts.signature if piece.looks in ("data", "vm-state") else "")
        at = piece.offset + piece.length
    assert not any(data[at:])


def test_each_kind_of_cluster_is_reported_as_what_it_is() -> None:
    order = [
        "text",
        "text",
        "l2",
        "zero flags",
        "l2",
        "l1",
        "refcounts",
        "zeros",
        "snapshot",
        "elf",
        "text",
        "vm state",
    ]
    found = _found(BytesSource(_image(KINDS[name] for name in order)))
    reported = [(piece.looks, (piece.offset - _AT) // SIZE, piece.length // SIZE, piece.signature) for piece in found]
    assert reported == [
        ("data", 0, 2, ""),
        ("l2", 2, 1, ""),
        ("l2", 3, 1, ""),
        ("l2", 4, 1, ""),
        ("l1", 5, 1, ""),
        ("refcounts", 6, 1, ""),
        ("snapshot-table", 8, 1, ""),
        ("data", 9, 2, "ELF"),
        ("vm-state", 11, 1, "QEMU VM state"),
    ]
    assert [(piece.entries, piece.intact, piece.zero_only) for piece in found[1:5]] == [
        (3, 2, False),
        (2, 0, True),
        (3, 2, False),
        (1, 1, False),
    ]
    assert [entry.name for entry in _entries(BytesSource(_image(KINDS[name] for name in order)))] == ["gone"]


def test_what_an_l2_table_names_is_not_looked_for_in_the_image_when_data_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = BytesSource(_image(KINDS[name] for name in ("l1", "text", "text", "text", "l2")))
    assert [(piece.looks, piece.intact) for piece in _found(data)] == [("l1", 1), ("data", 0), ("data", 0), ("l2", 2)]
    monkeypatch.setattr(
        structure_detection.Geometry, "of", lambda _image: GEOMETRY._replace(file_size=data.size, external_data=True)
    )
    assert [(piece.looks, piece.intact) for piece in _found(data)] == [("l1", 1), ("data", 0), ("l2", 0)]


def test_an_l1_table_is_one_only_when_what_it_names_are_tables() -> None:
    names = ["l1", "text", "text", "text", "text"]
    assert [piece.looks for piece in _found(BytesSource(_image(KINDS[name] for name in names)))] == ["l2", "data"]


class Counted:
    """A source that counts how often it is read."""

    def __init__(self, source: Source) -> None:
        self._source, self.size, self.reads = source, source.size, 0

    def read(self, offset: int, length: int, /) -> bytes:
        self.reads += 1
        return self._source.read(offset, length)


@pytest.mark.parametrize("kind", ["l2", "l1", "refcounts", "text", "boot"])
def test_thousands_of_small_clusters_are_read_together_and_what_they_name_once(kind: str, tmp_path: Path) -> None:
    count = 4096
    targets = [_AT + SIZE * (number * 977 % count) for number in range(count)]
    clusters = {
        "l2": [_words(target | COPIED, targets[number - 1]) for number, target in enumerate(targets)],
        "l1": [_words(target | COPIED) for target in targets],
    }
    path = tmp_path / "small.qcow2"
    path.write_bytes(_image(clusters.get(kind, [KINDS[kind]] * count)))
    source = Counted(FileSource(path))
    image = Image(source)
    census, before = take_census(image), source.reads
    found = list(Residue(image, census=census).unclaimed())
    assert sum(piece.length for piece in found) == count * SIZE
    assert len(found) == (1 if kind in ("text", "boot") else count)
    assert source.reads - before < 50 + (count if kind in clusters else 0)


def test_entries_of_a_file_that_is_full_of_them_are_looked_at_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = _snapshot_entry().rstrip(b"\0")
    cluster = (entry.ljust(64, b"\0") * 9)[:SIZE]
    data = _image([cluster] * 20)
    assert len(_entries(BytesSource(data))) == 160
    monkeypatch.setattr(former_tables, "FORMER_ENTRIES", 24)
    found = _found(BytesSource(data))
    assert [piece.entries for piece in found] == [8, 8, 8] + [1] * 17
    assert {piece.looks for piece in found} == {"snapshot-table"}
