"""Small files that name the same thing a million times: what repeats is looked at once.

Every image here is crafted by :mod:`tests.image_builder`; that our answers are right where the work
is skipped is held against the same tables looked at one by one.
"""

from __future__ import annotations

import functools
import io
import itertools
import struct
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcow2_forensics as q
from qcow2_forensics.account import streams
from qcow2_forensics.account.shown import ShownBytes
from qcow2_forensics.account.streams import decode_all
from qcow2_forensics.audit import lost_tables, undecodable_streams
from qcow2_forensics.audit.hidden import TablesBehindDisk
from qcow2_forensics.census import survey, take_census
from qcow2_forensics.census.checked_metadata import read_layout
from qcow2_forensics.cli import main
from qcow2_forensics.compare import differing_tables
from qcow2_forensics.compare.ranges import Change, Difference
from qcow2_forensics.files.tolerant import TolerantReader
from qcow2_forensics.format.codecs import codec_of
from qcow2_forensics.format.image import Image
from qcow2_forensics.format.source import BytesSource, FileSource, Source
from qcow2_forensics.reader import mapping
from qcow2_forensics.reader.bitmaps import dirty_ranges, dirty_totals
from qcow2_forensics.reader.salvage import SalvagedDisk
from tests import qemu
from tests.image_builder import (
    COPIED,
    EXT_BACKING_FORMAT,
    EXT_BITMAPS,
    EXT_CRYPTO,
    EXT_DATA_FILE,
    Builder,
    Poke,
    compressed_entry,
    deflate,
    luks,
)
from tests.tiers import every, quick

MiB = 1 << 20
SLOTS = 1 << 16  # of an L1 table
SPAN = 64 * 512  # guest bytes under one slot, for clusters of 512 bytes


class Counted:
    """A source that counts how often it is read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.size = source.size
        self.reads = 0

    def read(self, offset: int, length: int, /) -> bytes:
        self.reads += 1
        return self._source.read(offset, length)


def table(*entries: int) -> bytes:
    """One L2 table of 512 bytes that repeats some entries."""
    return struct.pack(">64Q", *itertools.islice(itertools.cycle(entries), 64))


ZEROS, ZEROS_TOO, HOLES, HOLES_TOO = table(1), table(1, 3), table(0), table(0, 2)


def repeated(tables: list[bytes], *, slots: int = SLOTS, snapshot: list[bytes] | None = None) -> Builder:
    """An image whose L1 table, and that of a snapshot, repeat a few tables."""
    builder = Builder(cluster_bits=9, size=slots * SPAN)

    def l1(contents: list[bytes]) -> bytes:
        words = [(builder.put(content) | COPIED).to_bytes(8, "big") for content in contents]
        return (b"".join(words) * slots)[: 8 * slots]

    builder.raw(builder.l1, l1(tables))
    if snapshot is not None:
        builder.snapshot(b"1", b"s", l1_offset=builder.put(l1(snapshot)), l1_size=slots)
    return builder


def run(*arguments: object) -> tuple[int, str]:
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue()


# --- mappings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", every(3, [[ZEROS], [ZEROS, ZEROS_TOO], [ZEROS_TOO, ZEROS, ZEROS]]))
def test_a_few_tables_under_131072_slots_are_read_or_refused_as_far_as_the_file_has_room(
    tables: list[bytes], tmp_path: Path
) -> None:
    source = Counted(FileSource(repeated(tables, slots=2 * SLOTS).write(tmp_path / "zeros.qcow2")))
    with q.open_disk(source) as disk:
        assert disk.read(SLOTS * SPAN, 4 * MiB) == bytes(4 * MiB)  # reading needs no budget
        before = source.reads
        with pytest.raises(q.LimitExceeded, match="L2 tables under one range"):
            list(disk.extents())
        assert source.reads - before < (64 * MiB + 4 * source.size) // 2048 + 100


@pytest.mark.slow
def test_map_says_what_it_refuses(tmp_path: Path) -> None:
    path = repeated([ZEROS, ZEROS_TOO], slots=2 * SLOTS).write(tmp_path / "zeros.qcow2")
    code, _ = run("map", path)
    assert code == 2


@pytest.mark.slow
def test_a_disk_of_which_only_tables_are_left_is_mapped_in_full(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=9, size=2 * SLOTS * SPAN)
    at = builder.put(table(0, 1) * SLOTS)
    builder.raw(builder.l1, struct.pack(f">{SLOTS}Q", *range(at, at + 512 * SLOTS, 512)))
    path = builder.write(tmp_path / "tables.qcow2")
    with q.open_disk(path) as disk:
        assert sum(1 for _ in disk.mapping.runs(0, SLOTS * SPAN)) == 64 * SLOTS


@qemu.requires_qemu
def test_tables_that_map_nothing_are_distinguished_from_those_that_map_zeros_as_in_qemu(tmp_path: Path) -> None:
    path = repeated([ZEROS, HOLES, HOLES_TOO, ZEROS_TOO, ZEROS], slots=64).write(tmp_path / "mixed.qcow2")
    rows = qemu.map_json(path)
    with q.open_disk(path) as disk:
        runs = [(e.offset, e.length, e.kind == mapping.Kind.ZERO) for e in disk.extents()]
    assert runs == [(row["start"], row["length"], row["present"]) for row in rows]


_ANY_TABLE = st.sampled_from([ZEROS, ZEROS_TOO, HOLES, HOLES_TOO, table(0, 1), b"", "data"])


@pytest.mark.slow
@given(st.lists(_ANY_TABLE, min_size=1, max_size=6), st.integers(0, 6 * SPAN), st.integers(1, 6 * SPAN))
def test_runs_are_what_the_clusters_say_one_by_one(contents: list[bytes | str], start: int, length: int) -> None:
    builder = Builder(cluster_bits=9, size=6 * SPAN)
    data = builder.put(b"\x11" * 512)
    known: dict[bytes | str, int] = {b"": 0}
    words = []
    for content in itertools.islice(itertools.cycle(contents), 6):
        if content not in known:
            known[content] = builder.put(table(data) if isinstance(content, str) else content)
        words.append(known[content].to_bytes(8, "big"))
    builder.raw(builder.l1, b"".join(words))
    image = q.open_image(BytesSource(_bytes(builder)))
    length = min(length, 6 * SPAN - start)
    if length <= 0:
        return
    whole = mapping.Mapping(image, image.header.l1_table_offset, image.header.l1_size)
    singly = mapping.Mapping(image, image.header.l1_table_offset, image.header.l1_size)
    found = [(run.kind, at) for run in whole.runs(start, length) for at in range(run.offset, run.offset + run.length)]
    wanted: list[tuple[mapping.Kind, int]] = []
    at = start
    while at < start + length:  # never a whole table, so that nothing is known of one
        stop = min(start + length, at - at % 512 + 512)
        wanted += [(next(singly.runs(at, stop - at)).kind, place) for place in range(at, stop)]
        at = stop
    assert found == wanted


def _bytes(builder: Builder) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return builder.write(Path(folder) / "image.qcow2").read_bytes()


# --- comparisons ---------------------------------------------------------------------------------


def test_two_states_of_different_tables_of_zeros_are_equal_at_few_reads(tmp_path: Path) -> None:
    path = repeated([ZEROS], snapshot=[ZEROS_TOO, ZEROS]).write(tmp_path / "zeros.qcow2")
    source = Counted(FileSource(path))
    with q.open_disk(source, "1") as before, q.open_disk(source) as after:
        assert list(q.compare(before, after)) == []
    assert source.reads < 400


_DIFFERENT_TABLES = {
    "nothing and zeros": ([0], [1]),
    "zeros and nothing in turn": ([0, 1], [1, 0]),
    "clusters and nothing in turn": ([0x200 | COPIED, 0], [0x200, 0]),
}


@pytest.mark.parametrize("name", _DIFFERENT_TABLES)
def test_thousands_of_different_tables_that_say_the_same_are_compared_in_few_reads_and_no_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 4096
    builder = Builder(cluster_bits=9, size=count * SPAN)
    places = [builder.put(table(*entries) * count) for entries in _DIFFERENT_TABLES[name]]
    l1 = [struct.pack(f">{count}Q", *range(place, place + 512 * count, 512)) for place in places]
    builder.raw(builder.l1, l1[0]).snapshot(b"1", b"s", l1_offset=builder.put(l1[1]), l1_size=count)
    source = Counted(FileSource(builder.write(tmp_path / "tables.qcow2")))
    monkeypatch.setattr(mapping.Mapping, "runs", None)
    with q.open_disk(source, "1") as before, q.open_disk(source) as after:
        assert list(q.compare(before, after)) == []
    assert source.reads < 100


_ENTRIES = st.lists(
    st.sampled_from([0, 1, 2, COPIED, 1 << 40, 0x900])
    | st.builds(
        lambda host, flags: host | flags, st.sampled_from([0, 0x8000, 0x10000]), st.sampled_from([0, 1, COPIED])
    )
    | st.builds(compressed_entry, st.sampled_from([0x8000, 0x8010]), st.sampled_from([90, 500]), st.just(9)),
    min_size=1,
    max_size=7,
)
_BITMAPS = st.lists(st.sampled_from([0, 1, 0xF, 0xF << 32, 0xF0 << 32 | 0xF, 1 << 32 | 1]), min_size=1, max_size=5)
_SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"cluster_bits": 9},
    "version 2": {"cluster_bits": 9, "version": 2},
    "subclusters": {"cluster_bits": 14, "extended_l2": True},
}


@pytest.mark.parametrize("shape", quick(_SHAPES, ["plain"]))
def test_what_whole_tables_prove_equal_is_what_their_runs_prove_equal(shape: str) -> None:
    @given(st.data(), st.sampled_from([None, 0.5, 1.5, 2]))
    def hold(data: st.DataObject, backing: float | None) -> None:
        _hold_tables_against_runs(shape, data, backing)

    hold()


def _hold_tables_against_runs(shape: str, data: st.DataObject, backing: float | None) -> None:
    fields = _SHAPES[shape]
    with tempfile.TemporaryDirectory() as name:
        builder = Builder(**fields, size=1, l1_size=2, backing=None if backing is None else b"base")
        span = builder.l2_entries << builder.cluster_bits
        builder.size = 2 * span if span < MiB else 64 << builder.cluster_bits
        builder.extensions.append((EXT_BACKING_FORMAT, b"raw"))
        builder.raw(0x8000, bytes(range(256)) * 128 + b"" * 0x4000)
        builder._end = 0x14000
        tables = []
        for entries in data.draw(st.lists(_ENTRIES, min_size=3, max_size=3)):
            words = [itertools.cycle(entries)]
            if fields.get("extended_l2"):
                words.append(itertools.cycle(data.draw(_BITMAPS)))
            cells = itertools.islice(zip(*words, strict=True), 64)
            content = b"".join(word.to_bytes(8, "big") for cell in cells for word in cell)
            tables.append(builder.put(content.ljust(builder.cluster_size, b"\0")))
        slot = st.sampled_from([0, 1 << 40, 0x8100, *tables])
        l1 = [data.draw(st.tuples(slot, slot)) for _ in range(2)]
        # A table of one file that both name is equal even where it cannot be read, unless what stands before is looked at.
        parts = [number * span for number in range(2) if l1[0][number] != l1[1][number]]
        active, snapshot = (struct.pack(">2Q", *row) for row in l1)
        builder.raw(builder.l1, active).snapshot(b"1", b"s", l1_offset=builder.put(snapshot), l1_size=2)
        path = builder.write(Path(name) / "disk")
        if backing is not None:
            (Path(name) / "base").write_bytes(b"D" * (int(backing * span) // 512 * 512))
        other = path.with_name("other")
        other.write_bytes(path.read_bytes())
        for name_after in ("disk", "other"):
            with q.open_disk(path, "1") as before, q.open_disk(path.with_name(name_after)) as after:
                _hold_against_runs(before, after, parts if name_after == "disk" else [0, span], span)
        if backing is not None:
            with q.open_disk(path) as over:
                assert over.backing is not None
                _hold_against_runs(over.backing, over, [0, span], span)


def _hold_against_runs(before: q.Layer, after: q.Layer, parts: list[int], span: int) -> None:
    def found() -> list[tuple[int, int, Change]]:
        items = list(q.compare(before, after))
        clipped = [(max(i.offset, at), min(i.end, at + span), i.change) for at in parts for i in items]
        return [item for item in clipped if item[0] < item[1]]

    with_tables = found()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differing_tables.DifferingTables, "ranges", lambda _, start, end: [(start, end)])
        assert with_tables == found()


def _in_a_data_file(path: Path, *entries: int, slots: int = 4) -> Builder:
    """An image over ``d.raw`` whose L1 slots all name one L2 table; a snapshot says the same by another."""
    path.with_name("d.raw").write_bytes(b"D" * slots * SPAN)
    builder = Builder(cluster_bits=9, size=slots * SPAN, incompatible=4, extensions=[(EXT_DATA_FILE, b"d.raw")])
    words = struct.pack(f">{len(entries)}Q", *entries).ljust(512, b"\0")
    first, second = builder.put(words), builder.put(words)
    builder.raw(builder.l1, struct.pack(f">{slots}Q", *[first] * slots))
    other = builder.put(struct.pack(f">{slots}Q", *[second] * slots))
    return builder.snapshot(b"1", b"s", l1_offset=other, l1_size=slots)


@pytest.mark.parametrize(
    "entry", [0x200 | COPIED, 0x200 | COPIED | 1, 0x200 | 1], ids=["data", "zeros", "zeros, no flag"]
)
def test_a_table_that_is_right_under_one_slot_of_a_data_file_proves_nothing_of_the_others(
    entry: int, tmp_path: Path
) -> None:
    path = tmp_path / "disk.qcow2"
    _in_a_data_file(path, 0, entry).write(path)
    expected = [Difference(slot * SPAN + 512, 512, Change.UNREADABLE) for slot in (1, 2, 3)]
    with q.open_disk(path, "1") as before, q.open_disk(path) as after:
        assert [item._replace(note="") for item in q.compare(before, after)] == expected


@pytest.mark.parametrize("offset", [SPAN, SPAN + 512], ids=["from before", "alone"])
def test_zeros_at_a_wrong_place_of_a_data_file_are_unreadable_wherever_a_read_starts(
    offset: int, tmp_path: Path
) -> None:
    path = tmp_path / "disk.qcow2"
    _in_a_data_file(path, COPIED | 1, COPIED | 1 | 0x200).write(path)
    with q.open_disk(path) as disk:
        assert disk.read(0, 1024) == bytes(1024)
        with pytest.raises(q.FormatError, match="not to its guest offset"):
            disk.read(offset, SPAN + 1024 - offset)


def test_snapshots_of_two_files_that_say_they_have_petabytes_are_compared_as_far_as_their_tables_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("one", "other")]
    for path in paths:
        builder = Builder(cluster_bits=9, size=SPAN).data(0, path.name.encode())
        builder.snapshot(b"1", b"s", l1_offset=builder.l1, l1_size=1, disk_size=1 << 44).write(path)
    pages: list[int] = []
    real = differing_tables.l2_offsets
    monkeypatch.setattr(differing_tables, "l2_offsets", lambda of, page: pages.append(page) or real(of, page))
    with q.open_disk(paths[0], "1", eof="zeros") as before, q.open_disk(paths[1], "1", eof="zeros") as after:
        assert list(q.compare(before, after)) == [Difference(0, 512, Change.CHANGED)]
    assert len(pages) == 2


@pytest.mark.slow
@pytest.mark.parametrize("offsets", [(1 << 40,), (1 << 40, 1 << 41)], ids=["one", "alternating"])
def test_tables_past_the_end_of_the_file_are_one_unreadable_range(offsets: tuple[int, ...], tmp_path: Path) -> None:
    builder = repeated([b""], snapshot=[HOLES])
    words = [offset.to_bytes(8, "big") for offset in offsets]
    builder.raw(builder.l1, (b"".join(words) * SLOTS)[: 8 * SLOTS])
    path = builder.write(tmp_path / "past.qcow2")
    with q.open_disk(path, "1") as before, q.open_disk(path) as after:
        found = list(q.compare(before, after))
    assert [(item.offset, item.length, item.change) for item in found] == [(0, SLOTS * SPAN, Change.UNREADABLE)]
    assert "past the end" in found[0].note


def test_what_lies_behind_a_broken_table_is_still_compared(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=9, size=8 * SPAN)
    builder.data(0, b"\x11" * 512).data(5 * SPAN, b"\x22" * 512)
    builder.raw(builder.l1 + 8 * 2, (1 << 40).to_bytes(8, "big") * 2)
    builder.snapshot(b"1", b"s", l1_offset=builder.put(bytes(64)), l1_size=8)
    path = builder.write(tmp_path / "broken.qcow2")
    with q.open_disk(path, "1") as before, q.open_disk(path) as after:
        found = [(item.offset, item.length, item.change) for item in q.compare(before, after)]
    assert found == [
        (0, 512, Change.WRITTEN),
        (2 * SPAN, 2 * SPAN, Change.UNREADABLE),
        (5 * SPAN, 512, Change.WRITTEN),
    ]


def test_a_fault_in_a_backing_file_spoils_nothing_that_the_overlay_holds(tmp_path: Path) -> None:
    base = Builder(cluster_bits=9, size=4 * SPAN)
    base.raw(base.l1, (1 << 40).to_bytes(8, "big") * 4)
    base.write(tmp_path / "base.qcow2")
    for name, byte in (("a", 1), ("b", 2)):
        builder = Builder(cluster_bits=9, size=4 * SPAN, backing=b"base.qcow2")
        builder.data(SPAN, bytes([byte]) * 512).write(tmp_path / f"{name}.qcow2")
    copy = (tmp_path / "base.qcow2").read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "base.qcow2").write_bytes(copy)
    (tmp_path / "b.qcow2").rename(tmp_path / "other" / "b.qcow2")
    with q.open_disk(tmp_path / "a.qcow2") as before, q.open_disk(tmp_path / "other" / "b.qcow2") as after:
        found = [(item.offset, item.length, item.change) for item in q.compare(before, after)]
    assert found == [
        (0, SPAN, Change.UNREADABLE),
        (SPAN, 512, Change.CHANGED),
        (SPAN + 512, 3 * SPAN - 512, Change.UNREADABLE),
    ]


def test_a_run_is_reported_before_the_fault_that_follows_it(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=9, size=2 * SPAN).data(0, b"\x11" * 512)
    builder.raw(builder.l1 + 8, (1 << 40).to_bytes(8, "big"))
    with q.open_disk(builder.write(tmp_path / "fault.qcow2")) as disk:
        extents = disk.extents()
        assert [next(extents).length, next(extents).length] == [512, SPAN - 512]
        with pytest.raises(q.FormatError):
            next(extents)


# --- audits --------------------------------------------------------------------------------------


def _staggered(length: Callable[[int], int]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        builder = Builder(cluster_bits=9)
        l2 = builder.put(bytes(512))
        base = builder.put((l2 | COPIED).to_bytes(8, "big") * (MiB // 2))
        for index in range(8192):
            builder.snapshot(b"%d" % (index + 1), b"s", l1_offset=base + 512 * index, l1_size=length(index))
        return builder.write(path)

    return make


def _bitmaps(place: Callable[[Builder, int], tuple[int, int]], count: int) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        builder = Builder(cluster_bits=9, autoclear=1)
        entries = []
        for index in range(count):
            offset, entries_of_table = place(builder, index)
            entries.append(struct.pack(">QIIBBHI5s3x", offset, entries_of_table, 0, 1, 16, 5, 0, b"%05d" % index))
        directory = b"".join(entries)
        where = builder.put(directory)
        builder.extensions.append((EXT_BITMAPS, struct.pack(">IIQQ", count, 0, len(directory), where)))
        return builder.write(path)

    return make


def _one_entry(entry: int) -> Callable[[Builder, int], tuple[int, int]]:
    return lambda builder, _index: (builder.put(entry.to_bytes(8, "big")), 1)


CROWDS = {
    "L1 tables side by side": _staggered(lambda _index: 64),
    "L1 tables inside each other": _staggered(lambda index: 64 * (8192 - index)),
    "bitmap tables of one entry": _bitmaps(_one_entry(0x200), 8192),
    "bitmap tables of one bad entry": _bitmaps(_one_entry(0x201), 8192),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CROWDS)
def test_crowds_of_tables_are_counted_together(name: str, tmp_path: Path) -> None:
    source = Counted(FileSource(CROWDS[name](tmp_path / "crowd.qcow2")))
    tracemalloc.start()
    try:
        report = q.audit(source)
        assert tracemalloc.get_traced_memory()[1] < 64 * MiB
    finally:
        tracemalloc.stop()
    assert "QCOW2-AUDIT-INCOMPLETE" not in {finding.code for finding in report}
    assert source.reads < 2000


@qemu.requires_qemu
def test_counters_of_tables_inside_each_other_are_those_of_qemu(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=9)
    l2 = builder.put(bytes(512))
    base = builder.put((l2 | COPIED).to_bytes(8, "big") * 64 * 8)
    for index, (first, count) in enumerate([(0, 512), (1, 64), (1, 448), (3, 100), (3, 100), (7, 64)]):
        builder.snapshot(b"%d" % (index + 1), b"s", l1_offset=base + 512 * first, l1_size=count)
    path = builder.write(tmp_path / "nested.qcow2")
    theirs = qemu.check_json(path).counters or {}
    ours = q.audit(path).check or {}
    assert {key: ours.get(key, 0) for key in ("corruptions", "leaks", "image-end-offset")} == {
        key: theirs.get(key, 0) for key in ("corruptions", "leaks", "image-end-offset")
    }


def test_evidence_of_65536_snapshots_is_counted_and_few_of_it_made(tmp_path: Path) -> None:
    builder = Builder()
    shared = builder.put(bytes(8))
    for index in range(3000):
        builder.snapshot(b"%d" % (index + 1), b"same", l1_offset=shared, l1_size=1)
    report = q.audit(builder.write(tmp_path / "many.qcow2"))
    reported = {finding.code: finding for finding in report}
    for code in ("QCOW2-SNAPSHOT-ORDER", "QCOW2-SNAPSHOT-L1-ALIAS"):
        assert reported[code].count == 2999
        assert 50 <= len(reported[code].evidence) <= 100  # spread over the table


@pytest.mark.parametrize("inside", [0, 1], ids=["aligned", "unaligned"])
def test_the_census_takes_no_more_than_a_few_steps_for_each_snapshot(inside: int, tmp_path: Path) -> None:
    def steps(count: int) -> int:
        builder = Builder(cluster_bits=9)
        base = builder.put(bytes(512 * 100))
        for index in range(count):
            builder.snapshot(b"%d" % index, b"s", l1_offset=base + 512 * (index % 100) + inside, l1_size=64)
        with q.open_image(builder.write(tmp_path / f"{count}.qcow2")) as image:
            assert len(image.snapshots) == count
            events: list[str] = []
            sys.setprofile(lambda _frame, event, _argument: events.append(event))
            try:
                take_census(image)
            finally:
                sys.setprofile(None)
        return sum(event in ("call", "c_call") for event in events)

    assert steps(2000) - steps(1000) <= 4 * 1000


def test_ids_and_names_of_64_kib_are_reported_cut(tmp_path: Path) -> None:
    builder = Builder()
    for index in range(100):
        text = (b"%d" % index).rjust(60_000, b"9")
        builder.snapshot(text, text, l1_offset=builder.l1, l1_size=1)
    report = q.audit(builder.write(tmp_path / "long.qcow2"))
    assert len(report.to_json()) < 20 * MiB
    (first, *_) = (finding for finding in report if finding.code == "QCOW2-SNAPSHOT")
    reported = {item.field: item for item in first.evidence}
    assert reported["name"].value == "9" * 1024 + "... (60000 characters)"
    assert reported["name"].length == 60_000


def test_every_finding_and_picture_shows_an_id_of_64_kib_cut(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=12)
    stream = builder.put(b"\xff" * 600)
    for index in range(3):
        ident = (b"%d" % index).rjust(60_000, b"9")
        entries = (1 << 40, 0x200, compressed_entry(stream, 600, 12), builder.put(b"D" * 4096), builder.l1)
        l2 = builder.put(struct.pack(">5Q", *entries).ljust(4096, b"\0"))
        l1 = builder.put(struct.pack(">2Q", l2, 0x333))
        builder.snapshot(ident, ident, l1_offset=l1, l1_size=2, vm_size=100)
    report = q.audit(builder.write(tmp_path / "long.qcow2"), depth="deep", pictures=True)
    assert {"QCOW2-BEYOND-EOF", "QCOW2-COMPRESSED-INVALID"} <= {finding.code for finding in report}
    assert "9" * 1000 in report.to_json()
    assert "9" * 1100 not in report.to_json()


# --- bitmaps -------------------------------------------------------------------------------------


def _bitmap_image(entries: list[int], clusters: list[bytes], size: int, granularity_bits: int) -> bytes:
    """One bitmap whose table names clusters by number; -1 is all ones and None of them nothing."""
    builder = Builder(cluster_bits=9, size=size, l1_size=1, autoclear=1)  # of the disk nothing is looked at
    hosts = [builder.put(data) for data in clusters]
    words = [1 if entry == -1 else 0 if entry == -2 else hosts[entry % len(hosts)] for entry in entries]
    where = builder.put(struct.pack(f">{len(words)}Q", *words))
    in_use = 1  # else its table would have to be for the whole disk
    entry = struct.pack(">QIIBBHI1s7x", where, len(words), in_use, 1, granularity_bits, 1, 0, b"b")
    builder.extensions.append((EXT_BITMAPS, struct.pack(">IIQQ", 1, 0, len(entry), builder.put(entry))))
    return _bytes(builder)


_CLUSTER = st.sampled_from([bytes(512), b"\xff" * 512, b"\x55" * 512, b"\x80" + bytes(510) + b"\x01"]) | st.binary(
    min_size=512, max_size=512
)


@given(
    st.lists(st.integers(-2, 3), min_size=1, max_size=6),
    st.lists(_CLUSTER, min_size=1, max_size=4),
    st.integers(1, 6 * 4096 * 512 + 5000),
)
def test_totals_of_a_bitmap_are_those_of_its_ranges(entries: list[int], clusters: list[bytes], size: int) -> None:
    data = _bitmap_image(entries, clusters, size // 512 * 512 + 512, 9)
    with q.open_image(BytesSource(data)) as image:
        ranges = list(dirty_ranges(image, image.bitmaps[0]))
        assert dirty_totals(image, image.bitmaps[0]) == (len(ranges), sum(length for _, length in ranges))


@pytest.mark.parametrize("cluster", [bytes(512), b"\xff" * 512], ids=["zeros", "ones"])
def test_a_cluster_of_bits_named_a_hundred_thousand_times_is_read_once(cluster: bytes) -> None:
    source = Counted(BytesSource(_bitmap_image([0] * 100_000, [cluster], 1 << 50, 16)))
    with q.open_image(source) as image:
        bitmap = image.bitmaps[0]
        before = source.reads
        assert len(list(dirty_ranges(image, bitmap))) == (cluster[0] != 0)
        assert dirty_totals(image, bitmap)[0] == (cluster[0] != 0)
        assert source.reads - before < 100


def test_a_directory_of_bad_bitmaps_is_parsed_once_and_its_problems_share_what_they_can(tmp_path: Path) -> None:
    place = _bitmaps(lambda _builder, index: (0x10004 + 8 * index, 1), 8192)
    source = Counted(FileSource(place(tmp_path / "unaligned.qcow2")))
    with q.open_image(source) as image:
        assert len(image.bitmaps) == len(image.problems) == 8192
        assert len({id(problem.blocks) for problem in image.problems}) == 1
        before = source.reads
        read_layout(image)
        assert source.reads == before


# --- streams and keys ----------------------------------------------------------------------------


def _streams_within_streams(path: Path, count: int, *, good: bool) -> Path:
    """Streams of 2 MiB clusters that each begin in the one before: empty blocks, then what all end with."""
    empty, ending = b"\0\0\0\xff\xff", deflate(bytes(2 * MiB))
    ending = ending if good else ending[:-3] + b"\xff" * 3
    builder = Builder(cluster_bits=21, size=count * 2 * MiB)
    host = builder.put(empty * count + ending)
    entries = [
        compressed_entry(host + len(empty) * number, len(empty) * (count - number) + len(ending), 21)
        for number in range(count)
    ]
    builder.raw(builder.l1, builder.put(struct.pack(f">{count}Q", *entries)).to_bytes(8, "big"))
    return builder.write(path)


@pytest.mark.parametrize("good", every(2, [True, False]), ids=["good", "bad"])
def test_a_deep_audit_stops_decoding_streams_that_share_bytes_and_says_so(good: bool, tmp_path: Path) -> None:
    path = _streams_within_streams(tmp_path / "bombs.qcow2", 400, good=good)
    with q.open_image(path) as image:
        decoded = decode_all(image, take_census(image))
    assert decoded.stopped is not None
    assert len(decoded.used) < 60
    report = q.audit(path, depth="deep")
    incomplete = [
        item.value for finding in report if finding.code == "QCOW2-AUDIT-INCOMPLETE" for item in finding.evidence
    ]
    assert any("streams that are bad or share bytes" in str(value) for value in incomplete)
    assert ("QCOW2-COMPRESSED-INVALID" in {finding.code for finding in report}) is not good


def test_streams_that_a_cut_image_lost_are_all_reported_and_use_up_no_allowance(tmp_path: Path) -> None:
    builder = Builder(size=4096 << 16)
    stream = deflate(b"D" * 65536)
    at = builder.put(stream + b"what an older stream left behind")
    entries = [at, *(1 << 30 | 512 * number for number in range(4095))]
    l2 = builder.put(struct.pack(">4096Q", *(compressed_entry(entry, len(stream), 16) for entry in entries)))
    builder.raw(builder.l1, (l2 | COPIED).to_bytes(8, "big"))
    report = q.audit(builder.write(tmp_path / "cut.qcow2"), depth="deep")
    reported = {finding.code: finding for finding in report}
    assert reported["QCOW2-COMPRESSED-INVALID"].count == 4095
    assert "QCOW2-COMPRESSED-SLACK" in reported
    assert "QCOW2-AUDIT-INCOMPLETE" not in reported


@qemu.requires_qemu
@pytest.mark.parametrize("kind", every(2, ["zstd", "zlib"]))
@pytest.mark.parametrize("cluster_size", quick(["4k", "64k", "2M"], ["64k"]))
def test_a_deep_audit_decodes_all_of_what_qemu_compressed_however_far_it_expands(
    kind: str, cluster_size: str, tmp_path: Path
) -> None:
    none = q.Limits(work_repeats=0, work_spare=0)
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes((b"\x5a" * 64 * 1024 + b"\x01" + bytes(64 * 1024 - 1)) * 256)
    options = f"cluster_size={cluster_size},compression_type={kind}"
    qemu.img("convert", "-c", "-O", "qcow2", "-o", options, raw, path)
    report = q.audit(path, depth="deep", limits=none)
    assert "QCOW2-COMPRESSED-INVALID" not in {finding.code for finding in report}
    with q.open_image(path, limits=none) as image:
        assert decode_all(image, take_census(image)).stopped is None
    report = q.audit(path, depth="deep")
    assert not {"QCOW2-AUDIT-INCOMPLETE", "QCOW2-COMPRESSED-INVALID"} & {finding.code for finding in report}
    with q.open_image(path) as image:
        census = take_census(image)
        assert len(decode_all(image, census).used) == census.compressed > 0


@pytest.mark.parametrize(
    "entry", [0, 1, 0x200, compressed_entry(0x400, 100, 9)], ids=["empty", "zeros", "data", "packed"]
)
def test_tables_past_the_end_of_the_disk_are_looked_at_many_at_a_time(entry: int, tmp_path: Path) -> None:
    def steps(count: int) -> int:
        builder = Builder(cluster_bits=9, size=SPAN, l1_size=count + 1)
        tables = builder.put(table(entry) * count)
        builder.raw(builder.l1 + 8, struct.pack(f">{count}Q", *range(tables, tables + count * 512, 512)))
        with q.open_image(builder.write(tmp_path / f"{count}.qcow2")) as image:
            events: list[str] = []
            sys.setprofile(lambda _frame, event, _argument: events.append(event))
            try:
                take_census(image, [ShownBytes, TablesBehindDisk])
            finally:
                sys.setprofile(None)
        return sum(event in ("call", "c_call") for event in events)

    steps(64)  # imports what is imported on first use
    assert steps(3072) - steps(1024) <= 6 * 2048  # evidence is chosen from each batch of a thousand tables


def test_of_thousands_of_lost_tables_those_that_are_listed_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = Builder(cluster_bits=9, size=2000 * SPAN)
    tables = builder.put(b"\xa5" * 512 * 2000)
    builder.raw(builder.l1, struct.pack(">2000Q", *range(tables, tables + 2000 * 512, 512)))
    looked_at: list[object] = []
    described = lost_tables._evidence
    monkeypatch.setattr(lost_tables, "_evidence", lambda *about: looked_at.append(about) or described(*about))
    report = q.audit(builder.write(tmp_path / "lost.qcow2"))
    (finding,) = (finding for finding in report if finding.code == "QCOW2-L2-TABLE-LOST")
    assert finding.count == 2000
    assert len(looked_at) == len(finding.evidence) <= 100


def test_streams_past_the_end_of_the_file_are_reported_and_not_looked_at_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = Builder(cluster_bits=9, size=64 * SPAN)
    for number in range(64 * 64):
        builder.entry(number * 512, compressed_entry((1 << 40) + number * 512, 100, 9))
    asked: list[int] = []
    fault = undecodable_streams._fault
    monkeypatch.setattr(undecodable_streams, "_fault", lambda facts, entry: asked.append(entry) or fault(facts, entry))
    path = builder.write(tmp_path / "cut.qcow2")
    with q.open_image(path) as image:
        source = image.source = Counted(image.source)
        census = take_census(image)
        source.reads = 0
        found = decode_all(image, census)
        assert (len(found.failed), found.used, source.reads) == (4096, [], 0)
    report = q.audit(path, depth="deep")
    assert [finding.count for finding in report if finding.code == "QCOW2-COMPRESSED-INVALID"] == [4096]
    assert len(asked) <= 100  # for the words of those that are listed


def test_streams_like_the_one_before_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Builder(cluster_bits=16, size=64 << 16)
    stream, other = deflate(b"\x11" * 65536), deflate(b"\x22" * 65536)
    at = builder.put((stream * 30 + other) * 2)
    for number in range(62):
        length = len(other if number % 31 == 30 else stream)
        builder.entry(number << 16, compressed_entry(at, length, 16))
        at += length
    decoded: list[bytes] = []
    zlib = codec_of(0)
    noted = zlib._replace(measure=lambda data, size: decoded.append(data) or zlib.measure(data, size))
    monkeypatch.setattr(streams, "codec_of", lambda _: noted)
    with q.open_image(builder.write(tmp_path / "alike.qcow2")) as image:
        found = decode_all(image, take_census(image))
    assert len(decoded) == 4
    ends = [end for _, end in found.used]
    assert ends[:-1] == [start for start, _ in found.used[1:]]
    assert (found.failed.tolist(), found.stopped) == ([], None)


def test_one_bad_stream_named_many_times_is_one_finding_with_a_count(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=9, size=4 * SPAN)
    host = builder.put(b"\xff" * 512)
    builder.raw(builder.l1, builder.put(table(compressed_entry(host, 100, 9))).to_bytes(8, "big"))
    report = q.audit(builder.write(tmp_path / "bad.qcow2"), depth="deep")
    found = [finding for finding in report if finding.code == "QCOW2-COMPRESSED-INVALID"]
    assert [finding.count for finding in found] == [64]


@qemu.requires_qemu
def test_the_slots_of_a_luks_header_share_one_allowance(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    path = luks(tmp_path / "luks.qcow2")
    poke = Poke(path)
    at = poke.read(0, 4096).index(struct.pack(">II", EXT_CRYPTO, 16))
    header = poke.get(at + 8)
    first, digest = poke.read(header + 208, 48), poke.get(header + 164, 4)
    rounds = int.from_bytes(first[4:8], "big") + digest
    poke.write(header + 208 + 48, first)  # the second slot is the first one again
    with (
        pytest.raises(q.Locked, match="no key slot accepts"),
        q.open_disk(path, passphrase="wrong", limits=q.Limits(luks_iterations=2 * rounds)),
    ):
        pass
    with (
        pytest.raises(q.LimitExceeded),
        q.open_disk(path, passphrase="wrong", limits=q.Limits(luks_iterations=2 * rounds - 1)),
    ):
        pass


# --- refcounts -----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.integers(0, 255))
def test_refcounts_past_the_end_are_those_of_each_slot_looked_at_alone(slots: list[int], start: int) -> None:
    """A refcount table names a few blocks again and again; between them none, an unaligned and a lost one."""
    blank = BytesSource(_blank_image())
    data = bytearray(blank.read(0, blank.size))
    first = len(data)
    contents = [[0] * 256, [1] * 256, [0] * start + [3] * (256 - start), [0] * 255 + [9]]
    data += b"".join(struct.pack(">256H", *content) for content in contents)
    named = [0, 513, 1 << 40, *range(first, len(data), 512)]
    (own,) = struct.unpack_from(">Q", data, *struct.unpack_from(">Q", data, 48))
    table = [own, *(named[slot] for slot in slots)]
    clusters = -(-len(table) // 64)
    struct.pack_into(">QI", data, 48, len(data), clusters)
    data += struct.pack(f">{len(table)}Q", *table).ljust(512 * clusters, b"\0")
    hits = [
        (slot, place)
        for slot, block in enumerate(table)
        if block and block % 512 == 0 and block < len(data)
        for place in range(256)
        if slot * 256 + place >= len(data) // 512 and data[block + 2 * place : block + 2 * place + 2] != b"\0\0"
    ]
    firsts = {table[slot]: slot for slot in range(len(table) - 1, 0, -1)}
    listed = [512 * (256 * slot + place) for slot, place in hits if slot == 0 or firsts[table[slot]] == slot]
    issue = take_census(Image(BytesSource(bytes(data)))).issues["refcount-past-end"]
    assert issue.count == len(hits)
    hosts = [item.host for item in issue.items]
    assert len(hosts) <= 100
    assert set(hosts) <= set(listed)
    assert hosts[:1] == listed[:1]


def _with_refcount_table(table: list[int], more: bytes, order: int = 4) -> bytes:
    """A blank image with another refcount table, behind some more bytes; 0 stands for its own block."""
    data = bytearray(_blank_image(order))
    (own,) = struct.unpack_from(">Q", data, *struct.unpack_from(">Q", data, 48))
    data += more
    struct.pack_into(">QI", data, 48, len(data), -(-len(table) // 64))
    words = struct.pack(f">{len(table)}Q", *(entry or own for entry in table))
    return bytes(data) + words + bytes(-len(words) % 512)


def test_a_refcount_table_that_names_one_block_a_million_times_is_counted_in_pieces() -> None:
    block = len(_blank_image())
    data = _with_refcount_table([0] + [block] * (MiB - 1), struct.pack(">256H", *[1] * 256))
    image = Image(BytesSource(data))
    tracemalloc.start()
    try:
        census = take_census(image)
        assert tracemalloc.get_traced_memory()[1] < 64 * MiB
    finally:
        tracemalloc.stop()
    assert census.issues["reftable-shared"].count == MiB - 2
    assert census.issues["refcount-past-end"].count > (MiB - 1000) * 256


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 4), st.integers(1, 9))
def test_refcount_blocks_counted_in_pieces_are_those_counted_at_once(slots: list[int], order: int, piece: int) -> None:
    first = len(_blank_image(order))
    data = _with_refcount_table([0, *(first + 512 * slot for slot in slots)], bytes(512 * 5), order)

    def counted() -> tuple[int, dict[str, int], list[object]]:
        census = take_census(Image(BytesSource(data)))
        return census.corruptions, census.issues.kinds(), [*census.issues["reftable-shared"].items]

    whole = counted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survey, "_SLOT_CHUNK", piece)
        assert counted() == whole


@pytest.mark.slow
def test_refcount_blocks_with_gaps_between_them_are_read_together() -> None:
    first, count = len(_blank_image()), 3000
    block = struct.pack(">256H", *[1] * 256)
    data = _with_refcount_table([0, *(first + 1024 * number for number in range(count))], block * (2 * count))
    source = Counted(BytesSource(data))
    census = take_census(Image(source))
    assert census.issues["refcount-past-end"].count > (count - 100) * 256
    assert source.reads < 300


@functools.cache
def _blank_image(order: int = 4) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        builder = Builder(cluster_bits=9, size=MiB, refcount_order=order)
        return builder.write(Path(folder) / "disk").read_bytes()


@pytest.mark.parametrize("make", [TolerantReader, SalvagedDisk])
@pytest.mark.parametrize("lost", ["l1_table", "l2_tables"])
def test_what_a_lost_table_maps_is_passed_over_at_once(lost: str, make: Any, tmp_path: Path) -> None:
    builder = Builder(size=1 << 30, cluster_bits=9)
    for span in range(0, 1 << 30, 1 << 15):
        builder.raw(builder.l1 + span // (1 << 15) * 8, (COPIED | 1 << 50).to_bytes(8, "big"))
    path = builder.write(tmp_path / "disk.qcow2")
    start = 4096
    if lost == "l1_table":  # all but its first cluster, whose entries are zeros
        Poke(path).append(bytes(512)).u64(40, path.stat().st_size - 512)
        start = 512 // 8 << 15
    with q.open_disk(path) as disk:
        reads = 0
        read = disk.read

        def counted(offset: int, length: int) -> bytes:
            nonlocal reads
            reads += 1
            return read(offset, length)

        disk.read = counted
        reader = make(disk, "zeros") if make is TolerantReader else make(disk)
        assert reader.read(4096, 8 << 20) == bytes(8 << 20)
        assert reads < 40
        if make is TolerantReader:
            assert reader.unreadable == [(start, 4096 + (8 << 20) - start)]
        else:
            assert reader.missing[0].offset == start
            assert sum(item.length for item in reader.missing) == 4096 + (8 << 20) - start
