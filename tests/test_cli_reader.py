"""``info``, ``map`` and ``export``: QEMU's own answers, one-sentence errors, evidence left alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qcow2_forensics as q
from qcow2_forensics.cli import export, main
from tests import hostile, qemu
from tests.image_builder import EXT_BACKING_FORMAT, PASSPHRASE, Builder, Poke, base_b, base_s, empty
from tests.matrix import AES, PLAIN, Scenario, make
from tests.tiers import every, quick

pytestmark = qemu.requires_qemu

MiB = 1 << 20

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process; returns exit code, output, errors."""
    monkeypatch.delenv("QCOW2_PASSPHRASE", raising=False)
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115 - no terminal to ask on

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def refused(result: tuple[int, str, str]) -> str:
    """Return the one sentence of a failed command."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("qcow2-forensics: ")
    assert err.count("\n") == 1
    assert err.isprintable() or err.strip().isprintable()
    return err


# --- map ------------------------------------------------------------------------------------------


def _rows(text: str, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return qemu.as_map_json(json.loads(text), wanted)


@pytest.mark.parametrize(
    "scenario", every(3, [*PLAIN[::9], Scenario(65536, encrypt=AES)]), ids=lambda scenario: scenario.id
)
def test_map_json_is_that_of_qemu_img_map(
    scenario: Scenario, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = make(scenario, tmp_path)[0]
    wanted = qemu.map_json(view.path, **view.oracle)
    if view.passphrase is not None:
        pytest.importorskip("cryptography", reason="cryptography is absent")
        monkeypatch.setenv("QCOW2_PASSPHRASE", view.passphrase)
    code, out, _ = run("map", view.path, "--format", "json")
    assert code == 0
    assert _rows(out, wanted) == wanted
    code, lines, _ = run("map", view.path, "--format", "jsonl")
    assert [json.loads(line) for line in lines.splitlines()] == json.loads(out)


def test_map_json_marks_compressed_clusters(run: Run, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"text" * 50_000 + random.Random(1).randbytes(300_000))
    qemu.img("convert", "-c", "-O", "qcow2", tmp_path / "raw", tmp_path / "disk")
    rows = json.loads(run("map", tmp_path / "disk", "--format", "json")[1])
    assert list(rows[0]) == ["start", "length", "depth", "present", "zero", "data", "compressed"]
    assert {row["compressed"] for row in rows} == {True, False}
    assert all(row["data"] and "offset" in row for row in rows if not row["compressed"])
    assert all(row["data"] and "offset" not in row for row in rows if row["compressed"])


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_map_looks_through_preallocation_as_qemu_does(
    preallocation: str, run: Run, make_image: Callable[..., Path]
) -> None:
    path = make_image("disk", "8M", "write -P 1 1M 100k", "write -z 3M 64k", preallocation=preallocation)
    wanted = qemu.map_json(path)
    assert _rows(run("map", path, "--format", "json")[1], wanted) == wanted


def test_map_shows_the_holes_of_a_sparse_raw_backing_file(run: Run, tmp_path: Path) -> None:
    with (tmp_path / "base.raw").open("wb") as base:
        base.truncate(3 * MiB + 100)
        for at in (0, MiB, 3 * MiB):
            base.seek(at)
            base.write(b"x" * 50)
    path = qemu.create(tmp_path / "disk", "4M", backing="base.raw", backing_format="raw", cwd=tmp_path)
    qemu.io(path, "write -P 1 1536k 64k", "write -z 2M 64k", "discard 2M 4k")
    wanted = qemu.map_json(path)
    rows = _rows(run("map", path, "--format", "json")[1], wanted)
    assert rows == wanted
    assert any(row["depth"] == 1 and row["zero"] and not row["data"] for row in rows)


def test_map_text_names_every_kind(run: Run, tmp_path: Path) -> None:
    path = base_b(tmp_path / "disk")
    Poke(path).set_bits(0x40008, 1)
    out = run("map", path)[1]
    assert [line.split()[2] for line in out.splitlines()[1:]] == ["data", "zero", "data", "absent"]


def test_map_of_an_empty_disk_is_that_of_qemu(run: Run, make_image: Callable[..., Path]) -> None:
    path = make_image("disk", 0)
    wanted = qemu.map_json(path)
    assert _rows(run("map", path, "--format", "json")[1], wanted) == wanted


def test_map_of_a_snapshot_is_that_of_the_snapshot(run: Run, tmp_path: Path) -> None:
    path = base_s(tmp_path / "disk")
    for name in ("s1", "1", "2"):
        rows = json.loads(run("map", path, "--snapshot", name, "--format", "json")[1])
        with q.open_disk(path, name) as disk:
            assert rows[0]["offset"] == next(iter(disk.extents())).host_offset
        assert sum(row["length"] for row in rows) == MiB


# --- info -----------------------------------------------------------------------------------------


def test_info_json_gives_every_header_field_with_its_offset(run: Run, tmp_path: Path) -> None:
    path = base_s(tmp_path / "disk")
    facts = json.loads(run("info", path, "--format", "json")[1])
    data = path.read_bytes()
    for name, field in facts["header"].items():
        stored = int.from_bytes(data[field["offset"] : field["offset"] + field["length"]], "big")
        assert name == "magic" or field["value"] == stored, name
    assert len(facts["header"]) == 19
    assert [entry["name"] for entry in facts["snapshots"]] == ["s1", "s2"]
    for entry in facts["snapshots"]:
        assert int.from_bytes(data[entry["offset"] : entry["offset"] + 8], "big") == entry["l1_table_offset"]


def test_info_agrees_with_qemu_img_info(run: Run, make_image: Callable[..., Path]) -> None:
    path = make_image("disk", "5M", compat="1.1", lazy_refcounts="on", cluster_size="32k", refcount_bits=8)
    qemu.bitmap(path, "--add", "b", "-g", "65536")
    facts = json.loads(run("info", path, "--format", "json")[1])
    shown = qemu.info_json(path)
    assert facts["virtual_size"] == shown["virtual-size"]
    assert facts["cluster_size"] == shown["cluster-size"]
    assert facts["compatible_features"] == ["lazy_refcounts"]
    assert facts["compression"] == shown["format-specific"]["data"]["compression-type"]
    assert [(b["name"], b["granularity"]) for b in facts["bitmaps"]] == [("b", 65536)]
    text = run("info", path)[1]
    assert "lazy_refcounts" in text
    assert "0x0068  compression_type" in text


@pytest.mark.parametrize("ident", quick(hostile.IMAGES, hostile.REPRESENTATIVE))
def test_info_describes_every_hostile_image(ident: str, run: Run, tmp_path: Path) -> None:
    path = hostile.build(ident, tmp_path)
    for form in ("text", "json"):
        code, out, err = run("info", path, "--format", form)
        assert (code, err) == (0, "")
        assert all(line.isprintable() for line in out.splitlines())


def test_names_from_the_image_are_escaped(run: Run, tmp_path: Path) -> None:
    name = b"a\x1b[31m\xff\xe2\x80\xae\r\nb"
    path = empty(tmp_path / "disk")
    Poke(path).names([(EXT_BACKING_FORMAT, b"\x1b[2J"), (0x12345678, b"x")], name)
    for form in ("text", "json"):
        code, out, _ = run("info", path, "--format", form)
        assert code == 0
        assert all(line.isprintable() and line.isascii() for line in out.splitlines())
    assert json.loads(run("info", path, "--format", "json")[1])["backing_file"] == name.decode(
        "utf-8", "surrogateescape"
    )
    assert r"a\x1b[31m\xff\u202e\x0d\x0ab" in run("info", path)[1]
    refused(run("map", path))


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", every(3, PLAIN[4::17]), ids=lambda scenario: scenario.id)
def test_export_writes_the_bytes_of_qemu(scenario: Scenario, run: Run, tmp_path: Path) -> None:
    for index, view in enumerate(make(scenario, tmp_path)):
        out = tmp_path / f"out{index}.raw"
        extra = [] if view.snapshot is None else ["--snapshot", view.snapshot]
        code, text, _ = run("export", view.path, out, *extra, "--format", "json")
        assert code == 0
        wanted = qemu.raw_bytes(view.path, snapshot=view.snapshot, **view.oracle)
        assert out.read_bytes() == wanted
        summary = json.loads(text)
        assert summary["sha256"] == hashlib.sha256(wanted).hexdigest()
        assert summary["size"] == len(wanted)


_MANY_PIECES = {
    "stored": "cluster_size=4k",
    "zlib": "cluster_size=64k",
    "zstd, clusters larger than a piece": "cluster_size=2M,compression_type=zstd",
}


@pytest.mark.parametrize("part", [MiB, 1000], ids=["whole", "in parts"])
@pytest.mark.parametrize("kind", every(3, _MANY_PIECES))
def test_export_in_many_pieces_writes_the_bytes_of_qemu(
    kind: str, part: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, path, out = tmp_path / "disk.raw", tmp_path / "disk.qcow2", tmp_path / "out.raw"
    chance = random.Random(1)
    words = [chance.randbytes(7) for _ in range(300)]
    pieces = (b"".join(chance.choices(words, k=9400))[:65536] if number % 5 else bytes(65536) for number in range(150))
    raw.write_bytes(b"".join(pieces) + b"end".ljust(512, b"!"))
    packed = [] if kind == "stored" else ["-c"]
    qemu.img("convert", *packed, "-O", "qcow2", "-o", _MANY_PIECES[kind], raw, path)
    write = os.pwrite
    monkeypatch.setattr(export, "_PIECE", 65536)
    monkeypatch.setattr(os, "pwrite", lambda where, data, offset: write(where, data[:part], offset))
    code, text, _ = run("export", path, out, "--format", "json")
    assert code == 0
    assert out.read_bytes() == raw.read_bytes() == qemu.raw_bytes(path)
    assert json.loads(text)["sha256"] == hashlib.sha256(raw.read_bytes()).hexdigest()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_an_export_that_fails_on_the_way_has_no_writer_left_and_leaves_nothing(
    error: BaseException, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tmp_path / "disk", tmp_path / "out"
    folder.mkdir()
    qemu.create(path, "4M")
    qemu.io(path, "write -P 0x5a 0 4M")
    running: set[int] = set()

    def slow(_where: int, data: bytes, offset: int) -> int:
        running.add(offset)
        time.sleep(0.02)
        running.remove(offset)
        if offset == 5 * 65536:
            raise error
        return len(data)

    monkeypatch.setattr(export, "_PIECE", 65536)
    monkeypatch.setattr(os, "pwrite", slow)
    code, text, err = run("export", path, folder / "out.raw")
    assert not running
    assert (code, text) == ((2, "") if isinstance(error, OSError) else (130, ""))
    assert ("No space left" in err) is isinstance(error, OSError)
    assert list(folder.iterdir()) == []


def test_export_is_sparse(run: Run, make_image: Callable[..., Path], tmp_path: Path) -> None:
    path = make_image("disk", "1G", "write -P 1 500M 64k", "write -z 600M 64k")
    out = tmp_path / "out.raw"
    assert run("export", path, out, "--no-hash")[0] == 0
    assert out.stat().st_size == 1 << 30
    assert out.stat().st_blocks * 512 < 4 * MiB


def test_export_replaces_nothing_unless_asked(run: Run, tmp_path: Path) -> None:
    path = base_b(tmp_path / "disk")
    out = tmp_path / "out.raw"
    out.write_bytes(b"precious")
    assert "exists" in refused(run("export", path, out))
    assert out.read_bytes() == b"precious"
    assert run("export", path, out, "--force")[0] == 0
    assert out.stat().st_size == MiB


@pytest.mark.parametrize("victim", ["disk", "base.qcow2", "link", "hard"])
def test_export_never_writes_over_the_evidence(victim: str, run: Run, tmp_path: Path) -> None:
    base = base_b(tmp_path / "base.qcow2")
    path = empty(tmp_path / "disk")
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2")], b"base.qcow2")
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    before = {item: item.read_bytes() for item in (path, base)}
    refused(run("export", path, tmp_path / victim, "--force"))
    assert {item: item.read_bytes() for item in (path, base)} == before
    assert (tmp_path / "link").is_symlink()


def test_audit_never_writes_over_the_evidence(run: Run, tmp_path: Path) -> None:
    path = base_b(tmp_path / "disk")
    before = path.read_bytes()
    refused(run("audit", path, "--output", path, "--force"))
    refused(run("audit", path, path, "--output", path, "--force"))
    refused(run("audit", path, base_b(tmp_path / "second"), "--output", path, "--force"))
    refused(run("audit", path, base_b(tmp_path / "third"), "--resume", path))
    assert path.read_bytes() == before
    (tmp_path / "text").write_bytes(b"no line at all")
    refused(run("audit", path, "--resume", tmp_path / "text"))
    assert (tmp_path / "text").read_bytes() == b"no line at all"


def test_a_failed_export_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    path = base_b(tmp_path / "disk")
    Poke(path).l2(2, 0x70200)
    folder = tmp_path / "out"
    folder.mkdir()
    why = refused(run("export", path, folder / "out.raw"))
    assert "0x70200" in why
    assert "--salvage writes what can be read" in why
    assert list(folder.iterdir()) == []


def test_export_reads_past_the_end_only_when_asked(run: Run, tmp_path: Path) -> None:
    path = base_b(tmp_path / "disk")
    Poke(path).cut(0x60000)
    refused(run("export", path, tmp_path / "out.raw"))
    code, text, _ = run("export", path, tmp_path / "out.raw", "--eof", "zeros")
    assert code == 0
    assert "131072 bytes past the end of the image were filled with zeros" in text
    assert (tmp_path / "out.raw").read_bytes() == qemu.raw_bytes(path)


def test_export_into_no_folder_is_one_sentence(run: Run, tmp_path: Path) -> None:
    refused(run("export", base_b(tmp_path / "disk"), tmp_path / "no" / "out.raw"))


# --- options --------------------------------------------------------------------------------------


def test_backing_options_widen_or_ignore(run: Run, tmp_path: Path) -> None:
    store, case = tmp_path / "store", tmp_path / "case"
    store.mkdir()
    case.mkdir()
    base_b(store / "base.qcow2")
    path = empty(case / "disk")
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2")], b"../store/base.qcow2")
    assert "outside" in refused(run("map", path))
    for extra in (["--backing-dir", str(store)], ["--backing-file", f"../store/base.qcow2={store}/base.qcow2"]):
        wanted = qemu.map_json(path)
        assert _rows(run("map", path, "--format", "json", *extra)[1], wanted) == wanted
    assert [row["present"] for row in json.loads(run("map", path, "--format", "json", "--no-backing")[1])] == [False]


def test_a_backing_file_option_without_a_path_is_an_error_not_a_traceback(run: Run, tmp_path: Path) -> None:
    path = base_b(tmp_path / "disk")
    assert "NAME=PATH" in refused(run("map", path, "--backing-file", "nothing"))


def test_a_passphrase_comes_from_the_environment_or_a_file_never_from_the_command_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography", reason="cryptography is absent")
    path = qemu.create(tmp_path / "disk", "1M", secret=PASSPHRASE)
    qemu.io(path, "write -P 0x11 0 64k", secret=PASSPHRASE)
    out = tmp_path / "out.raw"
    assert "QCOW2_PASSPHRASE" in refused(run("export", path, out))
    (tmp_path / "key").write_text(PASSPHRASE + "\n")
    assert run("export", path, out, "--passphrase-file", tmp_path / "key")[0] == 0
    assert out.read_bytes()[:65536] == b"\x11" * 65536
    monkeypatch.setenv("QCOW2_PASSPHRASE", PASSPHRASE)
    assert run("export", path, out, "--force")[0] == 0
    monkeypatch.setenv("QCOW2_PASSPHRASE", "wrong")
    assert "passphrase" in refused(run("export", path, tmp_path / "second.raw"))
    assert not (tmp_path / "second.raw").exists()


@pytest.mark.parametrize("command", ["info", "map", "export"])
@pytest.mark.parametrize("what", ["missing", "text", "folder", "empty", "fifo"])
def test_what_is_no_image_is_one_sentence(command: str, what: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    if what == "text":
        path.write_text("hello")
    elif what == "folder":
        path.mkdir()
    elif what == "empty":
        path.touch()
    elif what == "fifo":
        os.mkfifo(path)
    refused(run(command, path, *([tmp_path / "out"] if command == "export" else [])))


def test_an_unknown_snapshot_is_one_sentence_with_the_choices(run: Run, tmp_path: Path) -> None:
    path = base_s(tmp_path / "disk")
    assert "1 (s1), 2 (s2)" in refused(run("map", path, "--snapshot", "nope"))


def test_a_reader_of_our_output_may_go_away(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=9, size=4 * MiB)
    for index in range(0, 8192, 2):
        builder.data(index * 512, b"\x11" * 512)
    path = builder.write(tmp_path / "disk")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "qcow2_forensics", "map", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait(60)


def test_no_command_changes_the_evidence(run: Run, tmp_path: Path) -> None:
    base = base_b(tmp_path / "base.qcow2")
    path = base_s(tmp_path / "disk")
    before = {item.name: _state(item) for item in (base, path)}
    tmp_path.chmod(0o700)
    for command in ("info", "map"):
        assert run(command, path)[0] == 0
    (tmp_path / "out").mkdir()
    assert run("export", path, tmp_path / "out" / "x.raw")[0] == 0
    assert {item.name: _state(item) for item in (base, path)} == before
    assert {item.name for item in tmp_path.iterdir()} == {"base.qcow2", "disk", "out"}


def _state(path: Path) -> tuple[Any, ...]:
    status = path.stat()
    return hashlib.sha256(path.read_bytes()).hexdigest(), status.st_mtime_ns, status.st_size, status.st_mode
