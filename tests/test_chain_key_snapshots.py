"""Every state of an encrypted chain is read as QEMU reads it: snapshots and all, each member with its own passphrase."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.cli import main
from tests import qemu

pytestmark = [qemu.requires_qemu]
pytest.importorskip("cryptography", reason="cryptography is absent")

KiB = 1 << 10
STATES = (None, "first", "second")
SECRETS = ("--object", "secret,id=low,data=low", "--object", "secret,id=top,data=top")


def _opened(folder: Path, *, plain: bool) -> list[str]:
    """Return how QEMU opens the overlay: each member with its own secret."""
    key = "" if plain else "encrypt.key-secret=top,"
    below = f"backing.driver=qcow2,backing.file.filename={folder}/base,backing.encrypt.key-secret=low"
    return [*SECRETS, "--image-opts", f"driver=qcow2,file.filename={folder}/disk,{key}{below}"]


def _chain(folder: Path, low: str, top: str | None) -> list[str]:
    """Make an overlay with two snapshots on an encrypted base; return how QEMU opens it."""
    qemu.create(folder / "base", "1M", secret="low", encrypt={"format": low})
    qemu.io(folder / "base", "write -P 1 0 512k", secret="low")
    own = {} if top is None else {"secret": "top", "encrypt": {"format": top}}
    qemu.create(folder / "disk", "1M", backing="base", backing_format="qcow2", unsafe=True, **own)
    opened = _opened(folder, plain=top is None)
    for byte, name in ((2, "first"), (3, "second"), (4, None)):
        qemu.run("qemu-io", *opened, "-c", f"write -P {byte} {byte * 128}k 64k")
        if name is not None:
            qemu.img("snapshot", "-c", name, *opened)
    return opened


def _wanted(state: str | None) -> bytes:
    disk = bytearray(b"\x01" * (512 * KiB) + bytes(512 * KiB))
    for byte in {"first": (2,), "second": (2, 3), None: (2, 3, 4)}[state]:
        disk[byte * 128 * KiB : (byte * 128 + 64) * KiB] = bytes([byte]) * (64 * KiB)
    return bytes(disk)


@pytest.mark.parametrize(
    ("low", "top"),
    [
        pytest.param(
            "luks", "luks", id="LUKS on LUKS", marks=pytest.mark.slow
        ),  # QEMU derives keys in each of its runs
        pytest.param("luks", None, id="plain on LUKS", marks=pytest.mark.slow),
        pytest.param("aes", "aes", id="AES on AES"),
        pytest.param("aes", "luks", id="LUKS on AES", marks=pytest.mark.slow),
    ],
)
def test_every_state_of_an_encrypted_chain_is_exact(
    low: str, top: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = _chain(tmp_path, low, top)
    keys = []
    for secret in ("top", "low"):
        (tmp_path / f"{secret}.key").write_text(f"{secret}\n")
        keys += ["--passphrase-file", str(tmp_path / f"{secret}.key")]
    for state in STATES:
        chosen = [] if state is None else ["-l", f"snapshot.name={state}"]
        qemu.img("convert", *opened[:-1], *chosen, "-O", "raw", opened[-1], str(tmp_path / "oracle"))
        assert (tmp_path / "oracle").read_bytes() == _wanted(state)  # what qemu-io wrote is what QEMU reads
        with q.open_disk(tmp_path / "disk", state, ["top", "low"]) as disk:
            assert disk.read(0, disk.size) == _wanted(state)
        arguments = [] if state is None else ["--snapshot", state]
        out = tmp_path / "exported"
        assert main(["export", str(tmp_path / "disk"), str(out), "--force", *arguments, *keys]) == 0
        assert out.read_bytes() == _wanted(state)
    assert "may be one" not in capsys.readouterr().err
