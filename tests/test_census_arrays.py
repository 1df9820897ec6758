"""The arrays of a census against plain ones: few bytes a cluster, and the same answers."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_forensics import open_image
from qcow2_forensics.census.arrays import distinct, distinct_rows, is_among, run_starts, stretches
from qcow2_forensics.census.guest_tags import GuestTags
from qcow2_forensics.census.index_map import IndexMap
from qcow2_forensics.census.owner_codes import OwnerCodes
from qcow2_forensics.census.owners import Owner
from qcow2_forensics.census.refcount_classes import MORE, ONE, UNREADABLE, RefcountClasses
from qcow2_forensics.census.refcounts import StoredRefcounts
from qcow2_forensics.limits import MiB

from . import qemu

_LENGTH = 5000


class _Dense:
    """What :class:`GuestTags` means, with a tag for every element."""

    def __init__(self) -> None:
        self.tags = np.zeros(_LENGTH, np.uint32)

    def set_run(self, start: int, count: int, tag: int) -> bool:
        tags, known = np.arange(tag, tag + count, dtype=np.uint32), self.tags[start : start + count]
        if not ((known == 0) | (known == tags)).all():
            return False
        self.tags[start : start + count] = tags
        return True

    def exchange(self, indices: np.ndarray, tags: np.ndarray) -> np.ndarray:
        known = self.tags[indices]
        self.tags[indices] = tags
        return ((known != 0) & (known != tags)) | (self.tags[indices] != tags)


def _runs_after(rng: random.Random, start: int, tag: int) -> list[tuple[int, int, int]]:
    """Return a few runs further on, none of which shares an element with another."""
    runs = []
    while start < _LENGTH - 1 and rng.random() < 0.6:
        start += rng.choice((0, 1, 1, 256, 999))
        count = min(rng.choice((1, 100, 256, 600)), _LENGTH - start)
        if count > 0:
            runs.append((start, count, rng.choice((start + 1, start + 8, tag))))
        start += count
    return runs


@pytest.mark.parametrize("seed", range(12))
def test_tags_are_those_of_a_plain_array(seed: int) -> None:
    rng, dense, tags = random.Random(seed), _Dense(), GuestTags(_LENGTH)
    for _ in range(300):
        start = rng.randrange(_LENGTH - 1)
        count = rng.randint(1, min(_LENGTH - start, rng.choice((3, 300, 3000))))
        tag = start + rng.choice((1, 1, 1, 7, 2**31, 2**32 - 1 - _LENGTH - start))
        if rng.random() < 0.4:
            runs = [(start, count, tag), *_runs_after(rng, start + count, tag)]
            wanted_of_runs = [dense.set_run(*run) for run in runs]
            assert tags.set_runs(*np.asarray(runs).T).tolist() == wanted_of_runs
        else:
            indices = np.arange(start, start + count, dtype=np.uint64)
            if rng.random() < 0.3:
                indices = np.concatenate(
                    (indices, rng.choice((indices, indices[::-1], indices[:1], (indices + 9) % _LENGTH)))
                )
            wanted = (indices.astype(np.int64) - start + tag).astype(np.uint32)
            if rng.random() < 0.2:
                wanted[rng.randrange(len(wanted))] = rng.randint(1, 2**32 - 1)
            assert np.array_equal(tags.exchange(indices, wanted), dense.exchange(indices, wanted))
    everything = np.arange(_LENGTH, dtype=np.uint64)
    probe = np.full(_LENGTH, 3, np.uint32)
    assert np.array_equal(tags.exchange(everything, probe), dense.exchange(everything, probe))


def test_tags_that_rise_take_next_to_no_memory() -> None:
    tags, at = GuestTags(1 << 20), 0
    while at + 8192 < 1 << 20:
        assert tags.set_runs(*np.asarray([[at], [8192], [at + 1]])).all()
        at += 8193
    held = sum(value.nbytes for value in vars(tags).values() if isinstance(value, np.ndarray))
    assert held < (1 << 20) // 4


def _owners(codes: OwnerCodes, start: int, stop: int) -> np.ndarray:
    starts, stops, owners = codes.runs(IndexMap(2999), start, stop)
    assert (starts[0], stops[-1]) == (start, stop)
    assert np.array_equal(starts[1:], stops[:-1])
    assert (owners[1:] != owners[:-1]).all()
    return np.repeat(owners, stops - starts)


@pytest.mark.slow
def test_owners_are_those_of_a_plain_array() -> None:
    rng, codes, dense = np.random.default_rng(4), OwnerCodes(3000), np.zeros(3000, np.uint16)
    for step in range(400):  # far more combinations than fit a byte
        owner = Owner(1 << int(rng.integers(15)))
        where = rng.integers(0, 3000, 50).astype(np.uint64)
        if step % 10 == 1:
            starts = where[where < 2960][:3]
            codes.add(starts, owner, 40)
            for start in starts.tolist():
                dense[start : start + 40] |= np.uint16(owner)
        elif step % 3:
            codes.add(where, owner)
            dense[where] |= np.uint16(owner)
        else:
            start = int(where[0])
            codes.add(slice(start, start + 40), owner)
            dense[start : start + 40] |= np.uint16(owner)
        if step % 20 == 0:
            assert np.array_equal(_owners(codes, 0, 3000), dense)
    assert np.array_equal(_owners(codes, 0, 3000), dense)
    assert np.array_equal(_owners(codes, 700, 701), dense[700:701])
    assert len(np.unique(dense)) > 256
    assert np.array_equal(codes[where], dense[where])
    assert codes.at(7) == Owner(int(dense[7]))


def test_classes_are_those_of_the_refcounts(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, str(40 * MiB))
    with open_image(path) as image:
        stored = StoredRefcounts(image)
        clusters = -(-image.file_size // image.cluster_size)
        with path.open("r+b") as file:
            for cluster, value in ((13, 2), (20, 0), (41, 7)):
                file.seek(stored.entry_offset(cluster) or 0)
                file.write(value.to_bytes(2, "big"))
    with open_image(path) as image:
        stored = StoredRefcounts(image)
        classes = RefcountClasses(stored, IndexMap(clusters))
        values, _ = stored.lookup(np.arange(clusters, dtype=np.uint64))
        wanted = np.minimum(values, MORE)
        for first in range(48):
            for last in range(first, 50):
                assert np.array_equal(classes.of(first, last), wanted[first:last])
        for width in (*range(1, 12), 40):
            starts = np.arange(clusters - width, dtype=np.uint64)
            runs = np.lib.stride_tricks.sliding_window_view(wanted, width)[starts]
            for copied, fits in ((True, runs == ONE), (False, (runs != ONE) & (runs != UNREADABLE))):
                assert np.array_equal(
                    classes.copied_fits(starts, width, np.full(len(starts), copied)), fits.all(axis=1)
                )
        everything = np.arange(clusters, dtype=np.uint64)
        assert np.array_equal(classes.single(everything)[0], wanted == ONE)


_PEAK = """
import sys
import qcow2_forensics as q
from tests.peak_memory import peak_mib
for path in sys.argv[2:]:
    q.audit(path, sys.argv[1])
    print(peak_mib())
"""


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["standard", "deep"])
def test_memory_follows_a_few_bytes_a_cluster(tmp_path: Path, depth: str) -> None:
    """At the rate at which memory grows from 0.5 to 2 TiB, 16 TiB take less than 1 GiB."""
    paths = [tmp_path / f"{size}.qcow2" for size in (512, 2048)]
    for path in paths:
        size = f"{path.stem}G"
        qemu.img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, size)
    command = [sys.executable, "-c", _PEAK, depth, *map(str, paths)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    quarter, whole = map(int, run.stdout.split())
    assert whole + (whole - quarter) * (16 - 2) / (2 - 0.5) < 1024


_NUMBERS = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 4))


@given(_NUMBERS, _NUMBERS)
def test_different_values_and_those_among_others_are_those_of_numpy(values: list[int], others: list[int]) -> None:
    one, two = np.asarray(values, np.uint64), np.asarray(others, np.uint64)
    assert np.array_equal(distinct(one), np.unique(one))
    assert np.array_equal(is_among(one, distinct(two)), np.isin(one, two))


@given(st.lists(st.integers(0, 5)))
def test_runs_of_equal_neighbours_start_where_a_value_differs_from_the_one_before(values: list[int]) -> None:
    expected = [at for at, value in enumerate(values) if at == 0 or value != values[at - 1]]
    assert run_starts(np.asarray(values, np.uint64)).tolist() == expected


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3))))
def test_different_rows_are_those_of_a_set_in_order(rows: list[tuple[int, int]]) -> None:
    found = distinct_rows(np.asarray(rows, np.int64).reshape(-1, 2))
    assert [tuple(row) for row in found.tolist()] == sorted(set(rows))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1))))
def test_a_stretch_ends_where_a_break_is(rows: list[tuple[int, int]]) -> None:
    table = np.asarray(rows, np.int64).reshape(-1, 2)
    found = list(stretches(len(table), (np.diff(table, axis=0) != 0).any(axis=1)))
    assert [first for first, _ in found] == run_starts(*table.T).tolist()
    assert [stop for _, stop in found] == [*run_starts(*table.T).tolist()[1:], len(rows)][: len(found)]
