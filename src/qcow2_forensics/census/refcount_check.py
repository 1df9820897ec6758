"""Compares what claims a cluster with what its refcount says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..findings import EVIDENCE_LIMIT
from .arrays import Places
from .claims import Claims
from .issues import Item, spread
from .owners import METADATA, Owner

_METADATA = np.uint16(METADATA)
_ORPHAN_KINDS = np.uint16(Owner.DATA | Owner.COMPRESSED)
_ORPHAN = np.uint16(Owner.DATA)


@dataclass
class Comparison:
    """QEMU's counters, and the last cluster in use.

    The mismatches themselves are issues of the census: ``refcount-zero-metadata``,
    ``refcount-zero-data`` (mapped, but accounted free), ``refcount-low``, ``refcount-high``,
    ``leaked`` and ``refcount-past-end``.
    """

    corruptions: int = 0
    leaks: int = 0
    errors: int = 0
    orphans: int = 0  # of the corruptions, clusters that the active state maps and whose refcount is 0
    highest: int = 0  # the last cluster claimed or counted; QEMU's check never reports less than the first
    last: int = 0  # the same, also of clusters whose refcounts cannot be read


def compare_refcounts(claims: Claims) -> Comparison:
    """Compare every cluster of the file, then look at the refcounts past its end."""
    found = Comparison()
    most = claims.refcounts.most
    for start, stop, values, readable in claims.refcounts.windows(claims.checked):
        if not readable:
            found.errors += stop - start
            used = np.flatnonzero(claims.index_map.part(claims.counts.all, start, stop))
            if len(used):
                found.last = start + int(used[-1])
            continue
        claimed = claims.index_map.part(claims.counts.all, start, stop)
        if values is None:
            used = np.flatnonzero(claimed)
            low, high = used, used[:0]
        else:
            if np.array_equal(claimed, values):
                used = np.flatnonzero(claimed) if claimed[-1] == 0 else np.asarray([stop - start - 1])
                if len(used):
                    found.highest = start + int(used[-1])
                continue
            limited = np.minimum(claimed, claimed.dtype.type(min(most, np.iinfo(claimed.dtype).max)))
            low, high = np.flatnonzero(values < limited), np.flatnonzero(values > limited)
            used = np.flatnonzero((limited != 0) | (values != 0))
        if len(used):
            found.highest = start + int(used[-1])
        found.corruptions += len(low)
        found.leaks += len(high)
        if not claims.refcounts.known:
            continue
        if len(low):
            stored = np.zeros(len(low), dtype=np.uint64) if values is None else values[low]
            zero = stored == 0
            owners = claims.owners[claims.index_map.of((start + low).astype(np.uint64))]
            metadata = (owners & _METADATA) != 0
            _note(claims, "refcount-zero-metadata", start + low[zero & metadata])
            _note(claims, "refcount-zero-data", start + low[zero & ~metadata])
            plain = (owners & _ORPHAN_KINDS) == _ORPHAN
            found.orphans += int((zero & ~metadata & plain).sum())
            _note(claims, "refcount-low", start + low[~zero])
        if len(high):
            referred = claimed[high] != 0
            _note(claims, "refcount-high", start + high[referred])
            _note(claims, "leaked", start + high[~referred])
    found.last = max(found.last, found.highest)
    _past_end(claims)
    return found


def _note(claims: Claims, kind: str, clusters: Places) -> None:
    if len(clusters):
        size = claims.cluster_size
        items = []
        for cluster in spread(clusters, clusters // claims.refcounts.per_block).tolist():
            stored = claims.refcounts.lookup(np.asarray([cluster], dtype=np.uint64))[0]
            where = claims.refcounts.entry_offset(cluster)
            items.append(Item("refcount block", where, int(stored[0]), cluster * size))
        claims.issues.add(kind, items, len(clusters))


def _past_end(claims: Claims) -> None:
    """Note refcounts above 0 for clusters that begin past the end of the file."""
    kind, stored = "refcount-past-end", claims.refcounts
    usable = ~stored.unreadable & (stored.offsets != 0) & (stored.offsets < np.uint64(claims.image.file_size))
    slot, begin = divmod(claims.checked, stored.per_block)
    if begin:
        if slot < len(usable) and usable[slot]:
            hits = np.flatnonzero(stored.block(int(stored.offsets[slot]))[begin:]) + begin
            _note(claims, kind, slot * stored.per_block + hits)
        slot += 1
    slots = np.flatnonzero(usable[slot:]) + slot
    blocks, firsts, times = np.unique(stored.offsets[slots], return_index=True, return_counts=True)
    used = stored.used(blocks)  # the table may name a block any number of times
    rest = int((used * times).sum())
    order = np.argsort(firsts)
    for number in order[used[order] > 0][:EVIDENCE_LIMIT].tolist():
        hits = np.flatnonzero(stored.block(int(blocks[number])))
        _note(claims, kind, int(slots[firsts[number]]) * stored.per_block + hits)
        rest -= len(hits)
    if rest:
        claims.issues.add(kind, (), rest)


def structure_of(owner: Owner) -> str:
    """Return the words for the owners of a cluster."""
    names = [bit.name.lower().replace("_", " ") for bit in Owner if bit & owner and bit.name]
    return ", ".join(names) or "nobody"
