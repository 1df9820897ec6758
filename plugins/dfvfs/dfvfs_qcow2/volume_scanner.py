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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from dfvfs.helpers import volume_scanner as stock
from dfvfs.lib import definitions
from dfvfs.lib import errors as dfvfs_errors
from dfvfs.path import factory
from dfvfs.resolver import resolver as dfvfs_resolver

from qcow2_forensics import Qcow2Error, SnapshotEntry, SnapshotNotFound, reason
from qcow2_forensics.text import printable, short_date

from .inspection import (
    deleted_snapshots,
    open_image,
    recovered_path_spec,
    recovered_states,
    snapshot_path_spec,
    snapshots,
)
from .names import SnapshotKey, image_name
from .opening import failures_of, notes_of
from .segments import label_segments
from .selection import VARIABLE, Selection
from .source_scanner import images, without_snapshots
from .state_prompts import StatePrompts

_FAILURES = 3  # failed reads reported per image
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
    label_segments(scanner)
    scanner._source_path = source_path
    return base_path_specs(scanner, functools.partial(scanner._ScanSource, source_path), options, _request.get())


def base_path_specs(
    scanner: Any, scan: Callable[[], Any], options: Any, request: Request | None, *, is_inside: bool = False
) -> list[Any]:
    """Return the base path specifications of what ``scan`` finds, then of the chosen snapshots of each image in it.

    ``is_inside`` says that the source is an image inside another one: it need not have the snapshots asked for.
    """
    mediator = scanner._mediator
    prompts = scanner._mediator = StatePrompts(mediator) if mediator is not None else None
    try:
        with without_snapshots():
            return _StatesScan(scanner, options, request, prompts, is_inside=is_inside).base_path_specs(scan)
    finally:
        scanner._mediator = mediator


class _StatesScan:
    """One scan of a source: of the active state, and of the snapshots asked for in each image that it leads through."""

    def __init__(
        self, scanner: Any, options: Any, request: Request | None, prompts: StatePrompts | None, *, is_inside: bool
    ) -> None:
        self._scanner = scanner
        self._options = options
        self._request = request
        self._prompts = prompts
        self._is_inside = is_inside
        self._selection = _wanted(options, request)

    def base_path_specs(self, scan: Callable[[], Any]) -> list[Any]:
        try:
            scan_context = scan()
        except RuntimeError as error:  # what pytsk3 makes of a read that fails
            raise _failed(reason(error)) from error
        scanner = self._scanner
        scanner._source_type = scan_context.source_type
        failure: dfvfs_errors.ScannerError | None = None
        active: list[Any] = []
        try:
            active = scanner._GetBasePathSpecs(scan_context, self._options)
        except dfvfs_errors.ScannerError as error:
            failure = error
        except (dfvfs_errors.BackEndError, OSError, RuntimeError) as error:
            # After it was unlocked, an image is scanned again, and nobody catches what a missing base makes of that.
            failure = _failed(str(error))
        specs = [node.path_spec for node in images(scan_context.GetRootScanNode())]
        found = self._snapshots(scan_context, specs)
        if self._selection is not None and self._selection.wants_recovered and not self._is_inside:
            specs = specs or [_without_header(scan_context)]
            found += [item for qcow in specs for item in self._recovered(qcow, self._selection)]
        _report_failed_reads(scanner, specs, self._request)
        if failure is not None:
            if not found:
                raise failure
            _notify(self._request, f"The active state could not be scanned: {failure}", logging.WARNING)
        if found and scan_context.source_type != definitions.SOURCE_TYPE_STORAGE_MEDIA_DEVICE:
            # The scan of an image without a file system in its active state may call it a file.
            if scan_context.source_type == definitions.SOURCE_TYPE_FILE:
                active = []
            scanner._source_type = definitions.SOURCE_TYPE_STORAGE_MEDIA_IMAGE
        return [*active, *found]

    def _snapshots(self, scan_context: Any, specs: list[Any]) -> list[Any]:
        """Return the base path specifications in the chosen snapshots; hint at snapshots not asked for."""
        found: list[Any] = []
        missing: list[dfvfs_errors.ScannerError] = []
        for qcow in specs:
            entries = _entries(qcow, self._request)
            if self._selection is None:
                if entries:
                    _notify(self._request, _hint(qcow, entries, self._request), logging.INFO)
            elif (self._selection.wants_any or entries) and not scan_context.IsLockedScanNode(qcow):
                try:
                    found += self._chosen(qcow, self._selection)
                except dfvfs_errors.ScannerError as error:
                    missing.append(error)
        if missing and len(missing) == len(specs) and not self._is_inside:
            raise missing[0]
        for failure in missing:  # another image has them
            _notify(self._request, str(failure), logging.WARNING)
        return found

    def _chosen(self, qcow: Any, selection: Selection) -> list[Any]:
        found: list[Any] = []
        for entry in [*_chosen(selection, qcow), *_chosen_deleted(selection, qcow, self._request)]:
            found += self._state(snapshot_path_spec(qcow, entry), SnapshotKey.of(entry))
        return found

    def _recovered(self, qcow: Any, selection: Selection) -> list[Any]:
        """Return the base path specifications in the chosen recovered states of an image."""
        try:
            known = recovered_states(qcow)
            chosen = selection.choose_recovered(known)
        except SnapshotNotFound as error:
            raise dfvfs_errors.ScannerError(str(error)) from error
        except OSError as error:
            _notify(self._request, f"Recovered states could not be looked for: {error}", logging.WARNING)
            return []
        if not known:
            _notify(self._request, "No state can be put together from tables in the file.", logging.WARNING)
        found: list[Any] = []
        for state in chosen:
            found += self._state(recovered_path_spec(qcow, state), SnapshotKey.of_recovered(state))
        return found

    def _state(self, path_spec: Any, key: SnapshotKey) -> list[Any]:
        if self._prompts is not None:
            self._prompts.begin(str(key))
        return _scan_snapshot(self._scanner, path_spec, str(key), self._options, self._request)


def _without_header(scan_context: Any) -> Any:
    """Return the QCOW path specification of a file that nobody recognises as an image: its header may be lost."""
    root = scan_context.GetRootScanNode().path_spec
    return factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_QCOW, parent=root)


def _failed(why: str) -> dfvfs_errors.ScannerError:
    return dfvfs_errors.ScannerError(f"Unable to scan source with error: {printable(why, 500)}")


def _report_failed_reads(scanner: Any, specs: list[Any], request: Request | None) -> None:
    context = scanner._source_scanner._resolver_context or dfvfs_resolver.Resolver._resolver_context
    for qcow in specs:
        for text in notes_of(qcow, context):
            _notify(request, f"{printable(text, 1000)}.", logging.WARNING)
        for text in failures_of(qcow, context)[:_FAILURES]:
            _notify(request, f"A read failed during the scan: {text}", logging.WARNING)


def _entries(qcow: Any, request: Request | None) -> tuple[SnapshotEntry, ...]:
    try:
        return snapshots(qcow)
    except OSError as error:
        _notify(request, f"The snapshot table could not be read: {error}", logging.WARNING)
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
        _notify(request, f"Deleted snapshots could not be looked for: {error}", logging.WARNING)
        return []
    if not known:
        _notify(request, "No table entry of a deleted snapshot was found in the image.", logging.WARNING)
    for item in chosen:
        if not item.followed:
            _notify(request, f"The {SnapshotKey.of(item.entry)} was {item.what_is_left}.", logging.WARNING)
        elif item.readable < 1:
            _notify(request, f"{item.readable:.0%} of the {SnapshotKey.of(item.entry)} can be read.", logging.WARNING)
    # Where the L1 table is gone, the place of the entry would open what another snapshot put there.
    return [item.entry for item in chosen if not item.is_gone]


def _scan_snapshot(scanner: Any, path_spec: Any, name: str, options: Any, request: Request | None) -> list[Any]:
    """Return the base path specifications in a snapshot; none, with a warning, if it cannot be read."""
    try:
        scan_context = scanner._ScanSourcePathSpec(path_spec)
        base_path_specs = scanner._GetBasePathSpecs(scan_context, options)
    except (dfvfs_errors.ScannerError, dfvfs_errors.BackEndError, OSError, RuntimeError) as error:
        _notify(request, f"Unable to scan {name}: {printable(reason(error), 500)}", logging.WARNING)
        return []
    # What has no file system comes back as it was asked for.
    base_path_specs = [item for item in base_path_specs if item.comparable != path_spec.comparable]
    if not base_path_specs:
        _notify(request, f"No supported file system found in {name}.", logging.WARNING)
    return base_path_specs


def _hint(qcow: Any, entries: tuple[SnapshotEntry, ...], request: Request | None) -> str:
    how = request.option if request is not None and request.option else f"{VARIABLE}=all"
    inner = image_name(qcow)
    name = f" {printable(inner)}" if inner else ""
    lines = [f"The image{name} holds {len(entries)} internal snapshot(s) that are not processed; {how} processes them:"]
    lines += [f"  {describe(entry)}" for entry in entries[:_LISTED]]
    if len(entries) > _LISTED:
        lines.append(f"  ... and {len(entries) - _LISTED} more")
    return "\n".join(lines)


def describe(entry: SnapshotEntry) -> str:
    """Return one line about a snapshot: its position as it can be asked for, ID, name, time."""
    taken = short_date(entry.date_sec, entry.date_nsec, " UTC")
    return f"#{entry.index + 1}: {printable(entry.name, 64)} (ID {printable(entry.id, 64)}, {taken})"


def _notify(request: Request | None, text: str, level: int) -> None:
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
