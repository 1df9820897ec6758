"""Which L2 entries map given host clusters: asked only when a finding needs to say so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..format.entries import stored_extent
from .arrays import U64, Mask
from .issues import Item
from .walk import Tables

if TYPE_CHECKING:
    from .census import Census


def referrers(census: Census, clusters: set[int], limit: int) -> dict[int, list[Item]]:
    """Return the L2 entries that map each of some host clusters, the first ones of each.

    ``limit`` is shared out evenly: a cluster that millions of entries name leaves room for those of the others.
    """
    found: dict[int, list[Item]] = {}
    if census.image.header.external_data or not clusters:
        return found
    share = max(1, limit // len(clusters))
    searched = {cluster for cluster in clusters if cluster < census.clusters}
    wanted = _marked(census, searched)
    for tables in census.tables():
        before = len(searched)
        for row, column in tables.where(_mapping(tables, wanted, census)):
            if not searched:
                return found
            entry = int(tables.entries[row, column])
            for cluster in _clusters(entry, tables.cluster_bits) & searched:
                items = found.setdefault(cluster, [])
                items.append(tables.item(row, column, cluster << tables.cluster_bits))
                if len(items) == share:
                    searched.discard(cluster)
        if len(searched) < before:
            wanted = _marked(census, searched)
    return found


def _marked(census: Census, clusters: set[int]) -> Mask:
    """Return which indices of the census's map belong to some clusters."""
    marked = np.zeros(census.index_map.length, dtype=np.bool_)
    marked[census.index_map.of(np.array(sorted(clusters), dtype=np.uint64))] = True
    return marked


def _mapping(tables: Tables, wanted: Mask, census: Census) -> Mask:
    columns, bits = tables.columns, np.uint64(tables.cluster_bits)

    def among(clusters: U64) -> Mask:
        named: Mask = wanted[census.index_map.of(np.minimum(clusters, np.uint64(census.clusters)))]
        return named

    hosts = columns.hosts
    mask = among(hosts >> bits)
    unaligned = (hosts & np.uint64(census.cluster_size - 1)) != 0
    if unaligned.any():
        mask |= among((hosts >> bits) + np.uint64(1)) & unaligned
    mask &= hosts != 0
    if columns.has_compressed:
        offsets, sizes = columns.compressed_extents()
        start, stop = offsets >> bits, (offsets + sizes - np.uint64(1)) >> bits
        mask[columns.compressed] = among(start) | among(np.minimum(start + np.uint64(1), stop)) | among(stop)
    return mask


def _clusters(entry: int, cluster_bits: int) -> set[int]:
    start, length = stored_extent(entry, cluster_bits)
    return set(range(start >> cluster_bits, ((start + length - 1) >> cluster_bits) + 1))
