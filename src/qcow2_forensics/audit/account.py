"""The account of every byte, and rules about remainders that no other rule looks at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..account.account import Account
from ..account.labels import KEY_MATERIAL, Label, Place
from ..account.shown import ShownBytes
from ..account.streams import Decoded
from ..account.summary import AccountSummary
from ..errors import Qcow2Error, Unsupported, reason
from ..findings import Severity
from ..residue.accounted import cut_streams, kind_of, pieces_of
from .facts import Facts, subscribes
from .reference_names import opened_data_file
from .residual import Group, finding_of
from .rules import Chapter, Depth, OneFinding
from .undecodable_streams import decoded_streams

rule = Chapter(__name__, "What nothing accounts for", depth=Depth.DEEP)


subscribes(Depth.DEEP, lambda image: not image.header.external_data)(ShownBytes)


class Accounted(NamedTuple):
    """The account of the image, what it adds up to, and the remainders that this chapter reports, by their kind."""

    account: Account
    summary: AccountSummary
    groups: dict[str, Group]


def accounted(facts: Facts) -> Accounted:
    """Return the account of the image itself; for :meth:`Facts.once`."""
    deep = facts.depth >= Depth.DEEP
    census = facts.census if facts.has_census and facts.census_error is None else None
    decoded = _decoded(facts) if deep and census is not None else None
    account = Account(facts.image, census, decoded, read=deep)
    summary, groups = AccountSummary(account.labels, exact=account.is_exact), defaultdict[str, Group](Group)
    for tiled in account.tiles():
        summary.add(tiled)
        if deep:
            for piece in pieces_of(account, tiled, _reported_here):
                groups[piece.kind].add(piece)
    for piece in cut_streams(account):
        groups[piece.kind].add(piece)
    return Accounted(account, summary, groups)


def _reported_here(label: Label, version: int) -> str:
    """Return which kind of piece a remainder is; "" where a rule of another chapter reports it."""
    known = label.what in (Place.REFCOUNTS_PAST_END, Place.UNKNOWN_EXTRA)
    known |= label == Label(Place.LUKS_SLOT, KEY_MATERIAL)
    known |= label.what is Place.UNUSED_EXTENSION and label.owner.startswith("0x")  # of an unknown type
    return "" if known else kind_of(label, version)


def _decoded(facts: Facts) -> Decoded:
    try:
        return facts.once(decoded_streams)
    except Unsupported:  # a compression type that nobody knows: descriptors are all there is to go by
        return Decoded.nothing()


def details(facts: Facts) -> dict[str, Any]:
    """Return the accounts of the image and of its data file for ``Report.details``."""
    try:
        files = [facts.once(accounted).summary.to_dict()]
    except (Qcow2Error, OSError) as error:
        return {"error": reason(error)}
    if facts.header.external_data and facts.depth >= Depth.DEEP and facts.has_census:
        files += _data_file(facts)
    return {"files": files}


def _data_file(facts: Facts) -> Iterator[dict[str, Any]]:
    from ..account.data_file import DataFileAccount

    try:
        with opened_data_file(facts) as data:
            if data is None:
                return
            account = DataFileAccount(facts.image, data)
            summary = AccountSummary(account.labels, file="data", exact=True)
            for tiled in account.tiles():
                summary.add(tiled)
            yield summary.to_dict()
    except (Qcow2Error, OSError) as error:
        yield {"file": "data", "error": reason(error)}


def _of_kind(*kinds: str) -> Callable[[Facts], Iterator[OneFinding]]:
    def function(facts: Facts) -> Iterator[OneFinding]:
        for kind in kinds:
            group = facts.once(accounted).groups.get(kind)
            if group is not None:
                yield from finding_of(group)

    return function


rule(
    "QCOW2-NAME-SLACK",
    Severity.MEDIUM,
    "there is data after the end of a name",
    note="readers stop at the NUL; writers fill the rest of such fields with zeros: consistent with data embedded by hand",
    when="bytes after the NUL of a name in the header, the LUKS header or a table, or in the padding of a table entry, are not zeros",
    needs="geometry",
)(_of_kind("name-slack"))


rule(
    "QCOW2-UNREAD-FIELD",
    Severity.LOW,
    "a field or header extension that nothing reads holds data",
    note="consistent with a feature that was switched off, with another writer, or with embedding",
    when="an extension of a known type repeats, or the header field or feature bit that gives it a meaning is not set; the "
    "length of a backing file name is set without its offset, or mtime in version 1; the 32-bit VM state size of a snapshot "
    "differs from its 64-bit one",
    harmless="software that does not know bitmaps clears their bit and keeps the extension",
    needs="geometry",
)(_of_kind("unread-field"))


rule(
    "QCOW2-ENTRIES-PAST-END",
    Severity.LOW,
    "table entries past the end of the disk are not zeros",
    note="no state reads them: consistent with a disk that was made smaller, with a VM state that was there, or with embedding",
    when="entries of an L1, L2 or bitmap table, or bits of a bitmap, past the end of every disk and VM state they belong to "
    "are not zeros; L1 entries that name an L2 table are left out, and so are entries that read as zeros where a listed snapshot's VM state was saved",
    harmless="QEMU keeps such entries after a memory snapshot was deleted, or applied and deleted",
    needs="geometry",
)(_of_kind("entry-slack"))


rule(
    "QCOW2-LUKS-SLACK",
    Severity.LOW,
    "there is data in unused parts of the LUKS header",
    note="nothing reads it: consistent with embedding, with a removed passphrase, or with another writer",
    when="bytes between the LUKS header and key material, after it, or in the fields of an inactive key slot are not zeros; "
    "the key material of such slots has a finding of its own",
)(_of_kind("luks-slack"))


rule(
    "QCOW2-STATE-TAIL",
    Severity.LOW,
    "clusters hold data past the end of the states that map them",
    note="no state shows it: consistent with a disk that was made smaller, with an older content of the cluster, or with embedding",
    when="bytes of a cluster past the end of the disk, and past vm_state_size of a VM state, in every state that maps it are not "
    "zeros; of a compressed cluster, what it decodes to",
    harmless="in encrypted images the zeros that QEMU fills such clusters with are stored encrypted",
    needs="geometry",
    explained_by=("QCOW2-TAIL-BEYOND-DISK", "QCOW2-DATA-BEYOND-END", "QCOW2-VMSTATE-LEFTOVER"),
)(_of_kind("state-tail"))


rule(
    "QCOW2-UNACCOUNTED",
    Severity.LOW,
    "a version 1 image holds bytes that nothing refers to",
    note="consistent with data that was overwritten or discarded, or with embedding",
    when="bytes of a version 1 image after the header, between clusters or after the last one are not zeros",
    harmless="version 1 images are never rewritten in place after compression: old clusters stay",
    needs="geometry",
)(_of_kind("unaccounted"))
