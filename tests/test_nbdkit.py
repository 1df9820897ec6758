"""The nbdkit plug-in serves every state over NBD; QEMU is the client that compares."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcow2_forensics.cli import main
from tests import qemu

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


def test_a_file_in_which_no_state_is_left_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(1 << 20))
    run = command(tmp_path / "socket", f"image={tmp_path / 'noise'}")
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode
    assert "QCOW" in done.stderr


def test_encrypted_images_need_the_key_file(make_image: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    image = make_image("locked.qcow2", "1M", "write -P 7 0 64k", secret="sesame")
    without = subprocess.run(
        command(tmp_path / "none", f"image={image}"),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert without.returncode
    assert "passphrase-file=FILE is missing" in without.stderr
    (tmp_path / "key").write_text("sesame\n")
    with served(tmp_path / "socket", f"image={image}", f"passphrase-file={tmp_path / 'key'}") as uri:
        qemu.img("convert", "-f", "raw", "-O", "raw", uri(""), tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == qemu.raw_bytes(image, secret="sesame")


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


@pytest.mark.parametrize("where", ["0.0.0.0:10809", "192.0.2.1:10809", "example.org:10809"])
def test_serve_listens_on_this_machine_only(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "disk.qcow2", "--nbd", where]) == 2
    assert "no loopback address" in capsys.readouterr().err
