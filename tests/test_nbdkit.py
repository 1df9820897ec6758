"""The nbdkit plug-in serves every state over NBD; QEMU is the client that compares."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

import pytest

from qcow2_forensics import SnapshotNotFound
from qcow2_forensics.cli import main
from tests import qemu
from tests.image_builder import COPIED, PASSPHRASE, Builder

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "src" / "qcow2_forensics" / "data" / "nbdkit_plugin.py"


@pytest.fixture(autouse=True)
def nbdkit() -> None:
    """Skip by name where nbdkit or its Python plug-in is absent."""
    if shutil.which("nbdkit") is None:
        pytest.skip("nbdkit is absent")
    if subprocess.run(["nbdkit", "python", "--dump-plugin"], capture_output=True, check=False).returncode:
        pytest.skip("nbdkit-plugin-python is absent")


def command(socket: Path, *parameters: str) -> list[str]:
    return ["nbdkit", "-f", "-U", str(socket), "python", str(SCRIPT), *parameters]


def environment() -> dict[str, str]:
    # nbdkit runs the system's Python; what is pure Python of ours and zstd come from here.
    folders = [str(ROOT / "src"), *(path for path in sys.path if path.endswith("site-packages"))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}


@contextmanager
def served(socket: Path, *parameters: str) -> Iterator[Callable[[str], str]]:
    """Serve on a Unix socket; yields a function from export names to URIs."""
    with subprocess.Popen(command(socket, *parameters), env=environment(), stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 30
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise AssertionError(process.communicate()[1].decode())
            time.sleep(0.02)
        try:
            yield lambda name: f"nbd+unix:///{name}?socket={socket}"
        finally:
            process.terminate()


def test_each_state_reads_as_qemu_reads_it_from_the_image(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image("disk.qcow2", "4M", "write -P 1 0 64k", "write -P 2 3M 64k")
    qemu.snapshot(image, "before")
    qemu.io(image, "write -P 3 0 64k")
    with served(tmp_path / "socket", f"image={image}") as uri:
        for name, snapshot in (("", None), ("active", None), ("1", "before"), ("before", "before")):
            qemu.img("convert", "-f", "raw", "-O", "raw", uri(name), tmp_path / "raw")
            assert (tmp_path / "raw").read_bytes() == qemu.raw_bytes(image, snapshot=snapshot), name
        holes = qemu.map_json(uri(""), fmt="raw")
        assert [(item["start"], item["length"], item["data"]) for item in holes] == [
            (0, 65536, True),
            (65536, 3 * 1024 * 1024 - 65536, False),
            (3 * 1024 * 1024, 65536, True),
            (3 * 1024 * 1024 + 65536, 1024 * 1024 - 65536, False),
        ]
        refused = qemu.run("qemu-io", "-f", "raw", "-c", "write 0 512", uri(""), check=False)
        assert not refused.ok


@pytest.mark.parametrize("damage", ["header", "L1 table"])
def test_a_recovered_state_is_served_of_a_damaged_image(
    make_image: Callable[..., Path], tmp_path: Path, damage: str
) -> None:
    image = make_image("disk.qcow2", "4M", *(f"write -P {n + 1} {n * 64}k 64k" for n in range(64)))
    expected = qemu.raw_bytes(image)
    data = bytearray(image.read_bytes())
    size, at = struct.unpack_from(">IQ", data, 36)
    start, length = (0, 65536) if damage == "header" else (at, 8 * size)
    data[start : start + length] = bytes(length)
    image.write_bytes(data)
    with served(tmp_path / "socket", f"image={image}") as uri:
        qemu.img("convert", "-f", "raw", "-O", "raw", uri("recovered:1"), tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == expected


HOSTILE_NAMES = {
    "1": "ordinary",
    "active": "one of our words",
    "index:0": "the place of another",
    "x" * 5000: "longer than NBD allows",
    "\x1b[2J\U000e0100": "\x1b[2J",
    "two": "\U000e0100" * 5000,
    "twice": "a",
    "=active": "a",
}


def test_every_snapshot_is_listed_under_a_name_that_opens_it(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=16, size=1 << 20)
    builder.data(0, b"\xaa" * 65536)
    for number, (ident, name) in enumerate(HOSTILE_NAMES.items(), 1):
        l1, l2 = builder.put(bytes(65536)), builder.put(bytes(65536))
        builder.raw(l1, (l2 | COPIED).to_bytes(8, "big"))
        builder.raw(l2, (builder.put(bytes([number]) * 65536) | COPIED).to_bytes(8, "big"))
        builder.snapshot(ident.encode(), name.encode(), l1_offset=l1, l1_size=1)
    image = builder.write(tmp_path / "disk.qcow2")
    with served(tmp_path / "socket", f"image={image}") as uri:
        listing = qemu.run("qemu-nbd", "--list", "--socket", str(tmp_path / "socket")).stdout.decode()
        names = re.findall(r"^ export: '(.*)'$", listing, re.MULTILINE)
        assert len(names) == len(HOSTILE_NAMES) + 1
        for number, name in enumerate(names):
            qemu.img("convert", "-f", "raw", "-O", "raw", uri(quote(name, safe="")), tmp_path / "raw")
            assert (tmp_path / "raw").read_bytes()[0] == (number or 0xAA), name


def test_more_snapshots_than_nbdkit_lists_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nbdkit", ModuleType("nbdkit"))
    plugin = runpy.run_path(str(SCRIPT))
    builder = Builder(cluster_bits=16, size=1 << 20)
    for number in range(10_050):
        builder.snapshot(b"%d" % (number + 1), b"s", l1_offset=65536 * 3, l1_size=1)
    plugin["config"]("image", str(builder.write(tmp_path / "disk.qcow2")))
    assert len(list(plugin["list_exports"](True, False))) == 10_000
    assert "51 snapshots are missing from the list" in capsys.readouterr().err


def test_a_file_in_which_no_state_is_left_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(1 << 20))
    run = command(tmp_path / "socket", f"image={tmp_path / 'noise'}")
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode
    assert "QCOW" in done.stderr


def test_encrypted_images_need_the_key_file(make_image: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    image = make_image("locked.qcow2", "1M", "write -P 7 0 64k", secret=PASSPHRASE)
    without = subprocess.run(
        command(tmp_path / "none", f"image={image}"),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert without.returncode
    assert "(LUKS): give passphrase-file=FILE" in without.stderr
    (tmp_path / "key").write_text(f"{PASSPHRASE}\n")
    with served(tmp_path / "socket", f"image={image}", f"passphrase-file={tmp_path / 'key'}") as uri:
        qemu.img("convert", "-f", "raw", "-O", "raw", uri(""), tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == qemu.raw_bytes(image, secret=PASSPHRASE)


@pytest.mark.slow
def test_keys_and_states_are_those_of_every_front_door(
    make_image: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.setitem(sys.modules, "nbdkit", ModuleType("nbdkit"))
    image = make_image("locked.qcow2", "1M", "write -P 7 0 64k", secret="sesame\n")
    qemu.run("qemu-img", "snapshot", "--object", "secret,id=s,data=sesame\n", "-c", "active", "--image-opts",
             f"driver=qcow2,encrypt.key-secret=s,file.filename={image}")  # fmt: skip
    (tmp_path / "wrong").write_text("other")
    (tmp_path / "key").write_text("sesame\n")
    plugin = runpy.run_path(str(SCRIPT))
    for key, value in (
        ("image", image),
        ("passphrase-file", tmp_path / "wrong"),
        ("passphrase-file", tmp_path / "key"),
    ):
        plugin["config"](key, str(value))
    assert plugin["opened"]("").read(0, 1) == b"\7"
    assert plugin["opened"]("=active").read(0, 1) == b"\7"
    with pytest.raises(SnapshotNotFound, match="ambiguous"):
        plugin["opened"]("active")
    plugin = runpy.run_path(str(SCRIPT))
    plugin["config"]("image", str(image))
    monkeypatch.setenv("QCOW2_PASSPHRASE_FILE", str(tmp_path / "key"))
    assert plugin["opened"]("1").read(0, 1) == b"\7"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_serve_runs_the_plugin_until_it_is_ended(
    number: signal.Signals, code: int, make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = make_image("disk.qcow2", "1M", "write -P 1 0 64k")
    socket = tmp_path / "case.sock"
    run = [sys.executable, "-m", "qcow2_forensics", "serve", str(image), "--nbd", str(socket)]
    with subprocess.Popen(run, env=environment(), stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while not socket.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        try:
            qemu.img("convert", "-f", "raw", "-O", "raw", f"nbd+unix:///?socket={socket}", tmp_path / "raw")
        finally:
            process.send_signal(number)
            process.wait(timeout=60)
    assert (tmp_path / "raw").read_bytes() == qemu.raw_bytes(image)
    assert process.returncode == code
    assert not socket.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "(LUKS): give --passphrase-file FILE"),
        (["--passphrase-file", "{}/absent"], "absent: No such file"),
        (["--passphrase-file", "{}/wrong"], "no key slot accepts this passphrase"),
    ],
)
def test_a_mistake_is_one_sentence_of_serve(
    options: list[str],
    message: str,
    make_image: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.delenv("QCOW2_PASSPHRASE", raising=False)
    image = make_image("locked.qcow2", "1M", secret=PASSPHRASE)
    (tmp_path / "wrong").write_text("wrong")
    given = [option.format(tmp_path) for option in options]
    assert main(["serve", str(image), "--nbd", str(tmp_path / "case.sock"), *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_missing_backing_file_names_the_options_of_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder = Builder()
    builder.backing = b"gone.raw"
    image = builder.write(tmp_path / "disk.qcow2")
    assert main(["serve", str(image), "--nbd", str(tmp_path / "case.sock")]) == 2
    error = capsys.readouterr().err
    assert "give its folder with --backing-dir DIR" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("where", ["0.0.0.0:10809", "192.0.2.1:10809", "example.org:10809"])
def test_serve_listens_on_this_machine_only(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "disk.qcow2", "--nbd", where]) == 2
    assert "no loopback address" in capsys.readouterr().err


def test_a_socket_in_a_folder_that_is_not_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "disk.qcow2", "--nbd", str(tmp_path / "gone" / "case.sock")]) == 2
    assert capsys.readouterr().err.endswith(f"the folder {tmp_path / 'gone'} does not exist\n")
