"""Damages images of known content and counts what recovery gives back: right, wrong, missing.

The images are made by mke2fs, mkntfs, mkfs.xfs, qemu-img and qemu-io. The damage is done here by raw byte writes;
this script knows nothing of how states are recovered, and reads tables of the intact image by itself to
know where each L2 table belongs. What is measured goes through the public names.

    python tools/recovery_trial.py --images 300 --seed 1 --out trial.jsonl
    python tools/recovery_trial.py --only l1-zeroed --fs xfs --images 20

Every line of the output is one damaged image. ``bytes`` are those that the intact disk stores or the
recovered one does: ``right``, ``missing`` (read as zeros where no table was found), and ``wrong`` by the confidence that
the range had.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import qcow2_forensics as q
from qcow2_forensics.recovery import recovered_states

SECTOR = 512
MIB = 1 << 20
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
TREE_FILES = 60
NO_ENTRIES = -1  # the slot of an L2 table that is all zeros: it is not missed, wherever it is


class Made(NamedTuple):
    """An intact image: its file, the raw disk it shows, and what is special about it."""

    path: Path
    raw: Path
    fs: str
    cluster: int
    how: str
    options: str


class Damaged(NamedTuple):
    """A damaged image, the raw disk that should come back, and how to ask for it."""

    path: Path
    raw: Path
    slots: dict[int, int] | None  # the true place of each L2 table, by its host offset; None where that is not asked
    options: dict[str, Any]
    recovered: bool = True


CompareFiles = Callable[["q.Disk | None", Path], dict[str, int]]


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


# --- known content -------------------------------------------------------------------------------


def make_tree(folder: Path, chance: random.Random, total: int) -> None:
    """Fill a folder with files, most of them small."""
    folder.mkdir()
    left = total
    for number in range(TREE_FILES):
        size = min(left, int(chance.paretovariate(0.8) * 2000))
        left -= size
        where = folder / f"dir{number % 7}"
        where.mkdir(exist_ok=True)
        content = (
            chance.randbytes(size) if chance.random() < 0.5 else (f"line {number}\n".encode() * (size // 6 + 1))[:size]
        )
        (where / f"file{number}.bin").write_bytes(content)
    (folder / "large.bin").write_bytes(chance.randbytes(max(left, 4096)))


def make_raw(folder: Path, fs: str, size: int, chance: random.Random, *, partitioned: bool) -> Path:
    """Return a raw disk with one file system that is filled from a tree."""
    tree = folder / "tree"
    make_tree(tree, chance, min(size // 4, 24 * MIB))
    start = MIB if partitioned else 0
    volume = folder / "volume.raw"
    with volume.open("wb") as file:
        file.truncate(size - start - (MIB if partitioned else 0))
    if fs == "ext4":
        run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, volume)
    elif fs == "xfs":
        proto = folder / "proto"
        proto.write_text(_xfs_prototype(tree))
        run("mkfs.xfs", "-q", "-f", "-p", proto, volume)
    else:
        run("mkntfs", "-q", "-F", "-Q", "-s", "512", "-c", "4096", volume)
        for file in sorted(tree.rglob("*.bin")):
            run("ntfscp", "-q", "-f", volume, file, file.name)
    if not partitioned:
        return volume
    disk = folder / "disk.raw"
    with disk.open("wb") as out:
        out.truncate(size)
    script = f"label: gpt\nstart={start // SECTOR}, size={(size - 2 * MIB) // SECTOR}, type=linux\n"
    subprocess.run(["sfdisk", "-q", str(disk)], input=script.encode(), check=True, capture_output=True)
    with volume.open("rb") as source, disk.open("r+b") as target:
        for at, length in data_segments(volume):
            source.seek(at)
            target.seek(start + at)
            target.write(source.read(length))
    volume.unlink()
    return disk


def _xfs_prototype(tree: Path) -> str:
    lines = ["/dev/null", "0 0", "d--755 0 0"]
    for folder in sorted(path for path in tree.iterdir() if path.is_dir()):
        lines.append(f"{folder.name} d--755 0 0")
        lines += [f"{file.name} ---644 0 0 {file}" for file in sorted(folder.iterdir())]
        lines.append("$")
    lines += [f"{file.name} ---644 0 0 {file}" for file in sorted(tree.iterdir()) if file.is_file()]
    return "\n".join([*lines, "$", ""])


def data_segments(path: Path) -> list[tuple[int, int]]:
    """Return (offset, length) of what a sparse file stores."""
    segments: list[tuple[int, int]] = []
    with path.open("rb") as file:
        at, end = 0, path.stat().st_size
        while at < end:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            stop = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            segments += [(p, min(8 * MIB, stop - p)) for p in range(start, stop, 8 * MIB)]
            at = stop
    return segments


# --- intact images -------------------------------------------------------------------------------


def make_image(
    folder: Path, fs: str, cluster: int, options: str, how: str, chance: random.Random, *, sparse: bool
) -> Made:
    """Return an image with known content: converted, written in place, or aged."""
    spans = cluster * (cluster // (16 if "extended_l2" in options else 8))
    least = {"xfs": 320, "ntfs": 24, "ext4": 16}[fs] * MIB
    most = 24 << 30 if sparse else 96 * MIB
    size = max(least, min(most, spans * chance.randint(1, 200)))
    if sparse:
        size = max(size, 2 << 30)
    size = size // MIB * MIB
    raw = make_raw(folder, fs, size, chance, partitioned=chance.random() < 0.5)
    path = folder / "image.qcow2"
    text = f"cluster_size={cluster}" + (f",{options}" if options else "")
    packed = "compression_type" in options
    if how == "converted":
        run("qemu-img", "convert", "-O", "qcow2", *(["-c"] if packed else []), "-o", text, raw, path)
    else:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", text, path, size)
        write_in_place(path, raw, chance, aged=how == "aged", folder=folder)
    return Made(path, raw, fs, cluster, how, options)


def write_in_place(path: Path, raw: Path, chance: random.Random, *, aged: bool, folder: Path) -> None:
    """Write the disk piece by piece; aged: out of order, some pieces twice, with snapshots and discards between."""
    pieces = [
        (at + p, min(256 * 1024, length - p)) for at, length in data_segments(raw) for p in range(0, length, 256 * 1024)
    ]
    if not aged:
        _write_pieces(path, raw, pieces, folder)
        return
    block = max(1, len(pieces) // 24)
    groups = [pieces[at : at + block] for at in range(0, len(pieces), block)]
    for index in range(0, len(groups) - 1, 3):  # as a guest allocates: mostly in order
        if chance.random() < 0.4:
            groups[index], groups[index + 1] = groups[index + 1], groups[index]
    ordered = [piece for group in groups for piece in group]
    third = len(ordered) // 3 or 1
    _write_pieces(path, raw, ordered[:third], folder)
    run("qemu-img", "snapshot", "-c", "first", path)
    again = chance.sample(ordered[:third], min(8, third))
    _write_pieces(path, raw, again + ordered[third : 2 * third], folder)
    run("qemu-img", "snapshot", "-c", "second", path)
    _write_pieces(path, raw, chance.sample(ordered[: 2 * third], min(6, third)) + ordered[2 * third :], folder)
    discarded = chance.sample(ordered, min(4, len(ordered)))
    run("qemu-io", "-f", "qcow2", "-d", "unmap", *_commands(f"discard {at} {length}" for at, length in discarded), path)
    _write_pieces(path, raw, discarded, folder)
    if chance.random() < 0.5:
        run("qemu-img", "snapshot", "-d", "first", path)


def _write_pieces(path: Path, raw: Path, pieces: list[tuple[int, int]], folder: Path) -> None:
    with raw.open("rb") as source:
        for start in range(0, len(pieces), 400):
            commands = []
            for at, length in pieces[start : start + 400]:
                source.seek(at)
                name = folder / f"p{len(commands)}"
                name.write_bytes(source.read(length))
                commands.append(f"write -q -s {name} {at} {length}")
            run("qemu-io", "-f", "qcow2", *_commands(iter(commands)), path)


def _commands(commands: Iterator[str]) -> list[str]:
    return [part for command in commands for part in ("-c", command)]


# --- damage, by raw bytes ------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where the tables of an intact image are, read from its bytes; ``blank`` are L2 tables without entries."""

    cluster: int
    l1_offset: int
    l1: tuple[int, ...]
    blank: frozenset[int]


def layout_of(path: Path) -> Layout:
    with path.open("rb") as file:
        head = file.read(112)
        (bits,), (size, offset) = struct.unpack_from(">I", head, 20), struct.unpack_from(">IQ", head, 36)
        file.seek(offset)
        entries = struct.unpack(f">{size}Q", file.read(8 * size))
        hosts = tuple(entry & OFFSET_MASK for entry in entries)
        blank = set()
        for host in filter(None, hosts):
            file.seek(host)
            if not any(file.read(1 << bits)):
                blank.add(host)
    return Layout(1 << bits, offset, hosts, frozenset(blank))


def snapshots_of(path: Path) -> int:
    """Return how many snapshots an image has."""
    with path.open("rb") as file:
        return int(struct.unpack_from(">I", file.read(64), 60)[0])


def true_slots(layout: Layout) -> dict[int, int]:
    """Return the slot of each L2 table by its host offset, NO_ENTRIES for one that maps nothing."""
    return {host: NO_ENTRIES if host in layout.blank else slot for slot, host in enumerate(layout.l1) if host}


def poke(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def _copy(made: Made, folder: Path) -> Path:
    path = folder / "damaged.bin"
    run("cp", "--sparse=always", made.path, path)
    return path


def header_noise(made: Made, folder: Path, chance: random.Random) -> Damaged:
    path, layout = _copy(made, folder), layout_of(made.path)
    poke(path, 0, chance.randbytes(layout.cluster))
    return Damaged(path, made.raw, true_slots(layout), {"virtual_size": made.raw.stat().st_size})


def header_zeroed(made: Made, folder: Path, chance: random.Random) -> Damaged:
    path, layout = _copy(made, folder), layout_of(made.path)
    poke(path, 0, bytes(layout.cluster))
    return Damaged(path, made.raw, true_slots(layout), {"virtual_size": made.raw.stat().st_size})


def carved(made: Made, folder: Path, chance: random.Random) -> Damaged:
    path = folder / "damaged.bin"
    with path.open("wb") as out, made.path.open("rb") as image:
        out.write(chance.randbytes(SECTOR * chance.randint(1, 5000)))
        shutil.copyfileobj(image, out, 4 * MIB)
    return Damaged(path, made.raw, None, {})


def l1_zeroed(made: Made, folder: Path, chance: random.Random) -> Damaged:
    path, layout = _copy(made, folder), layout_of(made.path)
    poke(path, layout.l1_offset, bytes(8 * len(layout.l1)))
    return Damaged(path, made.raw, true_slots(layout), {})


def l1_noise(made: Made, folder: Path, chance: random.Random) -> Damaged:
    path, layout = _copy(made, folder), layout_of(made.path)
    poke(path, layout.l1_offset, chance.randbytes(8 * len(layout.l1)))
    return Damaged(path, made.raw, true_slots(layout), {})


def header_and_l1(made: Made, folder: Path, chance: random.Random) -> Damaged:
    path, layout = _copy(made, folder), layout_of(made.path)
    poke(path, 0, chance.randbytes(layout.cluster))
    poke(path, layout.l1_offset, bytes(8 * len(layout.l1)))
    return Damaged(path, made.raw, true_slots(layout), {"virtual_size": made.raw.stat().st_size})


def _lose_l2(made: Made, folder: Path, chance: random.Random, data: Callable[[int], bytes]) -> Damaged:
    path, layout = _copy(made, folder), layout_of(made.path)
    used = [host for host in layout.l1 if host and host not in layout.blank]
    for host in chance.sample(used, max(1, len(used) // 8)):
        poke(path, host, data(layout.cluster))
    return Damaged(path, made.raw, None, {})


def l2_zeroed(made: Made, folder: Path, chance: random.Random) -> Damaged:
    return _lose_l2(made, folder, chance, bytes)


def l2_noise(made: Made, folder: Path, chance: random.Random) -> Damaged:
    return _lose_l2(made, folder, chance, chance.randbytes)


def flag_cleared(made: Made, folder: Path, chance: random.Random) -> Damaged:
    """Clear the compression type and its feature bit, or that of extended L2 entries."""
    path = _copy(made, folder)
    assume: dict[str, str] = {}
    with path.open("rb") as file:
        features = int.from_bytes(file.read(112)[72:80], "big")
    if "zstd" in made.options:
        features &= ~8
        poke(path, 104, b"\0")
        assume["compression"] = "zstd"
    if "extended_l2" in made.options:
        features &= ~16
        assume["extended-l2"] = "on"
    poke(path, 72, features.to_bytes(8, "big"))
    return Damaged(path, made.raw, None, {"assume": assume}, recovered=False)


def _new_data(raw: Path, chance: random.Random) -> list[str]:
    """Return commands that write over parts of what the disk holds."""
    places = [chance.choice(data_segments(raw)) for _ in range(6)]
    starts = [at + chance.randrange(length) // SECTOR * SECTOR for at, length in places]
    end = raw.stat().st_size
    return [f"write -q -P {chance.randint(1, 255)} {at} {min(40960, end - at)}" for at in starts]


def reverted(made: Made, folder: Path, chance: random.Random) -> Damaged:
    """Go back to a snapshot: the state before is wanted."""
    path = _copy(made, folder)
    run("qemu-img", "snapshot", "-c", "back", path)
    writes = _new_data(made.raw, chance)
    run("qemu-io", "-f", "qcow2", *_commands(iter(writes)), path)
    before = folder / "before.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, before)
    options = f"driver=qcow2,file.filename={path},pass-discard-snapshot=off"
    run("qemu-img", "snapshot", "--image-opts", "-a", "back", options)
    return Damaged(path, before, None, {})


def deleted(made: Made, folder: Path, chance: random.Random) -> Damaged:
    """Delete a snapshot that differs from the active state: its disk is wanted."""
    path = _copy(made, folder)
    run("qemu-img", "snapshot", "-c", "gone", path)
    writes = _new_data(made.raw, chance)
    run("qemu-io", "-f", "qcow2", *_commands(iter(writes)), path)
    options = f"driver=qcow2,file.filename={path},pass-discard-snapshot=off"
    run("qemu-img", "snapshot", "--image-opts", "-d", "gone", options)
    return Damaged(path, made.raw, None, {"snapshot": "deleted:gone"}, recovered=False)


DAMAGES = {
    "header-noise": header_noise,
    "header-zeroed": header_zeroed,
    "carved": carved,
    "l1-zeroed": l1_zeroed,
    "l1-noise": l1_noise,
    "header-and-l1": header_and_l1,
    "l2-zeroed": l2_zeroed,
    "l2-noise": l2_noise,
    "flag-cleared": flag_cleared,
    "reverted": reverted,
    "deleted": deleted,
}


# --- what came back ------------------------------------------------------------------------------


def measure(damaged: Damaged, files: CompareFiles | None = None) -> dict[str, Any]:
    """Open the state and compare each range with the raw disk; ``files`` compares files, those of :func:`make_tree` by default."""
    files = files or _files
    started = time.process_time()
    result: dict[str, Any] = {"states": 1}
    if damaged.recovered:
        states = recovered_states(damaged.path, **damaged.options)
        result["states"] = len(states)
        result["seconds"] = round(time.process_time() - started, 2)
        if not states:
            return {**result, **_nothing(damaged, files)}
        if damaged.slots is not None:
            result["tables"] = _tables(states[0].placements, damaged.slots)
        disk = states[0].open()
        ranges = [(r.offset, r.length, r.confidence.label, r.reason) for r in states[0].ranges(disk)]
        result["size_right"] = disk.size == damaged.raw.stat().st_size
    else:
        disk = q.open_disk(damaged.path, **damaged.options)
        ranges = _ranges_of(disk)
    with disk:
        result.update(_compared(disk, ranges, damaged.raw))
        result["files"] = files(disk, damaged.raw)
    return result


def _ranges_of(disk: q.Disk) -> list[tuple[int, int, str, str]]:
    with contextlib.suppress(ImportError):
        from qcow2_forensics.recovery import confidence_of

        return [(r.offset, r.length, r.confidence.label, r.reason) for r in confidence_of(disk)]
    return [(0, disk.size, "certain", "the image's own tables")]


def _nothing(damaged: Damaged, files: CompareFiles) -> dict[str, Any]:
    stored = sum(length for _, length in data_segments(damaged.raw))
    return {"bytes": {"missing": stored}, "files": files(None, damaged.raw)}


def _tables(placements: Any, slots: dict[int, int]) -> dict[str, int]:
    counts: Counter[str] = Counter({"true": sum(slot != NO_ENTRIES for slot in slots.values())})
    for placed in placements:
        if slots.get(placed.offset) == NO_ENTRIES:
            continue
        if placed.offset not in slots:
            counts["foreign_" + placed.confidence.label] += 1
        else:
            right = slots[placed.offset] == placed.slot
            counts[("right_" if right else "wrong_") + placed.confidence.label] += 1
    return dict(counts)


def _compared(disk: q.Disk, ranges: list[tuple[int, int, str, str]], raw: Path) -> dict[str, Any]:
    stored = [(e.offset, e.offset + e.length) for e in disk.extents() if e.kind.name in ("DATA", "COMPRESSED")]
    wanted = [(at, at + length) for at, length in data_segments(raw)]
    counts: Counter[str] = Counter()
    bounds = [(offset, offset + length, word, reason) for offset, length, word, reason in ranges]
    bounds.append((disk.size, 1 << 63, "guess", "past the end"))
    with raw.open("rb") as oracle:
        at = 0
        for start, stop in _merged(sorted(stored + wanted)):
            while start < stop:
                while bounds[at][1] <= start:
                    at += 1
                end = min(stop, bounds[at][1], start + 4 * MIB)
                oracle.seek(start)
                expected = np.frombuffer(oracle.read(end - start).ljust(end - start, b"\0"), np.uint8)
                try:
                    found = disk.read(start, end - start) if start < disk.size else b""
                except q.Qcow2Error:
                    counts["unreadable"] += end - start
                    start = end
                    continue
                got = np.frombuffer(found.ljust(end - start, b"\0"), np.uint8)
                differs = got != expected
                empty = not got.any()
                wrong = int(differs.sum())
                counts["right"] += end - start - wrong
                word, reason = bounds[at][2:]
                if wrong and empty and ("no L2 table" in reason or reason == "past the end"):
                    counts["missing"] += wrong
                elif wrong:
                    counts[f"wrong_{word}"] += wrong
                start = end
    return {"bytes": dict(counts)}


def _merged(intervals: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    pending: tuple[int, int] | None = None
    for start, stop in intervals:
        if pending is not None and start <= pending[1]:
            pending = pending[0], max(pending[1], stop)
            continue
        if pending is not None:
            yield pending
        pending = start, stop
    if pending is not None:
        yield pending


def _files(disk: q.Disk | None, raw: Path) -> dict[str, int]:
    """Return how many files of the intact disk come back with the same SHA-256, through pytsk3."""
    try:
        import pytsk3

        import pytsk3_qcow2
    except ImportError:
        return {}
    wanted = _hashes(pytsk3, pytsk3.Img_Info(str(raw)))
    found: dict[str, str] = {}
    if disk is not None and wanted:
        with contextlib.suppress(OSError, RuntimeError):
            found = _hashes(pytsk3, pytsk3_qcow2.Img_Info(disk))
    return {"all": len(wanted), "right": sum(found.get(name) == digest for name, digest in wanted.items())}


def _hashes(pytsk3: Any, image: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for start in (0, MIB):
        try:
            file_system = pytsk3.FS_Info(image, offset=start)
        except (OSError, RuntimeError):
            continue
        with contextlib.suppress(OSError, RuntimeError):  # what the damage, or a trial's own writes, made unreadable
            _hash_below(pytsk3, file_system, found)
        break
    return found


def _hash_below(pytsk3: Any, file_system: Any, found: dict[str, str]) -> None:
    pending = [("", file_system.open_dir("/"))]
    while pending:
        path, folder = pending.pop()
        for entry in folder:
            name = entry.info.name.name.decode("utf-8", "replace")
            meta = entry.info.meta
            if meta is None or (not name.endswith(".bin") and not name.startswith("dir")):
                continue
            with contextlib.suppress(OSError, RuntimeError):
                if meta.type == pytsk3.TSK_FS_META_TYPE_DIR:
                    pending.append((f"{path}/{name}", entry.as_directory()))
                elif meta.type == pytsk3.TSK_FS_META_TYPE_REG:
                    digest = hashlib.sha256()
                    for at in range(0, meta.size, MIB):
                        digest.update(entry.read_random(at, min(MIB, meta.size - at)))
                    found[f"{path}/{name}"] = digest.hexdigest()


# --- the trial -----------------------------------------------------------------------------------


def combinations(
    chance: random.Random, arguments: argparse.Namespace
) -> Iterator[tuple[str, int, str, str, str, bool]]:
    """Yield file system, cluster size, options, how it was written, damage, and whether the disk is sparse, without end."""
    names = arguments.only or list(DAMAGES)
    while True:
        for damage in names:
            fs = chance.choice(arguments.fs or ["ext4", "ntfs", "xfs"])
            cluster = chance.choice(arguments.cluster or [512, 1024, 4096, 4096, 16384, 65536, 65536, 262144, 2 * MIB])
            options = chance.choice(
                ["", "", "", "compression_type=zlib", "compression_type=zstd", "extended_l2=on", "compat=0.10"]
            )
            if damage == "flag-cleared":
                options = chance.choice(["compression_type=zstd", "compression_type=zstd", "extended_l2=on"])
            if "extended_l2" in options:
                cluster = max(cluster, 16384)
            how = chance.choice(arguments.how or ["converted", "in-place", "aged"])
            if "compression" in options:
                how = "converted"
            sparse = arguments.sparse or (cluster >= 16384 and chance.random() < 0.3)
            if cluster == 512 and fs == "xfs":
                cluster = 4096  # XFS is at least 300 MiB: too slow to write in clusters of 512 bytes
            yield fs, cluster, options, how, damage, sparse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", action="append", choices=DAMAGES)
    parser.add_argument("--fs", action="append", choices=["ext4", "ntfs", "xfs"])
    parser.add_argument("--cluster", action="append", type=int)
    parser.add_argument("--how", action="append", choices=["converted", "in-place", "aged"])
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--keep", type=Path, help="keep the images in this folder")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    lines: list[dict[str, Any]] = []
    for number, (fs, cluster, options, how, damage, sparse) in enumerate(combinations(chance, arguments), 1):
        if number > arguments.images:
            break
        seed = chance.randrange(1 << 30)
        folder = Path(tempfile.mkdtemp(prefix="recovery-trial-", dir=arguments.keep))
        line: dict[str, Any] = {
            "number": number, "fs": fs, "cluster": cluster, "options": options, "how": how, "damage": damage, "sparse": sparse,
        }  # fmt: skip
        try:
            made = make_image(folder, fs, cluster, options, how, random.Random(seed), sparse=sparse)
            line["l2_tables"] = len(true_slots(layout_of(made.path)))
            line.update(measure(DAMAGES[damage](made, folder, random.Random(seed + 1))))
        except subprocess.CalledProcessError as error:
            line["failed"] = error.stderr.decode("utf-8", "replace")[:300]
        except (q.Qcow2Error, OSError) as error:
            line["failed"] = f"{type(error).__name__}: {error}"
        finally:
            if arguments.keep is None:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                line["folder"] = str(folder)
        lines.append(line)
        with arguments.out.open("a") if arguments.out else contextlib.nullcontext(sys.stdout) as out:
            print(json.dumps(line), flush=True, file=out)
    print(summary(lines))
    return 0


def summary(lines: list[dict[str, Any]]) -> str:
    """Return the figures by damage as a Markdown table."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[line["damage"]].append(line)
    rows = [
        "| damage | images | bytes right | missing | unreadable | wrong: guess | wrong: likely | wrong: certain | tables right | files right |"
    ]
    rows.append("|" + "---|" * 10)
    for name in DAMAGES:
        if name not in groups:
            continue
        counts: Counter[str] = Counter()
        tables: Counter[str] = Counter()
        files: Counter[str] = Counter()
        for line in groups[name]:
            counts.update(line.get("bytes", {}))
            tables.update(line.get("tables", {}))
            files.update(line.get("files", {}))
        total = sum(counts.values()) or 1
        right = sum(count for word, count in tables.items() if word.startswith("right"))
        placed = sum(count for word, count in tables.items() if word != "true")  # foreign: it is no table of the disk
        shown = [
            f"{counts[word] / total:.2%}" for word in ("right", "missing", "unreadable", "wrong_guess", "wrong_likely")
        ]
        failed = sum("failed" in line for line in groups[name])
        rows.append(
            f"| {name} | {len(groups[name])}{f' ({failed} failed)' if failed else ''} | {' | '.join(shown)} | "
            f"{counts['wrong_certain']} bytes | {right} of {placed} placed, of {tables['true']} | {files['right']} of {files['all']} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
