"""Randomly damaged images, each made again from its seed, and QEMU's word on them.

``damaged(seed, folder)`` copies one of the base images QEMU made and edits it in one to three
places chosen at random: table entries, refcounts, snapshot and bitmap entries, extensions, header
fields, file length. Run as a script it compares our counters with ``qemu-img check`` on as many as
asked for::

    python -m tests.damage --count 2000 --first 0 [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests import qemu
from tests.image_builder import COMPRESSED, COPIED, ZERO

OFFSET = 0x00FF_FFFF_FFFF_FE00

# --- base images, made by QEMU -------------------------------------------------------------------


def _plain(folder: Path, name: str, cluster: str, size: str = "1M", **options: object) -> Path:
    path = qemu.create(folder / name, size, cluster_size=cluster, **options)
    qemu.io(path, "write -P 1 0 20k", "write -P 2 64k 40k", "write -z 72k 8k", "write -P 3 512k 64k", "discard 520k 8k")
    return path


def _snapshots(folder: Path, name: str, cluster: str, **options: object) -> Path:
    path = _plain(folder, name, cluster, **options)
    qemu.snapshot(path, "one")
    qemu.io(path, "write -P 4 0 8k", "write -P 5 700k 30k")
    qemu.snapshot(path, "two")
    qemu.io(path, "write -P 6 64k 4k")
    return path


def _packed(folder: Path, name: str, cluster: str, kind: str = "zlib", **options: object) -> Path:
    raw = folder / f"{name}.raw"
    generator = random.Random(name)
    raw.write_bytes(b"".join(bytes(generator.choices(b"abcdefgh", k=1024)) for _ in range(256)) + bytes(1 << 18))
    path = folder / name
    qemu.convert(
        raw,
        path,
        fmt="raw",
        target_format="qcow2",
        compressed=True,
        target_options={"cluster_size": cluster, "compression_type": kind, **options},
    )
    qemu.io(path, "write -P 7 16k 16k")
    return path


def _bitmaps(folder: Path, name: str, cluster: str) -> Path:
    path = _plain(folder, name, cluster)
    qemu.bitmap(path, "--add", "b0", "-g", "512")
    qemu.io(path, "write -P 8 100k 30k")
    qemu.bitmap(path, "--add", "b1", "-g", "65536")
    qemu.io(path, "write -P 9 300k 3k")
    return path


def _extended(folder: Path, name: str, cluster: str, **options: object) -> Path:
    path = qemu.create(folder / name, "4M", cluster_size=cluster, extended_l2="on", **options)
    qemu.io(
        path,
        "write -P 1 0 3k",
        "write -P 2 64k 70k",
        "write -z 40k 4k",
        "discard 66k 8k",
        f"write -c -P 3 1M {cluster}",
        "write -P 4 2M 300k",
    )
    return path


def _data_file(folder: Path, name: str, cluster: str, **options: object) -> Path:
    path = folder / name
    return _plain(folder, path.name, cluster, data_file=str(folder / f"{name}.data"), **options)


BASES: dict[str, Callable[[Path, str], Path]] = {
    "plain-512": partial(_plain, cluster="512"),
    "plain-4k": partial(_plain, cluster="4k"),
    "plain-64k": partial(_plain, cluster="64k"),
    "plain-2m": partial(_plain, cluster="2M"),
    "v2-512": partial(_snapshots, cluster="512", compat="0.10"),
    "v2-4k": partial(_plain, cluster="4k", compat="0.10"),
    "refcount-1": partial(_plain, cluster="1k", refcount_bits=1),
    "refcount-2": partial(_snapshots, cluster="1k", refcount_bits=2),
    "refcount-4": partial(_snapshots, cluster="512", refcount_bits=4),
    "refcount-8": partial(_snapshots, cluster="4k", refcount_bits=8),
    "refcount-32": partial(_snapshots, cluster="2k", refcount_bits=32),
    "refcount-64": partial(_snapshots, cluster="1k", refcount_bits=64),
    "snapshots-512": partial(_snapshots, cluster="512"),
    "snapshots-4k": partial(_snapshots, cluster="4k"),
    "snapshots-64k": partial(_snapshots, cluster="64k"),
    "zlib-512": partial(_packed, cluster="512"),
    "zlib-4k": partial(_packed, cluster="4k"),
    "zlib-64k": partial(_packed, cluster="64k"),
    "zstd-8k": partial(_packed, cluster="8k", kind="zstd"),
    "lazy-4k": partial(_plain, cluster="4k", lazy_refcounts="on"),
    "bitmaps-4k": partial(_bitmaps, cluster="4k"),
    "bitmaps-64k": partial(_bitmaps, cluster="64k"),
    "extended-16k": partial(_extended, cluster="16k"),
    "extended-64k": partial(_extended, cluster="64k"),
    "data-4k": partial(_data_file, cluster="4k"),
    "data-raw-64k": partial(_data_file, cluster="64k", data_file_raw="on"),
    "metadata-64k": partial(_plain, cluster="64k", size="8M", preallocation="metadata"),
}


class Bases:
    """The base images, each made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Path:
        if name not in self._made:
            self._made[name] = BASES[name](self.folder, name)
        return self._made[name]


# --- edits ---------------------------------------------------------------------------------------


class Editor:
    """One image in memory, and where its structures are."""

    def __init__(self, data: bytes, chance: random.Random) -> None:
        self.data = bytearray(data)
        self.chance = chance
        self.edits: list[str] = []
        self.version = self.get(4, 4)
        self.cluster = 1 << self.get(20, 4)
        self.extended = bool(self.version >= 3 and self.get(72) & 16)
        self.order = self.get(96, 4) if self.version >= 3 else 4

    def get(self, at: int, length: int = 8) -> int:
        return int.from_bytes(self.data[at : at + length], "big")

    def put(self, what: str, at: int, value: int, length: int = 8) -> None:
        value &= (1 << 8 * length) - 1
        if 0 <= at <= len(self.data) - length:
            self.edits.append(f"{what} @{at:#x}: {self.get(at, length):#x} -> {value:#x}")
            self.data[at : at + length] = value.to_bytes(length, "big")

    def slots(self, at: int, count: int) -> list[int]:
        """File offsets of non-zero 64-bit entries of a table."""
        places = (at + 8 * index for index in range(count))
        return [place for place in places if place + 8 <= len(self.data) and self.get(place)]

    def l1(self) -> list[int]:
        return self.slots(self.get(40), self.get(36, 4))

    def l2(self) -> list[int]:
        step = 16 if self.extended else 8
        found: list[int] = []
        for place in self.l1():
            table = self.get(place) & OFFSET
            entries = range(table, min(table + self.cluster, len(self.data) - 16), step)
            used = [entry for entry in entries if self.get(entry)]
            found += used
            found += [self.chance.choice(entries)] if entries else []
        return found

    def host(self) -> int:
        """A cluster-aligned place, mostly in the file."""
        clusters = max(1, len(self.data) // self.cluster)
        return self.chance.choice((self.chance.randrange(clusters), self.chance.randrange(clusters * 2))) * self.cluster

    def entry(self, old: int) -> int:
        """What may become of a table entry."""
        chance = self.chance
        return chance.choice(
            (
                0,
                old ^ (1 << chance.randrange(64)),
                old ^ COPIED,
                old ^ COMPRESSED,
                old ^ ZERO,
                old + 512,
                old - self.cluster,
                (old & ~OFFSET) | self.host(),
                COPIED | self.host(),
                chance.getrandbits(64),
                COPIED,
                COMPRESSED | chance.getrandbits(62) & 0xFF_FFFF,
                self.host() | 1,
            )
        )


def _edit_l1(image: Editor) -> None:
    if places := image.l1():
        at = image.chance.choice(places)
        image.put("L1", at, image.entry(image.get(at)))


def edit_l2(image: Editor) -> None:
    if places := image.l2():
        at = image.chance.choice(places)
        image.put("L2", at, image.entry(image.get(at)))


def _copy_l2(image: Editor) -> None:
    if places := image.l2():
        source, target = image.chance.choice(places), image.chance.choice(places)
        image.put("L2 copy", target, image.get(source))


def _edit_subclusters(image: Editor) -> None:
    if image.extended and (places := image.l2()):
        at = image.chance.choice(places) + 8
        image.put("subclusters", at, image.get(at) ^ (1 << image.chance.randrange(64)))


def _edit_reftable(image: Editor) -> None:
    start, count = image.get(48), image.get(56, 4) * image.cluster // 8
    places = [*image.slots(start, count), start + 8 * image.chance.randrange(max(1, min(count, 4)))]
    at = image.chance.choice(places)
    old = image.get(at)
    image.put(
        "reftable", at, image.chance.choice((0, old ^ (1 << image.chance.randrange(64)), image.host(), old | COPIED))
    )


def edit_refcount(image: Editor) -> None:
    blocks = [image.get(place) & ~0x1FF for place in image.slots(image.get(48), image.get(56, 4) * image.cluster // 8)]
    blocks = [block for block in blocks if block + image.cluster <= len(image.data)]
    if not blocks:
        return
    block = image.chance.choice(blocks)
    bits = 1 << min(image.order, 6)
    used = max(1, min(image.cluster * 8 // bits, len(image.data) // image.cluster + 4))
    index = image.chance.randrange(used)
    if bits < 8:
        at = block + index * bits // 8
        image.put("refcounts", at, image.get(at, 1) ^ (1 << image.chance.randrange(8)), 1)
        return
    length = bits // 8
    at = block + index * length
    old = image.get(at, length)
    image.put("refcount", at, image.chance.choice((0, 1, 2, old + 1, old - 1, image.chance.getrandbits(bits))), length)


def _edit_snapshot(image: Editor) -> None:
    count, at = image.get(60, 4), image.get(64)
    if not count or at + 40 > len(image.data):
        return
    fields = ((0, 8), (8, 4), (12, 2), (14, 2), (32, 4), (36, 4), (40, 8), (48, 8))
    offset, length = image.chance.choice(fields)
    old = image.get(at + offset, length)
    new = image.chance.choice(
        (0, 1, old + 1, old + image.cluster, old ^ (1 << image.chance.randrange(8 * length)), image.host())
    )
    image.put("snapshot", at + offset, new, length)


def _edit_snapshot_l1(image: Editor) -> None:
    count, at = image.get(60, 4), image.get(64)
    if count and at + 40 <= len(image.data):
        places = image.slots(image.get(at), min(image.get(at + 8, 4), 4096))
        if places:
            place = image.chance.choice(places)
            image.put("snapshot L1", place, image.entry(image.get(place)))


def _edit_header(image: Editor) -> None:
    offset, length = image.chance.choice(
        ((24, 8), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8), (72, 8), (88, 8), (96, 4))
    )
    old = image.get(offset, length)
    new = image.chance.choice(
        (0, old + 1, old - 1, old * 2, old + image.cluster, image.host(), old ^ (1 << image.chance.randrange(16)))
    )
    image.put("header", offset, new, length)


def _edit_bitmaps(image: Editor) -> None:
    at = 112 if image.version >= 3 else 72
    while at + 8 <= min(len(image.data), image.cluster):
        kind, length = image.get(at, 4), image.get(at + 4, 4)
        if kind == 0x23852875:
            directory = image.get(at + 8 + 16)
            table, size = image.get(directory), image.get(directory + 8, 4)
            entries = [table + 8 * index for index in range(min(size, 64))]
            place = image.chance.choice([*entries, directory + 8, directory + 12, directory])
            length = 4 if place in (directory + 8, directory + 12) else 8
            old = image.get(place, length)
            new = image.chance.choice(
                (0, 1, old ^ 1, old ^ (1 << image.chance.randrange(8 * length)), image.host(), old + 512)
            )
            image.put("bitmaps", place, new, length)
            return
        if kind == 0:
            return
        at += 8 + -(-length // 8) * 8


def _edit_length(image: Editor) -> None:
    chance = image.chance
    size = len(image.data)
    new = chance.choice(
        (size - chance.randrange(image.cluster), size - image.cluster * chance.randrange(1, 8), chance.randrange(size))
    )
    new = max(new, 512)
    image.edits.append(f"cut {size:#x} -> {new:#x}")
    del image.data[new:]


def _append(image: Editor) -> None:
    count = image.chance.randrange(1, 3 * image.cluster)
    image.edits.append(f"append {count}")
    image.data += bytes([0xEE]) * count


def _flip(image: Editor) -> None:
    """Any byte of the metadata-rich start of the file."""
    at = image.chance.randrange(min(len(image.data), 12 * image.cluster))
    image.put("flip", at, image.get(at, 1) ^ (1 << image.chance.randrange(8)), 1)


_EDITS: tuple[tuple[int, Callable[[Editor], None]], ...] = (
    (8, edit_l2),
    (4, _edit_l1),
    (4, _copy_l2),
    (5, edit_refcount),
    (3, _edit_subclusters),
    (3, _edit_reftable),
    (3, _edit_snapshot),
    (3, _edit_snapshot_l1),
    (3, _edit_bitmaps),
    (2, _edit_header),
    (2, _edit_length),
    (1, _append),
    (2, _flip),
)


class Damaged(NamedTuple):
    """A damaged image: where it is, what it was made from, and what was done to it."""

    path: Path
    base: str
    edits: list[str]


def damaged(seed: int, bases: Bases, folder: Path) -> Damaged:
    """Write the image of one seed into ``folder``."""
    chance = random.Random(seed)
    base = chance.choice(sorted(BASES))
    image = Editor(bases[base].read_bytes(), chance)
    weights, edits = zip(*_EDITS, strict=True)
    for edit in chance.choices(edits, weights, k=chance.choice((1, 1, 2, 3))):
        edit(image)
    path = folder / f"seed-{seed}.qcow2"
    path.write_bytes(image.data)
    return Damaged(path, base, image.edits)


# --- comparing -----------------------------------------------------------------------------------


def ours(path: Path) -> dict[str, Any] | None:
    """Return our counters for an image."""
    from qcow2_forensics.census import take_census
    from qcow2_forensics.errors import Qcow2Error
    from qcow2_forensics.format.image import Image

    try:
        with Image(path) as image:
            found = take_census(image).check
            return None if found is None else dict(found)
    except Qcow2Error:
        return None


class Verdict(NamedTuple):
    """``kind`` is ``same``, ``different``, ``refused`` (QEMU prints nothing, nor do we) or ``lenient``."""

    kind: str
    theirs: dict[str, Any] | None
    mine: dict[str, Any] | None


def compare(path: Path) -> Verdict:
    """Compare our counters with those of ``qemu-img check``."""
    theirs, mine = qemu.check_json(path).counters, ours(path)
    if theirs is None:
        return Verdict("refused" if mine is None else "lenient", theirs, mine)
    return Verdict("same" if mine == theirs else "different", theirs, mine)


def main(arguments: list[str] | None = None) -> int:
    """Compare many images; the exit code says whether all were alike."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--keep", type=Path, help="folder for images that differ")
    options = parser.parse_args(arguments)
    kinds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="qcow2-damage-") as name:
        folder = Path(name)
        bases = Bases(folder)
        for seed in range(options.first, options.first + options.count):
            image = damaged(seed, bases, folder)
            verdict = compare(image.path)
            kinds[verdict.kind] += 1
            if verdict.kind in ("different", "lenient"):
                sys.stdout.write(f"seed {seed} {image.base} {verdict.kind}: {image.edits}\n")
                if verdict.kind == "different":
                    sys.stdout.write(f"  QEMU {verdict.theirs}\n  ours {verdict.mine}\n")
                if options.keep:
                    shutil.copy(image.path, options.keep)
            image.path.unlink()
    sys.stdout.write(f"{sum(kinds.values())} images: {dict(kinds)}\n")
    return 1 if kinds["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
