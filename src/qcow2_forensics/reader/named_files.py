"""Options of the form ``NAME=PATH[,format=FORMAT]``: the files a caller names for names in an image."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import Qcow2Error
from ..text import cut

_FORMAT = ",format="


class NamedFiles(NamedTuple):
    """Paths, and the formats given with some, by the name in the image."""

    files: dict[str, str]
    formats: dict[str, str]


def named_files(pairs: Iterable[str], option: str) -> NamedFiles:
    """Return the files that the pairs name; ``option`` is what errors call the pairs."""
    files: dict[str, str] = {}
    formats: dict[str, str] = {}
    for pair in pairs:
        if "=" not in pair:
            raise Qcow2Error(f"{option} {cut(pair)} is not NAME=PATH")
        given, mark, kind = pair.rpartition(_FORMAT)
        named = _name_and_path(given if mark and "=" in given and not _exists(pair) else pair)
        files.update(named)
        if mark and given and all(not path.endswith(mark + kind) for path in named.values()):
            formats.update(dict.fromkeys(named, kind))
    return NamedFiles(files, formats)


def _exists(pair: str) -> bool:
    """Whether the whole text behind some "=" is a file: then ``,format=`` is a part of its name."""
    return any(os.path.exists(path) for path in _name_and_path(pair).values())


def _name_and_path(pair: str) -> dict[str, str]:
    """Return the path under its name. Both may hold "=": then every split counts whose path is there."""
    places = [at for at, character in enumerate(pair) if character == "="]
    there = [at for at in places if os.path.exists(pair[at + 1 :])]
    return {pair[:at]: pair[at + 1 :] for at in there or places[-1:]}
