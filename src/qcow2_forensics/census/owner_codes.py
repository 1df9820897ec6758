"""The owners of every host cluster, in one byte a cluster."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .arrays import I64, U64, distinct, windows
from .index_map import IndexMap, Values
from .owners import Owner

Codes = npt.NDArray[np.unsignedinteger]

_CODES_IN_A_BYTE = 256


def by_owners(*rows: tuple[Owner, int]) -> npt.NDArray[np.uint8]:
    """Return a number for every combination of owners: that of the last row of which it has an owner, 0 for none."""
    numbers, bits = np.zeros(2 * max(Owner), np.uint8), np.arange(2 * max(Owner))
    for owner, number in rows:
        numbers[(bits & int(owner)) != 0] = number
    return numbers


class OwnerCodes:
    """Which :class:`Owner` bits each cluster has, by its index.

    A cluster holds the number of a combination of owners, given out as they are met. There are few; a crafted
    image that has more than fit a byte widens the array as a whole. 0 is nobody.
    """

    def __init__(self, length: int) -> None:
        self._codes: Codes = np.zeros(length, dtype=np.uint8)
        self._combinations = [0]
        self._numbers = {0: 0}
        self._bits = np.zeros(1, dtype=np.uint16)  # the combinations again, as an array
        self._steps: dict[int, npt.NDArray[np.uint16]] = {}  # by owner: from a code to that with it, 0 for not met

    def add(self, where: slice | U64, owner: Owner, width: int = 0) -> None:
        """Add an owner to some clusters, which may repeat; with a ``width`` to as many from each of them on."""
        codes = self._cut(width)[where]
        if not len(codes):
            return
        first = codes.flat[0]
        if first == codes.flat[-1] and bool((codes == first).all()):  # mostly clusters that nobody had
            number = self._number(self._combinations[first] | int(owner))
            self._cut(width)[where] = number
            return
        step = self._steps.get(int(owner))
        if step is None or len(step) < len(self._combinations):
            step = self._lengthened(int(owner))
        found = step[codes]
        if not found.all():
            for code in distinct(codes[found == 0]).tolist():
                step[code] = self._number(self._combinations[code] | int(owner))
            found = step[codes]
        self._cut(width)[where] = found

    def _cut(self, width: int) -> Codes:
        return windows(self._codes, width) if width else self._codes

    def _lengthened(self, owner: int) -> npt.NDArray[np.uint16]:
        step = np.zeros(max(256, 2 * len(self._combinations)), dtype=np.uint16)
        for code, bits in enumerate(self._combinations):
            step[code] = self._numbers.get(bits | owner, 0)
        self._steps[owner] = step
        return step

    def _number(self, bits: int) -> int:
        number = self._numbers.get(bits)
        if number is None:
            number = self._numbers[bits] = len(self._combinations)
            self._combinations.append(bits)
            self._bits = np.asarray(self._combinations, dtype=np.uint16)
            if number == _CODES_IN_A_BYTE:
                self._codes = self._codes.astype(np.uint16)
        return number

    def __getitem__(self, indices: U64) -> Values:
        """Return the owners of some clusters."""
        found: Values = self._bits[self._codes[indices]]
        return found

    def at(self, index: int) -> Owner:
        """Return the owners of one cluster."""
        return Owner(self._combinations[int(self._codes[index])])

    def runs(self, index_map: IndexMap, start: int, stop: int) -> tuple[I64, I64, Values]:
        """Return starts, stops and owners of the runs of clusters with the same owners between two of the file."""
        codes = index_map.part(self._codes, start, stop)
        bounds = np.concatenate(([start], np.flatnonzero(codes[1:] != codes[:-1]) + (start + 1), [stop]))
        return bounds[:-1], bounds[1:], self._bits[codes[bounds[:-1] - start]]
