"""Deleted snapshots: entries no table lists any more, and how much of their disk can still be read.

Deleting a snapshot rewrites the snapshot table elsewhere and frees the L1 table, the L2 tables and
the clusters only that snapshot used. Until they are reused they stay as they were, so an entry
found in free space can be opened like a live one::

    former table entry -> former L1 -> former L2 tables -> freed clusters (intact until reused)
                                                       -> clusters live states still share
                                                       -> clusters reused since: refused
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import FormatError, SnapshotNotFound
from ..format.entries import has_reserved_l1_bits, named_offset, parse_entries
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..text import cut

BOGUS = 4  # rank of what holds no L1 entries
_L1_HEAD = 512  # bytes of a former L1 table that show whether it leads anywhere


@dataclass(frozen=True, slots=True)
class DeletedSnapshot:
    """A former snapshot table entry and what became of the clusters it names.

    Counts are clusters: ``intact`` ones nothing else uses and that hold bytes, ``shared`` ones a
    live state maps at the same guest offset, ``zeroed`` ones that are free and all zeros,
    ``punched`` those of them that the file system keeps as holes and that are refused for it,
    ``reused`` ones that belong to something else now, ``compressed`` ones that do not.
    ``lost_tables`` counts L2 tables that are gone, of ``l2_tables``.

    ``followed`` is False where its tables, beside those of others, are more than is read for one image:
    what is left of it shows when it is opened alone.
    ``disk_bytes`` are those of its disk as it opens: today's where the entry does not say.
    ``rewritable_bytes`` are read, yet may be newer than the snapshot: no snapshot older than it
    holds their L2 table or cluster too, so that the active state could write there in place, or
    compressed data over what it had let go of.
    """

    entry: SnapshotEntry
    l1_intact: bool
    followed: bool = True
    disk_bytes: int = 0
    l2_tables: int = 0
    lost_tables: int = 0
    intact: int = 0
    shared: int = 0
    zeroed: int = 0
    punched: int = 0
    reused: int = 0
    compressed: int = 0
    unreadable_bytes: int = 0
    rewritable_bytes: int = 0

    @property
    def size(self) -> int | None:
        """Bytes of its disk; None when the entry does not say."""
        return self.entry.disk_size

    @property
    def readable(self) -> float:
        """The fraction of its guest bytes that can be read, 0 when its L1 table is gone."""
        if not self.l1_intact:
            return 0.0
        return 1 - self.unreadable_bytes / self.disk_bytes if self.disk_bytes else 1.0

    @property
    def rewritable(self) -> float:
        """The fraction of its guest bytes that can be read and may have been written in place since."""
        return self.rewritable_bytes / self.disk_bytes if self.disk_bytes else 0.0

    @property
    def what_is_left(self) -> str:
        """How much can be read, and how much of that may be newer, in words."""
        if not self.l1_intact:
            return "its tables are gone" if self.followed else "not followed: too many tables"
        newer = f", {self.rewritable:.0%} perhaps newer" if self.rewritable_bytes else ""
        return f"{self.readable:.0%} readable{newer}"

    @property
    def is_gone(self) -> bool:
        """Whether there is nothing to open."""
        return self.followed and not self.l1_intact

    @property
    def complete(self) -> bool:
        """Whether its L1, every L2 table and every cluster are still there."""
        lost = self.lost_tables or self.reused or self.punched or self.unreadable_bytes
        return self.l1_intact and not lost

    @property
    def selector(self) -> str:
        """What ``open_disk(snapshot=...)`` takes."""
        return f"deleted:{self.entry.offset:#x}"


def unknown_entries(image: Image, entries: Iterable[SnapshotEntry]) -> list[SnapshotEntry]:
    """Return the former entries that are not live snapshots, each once, in order of ID and place.

    QEMU rewrites the whole table at each change, so old copies of it list live snapshots too.
    """
    former = list(entries)
    live = {_identity(entry) for entry in image.snapshots} if former else ()
    unknown: dict[object, SnapshotEntry] = {}
    for entry in former:
        if _identity(entry) not in live:
            unknown.setdefault((*_identity(entry), entry.l1_table_offset), entry)
    return sorted(unknown.values(), key=lambda entry: (int(entry.id_bytes), entry.date_sec, entry.offset))


def most_plausible(image: Image, entries: Sequence[SnapshotEntry], most: int) -> list[SnapshotEntry]:
    """Return up to ``most`` entries, in their order: first one for each L1 table that leads somewhere.

    Anybody can make bogus entries; an L1 table that leads into the file has to be stored for each.
    """
    if len(entries) <= most:
        return list(entries)
    ranks: dict[tuple[int, int], int] = {}
    seen: set[tuple[int, int]] = set()

    def rank(entry: SnapshotEntry) -> int:
        key = entry.l1_table_offset, entry.l1_size
        if key not in ranks:
            ranks[key] = l1_rank(image, entry)
        again = key in seen
        seen.add(key)
        return ranks[key] + again

    order = sorted(range(len(entries)), key=[rank(entry) for entry in entries].__getitem__)
    return [entries[at] for at in sorted(order[:most])]


def l1_rank(image: Image, entry: SnapshotEntry) -> int:
    """Return 0 for an L1 table whose first entries lead into the file, 2 for one of zeros, ``BOGUS`` for any other."""
    data = image.read(entry.l1_table_offset, min(entry.l1_size * 8, _L1_HEAD)) if entry.l1_size else b""
    words = [word for word in parse_entries(data[: len(data) // 8 * 8]) if word]
    if not words:
        return 2
    sound = all(
        not has_reserved_l1_bits(word) and not at % image.cluster_size and at < image.file_size
        for word, at in ((word, named_offset(word)) for word in words)
    )
    return 0 if sound else BOGUS


def _identity(entry: SnapshotEntry) -> tuple[bytes, bytes, int, int]:
    return entry.id_bytes, entry.name_bytes, entry.date_sec, entry.date_nsec


def gone(entry: SnapshotEntry) -> FormatError:
    """Return the error for a former entry whose L1 table is not there any more."""
    return FormatError(
        f"the L1 table of the deleted snapshot {cut(entry.id)} ({cut(entry.name)}) "
        "is gone: it has been reused or wiped",
        offset=entry.l1_table_offset,
        field="l1_table_offset",
    )


def choose_deleted(found: Iterable[DeletedSnapshot], wanted: str) -> DeletedSnapshot:
    """Return the deleted snapshot with an ID, a name or an entry offset (``0x...``, in either case)."""
    known = list(found)
    matches = [
        item
        for item in known
        if wanted in (item.entry.id, item.entry.name) or wanted.lower() == f"{item.entry.offset:#x}"
    ]
    if len(matches) == 1:
        return matches[0]
    raise SnapshotNotFound(f"deleted:{wanted}", _choices(matches or known), ambiguous=bool(matches))


def _choices(found: Iterable[DeletedSnapshot]) -> Iterator[str]:
    for item in found:
        yield f"{item.selector} (ID {cut(item.entry.id)}, {cut(item.entry.name)})"
