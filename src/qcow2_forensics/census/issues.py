"""What the census met that should not be: counted in full, listed up to a cap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..findings import EVIDENCE_LIMIT


class Item(NamedTuple):
    """One entry that is wrong: the file offset it stands at, its value, what it points at.

    ``tree`` is -1 for the active state, else the index of a snapshot; ``host`` the host offset
    concerned, ``guest`` the guest offset, where there is one.
    """

    structure: str
    offset: int | None
    value: int
    host: int | None = None
    guest: int | None = None
    tree: int = -1


@dataclass
class Issue:
    """All items of one kind; ``count`` is how many places there were, sharing not multiplied."""

    items: list[Item] = field(default_factory=list)
    count: int = 0


class Issues:
    """Issues by kind. A kind is a short word; :mod:`qcow2_forensics.audit` turns it into findings."""

    def __init__(self) -> None:
        self._found: dict[str, Issue] = {}

    def add(self, kind: str, items: Iterable[Item], count: int | None = None) -> None:
        """Note items of a kind; ``count`` when there are more than the iterable gives."""
        issue = self._found.setdefault(kind, Issue())
        seen = 0
        for item in items:
            seen += 1
            if len(issue.items) < EVIDENCE_LIMIT:
                issue.items.append(item)
            elif count is not None:
                break
        issue.count += seen if count is None else count

    def room(self, kind: str) -> int:
        """Return how many more items of a kind would be kept."""
        return EVIDENCE_LIMIT - len(self._found[kind].items) if kind in self._found else EVIDENCE_LIMIT

    def __getitem__(self, kind: str) -> Issue:
        return self._found.get(kind) or Issue()

    def __contains__(self, kind: str) -> bool:
        return kind in self._found

    def kinds(self) -> dict[str, int]:
        """Return the count of every kind met."""
        return {kind: issue.count for kind, issue in self._found.items()}
