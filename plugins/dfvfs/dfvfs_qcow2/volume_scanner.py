"""Snapshots as volumes to choose: ``VolumeScanner.GetBasePathSpecs`` scans those asked for as well.

What is asked for is, in this order: the attribute ``qcow_snapshots`` of the scanner's options, what
a command line tool asks for around the scan (:func:`asking`), and the environment variable
``DFVFS_QCOW2_SNAPSHOTS``. All take ``all``, ``changed``, ``none``, ``1,#3..#5``, a name, or ``deleted``; see
:mod:`.selection`. ``changed`` scans what ``all`` does; who processes the files leaves some out, see
:mod:`.later_states`. The default is none, with a hint when there are some.

Each snapshot is scanned like an image of its own, so partitions, volume managers, shadow copies and
encryption inside it go the normal way.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from dfvfs.helpers import volume_scanner as stock
from dfvfs.lib import definitions
from dfvfs.lib import errors as dfvfs_errors
from dfvfs.path import factory
from dfvfs.resolver import resolver as dfvfs_resolver

from qcow2_forensics.errors import Qcow2Error, SnapshotNotFound, reason
from qcow2_forensics.format.snapshot_table import SnapshotEntry
from qcow2_forensics.text import printable, short_date

from .inspection import (
    deleted_snapshots,
    open_image,
    recovered_path_spec,
    recovered_states,
    snapshot_path_spec,
    snapshots,
)
from .names import SnapshotKey
from .opening import failures_of, notes_of
from .selection import VARIABLE, Selection

_FAILURES = 3  # failed reads told per image
_LISTED = 20  # snapshots named in a hint

logger = logging.getLogger("dfvfs_qcow2")


@dataclass
class Request:
    """What a tool asks for around a scan, and what the scan has to say to its user."""

    selection: Selection | None = None
    option: str = ""  # the option that would have asked, for the hint
    notices: list[str] = field(default_factory=list)
    source_type: str | None = None


_request: ContextVar[Request | None] = ContextVar("qcow_snapshots_request", default=None)


@contextmanager
def asking(request: Request) -> Iterator[Request]:
    """Make scans inside the block answer ``request``."""
    token = _request.set(request)
    try:
        yield request
    finally:
        _request.reset(token)


def _wanted(options: Any, request: Request | None) -> Selection | None:
    text = getattr(options, "qcow_snapshots", None)
    if text is None and request is not None and request.selection is not None:
        return request.selection
    text = text if text is not None else os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        return Selection(text)
    except ValueError as error:
        raise dfvfs_errors.ScannerError(str(error)) from error


def _get_base_path_specs(scanner: Any, source_path: str, options: Any = None) -> list[Any]:
    """Determine the base path specifications of the active state, then of the chosen snapshots."""
    options = options or stock.VolumeScannerOptions()
    request = _request.get()
    selection = _wanted(options, request)

    try:
        scan_context = scanner._ScanSource(source_path)
    except RuntimeError as error:  # what pytsk3 makes of a read that fails
        raise dfvfs_errors.ScannerError(f"Unable to scan source with error: {printable(reason(error), 500)}") from error
    scanner._source_path = source_path
    scanner._source_type = scan_context.source_type

    failure: dfvfs_errors.ScannerError | None = None
    base_path_specs: list[Any] = []
    try:
        base_path_specs = scanner._GetBasePathSpecs(scan_context, options)
    except dfvfs_errors.ScannerError as error:
        failure = error
    except (dfvfs_errors.BackEndError, OSError, RuntimeError) as error:
        # After it was unlocked, an image is scanned again, and nobody catches what a missing base makes of that.
        failure = dfvfs_errors.ScannerError(f"Unable to scan source with error: {printable(str(error), 500)}")

    images = list(_images(scan_context.GetRootScanNode()))
    found = [item for qcow in images for item in _scan_image(scanner, scan_context, qcow, selection, options, request)]
    if selection is not None and selection.wants_recovered:
        images = images or [_without_header(scan_context)]
        found += [item for qcow in images for item in _scan_recovered(scanner, qcow, selection, options, request)]
    _tell_failed_reads(scanner, images, request)
    if failure is not None:
        if not found:
            raise failure
        _tell(request, f"The active state could not be scanned: {failure}", logging.WARNING)
    if found and scan_context.source_type != definitions.SOURCE_TYPE_STORAGE_MEDIA_DEVICE:
        # The scan of an image without a file system in its active state may call it a file.
        if scan_context.source_type == definitions.SOURCE_TYPE_FILE:
            base_path_specs = []
        scanner._source_type = definitions.SOURCE_TYPE_STORAGE_MEDIA_IMAGE
    return [*base_path_specs, *found]


def _scan_image(
    scanner: Any, scan_context: Any, qcow: Any, selection: Selection | None, options: Any, request: Request | None
) -> list[Any]:
    """Return the base path specifications in the chosen snapshots of an image; hint at snapshots not asked for."""
    entries = _entries(qcow, request)
    if selection is None:
        if entries:
            _tell(request, _hint(entries, request), logging.INFO)
        return []
    if not selection.wants_any or scan_context.IsLockedScanNode(qcow):
        return []
    found: list[Any] = []
    for entry in [*_chosen(selection, qcow), *_chosen_deleted(selection, qcow, request)]:
        name = str(SnapshotKey.of(entry))
        found += _scan_snapshot(scanner, snapshot_path_spec(qcow, entry), name, options, request)
    return found


def _without_header(scan_context: Any) -> Any:
    """Return the QCOW path specification of a file that nobody recognises as an image: its header may be lost."""
    root = scan_context.GetRootScanNode().path_spec
    return factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_QCOW, parent=root)


def _scan_recovered(scanner: Any, qcow: Any, selection: Selection, options: Any, request: Request | None) -> list[Any]:
    """Return the base path specifications in the chosen recovered states of an image."""
    try:
        known = recovered_states(qcow)
        chosen = selection.choose_recovered(known)
    except SnapshotNotFound as error:
        raise dfvfs_errors.ScannerError(str(error)) from error
    except OSError as error:
        _tell(request, f"Recovered states could not be looked for: {error}", logging.WARNING)
        return []
    if not known:
        _tell(request, "No state can be put together from tables in the file.", logging.WARNING)
    found: list[Any] = []
    for state in chosen:
        name = str(SnapshotKey.of_recovered(state))
        found += _scan_snapshot(scanner, recovered_path_spec(qcow, state), name, options, request)
    return found


def _tell_failed_reads(scanner: Any, images: list[Any], request: Request | None) -> None:
    context = scanner._source_scanner._resolver_context or dfvfs_resolver.Resolver._resolver_context
    for qcow in images:
        for text in notes_of(qcow, context):
            _tell(request, f"{printable(text, 1000)}.", logging.WARNING)
        for text in failures_of(qcow, context)[:_FAILURES]:
            _tell(request, f"A read failed during the scan: {text}", logging.WARNING)


def _images(scan_node: Any) -> Iterator[Any]:
    """Yield the QCOW path specifications the scan found, outermost first."""
    pending = [scan_node] if scan_node is not None else []
    while pending:
        node = pending.pop(0)
        if node.type_indicator == definitions.TYPE_INDICATOR_QCOW:
            yield node.path_spec
        pending.extend(node.sub_nodes)


def _entries(qcow: Any, request: Request | None) -> tuple[SnapshotEntry, ...]:
    try:
        return snapshots(qcow)
    except OSError as error:
        _tell(request, f"The snapshot table could not be read: {error}", logging.WARNING)
        return ()


def _chosen(selection: Selection, qcow: Any) -> list[SnapshotEntry]:
    try:
        return selection.choose(open_image(qcow))
    except (Qcow2Error, OSError) as error:
        raise dfvfs_errors.ScannerError(str(error)) from error


def _chosen_deleted(selection: Selection, qcow: Any, request: Request | None) -> list[SnapshotEntry]:
    if not selection.wants_deleted:
        return []
    try:
        known = deleted_snapshots(qcow)
        chosen = selection.choose_deleted(known)
    except SnapshotNotFound as error:
        raise dfvfs_errors.ScannerError(str(error)) from error
    except OSError as error:
        _tell(request, f"Deleted snapshots could not be looked for: {error}", logging.WARNING)
        return []
    if not known:
        _tell(request, "No table entry of a deleted snapshot was found in the image.", logging.WARNING)
    for item in chosen:
        if not item.followed:
            _tell(request, f"The {SnapshotKey.of(item.entry)} was {item.told}.", logging.WARNING)
        elif item.readable < 1:
            _tell(request, f"{item.readable:.0%} of the {SnapshotKey.of(item.entry)} can be read.", logging.WARNING)
    # Where the L1 table is gone, the place of the entry would open what another snapshot put there.
    return [item.entry for item in chosen if not item.is_gone]


def _scan_snapshot(scanner: Any, path_spec: Any, name: str, options: Any, request: Request | None) -> list[Any]:
    """Return the base path specifications in a snapshot; none, with a warning, if it cannot be read."""
    try:
        scan_context = scanner._ScanSourcePathSpec(path_spec)
        base_path_specs = scanner._GetBasePathSpecs(scan_context, options)
    except (dfvfs_errors.ScannerError, dfvfs_errors.BackEndError, OSError, RuntimeError) as error:
        _tell(request, f"Unable to scan {name}: {printable(reason(error), 500)}", logging.WARNING)
        return []
    # What has no file system comes back as it was asked for.
    base_path_specs = [item for item in base_path_specs if item.comparable != path_spec.comparable]
    if not base_path_specs:
        _tell(request, f"No supported file system found in {name}.", logging.WARNING)
    return base_path_specs


def _hint(entries: tuple[SnapshotEntry, ...], request: Request | None) -> str:
    how = request.option if request is not None and request.option else f"{VARIABLE}=all"
    lines = [f"The image holds {len(entries)} internal snapshot(s) that are not processed; {how} processes them:"]
    lines += [f"  {describe(entry)}" for entry in entries[:_LISTED]]
    if len(entries) > _LISTED:
        lines.append(f"  ... and {len(entries) - _LISTED} more")
    return "\n".join(lines)


def describe(entry: SnapshotEntry) -> str:
    """Return one line about a snapshot: its position as it can be asked for, ID, name, time."""
    taken = f"{short_date(entry.date_sec, entry.date_nsec)} UTC"
    return f"#{entry.index + 1}: {printable(entry.name, 64)} (ID {printable(entry.id, 64)}, {taken})"


def _tell(request: Request | None, text: str, level: int) -> None:
    if request is not None:
        request.notices.append(text)
    else:
        logger.log(level, "%s", text)


def register() -> None:
    """Replace the scanner's method; scanners that inherit it, as plaso's does, follow."""
    if not getattr(stock.VolumeScanner.GetBasePathSpecs, "reads_qcow_snapshots", False):
        replacement: Any = functools.wraps(stock.VolumeScanner.GetBasePathSpecs)(_get_base_path_specs)
        replacement.reads_qcow_snapshots = True
        stock.VolumeScanner.GetBasePathSpecs = replacement


register()
