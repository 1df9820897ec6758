"""Hidden bytes that follow each other on the host and in the guest are one piece, ready for a carver.

The oracle walks the tables of images that QEMU made an entry at a time, in plain Python, and joins byte for byte.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_forensics.format.image import Image
from qcow2_forensics.residue import content, residue
from qcow2_forensics.residue.host_ranges import HostRange, piece_of, pieces
from tests import qemu
from tests.matrix import commands
from tests.test_residue_pieces import unwritten
from tests.tiers import every, quick

MiB = 1 << 20
HOST = 0x00FF_FFFF_FFFF_FE00
OPTIONS = [
    {"cluster_size": "4k"},
    {"cluster_size": "64k"},
    {"cluster_size": "512"},
    {"cluster_size": "16k", "extended_l2": "on"},
    {"cluster_size": "64k", "extended_l2": "on"},
]


class Unit(NamedTuple):
    """A cluster under a zero flag, or subclusters that nobody allocates: where they are on the host and in the guest."""

    offset: int
    length: int
    guest: int


# --- the oracle ------------------------------------------------------------------------------------


def _entries(image: Image) -> Iterator[tuple[int, int, int]]:
    """Yield guest offset, entry and bitmap of every L2 entry of every state that is no compressed cluster."""
    header = image.header
    width = 16 if header.extended_l2 else 8
    tables = [(header.l1_table_offset, header.l1_size)]
    tables += [(entry.l1_table_offset, entry.l1_size) for entry in image.snapshots]
    for offset, count in tables:
        for slot, (word,) in enumerate(struct.iter_unpack(">Q", image.read(offset, count * 8))):
            table = image.read(word & HOST, header.cluster_size) if word & HOST else b""
            for at in range(0, len(table), width):
                entry, bitmap = struct.unpack(">QQ", table[at : at + 16].ljust(16, b"\0"))
                if not entry >> 62 & 1:
                    guest = (slot * (header.cluster_size // width) + at // width) * header.cluster_size
                    yield guest, entry, bitmap if width == 16 else 0


def _units(image: Image) -> list[Unit]:
    """Return what no state shows of the clusters in use, each cluster by itself, in the order of the file."""
    size, extended = image.cluster_size, image.header.extended_l2
    guests: dict[int, int] = {}
    shown: dict[int, int] = {}  # subclusters of each host cluster, a bit each
    flagged: set[int] = set()
    for guest, entry, bitmap in _entries(image):
        host = entry & HOST
        if host:
            assert guests.setdefault(host, guest) == guest, "QEMU maps no cluster to two places"
            whole = 0 if entry & 1 else 0xFFFF_FFFF
            shown[host] = shown.get(host, 0) | (bitmap & 0xFFFF_FFFF if extended else whole)
            if entry & 1 or extended:
                flagged.add(host)
    found = []
    part = size // 32
    for host in sorted(flagged):
        dead = [not shown[host] >> number & 1 for number in range(32)]
        at = 0
        while at < 32:
            stop = at
            while stop < 32 and dead[stop]:
                stop += 1
            if stop > at:
                found.append(Unit(host + at * part, (stop - at) * part, guests[host] + at * part))
            at = max(stop, at + 1)
    return found


def _joined(image: Image, units: Iterable[Unit]) -> list[tuple[int, int, int]]:
    """Return offset, length and guest offset of what the units make together, zeros at the ends left out."""
    runs: list[list[Unit]] = []
    for unit in units:
        if image.read(unit.offset, unit.length).strip(b"\0"):
            last = runs[-1][-1] if runs else Unit(-1, 0, -1)
            if (last.offset + last.length, last.guest + last.length) == (unit.offset, unit.guest):
                runs[-1].append(unit)
            else:
                runs.append([unit])
    found = []
    for run in runs:
        length = sum(unit.length for unit in run)
        data = image.read(run[0].offset, length).ljust(length, b"\0")
        start, stop = length - len(data.lstrip(b"\0")), len(data.rstrip(b"\0"))
        found.append((run[0].offset + start, stop - start, run[0].guest + start))
    return found


# --- images that QEMU made -------------------------------------------------------------------------


@qemu.requires_qemu
@pytest.mark.parametrize("seed", quick(range(20), range(len(OPTIONS))))
def test_hidden_bytes_are_joined_while_host_and_guest_go_on(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    options = OPTIONS[seed % len(OPTIONS)]
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MiB, **options)
    units = int(options["cluster_size"].removesuffix("k")) * (1 if options["cluster_size"] == "512" else 1024)
    # Long writes and zeroed ranges across them, then what guests do.
    qemu.io(path, "write -P 1 0 2M", f"write -z {chance.randrange(64)}k 1M", "write -z 1536k 100k")
    if chance.random() < 0.5:
        qemu.snapshot(path, "one")
    qemu.io(path, *commands(seed, 4 * MiB, units, count=30))
    if chance.random() < 0.5:
        qemu.io(path, "write -z 0 3M", "discard 128k 64k")
    with Image(path) as image, residue(image) as found:
        wanted = _joined(image, _units(image))
        kinds = ("zero-flagged", "subcluster")
        got = [(item.offset, item.length, item.guest_offset) for item in found.pieces() if item.kind in kinds]
    assert got == wanted
    assert wanted
    assert unwritten(path) == []


@qemu.requires_qemu
@pytest.mark.parametrize(
    "options",
    [item for item in OPTIONS if item["cluster_size"] != "512"],
    ids=lambda options: "-".join(options.values()),
)  # clusters of 512 bytes have an L2 table between every 64 of them
def test_a_zeroed_file_of_two_mebibytes_is_one_piece(options: dict[str, str], tmp_path: Path) -> None:
    photo = b"\xff\xd8\xff\xe0" + random.Random(1).randbytes(2 * MiB - 6) + b"\xff\xd9"
    (tmp_path / "photo").write_bytes(photo)
    path = qemu.create(tmp_path / "disk.qcow2", 8 * MiB, **options)
    qemu.io(path, f"write -s {tmp_path / 'photo'} 0 2M", "write -z 0 2M")
    with residue(path) as found:
        pieces = [piece for piece in found.pieces() if piece.kind in ("zero-flagged", "subcluster")]
        assert [(piece.guest_offset, piece.signature) for piece in pieces] == [(0, "JPEG")]
        assert found.read(pieces[0]) == photo


@qemu.requires_qemu
def test_bytes_of_a_data_file_that_the_image_does_not_show_are_one_piece(tmp_path: Path) -> None:
    data = tmp_path / "disk.data"
    path = qemu.create(tmp_path / "disk.qcow2", 8 * MiB, data_file=data)
    qemu.io(path, "write -P 5 1M 2M", "write -z 1M 1M")
    with data.open("r+b") as file:
        file.seek(4 * MiB)
        file.write(b"u" * 500_000)
        file.seek(8 * MiB)
        file.write(b"b" * 300_000)
    with residue(path) as found:
        pieces = [(piece.kind, piece.offset, piece.length, piece.looks) for piece in found.pieces() if piece.file]
    assert pieces == [
        ("zero-flagged", MiB, MiB, "data"),
        ("unmapped", 4 * MiB, 500_000, "text"),
        ("beyond-disk", 8 * MiB, 300_000, "text"),
    ]


@qemu.requires_qemu
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("seed", every(3, range(3)))
def test_bytes_between_streams_are_joined_across_clusters(seed: int, kind: str, tmp_path: Path) -> None:
    chance = random.Random(seed)
    raw, path = tmp_path / "raw", tmp_path / "disk.qcow2"
    words = [b"%d " % seed * 4096, *(chance.randbytes(length) * 64 for length in (64, 1000, 4096))]
    raw.write_bytes(b"".join(chance.choice(words)[:4096] for _ in range(256)))
    options = {"compression_type": kind, "cluster_size": "4k"}
    qemu.convert(raw, path, fmt="raw", target_format="qcow2", compressed=True, target_options=options)
    qemu.io(path, *(f"write -P 1 {chance.randrange(256) * 4}k 4k" for _ in range(60)))
    with residue(path) as found:
        pieces = [piece for piece in found.pieces() if piece.kind == "compressed-slack"]
    assert pieces
    rest = [(piece.offset, piece.offset + piece.length) for piece in pieces if piece.looks != "stream"]
    assert not {stop for _, stop in rest} & {start for start, _ in rest}
    assert unwritten(path) == []


# --- former states ---------------------------------------------------------------------------------

KEEP = {"pass-discard-snapshot": "off", "discard": "ignore"}  # what a deletion frees keeps its bytes
LONG_L1 = [{"cluster_size": "512"}, {"cluster_size": "4k", "size": "1200M"}]  # of more than a cluster


@qemu.requires_qemu
@pytest.mark.parametrize(
    "options", quick(OPTIONS + LONG_L1[1:], OPTIONS), ids=lambda options: "-".join(options.values())
)
def test_pieces_of_a_deleted_snapshot_have_the_guest_offsets_it_gave_them(
    options: dict[str, str], tmp_path: Path
) -> None:
    size = options.get("size", "4M")
    path = qemu.create(tmp_path / "disk.qcow2", size, **{key: options[key] for key in options if key != "size"})
    units = int(options["cluster_size"].removesuffix("k")) * (1 if options["cluster_size"] == "512" else 1024)
    qemu.io(path, *commands(5, 4 * MiB, units, count=20), "write -P 3 1M 300k", "write -P 4 3M 64k")
    qemu.snapshot(path, "one")
    before = qemu.raw_bytes(path, snapshot="one")
    with Image(path) as image:
        guests = {entry & HOST: guest for guest, entry, _ in _entries(image) if entry & HOST}
    qemu.io(path, *commands(6, 4 * MiB, units, count=20), "write -P 5 900k 400k", "write -P 6 3M 16k")
    qemu.snapshot(path, "one", action="-d", opts=KEEP)
    known = 0
    with residue(path) as found:
        items = [item for item in found.unclaimed() if item.kind in ("free", "trailing") and item.looks == "data"]
        for piece in items:
            # Cluster by cluster, so that the whole of a piece is held against the tables.
            for at in range(0, piece.length, units):
                wanted = guests.get(piece.offset + at)
                assert wanted == (None if piece.guest_offset is None else piece.guest_offset + at)
            if piece.guest_offset is not None:
                known += piece.length
                if "extended_l2" not in options:  # whose unallocated subclusters the state does not show
                    assert found.read(piece) == before[piece.guest_offset :][: piece.length]
    assert known >= 64 * 1024
    ends = {
        (item.offset + item.length, None if item.guest_offset is None else item.guest_offset + item.length)
        for item in items
    }
    assert not ends & {(item.offset, item.guest_offset) for item in items if not item.signature}


@qemu.requires_qemu
def test_a_former_l1_table_whose_snapshot_entry_is_gone_gives_guest_offsets(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", 4 * MiB)
    qemu.io(path, "write -P 7 1M 128k")
    qemu.snapshot(path, "one")
    qemu.io(path, "write -P 8 1M 128k")
    with Image(path) as image:
        entry = image.snapshots[0].offset
    qemu.snapshot(path, "one", action="-d", opts=KEEP)
    data = bytearray(path.read_bytes())
    data[entry : entry + 40] = bytes(40)  # the entry is gone, the tables are not
    path.write_bytes(data)
    with residue(path) as found:
        assert not found.entries()[0]
        known = [(item.guest_offset, item.length) for item in found.unclaimed() if item.guest_offset is not None]
    assert known == [(MiB, 128 * 1024)]


# --- what a piece says -----------------------------------------------------------------------------

_PARTS = st.lists(
    st.sampled_from(
        [bytes(64), b"text" * 16, "£".encode() * 32, bytes(20) + b"x" * 44, b"y" * 30 + bytes(34), b"\xff" * 64]
    ),
    min_size=1,
    max_size=12,
)


@given(_PARTS)
def test_a_joined_piece_is_described_as_its_bytes_are_as_a_whole(parts: list[bytes]) -> None:
    data = b"".join(parts)
    found = list(pieces(lambda at, length: data[at : at + length], [HostRange(0, len(data), "free", 7)], 64))
    at = 0
    for piece in found:
        whole = data[piece.offset : piece.offset + piece.length]
        assert not data[at : piece.offset].strip(b"\0")
        facts = content.describe(whole)
        assert (piece.nonzero, piece.signature, piece.first) == (facts.nonzero, facts.signature, content.preview(whole))
        assert piece.entropy == pytest.approx(facts.entropy)
        assert (piece.looks == "text") == content.is_text(whole)
        assert piece.guest_offset == piece.offset + 7
        at = piece.offset + piece.length
    assert not data[at:].strip(b"\0")
    alone = next(piece_of(data, 0, "free"), None)
    assert (alone is None) == (not found)


def test_a_piece_ends_where_a_file_starts_and_not_at_two_bytes_of_a_boot_sector() -> None:
    boot = b"r" * 510 + b"\x55\xaa"
    data = b"".join((b"a" * 512, boot, b"\xff\xd8\xff".ljust(512, b"p"), boot))
    found = list(pieces(lambda at, length: data[at : at + length], [HostRange(0, len(data), "free")], 512))
    assert [(piece.offset, piece.length, piece.signature) for piece in found] == [(0, 1024, ""), (1024, 1024, "JPEG")]
