"""image_export puts the files of each snapshot in a folder of their own, and leaves out what a later state repeats."""

from __future__ import annotations

import os
from typing import Any

from plaso.cli import image_export_tool as stock

from .names import folder, snapshots_around
from .plaso_changed import repeats
from .wrapping import wrap_method


def _create_destination(
    stock_method: Any,
    tool: Any,
    source_file_entry: Any,
    file_system_path_spec: Any,
    source_data_stream_name: Any,
    destination_path: str,
) -> Any:
    for key, _ in reversed(list(snapshots_around(source_file_entry.path_spec))):
        destination_path = os.path.join(destination_path, folder(key))
    return stock_method(tool, source_file_entry, file_system_path_spec, source_data_stream_name, destination_path)


def _extract_file_entry(
    stock_method: Any, tool: Any, file_entry: Any, destination_path: str, *args: Any, **kwargs: Any
) -> None:
    if not repeats(file_entry, file_entry._resolver_context):
        stock_method(tool, file_entry, destination_path, *args, **kwargs)


wrap_method(stock.ImageExportTool, "_CreateSanitizedDestination", _create_destination)
wrap_method(stock.ImageExportTool, "_ExtractFileEntry", _extract_file_entry)
