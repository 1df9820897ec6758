"""Pieces of residue as evidence; and rules that only list them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..findings import Evidence
from ..residue import Piece
from ..text import plural
from .facts import Facts, shortened
from .rules import RuleFunction


def evidence_of(piece: Piece) -> Evidence:
    """Return a piece as evidence: what it is, how much of it is there, how it starts."""
    words = [f"{piece.nonzero} non-zero bytes", f"entropy {piece.entropy:.2f}"]
    if piece.signature and piece.looks != "stream":
        words.append(piece.signature)
    if piece.entries:
        words.append(plural(piece.entries, "entry", "entries"))
    words.append(f"starts {piece.first[:23]}")  # eight bytes
    return Evidence(
        piece.looks,
        ", ".join(words),
        piece.offset,
        piece.length,
        f"{piece.kind} clusters" if piece.kind in ("free", "leaked", "trailing") else piece.kind,
        piece.guest_offset,
        shortened(piece.snapshot),
        piece.file,
    )


def of_pieces(look: Callable[[Facts], Iterable[Piece]]) -> RuleFunction:
    """Return a rule that lists the pieces some function finds."""
    return lambda facts: map(evidence_of, look(facts))
