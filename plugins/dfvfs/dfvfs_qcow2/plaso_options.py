"""``--qcow_snapshots`` and the other options for QCOW images in log2timeline, psteal and image_export.

The tools share one base class for images; its methods that add, parse and use the options for
shadow copies are wrapped. plaso's own list parser is not used: in this release it cannot parse
``--vss_stores 1,2`` when the tool runs unattended.
"""

from __future__ import annotations

import os
from typing import Any

from plaso.cli import logger
from plaso.cli import storage_media_tool as stock
from plaso.lib import errors

from qcow2_forensics import (
    ALONE_VARIABLE,
    ASSUME_VARIABLE,
    BACKING_VARIABLE,
    VIRTUAL_SIZE_VARIABLE,
    Qcow2Error,
    parse_assumptions,
    parse_size,
)
from qcow2_forensics.text import printable

from . import end_notes
from .selection import VARIABLE, Selection
from .volume_scanner import Request, asking
from .wrapping import wrap_method

_HELP = (
    "Define the internal snapshots of a QCOW image that need to be processed, besides its active state. "
    'A snapshot is given by its ID or its name, or by its position in the table as "#1" (the first). Multiple '
    'snapshots can be defined as: "1,3,5", a range of positions as: "#3..#5". '
    'All snapshots can be defined as: "all" and no snapshots as: "none", which is the default. "changed" takes all '
    "snapshots, but of each only the files that neither the next state nor the active one has in the same way; "
    '"changed:1,2" does so for the first of two. Deleted snapshots of '
    'which the tables survive can be defined as: "deleted", or one of them as: "deleted:NAME"; "all,deleted" is both. '
    'States put together from what is left of a damaged image can be defined as: "recovered", or one of them as: '
    '"recovered:1".'
)


def _add_options(stock_method: Any, tool: Any, argument_group: Any) -> None:
    """Add our options beside those for shadow copies, to the tools: their base class alone processes no image."""
    stock_method(tool, argument_group)
    if type(tool) is stock.StorageMediaTool:
        return
    argument_group.add_argument(
        "--qcow_snapshots",
        "--qcow-snapshots",
        metavar="SNAPSHOTS",
        help=_HELP,
    )
    argument_group.add_argument(
        "--qcow_backing_dir",
        "--qcow-backing-dir",
        action="append",
        metavar="FOLDER",
        default=[],
        help="A further folder in which the backing and data files of a QCOW image may be opened (repeatable).",
    )
    argument_group.add_argument(
        "--qcow_no_backing",
        "--qcow-no-backing",
        action="store_true",
        help="Read a QCOW image without its backing file: what the image does not hold reads as zeros.",
    )
    argument_group.add_argument(
        "--qcow_virtual_size",
        "--qcow-virtual-size",
        metavar="BYTES",
        help="The size of a recovered disk where nothing in a damaged QCOW image gives it, as 20G.",
    )
    argument_group.add_argument(
        "--qcow_assume",
        "--qcow-assume",
        action="append",
        metavar="FIELD=VALUE",
        default=[],
        help="Read a QCOW image as if its header said so, as extended-l2=on or compression=zstd (repeatable).",
    )


def _parse_options(stock_method: Any, tool: Any, options: Any) -> None:
    stock_method(tool, options)
    text = getattr(options, "qcow_snapshots", None)
    try:
        tool._qcow_selection = Selection(text) if text else None
    except ValueError as error:
        raise errors.BadConfigOption(str(error)) from error
    if text:
        os.environ[VARIABLE] = text
    # By the environment, because that is what worker processes have of their parent, however they are started.
    folders = getattr(options, "qcow_backing_dir", [])
    if folders:
        missing = next((folder for folder in folders if not os.path.isdir(folder)), None)
        if missing is not None:
            raise errors.BadConfigOption(f"--qcow_backing_dir {printable(missing)} is not a folder")
        os.environ[BACKING_VARIABLE] = os.pathsep.join(map(os.path.abspath, folders))
    if getattr(options, "qcow_no_backing", False):
        os.environ[ALONE_VARIABLE] = "1"
    _take_stated(getattr(options, "qcow_virtual_size", None), getattr(options, "qcow_assume", []))


def _take_stated(virtual_size: str | None, assume: list[str]) -> None:
    """Hand on what is stated of a damaged image."""
    try:
        if virtual_size is not None:
            os.environ[VIRTUAL_SIZE_VARIABLE] = str(parse_size(virtual_size))
        if assume:
            os.environ[ASSUME_VARIABLE] = ",".join(
                f"{name}={value}" for name, value in parse_assumptions(",".join(assume)).items()
            )
    except Qcow2Error as error:
        raise errors.BadConfigOption(str(error)) from error


def _scan_source(stock_method: Any, tool: Any, source_path: str) -> None:
    request = Request(getattr(tool, "_qcow_selection", None), "--qcow_snapshots all")
    with asking(request):
        try:
            stock_method(tool, source_path)
        finally:
            for notice in request.notices:
                logger.warning(notice)
                end_notes.say(tool, notice)
            end_notes.notices += request.notices


wrap_method(stock.StorageMediaTool, "AddVSSProcessingOptions", _add_options)
wrap_method(stock.StorageMediaTool, "_ParseVSSProcessingOptions", _parse_options)
wrap_method(stock.StorageMediaTool, "ScanSource", _scan_source)
