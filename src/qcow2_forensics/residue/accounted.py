"""Remainders of the account that no other search for residue covers, as pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..account.account import Account
from ..account.labels import Label, Place
from ..account.shown import ShownBytes
from ..account.tiling import Tile
from ..format.codecs import codec_of
from ..format.entries import compressed_descriptor
from ..limits import MiB
from .host_ranges import piece_of
from .model import Piece

_READ = MiB  # bytes of a remainder described as one piece
_KINDS = {
    Place.NAME_SLACK: "name-slack",
    Place.TABLE_PADDING: "name-slack",
    Place.UNUSED_FIELD: "unread-field",
    Place.UNUSED_EXTENSION: "unread-field",
    Place.UNKNOWN_EXTRA: "unread-field",
    Place.ENTRIES_PAST_END: "entry-slack",
    Place.REFCOUNTS_PAST_END: "entry-slack",
    Place.BITS_PAST_END: "entry-slack",
    Place.LUKS_GAP: "luks-slack",
    Place.LUKS_SLOT: "luks-slack",
    Place.PAST_STATE_END: "state-tail",
}


def kind_of(label: Label, version: int) -> str:
    """Return which kind of piece a remainder is; "" where another search finds it."""
    if not isinstance(label.what, Place):
        return ""
    others = "unaccounted" if version == 1 and label.what is not Place.NOT_WALKED else ""
    return _KINDS.get(label.what, others)


def pieces_of(account: Account, tiled: Tile, wanted_kind: Callable[[Label, int], str] = kind_of) -> Iterator[Piece]:
    """Yield the pieces among some rows of an account that was read; ``wanted_kind`` names them, "" for none."""
    image = account.image
    kinds = [wanted_kind(label, image.header.version) for label in account.labels]
    wanted = (tiled.nonzero > 0).nonzero()[0]
    columns = (column[wanted].tolist() for column in (tiled.start, tiled.stop, tiled.label))
    for start, stop, number in zip(*columns, strict=True):
        kind, owner = kinds[number], account.labels[number].owner
        for at in range(start, stop, _READ) if kind else ():
            for piece in piece_of(image.read(at, min(_READ, stop - at)), at, kind):
                yield replace(piece, signature=piece.signature or owner)


def cut_streams(account: Account) -> Iterator[Piece]:
    """Yield compressed clusters that hold bytes past the end of every state that maps them; ``looks`` is ``stream``."""
    image, census = account.image, account.census
    if census is None or not account.is_exact:
        return
    codec = codec_of(image.header.compression_type)
    for entry, shown in census.seen(ShownBytes).cut_streams():
        offset, length = compressed_descriptor(entry, image.header.cluster_bits)
        stored = image.read(offset, length)
        try:
            tail = codec.decode(stored, image.cluster_size)[shown:]
        except ValueError:
            continue  # reported as a stream that cannot be decoded
        for piece in piece_of(tail, shown, "state-tail"):
            yield replace(piece, offset=offset, length=len(stored), looks="stream", signature="decoded")


def accounted(account: Account) -> Iterator[Piece]:
    """Yield all of them for one image."""
    for tiled in account.tiles():
        yield from pieces_of(account, tiled)
    yield from cut_streams(account)
