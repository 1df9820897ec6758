"""Pieces of residue as evidence."""

from __future__ import annotations

from ..findings import Evidence
from ..residue import Piece


def evidence_of(piece: Piece, label: str = "") -> Evidence:
    """Return a piece as evidence: what it is, how much of it is there, how it starts."""
    told = [f"{piece.nonzero} non-zero bytes", f"entropy {piece.entropy:.2f}"]
    if piece.signature and piece.looks != "stream":
        told.append(piece.signature)
    elif piece.looks != "data":
        told.append(piece.looks)
    if piece.entries:
        told.append(f"{piece.entries} entries")
    told.append(f"starts {piece.first[:23]}")  # eight bytes
    return Evidence(
        label or piece.looks,
        ", ".join(told),
        piece.offset,
        piece.length,
        f"{piece.kind} clusters" if piece.kind in ("free", "leaked", "trailing") else piece.kind,
        piece.guest_offset,
        piece.snapshot,
        piece.file,
    )
