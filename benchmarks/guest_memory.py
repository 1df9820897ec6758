"""Indexing and reading migration streams, against Volatility's own QEMU layer over the same files.

The streams are written here: 16 GiB of guest RAM that is mostly zero, as guests are; one that is all
data; one whose pages change their kind at random, the worst that can be indexed.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import Case

from qcow2_forensics.format.source import FileSource
from qcow2_forensics.limits import GiB, MiB
from qcow2_forensics.memory import GuestMemory

try:
    from volatility3.framework import contexts
    from volatility3.framework.layers import physical, qemu
except ImportError:
    contexts = None

PAGE = 4096
MACHINE = b"pc-i440fx-7.2"
STOCK, OURS = "volatility3 QemuSuspendLayer", "qcow2-forensics"


def cases(folder: Path, *, smoke: bool = False) -> Iterator[Case]:
    shrink = 64 if smoke else 1
    typical = stream(folder / "typical.qevm", 16 * GiB // shrink, mixed(random.Random(1), 3000, 100))
    yield indexing("index of 16 GiB, mostly zero", typical, 16 * GiB // shrink)
    dense = stream(folder / "dense.qevm", 2 * GiB // shrink, mixed(random.Random(2), 20, 5000))
    yield indexing("index of 2 GiB, mostly data", dense, 2 * GiB // shrink)
    worst = stream(folder / "worst.qevm", 2 * GiB // shrink, mixed(random.Random(3), 2, 2))
    yield indexing("index of 2 GiB, a run every page or two", worst, 2 * GiB // shrink, stock=smoke)
    memory = GuestMemory(FileSource(typical))
    packed = memory.to_bytes()
    yield Case(
        "index of 16 GiB, from the cache",
        {OURS: lambda: GuestMemory.from_bytes(packed, memory.source)},
        count=16 * GiB // shrink // PAGE,
        unit="pages",
    )
    yield from reading(dense, 2 * GiB // shrink, smoke=smoke)


def indexing(name: str, path: Path, size: int, *, stock: bool = True) -> Case:
    readers: dict[str, Callable[[], Any]] = {}
    if contexts is not None and stock:
        readers[STOCK] = lambda: stock_layer(path)
    readers[OURS] = lambda: GuestMemory(FileSource(path))
    return Case(name, readers, count=size // PAGE, unit="pages")


def reading(path: Path, size: int, *, smoke: bool) -> Iterator[Case]:
    memory = GuestMemory(FileSource(path))
    part = min(size, 64 * MiB)
    layer = stock_layer(path) if contexts is not None else None
    count = 1000 if smoke else 20_000
    for name, span in (("8 bytes anywhere", size), ("8 bytes nearby", 4 * MiB)):
        # Never the same place twice: the stock layer keeps answers by their exact arguments.
        readers: dict[str, Callable[[], Any]] = {}
        theirs, ours = random.Random(4), random.Random(4)
        if layer is not None:
            readers[STOCK] = lambda span=span, source=theirs: scattered(layer, span, count, source)
        readers[OURS] = lambda span=span, source=ours: scattered(memory, span, count, source)
        yield Case(name, readers, count=count, unit="reads")
    # The stock layer's time grows with the square of the length, so it gets a small part.
    few = part if smoke else 4 * MiB
    readers = {STOCK: lambda: in_order(stock_layer(path), few)} if layer is not None else {}
    yield Case("4 MiB in order", readers | {OURS: lambda: in_order(memory, few)}, count=few)
    yield Case("64 MiB in order", {OURS: lambda: in_order(memory, part)}, count=part)


def scattered(layer: Any, span: int, count: int, source: random.Random) -> None:
    for _ in range(count):
        layer.read(source.randrange(span - 8), 8)


def in_order(layer: Any, length: int) -> None:
    for place in range(0, length, MiB):
        layer.read(place, MiB)


def stock_layer(path: Path) -> Any:
    context = contexts.Context()
    context.config["file.location"] = path.as_uri()
    context.add_layer(physical.FileLayer(context, "file", "file"))
    context.config["qemu.base_layer"] = "file"
    return qemu.QemuSuspendLayer(context, "qemu", "qemu")


def mixed(source: random.Random, zeros: int, data: int) -> Iterator[tuple[bool, int]]:
    """Yield runs of pages, ``(is data, how many)``, of random lengths up to the given ones."""
    while True:
        yield False, source.randint(1, zeros)
        yield True, source.randint(1, data)


def stream(path: Path, size: int, runs: Iterator[tuple[bool, int]]) -> Path:
    """Write the stream of a machine with one block of ``size`` bytes, unless it is there."""
    if path.exists():
        return path
    pages = size // PAGE
    end = struct.pack(">QBI", 0x10, 0x7E, 2)
    clock = bytearray(128)
    below = min(size, 3 * GiB)
    clock[0x34:0x36] = ((below - 16 * MiB) >> 16).to_bytes(2, "little")
    clock[0x5B:0x5E] = ((size - below) >> 16).to_bytes(3, "little")
    with path.open("wb") as out:
        out.write(b"QEVM" + struct.pack(">IBI", 3, 7, len(MACHINE)) + MACHINE)
        out.write(b"\x01" + struct.pack(">I", 2) + b"\x03ram" + struct.pack(">II", 0, 4))
        out.write(struct.pack(">Q", size | 4) + b"\x06pc.ram" + struct.pack(">Q", size) + end)
        out.write(b"\x03" + struct.pack(">I", 2) + struct.pack(">Q", 0x02) + b"\x06pc.ram\0")
        at = 1
        for filled, wanted in runs:
            count = min(wanted, pages - at)
            kind = [("word", ">u8"), ("body", "u1", PAGE if filled else 1)]
            records = np.zeros(count, dtype=kind)
            records["word"] = np.arange(at, at + count, dtype=np.uint64) * PAGE | (0x28 if filled else 0x22)
            if filled:
                records["body"] = np.random.default_rng(at).integers(0, 256, PAGE, dtype=np.uint8)
            out.write(records.tobytes())
            at += count
            if at >= pages:
                break
        out.write(end + b"\x04" + struct.pack(">I", 9) + b"\x0bmc146818rtc" + struct.pack(">II", 0, 3))
        out.write(bytes(clock) + struct.pack(">BIB", 0x7E, 9, 0))
    return path
