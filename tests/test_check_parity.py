"""Our counters equal those of ``qemu-img check``, number for number.

More images than a test run has time for: ``python -m tests.damage --count 5000``.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from qcow2_forensics.audit import audit
from tests import damage, hostile, qemu
from tests.image_builder import B_L2, COPIED, Poke, base_b
from tests.tiers import every, quick

pytestmark = qemu.requires_qemu

BATCH = int(os.environ.get("QCOW2_DAMAGED_IMAGES", "200"))

# Seeds whose counters once differed from QEMU's, with the reason.
KEPT = {
    30: "QEMU never says that an image ends before its first cluster does",
    41: "an L1 entry of offset 0 is left out of the copied flags",
    111: "a compressed cluster that reaches one cluster past the file makes QEMU count that one too",
    209: "an unaligned cluster that reaches past the file does so as well",
    272: "an L1 table grown over other tables",
    10519: "a bitmap directory cut by its padding",
}


COUNTED = [name for name, image in hostile.IMAGES.items() if image.check is not None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> damage.Bases:
    qemu.need()
    return damage.Bases(tmp_path_factory.mktemp("bases"))


def _difference(seed: int, bases: damage.Bases, folder: Path) -> str:
    image = damage.damaged(seed, bases, folder)
    verdict = damage.compare(image.path)
    image.path.unlink()
    # Where QEMU prints nothing there is nothing to equal: it may miss a data file that we do not need.
    if verdict.kind != "different":
        return ""
    return f"seed {seed}, {image.base}, {image.edits}: QEMU {verdict.theirs}, ours {verdict.mine}"


@pytest.mark.parametrize("count", every(2, [8, BATCH]))
def test_counters_equal_qemus_on_randomly_damaged_images(count: int, bases: damage.Bases, tmp_path: Path) -> None:
    differences = [found for seed in range(100_000, 100_000 + count) if (found := _difference(seed, bases, tmp_path))]
    assert not differences, "\n".join(differences)


@pytest.mark.parametrize("seed", KEPT)
def test_counters_equal_qemus_where_they_once_did_not(seed: int, bases: damage.Bases, tmp_path: Path) -> None:
    assert _difference(seed, bases, tmp_path) == ""


@pytest.mark.parametrize("name", damage.BASES)
def test_counters_equal_qemus_on_undamaged_images(name: str, bases: damage.Bases) -> None:
    verdict = damage.compare(bases[name])
    assert verdict.kind == "same"
    assert verdict.theirs is not None
    assert not verdict.theirs.get("corruptions", 0)


@pytest.mark.parametrize("ident", quick(COUNTED, [name for name in hostile.REPRESENTATIVE if name in COUNTED]))
def test_counters_equal_qemus_on_hostile_images(ident: str, tmp_path: Path) -> None:
    image = hostile.IMAGES[ident]
    assert image.check is not None
    expected = image.check[1]
    check = audit(hostile.build(ident, tmp_path)).check
    if not expected:
        assert check is None or image.base == "data" or ident == "H51"  # QEMU wants the data file, we do not
    else:
        assert check is not None
        unimportant = ("filename", "format", "total-clusters")
        assert {name: value for name, value in check.items() if value and name not in unimportant} == expected


@pytest.mark.parametrize(("kind", "count"), quick([("luks", 25), ("aes", 25), ("aes", 6)], [("aes", 6)], unpack=True))
def test_counters_equal_qemus_on_damaged_encrypted_images(kind: str, count: int, tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    qemu.create(path, "1M", secret="pw", encrypt={"format": kind})
    qemu.io(path, "write -P 1 0 300k", "write -P 2 700k 64k", secret="pw")
    qemu.snapshot(path, "one", secret="pw")
    qemu.io(path, "write -P 3 0 64k", secret="pw")
    whole = path.read_bytes()
    for seed in range(count):
        editor = damage.Editor(whole, random.Random(seed))
        for edit in (damage.edit_l2, damage.edit_refcount):
            edit(editor)
        path.write_bytes(editor.data)
        theirs, mine = qemu.check_json(path, secret="pw").counters, damage.ours(path)
        assert theirs is not None
        assert mine is not None
        assert {**mine, "filename": ""} == {**theirs, "filename": ""}, editor.edits


# What each kind of damage to base image B counts as, checked by hand against QEMU.
BY_HAND = {
    "refcount 0": (lambda p: p.refcount(5, 0), 2, 0),
    "refcount 2": (lambda p: p.refcount(5, 2), 1, 1),
    "refcount past the end": (lambda p: p.refcount(500, 1), 0, 0),
    "L2 copied flag cleared": (lambda p: p.clear_bits(B_L2, COPIED), 1, 0),
    "L2 entry copied to another": (lambda p: p.l2(1, p.get(B_L2)), 1, 1),
    "L2 entry cleared": (lambda p: p.l2(2, 0), 0, 1),
    "L2 reserved bit": (lambda p: p.set_bits(B_L2, 2), 1, 0),
    "L2 offset unaligned": (lambda p: p.add(B_L2, 0x200), 2, 0),
    "L2 table shifted": (lambda p: p.add(0x30000, 0x200), 193, 2),
    "half of the last cluster cut": (lambda p: p.cut(0x78000), 0, 0),
    "the last cluster cut": (lambda p: p.cut(0x70000), 1, 0),
    "120000 bytes appended": (lambda p: p.append(b"x" * 120_000), 0, 0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_each_kind_of_damage_counts_as_qemu_counts_it(name: str, tmp_path: Path) -> None:
    edit, corruptions, leaks = BY_HAND[name]
    path = base_b(tmp_path / "b.qcow2")
    edit(Poke(path))
    verdict = damage.compare(path)
    assert verdict.kind == "same"
    assert verdict.mine is not None
    assert (verdict.mine.get("corruptions", 0), verdict.mine.get("leaks", 0)) == (corruptions, leaks)


def test_a_report_carries_the_counters_under_qemus_names(base_image: Path) -> None:
    report = audit(base_image)
    assert report.check == qemu.check_json(base_image).counters
    assert report.to_dict()["check"] == qemu.check_json(base_image).counters


def test_triage_does_not_count(base_image: Path) -> None:
    assert audit(base_image, "triage").check is None
