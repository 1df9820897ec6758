"""The volumes of a disk, and who reads the files in each."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import Qcow2Error
from ..reader.disk import Layer
from .protocol import FileSystem


class GuestVolumes(NamedTuple):
    """The file systems of one state. ``read_errors`` grows while they are read."""

    systems: list[FileSystem]
    read_errors: Sequence[str]


def need_back_end() -> None:
    """Raise ``Qcow2Error`` with what to install when no library that lists files is here."""
    if importlib.util.find_spec("pytsk3") is None:
        raise Qcow2Error("listing files needs pytsk3: pip install 'qcow2-forensics[tsk]'")


def open_volumes(disk: Layer, name: str) -> GuestVolumes:
    """Return the file systems of a disk; raises ``NoFileSystem`` when there is none.

    Ranges that cannot be read do not end a listing: they are zeros and their reasons are in
    ``read_errors``. ``name`` says in messages what disk this is.
    """
    need_back_end()
    from .sleuthkit import file_systems
    from .tsk_image import DiskImage

    image = DiskImage(disk, unreadable="zeros")
    return GuestVolumes(list(file_systems(image, name)), image.read_errors)
