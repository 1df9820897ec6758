"""Every view of every image of the matrix equals QEMU's: byte for byte, and range for range."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.cli.map import entries
from tests import qemu
from tests.matrix import ENCRYPTED, PLAIN, Scenario, View, make
from tests.tiers import every, quick

pytestmark = qemu.requires_qemu


def assert_same_bytes(view: View, disk: q.Disk) -> bytes:
    wanted = qemu.raw_bytes(view.path, snapshot=view.snapshot, **view.oracle)
    got = disk.read(0, disk.size)
    assert len(got) == len(wanted) == disk.size
    if got != wanted:
        at = next(index for index in range(len(got)) if got[index] != wanted[index])
        pytest.fail(f"{view.snapshot}: first difference at guest offset {at:#x}")
    return wanted


def assert_any_read_agrees(disk: q.Disk, wanted: bytes, seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(40):
        offset = generator.randrange(len(wanted))
        length = generator.choice((1, 511, 512, 4096, 65536, 3 * disk.image.cluster_size))
        assert disk.read(offset, length) == wanted[offset : offset + length], (offset, length)


def compare(scenario: Scenario, folder: Path) -> None:
    for view in make(scenario, folder):
        with q.open_disk(view.path, **view.ours) as disk:
            wanted = assert_same_bytes(view, disk)
            assert_any_read_agrees(disk, wanted, seed=len(wanted))
            if view.snapshot is None:  # qemu-img map shows the active state only
                got = [row.to_dict() for row in entries(disk)]
                expected = qemu.map_json(view.path, **view.oracle)
                assert qemu.as_map_json(got, expected) == expected


@pytest.mark.parametrize("scenario", every(26, PLAIN), ids=lambda scenario: scenario.id)
def test_plain_images_read_and_map_as_in_qemu(scenario: Scenario, tmp_path: Path) -> None:
    compare(scenario, tmp_path)


@pytest.mark.parametrize("scenario", quick(ENCRYPTED, ENCRYPTED[:1]), ids=lambda scenario: scenario.id)
def test_encrypted_images_read_and_map_as_in_qemu(scenario: Scenario, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography is absent")
    compare(scenario, tmp_path)


def test_the_matrix_holds_a_few_hundred_views() -> None:
    assert sum(1 + scenario.snapshots for scenario in PLAIN + ENCRYPTED) >= 200
