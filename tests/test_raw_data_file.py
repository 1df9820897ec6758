"""An image and its raw data file say of each other what can be read from which. Made by qemu-img."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.audit import audit
from qcow2_forensics.cli import main
from qcow2_forensics.reader.raw_data import images_of
from tests import qemu
from tests.image_builder import EXT_DATA_FILE, Poke

pytestmark = [qemu.requires_qemu]


def make(folder: Path, raw: str = "on") -> Path:
    path = qemu.create(folder / "disk.qcow2", "1M", data_file=folder / "disk.raw", data_file_raw=raw)
    qemu.io(path, "write -P 7 64k 64k")
    Poke(path).names([(EXT_DATA_FILE, b"/srv/vm/disk.raw")])
    return path


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out + err


def test_the_image_says_that_its_raw_data_file_can_be_read_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)
    with q.open_disk(path) as disk:
        assert disk.read(0, disk.size) == (tmp_path / "disk.raw").read_bytes()
        assert any("disk.raw is declared to be the raw disk itself" in sentence for sentence in disk.notes)
    assert "declared to be the raw disk itself" in said(capsys, "info", path)[1]
    assert json.loads(said(capsys, "info", path, "--format", "json")[1])["data_file_raw"] is True
    assert "declared to be the disk itself" in said(capsys, "audit", path)[1]


def test_the_raw_data_file_names_the_image_to_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    wanted = "it is the raw data file of disk.qcow2"
    for command in (["info"], ["map"], ["export"]):
        out = [tmp_path / "out"] if command == ["export"] else []
        code, words = said(capsys, *command, tmp_path / "disk.raw", *out)
        assert (code, wanted in words) == (2, True), words
    finding = next(item for item in audit(tmp_path / "disk.raw").findings if item.code == "QCOW2-UNREADABLE")
    assert wanted in str(finding.evidence[1].value)


def test_a_data_file_that_is_not_raw_is_not_called_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path, raw="off")
    with q.open_disk(path) as disk:
        assert not any("raw disk itself" in sentence for sentence in disk.notes)
    code, words = said(capsys, "info", tmp_path / "disk.raw")
    assert (code, "it is the data file of disk.qcow2, which says where" in words) == (2, True), words


def test_only_images_of_its_own_folder_are_looked_at(tmp_path: Path) -> None:
    """Neither links, nor FIFOs, nor other folders; and an image that names another file is not named."""
    (tmp_path / "case").mkdir()
    (tmp_path / "other").mkdir()
    raw = tmp_path / "case" / "disk.raw"
    raw.write_bytes(bytes(1 << 20))
    image = make(tmp_path / "other")
    (tmp_path / "case" / "link.qcow2").symlink_to(image)
    os.symlink(f"{image.parent}/{'./' * 60}{image.name}", tmp_path / "case" / "long.qcow2")  # a link of a header's size
    os.mkfifo(tmp_path / "case" / "fifo.qcow2")
    (tmp_path / "case" / "cut.qcow2").write_bytes(b"QFI\xfb")
    assert images_of(str(raw)) == []
    assert images_of(str(tmp_path / "case" / "absent")) == []
    own = image.rename(tmp_path / "case" / "disk.qcow2")
    assert images_of(str(raw)) == [(str(own), True)]
    (tmp_path / "case" / "unrelated.raw").write_bytes(bytes(1 << 20))
    assert images_of(str(tmp_path / "case" / "unrelated.raw")) == []
