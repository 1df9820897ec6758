"""Rules about bytes after the header and after tables."""

from __future__ import annotations

from collections.abc import Iterator

from ..findings import Evidence, Severity
from ..residue import Piece, slack
from .facts import Facts
from .residue_evidence import evidence_of, of_pieces
from .rules import QEMU_MADE, Chapter, Depth

rule = Chapter(__name__, "Slack")


@rule(
    "QCOW2-HEADER-SLACK",
    Severity.MEDIUM,
    "there is data after the header",
    note="QEMU fills this area with zeros whenever it rewrites the header: consistent with data embedded by hand or with "
    "another writer",
    when="bytes after the end of the header extensions, or after the backing file name, are not zeros",
    harmless="eight bytes that old versions of QEMU left in version 2 headers are not reported",
)
def header_slack(facts: Facts) -> Iterator[Evidence]:
    for piece in slack.header_slack(facts.image):
        yield _previewed(facts, piece)


def _previewed(facts: Facts, piece: Piece) -> Evidence:
    if piece.looks == "text":
        shown = facts.read(piece.offset, min(piece.length, 200)).decode("utf-8", "replace")
        return evidence_of(piece)._replace(field="text", value=shown)
    return evidence_of(piece)


@rule(
    "QCOW2-HEADER-PADDING",
    Severity.LOW,
    "there is data in the padding of the header",
    note="consistent with a newer or another writer, or with embedding",
    when="header bytes from 105 up to its length, or the padding of an extension, are not zeros",
    harmless="fields of future QEMU versions",
)
def header_padding(facts: Facts) -> Iterator[Evidence]:
    for piece in slack.header_padding(facts.image):
        yield _previewed(facts, piece)
    header = facts.header
    if header.version == 3 and header.header_length == 104:
        # A compression type written after a short header reads as an empty extension of odd type.
        kind = facts.read(104, 8)
        if kind[:1] != b"\0" and not any(kind[1:]):
            yield Evidence("ignored_compression_type", kind[0], 104, 1, "header")


rule(
    "QCOW2-L1-SLACK",
    Severity.LOW,
    "there is data after an L1 table",
    note="consistent with the reuse of a cluster that held older content",
    when="bytes from the end of an L1 table to the end of its cluster are not zeros",
    harmless="only on reused space",
    depth=Depth.DEEP,
    validated=QEMU_MADE,
)(of_pieces(lambda facts: slack.l1_slack(facts.image)))


rule(
    "QCOW2-TABLE-SLACK",
    Severity.LOW,
    "there is data after a snapshot or bitmap table",
    note="consistent with the reuse of a cluster that held older content, or with a table that was longer",
    when="bytes from the end of such a table to the end of its cluster are not zeros",
    harmless="only on reused space",
    depth=Depth.DEEP,
    validated=QEMU_MADE,
)(of_pieces(lambda facts: slack.table_slack(facts.image)))
