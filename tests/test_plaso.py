"""plaso's real tools on QCOW images, with workers; what they say is printed by the stock psort and pinfo.

The disk is made by mke2fs and its images by qemu-img; the raw disk says what the events are.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sqlite3
import zlib
from pathlib import Path

import pytest

pytest.importorskip("plaso")
pytest.importorskip("dfvfs")

import qcow2_forensics as q
from tests import plaso_tools, qemu
from tests.conftest import EvidenceCase
from tests.image_builder import EXT_BACKING_FORMAT, Poke
from tests.plaso_tools import Variant, log2timeline, run_tool

pytestmark = pytest.mark.slow

PLAN = "the plan, in seven steps\n" * 99  # only the deleted snapshot has it


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    qemu.need()
    qemu.need("mke2fs")
    return plaso_tools.make_disk(tmp_path_factory.mktemp("disk"), files=40)


@pytest.fixture(scope="module")
def raw_lines(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What psort prints of the raw disk, read without our package."""
    run = log2timeline(Variant(disk), tmp_path_factory.mktemp("raw"), active=False)
    assert run.rc == 0
    assert len(run.lines) > 3000
    return run.lines


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_events_of_images_are_those_of_the_raw_disk(
    start_method: str, disk: Path, raw_lines: list[str], tmp_path: Path
) -> None:
    # One telling image per way to start workers; benchmarks/dfvfs.py runs all of them.
    name = {"fork": "zlib, version 3", "spawn": "LUKS", "forkserver": "qcow2 inside ext4"}[start_method]
    if name == "LUKS":
        pytest.importorskip("cryptography")
    variant = plaso_tools.VARIANTS[name](tmp_path, disk)
    run = log2timeline(variant, tmp_path / "out", start_method=start_method)
    assert run.rc == 0, run.output
    assert plaso_tools.evidence_lines(run.lines) == raw_lines
    assert all((plaso_tools.INNER_IMAGE in line) == (name == "qcow2 inside ext4") for line in run.lines)


def test_unreadable_data_is_an_extraction_warning_and_the_run_goes_on(
    disk: Path, raw_lines: list[str], tmp_path: Path
) -> None:
    import qcow2_forensics

    # Clusters as large as the file system's blocks, and the L2 entry of one block of one log beyond any file.
    path = tmp_path / "damaged.qcow2"
    qemu.convert(disk, path, fmt="raw", target_format="qcow2", target_options={"cluster_size": 4096})
    block = disk.read_bytes().index(b"message 1000\n")
    with qcow2_forensics.open_disk(path) as opened:
        entry = opened.mapping.entry_offset(block)
    assert entry is not None
    with path.open("r+b") as file:
        file.seek(entry)
        file.write((1 << 63 | 1 << 40).to_bytes(8, "big"))
    run = log2timeline(Variant(path), tmp_path / "out")
    assert run.rc == 0, run.output
    missing = set(raw_lines) - set(run.lines)
    assert missing
    assert all("/var/log/syslog" in line or "program[" in line for line in missing)
    assert not set(run.lines) - set(raw_lines)
    warnings = plaso_tools.warnings(run.storage)
    extraction, _, preprocessing = warnings.partition("Preprocessing warning: 0")
    assert "location: /var/log/syslog\n" in extraction
    assert "past the" in extraction
    assert "QCOW2-" in preprocessing  # the audit has seen it too


def test_snapshots_asked_for_are_in_the_timeline_by_name(evidence: EvidenceCase, tmp_path: Path) -> None:
    run = log2timeline(Variant(evidence.image), tmp_path, "--qcow_snapshots", "all")
    assert run.rc == 0, run.output

    def prefixes(name: str) -> set[str]:
        return {line.split(",")[6].split(":", 1)[0] for line in run.lines if name in line}

    assert prefixes(".cache_helper") == {"QCOW2-SNAPSHOT2[during-incident]"}
    assert prefixes("secret_key.txt") == {"QCOW2-SNAPSHOT1[before-incident]"}
    assert prefixes("readme.txt") == {"EXT"}
    times = [line for line in run.lines if ",Snapshot Creation Time," in line]
    assert len(times) == 2
    assert "name: before-incident" in times[0]
    assert "QCOW2-SNAPSHOT-VMSTATE" in plaso_tools.warnings(run.storage)
    worded = plaso_tools.psort(run.storage, tmp_path / "worded.csv", active=True)
    assert plaso_tools.evidence_lines(worded) == plaso_tools.evidence_lines(run.lines)
    assert sum("Internal snapshot 2 of a QCOW image Name: during-incident" in line for line in worded) == 1


@pytest.fixture
def image_with_snapshot(disk: Path, tmp_path: Path) -> Path:
    path = plaso_tools.VARIANTS["plain qcow2"](tmp_path, disk).path
    qemu.snapshot(path, "quarter ../end")
    return path


def test_a_hint_lists_snapshots_that_nobody_asked_for(image_with_snapshot: Path, tmp_path: Path) -> None:
    run = log2timeline(
        Variant(image_with_snapshot), tmp_path / "out", "--parsers", "filestat", "--hashers", "none", workers=1
    )
    assert run.rc == 0, run.output
    assert "1 internal snapshot(s)" in run.output
    assert "--qcow_snapshots all" in run.output
    assert "1: quarter ../end (ID 1, " in run.output


@pytest.fixture(scope="module")
def image_with_deleted_snapshot(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another file system was on the disk when ``alpha`` was taken, which was deleted; ``beta`` is live."""
    folder = tmp_path_factory.mktemp("deleted")
    (folder / "tree/home/bob").mkdir(parents=True)
    (folder / "tree/home/bob/plan.txt").write_text(PLAN)
    former = folder / "former.raw"
    former.write_bytes(b"")
    os.truncate(former, plaso_tools.SIZE)
    qemu.run("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", str(folder / "tree"), str(former))
    path = folder / "disk.qcow2"
    qemu.convert(former, path, fmt="raw", target_format="qcow2")
    qemu.snapshot(path, "alpha, 1st")
    qemu.img("convert", "-n", "-f", "raw", "-O", "qcow2", disk, path)
    qemu.snapshot(path, "beta")
    qemu.snapshot(path, "alpha, 1st", action="-d", opts={"pass-discard-snapshot": "off", "discard": "ignore"})
    return path


QUICK = ("--parsers", "filestat", "--hashers", "sha256", "--qcow_snapshots")


def test_all_snapshots_are_those_in_the_table(image_with_deleted_snapshot: Path, tmp_path: Path) -> None:
    run = log2timeline(Variant(image_with_deleted_snapshot), tmp_path / "out", *QUICK, "all")
    assert run.rc == 0, run.output
    assert any("QCOW2-SNAPSHOT1[beta]" in line for line in run.lines)
    assert not any("plan.txt" in line or "DELETED" in line for line in run.lines)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_deleted_snapshots_are_in_the_timeline_when_asked_for(
    start_method: str, image_with_deleted_snapshot: Path, tmp_path: Path
) -> None:
    image = Variant(image_with_deleted_snapshot)
    run = log2timeline(image, tmp_path / "both", *QUICK, "all,deleted", start_method=start_method)
    assert run.rc == 0, run.output
    places = {line.split(",")[6].split(":", 1)[0] for line in run.lines if "/home/" in line}
    assert {place.partition("[")[0].rstrip("x0123456789abcdef") for place in places} == {
        "EXT",
        "QCOW2-SNAPSHOT",
        "QCOW2-DELETED-",
    }
    plan = [line for line in run.lines if "plan.txt" in line]
    assert plan
    assert all("QCOW2-DELETED-0x" in line and "[alpha  1st]:EXT:/home/bob/plan.txt" in line for line in plan)
    # The hash of the content is in the storage file, under a path specification that any dfVFS understands.
    assert hashlib.sha256(PLAN.encode()).hexdigest().encode() in b"".join(_stored(run.storage))
    (taken,) = [line for line in run.lines if "former_entry: 0x" in line]
    assert ",Snapshot Creation Time," in taken
    worded = plaso_tools.psort(run.storage, tmp_path / "worded.csv", active=True)
    assert sum("Deleted internal snapshot of a QCOW image" in line for line in worded) == 1


def _stored(storage: Path) -> list[bytes]:
    """Return the containers of a storage file, as JSON."""
    with contextlib.closing(sqlite3.connect(storage)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = [row for name in tables for row in database.execute(f"SELECT * FROM {name}")]  # noqa: S608 - plaso's own names
    values = [value for row in rows for value in row if isinstance(value, (str, bytes))]
    return [value.encode() if isinstance(value, str) else _inflated(value) for value in values]


def _inflated(value: bytes) -> bytes:
    try:
        return zlib.decompress(value)
    except zlib.error:
        return value


@pytest.mark.parametrize("wanted", ["deleted:alpha", "deleted:9", "deleted:0x10000"])
def test_a_deleted_snapshot_that_is_not_there_is_one_sentence(
    wanted: str, image_with_deleted_snapshot: Path, tmp_path: Path
) -> None:
    run = log2timeline(Variant(image_with_deleted_snapshot), tmp_path / "out", "--qcow_snapshots", wanted)
    assert run.rc == 1
    assert f"no snapshot '{wanted}'; the image holds: deleted:0x" in run.output
    assert "(ID 1, alpha, 1st)" in run.output
    assert "Traceback" not in run.output


def test_image_export_gives_back_files_of_a_deleted_snapshot(image_with_deleted_snapshot: Path, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    options = ("-u", "--no_hashes", "--include_duplicates", "--names", "plan.txt", "--qcow_snapshots", "deleted:1")
    done = run_tool("image_export", *options, "-w", target, image_with_deleted_snapshot, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    (file,) = (path for path in target.rglob("*") if path.is_file())
    assert re.fullmatch(r"qcow2-deleted-0x[0-9a-f]+-alpha__1st/home/bob/plan.txt", str(file.relative_to(target)))
    assert file.read_text() == PLAN


def test_image_export_keeps_the_files_of_each_snapshot_apart(image_with_snapshot: Path, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    options = ("-u", "--no_hashes", "--include_duplicates", "--names", "syslog", "--qcow_snapshots", "quarter ../end")
    done = run_tool("image_export", *options, "-w", target, image_with_snapshot, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert files == ["qcow2-snapshot1-quarter_.._end/var/log/syslog", "var/log/syslog"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("4", "no snapshot '4'; the image holds: 1 (quarter ../end)"),
        ("1..3", "'1..3' has no meaning: positions are written #1..#3"),
        ("#3..#1", "unsupported snapshot range"),
    ],
)
def test_wrong_snapshot_options_are_one_sentence(
    value: str, words: str, image_with_snapshot: Path, tmp_path: Path
) -> None:
    run = log2timeline(Variant(image_with_snapshot), tmp_path / "out", "--qcow_snapshots", value)
    assert run.rc == 1
    assert words in run.output
    assert "Traceback" not in run.output


def test_what_cannot_be_processed_is_one_sentence(disk: Path, tmp_path: Path) -> None:
    luks = plaso_tools.VARIANTS["LUKS"](tmp_path, disk).path
    missing = tmp_path / "missing.qcow2"
    qemu.create(missing, plaso_tools.SIZE)
    qemu.img("rebase", "-u", "-f", "qcow2", "-b", "gone.raw", "-F", "raw", missing)
    for path, words in ((luks, "Encrypted volume found"), (missing, "gone.raw' of missing.qcow2 is missing")):
        run = log2timeline(Variant(path), tmp_path / "out")
        assert run.rc == 1
        assert words in run.output
        assert "Traceback" not in run.output


def _two_keys(disk: Path, folder: Path) -> Path:
    """An encrypted overlay without data over an encrypted copy of the disk, each with a passphrase of its own."""
    crypto = []
    for name, secret, source in (("base.qcow2", "low", disk), ("top.qcow2", "high", None)):
        path = qemu.create(folder / name, plaso_tools.SIZE, secret=secret, encrypt={"format": "luks"})
        if source is not None:
            target = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
            secret_object = ("--object", f"secret,id=s,data={secret}")
            qemu.img("convert", *secret_object, "-n", "-f", "raw", source, "--target-image-opts", target)
        with q.open_image(path) as image:
            crypto = [(item.type, item.data) for item in image.extensions if item.type == 0x0537BE77]
    Poke(folder / "top.qcow2").names([*crypto, (EXT_BACKING_FORMAT, b"qcow2")], b"/srv/vm/base.qcow2")
    return folder / "top.qcow2"


def test_every_member_of_a_chain_takes_its_own_credential(disk: Path, raw_lines: list[str], tmp_path: Path) -> None:
    path = _two_keys(disk, tmp_path)
    both = ("--credential", "password:high", "--credential", "password:low")
    run = log2timeline(Variant(path), tmp_path / "both", *both, "--parsers", "filestat", "--hashers", "none")
    assert run.rc == 0, run.output
    assert "was taken for the backing file '/srv/vm/base.qcow2'" in run.output
    assert len(run.lines) > 20
    for number, (arguments, words) in enumerate(
        (
            (both[:2], "base.qcow2 is encrypted (LUKS)"),  # the base stays locked
            (("--qcow_backing_dir", str(tmp_path / "no")), "is not a folder"),
        )
    ):
        run = log2timeline(Variant(path), tmp_path / f"run{number}", *arguments)
        assert run.rc != 0
        assert words in run.output
        assert "Traceback" not in run.output
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "base.qcow2").rename(tmp_path / "elsewhere" / "base.qcow2")
    run = log2timeline(Variant(path), tmp_path / "gone", *both)
    assert (run.rc, "Traceback" in run.output) == (1, False), run.output
    assert "--qcow_backing_dir" in run.output
    moved = ("--qcow_backing_dir", str(tmp_path / "elsewhere"), "--parsers", "filestat", "--hashers", "none")
    assert log2timeline(Variant(path), tmp_path / "moved", *both, *moved).rc == 0


def test_the_package_runs_plasos_tools(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-P", "-m", "dfvfs_qcow2"]
    environment = plaso_tools.environment()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=120,
        )

    helped = run("log2timeline.py", "--help")
    assert helped.returncode == 0
    assert "--qcow_snapshots" in helped.stdout
    wrong = run("frobnicate")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("usage: ")
