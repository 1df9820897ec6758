"""Path specifications become disks, once: dfVFS opens the same image again and again.

A file object lives as long as somebody holds it, which in plaso is often one file of the timeline.
So the few disks used last are kept, with their tables, decompressed clusters and derived keys, and
given out again to the same resolver context while their files are unchanged.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

from dfvfs.lib import errors as dfvfs_errors
from dfvfs.resolver import resolver as dfvfs_resolver

from qcow2_forensics import (
    ALONE_VARIABLE,
    KEY_FILE_VARIABLE,
    Disk,
    FileSource,
    Image,
    Qcow2Error,
    SnapshotEntry,
    SnapshotName,
    Source,
    __version__,
    open_disk,
    passphrases_from_environment,
    reason,
    source_name,
    virtual_size_from_environment,
)
from qcow2_forensics.text import printable

from .names import SnapshotKey
from .references import PathSpecResolver
from .sources import open_image_source

logger = logging.getLogger("dfvfs_qcow2")

_FAILURES = 20  # failed reads remembered and logged per disk
_KEPT = 6  # disks per process; each may hold tens of MiB of tables and clusters

_HOW_TO_UNLOCK = f"give --credential password:SECRET for each member of a chain, or set {KEY_FILE_VARIABLE}"

_Key = tuple[int, str, SnapshotKey | None]  # the resolver context, the QCOW path specification, the state
_kept: OrderedDict[_Key, OpenedDisk] = OrderedDict()
_lock = threading.Lock()
_announced: set[str] = set()
_passwords: dict[str, list[str | bytes]] = {}  # by the path specification of the image


def _forget() -> None:
    """Start afresh in a forked worker: no lock that somebody held, no file shared with the parent."""
    global _lock  # noqa: PLW0603 - a lock cannot be reset
    _lock = threading.Lock()
    _kept.clear()
    _announced.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class OpenedDisk:
    """A disk, the files it is read from, and the passphrases that were tried on it."""

    def __init__(self, disk: Disk, sources: list[Source], resolver_context: Any) -> None:
        self.disk = disk
        self._context = ref(resolver_context)
        self._files = [source for source in sources if isinstance(source, FileSource)]
        self._tried: set[str | bytes] = set()
        self.why_locked = ""  # what the last passphrases came to
        self.failures: list[str] = []  # the first reads that failed, for people

    def is_current(self, resolver_context: Any) -> bool:
        """Whether the files, and the context they were opened in, are still the same."""
        if self._context() is not resolver_context:
            return False
        try:
            for source in self._files:
                status = os.stat(source.path)
                if (*source.identity, source.mtime_ns) != (status.st_dev, status.st_ino, status.st_mtime_ns):
                    return False
        except OSError:
            return False
        return True

    def note_failure(self, error: Exception) -> None:
        """Remember, and log, why a read failed; bounded."""
        text = str(error)
        if len(self.failures) < _FAILURES and text not in self.failures:
            self.failures.append(text)
            logger.warning("a read failed: %s", text)

    def unlock(self, passphrases: list[str | bytes]) -> bool:
        """Try passphrases, each only once: deriving keys is slow. Returns whether the disk is open.

        Every member of the chain may need another one; what one opens stays open.
        """
        new = [item for item in passphrases if item and item not in self._tried]
        if self.disk.is_locked and new:
            self._tried.update(new)
            try:
                self.disk.unlock(new)
            except Qcow2Error as error:
                self.why_locked = reason(error)
                logger.warning("%s stays locked: %s", printable(self.disk.name), error)
        return not self.disk.is_locked


def _kept_states(path_spec: Any, resolver_context: Any) -> list[OpenedDisk]:
    """Return what is kept of an image: its active state, its snapshots."""
    wanted = (id(resolver_context), path_spec.comparable)
    return [item for key, item in list(_kept.items()) if key[:2] == wanted and item.is_current(resolver_context)]


def failures_of(path_spec: Any, resolver_context: Any) -> list[str]:
    """Return why reads of an image failed in this process, as far as it is still kept."""
    return [text for opened in _kept_states(path_spec, resolver_context) for text in opened.failures]


def notes_of(path_spec: Any, resolver_context: Any) -> list[str]:
    """Return what is to be known of the chains under an image: stand-ins, keys in doubt, files that are not there."""
    kept = _kept_states(path_spec, resolver_context)
    found = [note for opened in kept for note in opened.disk.notes]
    found += [
        f"{reason(item.disk.unbacked)}; reads that need it fail" for item in kept if item.disk.unbacked is not None
    ]
    found += [
        f"{opened.why_locked}; {_HOW_TO_UNLOCK}" for opened in kept if opened.why_locked and opened.disk.is_locked
    ]
    return list(dict.fromkeys(found))


def passwords_of(path_spec: Any) -> list[str | bytes]:
    """Return the passwords for a QCOW path specification: of the key chain, then of the environment.

    The key chain holds one, and plaso puts those it was given into it one after the other. All of them
    are remembered, because every member of a chain may need its own; forked workers inherit them.
    """
    key_chain = dfvfs_resolver.Resolver.key_chain
    if getattr(path_spec, "password", None):
        key_chain.ExtractCredentialsFromPathSpec(path_spec)
    password: str | bytes | None = key_chain.GetCredential(path_spec, "password")
    known = _passwords.setdefault(path_spec.comparable, [])
    if password and password not in known:
        known.append(password)
    try:
        return [*known, *passphrases_from_environment()]
    except (OSError, Qcow2Error) as error:
        logger.warning("%s: %s", KEY_FILE_VARIABLE, error)
        return list(known)


def open_state(path_spec: Any, resolver_context: Any, snapshot: SnapshotKey | None = None) -> OpenedDisk:
    """Open the active state of a QCOW path specification, or a snapshot; raises OSError only.

    A disk without its key opens locked, if no password in the key chain fits. A backing file that
    is missing or refused makes the reads that need it fail, and no others.
    """
    key = (id(resolver_context), path_spec.comparable, snapshot)
    with _lock:
        opened = _kept.get(key)
        if opened is not None and opened.is_current(resolver_context):
            _kept.move_to_end(key)
            return opened
    with only_os_errors():
        opened = _open(path_spec, resolver_context, snapshot)
        if opened.disk.is_locked:
            for other in _kept_states(path_spec, resolver_context):
                opened.disk.adopt_keys(other.disk)
            opened.unlock(passwords_of(path_spec))
    with _lock:
        _kept[key] = opened
        _kept.move_to_end(key)
        while len(_kept) > _KEPT:
            _kept.popitem(last=False)
    return opened


def _open(path_spec: Any, resolver_context: Any, snapshot: SnapshotKey | None) -> OpenedDisk:
    source, image_source = open_image_source(path_spec.parent, resolver_context)
    wanted: SnapshotName = None
    if snapshot is not None:
        wanted = _recovered(image_source, snapshot) if snapshot.recovered else find_entry(Image(image_source), snapshot)
    resolver = PathSpecResolver(resolver_context)
    alone = bool(os.environ.get(ALONE_VARIABLE))
    disk = open_disk(image_source, snapshot=wanted, resolver=resolver, missing="raise", follow=not alone)
    _announce(path_spec, source)
    if disk.unbacked is not None:
        logger.warning("%s: %s; reads that need it fail", printable(source_name(source)), disk.unbacked)
    return OpenedDisk(disk, [source, *resolver.opened], resolver_context)


def find_entry(image: Image, snapshot: SnapshotKey) -> SnapshotEntry:
    """Return the entry a key means; OSError when the image no longer has it there."""
    entries: Sequence[SnapshotEntry | None] = image.snapshots
    if snapshot.deleted:
        from qcow2_forensics.residue import Residue  # numpy: only where it is needed

        entries = [Residue(image).entry_at(snapshot.place)]
    for entry in entries:
        if entry is not None and SnapshotKey.of(entry) == snapshot:
            return entry
    raise OSError(f"{printable(image.name)} has no {snapshot}")


def _recovered(source: Source, key: SnapshotKey) -> SnapshotName:
    """Return the recovered state a key means; OSError when it is no longer put together like that."""
    from qcow2_forensics.recovery import select_recovered  # numpy: only where it is needed

    state = select_recovered(source, str(key.place), virtual_size_from_environment())
    if SnapshotKey.of_recovered(state) != key:
        raise OSError(f"{printable(source_name(source))} has no {key}: it is {SnapshotKey.of_recovered(state)} now")
    return state


@contextmanager
def only_os_errors() -> Iterator[None]:
    """Turn what the library raises into OSError, the one error dfVFS, libyal and plaso expect."""
    try:
        yield
    except OSError:
        raise
    except Qcow2Error as error:
        raise OSError(str(error)) from error
    except dfvfs_errors.BackEndError as error:
        raise OSError(printable(reason(error), 500)) from error


def _announce(path_spec: Any, source: Source) -> None:
    """Log once per process and image what reads it, so that reports can say so."""
    if path_spec.comparable not in _announced:
        _announced.add(path_spec.comparable)
        logger.info("QCOW back-end qcow2-forensics %s reads %s", __version__, printable(source_name(source)))
