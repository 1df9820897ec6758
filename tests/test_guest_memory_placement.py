"""Where RAM blocks are put: what is free is what no region has, and thousands of blocks cost what they are."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_forensics.memory.layout_draft import LayoutDraft
from qcow2_forensics.memory.model import Region
from tests.stream_builder import configuration, page, ram, section, sizes, stream
from tests.test_guest_memory import open_bytes

MiB = 1 << 20
RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=30)


@given(RANGES, st.integers(0, 60), st.integers(1, 20))
def test_what_is_free_is_what_no_region_has(ranges: list[tuple[int, int]], address: int, length: int) -> None:
    made = LayoutDraft()
    taken: set[int] = set()
    for start, size in ranges:
        wanted = set(range(start, start + size))
        assert made.put(Region(start, size, "block", 0), "") == (not wanted & taken)
        taken |= set() if wanted & taken else wanted
    free = made.free(address, length)
    assert {at for start, size in free for at in range(start, start + size)} == set(
        range(address, address + length)
    ) - taken
    assert free == sorted(free)
    assert all(start + size < after for (start, size), (after, _) in pairwise(free))


@pytest.mark.parametrize("machine", ["pc-i440fx-7.2", "virt-7.2", "mystery"])
def test_a_block_costs_no_more_with_thousands_of_others(machine: str) -> None:
    calls = [_calls(machine, count) for count in (256, 2048)]
    assert calls[1] < 10 * calls[0]


def _calls(machine: str, count: int) -> int:
    """Return how many functions are called to open a stream of so many blocks, none of which is the machine's own."""
    blocks = {f"b{number}": 2 * MiB for number in range(count)}
    devices = b"".join(section(4, 10 + number, bytes(40), f"b{number}/virtio-mem") for number in range(count))
    data = stream(configuration(machine), ram(sizes(blocks), page(0, 0, "b0")), devices)
    made = 0

    def note(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal made
        made += event == "call"

    sys.setprofile(note)
    try:
        open_bytes(data)
    finally:
        sys.setprofile(None)
    return made
