"""How strong the evidence is that an L2 table belongs in a slot, in bits, and which slot it is strong enough for.

A structure that records its own position agrees with a wrong slot by chance, as a stale copy of it does. File systems
align to 4 KiB, so that under a table of 2 MiB (clusters of 4 KiB) one copy in 512 agrees, and under one of 32 KiB
(clusters of 512 bytes) every eighth. The binary logarithm of that is what a structure is worth: 9 bits and 3 bits.
Structures of one kind move together, so that another kind counts again and another structure of the same kind
does not. A slot is likely where its evidence is ``ENOUGH`` by itself and against every competitor: another slot that the same
table agrees with, and another table that agrees with the same slot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

ENOUGH = 8.0  # bits: a wrong place agrees by chance once in 256
EXACT = 16.0  # bits of content that a file system says is at one place: a checksum or an inode number, not a position
GUESSED = 4.0  # bits of the same where the file system was read through tables that are guesses
_ALIGNMENT = 4096  # bytes: blocks of most file systems

Votes = Mapping[int, Mapping[str, float]]  # slot: the kinds of structures that agree with it, and the bits of each


class Choice(NamedTuple):
    """The slot that the evidence of a table is strongest for. ``margin`` is how many bits are left against competitors."""

    slot: int
    margin: float
    what: str

    @property
    def is_enough(self) -> bool:
        """Whether nothing else comes close."""
        return self.margin >= ENOUGH


def position_bits(span: int) -> float:
    """Return what one structure that records its position is worth under a table of ``span`` guest bytes."""
    return math.log2(max(1, span // _ALIGNMENT))


def choices(tables: Mapping[int, Votes]) -> dict[int, Choice]:
    """Return the slot of each table, by its number, for which its evidence is better than any other."""
    strengths = {
        number: {slot: sum(kinds.values()) for slot, kinds in votes.items()}
        for number, votes in tables.items()
        if votes
    }
    claims: dict[int, list[tuple[float, int]]] = {}  # by slot: its two strongest tables
    for number, slots in strengths.items():
        for slot, bits in slots.items():
            claims[slot] = sorted([*claims.get(slot, []), (bits, number)])[-2:]
    result: dict[int, Choice] = {}
    for number, slots in strengths.items():
        best = max(slots, key=lambda slot: (slots[slot], -slot))
        rivals = [bits for slot, bits in slots.items() if slot != best]
        rivals += [bits for bits, other in claims[best] if other != number]
        margin = slots[best] - max(rivals, default=0.0)
        if margin > 0:
            result[number] = Choice(best, margin, ", ".join(sorted(tables[number][best])))
    return result
