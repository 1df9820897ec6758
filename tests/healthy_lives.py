"""Healthy images: every combination of QEMU's options, and a life of random operations for each, all done by QEMU's tools.

A life is a seeded sequence of what administrators and guests do: writes, zeroing, discards that free clusters,
snapshots made, applied and deleted, growing and shrinking, bitmaps, and a writer that is killed before the
image is repaired. What is left is what QEMU calls sound: ``qemu-img check`` finds nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import qemu
from tests.image_builder import PASSPHRASE
from tests.matrix import commands

MiB = 1 << 20
SIZE = 4 * MiB
SECRET = PASSPHRASE  # one passphrase for all, so that one image made by QEMU serves all
UNMAP = {"discard": "unmap"}


@dataclass(frozen=True)
class Combination:
    """Options of ``qemu-img create``, and what the image is made beside."""

    options: dict[str, Any] = field(default_factory=dict)
    encrypt: dict[str, Any] | None = None
    data_file: bool = False
    backing: str = ""  # its format

    @property
    def secret(self) -> str | None:
        return SECRET if self.encrypt else None

    @property
    def version2(self) -> bool:
        return self.options.get("compat") == "0.10"

    @property
    def compresses(self) -> bool:
        return not (self.encrypt or self.data_file)

    @property
    def cluster(self) -> int:
        text = str(self.options.get("cluster_size", "64k"))
        return int(text.rstrip("kM")) * {"k": 1024, "M": MiB}.get(text[-1], 1)


def _of(**options: Any) -> Combination:
    return Combination(options)


COMBINATIONS: dict[str, Combination] = {
    "default": _of(),
    **{f"clusters of {size}": _of(cluster_size=size) for size in ("512", "1k", "4k", "128k", "2M")},
    **{f"version 2, {size}": _of(compat="0.10", cluster_size=size) for size in ("512", "4k", "64k")},
    **{f"refcounts of {bits} bits": _of(refcount_bits=bits, cluster_size="4k") for bits in (1, 2, 4, 8, 32, 64)},
    **{f"subclusters of {size}": _of(extended_l2="on", cluster_size=size) for size in ("16k", "64k", "1M")},
    "lazy": _of(lazy_refcounts="on"),
    "lazy, 4k": _of(lazy_refcounts="on", cluster_size="4k"),
    "lazy, subclusters": _of(lazy_refcounts="on", extended_l2="on", cluster_size="32k"),
    "zstd": _of(compression_type="zstd"),
    "zstd, 4k, refcounts of 8 bits": _of(compression_type="zstd", cluster_size="4k", refcount_bits=8),
    "zstd, subclusters": _of(compression_type="zstd", extended_l2="on"),
    "preallocated metadata": _of(preallocation="metadata"),
    "preallocated metadata, 4k": _of(preallocation="metadata", cluster_size="4k"),
    "preallocated metadata, subclusters": _of(preallocation="metadata", extended_l2="on"),
    "preallocated metadata, lazy": _of(preallocation="metadata", lazy_refcounts="on"),
    "preallocated falloc": _of(preallocation="falloc"),
    "preallocated full, version 2": _of(preallocation="full", compat="0.10"),
    "luks": Combination(encrypt={"format": "luks"}),
    "luks, 4k": Combination({"cluster_size": "4k"}, {"format": "luks"}),
    "luks, subclusters": Combination({"extended_l2": "on"}, {"format": "luks", "cipher-mode": "cbc"}),
    "luks, preallocated metadata": Combination({"preallocation": "metadata"}, {"format": "luks"}),
    "aes, version 2": Combination({"compat": "0.10"}, {"format": "aes"}),
    "data file": Combination(data_file=True),
    "data file, 4k, lazy": Combination({"cluster_size": "4k", "lazy_refcounts": "on"}, data_file=True),
    "data file, subclusters": Combination({"extended_l2": "on"}, data_file=True),
    "raw data file": Combination({"data_file_raw": "on"}, data_file=True),
    "raw data file, preallocated": Combination({"data_file_raw": "on", "preallocation": "metadata"}, data_file=True),
    "backing": Combination(backing="qcow2"),
    "raw backing, 4k": Combination({"cluster_size": "4k"}, backing="raw"),
    "backing, subclusters": Combination({"extended_l2": "on"}, backing="qcow2"),
    "backing, version 2": Combination({"compat": "0.10"}, backing="qcow2"),
}


class Life:
    """One image, and what happens to it. ``log`` says what did, for a test that fails."""

    def __init__(self, combination: Combination, seed: int, path: Path) -> None:
        self.combination = combination
        self.chance = random.Random(seed)
        self.path = path
        self.log: list[str] = []
        self.size = SIZE
        self.snapshots: list[str] = []
        self.bitmaps: list[str] = []
        self.backed = bool(combination.backing)
        options = dict(combination.options)
        if combination.data_file:
            options["data_file"] = path.with_suffix(".data")
        backing = None
        if combination.backing:
            backing = path.with_name("base").with_suffix("." + combination.backing)
            qemu.create(backing, self.size, fmt=combination.backing)
            qemu.io(backing, "write -P 9 0 1M", fmt=combination.backing)
        qemu.create(
            path,
            self.size,
            backing=backing and backing.name,
            backing_format=combination.backing or None,
            secret=combination.secret,
            encrypt=combination.encrypt,
            **options,
        )

    def live(self, steps: int) -> None:
        """Do some of what may happen to such an image."""
        for _ in range(steps):
            possible = [step for step, allowed in self._steps() if allowed]
            step = self.chance.choice(possible)
            self.log.append(step.__name__)
            step()

    def _steps(self) -> list[tuple[Callable[[], None], bool]]:
        combination = self.combination
        narrow = combination.options.get("refcount_bits", 16)  # QEMU refuses what its refcounts cannot count
        snapshots = not combination.data_file and len(self.snapshots) < min(3, (1 << narrow) - 2)
        raw = bool(combination.options.get("data_file_raw"))
        return [
            (self.write, True),
            (self.write_and_discard, True),
            (self.compress, combination.compresses),
            (self.take, snapshots and not self.bitmaps),
            (self.apply, bool(self.snapshots)),
            (self.delete, bool(self.snapshots)),
            (self.grow, not self.bitmaps and not (self.snapshots and combination.version2) and not raw),
            (self.shrink, not self.bitmaps and not self.snapshots and self.size > SIZE and not raw),
            (
                self.add_bitmap,
                not (combination.version2 or combination.encrypt or self.snapshots) and len(self.bitmaps) < 3,
            ),
            (self.remove_bitmap, bool(self.bitmaps)),
            (self.die_and_be_repaired, not combination.encrypt),
            (
                self.widen,
                narrow >= 16 and combination.cluster <= 65536 and not (combination.encrypt or combination.version2),
            ),
            (self.commit, self.backed and not self.snapshots),
            (self.rebase, self.backed),
        ]

    # --- what happens ----------------------------------------------------------------------------

    def write(self) -> None:
        """Writes, zeroing and discards of a guest whose discards are ignored."""
        self._io(*self._commands())

    def write_and_discard(self) -> None:
        """The same with discards that free clusters."""
        self._io(*self._commands(), f"discard 0 {self.chance.choice((64, 256, 1024))}k", opts=UNMAP)

    def compress(self) -> None:
        """Compressed clusters, and writes over some; QEMU refuses to compress where a cluster is already."""
        compressed = commands(self._seed(), self.size, self.combination.cluster, compressed=True, count=6)
        self._io(*compressed, check=False)

    def take(self) -> None:
        """A snapshot."""
        name = f"s{len(self.log)}"
        qemu.snapshot(self.path, name, secret=self.combination.secret)
        self.snapshots.append(name)

    def apply(self) -> None:
        """Back to a snapshot."""
        size = self.size
        qemu.snapshot(self.path, self.chance.choice(self.snapshots), action="-a", secret=self.combination.secret)
        self.size = size if self.combination.secret else int(qemu.info_json(self.path)["virtual-size"])

    def delete(self) -> None:
        """One snapshot less."""
        name = self.snapshots.pop(self.chance.randrange(len(self.snapshots)))
        qemu.snapshot(self.path, name, action="-d", secret=self.combination.secret)

    def grow(self) -> None:
        """A larger disk."""
        self._resize(self.size + self.chance.choice((64 * 1024, MiB + 512, 40 * MiB)))

    def shrink(self) -> None:
        """A smaller one."""
        self._resize(SIZE, shrink=True)

    def add_bitmap(self) -> None:
        """A bitmap, and writes that it notes."""
        name = f"b{len(self.log)}"
        qemu.bitmap(self.path, "--add", name, "-g", "65536")
        self.bitmaps.append(name)
        self.write()

    def remove_bitmap(self) -> None:
        """One bitmap less."""
        qemu.bitmap(self.path, "--remove", self.bitmaps.pop())

    def die(self) -> None:
        """A writer that is killed."""
        self._io(*self._commands(), "sigraise 9", check=False)

    def die_and_be_repaired(self) -> None:
        """The same, and the repair."""
        self.die()
        qemu.img("check", "-q", "-r", "all", self.path, check=False)

    def widen(self) -> None:
        """Refcounts of another width."""
        qemu.amend(self.path, refcount_bits=self.chance.choice((16, 32, 64)))

    def commit(self) -> None:
        """What is above the backing file goes into it."""
        qemu.img("commit", "-q", self.path)

    def rebase(self) -> None:
        """No backing file any more: what it showed is copied."""
        qemu.img("rebase", "-b", "", self.path)
        self.backed = False

    # --- how -------------------------------------------------------------------------------------

    def _seed(self) -> int:
        return self.chance.randrange(1 << 30)

    def _commands(self) -> list[str]:
        return list(commands(self._seed(), self.size, min(self.combination.cluster, 65536), count=8))

    def _io(self, *commands: str, opts: dict[str, str] | None = None, check: bool = True) -> None:
        plain = [command for command in commands if " -c " not in command or self.combination.compresses]
        qemu.io(self.path, *plain, secret=self.combination.secret, opts=opts, check=check)

    def _resize(self, size: int, *, shrink: bool = False) -> None:
        qemu.resize(self.path, size, shrink=shrink, secret=self.combination.secret)
        self.size = size
