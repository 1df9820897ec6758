"""``all``, ``changed``, ``none``, ``1,#3..#5`` or a name: which snapshots the user wants.

Each item of a list is a state as everywhere in this project (:mod:`qcow2_forensics.reader.states`): an
ID, else a name, ``#N`` for the position in the table from 1, as a hint prints it, ``index:N``,
``id:X``, ``name:X``. Positions make ranges: ``#3..#5``, ``index:2..4``. A name may hold commas.

``all`` are those in the snapshot table. Deleted ones are asked for by ``deleted`` (every one whose
entry survives) or ``deleted:`` with an ID, a name or an entry's offset, also in a list:
``all,deleted``. States put together from what is left of a damaged image are asked for by ``recovered``
(every one) or ``recovered:N``. ``changed:`` in front of an item asks only for the files of a snapshot that neither the
next chosen state nor the active one has in the same way; ``changed`` is ``changed:all``.

The words may be in upper case. A snapshot that is called ``all`` or as any other of these words makes the
word ambiguous: then ``=all`` is the word, and ``name:all`` the snapshot.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from qcow2_forensics import SnapshotNotFound
from qcow2_forensics.reader import states
from qcow2_forensics.text import printable

from .names import SnapshotKey

if TYPE_CHECKING:
    from qcow2_forensics import Image, SnapshotEntry
    from qcow2_forensics.recovery import RecoveredState
    from qcow2_forensics.residue import DeletedSnapshot

VARIABLE = "DFVFS_QCOW2_SNAPSHOTS"
_WORDS = frozenset(("all", "changed", "deleted", "none", "recovered"))
_CHANGED = "changed:"
_DELETED = "deleted:"
_RECOVERED = "recovered:"
_RANGE = re.compile(r"(#|index:)([0-9]{1,6})\.\.(?:#|index:)?([0-9]{1,6})")
_BARE_RANGE = re.compile(r"[0-9]+\.\.[0-9]+")


class _Item(NamedTuple):
    """One item of a list: what it means, and whether only changed files are asked for."""

    text: str
    written: str
    changed: bool = False

    @property
    def word(self) -> str:
        """The item without the marks that say it is a word, whatever snapshots are called."""
        word = self.text.lstrip("=")
        return word.lower() if word.lower() in _WORDS else word

    @property
    def is_deleted(self) -> bool:
        """Whether deleted snapshots are meant."""
        return self.word == "deleted" or self.word.startswith(_DELETED)

    @property
    def is_recovered(self) -> bool:
        """Whether recovered states are meant."""
        return self.word == "recovered" or self.word.startswith(_RECOVERED)

    @classmethod
    def parse(cls, text: str) -> _Item:
        word = text.lstrip("=")
        if word.lower() == "changed":
            return cls("all", text, changed=True)
        if word.startswith(_CHANGED):
            return cls(word.removeprefix(_CHANGED), text, changed=True)
        return cls(text, text)


@dataclass(frozen=True)
class Selection:
    """A parsed choice; ``none`` and no choice at all differ in whether a hint is printed."""

    text: str

    def __post_init__(self) -> None:
        for item in self._items():
            if _BARE_RANGE.fullmatch(item.text):
                marked = "..".join(f"#{number}" for number in item.text.split(".."))
                raise ValueError(
                    f"'{printable(item.text)}' has no meaning: positions are written {marked}, IDs one by one"
                )
            found = _RANGE.fullmatch(item.word)
            if found is not None and (int(found[2]) > int(found[3]) or (found[1] == "#" and not int(found[2]))):
                raise ValueError(f"unsupported snapshot range in: {printable(self.text)}")

    @property
    def wants_any(self) -> bool:
        """Whether any snapshot is asked for."""
        return self.text.lstrip("=").lower() != "none"

    @cached_property
    def wants_changed(self) -> bool:
        """Whether only the changed files of some snapshots are asked for."""
        return any(item.changed for item in self._items())

    @property
    def wants_deleted(self) -> bool:
        """Whether any deleted snapshot is asked for."""
        return any(item.is_deleted for item in self._items())

    @property
    def wants_recovered(self) -> bool:
        """Whether any recovered state is asked for."""
        return any(item.is_recovered for item in self._items())

    def choose(self, image: Image) -> list[SnapshotEntry]:
        """Return the chosen entries of the snapshot table in its order; SnapshotNotFound names the choices."""
        if not self.wants_any:
            states.refuse_if_named(image, self.text)
        chosen = {entry.index: entry for item in self._items(image) for entry in _choose_one(item, image)}
        return [chosen[index] for index in sorted(chosen)]

    def choose_deleted(self, found: Sequence[DeletedSnapshot]) -> list[DeletedSnapshot]:
        """Return the chosen ones of the deleted snapshots, in their order; SnapshotNotFound names the choices."""
        from qcow2_forensics.residue import choose_deleted

        words = [item.word for item in self._items() if item.is_deleted]
        if "deleted" in words:
            return list(found)
        chosen = [choose_deleted(found, word.removeprefix(_DELETED)) for word in words]
        return [item for item in found if item in chosen]

    def choose_recovered(self, found: Sequence[RecoveredState]) -> list[RecoveredState]:
        """Return the chosen ones of the recovered states, in their order; SnapshotNotFound names the choices."""
        from qcow2_forensics.recovery import choose_recovered

        words = [item.word for item in self._items() if item.is_recovered]
        if "recovered" in words:
            return list(found)
        chosen = {choose_recovered(found, word.removeprefix(_RECOVERED)).number for word in words}
        return [state for state in found if state.number in chosen]

    def later_states(self, image: Image) -> dict[SnapshotKey, tuple[SnapshotKey | None, ...]]:
        """Return for each snapshot of which only changed files are asked for what they are compared with.

        That is the next snapshot asked for, and the active state, which is None.
        """
        items = self._items(image)
        full = {entry.index for item in items if not item.changed for entry in _choose_one(item, image)}
        chosen = self.choose(image)
        following = [*(SnapshotKey.of(entry) for entry in chosen[1:]), None]
        return {
            SnapshotKey.of(entry): (None,) if later is None else (later, None)
            for entry, later in zip(chosen, following, strict=False)
            if entry.index not in full
        }

    def is_reduced(self, snapshot: SnapshotKey) -> bool:
        """Return whether of a deleted snapshot, or a recovered state, only the changed files are asked for."""
        if snapshot.recovered:
            return all(item.changed for item in self._items() if item.is_recovered)
        return snapshot.deleted and all(item.changed for item in self._items() if item.is_deleted)

    def _items(self, image: Image | None = None) -> list[_Item]:
        if not self.wants_any:
            return []
        parts = self.text.split(",")
        if not all(part.strip() for part in parts):
            raise ValueError(f"unsupported snapshots value: '{printable(self.text)}'")
        return [_Item.parse(text) for text in _joined(parts, image)]


def _joined(parts: list[str], image: Image | None) -> Iterator[str]:
    """Yield the items of a list, those that hold commas because a snapshot is called so whole."""
    if image is None or not any("," in name for name in states.names_of(image.snapshots)):
        yield from (_as_meant(part, image) for part in parts)
        return
    while parts:
        count, text = 1, _as_meant(parts[0], image)
        for longer in range(len(parts), 1, -1):
            joined = _as_meant(",".join(parts[:longer]), image)
            if _named(joined, image):
                if all(_named(_as_meant(part, image), image) for part in parts[:longer]):
                    raise SnapshotNotFound(joined, states.choices(image.snapshots), ambiguous=True)
                count, text = longer, joined
                break
        yield text
        parts = parts[count:]


def _as_meant(text: str, image: Image | None) -> str:
    """Return an item without the white space around it, unless that is part of what a snapshot is called."""
    bare = text.strip()
    if image is None or bare == text or not _named(text, image):
        return bare
    if _named(bare, image) or states.is_word(bare):
        raise SnapshotNotFound(text, states.choices(image.snapshots), ambiguous=True)
    return text


def _named(text: str, image: Image) -> Sequence[SnapshotEntry]:
    """Return the snapshots that a text names, also one with ``changed:``, ``name:`` or ``id:`` in front."""
    for mark in ("", _CHANGED, "name:", "id:", f"{_CHANGED}name:", f"{_CHANGED}id:"):
        found = states.by_id_or_name(image.snapshots, text.removeprefix(mark)) if text.startswith(mark) else []
        if found:
            return found
    return []


def _choose_one(item: _Item, image: Image) -> Sequence[SnapshotEntry]:
    found = _RANGE.fullmatch(item.word)
    named = states.by_id_or_name(image.snapshots, item.written)
    if len(named) == 1 and item.written.lower() in _WORDS and item.written not in _WORDS:
        return named  # "All" is a name before it is the word
    if item.changed or item.word in _WORDS or found is not None or item.is_deleted or item.is_recovered:
        states.refuse_if_named(image, item.written)
    if item.word == "all":
        return image.snapshots
    if item.is_deleted or item.is_recovered:
        return ()
    if found is not None:
        first, last = (states.position(f"{found[1]}{number}") for number in found.group(2, 3))
        if first is None or last is None or last >= len(image.snapshots):
            raise SnapshotNotFound(item.text, states.choices(image.snapshots))
        return image.snapshots[first : last + 1]
    entry = states.find_snapshot(image, item.text)
    return () if entry is None else (entry,)  # the active state is always read


_parsed = lru_cache(maxsize=8)(Selection)


def selection_from_environment() -> Selection | None:
    """Return what ``DFVFS_QCOW2_SNAPSHOTS`` asks for, None where it is not set; raises ValueError."""
    text = os.environ.get(VARIABLE)
    return _parsed(text) if text else None
