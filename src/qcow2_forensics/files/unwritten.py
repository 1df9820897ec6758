"""Changes that a file system holds in its log only: of a guest that was running, or whose machine lost its power.

The journal of ext3 and ext4 is read in place of what it replaces. The logs of XFS, NTFS and HFS+ are not: where they hold
changes the listing may lack what the guest did last, and says so. Nothing is said only where a log was recognised as one
that holds none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import Qcow2Error, reason
from ..format.lvm import Segment
from ..text import plural
from . import hfs_journal, ntfs_log, xfs_log
from .ext_journal import ReplayedReader, needs_recovery, read_journal
from .protocol import Log
from .readers import Reader, VolumeReader

_JOURNAL_INODE = 0xE0  # where a superblock of ext has the number of it
_LOG_FILE = 2  # of NTFS: the number of the record of $LogFile
_HFS = ("HFS+", "HFSX")


def log_of(handle: Any, kind: str, reader: Reader, start: int) -> Log | None:
    """Return what the log of a file system holds, None when nothing; it begins at ``start`` of ``reader``.

    ``handle`` is its ``FS_Info`` of pytsk3.
    """
    try:
        if kind.startswith("ext"):
            return _ext(handle, reader, start)
        if kind == "ntfs":
            return _not_read("NTFS") if ntfs_log.has_changes(handle.open_meta(inode=_LOG_FILE)) else None
        return _not_read("HFS+") if kind == "hfs" and hfs_journal.has_changes(reader, start) else None
    except (OSError, RuntimeError, Qcow2Error) as error:
        return _unknown(error)


def log_by_signature(kind: str, reader: Reader) -> Log | None:
    """Return what the log of a file system that dfVFS reads holds, None when nothing. ``kind`` is by its signature."""
    try:
        if kind == "XFS":
            return _not_read(kind) if xfs_log.has_changes(reader) else None
        if kind in _HFS:
            return _not_read(kind) if hfs_journal.has_changes(reader, 0) else None
        if kind == "NTFS":
            raise OSError("it is looked at where The Sleuth Kit opens the file system")
        return _not_read(kind) if kind == "ext" and needs_recovery(reader.read(1024, 1024)) else None
    except (OSError, Qcow2Error) as error:
        return _unknown(error)


def _unknown(error: Exception) -> Log:
    return Log(f"it is not known whether its log holds changes: {reason(error)}", is_incomplete=True)


def _not_read(kind: str) -> Log:
    return Log(
        f"it was not unmounted, and its {kind} log is not read: what was changed last may be missing",
        is_incomplete=True,
    )


def _ext(handle: Any, reader: Reader, start: int) -> Log | None:
    superblock = reader.read(start + 1024, 1024)
    if not needs_recovery(superblock):
        return None
    inode = int.from_bytes(superblock[_JOURNAL_INODE : _JOURNAL_INODE + 4], "little")
    if not inode:
        return Log("it was not unmounted, and its journal is on another device", is_incomplete=True)
    block = int(handle.info.block_size)
    journal = VolumeReader(_runs(handle, inode, reader, start, block))
    found = read_journal(journal)
    if not found.blocks:
        return Log(f"its journal is not read: {found.problem}", is_incomplete=True) if found.problem else None
    replayed = ReplayedReader(reader, start, block, journal, found)
    sentence = (
        f"it was not unmounted: {plural(len(found.blocks), 'block')} of {plural(found.transactions, 'transaction')} "
        "in its journal are read in place of what they replace, as a kernel does"
    )
    sentence += f"; {found.problem}" if found.problem else ""
    return Log(sentence, bool(found.problem), replayed, tuple(replayed.replaced()))


def _runs(handle: Any, inode: int, reader: Reader, start: int, block: int) -> Iterator[tuple[Reader, Segment]]:
    at = 0
    for attribute in handle.open_meta(inode=inode):
        for run in attribute:
            length = int(run.len) * block
            yield reader, Segment(at, length, start + int(run.addr) * block)
            at += length
        if at:
            return
    raise OSError("its journal has no blocks")
