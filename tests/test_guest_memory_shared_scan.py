"""A scan of several memories gives what a scan of each by itself gives."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest

from qcow2_forensics.memory import GuestMemory, shared_scan
from qcow2_forensics.memory.shared_scan import PIECE, Match, pattern_finder, scan_memories
from tests.stream_builder import PAGE, page, simple
from tests.test_guest_memory import open_bytes
from tests.tiers import every

MiB = 1 << 20
PATTERNS = [rb"C2-[A-Z]{4,40}", rb"[ -~]{6,}", rb"\bkey=\w+", rb"(?<=user=)[a-z]+"]


def memory_of(data: bytes) -> GuestMemory:
    pages = [data[at : at + PAGE] for at in range(0, len(data), PAGE)]
    records = [page(n, text if any(text) else 0, None if n else "pc.ram") for n, text in enumerate(pages)]
    return open_bytes(simple(records, {"pc.ram": len(data)}))


def contents(seed: int, states: int) -> list[bytes]:
    """Memories of one machine: words at borders of pieces, and pages that differ from state to state."""
    source = random.Random(seed)
    first = bytearray(5 * MiB)
    words = [b"C2-CALLBACK", b"key=abc ", b"user=alice", b"long printable text " * 300]
    borders = [*range(PIECE, 5 * MiB, PIECE)]
    for _ in range(60):
        word = source.choice(words)
        place = source.choice([source.choice(borders) - source.randrange(30), source.randrange(4 * MiB)])
        first[place : place + len(word)] = word
    found = [bytes(first[: 5 * MiB])]
    for _ in range(states - 1):
        changed = bytearray(found[-1])
        for _ in range(4):
            place = source.randrange(5 * 256) * PAGE
            changed[place : place + PAGE] = (source.choice(words) * 600)[:PAGE]
        found.append(bytes(changed))
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", every(3, range(3)))
def test_matches_are_those_of_a_search_through_each_memory(pattern: bytes, seed: int) -> None:
    datas = contents(seed, 3)
    wanted = [(number, match.start()) for number, data in enumerate(datas) for match in re.finditer(pattern, data)]
    memories = [memory_of(data) for data in datas]
    scan = scan_memories(memories, pattern_finder(re.compile(pattern)))
    found = [(number, match.offset) for number, match in scan]
    assert sorted(found) == sorted(wanted)
    assert found


def test_equal_pieces_are_scanned_once_and_the_rest_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = 0

    def find(data: bytes) -> Iterator[Match]:
        nonlocal scanned
        scanned += len(data)
        return iter(())

    data = random.Random(1).randbytes(8 * MiB)
    changed = data[:PAGE] + bytes(PAGE) + data[2 * PAGE :]
    assert list(scan_memories([memory_of(data)], find)) == []
    once, scanned = scanned, 0
    assert list(scan_memories([memory_of(data), memory_of(changed), memory_of(data)], find)) == []
    assert once < scanned <= once + PIECE + shared_scan.BEFORE + shared_scan.AFTER


def test_memories_of_other_sizes_are_scanned_to_their_own_ends() -> None:
    datas = [b"C2-CALLBACK".rjust(PAGE, b"\0") * 3, b"C2-CALLBACK".rjust(PAGE, b"\0") * 5]
    found = list(scan_memories([memory_of(data) for data in datas], pattern_finder(re.compile(b"C2-CALLBACK"))))
    assert sorted(number for number, _ in found) == [0, 0, 0, 1, 1, 1, 1, 1]
    assert list(scan_memories([], pattern_finder(re.compile(b"x")))) == []


def test_overlapping_matches_are_kept_for_finders_that_give_them() -> None:
    def find(data: bytes) -> Iterator[Match]:
        return (Match(at, "", data[at : at + 2]) for at in range(len(data) - 1) if data[at : at + 2] == b"aa")

    data = b"aaaa".ljust(PAGE, b"\0")
    assert len(list(scan_memories([memory_of(data)], find, overlapping=True))) == 3
    assert len(list(scan_memories([memory_of(data)], find))) == 2


def test_zeros_that_match_are_found_in_every_piece() -> None:
    found = list(scan_memories([memory_of(bytes(40 * PAGE))], pattern_finder(re.compile(rb"\0{4096}"))))
    offsets = [match.offset for _, match in found]
    assert len(offsets) >= 36  # a match that crosses a border of pieces may begin anywhere in zeros
    assert all(second - first >= PAGE for first, second in pairwise(offsets))
