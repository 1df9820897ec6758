"""The reader against ``pread`` on the raw file, qemu-img, pyqcow and dissect.hypervisor."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from harness import Case, tool

import qcow2_forensics as q
from qcow2_forensics.limits import KiB, MiB

PASSPHRASE = "benchmark"  # noqa: S105 - of a throw-away image


def make_raw(path: Path, size: int, kind: str) -> None:
    """Write test content: ``dense`` like files on a disk, ``sparse`` with one MiB in sixteen used."""
    seed = random.Random(7)
    words = [seed.randbytes(seed.randrange(3, 12)) for _ in range(2000)]
    with open(path, "wb") as out:
        for at in range(0, size, MiB):
            if kind == "sparse" and at // MiB % 16:
                continue
            out.seek(at)
            text = b"".join(seed.choices(words, k=MiB // 7))[: MiB * 3 // 4]
            out.write(text + seed.randbytes(MiB - len(text)))
        out.truncate(size)


def settle(path: Path) -> Path:
    """Drop a file from the page cache and read it in again, as evidence that was copied here is.

    How a file was written decides in what pieces the kernel keeps it, and so how fast it is read:
    a raw file just written by one program and an image by another are not under the same conditions.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(MiB):
            pass
    return path


class Images:
    """Makes each image once, with the real tools, on first use."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size

    def raw(self, kind: str = "dense") -> Path:
        path = self.folder / f"{kind}.raw"
        if not path.exists():
            make_raw(path, self.size, kind)
            settle(path)
        return path

    def convert(self, name: str, *options: str, kind: str = "dense") -> Path:
        path = self.folder / f"{name}.qcow2"
        if not path.exists():
            tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, self.raw(kind), path)
            settle(path)
        return path

    def fragmented(self) -> Path:
        """Clusters written in random order, so that no two neighbours touch in the file."""
        path = self.folder / "fragmented.qcow2"
        if not path.exists():
            tool("qemu-img", "create", "-q", "-f", "qcow2", path, self.size)
            order = list(range(0, self.size, 64 * KiB))
            random.Random(3).shuffle(order)
            with subprocess.Popen(
                ["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            ) as io:
                io.communicate("".join(f"write -q -s {self.raw()} {at} 64k\n" for at in order).encode() + b"quit\n")
            # qemu-io reads its pattern from the start of the file; the content does not matter here.
            settle(path)
        return path

    def chain(self, layers: int) -> Path:
        """An image over others, with an equal part of the clusters in each of its layers."""
        below = self.convert(f"chain{layers}-0")
        for level in range(1, layers):
            layer = self.folder / f"chain{layers}-{level}.qcow2"
            if not layer.exists():
                tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", below.name, "-F", "qcow2", layer)
                places = range(level * 64 * KiB, self.size, layers * 64 * KiB)
                commands = [f"-cwrite -q -P {level} {at} 64k" for at in places]
                for first in range(0, len(commands), 1000):
                    tool("qemu-io", "-f", "qcow2", *commands[first : first + 1000], layer)
                settle(layer)
            below = layer
        return below

    def luks(self) -> Path:
        path = self.folder / "luks.qcow2"
        for _ in range(20):  # creation fails now and then: QEMU cannot time its key derivation
            if path.exists():
                break
            command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "--object", f"secret,id=s,data={PASSPHRASE}"]
            command += [
                "-o",
                "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
                str(self.raw()),
                str(path),
            ]
            if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
                path.unlink(missing_ok=True)
        return settle(path)


def sequential(read: Callable[[int, int], bytes], size: int, block: int, skew: int = 0) -> Callable[[], None]:
    def work() -> None:
        for at in range(skew, size - block, block):
            read(at, block)

    return work


def random_reads(read: Callable[[int, int], bytes], size: int, block: int, count: int) -> Callable[[], None]:
    chance = random.Random(5)
    offsets = [chance.randrange(size // block) * block for _ in range(count)]

    def work() -> None:
        for at in offsets:
            read(at, block)

    return work


def pread(path: Path) -> Callable[[int, int], bytes]:
    descriptor = os.open(path, os.O_RDONLY)
    return lambda offset, length: os.pread(descriptor, length, offset)


def pyqcow_reader(path: Path) -> Callable[[int, int], bytes] | None:
    try:
        import pyqcow
    except ImportError:
        return None
    handle = pyqcow.file()
    handle.open(str(path))
    return lambda offset, length: handle.read_buffer_at_offset(length, offset)


def dissect_reader(path: Path) -> Callable[[int, int], bytes] | None:
    try:
        from dissect.hypervisor.disk.qcow2 import QCow2
    except ImportError:
        return None
    image = QCow2(path)
    stream = image.open() if hasattr(image, "open") else image

    def read(offset: int, length: int) -> bytes:
        stream.seek(offset)
        return bytes(stream.read(length))

    return read


def ours(path: Path, passphrase: str | None = None) -> Callable[[int, int], bytes]:
    return q.open_disk(path, passphrase=passphrase).read


def opened(path: Path, *peers: str) -> dict[str, Callable[[int, int], bytes]]:
    readers: dict[str, Callable[[int, int], bytes]] = {"qcow2-forensics": ours(path)}
    makers = {"pyqcow": pyqcow_reader, "dissect.hypervisor": dissect_reader}
    for peer in peers:
        read = makers[peer](path)
        if read is not None:
            readers[peer] = read
    return readers


def convert_to_raw(path: Path, folder: Path) -> Callable[[], None]:
    return lambda: tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, folder / "converted.raw")


def convert_luks(path: Path, folder: Path) -> Callable[[], None]:
    source = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    secret = f"secret,id=s,data={PASSPHRASE}"
    return lambda: tool(
        "qemu-img", "convert", "--object", secret, "--image-opts", source, "-O", "raw", folder / "converted.raw"
    )


def cases(folder: Path, *, smoke: bool = False) -> Iterator[Case]:
    """Yield every case of the reader."""
    size = 16 * MiB if smoke else 256 * MiB
    images = Images(folder, size)
    dense, raw = images.convert("dense"), pread(images.raw())
    both = ("pyqcow", "dissect.hypervisor")

    def full(
        name: str, block: int, yardstick: Callable[[int, int], bytes], path: Path, *peers: str, skew: int = 0
    ) -> Case:
        readers = {"pread of the raw file": yardstick, **opened(path, *peers)}
        return Case(name, {who: sequential(read, size, block, skew) for who, read in readers.items()}, size)

    yield full("sequential 1 MiB, dense", MiB, raw, dense, *both)
    yield full("sequential 64 KiB, dense", 64 * KiB, raw, dense, *both)
    yield full("unaligned 64 KiB, dense", 64 * KiB, raw, dense, *both, skew=31 * 512)
    sparse = images.convert("sparse", kind="sparse")
    yield full("sequential 1 MiB, sparse", MiB, pread(images.raw("sparse")), sparse, *both)
    yield full("sequential 1 MiB, fragmented", MiB, raw, images.fragmented(), *both)
    yield full("sequential 1 MiB, 512-byte clusters", MiB, raw, images.convert("c512", "-o", "cluster_size=512"), *both)
    yield full("sequential 1 MiB, 2 MiB clusters", MiB, raw, images.convert("c2m", "-o", "cluster_size=2M"), *both)
    yield full("sequential 1 MiB, extended L2", MiB, raw, images.convert("extended", "-o", "extended_l2=on"))
    yield full("sequential 1 MiB, three-deep chain", MiB, raw, images.chain(3), "dissect.hypervisor")
    yield full("sequential 1 MiB, ten-deep chain", MiB, raw, images.chain(10), "dissect.hypervisor")
    count = 2_000 if smoke else 50_000
    readers = {"pread of the raw file": raw, **opened(dense, *both)}
    works = {who: random_reads(read, size, 4 * KiB, count) for who, read in readers.items()}
    yield Case("random 4 KiB, dense", works, count, "reads")
    readers = {"pread of the raw file": raw, **opened(images.chain(10))}
    works = {who: random_reads(read, size, 4 * KiB, count) for who, read in readers.items()}
    yield Case("random 4 KiB, ten-deep chain", works, count, "reads")
    span = min(size, MiB if smoke else 16 * MiB)
    works = {who: sequential(read, span, 64) for who, read in readers.items()}
    yield Case("sequential 64 bytes, dense", works, span // 64, "reads")
    for name, options in (
        ("zlib", ["-c"]),
        ("zlib v2", ["-c", "-o", "compat=0.10"]),
        ("zstd", ["-c", "-o", "compression_type=zstd"]),
    ):
        path = images.convert(name.replace(" ", "-"), *options)
        peers = both if name == "zlib v2" else ("dissect.hypervisor",)
        yield Case(
            f"full read, {name}",
            {
                "qemu-img convert": convert_to_raw(path, folder),
                **{who: sequential(read, size, MiB) for who, read in _fresh(path, peers).items()},
            },
            size,
        )
    luks = images.luks()
    yield Case(
        "full read, LUKS aes-256-xts",
        {
            "qemu-img convert": convert_luks(luks, folder),
            "qcow2-forensics": sequential(ours(luks, PASSPHRASE), size, MiB),
        },
        size,
    )
    yield Case("export to raw, dense", _exports(dense, folder), size)
    yield Case("export to raw, zlib", _exports(images.convert("zlib", "-c"), folder), size)
    holes = folder / "holes.qcow2"
    if not holes.exists():
        tool("qemu-img", "create", "-q", "-f", "qcow2", holes, "2G")
    yield Case("export of 2 GiB of holes", _exports(holes, folder), 2 * KiB * MiB)
    huge = folder / "huge.qcow2"
    if not huge.exists():
        tool("qemu-img", "create", "-q", "-f", "qcow2", huge, "1T")
    yield Case("open of a 1 TiB image", {"qcow2-forensics": lambda: q.open_disk(huge).close()}, 1, "opens")
    yield Case(
        "import", {"python -c pass": _python("pass"), "import qcow2_forensics": _python("import qcow2_forensics")}
    )


def _fresh(path: Path, peers: tuple[str, ...]) -> dict[str, Callable[[int, int], bytes]]:
    """Readers that open anew for each run would be fairer to nobody: caches are smaller than the disk."""
    return opened(path, *peers)


def _python(code: str) -> Callable[[], None]:
    return lambda: tool(sys.executable, "-c", code)


def _exports(path: Path, folder: Path) -> dict[str, Callable[[], object]]:
    converted, exported = folder / "converted.raw", folder / "exported.raw"

    def convert() -> None:
        converted.unlink(missing_ok=True)  # both write new files: replacing one makes ext4 write it out at once
        convert_to_raw(path, folder)()

    def hashed() -> None:
        convert()
        with converted.open("rb") as stream:
            hashlib.file_digest(stream, "sha256")

    def export(*options: str) -> None:
        exported.unlink(missing_ok=True)
        tool(sys.executable, "-m", "qcow2_forensics", "export", path, exported, *options)

    return {
        "qemu-img convert": convert,
        "qemu-img convert, then SHA-256": hashed,
        "qcow2-forensics export": export,
        "qcow2-forensics export --no-hash": lambda: export("--no-hash"),
        "qcow2-forensics export --hash sha256-tree": lambda: export("--hash", "sha256-tree"),
    }
