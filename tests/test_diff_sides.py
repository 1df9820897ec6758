"""``diff`` of two files, of an overlay without its base, and of what a dirty bitmap marks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics.cli import main
from tests import filesystems, qemu
from tests.filesystems import make
from tests.tiers import quick

pytest.importorskip("pytsk3", reason="pytsk3 is absent")

Diff = Callable[..., dict[str, Any]]


@pytest.fixture
def diff(capsys: pytest.CaptureFixture[str]) -> Diff:
    def run(*arguments: object, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["diff", *map(str, arguments), "--files", "--format", "json"]) == code
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def named(result: dict[str, Any]) -> dict[str, str]:
    return {
        item["path"]: item["change"] for item in result["files"] if (item["after"] or item["before"])["type"] == "r"
    }


@qemu.requires_qemu
@pytest.mark.parametrize("second", quick(["qcow2", "raw", "vmdk", "vpc"], ["qcow2", "raw"]))
def test_two_files_are_compared_whatever_their_formats(tmp_path: Path, second: str, diff: Diff) -> None:
    if second in ("vmdk", "vpc"):
        pytest.importorskip({"vmdk": "pyvmdk", "vpc": "pyvhdi"}[second], reason=f"no reader of {second}")
    one = make(tmp_path, "ext4")
    two = one.copy("two.raw")
    two.put("added.bin", random.Random(1).randbytes(9999))
    two.remove("letters.txt")
    before, after = tmp_path / "before.qcow2", tmp_path / f"after.{second}"
    qemu.img("convert", "-O", "qcow2", one.path, before)
    options = ["-o", "force_size=on"] if second == "vpc" else []
    qemu.img("convert", "-O", second, *options, two.path, after)
    result = diff(before, after)
    assert named(result) == {"/added.bin": "added", "/letters.txt": "removed"}
    assert (result["from"]["image"], result["to"]["image"]) == (str(before), str(after))
    assert result["to"]["state"] == ("active" if second == "qcow2" else second)
    assert named(diff(after, before)) == {"/added.bin": "removed", "/letters.txt": "added"}


@pytest.mark.parametrize("failing", [1, 2], ids=["before", "after"])
def test_names_below_a_folder_that_one_state_cannot_list_are_neither_added_nor_removed(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qcow2_forensics.files.sleuthkit import SleuthKitFileSystem

    one = make(tmp_path, "ext4")
    two = one.copy("two.raw")
    two.put("added.txt", b"added")
    two.remove("letters.txt")
    calls = []
    listed = SleuthKitFileSystem._directory

    def directory(system: SleuthKitFileSystem, inode: int, path: str, *, deleted: bool = False) -> list[Any]:
        calls.append(path)
        if path == "/folder" and calls.count(path) == failing:
            system.note_problem(path, OSError("it does not open"), deleted=deleted)
            return []
        return listed(system, inode, path, deleted=deleted)

    monkeypatch.setattr(SleuthKitFileSystem, "_directory", directory)
    assert main(["diff", str(one.path), str(two.path), "--files", "--format", "json"]) == 2
    streams = capsys.readouterr()
    changes = {path: change for path, change in named(json.loads(streams.out)).items() if change != "deleted"}
    assert changes == {"/added.txt": "added", "/letters.txt": "removed"}
    assert "of the other state not compared, in folders that are not listed" in streams.err


@qemu.requires_qemu
def test_states_of_two_files_are_chosen_in_each(tmp_path: Path, diff: Diff) -> None:
    one = make(tmp_path, "ext4")
    two = one.copy("two.raw")
    two.put("added.txt", b"added")
    three = two.copy("three.raw")
    three.put("later.txt", b"later")
    left = filesystems.states_of(tmp_path / "left.qcow2", [("old", one.path), (None, three.path)])
    right = filesystems.states_of(tmp_path / "right.qcow2", [("old", two.path), (None, three.path)])
    assert named(diff(left, right, "--from", "old", "--to", "old")) == {"/added.txt": "added"}
    assert named(diff(left, right)) == {}


@qemu.requires_qemu
def test_a_raw_file_has_no_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make(tmp_path, "ext4")
    assert main(["diff", str(one.path), str(one.path), "--from", "1"]) == 2
    assert "is not a QCOW image and has no states" in capsys.readouterr().err


@qemu.requires_qemu
def test_states_of_an_overlay_do_not_need_the_base_for_what_both_leave_to_it(
    tmp_path: Path, diff: Diff, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make(tmp_path, "ext4")
    two = one.copy("two.raw")
    two.put("added.txt", b"added")
    size = one.path.stat().st_size
    base = tmp_path / "base.raw"
    base.write_bytes(one.path.read_bytes())
    with base.open("r+b") as stream:
        stream.truncate(size)
    over = qemu.create(tmp_path / "over.qcow2", backing="base.raw", backing_format="raw", cwd=tmp_path)
    # All that the file system needs is in the overlay, and the free end of the disk is left to the base.
    end = size - (2 << 20)
    (tmp_path / "start").write_bytes(one.path.read_bytes()[:end])
    qemu.io(over, f"write -s {tmp_path / 'start'} 0 {end}")
    qemu.snapshot(over, "old")
    filesystems._write_differences(over, one.path, two.path, 65536)
    expected = diff(over, "--from", "old")
    base.unlink()
    result = diff(over, "--from", "old")
    assert (result["ranges"], result["files"]) == (expected["ranges"], expected["files"])
    assert named(result) == {"/added.txt": "added"}
    assert main(["diff", str(over), "--from", "old"]) == 0
    assert "what both states leave to it is equal" in capsys.readouterr().err
    qemu_side = qemu.io  # what only one state leaves to the base cannot be compared, and is reported
    base.write_bytes(one.path.read_bytes())
    qemu_side(over, f"write -P 7 {end} 64k")
    base.unlink()
    assert main(["diff", str(over), "--from", "old"]) == 2
    streams = capsys.readouterr()
    assert "1 range of 64 KiB could not be compared" in streams.out
    assert "base.raw" in streams.err
    assert main(["diff", str(over), "--from", "old", "--format", "json"]) == 2
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert (summary["bytes_not_compared"], summary["changes"]["unreadable"]) == (65536, 1)
    assert main(["diff", str(over), "--from", "backing"]) == 2


@qemu.requires_qemu
def test_files_in_ranges_that_a_bitmap_marks(tmp_path: Path, diff: Diff, capsys: pytest.CaptureFixture[str]) -> None:
    one = make(tmp_path, "ext4")
    image = tmp_path / "disk.qcow2"
    qemu.img("convert", "-O", "qcow2", one.path, image)
    qemu.img("bitmap", "--add", "-g", "4096", image, "daily")
    two = one.copy("two.raw")
    raw = bytearray(two.path.read_bytes())
    at = raw.index(one.files["large.bin"][150_000:151_000])
    qemu.io(image, f"write -P 0x5a {at} 512")
    result = diff(image, "--from", "bitmap:daily")
    assert named(result) == {"/large.bin": "marked"}
    (item,) = [item for item in result["files"] if item["path"] == "/large.bin"]
    assert item["before"] is None
    assert item["changed_bytes"] == 4096
    assert [entry["change"] for entry in result["ranges"]] == ["marked"]
    assert result["ranges"][0]["offset"] == at // 4096 * 4096
    assert main(["diff", str(image), "--from", "bitmap:daily", "--hash"]) == 0
    streams = capsys.readouterr()
    assert "4096 bytes in marked ranges" in streams.out
    assert "marks ranges of 4096 bytes" in streams.err
    for wanted, sentence in (("nope", "has no bitmaps 'nope'; it holds: daily"),):
        assert main(["diff", str(image), "--from", f"bitmap:{wanted}"]) == 2
        assert sentence in capsys.readouterr().err


@qemu.requires_qemu
def test_marked_structures_are_not_called_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mode of a file is in its inode: the bitmap marks what holds it, and no block of a file."""
    one = make(tmp_path, "ext4")
    image = tmp_path / "disk.qcow2"
    qemu.img("convert", "-O", "qcow2", one.path, image)
    qemu.img("bitmap", "--add", "-g", "4096", image, "daily")
    two = one.copy("two.raw")
    two.debugfs("sif small.txt mode 0104755")
    old, new = one.path.read_bytes(), two.path.read_bytes()
    places = [at for at in range(0, len(old), 512) if old[at : at + 512] != new[at : at + 512]]
    for at in places:
        piece = tmp_path / "piece"
        piece.write_bytes(new[at : at + 512])
        qemu.io(image, f"write -s {piece} {at} 512")
    assert main(["diff", str(image), "--from", "bitmap:daily", "--files"]) == 0
    text = capsys.readouterr().out
    assert "no files differ" not in text
    assert "no file that is listed has blocks in marked ranges" in text
    assert "names, times and owners may have been written too" in text


@qemu.requires_qemu
def test_a_snapshot_called_as_a_bitmap_is_meant_does_not_take_its_place(tmp_path: Path) -> None:
    from qcow2_forensics import SnapshotNotFound, open_image
    from qcow2_forensics.reader.states import choose, find_bitmap

    image = qemu.create(tmp_path / "disk.qcow2", "1M")
    qemu.img("bitmap", "--add", image, "daily")
    qemu.snapshot(image, "bitmap:daily")
    qemu.snapshot(image, "bitmap:other")
    with open_image(image) as opened:
        with pytest.raises(SnapshotNotFound, match="ambiguous") as refused:
            find_bitmap(opened, "bitmap:daily")
        bitmap, snapshot = (choice.partition(" (")[0] for choice in refused.value.choices)
        found = find_bitmap(opened, bitmap)
        assert found is not None
        assert found.name == "daily"
        assert find_bitmap(opened, snapshot) is None
        assert choose(opened, snapshot) is opened.snapshots[0]
        assert find_bitmap(opened, "bitmap:other") is None
        assert choose(opened, "bitmap:other") is opened.snapshots[1]


@qemu.requires_qemu
def test_a_bitmap_that_was_not_saved_is_not_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qcow2_forensics import open_image

    one = make(tmp_path, "ext4")
    image = tmp_path / "disk.qcow2"
    qemu.img("convert", "-O", "qcow2", one.path, image)
    qemu.img("bitmap", "--add", "-g", "65536", image, "daily")
    with open_image(image) as opened:
        (entry,) = opened.bitmaps
    with image.open("r+b") as stream:
        stream.seek(entry.offset + 12)
        stream.write((entry.flags | 1).to_bytes(4, "big"))
    assert main(["diff", str(image), "--from", "bitmap:daily"]) == 2
    assert "it may lack what was written" in capsys.readouterr().err
