"""The options that say which disk is meant do what ``--help`` says; chains and keys made by qemu-img."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import command_line, qemu
from tests.command_line import COMMAND, ENVIRONMENT, called
from tests.image_builder import EXT_BACKING_FORMAT, EXT_DATA_FILE, PASSPHRASE, Poke, base_b, empty, luks

pytestmark = qemu.requires_qemu

MiB = 1 << 20


def on_terminal(*arguments: object, typed: bytes, **environment: str) -> tuple[int, str]:
    """Run the command on a terminal of its own, type once it asks; returns exit code and all it showed."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [*COMMAND, *map(str, arguments)], ENVIRONMENT | environment)  # noqa: S606
    shown = b""
    deadline = time.monotonic() + 60
    pending = typed
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            data = os.read(terminal, 4096)
        except OSError:  # the other end is gone
            break
        if not data:
            break
        shown += data
        if pending and b"Passphrase: " in shown:
            os.write(terminal, pending)
            pending = b""
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), shown.decode("utf-8", "replace")


def one_sentence(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("qcow2-forensics: ")
    assert err.count("\n") == 1
    return err


def same(path: Path, exported: Path, **options: object) -> bool:
    return exported.read_bytes() == qemu.raw_bytes(path, **options)  # type: ignore[arg-type]


# --- passphrases ----------------------------------------------------------------------------------


@pytest.fixture
def encrypted(tmp_path: Path) -> Path:
    pytest.importorskip("cryptography", reason="cryptography is absent")
    return luks(tmp_path / "disk")


def test_the_terminal_is_asked_once_and_shows_nothing_of_the_answer(encrypted: Path, tmp_path: Path) -> None:
    code, shown = on_terminal("export", encrypted, tmp_path / "out", typed=PASSPHRASE.encode() + b"\n")
    assert code == 0, shown
    assert shown.count("Passphrase: ") == 1
    assert PASSPHRASE not in shown
    assert same(encrypted, tmp_path / "out", secret=PASSPHRASE)


@pytest.mark.parametrize(
    ("typed", "code", "reported"),
    [
        (b"wrong\n", 2, "encrypted"),
        (b"\n", 2, "encrypted"),
        (b"\x04", 2, "no passphrase was typed"),
        (b"\xff\xfe\n", 2, "encrypted"),
        (b"\x03", 130, "interrupted"),
    ],
    ids=["wrong", "empty", "end of input", "not text", "interrupt"],
)
def test_a_useless_answer_is_one_sentence(
    typed: bytes, code: int, reported: str, encrypted: Path, tmp_path: Path
) -> None:
    got, shown = on_terminal("export", encrypted, tmp_path / "out", typed=typed)
    assert (got, "Traceback" in shown) == (code, False), shown
    assert reported in shown
    assert not (tmp_path / "out").exists()


def test_without_a_terminal_nobody_is_asked(encrypted: Path, tmp_path: Path) -> None:
    reported = one_sentence(command_line.run("export", encrypted, tmp_path / "out"))
    assert "(LUKS): set QCOW2_PASSPHRASE" in reported
    assert "--passphrase-file" in reported


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_the_file_and_the_environment_give_the_passphrase(end: bytes, encrypted: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(PASSPHRASE.encode() + end)
    assert called("export", encrypted, tmp_path / "one", "--passphrase-file", tmp_path / "key")[0] == 0
    assert called("export", encrypted, tmp_path / "two", QCOW2_PASSPHRASE=PASSPHRASE)[0] == 0
    assert same(encrypted, tmp_path / "one", secret=PASSPHRASE)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.slow
def test_the_file_wins_over_the_environment(encrypted: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(PASSPHRASE)
    key = ["--passphrase-file", tmp_path / "key"]
    assert called("export", encrypted, tmp_path / "out", *key, QCOW2_PASSPHRASE="wrong")[0] == 0


def test_only_one_newline_at_the_end_of_the_file_is_dropped(encrypted: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(PASSPHRASE + "\n\n")
    assert "encrypted" in one_sentence(
        called("map", encrypted, "--snapshot", "active", "--passphrase-file", tmp_path / "key")
    )


@pytest.mark.parametrize("what", ["missing", "folder", "/dev/zero"])
def test_a_passphrase_file_that_is_none_is_one_sentence(what: str, encrypted: Path, tmp_path: Path) -> None:
    key = {"missing": tmp_path / "gone", "folder": tmp_path}.get(what, Path(what))
    one_sentence(called("map", encrypted, "--passphrase-file", key))


def test_no_option_takes_the_passphrase_itself(encrypted: Path) -> None:
    code, out, err = called("map", encrypted, "--passphrase", PASSPHRASE)
    # argparse takes a unique prefix: the words are read as the name of a file, and never as the secret.
    assert code == 2
    assert out == ""
    assert "encrypted" not in err


def test_every_encrypted_layer_takes_the_passphrase(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography is absent")
    base = luks(tmp_path / "base")
    middle = qemu.create(tmp_path / "middle", "1M", backing="base", backing_format="qcow2", unsafe=True)
    shutil.copyfile(base, tmp_path / "plain")
    code, shown = on_terminal("export", middle, tmp_path / "out", typed=PASSPHRASE.encode() + b"\n")
    assert code == 0, shown
    assert (tmp_path / "out").read_bytes() == qemu.raw_bytes(base, secret=PASSPHRASE)


# --- backing and data files -----------------------------------------------------------------------


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """An overlay in one folder whose image names a base in another."""
    (tmp_path / "case").mkdir()
    (tmp_path / "store").mkdir()
    base_b(tmp_path / "store" / "base.qcow2")
    path = empty(tmp_path / "case" / "disk")
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2")], b"../store/base.qcow2")
    qemu.io(path, "write -P 9 64k 64k")
    return path


def test_a_name_that_leads_elsewhere_needs_leave(case: Path, tmp_path: Path) -> None:
    assert "../store/base.qcow2" in one_sentence(called("export", case, tmp_path / "out"))


@pytest.mark.parametrize("folders", [["store"], ["case", "store"], ["."]])
def test_backing_dir_gives_leave_and_repeats(folders: list[str], case: Path, tmp_path: Path) -> None:
    options = [item for folder in folders for item in ("--backing-dir", tmp_path / folder)]
    assert called("export", case, tmp_path / "out", *options)[0] == 0
    assert same(case, tmp_path / "out")


def test_backing_dir_finds_a_file_of_the_same_name(case: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    (tmp_path / "store" / "base.qcow2").rename(tmp_path / "moved" / "base.qcow2")
    assert called("export", case, tmp_path / "out", "--backing-dir", tmp_path / "moved")[0] == 0
    assert (tmp_path / "out").read_bytes()[:65536] == b"\x11" * 65536


@pytest.mark.parametrize("name", ["base.qcow2", "a=b.qcow2", "a=b=c"])
def test_backing_file_names_the_file(name: str, case: Path, tmp_path: Path) -> None:
    place = tmp_path / name
    shutil.copyfile(tmp_path / "store" / "base.qcow2", place)
    assert called("export", case, tmp_path / "out", "--backing-file", f"../store/base.qcow2={place}")[0] == 0
    assert same(case, tmp_path / "out")


def test_backing_file_takes_names_with_an_equals_sign(tmp_path: Path) -> None:
    base_b(tmp_path / "x=y")
    path = empty(tmp_path / "disk")
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2")], b"/no=where/base=1")
    assert called("export", path, tmp_path / "out", "--backing-file", f"/no=where/base=1={tmp_path}/x=y")[0] == 0
    assert (tmp_path / "out").read_bytes()[:65536] == b"\x11" * 65536


def test_backing_file_repeats_for_every_layer_and_for_the_data_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    qemu.create(tmp_path / "one" / "low", "1M", data_file=tmp_path / "one" / "low.data")
    qemu.io(tmp_path / "one" / "low", "write -P 7 0 64k")
    path = empty(tmp_path / "disk")
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2")], b"nbd://far/low")
    wanted = qemu.raw_bytes(tmp_path / "one" / "low")
    (tmp_path / "one" / "low.data").rename(tmp_path / "two" / "moved")
    options = [
        *("--backing-file", f"nbd://far/low={tmp_path}/one/low"),
        *("--backing-file", f"{tmp_path}/one/low.data={tmp_path}/two/moved"),
    ]
    assert called("export", path, tmp_path / "out", *options)[0] == 0
    assert (tmp_path / "out").read_bytes() == wanted
    assert "low.data" in one_sentence(called("export", path, tmp_path / "more", *options[:2]))


@pytest.mark.parametrize("option", ["nothing", "../store/base.qcow2=/no/such/file", "../store/base.qcow2=/dev/zero"])
def test_a_backing_file_that_cannot_be_is_one_sentence(option: str, case: Path, tmp_path: Path) -> None:
    one_sentence(called("export", case, tmp_path / "out", "--backing-file", option))
    assert not (tmp_path / "out").exists()


def test_backing_file_gives_its_format(case: Path, tmp_path: Path) -> None:
    shutil.copyfile(case.parent.parent / "store" / "base.qcow2", tmp_path / "copy,format=x")
    raw = tmp_path / "copy.raw"
    qemu.img("convert", "-O", "raw", tmp_path / "store" / "base.qcow2", raw)
    name = "../store/base.qcow2"
    assert called("export", case, tmp_path / "out", "--backing-file", f"{name}={raw},format=raw")[0] == 0
    assert same(case, tmp_path / "out")
    assert "copy.raw" in one_sentence(called("export", case, tmp_path / "two", "--backing-file", f"{name}={raw}"))
    whole = ["--backing-file", f"{name}={tmp_path}/copy,format=x"]  # a file of that name is there
    assert called("export", case, tmp_path / "three", *whole)[0] == 0
    assert same(case, tmp_path / "three")


def test_a_stand_in_is_one_warning(case: Path, tmp_path: Path) -> None:
    shutil.copyfile(tmp_path / "store" / "base.qcow2", tmp_path / "case" / "base.qcow2")
    code, _, err = called("export", case, tmp_path / "out")
    assert code == 0
    assert err.startswith("qcow2-forensics: warning: ")
    assert err.count("\n") == 1
    assert "'../store/base.qcow2'" in err
    assert same(case, tmp_path / "out")
    code, out, err = called("audit", case, "--format", "json")
    assert "QCOW2-REF-STAND-IN" in out


@pytest.mark.parametrize(
    ("name", "options"),
    [("../store/base.qcow2", "--backing-dir"), ("gone.qcow2", "--no-backing"), ("nbd://h/x", "--backing-file")],
)
def test_a_refusal_names_the_option_that_cures_it(name: str, options: str, tmp_path: Path) -> None:
    path = empty(tmp_path / "disk")
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2")], name.encode())
    sentence = one_sentence(called("export", path, tmp_path / "out"))
    assert options in sentence
    assert "of disk" in sentence


def _two_keys(folder: Path) -> Path:
    pytest.importorskip("cryptography", reason="cryptography is absent")
    for name, secret, write in (("base", "low", "write -P 1 0 64k"), ("top", "high", "write -P 9 64k 64k")):
        qemu.create(folder / name, "1M", secret=secret, encrypt={"format": "aes"})
        qemu.io(folder / name, write, secret=secret)
    Poke(folder / "top").names([(EXT_BACKING_FORMAT, b"qcow2")], b"base")
    return folder / "top"


def test_each_member_takes_its_own_key_file(tmp_path: Path) -> None:
    path = _two_keys(tmp_path)
    for key in ("low", "high"):
        (tmp_path / key).write_bytes(key.encode() + b"\r\n")
    keys = [item for key in ("low", "high") for item in ("--passphrase-file", tmp_path / key)]
    code, _, err = called("export", path, tmp_path / "out", *keys)
    assert code == 0, err
    assert err.count("which cannot tell a wrong passphrase") == 2
    assert (tmp_path / "out").read_bytes()[:131072] == b"\x01" * 65536 + b"\x09" * 65536
    paths = os.pathsep.join(str(tmp_path / key) for key in ("low", "high"))
    assert called("export", path, tmp_path / "two", QCOW2_PASSPHRASE_FILE=paths)[0] == 0
    assert (tmp_path / "two").read_bytes() == (tmp_path / "out").read_bytes()
    code, _, err = called("export", path, tmp_path / "three", QCOW2_PASSPHRASE="high")
    assert "warning: " in err
    assert "may be one" in err


def test_no_backing_reads_the_file_alone(case: Path, tmp_path: Path) -> None:
    assert called("export", case, tmp_path / "out", "--no-backing")[0] == 0
    assert (tmp_path / "out").read_bytes() == bytes(65536) + b"\x09" * 65536 + bytes(MiB - 131072)


def test_no_backing_still_reads_the_data_file(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk", "1M", data_file=tmp_path / "own.data")
    Poke(path).names([(EXT_DATA_FILE, b"own.data")])
    qemu.io(path, "write -P 7 0 64k", cwd=tmp_path)
    assert called("export", path, tmp_path / "out", "--no-backing")[0] == 0
    assert (tmp_path / "out").read_bytes()[:65536] == b"\x07" * 65536


# --- cut-off files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "reported"), [(0x60000, "filled_bytes"), pytest.param(0x40000, "filled_tables", marks=pytest.mark.slow)]
)
def test_eof_zeros_reads_as_qemu_and_says_what_it_filled(cut: int, reported: str, tmp_path: Path) -> None:
    Poke(base_b(tmp_path / "base.qcow2")).cut(cut)
    path = empty(tmp_path / "disk")
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2")], b"base.qcow2")
    for image in (tmp_path / "base.qcow2", path):
        one_sentence(called("export", image, tmp_path / "out"))
        one_sentence(called("export", image, tmp_path / "out", "--eof", "strict"))
        code, out, err = called("export", image, tmp_path / "out", "--eof", "zeros", "--format", "json", "--force")
        assert code == 0, err
        assert json.loads(out)[reported] > 0  # also where the cut file is further down the chain
        assert same(image, tmp_path / "out")
        assert "past the end" in called("export", image, tmp_path / "out", "--eof", "zeros", "--force")[1]


# --- terminals and files --------------------------------------------------------------------------


def test_a_terminal_without_unicode_is_shown_escapes(tmp_path: Path) -> None:
    path = empty(tmp_path / "disk")
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2")], "b\u00e4se\u2713.qcow2".encode())
    code, out, err = command_line.run("info", path, PYTHONIOENCODING="ascii")
    assert (code, err) == (0, "")
    assert "b\\xe4se\\u2713" in out
    assert "Traceback" not in command_line.run("export", path, tmp_path / "out", PYTHONIOENCODING="ascii")[2]


def test_a_disk_no_file_can_hold_fails_before_anything_is_read(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "disk", "2048P", cluster_size="2M")
    for extra in ([], ["--no-hash"]):
        one_sentence(called("export", path, tmp_path / "out", *extra))
        assert sorted(item.name for item in tmp_path.iterdir()) == ["disk"]


@pytest.mark.parametrize("name", ["n" * 255, "\u00e9" * 127], ids=["ascii", "two bytes each"])
def test_an_output_may_have_as_long_a_name_as_there_can_be(name: str, tmp_path: Path) -> None:
    path = base_b(tmp_path / "disk")
    assert called("export", path, tmp_path / name)[0] == 0
    assert same(path, tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 2


def test_closed_standard_files_are_no_traceback(encrypted: Path, tmp_path: Path) -> None:
    plain = base_b(tmp_path / "plain")
    for redirection, path, code in (("<&-", encrypted, 2), ("2>&-", plain, 0), (">&- 2>&- <&-", plain, 0)):
        line = f'exec "$@" {redirection}'
        command = ["sh", "-c", line, "sh", *COMMAND, "export", str(path), str(tmp_path / "out"), "--force"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=ENVIRONMENT)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
