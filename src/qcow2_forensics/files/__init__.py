"""Names, times and bytes of the files in a state of a disk, and what changed between two states.

A :class:`~.protocol.FileSystem` lists a volume as plain :class:`~.records.FileRecord` objects and
reads their content. Modules that need pytsk3 or dfVFS import it, and are themselves imported on first
use of a name of theirs: both are optional.
"""

from typing import TYPE_CHECKING

from .. import at_first_use
from .protocol import FileSystem, NoFileSystem
from .records import FileRecord, Span, Times, Volume

if TYPE_CHECKING:
    from .lines import body_line, fls_line, mode_text
    from .sleuthkit import SleuthKitFileSystem, file_systems
    from .spans import Spans
    from .tolerant import TolerantReader, Unreadable
    from .tsk_image import ReaderImage, as_io_error

__all__ = [
    "FileRecord",
    "FileSystem",
    "NoFileSystem",
    "ReaderImage",
    "SleuthKitFileSystem",
    "Span",
    "Spans",
    "Times",
    "TolerantReader",
    "Unreadable",
    "Volume",
    "as_io_error",
    "body_line",
    "file_systems",
    "fls_line",
    "mode_text",
]

__getattr__ = at_first_use(
    __name__,
    {
        "ReaderImage": "tsk_image",
        "SleuthKitFileSystem": "sleuthkit",
        "Spans": "spans",
        "TolerantReader": "tolerant",
        "Unreadable": "tolerant",
        "as_io_error": "tsk_image",
        "body_line": "lines",
        "file_systems": "sleuthkit",
        "fls_line": "lines",
        "mode_text": "lines",
    },
)
