"""Runs of L2 entries: what is found at the speed of C is what a look at each entry finds."""

from __future__ import annotations

import tempfile
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import qcow2_forensics as q
from qcow2_forensics.reader.l2_runs import qcow1_runs, sequence_end
from qcow2_forensics.reader.mapping import Kind
from tests.image_builder import COPIED, EXT_BACKING_FORMAT, Builder

CLUSTER = 65536
LARGEST = 2**64 - 1

values = st.one_of(
    st.integers(0, LARGEST),
    st.sampled_from([0, 1, COPIED, COPIED | CLUSTER, LARGEST, LARGEST - CLUSTER + 1, CLUSTER, CLUSTER - 1]),
)


@given(
    first=st.integers(0, 2**63 + 2**62 - 1),
    length=st.integers(1, 700),
    step=st.sampled_from([0, 512, CLUSTER, 2 << 20]),
    odd=st.lists(st.tuples(st.integers(1, 699), values), max_size=3),
    stop=st.integers(1, 700),
)
@example(first=COPIED | CLUSTER, length=400, step=CLUSTER, odd=[(1, LARGEST), (2, LARGEST)], stop=400)
@example(first=0, length=100, step=512, odd=[(50, LARGEST), (51, 511)], stop=100)  # one up and one down is no run
def test_the_end_of_a_run_is_the_first_entry_that_does_not_continue_it(
    first: int, length: int, step: int, odd: list[tuple[int, int]], stop: int
) -> None:
    entries = array("Q", [first + index * step for index in range(length)])
    for at, value in odd:
        if at < length:
            entries[at] = value
    stop = min(stop, length)
    wanted = next((at for at in range(1, stop) if entries[at] != entries[at - 1] + step), stop)
    assert sequence_end(entries, 1, stop, step) == wanted


@given(
    parts=st.lists(st.tuples(st.sampled_from("sfzn"), st.integers(1, 40)), min_size=1, max_size=12),
    offset=st.integers(0, 2**16),
    wanted=st.integers(1, 2**16),
)
def test_a_plain_run_is_stored_data_that_follows_each_other(
    parts: list[tuple[str, int]], offset: int, wanted: int
) -> None:
    kinds = "".join(kind * count for kind, count in parts)
    offset %= len(kinds) * 512
    builder = Builder(size=len(kinds) * 512, cluster_bits=9)
    host = 1 << 20
    for index, kind in enumerate(kinds):  # in sequence, fragmented, zero, not allocated
        host += {"s": 512, "f": 1024}.get(kind, 0)
        builder.entry(index * 512, {"z": 1, "n": 0}.get(kind, COPIED | host))
    with tempfile.TemporaryDirectory() as folder, q.open_disk(builder.write(Path(folder) / "a")) as disk:
        run = disk.mapping.plain_run(offset, wanted)
        assert (run is not None) == (kinds[offset // 512] in "sf")
        if run is not None:
            start, end, shift = run
            assert start <= offset < end
            assert [*disk.mapping.runs(start, end - start)] == [(start, end - start, Kind.DATA, start + shift, 0)]


@given(
    parts=st.lists(st.tuples(st.sampled_from("sfnc"), st.integers(1, 60)), min_size=1, max_size=8),
    start=st.integers(0, 511),
    stop=st.integers(1, 512),
)
def test_entries_of_version_1_that_continue_each_other_are_one_run(
    parts: list[tuple[str, int]], start: int, stop: int
) -> None:
    kinds = "".join(kind * count for kind, count in parts).ljust(512, "n")[:512]
    entries, wanted, host = array("Q"), [], 1 << 20
    for index, kind in enumerate(kinds):  # in sequence, fragmented, not allocated, compressed
        host += {"s": 4096, "f": 8192}.get(kind, 0)
        entries.append({"n": 0, "c": 1 << 63 | 100 << 51 | 512}.get(kind, host))
        begin, end = max(start * 4096 + 7, index * 4096), min(stop * 4096 - 9, index * 4096 + 4096)
        if begin >= end:
            continue
        at = {"n": None, "c": 512}.get(kind, host + begin - index * 4096)
        name = {"n": Kind.HOLE, "c": Kind.COMPRESSED}.get(kind, Kind.DATA)
        last = wanted[-1] if wanted and kind != "c" else None
        if last and last[2] == name and (at is None or (last[3] is not None and last[3] + last[1] == at)):
            wanted[-1] = (last[0], last[1] + end - begin, name, last[3], 0)
        else:
            wanted.append((begin, end - begin, name, at, 100 if kind == "c" else 0))
    table = SimpleNamespace(cluster_bits=12, cluster_size=4096, slice_mask=511, slice_shift=21)
    assert [*qcow1_runs(table, entries, 0, start * 4096 + 7, stop * 4096 - 9)] == wanted


def test_tables_past_the_end_of_the_file_cost_one_look_at_their_l1_entry(tmp_path: Path) -> None:
    builder = Builder(size=1 << 40)
    for index in range(2048):
        builder.raw(builder.l1 + 8 * index, (COPIED | 1 << 50).to_bytes(8, "big"))
    with q.open_disk(builder.write(tmp_path / "a"), eof="zeros") as disk:
        assert [*disk.mapping.runs(0, 1 << 40)] == [(0, 1 << 40, Kind.HOLE, None, 0)]
        assert disk.mapping.filled_tables == 2048
        assert not any(disk.mapping.slices.values())


@pytest.mark.parametrize("reserved", [0, 0x3F << 56], ids=["into the reserved bits", "into the compressed flag"])
@pytest.mark.parametrize("extended", [False, True], ids=["standard", "extended"])
def test_an_entry_at_the_highest_offset_is_not_continued_by_the_one_that_counts_over(
    extended: bool, reserved: int, tmp_path: Path
) -> None:
    (tmp_path / "base").write_bytes(b"b" * 4 * CLUSTER)
    builder = Builder(size=4 * CLUSTER, extended_l2=extended, backing=b"base")
    builder.extensions.append((EXT_BACKING_FORMAT, b"raw"))
    top = (1 << 56) - CLUSTER | reserved
    builder.entry(0, top, 0xFFFFFFFF).entry(CLUSTER, top + CLUSTER, 0xFFFFFFFF)
    path = builder.write(tmp_path / "a.qcow2")

    def answer(offset: int, length: int) -> bytes | None:
        with q.open_disk(path, eof="zeros") as disk:
            try:
                return disk.read(offset, length)
            except q.FormatError:
                return None

    alone = answer(CLUSTER, CLUSTER)
    assert answer(0, CLUSTER) == bytes(CLUSTER)
    assert alone == (None if extended or reserved else b"b" * CLUSTER)
    assert answer(0, 2 * CLUSTER) == (None if alone is None else bytes(CLUSTER) + alone)
