"""A QCOW2 image becomes one target per state."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dissect.target import loader
from dissect.target.loader import Loader

from qcow2_forensics import Image, Qcow2Error, open_image
from qcow2_forensics.reader import states
from qcow2_forensics.text import is_plain, printable

from . import MAGIC

SCHEME = "qcow2"
_COMPONENT = 255  # bytes of one part of a path
log = logging.getLogger("dissect_qcow2")


class Qcow2Loader(Loader):
    """``disk.qcow2`` is the active state, ``disk.qcow2/NAME`` a snapshot: so every record names its state.

    Such a path does not exist on disk; it takes a folder of that name, which cannot be there beside the file.
    """

    @staticmethod
    def detect(path: Path) -> bool:
        return image_and_state(path) is not None

    @staticmethod
    def find_all(path: Path, **kwargs: Any) -> Iterator[Path]:  # noqa: ARG004 - dissect's interface
        """Yield every snapshot in the order of the image's table, then the active state."""
        found = image_and_state(path)
        if found is not None and found[1] is None:
            try:
                with path.open("rb") as stream, open_image(stream) as image:
                    names = list(state_names(image))
                    problem = image.unreadable("snapshots")
                    if problem is not None:
                        log.warning("%s: snapshots are missing: %s", printable(str(path)), problem.error())
            except Qcow2Error:
                names = []  # the active state, opened below, raises what is wrong
            yield from (path / name for name in names)
        yield path

    def map(self, target: Any) -> None:
        from .container import Qcow2Container  # here: whoever imports that module first causes this one to be imported

        found = image_and_state(self.path)
        path, state = found if found is not None else (self.path, None)
        target.disks.add(Qcow2Container(path, state))


def image_and_state(path: Path) -> tuple[Path, str | None] | None:
    """Split a path into the image and the state it names; None where there is no QCOW2 image."""
    if _is_image(path):
        return path, None
    if _is_image(path.parent):
        return path.parent, path.name
    return None


def _is_image(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except Exception:  # noqa: BLE001 - paths of other targets fail in their own ways, and dissect asks every loader
        return False


def state_names(image: Image) -> Iterator[str]:
    """Yield what to call each snapshot: its name where that is one, and part of a path, else its ID, else its place.

    dissect writes it into every record and on the terminal: a name that does not show as it is, is not used.
    """
    ids = {entry.id for entry in image.snapshots}
    spelling, taken = states.spellings(image.snapshots), states.names_of(image.snapshots)
    names = Counter(entry.name for entry in image.snapshots)
    for entry in image.snapshots:
        alone = names[entry.name] == 1 and entry.name not in ids and entry.name not in ("", ".", "..")
        usable = is_plain(entry.name) and len(os.fsencode(entry.name)) <= _COMPONENT
        if alone and usable and not states.is_word(entry.name) and not set(entry.name) & set("/\\:"):
            yield entry.name
        else:
            key = spelling(entry)
            yield key if key.isascii() and key.isalnum() else states.spelled(taken, f"index:{entry.index}")


loader.LOADERS.insert(0, Qcow2Loader)
loader.LOADERS_BY_SCHEME[SCHEME] = Qcow2Loader
