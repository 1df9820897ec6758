"""The host clusters that former tables name: read an array at a time, each looked at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..census.arrays import distinct, stretches
from ..census.columns import big_endian
from ..format.image import Image
from ..limits import MiB
from . import structure_detection
from .structure_detection import Counts, Geometry

HOLDS_BYTES, IS_L2, IS_REFCOUNTS = 1, 2, 4
_KNOWN = 128

_READ = 1 * MiB  # looked at together
_PAGE = 256  # clusters remembered together, once one of them was looked at


def read_clusters(image: Image, numbers: Counts) -> bytes:
    """Return the bytes of host clusters, in the order given; zeros for what the end of the file cuts off."""
    size = image.cluster_size
    neighbours = stretches(len(numbers), np.diff(numbers) != 1)
    places = ((int(numbers[first]) * size, (stop - first) * size) for first, stop in neighbours)
    return b"".join(image.read(offset, length).ljust(length, b"\0") for offset, length in places)


class Targets:
    """Remembers of each cluster looked at whether it holds bytes, and what table it may be."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._geometry = Geometry.of(image)
        clusters = -(-image.file_size // image.cluster_size)
        self._pages = np.zeros(-(-clusters // _PAGE), np.intp)
        self._known = np.zeros((1, _PAGE), np.uint8)  # the first page is that of clusters not looked at
        self._used = 1

    def look(self, numbers: Counts) -> npt.NDArray[np.uint8]:
        """Return what is to be known of some clusters of the file."""
        pages, places = numbers // _PAGE, numbers % _PAGE
        self._remember(distinct(pages[self._pages[pages] == 0]))
        unknown = distinct(numbers[self._known[self._pages[pages], places] == 0])
        step = max(1, _READ // self._image.cluster_size)
        for at in range(0, len(unknown), step):
            some = unknown[at : at + step]
            self._known[self._pages[some // _PAGE], some % _PAGE] = self._judge(read_clusters(self._image, some))
        found: npt.NDArray[np.uint8] = self._known[self._pages[pages], places]
        return found

    def _remember(self, pages: Counts) -> None:
        """Make room for pages none of whose clusters was looked at."""
        self._pages[pages] = self._used + np.arange(len(pages))
        self._used += len(pages)
        if self._used > len(self._known):
            more = max(self._used - len(self._known), len(self._known))
            self._known = np.concatenate((self._known, np.zeros((more, _PAGE), np.uint8)))

    def _judge(self, data: bytes) -> npt.NDArray[np.uint8]:
        size = self._image.cluster_size
        words = big_endian(data).reshape(-1, size // 8)
        known = np.where(words.any(axis=1), _KNOWN | HOLDS_BYTES, _KNOWN).astype(np.uint8)
        rows, found = structure_detection.judged(structure_detection.l2_rows, words, self._geometry)
        known[rows[found.tables & found.telling]] |= IS_L2
        counts = np.frombuffer(data, np.uint8).reshape(-1, size)
        known[structure_detection.refcount_rows(counts, self._image.header.refcount_order)] |= IS_REFCOUNTS
        return known
