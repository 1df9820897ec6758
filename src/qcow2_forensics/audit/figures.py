"""What a report can draw: who owns each part of the host file, and how the disk's states hang together.

Both are plain data in ``Report.details``; :mod:`qcow2_forensics.render` says what each key means.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt

from ..account.account import Account
from ..census import Census, Owner
from ..census.arrays import U64, ranges
from ..census.columns import without_copied
from ..census.owner_codes import by_owners
from ..errors import Qcow2Error
from ..format.snapshot_table import SnapshotEntry
from ..limits import CLUSTERS_DRAWN, L1_ENTRIES_COMPARED, L2_TABLES_COMPARED, SNAPSHOTS_DRAWN, STATES_COMPARED, MiB
from ..residue import live_mappings
from ..text import snapshot_date
from .account import accounted
from .facts import Facts, shortened
from .residual import survey_of
from .rules import Depth

CELLS = 2048  # squares of the map
_STATES = 1000  # snapshots of the tree, the latest

_FREE, _LEAKED, _RESIDUE, _HEADER, _REFCOUNTS, _TABLE, _BITMAPS, _CRYPTO, _ACTIVE, _COMPRESSED, _SHARED = range(11)
_FIRST_SNAPSHOT = 11
_LABELS = (
    ("free", "Free"),
    ("leaked", "Leaked: counted, but nothing refers to it"),
    ("residue", "Residue: free, but not empty"),
    ("header", "Header"),
    ("refcounts", "Refcounts"),
    ("tables", "L1, L2 and snapshot tables"),
    ("bitmaps", "Bitmaps"),
    ("encryption", "LUKS header"),
    ("active", "Active state"),
    ("compressed", "Compressed data"),
    ("shared", "Active state and snapshots"),
)


def details(facts: Facts) -> dict[str, Any]:
    """Return the pictures of an image that can be walked; nothing for any other."""
    if not facts.has_census:
        return {}
    pictures: dict[str, Any] = {"lineage": lineage(facts)}
    if facts.census.clusters <= CLUSTERS_DRAWN:
        pictures["map"] = cluster_map(facts)
    return pictures


# --- the host file -------------------------------------------------------------------------------


def cluster_map(facts: Facts) -> dict[str, Any]:
    """Return the host file as at most 2,048 cells, each with the clusters of every owner in it."""
    census = facts.census
    classes = _classes(census)
    bits = facts.header.cluster_bits
    for offset, length in census.leaked():
        classes[offset >> bits : (offset + length) >> bits] = _LEAKED
    if facts.depth >= Depth.DEEP:
        for offset, length in survey_of(facts).ranges:
            part = classes[offset >> bits : -(-(offset + length) >> bits)]
            part[part == _FREE] = _RESIDUE
    labels = [list(label) for label in _LABELS] + _name_snapshots(facts, classes)
    if _mark_vm_states(facts, classes, len(labels)):
        labels.append(["vmstate", "VM states"])
    picture = _cells(classes, labels, facts.cluster_size)
    if facts.depth >= Depth.DEEP:
        with contextlib.suppress(Qcow2Error, OSError):  # the account itself says why there is none
            picture |= _by_bytes(picture, classes, facts.once(accounted).account)
    return picture


def _classes(census: Census) -> npt.NDArray[np.uint8]:
    table = _by_owner()
    classes = np.empty(census.clusters, np.uint8)
    for starts, stops, owners in census.owner_runs():
        classes[starts[0] : stops[-1]] = np.repeat(table[owners], stops - starts)
    return classes


def _by_owner() -> npt.NDArray[np.uint8]:
    """Return the class of every combination of owners; metadata goes before data."""
    table = by_owners(
        (Owner.SNAPSHOT_DATA, _FIRST_SNAPSHOT),
        (Owner.DATA, _ACTIVE),
        (Owner.COMPRESSED, _COMPRESSED),
        (Owner.CRYPTO, _CRYPTO),
        (Owner.BITMAP_DIRECTORY | Owner.BITMAP_TABLE | Owner.BITMAP_DATA, _BITMAPS),
        (Owner.L1 | Owner.L2 | Owner.SNAPSHOT_TABLE | Owner.SNAPSHOT_L1 | Owner.SNAPSHOT_L2, _TABLE),
        (Owner.REFCOUNT_TABLE | Owner.REFCOUNT_BLOCK, _REFCOUNTS),
        (Owner.HEADER, _HEADER),
    )
    of_snapshots = (np.arange(len(table)) & int(Owner.SNAPSHOT_DATA)) != 0
    table[(table == _ACTIVE) & of_snapshots] = _SHARED
    return table


def _name_snapshots(facts: Facts, classes: npt.NDArray[np.uint8]) -> list[list[str]]:
    """Give clusters only snapshots use the class of the first snapshot that does; return the labels."""
    snapshots = facts.image.snapshots[:SNAPSHOTS_DRAWN]
    labels = [
        [f"snapshot:{entry.index}", f"Snapshot {shortened(entry.id)} ({shortened(entry.name)})"] for entry in snapshots
    ]
    labels.append(["snapshot:0", "Other snapshots"])
    if not facts.image.snapshots:
        # A table that cannot be read still has owners: QEMU counts what its entries point at.
        return [["snapshot:0", "Snapshots"]] if (classes == _FIRST_SNAPSHOT).any() else []
    last = _FIRST_SNAPSHOT + len(snapshots)
    only = classes == _FIRST_SNAPSHOT
    classes[only] = last
    for batch in facts.census.tables():
        rows = np.flatnonzero((batch.tree >= 0) & (batch.tree < len(snapshots)))
        hosts = (batch.columns.hosts[rows] >> np.uint64(facts.header.cluster_bits)).reshape(-1)
        numbers = np.repeat(_FIRST_SNAPSHOT + batch.tree[rows], batch.entries.shape[1]).astype(np.uint8)
        inside = hosts < len(classes)
        hosts, numbers = hosts[inside].astype(np.intp), numbers[inside]
        free = classes[hosts] == last
        classes[hosts[free][::-1]] = numbers[free][::-1]  # of several snapshots the first
    return labels


def _mark_vm_states(facts: Facts, classes: npt.NDArray[np.uint8], number: int) -> bool:
    """Give the clusters that states map past the end of their disk a class; return whether there are any."""
    header, snapshots = facts.header, facts.image.snapshots
    sizes = [header.size, *(header.size if entry.disk_size is None else entry.disk_size for entry in snapshots)]
    firsts = np.array([min(-(-size // header.l2_span), 2**62) for size in sizes], np.int64)
    found = False
    for batch in facts.census.tables():
        known = batch.tree < len(snapshots)
        behind = batch.index.astype(np.int64) >= firsts[np.where(known, batch.tree + 1, 0)]
        hosts = batch.columns.data_hosts[behind & known] >> np.uint64(header.cluster_bits)
        hosts = hosts[(hosts != 0) & (hosts < len(classes))].astype(np.intp)
        of_data = (classes[hosts] >= _FIRST_SNAPSHOT) | (classes[hosts] == _ACTIVE) | (classes[hosts] == _SHARED)
        classes[hosts[of_data]] = number
        found |= bool(of_data.any())
    return found


def _cells(classes: npt.NDArray[np.uint8], labels: list[list[str]], cluster_size: int) -> dict[str, Any]:
    per_cell = max(1, -(-len(classes) // CELLS))
    count = -(-len(classes) // per_cell)
    kinds = len(labels)
    parts = (classes[start : start + per_cell] for start in range(0, len(classes), per_cell))
    sums = np.array([np.bincount(part, minlength=kinds) for part in parts]).reshape(count, kinds)
    return {
        "cluster_size": cluster_size,
        "per_cell": per_cell,
        "owners": labels,
        "counts": sums.sum(axis=0).tolist(),
        "cells": [[[kind, int(row[kind])] for kind in np.flatnonzero(row).tolist()] for row in sums],
    }


def _by_bytes(picture: dict[str, Any], classes: npt.NDArray[np.uint8], account: Account) -> dict[str, Any]:
    """Return the same cells in bytes: what nothing accounts for inside clusters in use is drawn by itself."""
    size, per_cell, kinds = account.image.cluster_size, picture["per_cell"], len(picture["owners"])
    sums = np.zeros((len(picture["cells"]), kinds + 2), np.int64)
    for number, cell in enumerate(picture["cells"]):
        for kind, count in cell:
            sums[number, kind] = count * size
    if len(classes):
        sums[-1, classes[-1]] -= len(classes) * size - account.size
    outside = np.isin(np.arange(kinds), (_FREE, _LEAKED, _RESIDUE))
    for rows in account.tiles():
        chosen = (rows.claims == 0) & (rows.nonzero >= 0)
        starts, stops, nonzero = rows.start[chosen], rows.stop[chosen], rows.nonzero[chosen] > 0
        row, cluster = ranges(starts // size, (stops - 1) // size + 1)  # each with the clusters it touches
        length = np.minimum(stops[row], (cluster + 1) * size) - np.maximum(starts[row], cluster * size)
        kept = ~outside[classes[cluster]]
        row, cluster, length = row[kept], cluster[kept], length[kept]
        np.add.at(sums, (cluster // per_cell, classes[cluster]), -length)
        np.add.at(sums, (cluster // per_cell, kinds + np.where(nonzero[row], 0, 1)), length)
    return {
        "byte_owners": [
            *picture["owners"],
            ["unaccounted", "Remainders that are not zeros"],
            ["zeros", "Remainders of zeros"],
        ],
        "byte_counts": sums.sum(axis=0).tolist(),
        "byte_cells": [[[kind, int(row[kind])] for kind in np.flatnonzero(row > 0).tolist()] for row in sums],
    }


# --- the states ----------------------------------------------------------------------------------


def lineage(facts: Facts) -> dict[str, Any]:
    """Return the states of the disk in order of time, each with the earlier one it shares most with.

    ``left_out`` counts the earliest snapshots, where there are more than are drawn.
    """
    nodes: list[dict[str, Any]] = []
    if facts.image.backing_name:
        nodes.append({"kind": "backing", "name": facts.image.backing_name, "note": "backing file", "parent": None})
    root = 0 if nodes else None
    states: list[live_mappings.StateTable] = []
    history = _history(facts)
    for entry, note in history[-_STATES:]:
        kind = "deleted" if entry.index < 0 else "snapshot"
        ident, name = shortened(entry.id), shortened(entry.name)
        nodes.append({"kind": kind, "id": ident, "name": name, "date": _shown_date(entry), "note": note})
        states.append(live_mappings.StateTable(entry, entry.l1_table_offset, entry.l1_size))
    nodes.append({"kind": "active", "name": "active state", "note": ""})
    states.append(live_mappings.StateTable(None, facts.header.l1_table_offset, facts.header.l1_size))
    first = len(nodes) - len(states)
    for number, parent in enumerate(_parents(facts, states)):
        nodes[first + number]["parent"] = root if parent is None else first + parent
    return {"states": nodes, "left_out": max(0, len(history) - _STATES)}


def _history(facts: Facts) -> list[tuple[SnapshotEntry, str]]:
    found = [(entry, _note(entry)) for entry in facts.image.snapshots]
    if facts.depth >= Depth.DEEP:
        for item in survey_of(facts).deleted:
            found.append((item.entry, f"in no table, {item.what_is_left}"))
    return sorted(found, key=lambda item: (item[0].date_sec, item[0].date_nsec))


def _shown_date(entry: SnapshotEntry) -> str:
    return snapshot_date(entry.date_sec, entry.date_nsec, fraction=False).replace("T", " ", 1)


def _note(entry: SnapshotEntry) -> str:
    return f"VM state of {entry.vm_state_size / MiB:.1f} MiB" if entry.vm_state_size else ""


def _parents(facts: Facts, states: list[live_mappings.StateTable]) -> list[int | None]:
    """Return for each state the earlier one with most clusters at the same places, None for none."""
    compared = states[-STATES_COMPARED:]
    skipped = len(states) - len(compared)
    in_order = [None if index == 0 else index - 1 for index in range(len(states))]
    if sum(state.l1_size for state in compared) > L1_ENTRIES_COMPARED:
        return in_order
    l1_tables = [live_mappings.l1_table(facts.image, state) for state in compared]
    if sum(int(np.count_nonzero(table)) for table in l1_tables) > L2_TABLES_COMPARED:
        return in_order
    parents = in_order[:skipped]
    cache: dict[int, U64] = {}
    for index, table in enumerate(l1_tables):
        shares = [_shared(facts, table, other, cache) for other in l1_tables[:index]]
        best = max(shares, default=0)
        found = None if best == 0 else max(at for at, share in enumerate(shares) if share == best)
        parents.append(None if found is None else found + skipped)
    return parents


def _shared(
    facts: Facts,
    one: U64,
    other: U64,
    cache: dict[int, U64],
) -> int:
    length = min(len(one), len(other))
    both = np.flatnonzero((one[:length] != 0) & (other[:length] != 0)).tolist()
    total = 0
    for index in both:
        first = _entries(facts, int(one[index]), cache)
        second = first if one[index] == other[index] else _entries(facts, int(other[index]), cache)
        if len(first) == len(second):
            total += int(((first != 0) & (first == second)).sum())
    return total


def _entries(facts: Facts, offset: int, cache: dict[int, U64]) -> U64:
    found = cache.get(offset)
    if found is None:
        table = live_mappings.l2_table(facts.image, offset)
        found = np.empty(0, np.uint64) if table is None else without_copied(table.entries)
        if len(cache) < 256:
            cache[offset] = found
    return found
