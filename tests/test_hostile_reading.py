"""Every hostile image gives its stated outcome: strict by default, QEMU's bytes with ``eof="zeros"``.

The images are made by qemu-img and edited (:mod:`tests.hostile`, :mod:`tests.traps`); what QEMU
does with each is asserted too, so that the tables cannot drift from the oracle.
"""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import qcow2_forensics as q
from qcow2_forensics.errors import FormatError, Qcow2Error
from tests import hostile, qemu, work
from tests.hostile import IMAGES, Answer, Refusal
from tests.image_builder import Builder, Poke
from tests.tiers import quick
from tests.traps import REPRESENTATIVE, TRAPS

pytestmark = qemu.requires_qemu

MiB = 1 << 20
PEAK_BYTES = 64 * MiB

READ_BY_QEMU = [image.id for image in IMAGES.values() if image.qemu and not image.machine_dependent]


def answer(disk: q.Disk, offset: int, length: int = 2) -> bytes | Refusal:
    try:
        return disk.read(offset, length)
    except Qcow2Error as error:
        return type(error)


def matches(got: bytes | Refusal, wanted: bytes | Refusal) -> bool:
    if isinstance(wanted, type):
        return isinstance(got, type) and issubclass(got, wanted)
    return got == wanted


def lines_for(path: Path) -> int:
    """Return how many lines of Python opening an image and a few reads may run: so many for each byte it stores."""
    return 300_000 + 2 * 512 * path.stat().st_blocks


def check(path: Path, wanted: Answer, **options: Any) -> None:
    """Open ``path`` and compare what is read, or the refusal, with ``wanted``."""
    if isinstance(wanted, type):
        with pytest.raises(wanted), q.open_disk(path, **options):
            pass
        return
    with q.open_disk(path, **options) as disk:
        got = {offset: answer(disk, offset) for offset in wanted}
        assert all(matches(got[offset], wanted[offset]) for offset in wanted), (got, dict(wanted))


@pytest.mark.parametrize("ident", quick(IMAGES, hostile.REPRESENTATIVE))
def test_qemu_does_what_the_table_says(ident: str, tmp_path: Path) -> None:
    image = IMAGES[ident]
    path = hostile.build(ident, tmp_path)
    if image.check is not None:
        result = qemu.check_json(path, cwd=tmp_path)
        ignored = ("filename", "format", "total-clusters")
        counters = {key: value for key, value in (result.counters or {}).items() if value and key not in ignored}
        assert (result.rc, counters) == image.check
    if ident == "H27":
        return  # QEMU takes seconds for each further look at 65536 snapshots
    assert qemu.img("info", "-f", "qcow2", "-U", path, check=False, timeout=10, cwd=tmp_path).ok == image.opens
    if not image.machine_dependent:
        offsets = list(image.qemu) or [0]
        got = qemu.reads(path, [(offset, 512) for offset in offsets], cwd=tmp_path)
        assert [data and data[:2] for data in got] == [image.qemu.get(offset) for offset in offsets]


@pytest.mark.parametrize("ident", IMAGES)
def test_strict_reader_gives_the_stated_outcome(ident: str, tmp_path: Path) -> None:
    image = IMAGES[ident]
    path = hostile.build(ident, tmp_path)
    with work.at_most(lines_for(path)):
        check(path, image.refuses or image.expected)
    for snapshot, wanted in image.snapshots.items():
        with work.at_most(lines_for(path)):
            check(path, wanted, snapshot=snapshot)


@pytest.mark.parametrize("ident", IMAGES)
def test_metadata_of_every_image_can_be_listed(ident: str, tmp_path: Path) -> None:
    path = hostile.build(ident, tmp_path)
    try:
        image = q.open_image(path)
    except q.NotQcow2:
        pytest.fail("the magic is there: the image must open")
    with image:
        listed = [image.problems, image.extensions, image.snapshots, image.bitmaps, image.backing_name]
        assert all(item is not None for item in listed[:4])
        refused = IMAGES[ident].refuses in (FormatError, q.LimitExceeded, q.Unsupported)
        if refused and ident != "H13":  # where the file ends is no matter of the header
            assert image.problems


def _qemu_reads(path: Path, ranges: list[tuple[int, int]]) -> list[bytes | None]:
    """Return what QEMU reads, None for each range that it cannot; the quick way first."""
    if ranges[-1][0] < MiB:
        with contextlib.suppress(qemu.QemuError):
            whole = qemu.raw_bytes(path, cwd=path.parent)
            return [whole[offset : offset + length] for offset, length in ranges]
    return qemu.reads(path, ranges, cwd=path.parent)


@pytest.mark.parametrize("ident", quick(READ_BY_QEMU, [one for one in hostile.REPRESENTATIVE if one in READ_BY_QEMU]))
def test_eof_zeros_gives_the_bytes_of_qemu(ident: str, tmp_path: Path) -> None:
    image = IMAGES[ident]
    path = hostile.build(ident, tmp_path)
    with q.open_disk(path, eof="zeros") as disk:
        if disk.size > MiB:  # H58
            ranges = [(offset, 65536) for offset in image.qemu]
        else:
            ranges = [(offset, min(65536, disk.size - offset)) for offset in range(0, disk.size, 65536)]
        wanted = _qemu_reads(path, ranges)
        for (offset, length), data in zip(ranges, wanted, strict=True):
            got = answer(disk, offset, length)
            assert matches(got, FormatError if data is None else data), hex(offset)


@pytest.mark.parametrize("ident", ["H10", "H11", "H12", "H13", "H60"])
def test_eof_zeros_counts_what_it_filled(ident: str, tmp_path: Path) -> None:
    with q.open_disk(hostile.build(ident, tmp_path), eof="zeros") as disk:
        disk.read(0, disk.size)
        assert disk.filled["clusters"] or disk.mapping.filled_tables


def test_one_bad_cluster_never_spoils_its_neighbours(tmp_path: Path) -> None:
    bad = {"H11": 0, "H12": 0, "H55": 0, "H56": 0, "H57": 0, "H59": 0}
    for ident, broken in bad.items():
        with q.open_disk(hostile.build(ident, tmp_path)) as disk:
            assert disk.read(0x10000, 0x10000) == b"\x22" * 0x10000
            assert disk.read(0x20000, 0x20000) == b"\x33" * 0x10000 + bytes(0x10000)
            for offset in (broken, broken + 0xFFFF):
                with pytest.raises(FormatError):
                    disk.read(offset, 1)


@pytest.mark.parametrize(
    ("ident", "where"),
    [
        ("H10", 0x1000000),  # the L2 table
        ("H11", 0x1000000),  # the data cluster
        ("H13", 0x10000000000),  # the L1 table
        ("H15", 36),  # l1_size
        ("H17", 40),  # l1_table_offset
        ("H39", 20),  # cluster_bits
        ("H43", 100),  # header_length
        ("H59", 0x40000),  # the L2 entry
    ],
)
def test_an_error_names_the_file_offset_of_what_is_wrong(ident: str, where: int, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught, q.open_disk(hostile.build(ident, tmp_path)) as disk:
        disk.read(0, 512)
    assert caught.value.offset == where


def test_a_cut_l1_table_fails_only_what_lies_behind_the_cut(tmp_path: Path) -> None:
    span = 64 * 512
    builder = Builder(cluster_bits=9, size=40_000 * span)
    for index in (0, 1, 30, 20_000, 39_999):
        builder.data(index * span, bytes([index % 255 + 1]) * 512)
    path = builder.write(tmp_path / "cut.qcow2")
    table = Poke(path).read(builder.l1, 8 * 40_000)
    end = path.stat().st_size
    Poke(path).u64(40, end).append(table[: 8 * 25_000])
    with q.open_disk(path) as disk:
        for index in (0, 1, 30, 20_000):
            assert disk.read(index * span, 512) == bytes([index % 255 + 1]) * 512
        assert disk.read(20_001 * span, span) == bytes(span)
        for index in (25_000, 39_999):
            with pytest.raises(FormatError, match="past the end of the file"):
                disk.read(index * span, 1)
        with pytest.raises(FormatError):
            list(disk.extents())
    with q.open_disk(path, eof="zeros") as disk:
        assert [qemu.read(path, index * span, 512) for index in (20_000, 25_000, 39_999)] == [
            disk.read(index * span, 512) for index in (20_000, 25_000, 39_999)
        ]
        assert sum(extent.length for extent in disk.extents()) == disk.size


@pytest.mark.parametrize("ident", quick(TRAPS, [*REPRESENTATIVE, "BOMB"]))
def test_traps_cost_little(ident: str, tmp_path: Path) -> None:
    trap = TRAPS[ident]
    if trap.passphrase is not None:
        pytest.importorskip("cryptography", reason="cryptography is absent")
    path = trap.build(tmp_path)
    with work.at_most(lines_for(path)):
        check(path, trap.strict, passphrase=trap.passphrase)
    for snapshot, wanted in trap.snapshots.items():
        with work.at_most(lines_for(path)):
            check(path, wanted, snapshot=snapshot)


@pytest.mark.parametrize("ident", [ident for ident, trap in TRAPS.items() if trap.qemu])
def test_traps_that_qemu_reads_give_its_bytes(ident: str, tmp_path: Path) -> None:
    trap = TRAPS[ident]
    assert isinstance(trap.strict, Mapping)
    spots = [(offset, 512) for offset in trap.strict]
    wanted = qemu.reads(trap.build(tmp_path), spots, secret=trap.passphrase)
    assert [data and data[:2] for data in wanted] == list(trap.strict.values())


@pytest.mark.parametrize("ident", quick(["H14", "H58", *TRAPS], ["H58", "L1-EQUAL", "BITMAP-TABLE", "BOMB"]))
def test_memory_stays_within_the_budget(ident: str, tmp_path: Path) -> None:
    # SNAPSHOTS-65536 holds 65536 parsed entries: its metadata alone is 5 MiB of file.
    if ident in TRAPS:
        path, passphrase = TRAPS[ident].build(tmp_path), TRAPS[ident].passphrase
    else:
        path, passphrase = hostile.build(ident, tmp_path), None
    tracemalloc.start()
    try:
        with q.open_image(path) as image:
            assert image.problems is not None
        try:
            with q.open_disk(path, passphrase=passphrase) as disk:
                for offset in (0, disk.size // 2, max(0, disk.size - 65536)):
                    disk.read(offset, 65536)
        except Qcow2Error:
            pass
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()
