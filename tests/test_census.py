"""The census: who claims each host cluster, each table read once, whatever names it."""

from __future__ import annotations

import itertools
import os
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_forensics.audit import audit
from qcow2_forensics.census import Census, Owner, claimed_clusters, claims, take_census
from qcow2_forensics.census.arrays import merged, sum_by, weighted_segments
from qcow2_forensics.census.index_map import IndexMap
from qcow2_forensics.census.refcounts import StoredRefcounts, decode
from qcow2_forensics.census.reference_counts import Counters
from qcow2_forensics.errors import FormatError
from qcow2_forensics.format.image import Image
from qcow2_forensics.format.source import BytesSource
from tests import damage, qemu
from tests.image_builder import B_DATA, B_END, B_L1, B_L2, B_REFBLOCK, B_REFTABLE, COPIED, Builder, Poke, base_b, base_s
from tests.tiers import every, quick
from tests.traps import TRAPS

pytestmark = qemu.requires_qemu


class Counting:
    """A source that notes which bytes were asked for how often."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self.size = len(self._data)
        self.reads: Counter[tuple[int, int]] = Counter()

    def read(self, offset: int, length: int, /) -> bytes:
        self.reads[offset, length] += 1
        return self._data[offset : offset + length]

    @property
    def bytes_read(self) -> int:
        return sum(length * times for (_, length), times in self.reads.items())


def owner_runs(census: Census) -> Iterator[tuple[int, int, Owner]]:
    """Yield (offset, length, owner) tiling the host file in whole clusters: runs as long as can be."""
    rows = (
        row for columns in census.owner_runs() for row in zip(*(column.tolist() for column in columns), strict=True)
    )
    at = 0
    for owner, run in itertools.groupby(rows, lambda row: row[2]):
        starts, stops, _ = zip(*run, strict=True)
        assert starts[0] * census.cluster_size == at
        assert starts[1:] == stops[:-1]
        length = (stops[-1] - starts[0]) * census.cluster_size
        yield at, length, Owner(owner)
        at += length


# --- owners --------------------------------------------------------------------------------------


def test_owners_of_every_cluster_of_a_small_image(tmp_path: Path) -> None:
    census = take_census(Image(base_b(tmp_path / "b.qcow2")))
    owners = {offset: (length, owner) for offset, length, owner in owner_runs(census)}
    assert owners == {
        0: (0x10000, Owner.HEADER),
        B_REFTABLE: (0x10000, Owner.REFCOUNT_TABLE),
        B_REFBLOCK: (0x10000, Owner.REFCOUNT_BLOCK),
        B_L1: (0x10000, Owner.L1),
        B_L2: (0x10000, Owner.L2),
        B_DATA: (0x30000, Owner.DATA),
    }
    assert census.end == B_END
    assert census.refcount(B_DATA) == 1
    assert census.references(B_DATA) == 1
    assert census.owner(B_END) == Owner(0)


def test_states_and_bitmaps_own_what_only_they_use(tmp_path: Path) -> None:
    path = base_s(tmp_path / "s.qcow2")
    qemu.bitmap(path, "--add", "b0", "-g", "65536")
    qemu.io(path, "write -P 9 0 64k")
    census = take_census(Image(path))
    owned = {owner for _, _, owner in owner_runs(census)}
    assert owned >= {
        Owner.SNAPSHOT_TABLE,
        Owner.SNAPSHOT_L1,
        Owner.SNAPSHOT_L2,
        Owner.SNAPSHOT_DATA,
        Owner.DATA,
        Owner.BITMAP_DIRECTORY,
        Owner.BITMAP_TABLE,
        Owner.BITMAP_DATA,
    }
    assert not list(census.leaked())


def test_free_and_leaked_clusters_are_distinguished(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).l2(0, 0).l2(1, 0).refcount(5, 0)
    census = take_census(Image(path))
    assert list(census.free()) == [(B_DATA, 0x10000)]
    assert list(census.leaked()) == [(B_DATA + 0x10000, 0x10000)]


@pytest.mark.parametrize("seed", every(4, range(40)))
def test_owner_runs_tile_the_file_and_agree_with_free_and_leaked(seed: int, tmp_path: Path) -> None:
    image = Image(damage.damaged(seed, damage.Bases(tmp_path), tmp_path).path)
    try:
        census = take_census(image)
    except FormatError:
        return
    at = 0
    unowned = []
    for offset, length, owner in owner_runs(census):
        assert offset == at
        assert length > 0
        at += length
        if not owner:
            unowned.append((offset, offset + length))
    assert at == census.clusters * census.cluster_size
    unclaimed = sorted([*census.free(), *census.leaked()])
    # A claim the check refuses to count (too many references) still has an owner, never the reverse.
    covered = sum(length for _, length in unclaimed)
    assert covered == sum(stop - start for start, stop in unowned)
    assert covered == census.unclaimed_bytes


def test_referrers_name_the_entries_that_map_a_cluster(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).l2(1, COPIED | B_DATA)
    census = take_census(Image(path))
    cluster = B_DATA >> 16
    (items,) = census.referrers({cluster}).values()
    assert [(item.offset, item.guest) for item in items] == [(B_L2, 0), (B_L2 + 8, 0x10000)]


# --- one pass ------------------------------------------------------------------------------------


def test_no_table_is_read_twice(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "x.qcow2", "4M", cluster_size="4k")
    for name in ("a", "b", "c"):
        qemu.io(path, "write -P 1 0 4M")
        qemu.snapshot(path, name)
    source = Counting(path)
    image = Image(source)
    census = take_census(image)
    tables = set(census.named.offsets.tolist())
    assert len(tables) == 6  # two halves of the disk, three times
    for table in tables:
        assert sum(times for (start, length), times in source.reads.items() if start <= table < start + length) <= 2
    metadata = census.clusters * census.cluster_size - sum(
        length for _, length, owner in owner_runs(census) if owner & (Owner.DATA | Owner.SNAPSHOT_DATA)
    )
    assert source.bytes_read < 3 * metadata + (1 << 20)


@pytest.mark.parametrize("ident", quick(["L1-EQUAL", "SNAPSHOTS-65536", "BOMB"], ["L1-EQUAL"]))
def test_sharing_multiplies_counts_and_not_reads(ident: str, tmp_path: Path) -> None:
    path = TRAPS[ident].build(tmp_path)
    source = Counting(path)
    take_census(Image(source))
    # The L1 table as the active state's and as a snapshot's, and the refcounts twice.
    assert source.bytes_read < 4 * source.size + (4 << 20)


def test_long_and_short_way_of_counting_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = qemu.create(tmp_path / "x.qcow2", "64M", cluster_size="8k", preallocation="metadata")
    qemu.io(path, "discard 9M 80k", "write -P 3 20M 64k")
    qemu.snapshot(path, "one")
    qemu.io(path, "write -P 4 30M 1M", "write -P 5 9M 8k")
    poke = Poke(path)
    blocks = poke.get(poke.get(48))
    variants = {
        "healthy": lambda: None,
        "refcount": lambda: poke.write(blocks + 2 * 700, b"\0\0"),
        "alias": lambda: poke.u64(poke.get(poke.get(40) + 8) & ~COPIED, 3 << 20 | COPIED),
        "cut": lambda: poke.cut(path.stat().st_size - (5 << 20) - 99),
    }
    for edit in variants.values():
        edit()
        results = []
        for width in (256, 1 << 40):
            monkeypatch.setattr(claims, "_LINEAR_WIDTH", width)
            census = take_census(Image(path))
            results.append((census.check, census.issues.kinds(), list(owner_runs(census)), census.mapped_clusters))
        assert results[0] == results[1]
        assert damage.compare(path).kind == "same"


def test_overlapping_unaligned_tables_are_not_walked_and_the_check_says_so(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=21, size=1 << 50, l1_size=1 << 20)
    entries = b"".join((0x400000 + 512 * index).to_bytes(8, "big") for index in range(4096))
    builder.raw(builder.l1, entries)
    builder.put(bytes(4 << 21))
    source = Counting(builder.write(tmp_path / "x.qcow2"))
    census = take_census(Image(source))
    assert source.bytes_read < 4 * source.size
    assert census.check is None
    assert "unaligned L2 tables" in census.reasons[-1].what
    assert census.issues["unaligned"].count == 4095


def test_an_image_of_unknown_geometry_cannot_be_counted(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).u32(20, 63)
    with pytest.raises(FormatError):
        take_census(Image(path))


# --- the index map ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), max_size=12), st.integers(0, 229), st.data())
def test_every_claimed_cluster_has_an_index_of_its_own_and_no_other_has(
    spans: list[tuple[int, int]], start: int, data: st.DataObject
) -> None:
    clusters = 230
    claimed = sorted({number for at, count in [(0, 1), *spans] for number in range(at, at + count)})
    starts, stops = np.asarray([(at, at + count) for at, count in [(0, 1), *spans]], dtype=np.uint64).T
    index_map = IndexMap(clusters, merged(starts, stops))
    assert index_map.elsewhere == len(claimed)
    assert index_map.clusters_at(0, index_map.elsewhere).tolist() == claimed
    everything = np.arange(clusters + 1, dtype=np.uint64)
    expected = [claimed.index(number) if number in claimed else index_map.elsewhere for number in range(clusters + 1)]
    assert index_map.of(everything).tolist() == expected == [index_map.at(number) for number in range(clusters + 1)]
    assert [index_map.cluster(index) for index in range(index_map.elsewhere)] == claimed
    stop = data.draw(st.integers(start + 1, clusters))
    values = np.append(np.arange(1, index_map.elsewhere + 1), 0).astype(np.uint32)
    assert index_map.part(values, start, stop).tolist() == values[expected[start:stop]].tolist()
    assert index_map.blank(start, stop) == (not any(start <= number < stop for number in claimed))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> damage.Bases:
    return damage.Bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("seed", every(10, range(300, 360)))
def test_a_census_with_an_index_for_claimed_clusters_only_sees_the_same(
    seed: int, bases: damage.Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = damage.damaged(seed, bases, tmp_path).path
    seen = []
    for always in (1 << 22, 0):
        monkeypatch.setattr(claimed_clusters, "_ALWAYS", always)
        monkeypatch.setattr(claimed_clusters, "_SHARE", 0.1)  # compact however much is claimed
        report = audit(path, "deep", pictures=True)
        try:
            census = take_census(Image(path))
        except FormatError:
            seen.append((report.to_dict(),))
            continue
        assert census.index_map.compact == (not always)
        ranges = list(owner_runs(census)), list(census.free()), list(census.leaked())
        assert census.unclaimed_bytes == sum(length for _, length in [*census.free(), *census.leaked()])
        seen.append((report.to_dict(), ranges, census.issues.kinds(), census.aliases, census.end))
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("depth", "far"), every(3, [("standard", 1 << 40), ("standard", 15 << 40), ("deep", 15 << 40)], unpack=True)
)
def test_memory_follows_what_is_claimed_and_not_the_length_of_the_file(depth: str, far: int, tmp_path: Path) -> None:
    """Clusters claimed all over 15 TiB: arrays of all 250 million clusters would take 2 GiB, of 1 TiB 128 MiB."""
    hosts = [(1 << 20) + (far // 20_000 & ~0xFFFF) * number | COPIED for number in range(8192)]
    builder = Builder(size=8192 << 16)
    table = builder.put(b"".join(host.to_bytes(8, "big") for host in hosts))
    builder.raw(builder.l1, (table | COPIED).to_bytes(8, "big"))
    path = builder.write(tmp_path / "x.qcow2")
    os.truncate(path, far)
    audit(base_b(tmp_path / "b.qcow2"), depth)  # imports are no cost of the image
    tracemalloc.start()
    try:
        report = audit(path, depth)
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
    finally:
        tracemalloc.stop()
    assert report.check is not None
    assert report.check["allocated-clusters"] == 8192


def test_a_file_that_is_mostly_claimed_has_an_index_for_every_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claimed_clusters, "_ALWAYS", 1000)
    full = qemu.create(tmp_path / "full.qcow2", "16M", cluster_size="4k", preallocation="metadata")
    assert not take_census(Image(full)).index_map.compact
    os.truncate(full, 1 << 30)
    assert take_census(Image(full)).index_map.compact


# --- refcounts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_stored_refcounts_of_every_width_are_those_qemu_wrote(bits: int, tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "x.qcow2", "1M", cluster_size="4k", refcount_bits=bits)
    qemu.io(path, "write -P 1 0 100k")
    if bits > 1:
        qemu.snapshot(path, "one")
    image = Image(path)
    census = take_census(image)
    stored = StoredRefcounts(image)
    clusters = np.arange(census.clusters, dtype=np.uint64)
    values, readable = stored.lookup(clusters)
    assert readable.all()
    assert values.tolist() == [census.references(cluster << 12) for cluster in clusters.tolist()]
    assert set(values.tolist()) >= ({1, 2} if bits > 1 else {1})


def test_narrow_refcounts_are_packed_from_the_lowest_bit() -> None:
    assert decode(b"\x0f\x01", 1).tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert decode(b"\x55\x5a", 2).tolist() == [1, 1, 1, 1, 2, 2, 1, 1]
    assert decode(b"\x21", 4).tolist() == [1, 2]


def test_refcounts_past_the_tables_are_zero(tmp_path: Path) -> None:
    stored = StoredRefcounts(Image(base_b(tmp_path / "b.qcow2")))
    values, readable = stored.lookup(np.asarray([5, 8, 1 << 30, 1 << 55], dtype=np.uint64))
    assert values.tolist() == [1, 0, 0, 0]
    assert readable.all()


def test_windows_tile_the_clusters(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).u64(B_REFTABLE + 8, 0x22A00).u64(B_REFTABLE + 24, 0x20000)
    stored = StoredRefcounts(Image(path))
    at = 0
    kinds = []
    for start, stop, values, readable in stored.windows(10_000_000, limit=40_000):
        assert start == at
        assert values is None or len(values) == stop - start
        kinds.append((values is not None, readable))
        at = stop
    assert at == 10_000_000
    assert kinds[:4] == [(True, True), (False, False), (False, True), (True, True)]


# --- counters ------------------------------------------------------------------------------------

_ADDS = st.lists(
    st.tuples(st.lists(st.integers(0, 49), min_size=1, max_size=30), st.integers(1, 2**40)), min_size=1, max_size=8
)


@given(_ADDS)
def test_counters_are_exact_however_large(adds: list[tuple[list[int], int]]) -> None:
    counters, expected = Counters(50), Counter[int]()
    for clusters, weight in adds:
        counters.add(np.asarray(clusters, dtype=np.uint64), weight)
        for cluster in clusters:
            expected[cluster] += weight
        first = clusters[0]
        counters.add_range(first, 50 - first, weight)
        for cluster in range(first, 50):
            expected[cluster] += weight
    assert [counters[cluster] for cluster in range(50)] == [expected[cluster] for cluster in range(50)]
    for most in (1, 255, 65535, 2**32 - 1, 2**64 - 1):
        assert counters.excess(most) == sum(max(0, value - most) for value in expected.values())
        assert counters.over(most) == [cluster for cluster in range(50) if expected[cluster] > most]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 2**50)), min_size=1, max_size=40))
def test_sums_by_key_are_exact(pairs: list[tuple[int, int]]) -> None:
    keys = np.asarray([key for key, _ in pairs], dtype=np.uint64)
    weights = np.asarray([weight for _, weight in pairs], dtype=np.uint64)
    expected = Counter[int]()
    for key, weight in pairs:
        expected[key] += weight
    found = sum_by(keys, weights)
    assert dict(zip(found[0].tolist(), found[1].tolist(), strict=True)) == dict(expected)
    assert found[0].tolist() == sorted(expected)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12))
def test_segments_cover_every_place_once_with_the_right_weight(spans: list[tuple[int, int]]) -> None:
    weights = Counter[int]()
    for start, end in spans:
        for place in range(start, end):
            weights[place] += 1
    found = Counter[int]()
    previous = 0
    segments = weighted_segments(
        np.asarray([(a, b, n) for n, (a, b) in enumerate(spans)], dtype=np.int64).reshape(-1, 3)
    )
    for start, end, weight, owner, origin in np.column_stack(segments).tolist():
        assert previous <= start < end
        assert spans[owner][0] == origin <= start
        assert end <= spans[owner][1]
        previous = end
        for place in range(start, end):
            found[place] += weight
    assert +found == +weights


def test_an_empty_file_behind_the_magic_is_counted_without_error() -> None:
    header = b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(12) + (16).to_bytes(4, "big") + bytes(200)
    census = take_census(Image(BytesSource(header)))
    assert census.check is None
    assert census.reasons
