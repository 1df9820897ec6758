"""What a placed L2 table is worth: no place is likely without corroboration, and none is taken where nothing says so.

The images are written cluster by cluster by a model of the allocation that QEMU does (a table when a write first needs it,
then the clusters of the write); the L1 table is never given to what is tested.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_forensics.census.arrays import U64
from qcow2_forensics.format.entries import COMPRESSED, COPIED
from qcow2_forensics.recovery import Confidence, recovered_states
from qcow2_forensics.recovery.chains import arrange, chains_of, trusted_steps
from qcow2_forensics.recovery.continuation import continuations, written_in_order
from qcow2_forensics.recovery.placement import Placement, Unplaced, in_file_order, place
from qcow2_forensics.recovery.slot_evidence import ENOUGH, choices, position_bits
from tests import qemu

CLUSTER = 512
ENTRIES = CLUSTER // 8

votes = st.dictionaries(
    st.integers(0, 5), st.dictionaries(st.sampled_from("abc"), st.floats(1, 16), min_size=1), max_size=4
)


def strength(kinds: dict[str, float]) -> float:
    return sum(kinds.values())


@given(st.dictionaries(st.integers(0, 5), votes, max_size=5))
def test_a_slot_is_likely_only_where_no_other_slot_and_no_other_table_comes_close(
    tables: dict[int, dict[int, dict[str, float]]],
) -> None:
    for number, choice in choices(tables).items():
        own = strength(tables[number][choice.slot])
        others = [strength(kinds) for slot, kinds in tables[number].items() if slot != choice.slot]
        others += [strength(found[choice.slot]) for n, found in tables.items() if n != number and choice.slot in found]
        assert own > max(others, default=0)
        assert choice.is_enough == (own - max(others, default=0) >= ENOUGH)


@pytest.mark.parametrize(
    ("cluster", "kinds", "likely"), [(512, 1, False), (512, 2, False), (4096, 1, True), (1024, 2, True)]
)
def test_one_structure_is_enough_only_where_chance_could_hardly_have_put_it_there(
    cluster: int, kinds: int, likely: bool
) -> None:
    """A stale copy of a structure agrees with one slot in eight at clusters of 512 bytes, in 512 at 4 KiB."""
    span = cluster * cluster // 8
    found = {0: {7: {str(kind): position_bits(span) for kind in range(kinds)}}}
    assert choices(found)[0].is_enough == likely


@pytest.mark.parametrize("rival", [{1: {7: {"a": 9.0}}}, {0: {8: {"b": 9.0}}}])
def test_a_competitor_of_the_same_strength_leaves_a_table_without_a_slot(
    rival: dict[int, dict[int, dict[str, float]]],
) -> None:
    found = {0: {7: {"a": 9.0}, **rival.get(0, {})}, 1: rival.get(1, {})}
    assert 0 not in choices(found)


# --- what continues what ---------------------------------------------------------------------------


class Writer:
    """A model of how QEMU allocates: ``tables`` are the entries by slot, ``offsets`` where each table is."""

    def __init__(self) -> None:
        self.tables: dict[int, U64] = {}
        self.offsets: dict[int, int] = {}
        self._end = 8 * CLUSTER

    def _allocate(self) -> int:
        self._end += CLUSTER
        return self._end - CLUSTER

    def write(self, clusters: Iterable[int]) -> None:
        for cluster in clusters:
            slot, place_ = divmod(cluster, ENTRIES)
            if slot not in self.tables:
                self.offsets[slot] = self._allocate()
                self.tables[slot] = np.zeros(ENTRIES, np.uint64)
            if not self.tables[slot][place_]:
                self.tables[slot][place_] = self._allocate() | COPIED

    def unplaced(self, *, without: Iterable[int] = ()) -> list[Unplaced]:
        return [Unplaced(at, self.tables[slot], {}) for slot, at in self.offsets.items() if slot not in set(without)]

    def true_slots(self) -> dict[int, int]:
        return {at: slot for slot, at in self.offsets.items()}


def stretches(chance: random.Random, count: int) -> list[range]:
    """Return writes that fill some parts of a disk, out of order, none of them ending or beginning with a table."""
    starts = sorted(chance.sample(range(count), count // 3))
    found = []
    for first, stop in zip(starts, [*starts[1:], count], strict=True):
        begin, end = first * ENTRIES + chance.randint(1, ENTRIES - 2), stop * ENTRIES + chance.randint(-ENTRIES + 2, -1)
        if end > begin:
            found.append(range(begin, end))
    chance.shuffle(found)
    return found


@given(st.randoms(use_true_random=False), st.integers(6, 40))
def test_a_table_continues_another_only_where_it_is_the_next(chance: random.Random, count: int) -> None:
    writer = Writer()
    for written in stretches(chance, count):
        writer.write(written)
    slots = list(writer.tables)
    pairs = continuations([writer.tables[slot] for slot in slots], CLUSTER)
    assert all(slots[second] == slots[first] + 1 for first, second in pairs)
    full = [
        slot for slot in slots if slot + 1 in writer.tables and writer.tables[slot][-1] and writer.tables[slot + 1][0]
    ]
    assert len(pairs) == len(full)


@given(st.randoms(use_true_random=False), st.integers(6, 40))
def test_no_table_of_a_disk_written_out_of_order_is_placed_wrong(chance: random.Random, count: int) -> None:
    """The right answer to too little is no place, whatever the number of free slots."""
    writer = Writer()
    for written in stretches(chance, count):
        writer.write(written)
    true = writer.true_slots()
    sure = chance.sample(sorted(writer.tables), max(1, len(writer.tables) // 3))
    if written_in_order([table.entries for table in writer.unplaced()], CLUSTER):
        return
    known = [Placement(slot, writer.offsets[slot], Confidence.CERTAIN, "") for slot in sure]
    entries = {slot: [writer.tables[slot]] for slot in sure}
    placed = place(writer.unplaced(without=sure), entries, count, CLUSTER, fixed=known)
    assert all(true[found.offset] == found.slot for found in placed.placements)
    assert {found.offset for found in placed.placements} | {table.offset for table in placed.left} == true.keys()
    assert all(found.confidence is Confidence.GUESS for found in placed.placements if found.slot not in sure)
    assert len(in_file_order(placed, count)) == len(true)


def test_a_disk_written_from_start_to_end_is_placed_in_order() -> None:
    writer = Writer()
    for slot in range(6):
        writer.write(range(slot * ENTRIES + 3, slot * ENTRIES + 40))
    placed = place(writer.unplaced(), {}, 6, CLUSTER)
    assert [(found.slot, found.offset) for found in placed.placements] == sorted(writer.offsets.items())


def test_streams_may_lie_before_plain_clusters_that_were_written_earlier() -> None:
    """A stream goes on in the last cluster that holds streams; what does not compress gets a cluster of its own."""
    packed = COMPRESSED | 1 << 61  # two sectors of 512 bytes
    entries = np.array([packed | 4096, 8192 | COPIED, packed | 4400, 8704 | COPIED], np.uint64)
    assert written_in_order([entries], CLUSTER)
    assert not written_in_order([entries[::-1]], CLUSTER)


def test_one_wrong_link_costs_a_chain_its_slots_and_no_wrong_ones() -> None:
    # 0-1-2-3 between the slots 10 and 20: their distance is that of four tables only where they are 10 and 15.
    pairs = [(4, 0), (0, 1), (1, 2), (2, 3), (3, 5)]
    assert arrange(chains_of(4, [10, 20], pairs), 30, {10, 20}, None, 100) == {}
    right = arrange(chains_of(4, [10, 15], pairs), 30, {10, 15}, None, 100)
    assert {table: slot for table, (slot, _) in right.items()} == {0: 11, 1: 12, 2: 13, 3: 14}
    behind = arrange(chains_of(4, [10], pairs[:-1]), 30, {10, 13}, None, 100)
    assert behind == {}  # slot 13 is taken


def test_where_links_are_seen_to_fail_few_of_them_are_trusted() -> None:
    slots = list(range(100))
    right = [(at, at + 1) for at in range(50)]
    assert trusted_steps(slots, []) == 10
    assert trusted_steps(slots, right) > 50
    assert trusted_steps(slots, [*right, (60, 70), (71, 90)]) < 5


def test_tables_without_evidence_are_reported_not_placed_and_a_second_state_has_them_in_order(tmp_path: Path) -> None:
    """Two parts of a disk without a file system, written in the wrong order, the second then filled up."""
    path = qemu.create(tmp_path / "disk.qcow2", "8M", cluster_size="4096")
    qemu.io(path, "write -P 1 4M 1M", "write -P 2 6M 1M", "write -P 3 0 1M", "write -P 4 5M 1M")
    data = bytearray(path.read_bytes())
    offset = int.from_bytes(data[40:48], "big")
    data[offset : offset + 32] = bytes(32)
    path.write_bytes(data)
    (state,) = recovered_states(path)
    assert "in the order of the file" in state.what
    assert state.confidence is Confidence.GUESS
