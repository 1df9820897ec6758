"""log2timeline and psteal: what is to be known is printed after the extraction, and ``qcow`` is a kind of archive."""

from __future__ import annotations

from typing import Any

from plaso.cli import extraction_tool as stock
from plaso.cli import status_view
from plaso.cli.helpers import archives
from plaso.storage import factory as storage_factory

from qcow2_forensics import reason
from qcow2_forensics.text import printable

from . import end_notes
from .audit_notes import PARSER, severities_of
from .names import ARCHIVE
from .sources import display_name
from .wrapping import wrap_method


def _extract_events(stock_method: Any, tool: Any) -> None:
    stock_method(tool)
    if ARCHIVE in (tool._archive_types_string or "").split(","):
        _note_inner_audits(tool._storage_file_path)
    wiped = tool._status_view_mode == status_view.StatusView.MODE_WINDOW
    notes = end_notes.take(printed=not wiped, attended=end_notes.is_attended(tool))
    if notes:
        end_notes.say(tool, "\n".join(notes))


def _note_inner_audits(path: str) -> None:
    """Remember what workers found in images inside others: their warnings are in the storage file."""
    try:
        reader = storage_factory.StorageFactory.CreateStorageReaderForFile(path)
        try:
            warnings = reader.GetAttributeContainers(
                "extraction_warning", filter_expression=f'parser_chain == "{PARSER}"'
            )
            for path_spec, counts in severities_of(warnings):
                end_notes.note_audit(display_name(path_spec), counts)
        finally:
            reader.Close()
    except Exception as error:  # noqa: BLE001 - shown; the extraction is done, and pinfo lists the warnings
        end_notes.audits.append(
            f"The audits of images inside others cannot be counted: {printable(reason(error), 500)}"
        )


def register() -> None:
    """Wrap the method and name the kind of archive, once."""
    wrap_method(stock.ExtractionTool, "ExtractEventsFromSources", _extract_events)
    stock.ExtractionTool._SUPPORTED_ARCHIVE_TYPES.setdefault(ARCHIVE, "QEMU disk image (.qcow2) file")
    helper = archives.ArchivesArgumentsHelper
    if ARCHIVE not in helper._SUPPORTED_ARCHIVE_TYPES:
        helper._SUPPORTED_ARCHIVE_TYPES = sorted([*helper._SUPPORTED_ARCHIVE_TYPES, ARCHIVE])


register()
