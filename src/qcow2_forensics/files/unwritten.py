"""Changes that a file system holds in its log only: of a guest that was running, or whose machine lost its power.

The journal of ext3 and ext4 is read in place of what it replaces. The logs of XFS and NTFS are not: where they hold
changes the listing may lack what the guest did last, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import Qcow2Error, reason
from ..lvm import Segment
from ..text import plural
from .ext_journal import ReplayedReader, needs_recovery, read_journal
from .protocol import Log
from .readers import Reader, VolumeReader
from .xfs_log import has_changes as xfs_has_changes

_JOURNAL_INODE = 0xE0  # where a superblock of ext has the number of it
_LOG_FILE = 2  # of NTFS: the number of the record of $LogFile
_RESTART_PAGES = (0, 4096)
_NO_CLIENT, _IS_CLEAN = 0xFFFF, 2


def log_of(handle: Any, kind: str, reader: Reader, start: int) -> Log | None:
    """Return what the log of a file system holds, None when nothing; it begins at ``start`` of ``reader``.

    ``handle`` is its ``FS_Info`` of pytsk3.
    """
    try:
        if kind.startswith("ext"):
            return _ext(handle, reader, start)
        return _ntfs(handle) if kind == "ntfs" else None
    except (OSError, RuntimeError, Qcow2Error) as error:
        return Log(f"its log was not looked at: {reason(error)}", is_incomplete=True)


def log_by_signature(kind: str, reader: Reader) -> Log | None:
    """Return what the log of a file system that dfVFS reads holds, None when nothing. ``kind`` is by its signature."""
    try:
        if kind == "XFS":
            return _not_read(kind) if xfs_has_changes(reader) else None
        return _not_read(kind) if kind == "ext" and needs_recovery(reader.read(1024, 1024)) else None
    except (OSError, Qcow2Error) as error:
        return Log(f"its log was not looked at: {reason(error)}", is_incomplete=True)


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


def _ntfs(handle: Any) -> Log | None:
    """Whether ``$LogFile`` has clients and no mark of a clean end, as ntfs-3g decides it."""
    log = handle.open_meta(inode=_LOG_FILE)
    newest: tuple[int, bytes] | None = None
    for page in _RESTART_PAGES:
        head = log.read_random(page, 512)
        area = int.from_bytes(head[24:26], "little")
        if head[:4] == b"RSTR" and area <= 464:
            number = int.from_bytes(head[area : area + 8], "little")
            newest = max(newest or (-1, b""), (number, head[area : area + 48]))
    if newest is None:
        return None  # it was emptied, which is how a volume is made
    _, latest = newest
    in_use, flags = int.from_bytes(latest[12:14], "little"), int.from_bytes(latest[14:16], "little")
    return None if in_use == _NO_CLIENT or flags & _IS_CLEAN else _not_read("NTFS")
