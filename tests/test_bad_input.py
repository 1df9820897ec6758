"""Bad input: one sentence on standard error, exit code 2, no traceback; from the API the documented error."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

import qcow2_forensics as q
from tests import qemu
from tests.command_line import Done, called, run
from tests.image_builder import EXT_CRYPTO, Builder, Poke, empty
from tests.tiers import every
from tests.work import assert_proportional

COMMANDS = ["info", "map", "snapshots", "audit"]


def _one_sentence(done: Done) -> str:
    assert done.code == 2, done.out + done.err
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("qcow2-forensics: ")
    return lines[0]


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    qemu.need()
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu.create(base, "1M")
    qemu.create(top, "1M", backing="base.qcow2", backing_format="qcow2")
    base.unlink()
    return top


@pytest.mark.parametrize("command", ["info", "map", "snapshots"])
@pytest.mark.parametrize("kind", every(3, ["missing", "folder", "empty", "text"]))
def test_what_is_no_image_is_one_sentence_and_exit_code_2(tmp_path: Path, command: str, kind: str) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"just some text\n" * 100)
    assert str(path) in _one_sentence(called(command, path))


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text"])
def test_export_of_what_is_no_image_leaves_no_output(tmp_path: Path, kind: str) -> None:
    path, out = tmp_path / kind, tmp_path / "out.raw"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"QFI\xfb")
    _one_sentence(called("export", path, out))
    assert sorted(item.name for item in tmp_path.iterdir()) == ([] if kind == "missing" else [kind])


def test_a_missing_backing_file_names_it_and_where_it_was_looked_for(overlay: Path) -> None:
    message = _one_sentence(run("map", overlay))
    assert "base.qcow2" in message
    assert str(overlay.parent) in message
    with pytest.raises(q.MissingFile) as caught:
        q.open_disk(overlay)
    assert caught.value.role == "backing"


def test_no_backing_reads_the_file_alone(overlay: Path) -> None:
    done = called("map", overlay, "--no-backing")
    assert done.code == 0, done.err


def test_a_missing_backing_file_can_raise_only_where_it_is_needed(overlay: Path) -> None:
    qemu.need()
    with q.open_disk(overlay, missing="raise") as disk, pytest.raises(q.MissingFile):
        disk.read(0, 512)
    with q.open_disk(overlay, missing="zeros") as disk:
        assert disk.read(0, 512) == bytes(512)
    with pytest.raises(q.MissingFile):
        q.open_disk(overlay)


def test_a_truncated_image_is_an_error_with_a_file_offset(tmp_path: Path) -> None:
    qemu.need()
    path, out = tmp_path / "cut.qcow2", tmp_path / "out.raw"
    qemu.create(path, "4M")
    qemu.io(path, "write -P 0x41 0 4M")
    os.truncate(path, path.stat().st_size // 2)
    message = _one_sentence(called("export", path, out))
    assert "file offset 0x" in message
    assert not out.exists()


def test_an_unknown_snapshot_lists_the_choices(tmp_path: Path) -> None:
    qemu.need()
    path = tmp_path / "s.qcow2"
    qemu.create(path, "1M")
    qemu.snapshot(path, "first")
    message = _one_sentence(called("map", path, "--snapshot", "nope"))
    assert "1 (first)" in message
    with pytest.raises(q.SnapshotNotFound) as caught:
        q.open_disk(path, "nope")
    assert caught.value.choices == ("1 (first)",)


def test_a_name_that_two_snapshots_share_is_ambiguous_and_an_id_is_not(tmp_path: Path) -> None:
    qemu.need()
    path = tmp_path / "s.qcow2"
    qemu.create(path, "1M")
    for _ in range(2):
        qemu.snapshot(path, "same")
    with pytest.raises(q.SnapshotNotFound) as caught:
        q.open_disk(path, "same")
    assert caught.value.ambiguous
    assert caught.value.choices == ("1 (same)", "2 (same)")
    with q.open_disk(path, "2") as disk:
        assert disk.snapshot is not None
        assert disk.snapshot.id == "2"


def test_an_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    qemu.need()
    path, out = tmp_path / "d.qcow2", tmp_path / "out.raw"
    qemu.create(path, "1M")
    out.write_bytes(b"precious")
    assert "exists" in _one_sentence(called("export", path, out))
    assert out.read_bytes() == b"precious"
    assert called("export", path, out, "--force").code == 0
    assert out.read_bytes() == bytes(2**20)


def test_a_wrong_command_line_is_exit_code_2() -> None:
    assert called("export").code == 2
    assert run("nonsense").code == 2


@pytest.mark.parametrize(
    "command",
    [
        "examine",
        "info",
        "audit",
        "snapshots",
        "map",
        "export",
        "memory",
        "diff",
        "timeline",
        "residue",
        "demo",
        "doctor",
    ],
)
def test_every_command_has_help_with_examples(command: str) -> None:
    done = called(command, "--help")
    assert done.code == 0
    assert "example" in done.out.lower(), done.out


# --- much of a small thing ------------------------------------------------------------------------


def _with_snapshots(path: Path, count: int) -> Path:
    """Write an image with so many equal entries in its snapshot table."""
    end = -(-empty(path).stat().st_size // 65536) * 65536
    entry = struct.pack(">QIHHIIQII", 0x10000, 1, 1, 7, 0, 0, 0, 0, 16) + bytes(16) + b"1aaaaaaa"
    Poke(path).cut(end).append(entry * count).u32(60, count).u64(64, end)
    return path


@pytest.mark.slow
@qemu.requires_qemu
def test_an_unknown_name_among_65536_snapshots_is_a_short_message(tmp_path: Path) -> None:
    path = _with_snapshots(tmp_path / "disk", 65536)
    with pytest.raises(q.SnapshotNotFound, match=r"and 65516 more$") as caught:
        q.open_disk(path, "nope")
    assert len(str(caught.value)) < 1000


@qemu.requires_qemu
def test_a_snapshot_costs_no_more_to_look_for_among_thousands(tmp_path: Path) -> None:
    paths = {count: _with_snapshots(tmp_path / f"{count}", count) for count in (512, 4096)}

    def look_for_none(count: int) -> None:
        with pytest.raises(q.SnapshotNotFound):
            q.open_disk(paths[count], "nope")

    assert_proportional(look_for_none, 512, 4096)


@pytest.mark.parametrize("kind", every(2, [0x12345678, EXT_CRYPTO]))
def test_header_extensions_are_counted_to_a_limit(kind: int, tmp_path: Path) -> None:
    most = q.DEFAULT_LIMITS.header_extensions
    path = Builder(cluster_bits=21).write(tmp_path / "disk")
    Poke(path).write(112, struct.pack(">II", 0x12345678, 0) * most)
    with q.open_disk(path) as disk:
        assert len(disk.image.extensions) == most
    Poke(path).write(112, struct.pack(">II", kind, 0) * ((2 << 20) // 8 - 14))
    with q.open_image(path) as image:
        assert len(image.extensions) == most
        assert any("more than 4096" in problem.message for problem in image.problems)
    with pytest.raises(q.FormatError):
        q.open_disk(path)
