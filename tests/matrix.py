"""The test matrix: images made by the real tools at test time, over every axis of the format.

A :class:`Scenario` is one combination; :func:`make` builds it with qemu-img and seeded random
qemu-io commands and returns its views: the active state and each snapshot, with what both our
reader and the oracle need to open them.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import qemu
from tests.image_builder import PASSPHRASE

KiB, MiB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Scenario:
    """One combination. ``options`` are those of ``qemu-img create -o``."""

    cluster: int = 65536
    fmt: str = "qcow2"
    compression: str = ""  # "", "zlib" or "zstd": whether compressed clusters are written
    backing: str = ""  # "", or a name of BACKINGS
    data_file: str = ""  # "", "data" or "raw"
    encrypt: tuple[tuple[str, str], ...] = ()
    snapshots: int = 1
    options: tuple[tuple[str, str], ...] = ()

    @property
    def id(self) -> str:
        words = [self.fmt, str(self.cluster), *(f"{key}={value}" for key, value in self.options)]
        words += [word for word in (self.compression, self.backing, self.data_file) if word]
        words += [value for _, value in self.encrypt]
        return "-".join(words)

    @property
    def extended(self) -> bool:
        return ("extended_l2", "on") in self.options

    @property
    def version2(self) -> bool:
        return ("compat", "0.10") in self.options


@dataclass(frozen=True)
class View:
    """One state of one image: how our reader and how the oracle open it."""

    path: Path
    snapshot: str | None
    passphrase: str | None
    fmt: str

    @property
    def ours(self) -> dict[str, Any]:
        return {"snapshot": self.snapshot, "passphrase": self.passphrase}

    @property
    def oracle(self) -> dict[str, Any]:
        return {"fmt": self.fmt, "secret": self.passphrase}


# --- content -------------------------------------------------------------------------------------


@functools.cache
def pattern_file() -> Path:
    """Return a file of 1 MiB that is half random and half repetitive, for ``write -s``."""
    folder = Path(tempfile.mkdtemp(prefix="qcow2-matrix-"))
    generator = random.Random(1)
    pieces = []
    for index in range(128):
        pieces.append(generator.randbytes(4 * KiB) if index % 3 == 0 else f"line {index:5d} ".encode() * 341)
    path = folder / "pattern"
    path.write_bytes(b"".join(piece[: 4 * KiB].ljust(4 * KiB, b".") for piece in pieces) * 2)
    return path


def commands(seed: int, size: int, cluster: int, *, compressed: bool = False, count: int = 24) -> Iterator[str]:
    """Yield seeded random writes, zeroings, discards and compressed writes for a disk of ``size``.

    Ranges are whole sectors, near and across cluster and subcluster borders, many of them small.
    """
    generator = random.Random(seed)
    unit = 512
    whole = size // unit * unit
    for at in range(0, whole - cluster if compressed else 0, 3 * cluster):
        if generator.random() < 0.5 and at < 60 * cluster:
            yield f"write -q -c -s {pattern_file()} {at} {cluster}"
    for _ in range(count):
        longest = generator.choice((unit, cluster // 32, cluster, 3 * cluster, 9 * cluster))
        length = max(unit, generator.randrange(1, max(2, longest // unit + 1)) * unit)
        start = generator.randrange(0, whole // unit) * unit
        if generator.random() < 0.5:
            start = start // cluster * cluster + generator.choice((0, 0, cluster // 2 // unit * unit))
        length = min(length, whole - start)
        if length <= 0:
            continue
        kind = generator.choice(("-P", "-P", "-s", "-z", "-z -u", "discard", "-c"))
        if kind == "-c":
            first = start // cluster * cluster
            last = min(first + 3 * cluster, whole // cluster * cluster) if compressed else first
            yield from (f"write -q -c -s {pattern_file()} {at} {cluster}" for at in range(first, last, cluster))
        elif kind == "discard":
            yield f"discard -q {start} {length}"
        else:
            value = {"-s": f" {pattern_file()}", "-P": f" {generator.randrange(1, 256)}"}.get(kind, "")
            yield f"write -q {kind}{value} {start} {length}"


def disk_size(scenario: Scenario) -> int:
    """Return a size that is no multiple of the cluster size but of a sector, small but several clusters."""
    return max(512 * KiB, 5 * scenario.cluster + scenario.cluster // 2) + 7 * 512


# --- backing files -------------------------------------------------------------------------------

BACKINGS = ("raw-short", "raw-odd", "qcow2-long", "qcow1", "ext-short", "chain")


def _backing(kind: str, folder: Path, size: int) -> tuple[str, str]:
    """Make a backing file (with its own below it for "chain") and return its name and format."""
    if kind in ("raw-short", "raw-odd"):
        length = size // 3 // 512 * 512 + (100 if kind == "raw-odd" else 0)
        data = pattern_file().read_bytes()
        (folder / "base.raw").write_bytes((data * (length // len(data) + 1))[:length])
        return "base.raw", "raw"
    if kind == "qcow2-long":
        path = qemu.create(folder / "base.qcow2", size * 2, cluster_size=4096)
        qemu.io(path, *commands(11, size * 2, 4096, count=60))
        return path.name, "qcow2"
    if kind == "qcow1":
        path = qemu.create(folder / "base.qcow", size - 1536, fmt="qcow")
        qemu.io(path, *commands(12, size - 1536, 4096, count=40), fmt="qcow")
        return path.name, "qcow"
    if kind == "ext-short":
        path = qemu.create(folder / "base.ext", size // 2 // 512 * 512, cluster_size="16k", extended_l2="on")
        qemu.io(path, *commands(13, size // 2 // 512 * 512, 16384, count=40, compressed=True), check=False)
        return path.name, "qcow2"
    below, fmt = _backing("raw-short", folder, size)
    middle = qemu.create(folder / "middle.qcow2", size * 3 // 4 // 512 * 512, backing=below, backing_format=fmt)
    qemu.io(middle, *commands(14, size // 2, 65536))
    return middle.name, "qcow2"


# --- images --------------------------------------------------------------------------------------


def make(scenario: Scenario, folder: Path) -> list[View]:
    """Build the image of a scenario in ``folder`` and return its views."""
    size = disk_size(scenario)
    path = folder / "disk"
    options: dict[str, Any] = dict(scenario.options)
    secret = PASSPHRASE if scenario.encrypt else None
    if scenario.fmt == "qcow2":
        options["cluster_size"] = scenario.cluster
        if scenario.compression == "zstd":
            options["compression_type"] = "zstd"
    if scenario.data_file:
        options["data_file"] = folder / "disk.data"
        if scenario.data_file == "raw":
            options["data_file_raw"] = "on"
    if scenario.backing:
        options["backing"], options["backing_format"] = _backing(scenario.backing, folder, size)
    if scenario.fmt == "qcow" and scenario.backing:
        options["unsafe"] = True
    encrypt: Mapping[str, object] | None = dict(scenario.encrypt) or None
    qemu.create(path, size, fmt=scenario.fmt, secret=secret, encrypt=encrypt, cwd=folder, **options)
    views = []
    for number in range(scenario.snapshots + 1):
        todo = commands(number, size, scenario.cluster, compressed=bool(scenario.compression))
        # QEMU refuses compressed writes over allocated clusters; the other commands of the run go on.
        done = qemu.io(path, *todo, fmt=scenario.fmt, secret=secret, check=not scenario.compression)
        assert not done.crashed
        if number < scenario.snapshots:
            qemu.snapshot(path, f"snap{number}", secret=secret)
            views.append(View(path, f"snap{number}", secret, scenario.fmt))
    return [View(path, None, secret, scenario.fmt), *views]


def _grid() -> Iterator[Scenario]:
    """Yield version x cluster size x extended L2 x compression x backing."""
    for cluster in (512, 4096, 65536, 2 * MiB):
        for compat in ("0.10", "1.1"):
            for compression in ("", "zlib", "zstd"):
                for backing in ("", "raw-odd", "qcow2-long"):
                    if compat == "1.1" or compression != "zstd":
                        yield Scenario(cluster, "qcow2", compression, backing, options=(("compat", compat),))
    for cluster in (16384, 65536, 2 * MiB):
        for compression in ("", "zlib", "zstd"):
            for backing in ("", "raw-short", "qcow2-long", "chain"):
                yield Scenario(cluster, "qcow2", compression, backing, options=(("extended_l2", "on"),))


def _axes() -> Iterator[Scenario]:
    """Yield the axes that need no full product: widths, backing kinds, data files, version 1."""
    for bits in (1, 2, 4, 8, 32, 64):
        for cluster in (512, 65536):
            yield Scenario(cluster, snapshots=0 if bits == 1 else 2, options=(("refcount_bits", str(bits)),))
    for cluster in (1024, 8192, 131072, 524288, 1048576):
        yield Scenario(cluster, "qcow2", "zlib")
        yield Scenario(cluster, "qcow2", "zstd", "chain")
    yield Scenario(65536, options=(("lazy_refcounts", "on"),))
    for backing in BACKINGS:
        yield Scenario(65536, backing=backing, snapshots=2)
        yield Scenario(512, backing=backing)
        yield Scenario(65536, "qcow2", "zlib", backing, options=(("extended_l2", "on"),))
    for data_file in ("data", "raw"):
        for cluster in (512, 65536, 2 * MiB):
            yield Scenario(cluster, data_file=data_file, snapshots=0)
        yield Scenario(65536, data_file=data_file, snapshots=0, options=(("extended_l2", "on"),))
    yield Scenario(65536, data_file="data", backing="qcow2-long", snapshots=0)
    for preallocation in ("metadata", "falloc", "full"):
        yield Scenario(65536, options=(("preallocation", preallocation),))
    yield Scenario(4096, "qcow", snapshots=0)
    yield Scenario(4096, "qcow", "zlib", snapshots=0)
    yield Scenario(512, "qcow", backing="raw-odd", snapshots=0)
    yield Scenario(512, "qcow", "zlib", backing="qcow2-long", snapshots=0)


AES = (("format", "aes"),)


def _luks(**parts: str) -> tuple[tuple[str, str], ...]:
    return (("format", "luks"), *((key.replace("_", "-"), value) for key, value in parts.items()))


def _encrypted() -> Iterator[Scenario]:
    """Yield encrypted images; each LUKS one costs QEMU seconds of key derivation, so they are few.

    Every cipher, mode and hash is read in ``tests/test_encryption.py``.
    """
    yield Scenario(4096, "qcow", encrypt=AES, snapshots=0)
    yield Scenario(4096, "qcow", "zlib", encrypt=AES, snapshots=0)
    yield Scenario(65536, encrypt=AES)
    yield Scenario(512, "qcow2", "zlib", "qcow2-long", encrypt=AES)
    yield Scenario(65536, "qcow2", "zlib", encrypt=_luks())
    yield Scenario(512, backing="raw-odd", encrypt=_luks())
    yield Scenario(2 * MiB, encrypt=_luks(), options=(("extended_l2", "on"),))
    yield Scenario(65536, encrypt=_luks(), data_file="data", snapshots=0)
    yield Scenario(4096, encrypt=_luks(cipher_mode="cbc", ivgen_alg="essiv", ivgen_hash_alg="sha256"))


def _unique(scenarios: Iterator[Scenario]) -> list[Scenario]:
    return list(dict.fromkeys(scenarios))


def _all() -> Iterator[Scenario]:
    yield from _grid()
    yield from _axes()


PLAIN: list[Scenario] = _unique(_all())
ENCRYPTED: list[Scenario] = _unique(_encrypted())


@dataclass
class Factory:
    """Makes each scenario once per folder; tests of one scenario share it."""

    folder: Path
    made: dict[str, list[View]] = field(default_factory=dict)

    def views(self, scenario: Scenario) -> list[View]:
        if scenario.id not in self.made:
            place = self.folder / f"s{len(self.made)}"
            place.mkdir()
            self.made[scenario.id] = make(scenario, place)
        return self.made[scenario.id]
