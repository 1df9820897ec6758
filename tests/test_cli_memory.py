"""``qcow2-forensics memory``: what it writes, what it prints, what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest

from qcow2_forensics.cli import main
from tests import qemu
from tests.conftest import EvidenceCase
from tests.stream_builder import PAGE, cmos, configuration, devices, page, ram, sizes, stream

MiB, GiB = 1 << 20, 1 << 30
CONTENT = bytes(range(256)) * 16


def sparse_stream(below: int = GiB, above: int = 3 * GiB) -> bytes:
    """Two pages of data, the second at the split of the RAM, 15 of zeros, and the rest never sent."""
    records = page(0, CONTENT, "pc.ram") + b"".join(page(n, 0) for n in range(1, 15))
    records += page(16, 0) + page(below // PAGE, CONTENT)
    body = ram(sizes({"pc.ram": below + above}), records)
    return stream(configuration(), body, devices([("mc146818rtc", cmos(below, above))]))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "guest.qevm"
    path.write_bytes(sparse_stream())
    return path


def test_raw_is_the_padded_image_sparse_and_hashed(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = 64 * MiB  # QEMU's own placing: a machine of this size has nothing above 4 GiB
    body = ram(sizes({"pc.ram": size}), page(0, CONTENT, "pc.ram") + page(1, 0) + page(size // PAGE - 2, CONTENT))
    image.write_bytes(stream(configuration(), body, devices([("mc146818rtc", cmos(size, 0))])))
    out = image.with_name("memory.raw")
    assert main(["memory", str(image), str(out)]) == 0
    status = out.stat()
    assert status.st_size == size
    assert status.st_blocks * 512 < MiB
    data = out.read_bytes()
    assert data == CONTENT + bytes(size - 3 * PAGE) + CONTENT + bytes(PAGE)
    shown = capsys.readouterr()
    assert f"sha256 {hashlib.sha256(data).hexdigest()}" in shown.out
    assert f"{size - 3 * PAGE} bytes of RAM are not in the stream: zeros" in shown.out
    assert shown.err == ""


def test_memory_above_4_gib_lies_there_in_a_raw_file(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = image.with_name("memory.raw")
    assert main(["memory", str(image), str(out), "--no-hash"]) == 0
    assert "sha256" not in capsys.readouterr().out
    assert out.stat().st_size == 7 * GiB
    assert out.stat().st_blocks * 512 < MiB
    with out.open("rb") as file:
        assert file.read(2 * PAGE) == CONTENT + bytes(PAGE)
        file.seek(4 * GiB)
        assert file.read(2 * PAGE) == CONTENT + bytes(PAGE)


def test_lime_segments_are_the_valid_ranges(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = image.with_name("memory.lime")
    assert main(["memory", str(image), str(out), "--format", "lime", "--summary", "json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    data = out.read_bytes()
    assert summary["sha256"] == hashlib.sha256(data).hexdigest()
    assert summary["size"] == len(data)
    segments = []
    while data:
        magic, version, first, last = struct.unpack_from("<IIQQ", data)
        assert (magic, version) == (0x4C694D45, 1)
        segments.append((first, data[32 : 32 + last - first + 1]))
        data = data[32 + last - first + 1 :]
    assert segments == [(0, CONTENT + bytes(14 * PAGE)), (16 * PAGE, bytes(PAGE)), (4 * GiB, CONTENT)]
    assert [(region["address"], region["length"]) for region in summary["regions"]] == [(0, GiB), (4 * GiB, 3 * GiB)]
    assert summary["missing_bytes"] == 4 * GiB - 17 * PAGE


def test_stream_is_copied_as_it_is(image: Path) -> None:
    out = image.with_name("copy")
    assert main(["memory", str(image), str(out), "--format", "stream"]) == 0
    assert out.read_bytes() == sparse_stream()


def test_an_existing_file_is_replaced_only_by_force(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = image.with_name("out")
    out.write_text("precious")
    assert main(["memory", str(image), str(out), "--format", "stream"]) == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert main(["memory", str(image), str(out), "--format", "stream", "--force"]) == 0
    assert out.read_bytes() == sparse_stream()


def test_failure_and_interrupt_leave_nothing_behind(
    image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qcow2_forensics.memory import GuestMemory

    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(GuestMemory, "read", interrupted)
    assert main(["memory", str(image), str(image.with_name("out"))]) == 130
    assert capsys.readouterr().err.strip() == "qcow2-forensics: interrupted"
    assert list(image.parent.iterdir()) == [image]


def test_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "cut": sparse_stream()[:3000],
        "text": b"no image at all" * 40,
        "unknown": stream(configuration("s390-\x1b[31m"), ram(sizes({"s390.ram": PAGE}), b""), b"\0"),
    }
    for name, data in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        assert main(["memory", str(path), str(tmp_path / "out")]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert len(shown.err.splitlines()) == 1
        assert shown.err.startswith("qcow2-forensics: ")
        assert "\x1b" not in shown.err
    assert main(["memory", str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(cases)


def test_a_stream_that_ends_early_is_taken_as_far_as_it_goes_when_asked(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image.write_bytes(sparse_stream()[: 4200 + 5 * 9])
    out = image.with_name("out")
    assert main(["memory", str(image), str(out)]) == 2
    assert "ends at" in capsys.readouterr().err
    command = ["memory", str(image), str(out), "--allow-truncated", "--format", "lime", "--summary", "json"]
    assert main(command) == 0
    summary = json.loads(capsys.readouterr().out)
    assert not summary["complete"]
    assert 4 * GiB - 16 * PAGE < summary["missing_bytes"] < 4 * GiB - PAGE
    assert out.read_bytes()[32 : 32 + PAGE] == CONTENT


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["memory", "--help"])
    assert stop.value.code == 0
    assert "--snapshot before-incident --format lime" in capsys.readouterr().out


@pytest.mark.slow
def test_evidence_snapshots_are_exported_as_qemu_saw_them(
    evidence: EvidenceCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for snapshot, truth in evidence.truth["guest_memory"].items():
        out = tmp_path / "memory.raw"
        assert main(["memory", str(evidence.image), str(out), "--snapshot", snapshot, "--force"]) == 0
        data = out.read_bytes()
        assert hashlib.sha256(data).hexdigest() in capsys.readouterr().out
        assert len(data) == truth["size"]
        for item in truth["ranges"]:
            part = data[item["address"] : item["address"] + item["length"]]
            assert hashlib.sha256(part).hexdigest() == item["sha256"]
        assert main(
            ["memory", str(evidence.image), str(out), "--snapshot", snapshot, "--force", "--format", "stream"]
        ) == 0  # fmt: skip
        assert hashlib.sha256(out.read_bytes()).hexdigest() == evidence.truth["vm_state"][snapshot]["sha256"]
    assert main(["memory", str(evidence.image), str(tmp_path / "x"), "--snapshot", "third"]) == 2
    assert "1 (before-incident), 2 (during-incident)" in capsys.readouterr().err


@qemu.requires_qemu
def test_an_image_without_memory_is_an_error_in_plain_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = qemu.create(tmp_path / "plain.qcow2", "1M")
    qemu.snapshot(image, "one")
    assert main(["memory", str(image)]) == 2
    assert "no snapshot holds memory; the image holds: 1 (one)" in capsys.readouterr().err
