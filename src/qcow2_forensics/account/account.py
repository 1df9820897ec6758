"""The account of a file: what each of its bytes is, so that what nothing accounts for is seen.

Claims are gathered as arrays first; the file is then gone through window by window::

    claims + hints (where a remainder lies) + owners of clusters  ->  tile  ->  remainders read  ->  rows, totals
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..census import Census
from ..census.arrays import I64
from ..format.header import Crypt
from ..format.header_rules import DISK
from ..format.image import Image
from .data_claims import AllocatedData, ShownData
from .header_claims import claim_header
from .labels import Label, Place
from .marks import Marks
from .qcow1_claims import Qcow1Claims
from .remainders import looked_at
from .streams import Decoded
from .table_claims import OwnerPlaces, TableClaims
from .tiling import Tile, Windowed, joined, tile

_CLUSTERS = 1 << 20  # looked at together
_SUBCLUSTERS = 1 << 16  # clusters of extended L2 entries, 32 elements each


class Account:
    """What each byte of one image file is.

    With ``read`` guest data is accounted for byte by byte, for which the ``decoded`` streams are needed, and
    remainders are read; without it, every allocated cluster counts as guest data. ``census`` is None for version 1,
    and where it cannot be taken; ``qcow1`` is what was found in the tables of a version 1 image.
    """

    def __init__(
        self, image: Image, census: Census | None, decoded: Decoded | None = None, *, read: bool = True
    ) -> None:
        self.image = image
        self.census = census
        self.is_exact = read
        self.qcow1: Qcow1Claims | None = None
        self.size = image.file_size
        self._marks = marks = Marks()
        self._allocated: AllocatedData | None = None
        self._shown: ShownData | None = None
        self._places: OwnerPlaces | None = None
        self._everything = 0  # the label of what nothing accounts for, without a census
        claim_header(image, marks)
        if census is not None:
            TableClaims(census, marks).all()
            if image.header.crypt_method == Crypt.LUKS:
                from .luks_claims import claim_luks

                claim_luks(image, marks)
            self._unclaimed(census)
            self._places = OwnerPlaces(marks, extended=image.header.extended_l2)
            if decoded is None or not read:
                with_vm_states = any(entry.vm_state_size for entry in image.snapshots)
                self._allocated = AllocatedData(marks, with_vm_states=with_vm_states)
            else:
                self._shown = ShownData(census, marks, decoded)
        else:
            if image.header.version == 1 and image.unreadable(DISK) is None:
                self.qcow1 = Qcow1Claims(image, marks)
                self.qcow1.all(decode=read)
            walked = self.qcow1 is not None and self.qcow1.walked
            self._everything = self._marks.label(Place.FREE if walked else Place.NOT_WALKED)
        self._claims, self._hints = marks.claims(self.size), marks.hints(self.size)

    @property
    def labels(self) -> list[Label]:
        """What the numbers in :attr:`Tile.label` mean."""
        return self._marks.labels

    def _unclaimed(self, census: Census) -> None:
        leaked, trailing = self._marks.label(Place.LEAKED), self._marks.label(Place.TRAILING)
        ranges = census.leaked_runs
        self._marks.add_many(leaked, ranges[:, 0], ranges[:, 0] + ranges[:, 1])
        self._marks.add(trailing, census.end, self.size)

    def tiles(self) -> Iterator[Tile]:
        """Yield what each byte of the file is, a window at a time."""
        claims, hints = Windowed(self._claims), Windowed(self._hints)
        for start, stop, places, data in self._windows():
            rows = np.concatenate((claims.part(start, stop), *data))
            rows[:, 1] = np.minimum(rows[:, 1], stop)
            tiled = tile(start, stop, rows, hints.part(start, stop), places)
            if self.is_exact:
                remainder = np.asarray([label.is_remainder for label in self.labels], np.bool_)[tiled.label]
                tiled = joined(looked_at(self.image.source, tiled, remainder))
            yield tiled

    def _windows(self) -> Iterator[tuple[int, int, I64, list[I64]]]:
        """Yield start and stop of windows, the places that tile each, and claims on its data clusters."""
        census = self.census
        if census is None or self._places is None:
            yield 0, self.size, np.asarray([[0, self.size, self._everything]]), []
            return
        size = census.cluster_size
        for firsts, lasts, owners in census.owner_runs():
            first, last = int(firsts[0]), int(lasts[-1])
            start, stop = first * size, min(last * size, self.size)
            starts, stops = firsts * size, lasts * size
            places = np.column_stack((starts, np.minimum(stops, stop), self._places.of(owners)))
            data: list[I64] = []
            if self._allocated is not None:
                data.append(self._allocated.rows(starts, stops, owners))
            elif self._shown is not None:
                step = _SUBCLUSTERS if self.image.header.extended_l2 else _CLUSTERS
                data += (self._shown.rows(at, min(at + step, last)) for at in range(first, last, step))
            if start < stop:
                yield start, stop, places, data
