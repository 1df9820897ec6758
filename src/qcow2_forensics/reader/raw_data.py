"""Which images beside a raw file name it as their external data file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

from ..errors import Qcow2Error
from ..format.image import Image
from ..format.source import FileSource, close_source
from ..limits import FOLDER_ENTRIES_SEARCHED
from ..text import cut, listed

_HEADER = 104  # bytes of the shortest header that can have a data file
_NAMED = 4  # images that the sentence lists


def images_of(path: str) -> list[tuple[str, bool]]:
    """Return the names of the images in a file's folder whose data file it is, and whether as a raw disk.

    Only regular files in that folder are opened, and no links. The name in an image is resolved as for reading it: a
    file of the same base name may stand in.
    """
    try:
        with closing(FileSource(path, regular_only=True)) as wanted:
            identity = wanted.identity
        folder = os.path.dirname(os.path.abspath(path))
        return sorted(
            (image.name, image.header.raw_data_file) for image in _images(folder) if _leads_to(image, identity)
        )
    except (OSError, Qcow2Error):
        return []


def to_open_instead(path: str) -> str:
    """Return a sentence that names the image to open instead of its data file; empty for a file that is none."""
    found = images_of(path)
    if not found:
        return ""
    names = listed([cut(os.path.basename(name)) for name, _ in found], _NAMED)
    if all(raw for _, raw in found):
        what = "it is the raw data file of {}, and as such declared to be the disk itself: open {} to see what the image says"
    else:
        what = "it is the data file of {}, which says where in it the disk's bytes are: open {}"
    return what.format(names, "that image" if len(found) == 1 else "one of them")


def _images(folder: str) -> Iterator[Image]:
    """Yield the images in a folder that have an external data file, each open while it is looked at."""
    with os.scandir(folder) as entries:
        for entry in islice(entries, FOLDER_ENTRIES_SEARCHED):
            try:
                if not entry.is_file(follow_symlinks=False) or entry.stat(follow_symlinks=False).st_size < _HEADER:
                    continue
                with closing(FileSource(entry.path, regular_only=True)) as source:
                    image = Image(source)
                    if image.header.external_data:
                        yield image
            except (OSError, Qcow2Error):  # no image, or none that can be read
                continue


def _leads_to(image: Image, identity: tuple[int, int]) -> bool:
    from .resolver import Resolver

    source = image.source
    try:
        found, _ = Resolver().open(image.data_file_name or "", "data", source, source)
    except Qcow2Error:
        return False
    same = getattr(found, "identity", None) == identity
    close_source(found)
    return same
