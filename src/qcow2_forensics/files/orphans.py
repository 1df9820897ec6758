"""Files without a name, where The Sleuth Kit does not list them: some releases end in an error in place of ``$OrphanFiles``."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, NamedTuple

_UNALLOCATED, _USED = 2, 4  # flags of metadata


class _Name(NamedTuple):
    """A name made up for a file, with what pytsk3 has for names."""

    name: bytes
    meta_addr: int
    par_addr: int
    type: int = 0  # not known
    flags: int = _UNALLOCATED
    meta_seq: int = 0


class _Info(NamedTuple):
    name: _Name
    meta: None = None


class Orphan(NamedTuple):
    """An entry without metadata, in place of a ``File`` of pytsk3."""

    info: _Info


def orphans(handle: Any, named: Container[int], most: int) -> Iterator[Orphan]:
    """Yield the free inodes that hold a file and that none of the ``named`` are, among the first ``most``."""
    folder = int(handle.info.last_inum)
    first = int(handle.info.first_inum)
    for inode in range(first, min(folder, first + most)):
        if inode in named:
            continue
        try:
            meta = handle.open_meta(inode=inode).info.meta
        except (OSError, RuntimeError):
            continue
        if meta is not None and int(meta.flags) & _UNALLOCATED and int(meta.flags) & _USED:
            yield Orphan(_Info(_Name(b"OrphanFile-%d" % inode, inode, folder)))
