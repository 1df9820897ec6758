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
    _save(state, "pc", 2)
    return _images(folder)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".qcow2", ".qcow"))


_SMALL_IO = ("write -P 0x11 0 6k", "write -P 0x22 16k 512", "write -z 20k 4k")


def make_small(folder: Path) -> list[Path]:
    """Make the same parts of the format in few bytes: small clusters, small disks, few pages of memory.

    All but the memory of a whole machine and the key slots of LUKS fit in 128 KiB: guided fuzzing
    runs such images many times faster, and nearly every byte of them means something.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / "base.raw"
    raw.write_bytes(b"".join(bytes([number]) * 512 for number in range(32)) + bytes(48 * 1024))

    def create(name: str, *options: str, io: tuple[str, ...] = _SMALL_IO, size: str = "64k") -> Path:
        path = folder / name
        _create(path, *options, size=size, io=io)
        return path

    create("v2.qcow2", "compat=0.10,cluster_size=512")
    create("v3.qcow2", "cluster_size=512")
    create("c4k.qcow2", "cluster_size=4k,refcount_bits=1")
    create("rc64.qcow2", "cluster_size=1k,refcount_bits=64")
    create("lazy.qcow2", "cluster_size=512,lazy_refcounts=on")
    create("ext.qcow2", "extended_l2=on,cluster_size=16k", io=("write -P 1 0 512", "discard 512 512", "write -z 4k 1k"))
    for name, options in (("zlib", "cluster_size=4k"), ("zstd", "cluster_size=4k,compression_type=zstd")):
        _run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, raw, folder / f"{name}.qcow2")
    _run("qemu-img", "convert", "-O", "qcow", raw, folder / "qcow1.qcow")
    _run("qemu-img", "convert", "-c", "-O", "qcow", raw, folder / "qcow1c.qcow")
    for name, bits in (("snapshots", "512"), ("snapshots4k", "4k")):
        path = create(f"{name}.qcow2", f"cluster_size={bits}")
        for number in range(3):
            _run("qemu-img", "snapshot", "-c", f"s{number}", path)
            _run("qemu-io", "-f", "qcow2", f"-cwrite -P {number + 2} {number * 4}k 8k", path)
        _run("qemu-img", "snapshot", "-d", "s1", path)
    bitmaps = create("bitmaps.qcow2", "cluster_size=512")
    for name in ("b0", "b1"):
        _run("qemu-img", "bitmap", "--add", "-g", "512", bitmaps, name)
        _run("qemu-io", "-f", "qcow2", "-cwrite 0 30k", bitmaps)
    overlay = folder / "overlay.qcow2"
    _run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", raw.name, "-F", "raw", "-o", "cluster_size=1k", overlay, "96k"
    )
    _run("qemu-io", "-f", "qcow2", "-cwrite -P 7 2k 3k", overlay)
    create("data.qcow2", f"data_file={folder / 'data.bin'},data_file_raw=on,cluster_size=4k")
    secret = f"secret,id=s,data={_PASSPHRASE}"
    luks = "encrypt.format=luks,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.iter-time=10"
    for name, options in (("aes", "encrypt.format=aes"), ("luks", luks)):
        path, options = folder / f"{name}.qcow2", f"{options},encrypt.key-secret=s,cluster_size=512"
        for _ in range(10):  # QEMU now and then finds its own clock too coarse for so few iterations
            if _run("qemu-img", "create", "--object", secret, "-q", "-f", "qcow2", "-o", options, path, "16k"):
                break
        target = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
        _run("qemu-io", "--object", secret, "--image-opts", target, "-c", "write -P 5 0 2k")
    for machine in ("none", "microvm", "isapc"):
        _save(create(f"vm-{machine}.qcow2", "cluster_size=4k", io=("write -P 9 0 4k",), size="16k"), machine, 1)
    return _images(folder)


def _save(path: Path, machine: str, mebibytes: int) -> None:
    """Have QEMU store the state of a machine that never ran in a snapshot of an image."""
    command = [
        *("qemu-system-x86_64", "-accel", "tcg", "-M", machine, "-m", str(mebibytes), "-S", "-display", "none"),
        *("-nodefaults", "-monitor", "stdio", "-drive", f"file={path},if=none,format=qcow2"),
    ]
    subprocess.run(command, input=b"savevm one\nquit\n", check=False, capture_output=True, timeout=60)
