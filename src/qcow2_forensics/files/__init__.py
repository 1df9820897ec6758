"""Names, times and bytes of the files in a state of a disk, and what changed between two states.

A :class:`~.protocol.FileSystem` lists a volume as plain :class:`~.records.FileRecord` objects and
reads their content. Modules that need pytsk3 or dfVFS import it, and are themselves imported only
inside functions: both are optional.
"""

from .protocol import FileSystem, NoFileSystem
from .records import FileRecord, Span, Times, Volume

__all__ = ["FileRecord", "FileSystem", "NoFileSystem", "Span", "Times", "Volume"]
