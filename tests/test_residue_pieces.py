"""What the audit calls residue, ``residue`` writes: every residual finding has its pieces."""

from __future__ import annotations

import json
import random
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fuzz.targets import run_command
from hypothesis import given
from hypothesis import strategies as st

import qcow2_forensics as q
from qcow2_forensics.census import take_census
from qcow2_forensics.format.image import Image
from qcow2_forensics.format.source import BytesSource
from qcow2_forensics.reader.mapping import Kind, Mapping
from qcow2_forensics.residue import Piece, residue
from qcow2_forensics.residue.data_file import data_file_residue
from tests import damage, hostile, plants, qemu
from tests.image_builder import COMPRESSED, COPIED, EXT_DATA_FILE, Builder, Poke, base_s
from tests.test_audit_residual import CASES
from tests.tiers import every, quick

RESIDUAL = {
    "QCOW2-RESIDUAL-CLUSTERS",
    "QCOW2-LEAKED-DATA",
    "QCOW2-TRAILING-DATA",
    "QCOW2-RESIDUAL-L1",
    "QCOW2-RESIDUAL-L2",
    "QCOW2-RESIDUAL-SNAPSHOT-ENTRY",
    "QCOW2-RESIDUAL-BITMAP-DIR",
    "QCOW2-RECOVERABLE-SNAPSHOT",
    "QCOW2-ZERO-ALLOC-DATA",
    "QCOW2-SUBCLUSTER-RESIDUE",
    "QCOW2-COMPRESSED-SLACK",
    "QCOW2-TAIL-BEYOND-DISK",
    "QCOW2-DATAFILE-RESIDUE",
    "QCOW2-RAW-DATAFILE-DIVERGES",
    "QCOW2-VMSTATE-RESIDUE",
    "QCOW2-HEADER-SLACK",
    "QCOW2-HEADER-PADDING",
    "QCOW2-L1-SLACK",
    "QCOW2-TABLE-SLACK",
    "QCOW2-NAME-SLACK",
    "QCOW2-UNREAD-FIELD",
    "QCOW2-ENTRIES-PAST-END",
    "QCOW2-LUKS-SLACK",
    "QCOW2-STATE-TAIL",
    "QCOW2-UNACCOUNTED",
}


def unwritten(path: Path) -> list[str]:
    """Return the evidence of residual findings in bytes that no piece covers; fields of the header are no residue."""
    evidence = [
        (finding.code, item)
        for finding in q.audit(path, depth="deep")
        if finding.code in RESIDUAL
        for item in finding.evidence
        if item.offset is not None and item.structure != "header"
    ]
    if not evidence:
        return []
    with residue(path) as found:
        pieces = list(found.pieces())
    return [f"{code}: {item}" for code, item in evidence if not _covered(pieces, item.file, item.offset or 0)]


def _covered(pieces: list[Piece], file: str, offset: int) -> bool:
    return any(piece.file == file and piece.offset <= offset < piece.offset + piece.length for piece in pieces)


def _unwritten_remainders(made: plants.Made) -> list[str]:
    """Return the remainders of the account whose first or last byte that is not zero is in no piece."""
    resolver = q.Resolver(folders=[made.path.parent])
    report = q.audit(made.path, "deep", passphrase=made.secret, resolver=resolver)
    with residue(made.path, resolver=resolver) as found:
        pieces = list(found.pieces())
    missing = []
    for file in report.details["account"]["files"]:
        data = (made.path if not file["file"] else made.data or made.path).read_bytes()
        for row in file["rows"]:
            start, stop = row["offset"], row["offset"] + row["length"]
            if row.get("remainder") and row.get("nonzero"):
                ends = [start + len(data[start:stop]) - len(data[start:stop].lstrip(b"\0"))]
                ends.append(start + len(data[start:stop].rstrip(b"\0")) - 1)
                missing += [f"{row} at {at:#x}" for at in ends if not _covered(pieces, file["file"], at)]
    return missing


@qemu.requires_qemu
@pytest.mark.parametrize("kind", quick(plants.KINDS, ["plain", "extended", "snapshots", "qcow1", "data_file"]))
def test_every_remainder_that_is_not_zeros_is_in_a_piece(kind: str, tmp_path: Path) -> None:
    chance = random.Random(f"{kind}-pieces")
    made = plants.KINDS[kind](chance, tmp_path)
    report = q.audit(made.path, "deep", passphrase=made.secret, resolver=q.Resolver(folders=[made.path.parent]))
    chosen = plants.candidates(chance, report, 30, remainders=True)
    fields = "field that nothing reads"  # the length of no backing file name is still checked in version 1
    plants.plant(made, [one for one in chosen if made.fmt == "qcow2" or one.place != fields])
    assert _unwritten_remainders(made) == []


def test_extra_data_and_extensions_of_unknown_meaning_are_pieces(tmp_path: Path) -> None:
    path = base_s(tmp_path / "disk.qcow2")
    Poke(path).u32(60, 1)
    Poke(path).u32(0xB0000 + 36, 48)  # 24 bytes more than the format knows, where ID, name and the next entry were
    Poke(path).names([(0x12345678, b"of another program")])
    assert _unwritten_remainders(plants.Made(path)) == []
    with residue(path) as found:
        assert [piece.length for piece in found.pieces() if piece.kind == "unread-field"] == [18, 24]


@qemu.requires_qemu
@pytest.mark.parametrize("number", every(3, range(len(CASES))), ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)])
def test_every_residual_finding_has_its_pieces(number: int, tmp_path: Path) -> None:
    code, make, severity = CASES[number]
    if severity is None or f"QCOW2-{code}" not in RESIDUAL:
        pytest.skip("no residual finding is expected")
    path = tmp_path / "disk.qcow2"
    make(path)
    assert f"QCOW2-{code}" in {finding.code for finding in q.audit(path, depth="deep")}
    assert unwritten(path) == []


@qemu.requires_qemu
@pytest.mark.parametrize("seeds", every(2, [range(8), range(8, 40)]))
def test_residual_findings_of_damaged_images_have_their_pieces(seeds: range, tmp_path: Path) -> None:
    bases = damage.Bases(tmp_path)
    for seed in seeds:
        assert unwritten(damage.damaged(seed, bases, tmp_path).path) == [], seed


@qemu.requires_qemu
@pytest.mark.parametrize("ident", quick(hostile.IMAGES, hostile.REPRESENTATIVE))
def test_residual_findings_of_hostile_images_have_their_pieces(ident: str, tmp_path: Path) -> None:
    assert unwritten(hostile.build(ident, tmp_path)) == []


@qemu.requires_qemu
def test_an_image_whose_disk_cannot_be_read_has_its_residue_and_says_so(tmp_path: Path) -> None:
    path = hostile.build("H17", tmp_path)  # an L1 table that is not aligned
    with pytest.raises(q.FormatError, match="not aligned"):
        q.open_disk(path)
    code, out, errors = run_command(["residue", str(path), str(tmp_path / "out")])
    assert (code, index_of(tmp_path)["unseen"]) == (0, None)
    assert "pieces" in out
    assert "the disk cannot be read: the L1 table is not aligned to a cluster" in errors
    index = index_of(tmp_path)
    assert index["image"]["problem"].startswith("the L1 table is not aligned")
    assert {"leaked"} <= {piece["kind"] for piece in index["pieces"]}


def index_of(folder: Path) -> Any:
    return json.loads((folder / "out" / "index.json").read_text())


def test_clusters_of_an_unknown_compression_type_hide_no_other_residue(tmp_path: Path) -> None:
    builder = Builder(compression_type=200).packed(0, b"\1" * 512)
    builder.put(b"leaked" * 1000)
    path = builder.write(tmp_path / "disk.qcow2")
    assert unwritten(path) == []
    code, _, errors = run_command(["residue", str(path), str(tmp_path / "out")])
    assert code == 2
    assert "not all clusters in use were looked into: not supported: compression type 200" in errors
    index = index_of(tmp_path)
    assert index["unseen"] == "not supported: compression type 200"
    assert [piece["kind"] for piece in index["pieces"]] == ["leaked"]


@pytest.mark.parametrize(("at", "value"), [(4, 9), (20, 30)], ids=["version", "cluster_bits"])
def test_without_a_known_geometry_there_is_no_residue(at: int, value: int, tmp_path: Path) -> None:
    path = Builder().write(tmp_path / "disk.qcow2")
    Poke(path).u32(at, value)
    with pytest.raises(q.Qcow2Error, match="version 9 is unknown|cluster_bits 30 is outside"):
        residue(path)


# --- data files ----------------------------------------------------------------------------------

_ENTRY = st.sampled_from(["nothing", "data", "data", "zeros", "zeros over data", "zeros at 0"])
_BAD = st.sampled_from(["elsewhere", "compressed"])


def _word(what: str, guest: int) -> int:
    words = {
        "nothing": 0,
        "data": guest | COPIED,
        "zeros": 1,
        "zeros over data": guest | COPIED | 1,
        "zeros at 0": COPIED | 1,
        "elsewhere": (guest + 512) | COPIED,
        "compressed": COMPRESSED | 0x200,
    }
    return words[what]


def _image(slots: list[list[str] | None], size: int, folder: Path) -> Image:
    builder = Builder(
        cluster_bits=9, size=size, l1_size=len(slots), incompatible=4, extensions=[(EXT_DATA_FILE, b"d.raw")]
    )
    offsets = []
    for slot, entries in enumerate(slots):
        if entries is None:
            offsets.append(0)
            continue
        words = [_word(what, (slot * 64 + column) * 512) for column, what in enumerate(entries)]
        offsets.append(builder.put(struct.pack(f">{len(words)}Q", *words).ljust(512, b"\0")))
    builder.raw(builder.l1, struct.pack(f">{len(offsets)}Q", *offsets))
    return Image(BytesSource(builder.write(folder / "disk").read_bytes()))


def _by_runs(image: Image, data: bytes) -> set[tuple[str, int]]:
    """Say the same cluster by cluster, from the runs a reader sees."""
    mapping = Mapping(image, image.header.l1_table_offset, image.header.l1_size)
    found = set()
    for offset in range(0, min(image.disk_size, len(data)), 512):
        try:
            kinds = {run.kind for run in mapping.runs(offset, 512)}
        except q.FormatError:
            kinds = {Kind.HOLE}  # such an entry shows nothing
        if any(data[offset : offset + 512]) and not kinds & {Kind.DATA, Kind.COMPRESSED}:
            found.add(("zero-flagged" if kinds == {Kind.ZERO} else "unmapped", offset))
    for offset in range(image.disk_size, len(data), 512):
        if any(data[offset : offset + 512]):
            found.add(("beyond-disk", offset))
    return found


@given(
    st.lists(st.none() | st.lists(_ENTRY | _BAD, min_size=1, max_size=64), min_size=1, max_size=4),
    st.integers(0, 5 * 64),
    st.integers(0, 2**32),
)
def test_residue_of_a_data_file_is_what_its_runs_do_not_show(
    slots: list[list[str] | None], clusters: int, seed: int
) -> None:
    chance = random.Random(seed)
    data = b"".join(bytes([chance.choice((0, 0, 7))]) * 512 for _ in range(clusters))
    with tempfile.TemporaryDirectory() as folder:
        image = _image(slots, len(slots) * 64 * 512, Path(folder))
    pieces = list(data_file_residue(image, BytesSource(data), strict=False))
    found = {
        (piece.kind, at)
        for piece in pieces
        for at in range(piece.offset // 512 * 512, piece.offset + piece.length, 512)
    }
    ends = [(piece.kind, piece.offset + piece.length) for piece in pieces]
    assert not set(ends) & {(piece.kind, piece.offset) for piece in pieces}, "two that follow each other"
    assert found == _by_runs(image, data)


def test_an_entry_that_cannot_be_read_is_an_error_after_the_pieces_before_it(tmp_path: Path) -> None:
    image = _image([["zeros", "elsewhere", "zeros"]], 64 * 512, tmp_path)
    pieces = data_file_residue(image, BytesSource(b"x" * 64 * 512))
    assert next(pieces).offset == 0
    with pytest.raises(q.FormatError, match="not to its guest offset"):
        next(pieces)


# --- one walk ------------------------------------------------------------------------------------


@qemu.requires_qemu
def test_a_standard_audit_reads_every_l2_table_once_and_a_deep_one_at_most_twice(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk.qcow2", "64M", cluster_size=4096)
    qemu.io(path, "write -P 1 0 40M", "write -z 8M 4M", "write -z 41M 1M")
    qemu.snapshot(path, "one")
    qemu.io(path, "write -P 2 4M 8M")
    with Image(path) as image:
        tables = {int(offset) for offset in take_census(image).named.offsets.tolist()}
    for depth, most in (("standard", 1), ("deep", 2)):
        source = _Noted(path.read_bytes())
        q.audit(source, depth=depth)
        times = [sum(at <= table < at + length for at, length in source.reads) for table in tables]
        assert sum(times) <= most * len(tables) + 2, depth  # those beside an L1 table are read over with it


class _Noted:
    """A source that remembers what was asked for, heads of clusters read for other reasons left out."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, length: int, /) -> bytes:
        self.reads.append((offset, length))
        return self._data[offset : offset + length]
