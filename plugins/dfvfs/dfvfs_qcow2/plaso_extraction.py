"""log2timeline and psteal: what is to be known is printed after the extraction, and ``qcow`` is a kind of archive."""

from __future__ import annotations

from typing import Any

from plaso.cli import extraction_tool as stock
from plaso.cli import status_view
from plaso.cli.helpers import archives

from . import end_notes
from .wrapping import wrap_method

ARCHIVE = "qcow"


def _extract_events(stock_method: Any, tool: Any) -> None:
    stock_method(tool)
    wiped = tool._status_view_mode == status_view.StatusView.MODE_WINDOW
    notes = end_notes.take(printed=not wiped)
    if notes:
        tool._output_writer.Write("\n".join(notes) + "\n\n")


def register() -> None:
    """Wrap the method and name the kind of archive, once."""
    wrap_method(stock.ExtractionTool, "ExtractEventsFromSources", _extract_events)
    stock.ExtractionTool._SUPPORTED_ARCHIVE_TYPES.setdefault(ARCHIVE, "QEMU disk image (.qcow2) file")
    helper = archives.ArchivesArgumentsHelper
    if ARCHIVE not in helper._SUPPORTED_ARCHIVE_TYPES:
        helper._SUPPORTED_ARCHIVE_TYPES = sorted([*helper._SUPPORTED_ARCHIVE_TYPES, ARCHIVE])


register()
