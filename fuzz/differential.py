"""Holds bytes and ``check`` counters against QEMU, for every mutated image QEMU opens."""

from __future__ import annotations

import json
import random
import re
import subprocess
from pathlib import Path

import qcow2_forensics as q
from qcow2_forensics.limits import MiB

from .mutator import Mutator

_DUMP = re.compile(rb"[0-9a-f]{8,}:  ")
_COMPARED = 2 * MiB  # guest bytes
_BLOCK = 4096
_COUNTERS = (
    "check-errors",
    "image-end-offset",
    "total-clusters",
    "corruptions",
    "leaks",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
)
_SKIPPED = ("luks", "aes", "overlay", "data")  # need keys or further files


def run(bases: dict[str, bytes], seed: int, count: int, folder: Path) -> list[dict[str, object]]:
    """Compare ``count`` mutated images; print figures and return the differences."""
    plain = {name: data for name, data in bases.items() if not name.startswith(_SKIPPED)}
    mutators = {name: Mutator(data) for name, data in plain.items()}
    differences: list[dict[str, object]] = []
    opened = checked = tried = 0
    path = folder / "case.qcow2"
    while opened < count and tried < 10 * count:
        rng = random.Random(seed + tried)
        tried += 1
        name = rng.choice(sorted(plain))
        data, changes = mutators[name].mutate(rng)
        path.write_bytes(data)
        fmt = "qcow" if name.endswith(".qcow") else "qcow2"
        problems = []
        theirs = _qemu_reads(path, fmt)
        if theirs is not None:
            opened += 1
            problems += _different_bytes(path, theirs)
        counters = _qemu_check(path) if fmt == "qcow2" else None
        if counters is not None:
            checked += 1
            ours = q.audit(path, depth="standard").check or {}
            problems += [
                f"{key}: {ours.get(key, 0)} for QEMU's {counters.get(key, 0)}"
                for key in _COUNTERS
                if ours.get(key, 0) != counters.get(key, 0)
            ]
        if problems:
            found = {
                "seed": seed + tried - 1,
                "target": "differential",
                "base": name,
                "changes": changes,
                "problem": problems[:4],
            }
            print(json.dumps(found), flush=True)
            (folder.parent / f"differential-{seed + tried - 1}.qcow2").write_bytes(data)
            differences.append(found)
    print(f"differential: {tried} images, {opened} opened by QEMU, {checked} checked, {len(differences)} differences")
    return differences


def _qemu_reads(path: Path, fmt: str) -> dict[int, bytes | None] | None:
    """Return what QEMU reads block by block (None for an I/O error), None when it does not open."""
    command = ["qemu-io", "-r", "-f", fmt, str(path)]
    blocks = _blocks(path)
    script = "".join(f"read -v {at} {_BLOCK}\n" for at in blocks)
    try:
        done = subprocess.run(command, input=script.encode(), check=False, capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode < 0 or (done.returncode and b"can't open" in done.stderr):
        return None
    return _parse(done.stdout, blocks)


def _blocks(path: Path) -> list[int]:
    try:
        size = q.open_image(path).disk_size
    except q.Qcow2Error:
        return []
    size = min(size, _COMPARED) // _BLOCK * _BLOCK
    return list(range(0, size, 64 * 1024 + _BLOCK))[:48]


def _parse(output: bytes, blocks: list[int]) -> dict[int, bytes | None]:
    found: dict[int, bytes | None] = dict.fromkeys(blocks)
    data = bytearray()
    for line in output.splitlines():
        line = line.removeprefix(b"qemu-io> ")
        if line.startswith(b"read ") and b"bytes at offset" in line:
            at = int(line.rsplit(b" ", 1)[1])
            found[at] = bytes(data)
            data.clear()
        elif line.startswith(b"read failed"):
            data.clear()
        elif _DUMP.match(line):
            data += bytes.fromhex(line.partition(b":")[2][2:49].decode())
    return found


def _different_bytes(path: Path, theirs: dict[int, bytes | None]) -> list[str]:
    problems = []
    try:
        disk = q.open_disk(path, eof="zeros", missing="zeros")
    except q.Qcow2Error as error:
        return [f"we refuse what QEMU opens: {error}"]
    for at, data in theirs.items():
        try:
            ours: bytes | None = disk.read(at, _BLOCK)
        except q.Qcow2Error:
            ours = None
        if data is not None and ours != data:
            problems.append(f"bytes at {at:#x} differ" if ours is not None else f"we refuse {at:#x}, QEMU reads it")
        elif data is None and ours is not None:
            problems.append(f"we read {at:#x}, QEMU refuses")
    return problems


def _qemu_check(path: Path) -> dict[str, int] | None:
    command = ["qemu-img", "check", "-U", "-f", "qcow2", "--output=json", str(path)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        return None
