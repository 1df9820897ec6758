"""Chains of random layers read as QEMU reads them, whatever was looked up, kept or read before."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.errors import FormatError
from qcow2_forensics.format.source import FileSource
from qcow2_forensics.reader import parts
from qcow2_forensics.reader.runs import Kind
from tests import qemu
from tests.image_builder import Builder

pytestmark = qemu.requires_qemu

KiB = 1024
MiB = 1024 * KiB


def random_chain(chance: random.Random, folder: Path, depth: int) -> Path:
    """Make a chain of layers of every kind and size over a raw or QCOW2 base; return the top."""
    size = chance.randrange(1, 4 * MiB // 512) * 512
    path, form = folder / "layer0", chance.choice(["raw", "qcow2"])
    qemu.img("create", "-q", "-f", form, path, str(size))
    _write(chance, path, form, size)
    for level in range(1, depth):
        name = folder / f"layer{level}"
        size = max(512, chance.choice([size, size, size + 70 * KiB, size // 2 // 512 * 512]))
        options = f"cluster_size={chance.choice([512, 4096, 65536, 65536, 2 * MiB])}"
        if chance.random() < 0.3:
            options = "cluster_size=32k,extended_l2=on"
        qemu.img("create", "-q", "-f", "qcow2", "-o", options, "-b", path.name, "-F", form, name, str(size), cwd=folder)
        _write(chance, name, "qcow2", size)
        path, form = name, "qcow2"
    return path


def _write(chance: random.Random, path: Path, form: str, size: int) -> None:
    commands = []
    for number in range(chance.randrange(1, 12)):
        at = chance.randrange(size // 512) * 512
        length = min(size - at, chance.choice([512, 4 * KiB, 64 * KiB, 300 * KiB]))
        kinds = [f"write -P {1 + number + chance.randrange(200)} {at} {length}", f"write -z {at} {length}"]
        if form == "qcow2":
            kinds += [f"write -c -P {chance.randrange(256)} {at // 65536 * 65536} 64k", f"discard {at} {length}"]
        commands.append(chance.choice([kinds[0], *kinds]))
    # One that does not fit the layer, such as a compressed write past its end, is left out.
    qemu.io(path, *commands, fmt=form, check=False)


@pytest.mark.parametrize("seed", range(int(os.environ.get("QCOW2_CHAINS", "8"))))
def test_a_chain_reads_as_in_qemu_whatever_was_read_before_or_is_in_new_memory(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_allocate", lambda length: bytes([0xEE]) * length)
    chance = random.Random(seed)
    path = random_chain(chance, tmp_path, chance.randrange(2, 7))
    wanted = qemu.raw_bytes(path)
    with q.open_disk(path) as disk:
        for _ in range(200):
            offset, length = chance.randrange(len(wanted) + 600), chance.choice([1, 512, 4096, 70_000, MiB])
            assert disk.read(offset, length) == wanted[offset : offset + length]
        buffer = bytearray(b"\xff" * len(wanted))
        assert disk.read_into(0, memoryview(buffer)) == len(wanted)
        assert buffer == wanted == disk.read(0, disk.size)


@pytest.mark.parametrize(("second", "length"), [(1, 3), (3, 3), (2, 2)], ids=["overlap", "gap", "end"])
def test_parts_that_do_not_tile_the_buffer_are_never_filled(second: int, length: int) -> None:
    first = parts.Part(0, 2, Kind.ZERO, None, 0, 0, None)
    tiles = [first, first._replace(offset=second, length=length)]
    with pytest.raises(AssertionError):
        parts.fill(memoryview(bytearray(6)), tiles, lambda part: bytes(part.length), lambda _, index: index)


def test_memory_is_had_without_ctypes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(parts._allocate(MiB)) == MiB
    monkeypatch.setitem(sys.modules, "ctypes", None)
    monkeypatch.setattr(parts, "_allocator", parts._allocator.__wrapped__)
    assert parts._allocate(MiB) == bytes(MiB)


class _Bare:
    """A source of the least there may be: it reads into no buffer."""

    def __init__(self, path: Path) -> None:
        self._file = FileSource(path)
        self.size = self._file.size
        self.name = str(path)

    def read(self, offset: int, length: int, /) -> bytes:
        return self._file.read(offset, length)


def test_a_source_that_only_gives_bytes_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu.create(path, "4M")
    for number in (5, 3, 9, 1, 40):
        qemu.io(path, f"write -P {number} {number * 65536} 64k")
    with q.open_disk(_Bare(path)) as bare, q.open_disk(path) as disk:
        assert bare.read(0, bare.size) == disk.read(0, disk.size) == qemu.raw_bytes(path)


def _scattered(path: Path) -> Path:
    builder = Builder(cluster_bits=16, size=64 << 16)
    for number in reversed(range(64)):
        builder.data(number << 16, bytes([number + 1]) * 65536)
    return builder.write(path)


def test_a_read_that_was_looked_up_before_reads_no_table_and_each_part_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _scattered(tmp_path / "disk")
    with q.open_disk(path) as disk:
        first = disk.read(0, MiB)
        calls: list[tuple[int, int]] = []
        real = FileSource.read_into
        monkeypatch.setattr(
            FileSource, "read_into", lambda self, at, view: calls.append((at, len(view))) or real(self, at, view)
        )
        monkeypatch.setattr(FileSource, "read", lambda *_: pytest.fail("bytes were read to be joined"))
        assert disk.read(0, MiB) == first
        assert [length for _, length in calls] == [65536] * 16


def test_a_fault_is_an_error_for_those_who_read_there_only(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=16, size=16 << 16)
    for number in range(16):
        builder.data(number << 16, bytes([number + 1]) * 65536)
    builder.entry(7 << 16, 0x70200)  # not aligned to a cluster
    with q.open_disk(builder.write(tmp_path / "disk")) as disk:
        for _ in range(2):
            for number in range(16):
                if number == 7:
                    with pytest.raises(FormatError, match="0x70200"):
                        disk.read(7 << 16, 65536)
                else:
                    assert disk.read(number << 16, 65536) == bytes([number + 1]) * 65536
            assert disk.read((6 << 16) + 5, 65531) == b"\7" * 65531
            with pytest.raises(FormatError, match="0x70200"):
                disk.read(0, MiB)


def test_the_parts_kept_take_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu.create(path, "64M", cluster_size="64k", extended_l2="on")
    qemu.io(path, *(f"write -P 1 {at} 2k" for at in range(0, 2 * MiB, 4 * KiB)))
    with q.open_disk(path) as disk:
        wanted = qemu.raw_bytes(path)
        assert disk.read(0, 2 * MiB) == wanted[: 2 * MiB]
        assert disk.read(4096, 4096) == wanted[4096:8192]
        assert all(len(span) <= parts._PARTS_KEPT for span in disk._parts.spans.values())


def test_threads_and_a_fork_read_a_chain_alike(tmp_path: Path) -> None:
    chance = random.Random(99)
    path = random_chain(chance, tmp_path, 4)
    wanted = qemu.raw_bytes(path)
    with q.open_disk(path) as disk:
        wrong: list[int] = []

        def read(seed: int) -> None:
            own = random.Random(seed)
            for _ in range(150):
                at, length = own.randrange(len(wanted)), own.choice([512, 70_000, MiB])
                if disk.read(at, length) != wanted[at : at + length]:
                    wrong.append(at)

        workers: list[Callable[[], None]] = [lambda seed=seed: read(seed) for seed in range(6)]
        threads = [threading.Thread(target=worker) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        child = os.fork()
        if not child:
            os._exit(0 if disk.read(0, disk.size) == wanted else 1)
        assert os.waitpid(child, 0)[1] == 0
