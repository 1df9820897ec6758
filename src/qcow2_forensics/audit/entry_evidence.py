"""Turns what the census met into evidence."""

from __future__ import annotations

from collections.abc import Iterator

from ..census import structure_of
from ..census.issues import Item
from ..findings import EVIDENCE_LIMIT, Evidence, Finding
from .facts import Facts, shortened
from .rules import variant


def snapshot_id(facts: Facts, tree: int) -> str:
    """Return the ID, as it is told, of a snapshot by its index in the table.

    ``#index`` when it cannot be read; "" is the active state.
    """
    if tree < 0:
        return ""
    entries = facts.image.snapshots
    return shortened(entries[tree].id) if tree < len(entries) else f"#{tree}"


def item_evidence(facts: Facts, item: Item, what: str) -> Evidence:
    """Return one item as evidence; ``what`` names the value."""
    length = refcount_bytes(facts) if item.structure == "refcount block" else 8
    return Evidence(
        what,
        item.value,
        item.offset,
        None if item.offset is None else length,
        item.structure,
        item.guest,
        snapshot_id(facts, item.tree),
    )


def entries(facts: Facts, code: str, *kinds: str, what: str = "entry") -> Iterator[Finding]:
    """Yield one finding of a code over all issues of some kinds, when there are any."""
    found: list[Evidence] = []
    count = 0
    for kind in kinds:
        issue = facts.census.issues[kind]
        count += issue.count
        found += [item_evidence(facts, item, told(item, what)) for item in issue.items]
    if found:
        yield variant(code, found[:EVIDENCE_LIMIT], count=count)


def told(item: Item, what: str = "entry") -> str:
    """Return words for the value of an item: a table's entry, a refcount, or a structure's length."""
    if item.host is None:
        return what
    if item.structure == "refcount block":
        return f"refcount of host cluster {item.host:#x}"
    if item.structure == "host cluster":
        return f"references to host cluster {item.host:#x}"
    if item.offset is None:
        return f"{item.structure} at {item.host:#x}, bytes"
    return f"{what}, pointing at {item.host:#x}"


def refcount_evidence(facts: Facts, item: Item) -> Evidence:
    """Return a cluster whose refcount is not what it should be."""
    host = item.host or 0
    references, owner = facts.census.references(host), structure_of(facts.census.owner(host))
    told = f"refcount of host cluster {host:#x} ({references} references: {owner})"
    length = None if item.offset is None else refcount_bytes(facts)
    return Evidence(told, item.value, item.offset, length, item.structure)


def refcount_bytes(facts: Facts) -> int:
    """Return how many bytes hold one refcount; narrow ones share a byte."""
    return max(1, facts.header.refcount_bits // 8)


def refcounts(facts: Facts, code: str, kind: str) -> Iterator[Finding]:
    """Yield one finding of a code over the refcounts of one kind of issue."""
    issue = facts.census.issues[kind]
    if issue.count:
        found = [refcount_evidence(facts, item) for item in issue.items]
        yield variant(code, found, count=issue.count)


def referrer_evidence(facts: Facts, item: Item) -> Evidence:
    """Return an L2 entry that maps a host cluster."""
    told = f"L2 entry mapping host cluster {item.host or 0:#x}"
    return Evidence(told, item.value, item.offset, 8, "L2", item.guest, snapshot_id(facts, item.tree))
