"""LUKS1 and legacy AES, against QEMU's bytes; and what a hostile or broken LUKS header does."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcow2_forensics as q
from qcow2_forensics.format.header import Header
from qcow2_forensics.limits import DEFAULT_LIMITS, Limits
from qcow2_forensics.reader.encryption import method_name, sectors, unlock
from qcow2_forensics.reader.encryption.luks import LuksHeader, parse_luks_header
from qcow2_forensics.reader.encryption.sectors import sector_cipher
from tests import qemu
from tests.tiers import every

pytest.importorskip("cryptography", reason="the cryptography library is absent")

SECRET = "correct horse, battery"  # the comma is for QEMU's option parser

WRITES = (
    "write -P 0x11 0 64k",
    "write -P 0x22 65024 1k",
    "write -P 0x33 256k 300k",
    "write -z 512k 64k",
    "write -P 0x44 1000k 24k",
)

# One image per cipher mode, IV generator and PBKDF hash QEMU 7.2 can make; hashes ride along.
COMBINATIONS = [
    ("aes-256", "xts", "plain64", "sha256"),
    ("aes-256", "xts", "plain", "sha1"),
    ("aes-256", "xts", "essiv:sha256", "sha512"),
    ("aes-256", "cbc", "plain64", "sha224"),
    ("aes-256", "cbc", "essiv:sha256", "sha384"),
    ("aes-256", "ctr", "plain64", "sha256"),
    ("aes-256", "ctr", "essiv:sha256", "sha256"),
    ("aes-256", "ecb", "plain64", "md5"),
    ("aes-192", "xts", "plain64", "sha256"),
    ("aes-128", "xts", "plain64", "ripemd160"),
    ("aes-128", "cbc", "essiv:md5", "sha256"),
    ("aes-128", "cbc", "plain", "sha256"),
    ("aes-128", "ctr", "plain", "sha256"),
    ("cast5-128", "cbc", "plain64", "sha256"),
    ("cast5-128", "ecb", "plain64", "sha256"),
    ("cast5-128", "ctr", "essiv:md5", "sha256"),
]


def patiently(action: Callable[[], object]) -> None:
    """Run a command that derives keys; on a busy machine QEMU fails to time that, again and again."""
    for attempt in range(6):
        try:
            action()
        except qemu.QemuError as error:
            if "accurate CPU usage" not in str(error) or attempt == 5:
                raise
        else:
            return


def luks_image(path: Path, *writes: str, cipher: tuple[str, str, str, str] = COMBINATIONS[0]) -> Path:
    algorithm, mode, generator, digest = cipher
    name, _, generator_hash = generator.partition(":")
    encrypt = {"format": "luks"}
    if cipher != COMBINATIONS[0]:  # which is QEMU's default, and has been made for other tests
        encrypt |= {"cipher-alg": algorithm, "cipher-mode": mode, "ivgen-alg": name, "hash-alg": digest}
    if generator_hash:
        encrypt["ivgen-hash-alg"] = generator_hash
    patiently(lambda: qemu.create(path, "1M", secret=SECRET, encrypt=encrypt))
    if writes:
        qemu.io(path, *writes, secret=SECRET)
    return path


@pytest.fixture(scope="module")
def luks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 1 MiB LUKS disk with QEMU's defaults."""
    qemu.need()
    return luks_image(tmp_path_factory.mktemp("luks") / "disk.qcow2", *WRITES)


@pytest.fixture
def luks_copy(luks: Path, tmp_path: Path) -> Path:
    """A copy of it to write to."""
    return Path(shutil.copy(luks, tmp_path / "copy.qcow2"))


def luks_offset(path: Path) -> int:
    with q.open_image(path) as image:
        assert image.crypto_header is not None
        return image.crypto_header[0]


@pytest.fixture
def damaged(luks: Path, tmp_path: Path) -> Callable[..., Path]:
    """A factory: the LUKS disk with bytes changed, at offsets counted from the LUKS header."""

    def make(*patches: tuple[int, bytes], size: int | None = None) -> Path:
        data = bytearray(luks.read_bytes())
        start = luks_offset(luks)
        for offset, new in patches:
            data[start + offset : start + offset + len(new)] = new
        path = tmp_path / "damaged.qcow2"
        path.write_bytes(bytes(data if size is None else data[:size]))
        return path

    return make


def assert_reads_as_qemu_does(path: Path, secret: str, fmt: str = "qcow2") -> None:
    expected = qemu.raw_bytes(path, secret=secret, fmt=fmt)
    with q.open_disk(path, passphrase=secret) as disk:
        assert disk.read(0, disk.size) == expected
        assert b"".join(disk.read(offset, 512) for offset in range(0, disk.size, 512)) == expected
        chance = random.Random(7)
        for _ in range(100):
            offset, length = chance.randrange(disk.size), chance.randrange(70_000)
            assert disk.read(offset, length) == expected[offset : offset + length]


@qemu.requires_qemu
@pytest.mark.parametrize("cipher", every(20, COMBINATIONS), ids="-".join)
def test_luks_disk_reads_as_qemu_does(cipher: tuple[str, str, str, str], tmp_path: Path) -> None:
    path = luks_image(tmp_path / "disk.qcow2", *WRITES, cipher=cipher)
    assert_reads_as_qemu_does(path, SECRET)


@qemu.requires_qemu
def test_cipher_named_in_the_header_without_a_library_is_named(luks_copy: Path) -> None:
    at = luks_offset(luks_copy) + 8
    with luks_copy.open("r+b") as stream:
        stream.seek(at)
        assert stream.read(4) == b"aes\0"
        stream.seek(at)
        stream.write(b"serpent\0")
    with pytest.raises(q.Unsupported, match="cipher serpent in mode xts-plain64"):
        q.open_disk(luks_copy, passphrase=SECRET)


@pytest.mark.slow
@qemu.requires_qemu
def test_cipher_without_a_library_is_named(tmp_path: Path) -> None:
    path = luks_image(tmp_path / "disk.qcow2", cipher=("serpent-256", "cbc", "plain64", "sha256"))
    with pytest.raises(q.Unsupported, match="cipher serpent in mode cbc-plain64"):
        q.open_disk(path, passphrase=SECRET)


@qemu.requires_qemu
@pytest.mark.parametrize("secret", ["short", "exactly16letters", "longer than sixteen letters", "ümläut"])
@pytest.mark.parametrize("fmt", ["qcow2", "qcow"])
def test_legacy_aes_reads_as_qemu_does(fmt: str, secret: str, tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk", "1M", fmt=fmt, secret=secret, encrypt={"format": "aes"})
    writes = [write for write in WRITES if "-z" not in write]
    qemu.io(path, *writes, fmt=fmt, secret=secret)
    assert_reads_as_qemu_does(path, secret, fmt)


def test_what_the_end_of_the_file_cuts_off_an_encrypted_cluster_is_an_error_not_decrypted_zeros(
    luks: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(luks, tmp_path / "cut.qcow2"))
    with q.open_disk(path, passphrase=SECRET) as disk:
        last = max((e for e in disk.extents() if e.host_offset is not None), key=lambda e: e.host_offset or 0)
        stored = disk.read(last.offset, last.length)
        end = (last.host_offset or 0) + last.length
        assert end == path.stat().st_size  # QEMU writes whole clusters where they are encrypted
    os.truncate(path, end - 5000)
    with q.open_disk(path, passphrase=SECRET) as disk:
        whole = last.length - 5120  # the sectors that are there
        assert disk.read(last.offset, whole) == stored[:whole]
        for offset, length in ((0, last.length), (whole, 512), (whole + 1, 1), (last.length - 512, 512)):
            with pytest.raises(q.FormatError, match="an encrypted cluster is cut off by the end of"):
                disk.read(last.offset + offset, length)
    with q.open_disk(path, passphrase=SECRET, eof="zeros") as disk:
        assert disk.read(last.offset, last.length) == qemu.read(path, last.offset, last.length, secret=SECRET)
        assert disk.filled == {"clusters": 1, "bytes": 5000}


@qemu.requires_qemu
def test_compressed_cluster_of_an_encrypted_disk_is_plain(luks_copy: Path, tmp_path: Path) -> None:
    legacy = qemu.create(tmp_path / "legacy.qcow2", "1M", secret=SECRET, encrypt={"format": "aes"})
    for path in (luks_copy, legacy):
        qemu.io(path, "write -P 0x11 0 64k", "write -c -P 0x55 704k 64k", "write -P 0x22 900k 4k", secret=SECRET)
        assert_reads_as_qemu_does(path, SECRET)


@qemu.requires_qemu
def test_internal_snapshot_of_a_luks_disk_reads_as_qemu_does(luks_copy: Path) -> None:
    qemu.snapshot(luks_copy, "first", secret=SECRET)
    qemu.io(luks_copy, "write -P 0x99 0 700k", secret=SECRET)
    expected = qemu.raw_bytes(luks_copy, snapshot="first", secret=SECRET)
    with q.open_disk(luks_copy, snapshot="first", passphrase=SECRET) as disk:
        assert disk.read(0, disk.size) == expected
    assert_reads_as_qemu_does(luks_copy, SECRET)


@qemu.requires_qemu
@pytest.mark.parametrize("slots", every(2, [(3,), range(1, 8)]), ids=["two", "eight"])
def test_each_key_slot_opens_and_an_erased_one_does_not(slots: Sequence[int], luks_copy: Path) -> None:
    path = luks_copy
    expected = qemu.raw_bytes(path, secret=SECRET)
    target = f"driver=qcow2,file.filename={path},encrypt.key-secret=key0"
    first = f"secret,id=key0,data={SECRET.replace(',', ',,')}"

    def amend(change: str, *objects: str) -> None:
        arguments = [part for item in (first, *objects) for part in ("--object", item)]
        patiently(lambda: qemu.img("amend", *arguments, "-o", change, "--image-opts", target))

    for slot in slots:
        change = f"encrypt.state=active,encrypt.new-secret=new,encrypt.keyslot={slot},encrypt.iter-time=10"
        amend(change, f"secret,id=new,data=slot {slot}")
    for slot in slots:
        with q.open_disk(path, passphrase=f"slot {slot}") as disk:
            assert disk.read(0, disk.size) == expected
    amend("encrypt.state=inactive,encrypt.keyslot=3")
    with pytest.raises(q.Locked, match="no key slot accepts this passphrase"):
        q.open_disk(path, passphrase="slot 3")


@qemu.requires_qemu
def test_header_facts_are_those_qemu_reports(luks: Path) -> None:
    shown = qemu.img("info", "--output=json", luks).text
    facts = json.loads(shown)["format-specific"]["data"]["encrypt"]
    header = read_header(luks)
    assert header.problems == ()
    assert (header.uuid, header.hash_spec) == (facts["uuid"], facts["hash-alg"])
    assert (header.cipher_name, header.cipher_mode, header.key_bytes) == ("aes", "xts-plain64", 64)
    assert header.payload_offset == facts["payload-offset"]
    assert header.mk_digest_iterations == facts["master-key-iters"]
    for slot, fact in zip(header.slots, facts["slots"], strict=True):
        assert (slot.is_active, slot.key_material_offset) == (fact["active"], fact["key-offset"])
        if slot.is_active:
            assert (slot.iterations, slot.stripes) == (fact["iters"], fact["stripes"])


def read_header(path: Path) -> LuksHeader:
    with q.open_image(path) as image:
        assert image.crypto_header is not None
        offset, length = image.crypto_header
        return parse_luks_header(image.read(offset, 592), length)


@qemu.requires_qemu
def test_wrong_passphrase_is_locked(luks: Path) -> None:
    for wrong in ("wrong", "", SECRET + " ", SECRET[:-1].encode()):
        with pytest.raises(q.Locked, match="no key slot accepts this passphrase"):
            q.open_disk(luks, passphrase=wrong)


@qemu.requires_qemu
def test_passphrase_may_be_bytes(luks: Path) -> None:
    with q.open_disk(luks, passphrase=SECRET.encode()) as disk:
        assert disk.read(0, 4) == b"\x11" * 4


@qemu.requires_qemu
def test_disk_of_many_sectors_opens_without_numpy(luks: Path) -> None:
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import hashlib, qcow2_forensics as q\n"
        f"disk = q.open_disk({str(luks)!r}, passphrase={SECRET!r})\n"
        "print(hashlib.sha256(disk.read(0, disk.size)).hexdigest())"
    )
    source = Path(q.__file__).parent.parent
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(source), "QCOW2_FORENSICS_AUTOLOAD": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    with q.open_disk(luks, passphrase=SECRET) as disk:
        assert done.stdout.strip() == hashlib.sha256(disk.read(0, disk.size)).hexdigest()


@qemu.requires_qemu
def test_unlocking_does_not_import_numpy(luks: Path) -> None:
    code = (
        "import sys, qcow2_forensics as q\n"
        f"disk = q.open_disk({str(luks)!r}, passphrase={SECRET!r}); disk.read(0, 2048)\n"
        "print('numpy' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(q.__file__).parent.parent), "QCOW2_FORENSICS_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert done.stdout.strip() == "False"


# --- broken and hostile headers ------------------------------------------------------------------

SLOT0 = 208  # offset of the first key slot in the LUKS header


@qemu.requires_qemu
@pytest.mark.parametrize(
    ("patch", "error", "words"),
    [
        ((0, b"LUKS\xba\xbf"), q.FormatError, "no LUKS1 header"),
        ((6, struct.pack(">H", 2)), q.FormatError, "version 2"),
        ((8, b"twofish\0"), q.Unsupported, "cipher twofish"),
        ((8, b"a\x1b[31m\0"), q.Unsupported, r"cipher a\\x1b"),
        ((40, b"gcm-plain64\0"), q.Unsupported, "mode gcm-plain64"),
        ((40, b"xts-random\0"), q.Unsupported, "IV generator random"),
        ((40, b"xts-essiv:sha512\0"), q.Unsupported, "essiv:sha512 with aes"),
        ((40, b"xts\0"), q.Unsupported, "IV generator none"),
        ((72, b"whirlpool\0"), q.Unsupported, "hash whirlpool"),
        ((108, struct.pack(">I", 0)), q.FormatError, "key of 0 bytes"),
        ((108, struct.pack(">I", 0xFFFFFFFF)), q.LimitExceeded, "key_bytes is 4294967295"),
        ((108, struct.pack(">I", 40)), q.FormatError, "key of 40 bytes"),
        ((164, struct.pack(">I", 0)), q.FormatError, "digest_iterations is 0"),
        ((164, struct.pack(">I", 0xFFFFFFFF)), q.LimitExceeded, "digest_iterations is 4294967295"),
        ((SLOT0, struct.pack(">I", 0xDEAD)), q.Locked, "no active key slot"),
        ((SLOT0 + 4, struct.pack(">I", 0)), q.FormatError, "slot 0 iterations is 0"),
        ((SLOT0 + 4, struct.pack(">I", 0xFFFFFFFF)), q.LimitExceeded, "slot 0 iterations is 4294967295"),
        ((SLOT0 + 40, struct.pack(">I", 0xFFFFFFFF)), q.FormatError, "slot 0 has its key material outside"),
        ((SLOT0 + 40, struct.pack(">I", 0)), q.FormatError, "slot 0 has its key material outside"),
        ((SLOT0 + 44, struct.pack(">I", 0xFFFFFFFF)), q.FormatError, "slot 0 has 4294967295 stripes"),
        ((SLOT0 + 44, struct.pack(">I", 0)), q.FormatError, "slot 0 has 0 stripes"),
    ],
)
def test_unsound_header_is_refused_with_its_reason(
    patch: tuple[int, bytes], error: type[Exception], words: str, damaged: Callable[..., Path]
) -> None:
    path = damaged(patch)
    with pytest.raises(error, match=words):
        q.open_disk(path, passphrase=SECRET)


@qemu.requires_qemu
def test_unsound_slot_does_not_keep_a_sound_one_from_opening(damaged: Callable[..., Path], luks: Path) -> None:
    slot = luks.read_bytes()[luks_offset(luks) + SLOT0 :][:48]
    broken = slot[:4] + struct.pack(">I", 0) + slot[8:]
    path = damaged((SLOT0, broken), (SLOT0 + 48, slot))
    with q.open_disk(path, passphrase=SECRET) as disk:
        assert disk.read(0, 1) == b"\x11"


@qemu.requires_qemu
def test_key_material_cut_off_by_the_end_of_the_file_is_an_error(damaged: Callable[..., Path], luks: Path) -> None:
    path = damaged(size=luks_offset(luks) + 8192)
    with q.open_image(path) as image, pytest.raises(q.FormatError, match="past the end of the file"):
        unlock(image.header, image.read, image.crypto_header, SECRET, DEFAULT_LIMITS)


@qemu.requires_qemu
def test_limits_of_the_caller_hold(luks: Path) -> None:
    for limits in (Limits(luks_iterations=1000), Limits(luks_payload_bytes=4096)):
        with pytest.raises(q.LimitExceeded):
            q.open_disk(luks, passphrase=SECRET, limits=limits)


@qemu.requires_qemu
@pytest.mark.parametrize(
    ("patch", "field", "words"),
    [
        ((0, b"SKUL"), "magic", "magic is"),
        ((6, b"\0\2"), "version", "version is 2"),
        ((8, b"a" * 32), "cipher_name", "no terminating zero"),
        ((108, bytes(4)), "key_bytes", "key length is 0"),
        ((164, bytes(4)), "mk_digest_iterations", "iterations are 0"),
        ((SLOT0, b"abcd"), "state", "slot 0: state is 0x61626364"),
        ((SLOT0 + 4, bytes(4)), "iterations", "slot 0: iterations are 0"),
        ((SLOT0 + 44, struct.pack(">I", 7)), "stripes", "slot 0: 7 stripes"),
        ((SLOT0 + 40, struct.pack(">I", 1 << 20)), "key_material_offset", "slot 0: key material ends outside"),
        (
            (SLOT0 + 48 + 40, struct.pack(">I", 8)),
            "key_material_offset",
            "slot 1: key material overlaps that of slot 0",
        ),
        ((SLOT0 + 40, struct.pack(">I", 0)), "key_material_offset", "slot 0: key material overlaps the header"),
    ],
)
def test_problems_are_listed_with_field_and_offset(
    patch: tuple[int, bytes], field: str, words: str, damaged: Callable[..., Path]
) -> None:
    (problem, *_) = [problem for problem in read_header(damaged(patch)).problems if words in problem.message]
    assert problem.field == field
    assert problem.offset == patch[0]


@given(st.binary(min_size=592, max_size=592))
def test_any_592_bytes_parse_to_a_header(data: bytes) -> None:
    header = parse_luks_header(data, 1 << 20)
    assert len(header.slots) == 8
    assert header.problems


def test_header_shorter_than_592_bytes_is_an_error() -> None:
    with pytest.raises(q.FormatError, match="591 bytes"):
        parse_luks_header(bytes(591))


def test_methods_have_names() -> None:
    names = [method_name(Header(version=3, crypt_method=method)) for method in (0, 1, 2, 7)]
    assert names == ["none", "legacy AES", "LUKS", "unknown method 7"]


def test_luks_without_its_header_extension_is_an_error() -> None:
    with pytest.raises(q.FormatError, match="without a LUKS header extension"):
        unlock(Header(version=3, crypt_method=2), lambda _offset, _length: b"", None, "x", DEFAULT_LIMITS)


def test_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    sectors._library.cache_clear()
    try:
        with pytest.raises(q.Unsupported, match=r"pip install 'qcow2-forensics\[luks\]'"):
            unlock(Header(version=3, crypt_method=1), lambda _offset, _length: b"", None, "x", DEFAULT_LIMITS)
    finally:
        sectors._library.cache_clear()


# --- many sectors at once ------------------------------------------------------------------------

MODES = [
    ("aes", "xts-plain64", 64),
    ("aes", "xts-plain", 32),
    ("aes", "xts-essiv:sha256", 64),
    ("aes", "cbc-plain64", 16),
    ("aes", "cbc-essiv:sha256", 32),
    ("cast5", "cbc-plain64", 16),
    ("aes", "ctr-plain64", 24),
    ("aes", "ecb", 32),
]


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    pytest.importorskip("numpy", reason="numpy is absent")
    return lambda: monkeypatch.setattr(sectors, "_BULK_SECTORS", 1 << 40)


@pytest.mark.parametrize(("name", "mode", "key_bytes"), MODES)
@pytest.mark.parametrize("count", [1, 7, 8, 127, 128, 129, 300])
def test_many_sectors_at_once_equal_one_at_a_time(
    name: str, mode: str, key_bytes: int, count: int, one_by_one: Callable[[], None]
) -> None:
    chance = random.Random(count)
    cipher = sector_cipher(name, mode, chance.randbytes(key_bytes))
    data = chance.randbytes(count * 512)
    for first in (0, 12345, (1 << 32) - 3, 1 << 44):
        together = cipher.decrypt(data, first)
        one_by_one()
        apart = [cipher.decrypt(data[at : at + 512], first + at // 512) for at in range(0, len(data), 512)]
        assert together == b"".join(apart)


@given(key=st.binary(min_size=64, max_size=64), first=st.integers(0, (1 << 55) - 1), data=st.binary(min_size=16))
def test_xts_of_many_sectors_equals_the_librarys(key: bytes, first: int, data: bytes) -> None:
    pytest.importorskip("numpy", reason="numpy is absent")
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    data = (data * 512)[: 512 * 20]
    expected = [
        Cipher(algorithms.AES(key), modes.XTS((first + index).to_bytes(16, "little")))
        .decryptor()
        .update(data[index * 512 : (index + 1) * 512])
        for index in range(20)
    ]
    assert sector_cipher("aes", "xts-plain64", key).decrypt(data, first) == b"".join(expected)


def test_plain_wraps_at_two_tebibytes_and_plain64_does_not() -> None:
    key, data = bytes(range(32)), bytes(512)
    plain, plain64 = (sector_cipher("aes", f"cbc-{generator}", key) for generator in ("plain", "plain64"))
    assert plain.decrypt(data, (1 << 32) + 5) == plain.decrypt(data, 5) == plain64.decrypt(data, 5)
    assert plain64.decrypt(data, (1 << 32) + 5) != plain64.decrypt(data, 5)
