"""``vol``'s options for chains: several keys, a file for a name, no backing file. Images made by qemu-img."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from tests import qemu
from tests.image_builder import EXT_BACKING_FORMAT, Poke

pytest.importorskip("volatility3.framework", reason="volatility3 is absent")

from tests.volatility_tools import add_file, layers, new_context, vol

pytestmark = qemu.requires_qemu

KiB = 1 << 10
AES = {"format": "aes"}


def disk_layer(path: Path, **options: object) -> layers.Qcow2DiskLayer:
    context = new_context(**options)
    add_file(context, path.as_uri())
    context.config["disk.base_layer"] = "FileLayer"
    return layers.Qcow2DiskLayer(context, "disk", "disk")


def moved(folder: Path, name: str = "/srv/vm/gone.qcow2") -> tuple[Path, Path]:
    """Return an overlay with bytes 2, and its base with bytes 1 under another name in another folder."""
    (folder / "store").mkdir()
    base = qemu.create(folder / "store" / "base.qcow2", "1M")
    qemu.io(base, "write -P 1 0 1M")
    overlay = qemu.create(folder / "overlay.qcow2", "1M")
    qemu.io(overlay, "write -P 2 0 64k")
    Poke(overlay).names([(EXT_BACKING_FORMAT, b"qcow2")], name.encode())
    return overlay, base


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AES, {"format": "luks"}], ids=["legacy AES", "LUKS"])
def test_each_member_takes_its_own_of_several_key_files(
    kind: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("cryptography", reason="cryptography is absent")
    for name, secret, write in (("base", "low", "write -P 1 0 1M"), ("disk", "top", "write -P 2 0 64k")):
        below = {"backing": "base", "backing_format": "qcow2"} if name == "disk" else {}
        qemu.create(tmp_path / name, "1M", secret=secret, encrypt=kind, unsafe=True, **below)
        opened = {"backing.driver": "raw", "backing.file.filename": tmp_path / "base"} if below else None
        qemu.io(tmp_path / name, write, secret=secret, opts=opened)
        (tmp_path / f"{secret}.key").write_text(f"{secret}\n")
    keys = os.pathsep.join(str(tmp_path / name) for name in ("low.key", "top.key"))
    layer = disk_layer(tmp_path / "disk", key_file=keys)
    assert layer.read(0, 128 * KiB) == b"\2" * (64 * KiB) + b"\1" * (64 * KiB)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_doubt_about_a_legacy_aes_key_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("cryptography", reason="cryptography is absent")
    path = qemu.create(tmp_path / "disk", "1M", secret="right", encrypt=AES)
    qemu.io(path, "write -P 1 0 512k", secret="right")
    (tmp_path / "wrong.key").write_text("wrong\n")
    disk_layer(path, key_file=str(tmp_path / "wrong.key"))
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "legacy AES, which cannot tell a wrong passphrase, and this may be one" in warnings[0]


def test_a_file_for_a_name_and_no_backing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay, base = moved(tmp_path)
    name = "/srv/vm/gone.qcow2"
    whole = b"\2" * (64 * KiB) + b"\1" * (64 * KiB)
    assert disk_layer(overlay, backing_file=f"{name}={base}").read(0, 128 * KiB) == whole
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    layer = disk_layer(overlay, backing_file=f"{name}=link,format=qcow2")
    assert layer.read(0, 128 * KiB) == whole
    assert layer.context.layers[layer.dependencies[1]].location == base.as_uri()
    alone = b"\2" * (64 * KiB) + bytes(64 * KiB)
    assert disk_layer(overlay, no_backing=True).read(0, 128 * KiB) == alone
    monkeypatch.setenv("QCOW2_NO_BACKING", "1")
    assert disk_layer(overlay).read(0, 128 * KiB) == alone


def test_several_folders_are_separated_as_in_path(tmp_path: Path) -> None:
    overlay, base = moved(tmp_path, "/srv/vm/base.qcow2")
    folders = os.pathsep.join([str(tmp_path / "absent"), str(base.parent)])
    assert disk_layer(overlay, backing_folder=folders).read(64 * KiB, 512) == b"\1" * 512


@pytest.mark.slow
def test_vol_takes_the_options(tmp_path: Path) -> None:
    """An overlay that is refused says in the command's words what helps, and each of them does."""
    overlay, base = moved(tmp_path)
    refused = vol("-f", overlay, "layerwriter", "--list", cwd=tmp_path)
    assert "--qcow2-backing-file NAME=PATH" in refused.stderr
    for options in (("--qcow2-backing-file", f"/srv/vm/gone.qcow2={base}"), ("--qcow2-no-backing",)):
        found = vol(*options, "-f", overlay, "layerwriter", "--list", cwd=tmp_path)
        assert "not followed" not in found.stderr
        assert "gone.qcow2" not in found.stderr
