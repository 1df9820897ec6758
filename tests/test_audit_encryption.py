"""Findings about encryption: each code fires on its trigger and not on the near miss."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_forensics.audit import audit
from qcow2_forensics.findings import Finding, Severity
from qcow2_forensics.format.image import Image
from tests import qemu
from tests.image_builder import PASSPHRASE, Poke, base_b

pytestmark = qemu.requires_qemu
Recipe = Callable[[Path], object]
SECRET = PASSPHRASE  # one passphrase for all, so that one image made by QEMU serves all


def found(path: Path, code: str, depth: str = "deep") -> list[Finding]:
    report = audit(path, depth)
    assert not [finding for finding in report if finding.code == "QCOW2-AUDIT-INCOMPLETE"], report.to_json()
    return [finding for finding in report if finding.code == f"QCOW2-{code}"]


def severity(path: Path, code: str, depth: str = "deep") -> Severity | None:
    return max((finding.severity for finding in found(path, code, depth)), default=None)


@functools.cache
def template(method: str) -> bytes:
    """Return an empty encrypted image; deriving LUKS keys takes QEMU a while on a busy machine."""
    with tempfile.TemporaryDirectory() as folder:
        return qemu.create(Path(folder) / "t.qcow2", "1M", secret=SECRET, encrypt={"format": method}).read_bytes()


def luks(*commands: str) -> Recipe:
    def make(path: Path) -> None:
        path.write_bytes(template("luks"))
        qemu.io(path, *(commands or ("write -P 7 0 256k",)), secret=SECRET)

    return make


def aes(*commands: str) -> Recipe:
    def make(path: Path) -> None:
        path.write_bytes(template("aes"))
        qemu.io(path, *(commands or ("write -P 7 0 256k",)), secret=SECRET)

    return make


def iterations(count: int) -> Recipe:
    def make(path: Path) -> None:
        luks()(path)
        with Image(path) as image:
            place = image.crypto_header
        assert place is not None
        Poke(path).u32(place[0] + 208 + 4, count)

    return make


def header(edit: Callable[[Poke, int], object]) -> Recipe:
    def make(path: Path) -> None:
        luks()(path)
        with Image(path) as image:
            place = image.crypto_header
        assert place is not None
        edit(Poke(path), place[0])

    return make


def plain_called_encrypted(path: Path) -> None:
    Poke(base_b(path)).u32(32, 1)


def written_in_part(path: Path) -> None:
    """Clusters of which one sector was written: the others are zeros and were never encrypted."""
    qemu.create(path, "1M", secret="pw", preallocation="metadata")
    qemu.io(path, "write -P 7 128k 512", "write -P 7 257k 1k", secret="pw")


def text_called_encrypted(path: Path) -> None:
    plain_called_encrypted(path)
    Poke(path).write(0x50000, b"the quick brown fox " * 3000)


def second_slot(path: Path) -> None:
    path.write_bytes(_second_slot())


@functools.cache
def _second_slot() -> bytes:
    return _made(_add_slot)


@functools.cache
def _erased_slot() -> bytes:
    return _made(_add_and_erase_slot)


def _made(recipe: Recipe) -> bytes:
    """Return what a recipe writes; QEMU takes half a second for each slot it adds."""
    with tempfile.TemporaryDirectory() as folder:
        recipe(Path(folder) / "disk.qcow2")
        return (Path(folder) / "disk.qcow2").read_bytes()


def _add_slot(path: Path) -> None:
    luks()(path)
    add = {"encrypt.new-secret": "key0", "encrypt.keyslot": 1, "encrypt.iter-time": 10, "encrypt.state": "active"}
    qemu.amend(path, secret=SECRET, **add)


def erased_slot(path: Path) -> None:
    """A passphrase was added and taken away again."""
    path.write_bytes(_erased_slot())


def _add_and_erase_slot(path: Path) -> None:
    second_slot(path)
    qemu.amend(path, secret=SECRET, **{"encrypt.keyslot": 1, "encrypt.state": "inactive"})


T = Severity
CASES: list[tuple[str, Recipe, Severity | None]] = [
    ("LEGACY-AES", aes(), T.MEDIUM),
    ("LEGACY-AES", luks(), None),
    ("PLAINTEXT-COMPRESSED", luks("write -P 7 0 64k", "write -c -P 0x55 64k 64k"), T.HIGH),
    ("PLAINTEXT-COMPRESSED", aes("write -c -P 0x55 64k 64k"), T.HIGH),
    ("PLAINTEXT-COMPRESSED", luks(), None),
    ("PLAINTEXT-CONTENT", plain_called_encrypted, T.MEDIUM),
    ("PLAINTEXT-CONTENT", text_called_encrypted, T.MEDIUM),
    ("PLAINTEXT-CONTENT", written_in_part, None),
    ("PLAINTEXT-CONTENT", luks(), None),
    ("PLAINTEXT-CONTENT", base_b, None),
    ("CRYPTO-HEADER-INVALID", lambda path: Poke(base_b(path)).u32(32, 2), T.HIGH),
    ("CRYPTO-HEADER-INVALID", header(lambda p, at: p.write(at, b"SKUL")), T.HIGH),
    ("CRYPTO-HEADER-INVALID", header(lambda p, at: p.u16(at + 6, 2)), T.HIGH),
    ("CRYPTO-HEADER-INVALID", header(lambda p, at: p.u32(at + 208 + 44, 1)), T.HIGH),
    ("CRYPTO-HEADER-INVALID", header(lambda p, at: p.cut(at + 100)), T.HIGH),
    ("CRYPTO-HEADER-INVALID", luks(), None),
    ("LUKS-DETAILS", luks(), T.INFO),
    ("LUKS-DETAILS", aes(), None),
    ("LUKS-ERASED-SLOT", erased_slot, T.MEDIUM),
    ("LUKS-ERASED-SLOT", second_slot, None),
    ("WEAK-CRYPTO", header(lambda p, at: p.write(at + 40, b"ecb\0")), T.MEDIUM),
    ("WEAK-CRYPTO", header(lambda p, at: p.write(at + 72, b"md5\0\0\0\0")), T.MEDIUM),
    ("WEAK-CRYPTO", iterations(999), T.MEDIUM),
    ("WEAK-CRYPTO", iterations(1000), None),
]


@pytest.mark.parametrize(
    ("code", "recipe", "expected"),
    CASES,
    ids=[f"{code}-{wanted.name if wanted else 'absent'}" for code, _, wanted in CASES],
)
def test_code_fires_on_its_trigger_only(tmp_path: Path, code: str, recipe: Recipe, expected: Severity | None) -> None:
    path = tmp_path / "disk.qcow2"
    recipe(path)
    assert severity(path, code) == expected


def test_details_are_those_qemu_reports(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    luks()(path)
    reported = qemu.info_json(path)["format-specific"]["data"]["encrypt"]
    details = {item.field: item.value for item in found(path, "LUKS-DETAILS")[0].evidence}
    assert details["uuid"] == reported["uuid"]
    assert details["cipher"] == f"aes-{reported['cipher-mode']}-{reported['ivgen-alg']}"
    assert details["hash"] == reported["hash-alg"]
    assert details["digest_iterations"] == reported["master-key-iters"]
    assert details["slot_0_iterations"] == reported["slots"][0]["iters"]


def test_slot_that_qemu_erased_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    erased_slot(path)
    (finding,) = found(path, "LUKS-ERASED-SLOT", "triage")
    assert [item.field for item in finding.evidence] == ["slot_1_nonzero"]


def test_unencrypted_compressed_clusters_are_named_by_their_entries(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    luks("write -P 7 0 64k", "write -c -P 0x55 128k 64k")(path)
    (finding,) = found(path, "PLAINTEXT-COMPRESSED", "standard")
    assert [item.guest_offset for item in finding.evidence] == [128 << 10]
