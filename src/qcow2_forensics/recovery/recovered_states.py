"""States that no header or L1 table leads to any more, found by their tables and offered as disks.

::

    what is lost                 what is used instead
    header, or its first bytes   the form of the tables: cluster size, L1 table, refcounts
    L1 table                     L2 tables placed by snapshots, content and order
    nothing: the disk reverted   free L2 tables that share clusters with those in use

What is done in each case is in :mod:`.without_header` and :mod:`.with_header`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import numpy as np

from ..errors import LimitExceeded, Qcow2Error, SnapshotNotFound
from ..format.header import MAGIC, SECTOR
from ..format.header_rules import DISK
from ..format.image import Image
from ..format.source import PathOrSource, Source, as_source, close_source
from ..limits import INNER_IMAGES_SEARCHED, RECOVERED_TABLES, RECOVERY_HINT_BYTES, Budget, MiB
from ..reader.disk import Disk
from ..reader.notes import log_note
from ..reader.opening import open_disk
from ..reader.window import WindowSource
from ..residue.structure_detection import Geometry
from ..text import quoted
from .geometry import find_geometry
from .l1_tables import placed_by_image
from .metered_source import MeteredSource, stored_pieces
from .state import RecoveredState
from .table_search import search_tables
from .with_header import WithHeader
from .without_header import WithoutHeader

_READ = 4 * MiB
_KEPT = 4  # files whose states are remembered
_known: dict[object, list[RecoveredState]] = {}


def recovered_states(origin: PathOrSource, *, virtual_size: int | None = None) -> list[RecoveredState]:
    """Return the states that can be put together from what is left in a file, the best first.

    ``virtual_size`` in bytes is used where nothing in the file gives it. Reads the whole file, once for a
    file that does not change. An empty list says that no table of a QCOW2 image was found besides those in use.
    """
    source = as_source(origin)
    try:
        found = _remembered(source, virtual_size)
    finally:
        if source is not origin:
            close_source(source)
    return [replace(state, number=number, origin=origin) for number, state in enumerate(found, 1)]


def open_recovered(
    origin: PathOrSource, number: int = 1, *, virtual_size: int | None = None, **options: Any
) -> tuple[Disk, RecoveredState]:
    """Open recovered state ``number`` and return it with what is known of it.

    The disk is the caller's to close, and closes the file with itself where ``origin`` is a path.
    """
    disk = open_disk(origin, f"recovered:{number}", virtual_size=virtual_size, **options)
    return disk, cast("RecoveredState", disk.rebuilt)


def select_recovered(source: Source, wanted: str, virtual_size: int | None = None) -> RecoveredState:
    """Return recovered state ``wanted``, a number from 1: what ``open_disk(snapshot="recovered:N")`` asks."""
    return choose_recovered(recovered_states(source, virtual_size=virtual_size), wanted)


def choose_recovered(found: Sequence[RecoveredState], wanted: str) -> RecoveredState:
    """Return the recovered state with a number, from 1."""
    if wanted.isascii() and wanted.isdecimal() and len(wanted) < 10 and 1 <= int(wanted) <= len(found):
        return found[int(wanted) - 1]
    word = f"recovered:{wanted}"
    raise SnapshotNotFound(
        word, [f"{state.label} ({state.what})" for state in found], lack=f"no state {quoted(word)}; recovered states"
    )


def _remembered(source: Source, virtual_size: int | None) -> list[RecoveredState]:
    """Return the states of a file, looked for once while it does not change: frameworks open it again and again."""
    facts = vars(source) if hasattr(source, "__dict__") else {}  # its own: wrappers show those of what they wrap
    changed = facts.get("mtime_ns")
    if changed is None:
        return _Recovery(source, virtual_size).states()
    key = (facts.get("identity"), changed, source.size, virtual_size)
    if key not in _known:
        _known[key] = _Recovery(source, virtual_size).states()
        while len(_known) > _KEPT:
            _known.pop(next(iter(_known)))
    return _known[key]


def has_tables(origin: PathOrSource) -> bool:
    """Whether the first part of a file holds what looks like tables of a QCOW2 image; no proof either way."""
    source = as_source(origin)
    try:
        found = find_geometry(source, most=RECOVERY_HINT_BYTES)
        if found is None:
            return False
        geometry = Geometry(3, found.cluster_bits, source.size, found.extended_l2)
        tables = search_tables(source, geometry, most=RECOVERY_HINT_BYTES)
        return bool(tables.l1) or len(tables.l2) > 1
    finally:
        if source is not origin:
            close_source(source)


class _Recovery:
    """Looks at one file and puts its states together."""

    def __init__(self, source: Source, virtual_size: int | None) -> None:
        self._source = MeteredSource(source)
        self._virtual_size = virtual_size
        self._room = Budget.up_to("L2 tables of recovered states", source.size // SECTOR + RECOVERED_TABLES)

    def states(self) -> list[RecoveredState]:
        """Return the states; those found before the work is too much, with a note that says so, or that as an error."""
        found: list[RecoveredState] = []
        try:
            found.extend(self._states())
        except LimitExceeded as error:
            if not found:
                raise
            note = f"more states may be left, which were not looked for: {error}"
            log_note(note, doubt=True)
            found = [replace(state, notes=(*state.notes, note), is_search_complete=False) for state in found]
        return found

    def _states(self) -> Iterator[RecoveredState]:
        image = self._image()
        if image is None:
            yield from self._inner_images()
            yield from WithoutHeader(self._source, self._virtual_size, self._room).states()
        else:
            yield from WithHeader(self._source, self._virtual_size, self._room, image).states()

    def _image(self) -> Image | None:
        """Return the image when its header can be used, None when it is lost."""
        try:
            image = Image(self._source, owns_source=False)
            image.require(DISK)
        except Qcow2Error:
            return None
        return image

    # --- a whole image further back in the file ---------------------------------------------------

    def _inner_images(self) -> Iterator[RecoveredState]:
        for at in islice(self._magics(), INNER_IMAGES_SEARCHED):
            window = WindowSource(self._source, at, None)
            try:
                with open_disk(window, follow=False) as disk:
                    size, cluster_size, named = disk.size, disk.image.cluster_size, disk.image.backing_name
                placed = placed_by_image(window, self._room)
            except LimitExceeded:
                raise
            except (Qcow2Error, OSError):
                continue
            yield RecoveredState(
                0,
                f"an image that starts at host offset {at:#x}",
                size,
                "its header",
                cluster_size,
                placed,
                backing_unknown=named is not None,
                start=at,
            )

    def _magics(self) -> Iterator[int]:
        for at, length in stored_pieces(self._source, _READ):
            data = self._source.read(at, length)
            rows = np.frombuffer(data, ">u4", count=len(data) // SECTOR * (SECTOR // 4)).reshape(-1, SECTOR // 4)
            hits = np.flatnonzero(rows[:, 0] == int.from_bytes(MAGIC, "big")) if len(rows) else ()
            yield from (at + int(row) * SECTOR for row in hits if at + row)
