"""``all``, ``none``, ``1,3..5`` or a name: which snapshots the user wants.

Numbers are positions from 1 as ``qemu-img snapshot -l`` lists them, which is also what a hint
prints; they are usually, but not always, the snapshot's ID. A name that looks like a number or a
keyword is written ``name:1``, an ID ``id:1``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qcow2_forensics.errors import SnapshotNotFound, printable

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
        for first, last in map(_range, self._tokens()):
            if first is not None and not 1 <= first <= (last or 0) <= _MOST:
                raise ValueError(f"unsupported snapshot range in: {printable(self.text)}")

    @property
    def wants_any(self) -> bool:
        """Whether any snapshot is asked for."""
        return self.text != "none"

    def _tokens(self) -> list[str]:
        if self.text in ("all", "none"):
            return []
        tokens = [token.strip() for token in self.text.split(",")]
        if not all(tokens):
            raise ValueError(f"unsupported snapshots value: {printable(self.text)!r}")
        return tokens

    def choose(self, entries: Sequence[Entry]) -> list[int]:
        """Return the indices of the chosen entries, ascending; SnapshotNotFound names the choices."""
        if self.text == "none":
            return []
        if self.text == "all":
            return list(range(len(entries)))
        whole = [index for index, entry in enumerate(entries) if entry.name == self.text]
        if len(whole) == 1 and "," in self.text:  # a name that holds a comma
            return whole
        chosen: set[int] = set()
        for token in self._tokens():
            chosen.update(_choose_one(token, entries))
        return sorted(chosen)


def _range(token: str) -> tuple[int | None, int | None]:
    match = _RANGE.fullmatch(token)
    if match is None:
        return None, None
    return int(match[1]), int(match[2] or match[1])


def _choose_one(token: str, entries: Sequence[Entry]) -> list[int]:
    first, last = _range(token)
    if first is not None and last is not None:
        if last > len(entries):
            raise SnapshotNotFound(token, _choices(entries))
        return list(range(first - 1, last))
    kind, colon, rest = token.partition(":")
    if colon and kind == "id":
        found = [index for index, entry in enumerate(entries) if entry.id == rest]
    else:
        wanted = rest if colon and kind == "name" else token
        found = [index for index, entry in enumerate(entries) if entry.name == wanted]
    if len(found) != 1:
        raise SnapshotNotFound(token, _choices(entries), ambiguous=bool(found))
    return found


def _choices(entries: Sequence[Entry]) -> list[str]:
    return [f"{position}: ID {printable(e.id)} ({printable(e.name)})" for position, e in enumerate(entries, 1)]
