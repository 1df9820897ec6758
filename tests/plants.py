"""Images of every kind, places to plant bytes in, and QEMU's word on whether any state shows them.

A plant counts when qemu-img sees no difference: every state converts to the same bytes, ``check`` and ``info`` say
the same, bitmaps are copied alike and VM states read alike. Then nothing needs the place, and the audit has to
point at it. Nothing here asks our own reader what a place is for, but for choosing where to plant.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import qcow2_forensics as q
from tests import qemu
from tests.image_builder import PASSPHRASE

CHECKED = ("table entries past the end of the disk",)  # no state reads them, and qemu-img check looks at most of them
LENGTH = 64  # bytes of a plant
KiB, MiB = 1 << 10, 1 << 20


class Made(NamedTuple):
    """One image and how QEMU opens it; ``data`` is its external data file."""

    path: Path
    fmt: str = "qcow2"
    secret: str | None = None
    data: Path | None = None


class Plant(NamedTuple):
    """Bytes at an offset of a file: "" the image, "data" its data file; ``place`` is what the account calls it."""

    file: str
    offset: int
    content: bytes
    place: str

    @property
    def end(self) -> int:
        return self.offset + len(self.content)


# --- images --------------------------------------------------------------------------------------


def _size(chance: random.Random, cluster: int) -> int:
    most = min(64 * cluster, 3 * MiB) if cluster >= 4096 else 256 * KiB
    return chance.randrange(3 * cluster, max(most, 4 * cluster), 512)


def _writes(chance: random.Random, size: int, cluster: int, *, compressed: bool = False, count: int = 8) -> list[str]:
    """Return qemu-io commands that leave data, zeros and discarded ranges, up to the end of the disk."""
    found = []
    for number in range(count):
        start = chance.randrange(0, size, 512)
        length = min(chance.choice((512, 4096, cluster, 3 * cluster)), size - start)
        verb = chance.choice((f"write -P {number + 1}", f"write -P {number + 1}", "write -z", "discard"))
        found.append(f"{verb} {start} {length}")
    tail = min(cluster, 4096, size)
    found.append(f"write -P 77 {(size - tail) // 512 * 512} {tail // 512 * 512}")
    if compressed:
        clusters = size // cluster
        for number in range(min(6, clusters)):
            at = chance.randrange(clusters) * cluster
            found.append(f"write -c -P {number + 1} {at} {cluster}")
        last = size // cluster * cluster
        if last < size:
            found.append(f"write -c -P 9 {last} {size - last}")
    return found


def _qcow2(chance: random.Random, folder: Path, *, secret: str | None = None, **options: object) -> Made:
    path = folder / "disk.qcow2"
    cluster = int(str(options.setdefault("cluster_size", chance.choice((512, 4096, 65536)))))
    size = _size(chance, cluster)
    qemu.create(path, size, secret=secret, **options)
    compressed = secret is None and "data_file" not in options
    commands = _writes(chance, size, cluster, compressed=compressed)
    qemu.io(path, *commands, secret=secret, check=False)  # a cluster that is there cannot be compressed any more
    return Made(path, secret=secret)


def plain(chance: random.Random, folder: Path) -> Made:
    return _qcow2(chance, folder, refcount_bits=chance.choice((1, 8, 16, 64)))


def version2(chance: random.Random, folder: Path) -> Made:
    made = _qcow2(chance, folder, compat="0.10")
    if chance.random() < 0.5:
        qemu.snapshot(made.path, "one")
        qemu.io(made.path, "write -P 5 0 2k")
    return made


def backed(chance: random.Random, folder: Path) -> Made:
    base = folder / "base.raw"
    base.write_bytes(chance.randbytes(64 * KiB))
    path = qemu.create(folder / "disk.qcow2", "1000k", backing=base, backing_format="raw", cluster_size=4096)
    qemu.io(path, *_writes(chance, 1000 * KiB, 4096))
    return Made(path)


def extended(chance: random.Random, folder: Path) -> Made:
    made = _qcow2(chance, folder, extended_l2="on", cluster_size=chance.choice((16384, 65536)))
    qemu.snapshot(made.path, "one")
    qemu.io(made.path, "write -P 5 0 2k", "write -P 6 9k 1k")
    return made


def compressed(chance: random.Random, folder: Path) -> Made:
    kind = chance.choice(("zlib", "zstd"))
    made = _qcow2(chance, folder, compression_type=kind, cluster_size=chance.choice((4096, 65536)))
    source = folder / "source.raw"
    words = [chance.randbytes(16) for _ in range(64)]
    source.write_bytes(b"".join(chance.choice(words) for _ in range(chance.randrange(4 * KiB, 32 * KiB, 32))))
    size = source.stat().st_size // 512 * 512
    with source.open("r+b") as file:
        file.truncate(size)
    path = folder / "packed.qcow2"
    qemu.img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind},cluster_size=4096", source, path)
    if chance.random() < 0.5:
        return made
    qemu.io(path, "write -P 5 0 4k", f"write -c -P 9 {size // 8192 * 4096} 4k", check=False)
    return Made(path)


def snapshots(chance: random.Random, folder: Path) -> Made:
    made = _qcow2(chance, folder)
    size = int(qemu.info_json(made.path)["virtual-size"])
    for number in range(chance.randrange(1, 4)):
        qemu.snapshot(made.path, "x" * chance.randrange(1, 20) + str(number))
        qemu.io(made.path, *_writes(chance, size, 4096, count=3))
        if chance.random() < 0.5:
            larger = size + chance.randrange(512, 600 * KiB, 512)
            qemu.resize(made.path, larger)
            size = larger
    if chance.random() < 0.4:
        qemu.snapshot(made.path, "y")
        qemu.snapshot(made.path, "y", action="-d")
    return made


def bitmaps(chance: random.Random, folder: Path) -> Made:
    made = _qcow2(chance, folder, cluster_size=chance.choice((4096, 65536)))
    for number in range(chance.randrange(1, 4)):
        granularity = chance.choice((512, 4096, 65536))
        qemu.bitmap(made.path, "--add", f"map{number}", "-g", str(granularity))
    qemu.io(made.path, "write -P 5 0 3k", "write -P 6 8k 1k")
    return made


def luks(chance: random.Random, folder: Path) -> Made:
    return _qcow2(chance, folder, secret=PASSPHRASE, cluster_size=chance.choice((4096, 65536)))


def data_file(chance: random.Random, folder: Path) -> Made:
    data = folder / "disk.data"
    raw = chance.choice(("on", "off"))
    made = _qcow2(chance, folder, data_file=data, data_file_raw=raw, cluster_size=chance.choice((4096, 65536)))
    if chance.random() < 0.5:
        with data.open("r+b") as file:
            file.truncate(data.stat().st_size + 8192)
    return made._replace(data=data)


def qcow1(chance: random.Random, folder: Path) -> Made:
    path = folder / "disk.qcow"
    size = chance.randrange(64 * KiB, 2 * MiB, 512)
    qemu.create(path, size, fmt="qcow")
    commands = [one for one in _writes(chance, size, 4096, compressed=True) if "-z" not in one and "discard" not in one]
    qemu.io(path, *commands, fmt="qcow", check=False)
    return Made(path, fmt="qcow")


def vm_state(chance: random.Random, folder: Path) -> Made:
    path = qemu.create(folder / "disk.qcow2", 1000 * KiB + 512, cluster_size=chance.choice((4096, 65536)))
    qemu.io(path, "write -P 3 0 100k", f"write -P 4 {996 * KiB} 4k")
    qemu.monitor(path, "savevm memory", memory="1")
    if chance.random() < 0.5:
        qemu.io(path, "write -P 5 0 64k")
    if chance.random() < 0.5:
        qemu.io(path, "write -b -P 8 0 100k")
    return Made(path)


KINDS: dict[str, Callable[[random.Random, Path], Made]] = {
    function.__name__: function
    for function in (
        plain,
        version2,
        backed,
        extended,
        compressed,
        snapshots,
        bitmaps,
        luks,
        data_file,
        qcow1,
        vm_state,
    )
}


# --- what QEMU says ------------------------------------------------------------------------------


def seen_by_qemu(made: Made) -> str:
    """Return everything QEMU shows of an image and its states, as one digest of text; raises where it cannot open it."""
    with tempfile.TemporaryDirectory(prefix="plants-", dir=made.path.parent) as name:
        return json.dumps(list(_views(made, Path(name))), sort_keys=True, default=str)


def _views(made: Made, folder: Path) -> Iterator[object]:
    info = json.loads(qemu.img("info", "-f", made.fmt, "-U", "--output=json", made.path).stdout)
    yield {key: value for key, value in info.items() if key not in ("actual-size", "children")}
    if made.fmt == "qcow2":
        yield qemu.check_json(made.path, secret=made.secret)[:2]
    yield _digest(made, folder, None)
    snapshots = info.get("snapshots", ())
    for entry in snapshots:
        yield _digest(made, folder, entry["name"])
    if info.get("format-specific", {}).get("data", {}).get("bitmaps"):
        target = folder / "bitmaps.qcow2"
        qemu.img("convert", "--bitmaps", "-O", "qcow2", made.path, target)
        yield _sha(target)
    for entry in snapshots:
        if entry["vm-state-size"]:
            copy = folder / "applied.qcow2"
            shutil.copyfile(made.path, copy)
            qemu.snapshot(copy, entry["name"], action="-a")
            sectors = -(-entry["vm-state-size"] // 512) * 512  # it reads no less
            shown = qemu.io(copy, f"read -b -v 0 {sectors}", read_only=True).text
            yield hashlib.sha256(shown.rpartition("\nread ")[0].encode()).hexdigest()


def _digest(made: Made, folder: Path, snapshot: str | None) -> str:
    target = folder / "raw"
    qemu.convert(made.path, target, fmt=made.fmt, snapshot=snapshot, secret=made.secret)
    return _sha(target)


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- planting ------------------------------------------------------------------------------------


def rows_of(report: q.Report, file: str = "") -> list[dict[str, Any]]:
    """Return the table of one file of an account."""
    return next((one["rows"] for one in report.details["account"]["files"] if one["file"] == file), [])


def plant(made: Made, plants: list[Plant]) -> None:
    """Write plants into the files of an image."""
    for one in plants:
        path = made.data if one.file == "data" else made.path
        assert path is not None
        with path.open("r+b") as file:
            file.seek(one.offset)
            file.write(one.content)


def candidates(chance: random.Random, report: q.Report, count: int, *, remainders: bool) -> list[Plant]:
    """Return places in rows of the account that are remainders of zeros, or in those that are not; apart from each other.

    Rows are chosen by what they are first, so that rare places come as often as large ones.
    """
    by_place: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for file in report.details["account"]["files"]:
        for row in file.get("rows", ()):
            spare = bool(row.get("remainder")) and row["what"] not in CHECKED
            is_wanted = spare == remainders and not row.get("nonzero")
            if is_wanted and row["what"] != "several, joined":
                key = row["what"], row.get("owner", "") if remainders else ""
                by_place.setdefault(key, []).append((file["file"], row))
    found: list[Plant] = []
    for _ in range(3 * count):
        if len(found) == count or not by_place:
            break
        file, row = chance.choice(by_place[chance.choice(sorted(by_place))])
        length = min(LENGTH, row["length"])
        offset = row["offset"] + chance.randrange(row["length"] - length + 1)
        clash = any(
            one.file == file and one.offset < offset + length + 8192 and offset < one.end + 8192 for one in found
        )
        near = any(one.file == file and one.offset < offset + length and offset < one.end for one in found)
        if near or (clash and row["length"] > 32768):
            continue
        content = bytes(chance.randrange(1, 256) for _ in range(length))
        found.append(Plant(file, offset, content, row["what"]))
    return found


def _items(report: q.Report) -> set[tuple[object, ...]]:
    return {
        (finding.code, item.file, item.offset, item.length, str(item.value))
        for finding in report.findings
        for item in finding.evidence
        if item.offset is not None
    }


def missed(before: q.Report, after: q.Report, plants: list[Plant]) -> list[Plant]:
    """Return the plants that neither a new finding points at nor the account lists as bytes that are not zeros."""
    ranges = [(str(item[1]), int(item[2]), int(item[2]) + int(item[3] or 1)) for item in _items(after) - _items(before)]  # type: ignore[call-overload]
    for file in after.details["account"]["files"]:
        rows = [*file.get("rows", ()), *file.get("remainders", ())]
        ranges += [
            (file["file"], row["offset"], row["offset"] + row["length"])
            for row in rows
            if row.get("nonzero") and row.get("remainder")
        ]
    return [one for one in plants if not _is_covered(one, ranges)]


def _is_covered(one: Plant, ranges: list[tuple[str, int, int]]) -> bool:
    at = one.offset
    for file, start, stop in sorted(ranges):
        if file == one.file and start <= at < stop:
            at = stop
    return at >= one.end


class Outcome(NamedTuple):
    """What came of planting: plants that counted, those of them that were missed, and how many QEMU saw."""

    counted: list[Plant]
    missed: list[Plant]
    visible: int


def try_plants(made: Made, chance: random.Random, count: int, structures: int) -> Outcome:
    """Plant into remainders, all at once, and into places in use, one by one; return what the audit says."""
    audited = {"passphrase": made.secret, "resolver": q.Resolver(folders=[made.path.parent])}
    before, shown = q.audit(made.path, "deep", **audited), seen_by_qemu(made)
    groups = [candidates(chance, before, count, remainders=True)]
    groups += [[one] for one in candidates(chance, before, structures, remainders=False)]
    kept = {path: path.read_bytes() for path in (made.path, made.data) if path is not None}
    counted: list[Plant] = []
    lost: list[Plant] = []
    visible = 0
    while groups:
        group = groups.pop()
        if not group:
            continue
        plant(made, group)
        try:
            same = seen_by_qemu(made) == shown
        except (qemu.QemuError, ValueError):
            same = False
        if same:
            counted += group
            lost += missed(before, q.audit(made.path, "deep", **audited), group)
        elif len(group) > 1:
            groups += [group[: len(group) // 2], group[len(group) // 2 :]]
        else:
            visible += 1
        for path, data in kept.items():
            _restore(path, data, group)
    return Outcome(counted, lost, visible)


def _restore(path: Path, data: bytes, group: list[Plant]) -> None:
    with path.open("r+b") as file:
        for one in group:
            file.seek(one.offset)
            file.write(data[one.offset : one.end])
        file.truncate(len(data))
