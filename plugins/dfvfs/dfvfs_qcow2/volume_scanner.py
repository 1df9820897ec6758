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
from .wrapping import wrap_method

_FAILURES = 3  # failed reads reported per image
_LISTED = 20  # snapshots named in a hint

logger = logging.getLogger("dfvfs_qcow2")


@dataclass
class Request:
    """What a tool asks for around a scan, and what the scan has to say to its user."""

    selection: Selection | None = None
    option: str = f"{VARIABLE}=all"  # what would have asked, for the hint
    notices: list[str] = field(default_factory=list)

    def notify(self, text: str, level: int = logging.WARNING) -> None:  # noqa: ARG002 - a program's log has levels
        """Say something to the user of the tool."""
        self.notices.append(text)


class _NoRequest(Request):
    """A program scans, and nobody asked for anything: what there is to say goes to the log."""

    def notify(self, text: str, level: int = logging.WARNING) -> None:
        """Log it."""
        logger.log(level, "%s", text)


_request: ContextVar[Request | None] = ContextVar("qcow_snapshots_request", default=None)


@contextmanager
def asking(request: Request) -> Iterator[Request]:
    """Make scans inside the block answer ``request``."""
    token = _request.set(request)
    try:
        yield request
    finally:
        _request.reset(token)


def _wanted(options: Any, request: Request) -> Selection | None:
    text = getattr(options, "qcow_snapshots", None)
    if text is None and request.selection is not None:
        return request.selection
    text = text if text is not None else os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        return Selection(text)
    except ValueError as error:
        raise dfvfs_errors.ScannerError(str(error)) from error


def _get_base_path_specs(_: Any, scanner: Any, source_path: str, options: Any = None) -> list[Any]:
    """Determine the base path specifications of the active state, then of the chosen snapshots."""
    options = options or stock.VolumeScannerOptions()
    label_segments(scanner)
    scanner._source_path = source_path
    request = _request.get() or _NoRequest()
    return base_path_specs(scanner, functools.partial(scanner._ScanSource, source_path), options, request)


def base_path_specs(
    scanner: Any, scan: Callable[[], Any], options: Any, request: Request, *, is_inside: bool = False
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
        self, scanner: Any, options: Any, request: Request, prompts: StatePrompts | None, *, is_inside: bool
    ) -> None:
        self._scanner = scanner
        self._options = options
        self._request = request
        self._notify = request.notify
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
        self._report_failed_reads(specs)
        if failure is not None:
            if not found:
                raise failure
            self._notify(f"The active state could not be scanned: {failure}")
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
            entries = self._entries(qcow)
            if self._selection is None:
                if entries:
                    self._notify(self._hint(qcow, entries), logging.INFO)
            elif (self._selection.wants_any or entries) and not scan_context.IsLockedScanNode(qcow):
                try:
                    found += self._chosen(qcow, self._selection)
                except dfvfs_errors.ScannerError as error:
                    missing.append(error)
        if missing and len(missing) == len(specs) and not self._is_inside:
            raise missing[0]
        for failure in missing:  # another image has them
            self._notify(str(failure))
        return found

    def _entries(self, qcow: Any) -> tuple[SnapshotEntry, ...]:
        try:
            return snapshots(qcow)
        except OSError as error:
            self._notify(f"The snapshot table could not be read: {error}")
            return ()

    def _hint(self, qcow: Any, entries: tuple[SnapshotEntry, ...]) -> str:
        inner = image_name(qcow)
        name = f" {printable(inner)}" if inner else ""
        how = f"that are not processed; {self._request.option} processes them:"
        lines = [f"The image{name} holds {len(entries)} internal snapshot(s) {how}"]
        lines += [f"  {describe(entry)}" for entry in entries[:_LISTED]]
        if len(entries) > _LISTED:
            lines.append(f"  ... and {len(entries) - _LISTED} more")
        return "\n".join(lines)

    def _chosen(self, qcow: Any, selection: Selection) -> list[Any]:
        try:
            listed = selection.choose(open_image(qcow))
        except (Qcow2Error, OSError) as error:
            raise dfvfs_errors.ScannerError(str(error)) from error
        found: list[Any] = []
        for entry in [*listed, *self._chosen_deleted(qcow, selection)]:
            found += self._state(snapshot_path_spec(qcow, entry), SnapshotKey.of(entry))
        return found

    def _chosen_deleted(self, qcow: Any, selection: Selection) -> list[SnapshotEntry]:
        if not selection.wants_deleted:
            return []
        try:
            known = deleted_snapshots(qcow)
            chosen = selection.choose_deleted(known)
        except SnapshotNotFound as error:
            raise dfvfs_errors.ScannerError(str(error)) from error
        except OSError as error:
            self._notify(f"Deleted snapshots could not be looked for: {error}")
            return []
        if not known:
            self._notify("No table entry of a deleted snapshot was found in the image.")
        for item in chosen:
            if not item.followed:
                self._notify(f"The {SnapshotKey.of(item.entry)} was {item.what_is_left}.")
            elif item.readable < 1:
                self._notify(f"{item.readable:.0%} of the {SnapshotKey.of(item.entry)} can be read.")
        # Where the L1 table is gone, the place of the entry would open what another snapshot put there.
        return [item.entry for item in chosen if not item.is_gone]

    def _recovered(self, qcow: Any, selection: Selection) -> list[Any]:
        """Return the base path specifications in the chosen recovered states of an image."""
        try:
            known = recovered_states(qcow)
            chosen = selection.choose_recovered(known)
        except SnapshotNotFound as error:
            raise dfvfs_errors.ScannerError(str(error)) from error
        except OSError as error:
            self._notify(f"Recovered states could not be looked for: {error}")
            return []
        if not known:
            self._notify("No state can be put together from tables in the file.")
        found: list[Any] = []
        for state in chosen:
            found += self._state(recovered_path_spec(qcow, state), SnapshotKey.of_recovered(state))
        return found

    def _state(self, path_spec: Any, key: SnapshotKey) -> list[Any]:
        """Return the base path specifications in a snapshot; none, with a warning, if it cannot be read."""
        if self._prompts is not None:
            self._prompts.begin(str(key))
        try:
            scan_context = self._scanner._ScanSourcePathSpec(path_spec)
            found = self._scanner._GetBasePathSpecs(scan_context, self._options)
        except (dfvfs_errors.ScannerError, dfvfs_errors.BackEndError, OSError, RuntimeError) as error:
            self._notify(f"Unable to scan {key}: {printable(reason(error), 500)}")
            return []
        # What has no file system comes back as it was asked for.
        found = [item for item in found if item.comparable != path_spec.comparable]
        if not found:
            self._notify(f"No supported file system found in {key}.")
        return found

    def _report_failed_reads(self, specs: list[Any]) -> None:
        context = self._scanner._source_scanner._resolver_context or dfvfs_resolver.Resolver._resolver_context
        for qcow in specs:
            for text in notes_of(qcow, context):
                self._notify(f"{printable(text, 1000)}.")
            for text in failures_of(qcow, context)[:_FAILURES]:
                self._notify(f"A read failed during the scan: {text}")


def _without_header(scan_context: Any) -> Any:
    """Return the QCOW path specification of a file that nobody recognises as an image: its header may be lost."""
    root = scan_context.GetRootScanNode().path_spec
    return factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_QCOW, parent=root)


def _failed(why: str) -> dfvfs_errors.ScannerError:
    return dfvfs_errors.ScannerError(f"Unable to scan source with error: {printable(why, 500)}")


def describe(entry: SnapshotEntry) -> str:
    """Return one line about a snapshot: its position as it can be asked for, ID, name, time."""
    taken = short_date(entry.date_sec, entry.date_nsec, " UTC")
    return f"#{entry.index + 1}: {printable(entry.name, 64)} (ID {printable(entry.id, 64)}, {taken})"


wrap_method(stock.VolumeScanner, "GetBasePathSpecs", _get_base_path_specs)  # scanners that inherit it follow
