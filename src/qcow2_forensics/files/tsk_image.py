"""A disk, or a volume of it, as a ``pytsk3.Img_Info``. Imported only where pytsk3 is wanted: it is optional.

What pytsk3 does with an exception from a Python image was found by trying (version 20260715). A
direct ``read`` passes it on as it is. A read that libtsk asked for becomes ``RuntimeError`` with our
sentence in it, and fails everything else libtsk reads in that call, even if it was only probing for
a file system and would have gone on; :meth:`ReaderImage.read` mends that. A short answer instead can make
libtsk hand out bytes it never got, so there is none: unreadable sectors are errors, or, when asked
for with ``unreadable="zeros"``, zeros that are listed in :attr:`ReaderImage.unreadable`.
"""

from __future__ import annotations

import pytsk3

from ..errors import Qcow2Error
from .readers import Reader

_length = len  # `read` has an argument called len, as pytsk3's has


def as_io_error(error: Qcow2Error) -> OSError:
    """Return the error as the one class that pytsk3 scripts catch; the sentence is kept."""
    if isinstance(error, OSError):
        return error
    translated = OSError(str(error))
    translated.__cause__ = error
    return translated


class ReaderImage(pytsk3.Img_Info):
    """A disk or a volume for ``Volume_Info`` and ``FS_Info``.

    ``read_errors`` are the reasons of failed reads, each once; ``unreadable`` the ranges (offset, length) that were
    read as zeros.
    """

    def __init__(self, reader: Reader, sector_size: int = 0) -> None:
        self._reader = reader
        self.read_errors = reader.errors
        self.unreadable = reader.unreadable
        self._size = reader.size
        self._closed = False
        super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL, sector_size=sector_size)

    def get_size(self) -> int:
        """Return the size of the disk in bytes; also after :meth:`close`, as pytsk3 does."""
        return self._size

    def read(self, off: int, len: int) -> bytes:  # noqa: A002 - pytsk3's own argument name
        """Return ``len`` bytes at ``off``, fewer only at the end of the disk; ``IOError`` past it."""
        if self.read_errors:
            # An earlier failure is remembered for the thread until a method of pytsk3 is called, and would
            # make pytsk3 report this read as failed too: call one. Without it one bad sector hides the rest.
            super().get_size()
        if self._closed:
            raise OSError("the image is closed")
        if off < 0 or len < 0:
            raise OSError(f"negative offset or length: {off}, {len}")
        if off >= self._size:
            raise OSError(f"read offset {off} is past the end of the disk at {self._size}")
        try:
            data = self._reader.read(off, len)
        except Qcow2Error as error:
            raise as_io_error(error)  # noqa: B904 - it names its cause
        if _length(data) < min(len, self._size - off):  # a volume that claims more than its disk holds
            raise OSError(f"the disk ends inside the volume, {_length(data)} bytes after its offset {off}")
        return data

    def close(self) -> None:
        """Close the image: reading afterwards raises ``IOError``; closing twice is fine."""
        self._closed = True
