"""Walk a QCOW2 image with dfVFS, as any dfVFS program would: list_dfvfs.py demo.qcow2."""

import sys

from dfvfs.helpers import file_system_searcher, volume_scanner
from dfvfs.resolver import resolver

from qcow2_forensics.text import printable

options = volume_scanner.VolumeScannerOptions()
options.partitions = ["all"]
for path_spec in volume_scanner.VolumeScanner().GetBasePathSpecs(sys.argv[1], options=options):
    file_system = resolver.Resolver.OpenFileSystem(path_spec)
    searcher = file_system_searcher.FileSystemSearcher(file_system, path_spec)
    found = searcher.Find([file_system_searcher.FindSpec(file_entry_types=["file"])])
    for entry_spec in found:
        print(entry_spec.parent.type_indicator, entry_spec.type_indicator, printable(entry_spec.location))
