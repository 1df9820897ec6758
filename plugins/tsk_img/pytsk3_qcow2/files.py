"""The files of a pytsk3 image as records. The listing itself is part of the core package."""

from qcow2_forensics.files import FileRecord, NoFileSystem, Span, Times, Volume, file_systems
from qcow2_forensics.files import SleuthKitFileSystem as FileSystem

__all__ = ["FileRecord", "FileSystem", "NoFileSystem", "Span", "Times", "Volume", "file_systems"]
