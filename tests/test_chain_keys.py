"""Every member of a chain may have its own passphrase; legacy AES, which cannot tell a wrong one, says so. Made by qemu-img."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.errors import FormatError, Locked
from qcow2_forensics.limits import DEFAULT_LIMITS
from qcow2_forensics.reader import passphrases
from qcow2_forensics.reader.encryption.luks import recover_key
from tests import qemu
from tests.image_builder import EXT_BACKING_FORMAT, PASSPHRASE, Poke

pytestmark = [qemu.requires_qemu]
pytest.importorskip("cryptography", reason="cryptography is absent")

MiB = 1 << 20
CRYPTO = 0x0537BE77  # the extension with the place of the LUKS header
AES = {"format": "aes"}
TOP = PASSPHRASE  # of an image that is made once for all tests
LUKS = {"format": "luks", "iter-time": "10"}
WANTED = b"\x01" * (256 << 10) + b"\x02" * (512 << 10) + bytes(256 << 10)


def chain(folder: Path, below: tuple[dict[str, str], str] | None, above: tuple[dict[str, str], str] | None) -> Path:
    """An overlay with bytes 2 over a base with bytes 1, each encrypted with its own passphrase, or not."""
    for name, key, write in (("base", below, "write -P 1 0 512k"), ("disk", above, "write -P 2 256k 512k")):
        secret, method = (key[1], key[0]) if key is not None else (None, None)
        path = qemu.create(folder / name, "1M", secret=secret, encrypt=method)
        qemu.io(path, write, secret=secret)
    with q.open_image(folder / "disk") as image:
        crypto = [(item.type, item.data) for item in image.extensions if item.type == CRYPTO]
    Poke(folder / "disk").names([*crypto, (EXT_BACKING_FORMAT, b"qcow2")], b"base")
    return folder / "disk"


def read_all(path: Path, **options: object) -> bytes:
    with q.open_disk(path, **options) as disk:  # type: ignore[arg-type]
        return disk.read(0, disk.size)


@pytest.mark.parametrize(
    ("below", "above"),
    [
        pytest.param((LUKS, "low"), (LUKS, TOP), marks=pytest.mark.slow),
        pytest.param((LUKS, "low"), None, marks=pytest.mark.slow),
        ((AES, "low"), (LUKS, TOP)),
        ((AES, "low"), (AES, TOP)),
    ],
    ids=["LUKS on LUKS", "plain on LUKS", "LUKS on AES", "AES on AES"],
)
def test_each_member_takes_its_own_of_several_passphrases(
    below: tuple[dict[str, str], str], above: tuple[dict[str, str], str] | None, tmp_path: Path
) -> None:
    path = chain(tmp_path, below, above)
    keys = {"base": "low", "disk": TOP}
    for given in (["wrong", TOP, "low"], ["low", TOP.encode()], lambda name: keys[Path(name).name]):
        assert read_all(path, passphrase=given) == WANTED
    with q.open_disk(path) as disk:  # one after the other, as prompts and plaso give them
        for key in ("low", TOP):
            if disk.is_locked:
                try:
                    disk.unlock(key)
                except Locked:
                    continue
        if AES not in (below[0], above[0] if above else None):
            assert disk.read(0, disk.size) == WANTED


@pytest.mark.slow
def test_the_error_names_the_member_that_no_key_opens(tmp_path: Path) -> None:
    path = chain(tmp_path, (LUKS, "low"), (LUKS, TOP))
    with pytest.raises(Locked, match=r"^base is encrypted \(LUKS\)") as caught:
        q.open_disk(path, passphrase=[TOP, "other"])
    assert caught.value.member == str(tmp_path / "base")
    with pytest.raises(Locked, match=r"^disk is encrypted \(LUKS\): no key slot accepts any of the 2"):
        q.open_disk(path, passphrase=["low", "other"])
    with q.open_disk(path) as disk:
        assert disk.locked_member == str(path)
        with pytest.raises(Locked):
            disk.unlock(TOP)
        assert disk.locked_member == str(tmp_path / "base")
        with pytest.raises(Locked, match="base"):
            disk.read(0, 1)
        disk.unlock("low")
        assert disk.read(0, disk.size) == WANTED


@pytest.mark.parametrize("wrong", [False, True])
def test_legacy_aes_says_what_speaks_for_the_key(wrong: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = chain(tmp_path, (AES, "low"), (AES, TOP))
    caplog.set_level(logging.INFO, "qcow2_forensics")
    with q.open_disk(path, passphrase=TOP if wrong else [TOP, "low"]) as disk:
        notes = disk.notes
        assert (disk.read(0, disk.size) == WANTED) == (not wrong)
    assert len(notes) == 2
    assert all("legacy AES, which cannot tell a wrong passphrase" in note for note in notes)
    assert "plausible" in notes[0]
    assert ("may be one" in notes[1]) == wrong
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == list(
        notes[1:]
    ) * wrong


def test_an_empty_legacy_image_leaves_the_key_open(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk", "1M", secret="pw", encrypt=AES)
    with q.open_disk(path, passphrase="pw") as disk:
        assert "no sector is stored" in disk.notes[0]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_key_file_means_its_line_then_all_of_it(end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_bytes(b"secret" + end)
    wanted = [b"secret", b"secret" + end] if end else [b"secret"]
    assert passphrases.from_file(tmp_path / "key") == wanted
    monkeypatch.setenv("QCOW2_PASSPHRASE_FILE", str(tmp_path / "key"))
    monkeypatch.setenv("QCOW2_PASSPHRASE", "other")
    assert passphrases.passphrases_from_environment() == [*wanted, b"other"]
    (tmp_path / "second").write_bytes(b"second" + end)
    monkeypatch.setenv("QCOW2_PASSPHRASE_FILE", f"{tmp_path}/key:{tmp_path}/second")
    assert passphrases.passphrases_from_environment()[:2] == [b"secret", b"second"]


@pytest.mark.slow
def test_a_key_that_holds_its_end_of_line_opens(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk", "1M", secret="secret\n", encrypt=LUKS)
    (tmp_path / "key").write_bytes(b"secret\n")
    assert read_all(path, passphrase=passphrases.from_file(tmp_path / "key")) == bytes(MiB)


@pytest.mark.parametrize("stripes", [0, 1, 3999, 4001, 2**32 - 1])
def test_no_work_is_done_for_another_number_of_stripes(stripes: int) -> None:
    head = struct.pack(
        ">6sH32s32s32sII20s32sI40s", b"LUKS\xba\xbe", 1, b"aes", b"xts-plain64", b"sha256", 4096, 64, b"", b"", 1, b""
    )
    slot = struct.pack(">II32sII", 0x00AC71F3, 1, b"", 8, stripes)
    header = head + slot + struct.pack(">II32sII", 0xDEAD, 0, b"", 8, 4000) * 7
    reads = []

    def read(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        return header[offset : offset + length].ljust(length, b"\0")

    with pytest.raises(FormatError, match=f"{stripes} stripes"):
        recover_key(read, 0, MiB, b"pw", DEFAULT_LIMITS)
    assert reads == [(0, len(header))]


@pytest.mark.slow
def test_only_the_stripes_that_qemu_takes_are_derived(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk", "1M", secret="pw", encrypt=LUKS)
    with q.open_image(path) as image:
        at = image.crypto_header[0] + 208 + 44  # type: ignore[index]
    Poke(path).u32(at, 4001)
    assert not qemu.io(path, "read 0 512", secret="pw", check=False).ok
    with pytest.raises(FormatError, match="4001 stripes"):
        q.open_disk(path, passphrase="pw")
