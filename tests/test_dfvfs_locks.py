"""Encrypted images lock and unlock the dfVFS way. Images are encrypted by qemu-img."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dfvfs")
pytest.importorskip("cryptography")

from dfvfs.helpers import volume_scanner
from dfvfs.lib import errors as dfvfs_errors
from dfvfs.path import factory
from dfvfs.resolver import context, resolver

import dfvfs_qcow2
from dfvfs_qcow2 import opening
from tests import plaso_tools, qemu

NewPathSpec = factory.Factory.NewPathSpec
METHODS = ({"format": "luks"}, {"format": "aes"})
PASSPHRASE = plaso_tools.PASSPHRASE


@pytest.fixture(autouse=True)
def key_chain() -> Iterator[Any]:
    qemu.need()
    yield resolver.Resolver.key_chain
    resolver.Resolver.key_chain.Empty()


@pytest.fixture
def encrypted(make_image: Callable[..., Path]) -> Path:
    """A LUKS image whose first cluster is 0x11, with a snapshot, and 0x22 after it."""
    path = make_image("luks.qcow2", "2M", "write -P 0x11 0 64k", secret=PASSPHRASE)
    qemu.snapshot(path, "before", secret=PASSPHRASE)
    qemu.io(path, "write -P 0x22 0 64k", secret=PASSPHRASE)
    return path


def qcow(path: Path, **keywords: Any) -> Any:
    return NewPathSpec("QCOW", parent=NewPathSpec("OS", location=str(path)), **keywords)


def open_file(path_spec: Any, resolver_context: Any = None) -> Any:
    return resolver.Resolver.OpenFileObject(path_spec, resolver_context=resolver_context or context.Context())


def test_a_locked_image_opens_and_its_reads_fail(encrypted: Path) -> None:
    file_object = open_file(qcow(encrypted))
    assert file_object.is_locked
    assert file_object.get_size() == 2 << 20
    with pytest.raises(OSError, match="encrypted"):
        file_object.read(16)
    entry = resolver.Resolver.OpenFileEntry(qcow(encrypted), resolver_context=context.Context())
    assert entry.IsLocked()
    assert not entry.Unlock()
    assert entry.IsFile()
    assert entry.size == 2 << 20


def test_an_image_without_encryption_is_never_locked(base_image: Path) -> None:
    assert not open_file(qcow(base_image)).is_locked
    entry = resolver.Resolver.OpenFileEntry(qcow(base_image), resolver_context=context.Context())
    assert not entry.IsLocked()
    assert entry.Unlock()


def test_the_password_in_the_key_chain_unlocks_also_what_is_open_already(encrypted: Path, key_chain: Any) -> None:
    file_object = open_file(qcow(encrypted))
    key_chain.SetCredential(qcow(encrypted), "password", "wrong")
    assert file_object.is_locked
    with pytest.raises(OSError, match="encrypted"):
        file_object.read(16)
    key_chain.SetCredential(qcow(encrypted), "password", PASSPHRASE)
    assert file_object.read(16) == b"\x22" * 16
    assert not file_object.is_locked


def test_a_wrong_password_is_tried_once(encrypted: Path, key_chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcow2_forensics.reader.disk import Disk

    tried: list[Any] = []
    unlock = Disk.unlock
    monkeypatch.setattr(Disk, "unlock", lambda disk, key: tried.append(key) or unlock(disk, key))
    key_chain.SetCredential(qcow(encrypted), "password", "wrong")
    file_object = open_file(qcow(encrypted))
    for _ in range(5):
        assert file_object.is_locked
    assert tried == [["wrong"]]


def test_snapshots_are_unlocked_by_the_password_of_their_image(
    encrypted: Path, key_chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcow2_forensics.reader.disk import Disk

    [snapshot] = dfvfs_qcow2.snapshot_path_specs(qcow(encrypted))
    with pytest.raises(OSError, match="encrypted"):
        open_file(snapshot).read(16)
    key_chain.SetCredential(qcow(encrypted), "password", PASSPHRASE)
    tried: list[Any] = []
    unlock = Disk.unlock
    monkeypatch.setattr(Disk, "unlock", lambda disk, key: tried.append(key) or unlock(disk, key))
    kept = context.Context()
    assert open_file(qcow(encrypted), kept).read(16) == b"\x22" * 16
    assert open_file(snapshot, kept).read(16) == b"\x11" * 16
    assert len(tried) == 1  # the second state took over the keys of the first


def test_a_password_in_the_path_spec_unlocks_and_does_not_mix_with_others(encrypted: Path) -> None:
    kept = context.Context()
    wrong = open_file(qcow(encrypted, password="wrong"), kept)
    right = open_file(qcow(encrypted, password=PASSPHRASE), kept)
    none = open_file(qcow(encrypted), kept)
    assert [item.is_locked for item in (wrong, right, none)] == [True, False, True]
    assert right.read(1) == b"\x22"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method["format"]))
def test_the_scanner_unlocks_with_the_credentials_it_is_given(method: dict[str, str], tmp_path: Path) -> None:
    qemu.need("mke2fs")
    disk = plaso_tools.make_disk(tmp_path, files=5)
    path = plaso_tools.encrypted("disk", **method)(tmp_path, disk).path
    scanner = volume_scanner.VolumeScanner()
    options = volume_scanner.VolumeScannerOptions()
    with pytest.raises(dfvfs_errors.ScannerError, match="Encrypted volume found"):
        scanner.GetBasePathSpecs(str(path), options=options)
    options.credentials = [("password", "wrong"), ("password", PASSPHRASE)]
    if method["format"] == "aes":  # nothing in the image tells a wrong password
        options.credentials = options.credentials[1:]
    [path_spec] = scanner.GetBasePathSpecs(str(path), options=options)
    assert path_spec.type_indicator == "EXT"
    names = [entry.name for entry in resolver.Resolver.OpenFileEntry(path_spec).sub_file_entries]
    assert "var" in names


def test_a_backing_file_of_its_own_encryption_locks_the_chain(make_image: Callable[..., Path], key_chain: Any) -> None:
    base = make_image("base.qcow2", "1M", "write -P 0x11 0 64k", secret=PASSPHRASE)
    top = make_image("top.qcow2", "1M")
    qemu.img("rebase", "-u", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    assert open_file(qcow(top)).is_locked
    key_chain.SetCredential(qcow(top), "password", PASSPHRASE)
    assert open_file(qcow(top)).read(16) == b"\x11" * 16


def test_the_keys_stay_in_the_process(encrypted: Path, key_chain: Any) -> None:
    key_chain.SetCredential(qcow(encrypted), "password", PASSPHRASE)
    kept = context.Context()
    file_object = open_file(qcow(encrypted), kept)
    first = opening.open_state(qcow(encrypted), kept)
    del file_object  # nobody holds the image, as between two files of a timeline
    assert opening.open_state(qcow(encrypted), kept) is first
    assert not first.disk.is_locked
