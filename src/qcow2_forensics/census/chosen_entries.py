"""Some entries of a batch of L2 tables, and what the batch says of each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import U64, Mask, Places
from .issues import Item, spread
from .walk import Tables


@dataclass(frozen=True)
class ChosenEntries:
    """Entries of a batch of tables by their flat places in it, rising. Every property has an element for each."""

    tables: Tables
    places: Places

    def __len__(self) -> int:
        return len(self.places)

    @classmethod
    def where(cls, tables: Tables, chosen: Mask) -> ChosenEntries:
        """Return the entries that a mask shaped like those of the batch chooses."""
        return cls(tables, np.flatnonzero(chosen))

    def part(self, chosen: Mask) -> ChosenEntries:
        """Return those of the entries that a mask over them chooses."""
        return ChosenEntries(self.tables, self.places[chosen])

    def of(self, column: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the elements of a column of the whole batch that belong to the entries."""
        elements: npt.NDArray[Any] = column.reshape(-1)[self.places]
        return elements

    @cached_property
    def rows(self) -> Places:
        """The tables they are in, by their rows in the batch."""
        rows: Places = self.places // self.tables.entries.shape[1]
        return rows

    @cached_property
    def active(self) -> U64:
        """How many slots of the active L1 table name their tables."""
        return self.tables.active[self.rows]

    @cached_property
    def references(self) -> U64:
        """How many slots of all L1 tables do: as often each entry counts."""
        return self.active + self.tables.snapshots[self.rows]

    @cached_property
    def hosts(self) -> U64:
        """The host clusters they name, in bytes; 0 for none, and for compressed entries."""
        return self.of(self.tables.columns.hosts)

    @cached_property
    def guests(self) -> U64:
        """The guest clusters they map."""
        return self.tables.guest_clusters(self.places)

    def items(self) -> Iterator[Item]:
        """Yield as many of them as are listed, spread over the tables."""
        width = self.tables.entries.shape[1]
        for place in spread(self.places, self.rows).tolist():
            yield self.tables.item(*divmod(place, width))
