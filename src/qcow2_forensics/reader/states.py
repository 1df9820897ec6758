"""Which state of an image is meant: one grammar for every front door.

::

    active        the disk as it is now             index:N      by its place in the snapshot table, from 0
    backing       the disk below an overlay         #N           the same, from 1
    leftover      a VM state that the active state still maps past the end of its disk, listed by no snapshot
    X             the snapshot with the ID X,       id:X         by its ID, and only by that
                  or with the name X                name:X       by its name, and only by that
                                                  deleted:X    a snapshot no table lists any more, by the
                                                               offset of its entry, its ID or its name
                                                  recovered:N  a state put together from what is left of
                                                               a damaged image, 1 the best

Where ranges are asked for, ``bitmap:NAME`` means what a persistent bitmap marks: :func:`find_bitmap`.

IDs and names are chosen by whoever made the image, so they may equal each other or one of these
words. A text with two meanings is refused, with an unambiguous spelling of each. ``=`` in front
says that one of these words follows; as many as it takes to be no ID and no name.

Inside the program states are entries, not texts: what :func:`choose` returns opens as it is.
"""

from __future__ import annotations

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

from ..errors import NotQcow2, Qcow2Error, SnapshotNotFound
from ..format.bitmap_directory import BitmapEntry
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..format.source import Source
from ..text import cut, listed, quoted

ACTIVE = "active"
BACKING = "backing"
LEFTOVER = "leftover"
BITMAP = "bitmap:"

# What the layers above find, by prefix: a function of the image and the rest of the text, imported on use.
SELECTORS = {"deleted": "qcow2_forensics.residue:select_deleted"}

# States that replace the image's own header and tables: a function of a source, the rest of the text and a virtual
# size or None, which returns a :class:`Rebuilt`.
REPLACEMENTS = {"recovered": "qcow2_forensics.recovery:select_recovered"}

_ASSUMED = "qcow2_forensics.recovery:assumed"
_MEANINGS = {ACTIVE: "the active state", BACKING: "the disk below the image", LEFTOVER: "memory in no snapshot"}
_BITMAPS_LISTED = 20  # in a message
_DIGITS = 9  # of a place in the table
_SHOWN = 64  # characters of an ID or name in a list of choices


class Backing(NamedTuple):
    """The disk below the image: a state that has no entry."""


class Leftover(NamedTuple):
    """A VM state past the end of the disk that no snapshot lists: memory without a disk."""


class Rebuilt(ABC):
    """A state whose header or tables are rebuilt in memory; what it replaces is the active state.

    ``label`` is how to choose it. ``warning`` is the sentence that every front door shows when it is opened.
    ``is_memory`` is set for a VM state, which has no disk.
    """

    is_memory: bool

    @property
    @abstractmethod
    def label(self) -> str: ...

    @property
    @abstractmethod
    def warning(self) -> str: ...

    @abstractmethod
    def over(self, source: Source) -> Source:
        """Return the bytes of an image whose active state is this one; ``source`` is the file it was found in."""


Choice = SnapshotEntry | Backing | Leftover | None  # None is the active state
SnapshotName = str | int | Choice | Rebuilt


def choose(image: Image, wanted: SnapshotName) -> Choice:
    """Return the state ``wanted`` means; raises :class:`SnapshotNotFound` for none, or for several.

    An entry means itself, None the active state, a number the ID in decimal.
    """
    if wanted is None or isinstance(wanted, (Backing, Leftover)):
        return wanted
    if isinstance(wanted, (SnapshotEntry, Rebuilt)):
        return _itself(image, wanted)
    text = str(wanted)
    named = by_id_or_name(image.snapshots, text)
    if is_word(text):
        try:
            meant = _word(image, text.lstrip("="))
        except SnapshotNotFound:
            if not named:
                raise
        else:
            if all(entry is meant for entry in named):
                return meant
            if _is_there(image, meant):
                refuse_if_named(image, text)
    if len(named) == 1:
        return named[0]
    if not named:
        image.require("snapshots")  # perhaps it is in the part of the table that cannot be read
    raise SnapshotNotFound(text, choices(image.snapshots, named), ambiguous=bool(named))


def _itself(image: Image, wanted: SnapshotEntry | Rebuilt) -> SnapshotEntry:
    """Return the entry to open for a state that was found before."""
    if isinstance(wanted, Rebuilt):
        raise _not_in(image)
    if wanted.index >= 0:
        return wanted
    return _selector("deleted")(image, f"{wanted.offset:#x}")  # of no table: what it no longer owns must be refused


def refuse_if_named(image: Image, text: str) -> None:
    """Raise when ``text``, which is one of our words, is also the ID or the name of a snapshot."""
    named = by_id_or_name(image.snapshots, text)
    if named:
        word = f"{spelled(names_of(image.snapshots), text)} (as {_MEANINGS.get(text.lstrip('='), 'written')})"
        raise SnapshotNotFound(text, [word, *choices(image.snapshots, named)], ambiguous=True)


def is_recovered_state(wanted: SnapshotName) -> bool:
    """Whether ``wanted`` is written as a state that replaces the image's own header and tables."""
    return isinstance(wanted, str) and ":" in wanted and wanted.lstrip("=").partition(":")[0] in REPLACEMENTS


def replaced(source: Source, wanted: SnapshotName, virtual_size: int | None = None) -> Rebuilt | None:
    """Return the state to open over ``source`` where ``wanted`` is one of :data:`REPLACEMENTS`, else None.

    The image's own header may be lost. Raises :class:`SnapshotNotFound` where there is no such state.
    """
    if isinstance(wanted, Rebuilt):
        return wanted
    if not isinstance(wanted, str) or not is_recovered_state(wanted):
        return None
    prefix, _, rest = wanted.lstrip("=").partition(":")
    with contextlib.suppress(NotQcow2):  # without a header there is no snapshot that could have that name
        refuse_if_named(Image(source, owns_source=False), wanted)
    replacement = cast("Callable[[Source, str, int | None], Rebuilt]", _imported(REPLACEMENTS[prefix]))
    return replacement(source, rest, virtual_size)


def assuming(source: Source, assume: Mapping[str, str]) -> Source:
    """Return ``source`` read as if its header had other fields, itself for none; see :mod:`qcow2_forensics.recovery`."""
    if not assume:
        return source
    assumed = cast("Callable[[Source, Mapping[str, str]], Source]", _imported(_ASSUMED))
    return assumed(source, assume)


def find_snapshot(image: Image, wanted: SnapshotName) -> SnapshotEntry | None:
    """Return the snapshot ``wanted`` means, None for the active state; see :func:`choose`."""
    chosen = choose(image, wanted)
    if isinstance(chosen, Leftover):
        raise Qcow2Error(f"{cut(image.name)}: a leftover VM state is memory alone, it has no disk")
    if isinstance(chosen, Backing):
        raise Qcow2Error(f"{cut(image.name)}: the backing disk is a state of another image; open that one")
    return chosen


def find_bitmap(image: Image, text: str) -> BitmapEntry | None:
    """Return the bitmap that ``bitmap:NAME`` means, None for a text that means a state.

    Raises :class:`Qcow2Error` where no bitmap, or more than one, has that name, or a snapshot has it too.
    """
    word = text.lstrip("=")
    if not word.startswith(BITMAP):
        return None
    name = word.removeprefix(BITMAP)
    found = [bitmap for bitmap in image.bitmaps if bitmap.name == name]
    named = by_id_or_name(image.snapshots, text)
    if named and not found:
        return None
    if named:
        meant = f"{spelled(names_of(image.snapshots), text)} (the bitmap)"
        raise SnapshotNotFound(text, [meant, *choices(image.snapshots, named)], ambiguous=True)
    if not found:
        image.require("bitmaps")
    if len(found) != 1:
        held = listed([cut(bitmap.name) for bitmap in image.bitmaps], _BITMAPS_LISTED) or "none"
        count = "no" if not found else "several"
        raise Qcow2Error(f"{cut(image.name)} has {count} bitmaps {quoted(name)}; it holds: {held}")
    return found[0]


def _is_there(image: Image, state: Choice) -> bool:
    """Whether the image has the state, if it is of a kind that not every image has."""
    if isinstance(state, Backing):
        return image.backing_name is not None
    if isinstance(state, Leftover):
        from .opening import leftover_vm_state  # here: it imports this module

        return leftover_vm_state(image) is not None
    return True


def by_id_or_name(entries: Iterable[SnapshotEntry], text: str) -> list[SnapshotEntry]:
    """Return the snapshots whose ID or name is exactly ``text``."""
    return [entry for entry in entries if text in (entry.id, entry.name)]


def is_word(text: str) -> bool:
    """Whether ``text`` is written as one of our words, whatever the image holds."""
    text = text.lstrip("=")
    prefix, colon, _ = text.partition(":")
    return (
        text in (ACTIVE, BACKING, LEFTOVER)
        or (bool(colon) and prefix in ("index", "id", "name", *SELECTORS, *REPLACEMENTS))
        or (text.startswith("#") and text[1:].isdecimal())
    )


def _word(image: Image, text: str) -> Choice:
    """Return what one of our words means in this image."""
    if text == ACTIVE:
        return None
    if text == BACKING:
        return Backing()
    if text == LEFTOVER:
        return Leftover()
    prefix, _, rest = text.partition(":")
    if prefix in SELECTORS:
        return _selector(prefix)(image, rest)
    if prefix in REPLACEMENTS:
        raise _not_in(image)
    if prefix == "id":
        found = [entry for entry in image.snapshots if entry.id == rest]
    elif prefix == "name":
        found = [entry for entry in image.snapshots if entry.name == rest]
    else:
        place = position(text)
        found = [image.snapshots[place]] if place is not None and place < len(image.snapshots) else []
    if len(found) == 1:
        return found[0]
    if not found:
        image.require("snapshots")
    raise SnapshotNotFound(text, choices(image.snapshots, found), ambiguous=bool(found))


def _not_in(image: Image) -> Qcow2Error:
    return Qcow2Error(f"{cut(image.name)}: a recovered state replaces the image; it is opened as a disk of its own")


def position(text: str) -> int | None:
    """Return the place in the table that ``index:N`` or ``#N`` means, from 0; None for anything else."""
    for mark, first in (("index:", 0), ("#", 1)):
        digits = text.removeprefix(mark)
        if digits != text and digits.isascii() and digits.isdecimal() and len(digits) <= _DIGITS:
            return int(digits) - first if int(digits) >= first else None
    return None


def _selector(prefix: str) -> Callable[[Image, str], SnapshotEntry]:
    return cast("Callable[[Image, str], SnapshotEntry]", _imported(SELECTORS[prefix]))


def _imported(place: str) -> object:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def names_of(entries: Iterable[SnapshotEntry]) -> frozenset[str]:
    """Return every ID and every name of some snapshots."""
    return frozenset(name for entry in entries for name in (entry.id, entry.name))


def spelled(taken: Container[str], word: str) -> str:
    """Return one of our words with as many ``=`` in front as make it none of the names that are ``taken``."""
    while word in taken:
        word = f"={word}"
    return word


def spellings(entries: Sequence[SnapshotEntry]) -> Callable[[SnapshotEntry], str]:
    """Return a function that gives the unambiguous spelling of a snapshot: its ID, else its place in the table."""
    taken = Counter(name for entry in entries for name in {entry.id, entry.name})
    ids = Counter(entry.id for entry in entries)

    def spelling(entry: SnapshotEntry) -> str:
        if entry.index < 0:
            return spelled(taken, f"deleted:{entry.offset:#x}")
        if ids[entry.id] == taken[entry.id] == 1 and entry.id and not is_word(entry.id) and len(entry.id) <= _SHOWN:
            return entry.id
        return spelled(taken, f"index:{entry.index}")

    return spelling


def choices(entries: Sequence[SnapshotEntry], some: Sequence[SnapshotEntry] = ()) -> Iterator[str]:
    """Yield ``SPELLING (name)`` of some snapshots, all by default; each spelling means that one only."""
    spelling = spellings(entries)
    for entry in some or entries:
        key = spelling(entry)
        known = "" if key == entry.id else f"ID {cut(entry.id, _SHOWN)}, "
        yield f"{key} ({known}{cut(entry.name, _SHOWN)})"


def labels(entries: Sequence[SnapshotEntry]) -> Callable[[Choice], str]:
    """Return a function that names a state: by its name, with more added where another one has that name too.

    No two states of an image get the same label, and no snapshot gets one of our words.
    """
    names = Counter(entry.name or entry.id for entry in entries)
    known: dict[int, str] = {}
    used = {ACTIVE, BACKING, LEFTOVER}
    for entry in entries:
        name = entry.name or entry.id
        label = f"{name} (ID {entry.id})" if names[name] > 1 or is_word(name) else name
        while label in used:
            label = f"{label} (#{entry.index + 1})"
        used.add(label)
        known[entry.index] = label

    def label_of(entry: Choice) -> str:
        if not isinstance(entry, SnapshotEntry):
            return ACTIVE if entry is None else BACKING if isinstance(entry, Backing) else LEFTOVER
        name = entry.name or entry.id
        return known.get(entry.index, f"{name} (deleted, entry at {entry.offset:#x})")

    return label_of
