"""Which files of two states are one file under another name: by what stays when it is renamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from .records import FileRecord

_Key = TypeVar("_Key")


def renames(removed: Mapping[_Key, FileRecord], added: Mapping[_Key, FileRecord]) -> Iterator[tuple[_Key, _Key]]:
    """Yield (new key, old key) of files that kept inode or blocks, and age, under another name."""
    by_inode = {(record.inode, record.stream, record.type, record.sequence): key for key, record in removed.items()}
    by_place = {(record.spans, record.size): key for key, record in removed.items() if record.spans}
    taken: set[_Key] = set()
    for key, record in added.items():
        candidates = (
            by_inode.get((record.inode, record.stream, record.type, record.sequence)),
            by_place.get((record.spans, record.size)) if record.spans else None,
        )
        for candidate in candidates:
            if candidate is not None and candidate not in taken and _same_age(removed[candidate], record):
                taken.add(candidate)
                yield key, candidate
                break


def _same_age(old: FileRecord, new: FileRecord) -> bool:
    """Whether two records can be one file: an inode used again has times and blocks of its own."""
    if old.type != new.type or (old.times.created and new.times.created and old.times.created != new.times.created):
        return False
    if old.spans and new.spans:
        return old.spans[0].offset == new.spans[0].offset
    return not old.spans and not new.spans and (old.size, old.times.modified) == (new.size, new.times.modified)
