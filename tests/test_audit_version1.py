"""Version 1 images that are damaged: what the reader refuses, the audit reports. Made by qemu-img and qemu-io."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.findings import Severity
from tests import qemu
from tests.image_builder import Poke

KiB = 1 << 10
ENTRY = 8


def _made(path: Path, chance: random.Random) -> Path:
    """Make an image with plain and compressed clusters, and data up to the end of the disk."""
    size = chance.randrange(64 * KiB, 3 << 20, 512)
    qemu.create(path, size, fmt="qcow")
    places = [chance.randrange(size // 4096) * 4096 for _ in range(8)]
    commands = [f"write -P {number + 1} {at} 4k" for number, at in enumerate(places[:5])]
    commands += [f"write -c -P {number + 9} {at} 4k" for number, at in enumerate(places[5:])]
    qemu.io(path, *commands, fmt="qcow", check=False)  # a cluster that is there cannot be compressed any more
    return path


def _tables(path: Path) -> tuple[list[int], list[int]]:
    """Return the file offsets of the L1 entries and of the L2 entries that are set."""
    with q.open_image(path) as image:
        start, count, entries = image.header.l1_table_offset, image.header.l1_size, image.header.l2_entries
    data = path.read_bytes()

    def entry(at: int) -> int:
        return int.from_bytes(data[at : at + ENTRY])

    l1 = [at for at in range(start, start + count * ENTRY, ENTRY) if entry(at)]
    return l1, [at + ENTRY * n for at in map(entry, l1) for n in range(entries) if entry(at + ENTRY * n)]


def _damage(path: Path, chance: random.Random) -> None:
    l1, l2 = _tables(path)
    size = path.stat().st_size
    match chance.randrange(5):
        case 0:
            with path.open("r+b") as file:
                file.truncate(chance.randrange(l1[-1], size))
        case 1:
            Poke(path).u64(chance.choice(l1), chance.choice((size, size + 4096, 1 << 40, 1 << 62)))
        case 2:
            Poke(path).u64(chance.choice(l2), chance.choice((size + 511 & ~511, 1 << 40, 1 << 62)))
        case 3:
            Poke(path).add(chance.choice(l2), chance.choice((1, 16, 511)))
        case 4:
            at = chance.randrange(size)
            Poke(path).write(at, chance.randbytes(min(64, size - at)))


def _refusal(path: Path) -> str:
    """Return why the disk cannot be read in full, "" where it can."""
    try:
        with q.open_disk(path) as disk:
            for at in range(0, disk.size, 1 << 20):
                disk.read(at, min(1 << 20, disk.size - at))
    except (q.Qcow2Error, OSError) as error:
        return str(error)
    return ""


@qemu.requires_qemu
@pytest.mark.parametrize("seed", range(16))
def test_what_the_reader_refuses_of_a_version_1_image_the_audit_reports(seed: int, tmp_path: Path) -> None:
    chance = random.Random(f"version 1-{seed}")
    path = _made(tmp_path / "disk.qcow", chance)
    _damage(path, chance)
    refusal = _refusal(path)
    worst = max(finding.severity for finding in q.audit(path, "deep"))
    assert not refusal or worst >= Severity.MEDIUM, refusal


@qemu.requires_qemu
@pytest.mark.parametrize("depth", ["standard", "deep"])
def test_a_version_1_image_that_is_cut_off_has_a_finding_that_names_its_entries(depth: str, tmp_path: Path) -> None:
    path = _made(tmp_path / "disk.qcow", random.Random(1))
    assert not [finding for finding in q.audit(path, depth) if finding.severity >= Severity.MEDIUM]
    _, l2 = _tables(path)
    with path.open("r+b") as file:
        file.truncate(l2[-1] + ENTRY)  # everything behind the table is gone
    found = next(finding for finding in q.audit(path, depth) if finding.code == "QCOW2-BEYOND-EOF")
    assert found.severity == Severity.HIGH
    assert {item.offset for item in found.evidence} >= set(l2)


@qemu.requires_qemu
def test_tables_of_a_version_1_image_that_are_named_too_often_are_reported_as_not_examined(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow"
    qemu.create(path, "64G", fmt="qcow")
    qemu.io(path, "write -P 1 0 4k", fmt="qcow")
    (first,), _ = _tables(path)
    with q.open_image(path) as image:
        count, span = image.header.l1_size, image.header.l2_span
    assert count == (64 << 30) // span
    Poke(path).write(first, Poke(path).get(first).to_bytes(ENTRY) * count)
    codes = {finding.code for finding in q.audit(path, limits=q.Limits(work_repeats=1, work_spare=0))}
    assert "QCOW2-AUDIT-INCOMPLETE" in codes
