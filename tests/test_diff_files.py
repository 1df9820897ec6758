"""``diff`` names what the real tools did to a file system between two states."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics.cli import main
from tests import filesystems, qemu
from tests.conftest import EvidenceCase
from tests.filesystems import Made, make

pytest.importorskip("pytsk3", reason="pytsk3 is absent")

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("utc")
Diff = Callable[..., dict[str, Any]]


@pytest.fixture
def diff(capsys: pytest.CaptureFixture[str]) -> Diff:
    """Run ``diff --files --format json`` and return what it printed."""

    def run(image: Path, *options: str, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["diff", str(image), "--files", "--format", "json", *options]) == code
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def changes_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Changes by path, without directories: their times change with every name in them."""
    files = [item for item in result["files"] if (item["after"] or item["before"])["type"] != "d"]
    assert len({item["path"] for item in files}) == len(files)
    return {item["path"]: item for item in files}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def pair(tmp_path: Path, one: Made, two: Made) -> Path:
    return filesystems.states_of(tmp_path / "disk.qcow2", [("old", one.path), (None, two.path)])


# --- what the tools did -------------------------------------------------------------------------------


@qemu.requires_qemu
@pytest.mark.parametrize("kind", ["ext4", "ext2", "fat12"])
def test_added_removed_and_renamed_files_are_named(tmp_path: Path, kind: str, diff: Diff) -> None:
    one = make(tmp_path, kind)
    two = one.copy("two.raw")
    two.put("added.bin", random.Random(1).randbytes(9999))
    two.remove("letters.txt")
    two.rename("large.bin", "renamed.bin")
    found = changes_of(diff(pair(tmp_path, one, two), "--from", "old", "--hash"))
    named = {path: item["change"] for path, item in found.items() if item["change"] != "deleted"}
    assert named == {"/added.bin": "added", "/letters.txt": "removed", "/renamed.bin": "renamed"}
    assert found["/added.bin"]["after"]["sha256"] == digest(two.files["added.bin"])
    assert found["/added.bin"]["before"] is None
    assert found["/letters.txt"]["before"]["sha256"] == digest(one.files["letters.txt"])
    assert found["/renamed.bin"]["before"]["path"] == "/large.bin"
    assert "content" not in found["/renamed.bin"]["fields"]
    assert found["/renamed.bin"]["before"]["sha256"] == found["/renamed.bin"]["after"]["sha256"]
    assert found["/letters.txt"]["recoverable"] in ("yes", "partly")


@qemu.requires_qemu
@pytest.mark.parametrize("kind", ["ext4", "fat12", "ntfs"])
def test_content_changed_behind_unchanged_times_is_seen(tmp_path: Path, kind: str, diff: Diff) -> None:
    one = make(tmp_path, kind)
    two = one.copy("two.raw")
    raw = bytearray(two.path.read_bytes())
    at = raw.index(one.files["large.bin"][150_000:151_000])
    raw[at] ^= 0xFF
    two.path.write_bytes(raw)
    changed = bytearray(one.files["large.bin"])
    changed[150_000] ^= 0xFF
    result = diff(pair(tmp_path, one, two), "--from", "old", "--hash")
    found = changes_of(result)
    assert set(found) == {"/large.bin"}
    item = found["/large.bin"]
    assert (item["change"], item["fields"]) == ("content changed", ["content"])
    assert item["before"]["sha256"] == digest(one.files["large.bin"])
    assert item["after"]["sha256"] == digest(bytes(changed))
    assert [(entry["offset"], entry["length"]) for entry in result["ranges"]] == [(at // 512 * 512, 512)]
    assert item["changed_bytes"] == 512
    assert result["summary"]["bytes_in_no_file"] == 0


@qemu.requires_qemu
def test_slack_behind_the_end_of_a_file_is_no_change_of_its_content(tmp_path: Path, diff: Diff) -> None:
    one = make(tmp_path, "ext4")
    two = one.copy("two.raw")
    raw = bytearray(two.path.read_bytes())
    end = raw.index(one.files["large.bin"][-600:]) + 600
    raw[end : end + 4] = b"hide"
    two.path.write_bytes(raw)
    result = diff(pair(tmp_path, one, two), "--from", "old")
    assert len(result["ranges"]) == 1
    assert result["files"] == []


@qemu.requires_qemu
def test_changed_metadata_is_named_field_by_field(tmp_path: Path, diff: Diff) -> None:
    one = make(tmp_path, "ext4")
    two = one.copy("two.raw")
    two.debugfs("sif small.txt mode 0100600", "sif letters.txt uid 1000", "sif large.bin mtime 20200101120000")
    found = changes_of(diff(pair(tmp_path, one, two), "--from", "old"))
    assert {path: (item["change"], item["fields"]) for path, item in found.items()} == {
        "/small.txt": ("metadata changed", ["mode"]),
        "/letters.txt": ("metadata changed", ["uid"]),
        "/large.bin": ("metadata changed", ["modified"]),
    }
    assert found["/large.bin"]["after"]["modified"] == "2020-01-01T12:00:00.000000+00:00"


@qemu.requires_qemu
def test_a_file_replaced_by_another_of_its_name_is_content_and_inode(tmp_path: Path, diff: Diff) -> None:
    one = make(tmp_path, "ext4")
    two = one.copy("two.raw")
    two.put("other.bin", b"z" * 5000)
    two.remove("small.txt")
    two.put("small.txt", b"quite another text\n")
    found = changes_of(diff(pair(tmp_path, one, two), "--from", "old"))
    assert found["/small.txt"]["change"] == "content changed"
    assert {"content", "size"} <= set(found["/small.txt"]["fields"])


@qemu.requires_qemu
def test_changed_ntfs_streams_are_distinguished(tmp_path: Path, diff: Diff) -> None:
    one = make(tmp_path, "ntfs")
    two = one.copy("two.raw")
    two.stream("small.txt", "hidden", b"other bytes " * 1000)
    two.put("new.txt", b"new and resident")
    found = changes_of(diff(pair(tmp_path, one, two), "--from", "old", "--hash"))
    assert found["/small.txt:hidden"]["change"] == "content changed"
    assert found["/small.txt:hidden"]["after"]["sha256"] == digest(b"other bytes " * 1000)
    assert found["/new.txt"]["change"] == "added"
    assert found["/new.txt"]["after"]["sha256"] == digest(b"new and resident")
    assert "content" not in found.get("/small.txt", {"fields": []})["fields"]


@qemu.requires_qemu
def test_a_file_made_and_deleted_in_between_is_a_recoverable_deleted_entry(tmp_path: Path, diff: Diff) -> None:
    one = make(tmp_path, "fat12")
    two = one.copy("two.raw")
    secret = random.Random(3).randbytes(12_345)
    two.put("SECRET.BIN", secret)
    two.put("LATER.BIN", b"x")  # no cluster of the deleted file is free before it
    two.remove("SECRET.BIN")
    found = changes_of(diff(pair(tmp_path, one, two), "--from", "old", "--hash"))
    (gone,) = [item for item in found.values() if item["change"] == "deleted"]
    assert gone["path"].upper().endswith("ECRET.BIN")
    assert gone["recoverable"] == "yes"
    assert gone["after"]["sha256"] == digest(secret)
    assert gone["after"]["allocated"] is False


@qemu.requires_qemu
def test_a_removed_file_whose_blocks_were_used_again_is_not_recoverable(tmp_path: Path, diff: Diff) -> None:
    one = make(tmp_path, "ext4", populated=False)
    one.put("victim.bin", random.Random(5).randbytes(400_000))
    two = one.copy("two.raw")
    two.remove("victim.bin")
    kept = two.copy("kept.raw")
    free = int(qemu.run("debugfs", "-R", "stats", two.path).text.split("Free blocks:")[1].split()[0])
    two.put("filler.bin", random.Random(6).randbytes((free - 100) * 1024))
    two.debugfs("sif filler.bin crtime 20300101000000")  # or it looks renamed: same inode, block and second
    over = changes_of(diff(pair(tmp_path, one, two), "--from", "old"))
    assert over["/victim.bin"]["recoverable"] == "no"
    (tmp_path / "disk.qcow2").unlink()
    left = changes_of(diff(pair(tmp_path, one, kept), "--from", "old"))
    assert left["/victim.bin"]["recoverable"] == "yes"


@qemu.requires_qemu
def test_a_file_that_claims_an_absurd_size_is_not_read(
    tmp_path: Path, diff: Diff, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make(tmp_path, "ext4")
    two = one.copy("two.raw")
    two.debugfs(f"sif large.bin size {1 << 43}")
    assert main(["diff", str(pair(tmp_path, one, two)), "--hash"]) == 0
    streams = capsys.readouterr()
    assert "/large.bin: not hashed: its size, 8796093022208 bytes" in streams.err
    assert f"300001 -> {1 << 43}" in streams.out


@qemu.requires_qemu
def test_each_partition_is_compared_with_itself(tmp_path: Path, diff: Diff) -> None:
    ones = [make(tmp_path, "ext4"), make(tmp_path, "fat12")]
    twos = [made.copy(f"{made.kind}-two.raw") for made in ones]
    twos[0].put("both.txt", b"in the first")
    twos[1].put("both.txt", b"in the second")
    before, _ = filesystems.disk_of(tmp_path, ones, "before.raw")
    after, offsets = filesystems.disk_of(tmp_path, twos, "after.raw")
    path = filesystems.states_of(tmp_path / "disk.qcow2", [("old", before), (None, after)])
    found = changes_of(diff(path))
    assert {name: item["change"] for name, item in found.items()} == {
        "/p1/both.txt": "added",
        "/p2/both.txt": "added",
    }
    assert [item["volume"]["offset"] for item in found.values()] == offsets
    assert [item["volume"]["type"] for item in found.values()] == ["ext4", "fat12"]


# --- the case ---------------------------------------------------------------------------------------


def test_the_case_names_what_came_and_went(evidence: EvidenceCase, diff: Diff) -> None:
    during = changes_of(diff(evidence.image, "--from", "before-incident", "--to", "during-incident", "--hash"))
    by_name = {path.rsplit("/", 1)[1]: item["change"] for path, item in during.items()}
    assert by_name[".cache_helper"] == "added"
    assert by_name["dropper.log"] == "added"
    assert by_name["secret_key.txt"] == "removed"
    implant = during["/p1/home/alice/.cache_helper"]["after"]
    assert implant["sha256"] == during["/p1/evil_implant"]["after"]["sha256"]
    after = changes_of(diff(evidence.image, "--from", "during-incident", "--to", "active"))
    assert {path.rsplit("/", 1)[1]: item["change"] for path, item in after.items()} == {
        ".cache_helper": "removed",
        "dropper.log": "removed",
        "readme.txt": "added",
    }
    assert after["/p1/home/alice/.cache_helper"]["recoverable"] == "yes"


# --- the command line ---------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    one = make(tmp_path, "ext4")
    two = one.copy("two.raw")
    two.put("added.txt", b"added")
    return pair(tmp_path, one, two)


@qemu.requires_qemu
def test_text_lists_ranges_and_with_files_the_files(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(image), "--from", "old"]) == 0
    ranges = capsys.readouterr().out
    assert "old -> active" in ranges
    assert "written" in ranges or "changed" in ranges
    assert main(["diff", str(image), "--from", "old", "--files"]) == 0
    files = capsys.readouterr()
    assert any(line.split()[:2] == ["added", "/added.txt"] for line in files.out.splitlines())
    assert files.err == ""  # no progress where there is no terminal
    assert main(["diff", str(image), "--from", "old", "--to", "1", "--files"]) == 0
    assert "the two states are equal\nno files differ\n" in capsys.readouterr().out


@qemu.requires_qemu
def test_every_json_line_is_an_object_with_its_kind(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--files"]):
        assert main(["diff", str(image), "--format", "jsonl", *options]) == 0
        kinds = [json.loads(line)["record"] for line in capsys.readouterr().out.splitlines()]
        assert kinds[0] == "states"
        assert kinds[-1] == "summary"
        assert "range" in kinds
        assert ("file" in kinds) == bool(options)


@qemu.requires_qemu
def test_the_body_file_is_read_by_mactime(image: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["diff", str(image), "--format", "body"]) == 0
    body = tmp_path / "body"
    body.write_text(capsys.readouterr().out)
    filesystems.need_tools("mactime")
    assert "[added, active] /added.txt" in qemu.run("mactime", "-b", body, "-d", "-z", "UTC").text


@qemu.requires_qemu
def test_an_overlay_is_compared_with_its_backing_disk_by_default(tmp_path: Path, diff: Diff) -> None:
    base = make(tmp_path, "ext4")
    two = base.copy("two.raw")
    two.put("added.txt", b"added")
    over = qemu.create(tmp_path / "over.qcow2", backing=base.path.name, backing_format="raw", cwd=tmp_path)
    filesystems._write_differences(over, base.path, two.path, 65536)
    result = diff(over)
    assert result["from"]["state"] == "backing"
    assert changes_of(result)["/added.txt"]["change"] == "added"


@qemu.requires_qemu
def test_bad_input_is_one_sentence_and_exit_code_2(
    image: Path, tmp_path: Path, make_image: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    single = make_image("single.qcow2", "1M")
    empty = make_image("empty.qcow2", "1M")
    qemu.snapshot(empty, "a")
    locked = qemu.create(tmp_path / "locked.qcow2", "1M", secret="pw", encrypt={"format": "aes"})
    qemu.snapshot(locked, "a", secret="pw")
    for arguments, sentence in (
        ([image, "--from", "nope"], "no snapshot 'nope'; the image holds: 1 (old)"),
        ([single], "holds one state only"),
        ([single, "--from", "backing"], "has no backing file"),
        ([empty, "--files"], "no file system was found in"),
        ([locked], "encrypted"),
        ([tmp_path / "missing"], "No such file"),
        ([image.with_name("two.raw")], "is not a QCOW image"),
    ):
        assert main(["diff", *map(str, arguments)]) == 2
        streams = capsys.readouterr()
        assert sentence in streams.err, streams.err
        assert streams.err.count("\n") == 1
        assert "Traceback" not in streams.err


@qemu.requires_qemu
def test_files_without_pytsk3_name_the_extra(
    image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["diff", str(image)]) == 0
    capsys.readouterr()
    assert main(["diff", str(image), "--files"]) == 2
    assert "pip install 'qcow2-forensics[tsk]'" in capsys.readouterr().err


@qemu.requires_qemu
def test_names_from_evidence_cannot_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make(tmp_path, "ext4", populated=False)
    two = one.copy("two.raw")
    (tmp_path / "content").write_bytes(b"x")
    two.debugfs(f'write {tmp_path / "content"} "evil\x1b]0;pwned\x07\u202e.txt"')
    path = pair(tmp_path, one, two)
    for form in ("text", "json", "jsonl", "body"):
        assert main(["diff", str(path), "--files", "--format", form]) == 0
        out = capsys.readouterr().out
        assert "evil\\" in out
        assert not any(character in out for character in "\x1b\x07\u202e")


@qemu.requires_qemu
def test_ranges_that_cannot_be_read_make_the_exit_code_2(
    make_image: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_image("disk.qcow2", "1M", "write -P 1 0 256k")
    qemu.snapshot(path, "old")
    qemu.io(path, "write -P 2 0 256k")
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 65536)  # the last cluster written
    assert main(["diff", str(path)]) == 2
    streams = capsys.readouterr()
    assert "unreadable" in streams.out
    assert "could not be read and was not compared" in streams.err
