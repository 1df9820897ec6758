"""What the census found wrong, as evidence; and rules that only list it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..census import structure_of
from ..census.issues import Item
from ..errors import FormatError
from ..findings import Evidence
from ..text import plural
from .facts import Facts, shortened
from .rules import OneFinding, RuleFunction

if TYPE_CHECKING:
    from ..account.qcow1_claims import Qcow1Claims

Show = Callable[[Facts, Item], Evidence]


def snapshot_id(facts: Facts, tree: int) -> str:
    """Return the ID, as reports show it, of a snapshot by its index in the table.

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


def entry_evidence(facts: Facts, item: Item, what: str = "entry") -> Evidence:
    """Return one item as evidence, with words for its value."""
    return item_evidence(facts, item, describe_value(item, what))


def one_finding(facts: Facts, *kinds: str, show: Show = entry_evidence) -> Iterator[OneFinding]:
    """Yield one finding over all issues of some kinds, when there are any."""
    every = facts.census.issues if facts.has_census else qcow1_claims(facts).issues
    issues = [every[kind] for kind in kinds]
    count = sum(issue.count for issue in issues)
    if count:
        yield OneFinding([show(facts, item) for issue in issues for item in issue.items], count=count)


def of_issues(*kinds: str, show: Show = entry_evidence) -> RuleFunction:
    """Return a rule that lists the issues of some kinds."""
    return lambda facts: one_finding(facts, *kinds, show=show)


def qcow1_claims(facts: Facts) -> Qcow1Claims:
    """Return what was found in the tables of a version 1 image, which has no census."""
    from .account import accounted

    found = facts.once(accounted).account.qcow1
    if found is None:
        raise FormatError("the header does not lead to tables that can be walked", offset=0)
    return found


def describe_value(item: Item, what: str = "entry") -> str:
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
    words = f"refcount of host cluster {host:#x} ({plural(references, 'reference')}: {owner})"
    length = None if item.offset is None else refcount_bytes(facts)
    return Evidence(words, item.value, item.offset, length, item.structure)


def refcount_bytes(facts: Facts) -> int:
    """Return how many bytes hold one refcount; narrow ones share a byte."""
    return max(1, facts.header.refcount_bits // 8)


def referrer_evidence(facts: Facts, item: Item) -> Evidence:
    """Return an L2 entry that maps a host cluster."""
    words = f"L2 entry mapping host cluster {item.host or 0:#x}"
    return Evidence(words, item.value, item.offset, 8, "L2", item.guest, snapshot_id(facts, item.tree))
