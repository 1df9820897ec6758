"""Files that are written: sparse, hashed on the way, there under their name only when they are whole."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import inspect
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcow2_forensics as q
from qcow2_forensics.cli import main
from qcow2_forensics.errors import Qcow2Error
from qcow2_forensics.format.source import FileSource, remembering_sources
from qcow2_forensics.reader import signals, writer
from qcow2_forensics.reader.salvage import SalvagedDisk, mapfile
from qcow2_forensics.reader.tree_hash import TreeHash
from qcow2_forensics.reader.writer import Writer, atomic_writer, cache_file, data_stretches, whole_folder, writing
from tests import qemu
from tests.image_builder import Builder, Poke, base_b
from tests.tiers import quick

MiB = 1 << 20
BLOCK = 4096
COMMAND = [sys.executable, "-m", "qcow2_forensics"]


@given(
    st.lists(st.tuples(st.sampled_from([b"\0", b"\1"]), st.integers(1, 3 * BLOCK)), max_size=8), st.integers(0, 9000)
)
def test_what_is_left_out_is_aligned_blocks_of_zeros_and_nothing_else(
    runs: list[tuple[bytes, int]], offset: int
) -> None:
    data = b"".join(byte * count for byte, count in runs)
    left = set(range(len(data)))
    last = 0
    for start, end in data_stretches(data, offset):
        assert last <= start < end <= len(data)
        last = end
        left -= set(range(start, end))
    assert not any(data[at] for at in left)
    for first in range(-offset % BLOCK, len(data) - BLOCK + 1, BLOCK):
        if not any(data[first : first + BLOCK]):
            assert set(range(first, first + BLOCK)) <= left


@given(st.lists(st.one_of(st.binary(max_size=200), st.integers(0, 20_000)), max_size=8))
def test_a_file_and_a_pipe_get_the_same_bytes_and_the_hash_is_theirs(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes | int]
) -> None:
    folder = tmp_path_factory.mktemp("writer")
    wanted = b"".join(bytes(part) if isinstance(part, int) else part for part in parts)
    receiving, sending = os.pipe()
    with writing(folder / "file", hashes=("sha256", "md5")) as file:
        pipe = Writer(sending, sparse=False)
        for part in parts:
            for output in (file, pipe):
                output.zeros(part) if isinstance(part, int) else output.data(part)
            if pipe.size > 40_000:  # a pipe holds 64 KiB
                break
    os.close(sending)
    wanted = wanted[: file.size]
    with os.fdopen(receiving, "rb") as stream:
        assert stream.read() == wanted
    assert (folder / "file").read_bytes() == wanted
    assert file.hashes == {"sha256": hashlib.sha256(wanted).hexdigest(), "md5": hashlib.md5(wanted).hexdigest()}
    assert pipe.sha256 == file.sha256


def test_zeros_in_data_become_holes(tmp_path: Path) -> None:
    with writing(tmp_path / "file") as output:
        for _ in range(64):
            output.data(b"\1" * BLOCK + bytes(MiB - BLOCK))
    assert (tmp_path / "file").stat().st_size == 64 * MiB
    assert (tmp_path / "file").stat().st_blocks * 512 <= 64 * 2 * BLOCK


def _tree_hash(data: bytes) -> str:
    """Return the tree hash as its specification words it: level by level."""
    level = [hashlib.sha256(data[at : at + MiB]).digest() for at in range(0, len(data), MiB)]
    level = level or [hashlib.sha256(b"").digest()]
    while len(level) > 1:
        pairs = [level[at : at + 2] for at in range(0, len(level), 2)]
        level = [hashlib.sha256(b"".join(pair)).digest() if len(pair) == 2 else pair[0] for pair in pairs]
    return level[0].hex()


@given(st.lists(st.tuples(st.sampled_from([0, 0, 7]), st.integers(0, 5 * MiB)), max_size=4))
def test_the_tree_hash_is_that_of_all_bytes_whatever_are_holes(runs: list[tuple[int, int]]) -> None:
    tree = TreeHash()
    for byte, length in runs:
        tree.update(bytes([byte]) * length) if byte else tree.zeros(length)
    assert tree.hexdigest() == _tree_hash(b"".join(bytes([byte]) * length for byte, length in runs))


def test_the_tree_hash_of_many_tib_of_zeros_takes_no_time() -> None:
    tree = TreeHash()
    tree.zeros((1 << 45) + 123)
    assert len(tree.hexdigest()) == 64


@pytest.mark.parametrize("kind", ["file", "stream", "folder"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt(), SystemExit(143)])
def test_what_does_not_end_well_leaves_nothing(kind: str, error: BaseException, tmp_path: Path) -> None:
    manager = {"file": writing, "stream": atomic_writer, "folder": whole_folder}[kind]
    with pytest.raises(type(error)), manager(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


def _interrupted_at(step: int, work: Callable[[], None]) -> bool:
    """Do ``work`` with Ctrl-C at one of its steps, a line or a border of a function; return whether there are so many."""
    left = step
    # A call of anything else is one step.
    followed = {writer.__file__, signals.__file__, contextlib.__file__, __file__}

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        # No signal is looked at where a generator yields or is gone on with; what is raised there, no handler sees.
        left -= event == "line" or (event in ("call", "return") and not frame.f_code.co_flags & inspect.CO_GENERATOR)
        if left == 0:
            signal.raise_signal(signal.SIGINT)
        return trace if frame.f_code.co_filename in followed else None

    before = sys.gettrace()
    gc.disable()  # in what others have called by the collector, an exception ends nothing
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
        gc.enable()
    return left <= 0


@pytest.mark.parametrize(
    ("kind", "former", "fails"),
    quick(
        itertools.product(["file", "stream", "folder", "cache"], [False, True], [False, True]),
        [("folder", False, False), ("file", True, True)],
        unpack=True,
    ),
)
def test_ctrl_c_at_any_moment_leaves_what_was_there_or_what_is_whole(
    kind: str, former: bool, fails: bool, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    held = target / "file" if kind == "folder" else target
    options = {} if kind == "cache" else {"replace" if kind == "folder" else "force": True}
    manager: Any = {"file": writing, "stream": atomic_writer, "folder": whole_folder, "cache": cache_file}[kind]

    def work() -> None:
        with contextlib.suppress(OSError), manager(target, **options) as inside:
            if kind == "folder":
                (inside / "file").write_bytes(b"new")
            else:
                (inside.data if kind == "file" else inside.write)(b"new")
            if fails:
                raise OSError(errno.ENOSPC, "No space left")

    for step in itertools.count(1):
        if former:
            held.parent.mkdir(exist_ok=True)
            held.write_bytes(b"former")
        goes_on = _interrupted_at(step, work)
        assert sorted(tmp_path.iterdir()) in ([target], [] if not former else [target]), step
        allowed = [b"former"] if former else []
        allowed += [] if fails else [b"new"]
        assert not target.exists() or held.read_bytes() in allowed, step
        if not goes_on:
            assert step > 50
            break
        if target.exists():
            shutil.rmtree(target) if kind == "folder" else target.unlink()


@pytest.mark.parametrize("kind", ["file", "stream", "folder"])
@pytest.mark.parametrize("former", [False, True], ids=["new", "replaced"])
def test_nothing_has_the_name_of_an_output_before_it_is_whole(kind: str, former: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if former:
        target.mkdir() if kind == "folder" else target.write_bytes(b"former")
    options = {"replace" if kind == "folder" else "force": former}
    manager = {"file": writing, "stream": atomic_writer, "folder": whole_folder}[kind]
    with manager(target, **options) as inside:  # type: ignore[operator]
        if kind == "folder":
            (inside / "file").write_bytes(b"new")
        elif kind == "file":
            inside.data(b"new")
        else:
            inside.write(b"new")
        if not former:
            assert not target.exists()
        else:
            assert list(target.iterdir()) == [] if kind == "folder" else target.read_bytes() == b"former"
    assert (target / "file" if kind == "folder" else target).read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_keeps_its_name_when_its_replacement_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "file").write_bytes(b"former")
    rename = Path.rename

    def interrupted(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial") and Path(to) == target:
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(target, replace=True) as inside:
        (inside / "file").write_bytes(b"new")
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "file").read_bytes() == b"former"


def test_a_folder_with_a_file_that_was_read_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "below").mkdir(parents=True)
    evidence = target / "below/base.raw"
    evidence.write_bytes(b"evidence")
    with (
        remembering_sources(),
        pytest.raises(Qcow2Error, match=r"base\.raw is part of the evidence"),
        whole_folder(target, replace=True),
    ):
        FileSource(evidence).close()
    assert evidence.read_bytes() == b"evidence"
    assert list(tmp_path.iterdir()) == [target]


def test_a_disk_that_is_full_at_the_last_moment_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = os.close

    def full(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write() -> None:
        with writing(tmp_path / "out") as output:
            output.data(b"data")
            monkeypatch.setattr(os, "close", full)

    with pytest.raises(OSError, match="No space left"):
        write()
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_an_export_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    qemu.create(image, "64G")  # hashing so many zeros takes long enough
    (tmp_path / "out").mkdir()
    command = [*COMMAND, "export", image, tmp_path / "out" / "x.raw"]
    before = signal.signal(number, signal.SIG_DFL)  # under nohup, what tests start would ignore SIGHUP
    try:
        started = subprocess.Popen(command, stderr=subprocess.PIPE)
    finally:
        signal.signal(number, before)
    with started as run:
        for _ in range(600):
            if list((tmp_path / "out").iterdir()):
                break
            time.sleep(0.05)
        run.send_signal(number)
        assert run.wait(60) == 128 + number
        assert run.stderr is not None
        assert b"Traceback" not in run.stderr.read()
    assert list((tmp_path / "out").iterdir()) == []


def test_handlers_of_others_are_left_alone(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with writing(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert (tmp_path / "out").exists()


# --- export: pipes, sidecar, salvage ---------------------------------------------------------------


def _filled(path: Path) -> bytes:
    qemu.create(path, "8M")
    qemu.io(path, "write -P 0x5a 0 1M", "write -P 7 5M 64k")
    return qemu.raw_bytes(path)


@qemu.requires_qemu
@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_export_to_standard_output_gives_the_bytes_there_and_the_hash_elsewhere(name: str, tmp_path: Path) -> None:
    wanted = _filled(tmp_path / "disk")
    done = subprocess.run([*COMMAND, "export", tmp_path / "disk", name], capture_output=True, check=True)
    assert done.stdout == wanted
    assert f"sha256 {hashlib.sha256(wanted).hexdigest()}" in done.stderr.decode()


@qemu.requires_qemu
def test_export_to_a_fifo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = _filled(tmp_path / "disk")
    os.mkfifo(tmp_path / "fifo")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_bytes()))
    reader.start()
    assert main(["export", str(tmp_path / "disk"), str(tmp_path / "fifo")]) == 0
    reader.join()
    assert got == [wanted]
    assert hashlib.sha256(wanted).hexdigest() in capsys.readouterr().out


@qemu.requires_qemu
def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    qemu.create(tmp_path / "disk", "1G")
    with subprocess.Popen([*COMMAND, "export", tmp_path / "disk", "-"], stdout=-1, stderr=-1) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.read(100) == bytes(100)
        run.stdout.close()
        assert run.wait(60) == 2
        assert b"Traceback" not in run.stderr.read()


@qemu.requires_qemu
def test_a_sidecar_says_what_was_read_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = _filled(tmp_path / "base")
    qemu.img("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", tmp_path / "disk")
    qemu.img("snapshot", "-c", "before", tmp_path / "disk")
    out = tmp_path / "out.raw"
    arguments = [
        "export",
        str(tmp_path / "disk"),
        str(out),
        "--snapshot",
        "before",
        "--hash",
        "sha256",
        "--hash",
        "md5",
    ]
    assert main([*arguments, "--sidecar", "--format", "json"]) == 0
    reported = json.loads((tmp_path / "out.raw.json").read_text())
    assert reported == json.loads(capsys.readouterr().out)
    assert reported["hashes"] == {"sha256": hashlib.sha256(wanted).hexdigest(), "md5": hashlib.md5(wanted).hexdigest()}
    assert reported["snapshot"] == {"id": "1", "name": "before"}
    assert [(item["role"], item["path"]) for item in reported["source"]] == [
        ("image", str(tmp_path / "disk")),
        ("backing file", str(tmp_path / "base")),
    ]
    assert reported["source"][0]["inode"] == (tmp_path / "disk").stat().st_ino
    assert (reported["partial"], reported["missing"]) == (False, [])
    assert reported["tool"] == f"qcow2-forensics {q.__version__}"


@qemu.requires_qemu
def test_salvage_writes_the_rest_and_a_map_of_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "disk"
    builder = Builder(cluster_bits=16, size=8 << 16)
    for number in (0, 3):
        builder.data(number << 16, bytes([number + 1]) * 65536)
    builder.packed(1 << 16, b"\xff" * 600)  # no deflate stream
    builder.packed(5 << 16, b"\xff" * 600)
    builder.packed(6 << 16, b"\xff" * 600)
    builder.write(path)
    out, rest = tmp_path / "rest.raw", tmp_path / "rest.map"
    assert main(["export", str(path), str(out)]) == 2
    assert not out.exists()
    capsys.readouterr()
    code = main(["export", str(path), str(out), "--salvage", "--mapfile", str(rest)])
    text = capsys.readouterr().out
    wanted = b"\1" * 65536 + bytes(2 << 16) + b"\4" * 65536 + bytes(4 << 16)
    assert code == 2
    assert out.read_bytes() == wanted
    assert f"sha256 (partial) {hashlib.sha256(wanted).hexdigest()}" in text
    assert "196608 bytes in 3 ranges" in text
    assert [line.split() for line in rest.read_text().splitlines() if not line.startswith("#")][1:] == [
        ["0x00000000", "0x00010000", "+"],
        ["0x00010000", "0x00010000", "-"],
        ["0x00020000", "0x00030000", "+"],
        ["0x00050000", "0x00020000", "-"],
        ["0x00070000", "0x00010000", "+"],
    ]


@qemu.requires_qemu
def test_salvage_of_a_sound_image_is_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = _filled(tmp_path / "disk")
    assert main(["export", str(tmp_path / "disk"), str(tmp_path / "out"), "--salvage", "--format", "json"]) == 0
    reported = json.loads(capsys.readouterr().out)
    assert (reported["partial"], reported["sha256"]) == (False, hashlib.sha256(wanted).hexdigest())


@qemu.requires_qemu
@pytest.mark.parametrize("cut", [0x50000, 0x60000, 0x61234])
def test_what_a_cut_file_still_holds_is_salvaged(cut: int, tmp_path: Path) -> None:
    path = base_b(tmp_path / "disk")
    Poke(path).cut(cut)
    wanted = bytearray(qemu.raw_bytes(path))  # with zeros for what is past the end of the file
    with q.open_disk(path) as disk:
        salvaged = SalvagedDisk(disk)
        list(salvaged.extents())
        got = salvaged.read(0, disk.size)
    assert salvaged.missing
    for offset, length, why in salvaged.missing:
        assert "past" in why
        wanted[offset : offset + length] = bytes(length)
    assert got == wanted
    assert sum(item.length for item in salvaged.missing) < disk.size


@qemu.requires_qemu
def test_a_missing_backing_file_is_salvaged_without_a_read_for_each_cluster(tmp_path: Path) -> None:
    qemu.create(tmp_path / "base", "1T")
    qemu.img("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", tmp_path / "disk")
    qemu.io(tmp_path / "disk", "write -P 9 512G 64k")
    (tmp_path / "base").unlink()
    with q.open_disk(tmp_path / "disk", missing="raise") as disk:
        salvaged = SalvagedDisk(disk)
        kinds = [(extent.kind, extent.length) for extent in salvaged.extents()]
        assert len(kinds) < 4000
        assert sum(item.length for item in salvaged.missing) == (1 << 40) - 65536
        assert salvaged.read(512 << 30, 65536) == b"\x09" * 65536


@qemu.requires_qemu
@pytest.mark.parametrize("beside", ["sidecar", "map", "evidence"])
def test_what_is_written_beside_an_export_is_checked_before_it(
    beside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _filled(tmp_path / "disk")
    there = {"sidecar": "out.json", "map": "map", "evidence": "disk"}[beside]
    if beside != "evidence":
        (tmp_path / there).write_bytes(b"precious")
    before = (tmp_path / there).read_bytes()
    options = ["--sidecar"] if beside == "sidecar" else ["--salvage", "--mapfile", str(tmp_path / there)]
    force = ["--force"] if beside == "evidence" else []
    assert main(["export", str(tmp_path / "disk"), str(tmp_path / "out"), *options, *force]) == 2
    assert not (tmp_path / "out").exists()
    assert (tmp_path / there).read_bytes() == before


def test_a_map_tiles_the_disk() -> None:
    lines = list(mapfile(100, [], "us"))
    assert lines[-1].split() == ["0x00000000", "0x00000064", "+"]


def test_a_mapfile_without_salvage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "disk", str(tmp_path / "out"), "--mapfile", str(tmp_path / "map")]) == 2
    assert "--salvage" in capsys.readouterr().err


# --- a system without positional reads and writes ---------------------------------------------------

_WITHOUT = """
import os, sys
for name in ("pread", "preadv", "pwrite", "mkfifo", "SEEK_DATA"):
    delattr(os, name)
from qcow2_forensics.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@qemu.requires_qemu
def test_reading_and_export_work_without_positional_reads_and_writes(tmp_path: Path) -> None:
    wanted = _filled(tmp_path / "disk")
    qemu.img("create", "-f", "qcow2", "-b", "disk", "-F", "qcow2", tmp_path / "top")
    run = [sys.executable, "-c", _WITHOUT]
    subprocess.run([*run, "export", tmp_path / "top", tmp_path / "out"], check=True, capture_output=True)
    assert (tmp_path / "out").read_bytes() == wanted
    for command in (["info"], ["map"], ["audit", "--depth", "deep"], ["audit", tmp_path / "disk"]):
        done = subprocess.run([*run, *command, tmp_path / "top"], check=False, capture_output=True)
        assert done.returncode == 0
        assert all(b", by their worst finding: " in line for line in done.stderr.splitlines())


def test_errors_of_outputs_are_the_projects_own(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"x")
    with pytest.raises(Qcow2Error, match="exists"), writing(tmp_path / "there"):
        pass
    with pytest.raises(Qcow2Error, match="exists"), whole_folder(tmp_path / "there"):
        pass
    assert (tmp_path / "there").read_bytes() == b"x"
