"""The images fuzzing starts from: small, made by the real tools, one for each part of the format."""

from __future__ import annotations

import subprocess
from pathlib import Path

_IO = ("write -P 0x11 0 64k", "write -P 0x22 128k 20k", "write -z 256k 64k", "write -P 0x33 700k 5k")
_PASSPHRASE = "fuzz"


def _run(*arguments: object) -> bool:
    return not subprocess.run([str(a) for a in arguments], check=False, capture_output=True, timeout=60).returncode


def _create(path: Path, *options: str, size: str = "1M", io: tuple[str, ...] = _IO) -> None:
    _run("qemu-img", "create", "-q", "-f", "qcow2", *(o for option in options for o in ("-o", option)), path, size)
    _run("qemu-io", "-f", "qcow2", *(f"-c{command}" for command in io), path)


def make(folder: Path) -> list[Path]:
    """Make the corpus in ``folder`` and return its images, those QEMU could make here."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / "plain.qcow2"
    _create(plain)
    raw = folder / "base.raw"
    _run("qemu-img", "convert", "-O", "raw", plain, raw)
    _create(folder / "v2.qcow2", "compat=0.10")
    for bits in (1, 4, 64):
        _create(folder / f"rc{bits}.qcow2", f"refcount_bits={bits},cluster_size=4k")
    _create(folder / "c512.qcow2", "cluster_size=512")
    _create(folder / "lazy.qcow2", "lazy_refcounts=on")
    _create(
        folder / "ext.qcow2",
        "extended_l2=on,cluster_size=16k",
        io=(*_IO, "discard 2k 1k", "write -c 64k 16k", "write -z 40k 4k"),
    )
    for name, options in {
        "zlib": "cluster_size=4k",
        "zstd": "compression_type=zstd",
        "zlib2": "compat=0.10,cluster_size=64k",
    }.items():
        _run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, raw, folder / f"{name}.qcow2")
    snapshots = folder / "snapshots.qcow2"
    _create(snapshots, "cluster_size=4k", size="256k", io=("write -P 1 0 32k",))
    for number in range(3):
        _run("qemu-img", "snapshot", "-c", f"s{number}", snapshots)
        _run("qemu-io", "-f", "qcow2", f"-cwrite -P {number + 2} {number * 8}k 16k", snapshots)
    _run("qemu-img", "snapshot", "-d", "s1", snapshots)
    bitmaps = folder / "bitmaps.qcow2"
    _create(bitmaps)
    _run("qemu-img", "bitmap", "--add", "-g", "64k", bitmaps, "b0")
    _run("qemu-io", "-f", "qcow2", "-cwrite 0 300k", bitmaps)
    _run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", folder / "overlay.qcow2", "2M")
    _run("qemu-io", "-f", "qcow2", "-cwrite -P 7 0 64k", folder / "overlay.qcow2")
    _create(folder / "data.qcow2", f"data_file={folder / 'data.bin'},data_file_raw=on")
    _run("qemu-img", "convert", "-O", "qcow", raw, folder / "qcow1.qcow")
    _run("qemu-img", "convert", "-c", "-O", "qcow", raw, folder / "qcow1c.qcow")
    for method in ("luks", "aes"):
        secret = f"secret,id=s,data={_PASSPHRASE}"
        options = f"encrypt.format={method},encrypt.key-secret=s" + (
            ",encrypt.iter-time=10" if method == "luks" else ""
        )
        path = folder / f"{method}.qcow2"
        for _ in range(10):
            if _run("qemu-img", "create", "--object", secret, "-q", "-f", "qcow2", "-o", options, path, "256k"):
                break
    state = folder / "vmstate.qcow2"
    _create(state, "cluster_size=4k", size="64k", io=("write -P 9 0 16k",))
    monitor = "savevm one\nquit\n"
    machine = [
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-m",
        "2",
        "-S",
        "-display",
        "none",
        "-nodefaults",
        "-monitor",
        "stdio",
    ]
    subprocess.run(
        [*machine, "-drive", f"file={state},if=ide,format=qcow2"],
        input=monitor.encode(),
        check=False,
        capture_output=True,
        timeout=60,
    )
    return sorted(path for path in folder.iterdir() if path.suffix in (".qcow2", ".qcow"))
