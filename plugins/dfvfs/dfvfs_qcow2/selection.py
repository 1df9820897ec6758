"""``all``, ``none``, ``1,3..5`` or a name: which snapshots the user wants.

Numbers are positions from 1 as ``qemu-img snapshot -l`` lists them, which is also what a hint
prints; they are usually, but not always, the snapshot's ID. A name that looks like a number or a
keyword is written ``name:1``, an ID ``id:1``.

``all`` are those in the snapshot table. Deleted ones are asked for by ``deleted`` (every one whose
entry survives) or ``deleted:`` with an ID, a name or an entry's offset, also in a list:
``all,deleted``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qcow2_forensics.errors import SnapshotNotFound
from qcow2_forensics.text import printable

if TYPE_CHECKING:
    from qcow2_forensics.residue import DeletedSnapshot

_MOST = 65_536  # what QEMU accepts in one image; bounds what a range may name
_RANGE = re.compile(r"([0-9]{1,6})(?:\.\.([0-9]{1,6}))?")


class Entry(Protocol):
    """What a snapshot must tell to be chosen."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Selection:
    """A parsed choice; ``none`` and no choice at all differ in whether a hint is printed."""

    text: str

    def __post_init__(self) -> None:
        for first, last in map(_range, self._items()):
            if first is not None and not 1 <= first <= (last or 0) <= _MOST:
                raise ValueError(f"unsupported snapshot range in: {printable(self.text)}")

    @property
    def wants_any(self) -> bool:
        """Whether any snapshot is asked for."""
        return self.text != "none"

    @property
    def wants_deleted(self) -> bool:
        """Whether any deleted snapshot is asked for."""
        return any(map(_is_deleted, self._items()))

    def _items(self) -> list[str]:
        if self.text == "none":
            return []
        items = [item.strip() for item in self.text.split(",")]
        if not all(items):
            raise ValueError(f"unsupported snapshots value: '{printable(self.text)}'")
        return items

    def choose(self, entries: Sequence[Entry]) -> list[int]:
        """Return the indices of the chosen entries, ascending; SnapshotNotFound names the choices."""
        whole = [index for index, entry in enumerate(entries) if entry.name == self.text]
        if len(whole) == 1 and "," in self.text:  # a name that holds a comma
            return whole
        chosen: set[int] = set()
        for item in self._items():
            if not _is_deleted(item):
                chosen.update(_choose_one(item, entries))
        return sorted(chosen)

    def choose_deleted(self, found: Sequence[DeletedSnapshot]) -> list[DeletedSnapshot]:
        """Return the chosen ones of the deleted snapshots, in their order; SnapshotNotFound names the choices."""
        from qcow2_forensics.residue.snapshot_entries import choose

        items = [item for item in self._items() if _is_deleted(item)]
        if "deleted" in items:
            return list(found)
        chosen = [choose(found, item.partition(":")[2]) for item in items]
        return [item for item in found if item in chosen]


def _is_deleted(item: str) -> bool:
    return item == "deleted" or item.startswith("deleted:")


def _range(item: str) -> tuple[int | None, int | None]:
    match = _RANGE.fullmatch(item)
    if match is None:
        return None, None
    return int(match[1]), int(match[2] or match[1])


def _choose_one(item: str, entries: Sequence[Entry]) -> Sequence[int]:
    if item == "all":
        return range(len(entries))
    first, last = _range(item)
    if first is not None and last is not None:
        if last > len(entries):
            raise SnapshotNotFound(item, _choices(entries))
        return range(first - 1, last)
    kind, colon, rest = item.partition(":")
    if colon and kind == "id":
        found = [index for index, entry in enumerate(entries) if entry.id == rest]
    else:
        wanted = rest if colon and kind == "name" else item
        found = [index for index, entry in enumerate(entries) if entry.name == wanted]
    if len(found) != 1:
        raise SnapshotNotFound(item, _choices(entries), ambiguous=bool(found))
    return found


def _choices(entries: Sequence[Entry]) -> list[str]:
    return [f"{position}: ID {printable(e.id)} ({printable(e.name)})" for position, e in enumerate(entries, 1)]
