"""The files of a pytsk3 image as records. The listing itself is part of the core package."""

from qcow2_forensics.files.protocol import NoFileSystem
from qcow2_forensics.files.records import FileRecord, Span, Times, Volume
from qcow2_forensics.files.sleuthkit import SleuthKitFileSystem as FileSystem
from qcow2_forensics.files.sleuthkit import file_systems

__all__ = ["FileRecord", "FileSystem", "NoFileSystem", "Span", "Times", "Volume", "file_systems"]
