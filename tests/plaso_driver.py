"""Starts one of plaso's tools: ``plaso_driver.py ACTIVE START_METHOD NESTED TOOL ARGUMENTS...``.

A file of its own because workers that are spawned import the main module again: what activates the
back-end here activates it there.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from typing import Any

if sys.argv[1] == "1":
    import dfvfs_qcow2  # noqa: F401 - activates the back-end


def use_image_inside(location: str) -> None:
    """Make log2timeline process a QCOW image in the source's file system in place of that."""
    from dfvfs.path import factory
    from plaso.cli import storage_media_tool

    stock = storage_media_tool.StorageMediaTool.ScanSource

    def scan(self: Any, source_path: str) -> None:
        stock(self, source_path)
        outer = self._file_system_path_specs[0]
        image = factory.Factory.NewPathSpec(outer.type_indicator, location=location, parent=outer.parent)
        qcow = factory.Factory.NewPathSpec("QCOW", parent=image)
        self._file_system_path_specs = [factory.Factory.NewPathSpec("EXT", location="/", parent=qcow)]

    storage_media_tool.StorageMediaTool.ScanSource = scan


def main() -> int:
    _, _, method, nested, tool, *arguments = sys.argv
    multiprocessing.set_start_method(method)
    sys.argv = [tool, *arguments]
    if nested:
        use_image_inside(nested)
    result: int = importlib.import_module(f"plaso.scripts.{tool}").Main()
    return result


if __name__ == "__main__":
    sys.exit(main())
