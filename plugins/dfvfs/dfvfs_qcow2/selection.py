"""``all``, ``none``, ``1,#3..#5`` or a name: which snapshots the user wants.

Each item of a list is a state as everywhere in this project (:mod:`qcow2_forensics.reader.states`): an
ID, else a name, ``#N`` for the position in the table from 1, as a hint prints it, ``index:N``,
``id:X``, ``name:X``. Positions make ranges: ``#3..#5``, ``index:2..4``.

``all`` are those in the snapshot table. Deleted ones are asked for by ``deleted`` (every one whose
entry survives) or ``deleted:`` with an ID, a name or an entry's offset, also in a list:
``all,deleted``. States put together from what is left of a damaged image are asked for by ``recovered``
(every one) or ``recovered:N``. A snapshot that is called ``all`` or as any other of these words makes the word
ambiguous: then ``=all`` is the word, and ``name:all`` the snapshot.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcow2_forensics.errors import SnapshotNotFound
from qcow2_forensics.reader import states
from qcow2_forensics.text import printable

if TYPE_CHECKING:
    from qcow2_forensics import Image
    from qcow2_forensics.format.snapshot_table import SnapshotEntry
    from qcow2_forensics.recovery import RecoveredState
    from qcow2_forensics.residue import DeletedSnapshot

_RANGE = re.compile(r"(#|index:)([0-9]{1,6})\.\.(?:#|index:)?([0-9]{1,6})")
_BARE_RANGE = re.compile(r"[0-9]+\.\.[0-9]+")


@dataclass(frozen=True)
class Selection:
    """A parsed choice; ``none`` and no choice at all differ in whether a hint is printed."""

    text: str

    def __post_init__(self) -> None:
        for item in self._items():
            if _BARE_RANGE.fullmatch(item):
                marked = "..".join(f"#{number}" for number in item.split(".."))
                raise ValueError(f"'{printable(item)}' has no meaning: positions are written {marked}, IDs one by one")
            found = _RANGE.fullmatch(item.lstrip("="))
            if found is not None and (int(found[2]) > int(found[3]) or (found[1] == "#" and not int(found[2]))):
                raise ValueError(f"unsupported snapshot range in: {printable(self.text)}")

    @property
    def wants_any(self) -> bool:
        """Whether any snapshot is asked for."""
        return self.text != "none"

    @property
    def wants_deleted(self) -> bool:
        """Whether any deleted snapshot is asked for."""
        return any(map(_is_deleted, self._items()))

    @property
    def wants_recovered(self) -> bool:
        """Whether any recovered state is asked for."""
        return any(map(_is_recovered, self._items()))

    def choose_recovered(self, found: Sequence[RecoveredState]) -> list[RecoveredState]:
        """Return the chosen ones of the recovered states, in their order; SnapshotNotFound names the choices."""
        items = [item.lstrip("=") for item in self._items() if _is_recovered(item)]
        if "recovered" in items:
            return list(found)
        known = {state.label: state for state in found}
        for item in items:
            if item not in known:
                raise SnapshotNotFound(item, [f"{state.label} ({state.what})" for state in found])
        return [state for state in found if state.label in items]

    def _items(self) -> list[str]:
        if self.text == "none":
            return []
        items = [item.strip() for item in self.text.split(",")]
        if not all(items):
            raise ValueError(f"unsupported snapshots value: '{printable(self.text)}'")
        return items

    def choose(self, image: Image) -> list[SnapshotEntry]:
        """Return the chosen entries of the snapshot table in its order; SnapshotNotFound names the choices."""
        if "," in self.text and len(states.by_id_or_name(image.snapshots, self.text)) == 1:
            return states.by_id_or_name(image.snapshots, self.text)  # a name that holds a comma
        chosen = {entry.index: entry for item in self._items() for entry in _choose_one(item, image)}
        return [chosen[index] for index in sorted(chosen)]

    def choose_deleted(self, found: Sequence[DeletedSnapshot]) -> list[DeletedSnapshot]:
        """Return the chosen ones of the deleted snapshots, in their order; SnapshotNotFound names the choices."""
        from qcow2_forensics.residue.snapshot_entries import choose

        items = [item.lstrip("=") for item in self._items() if _is_deleted(item)]
        if "deleted" in items:
            return list(found)
        chosen = [choose(found, item.partition(":")[2]) for item in items]
        return [item for item in found if item in chosen]


def _is_deleted(item: str) -> bool:
    word = item.lstrip("=")
    return word == "deleted" or word.startswith("deleted:")


def _is_recovered(item: str) -> bool:
    word = item.lstrip("=")
    return word == "recovered" or word.startswith("recovered:")


def _choose_one(item: str, image: Image) -> Sequence[SnapshotEntry]:
    word = item.lstrip("=")
    found = _RANGE.fullmatch(word)
    if word == "all" or found is not None or _is_deleted(item) or _is_recovered(item):
        states.refuse_if_named(image, item)
    if word == "all":
        return image.snapshots
    if _is_deleted(item) or _is_recovered(item):
        return ()
    if found is not None:
        first, last = (states.position(f"{found[1]}{number}") for number in found.group(2, 3))
        if first is None or last is None or last >= len(image.snapshots):
            raise SnapshotNotFound(item, states.choices(image.snapshots))
        return image.snapshots[first : last + 1]
    entry = states.find_snapshot(image, item)
    return () if entry is None else (entry,)  # the active state is always read
