"""What must hold for every read of every disk, whatever its format and wherever the read starts.

The images come from the matrix (made by qemu-img and qemu-io) and from the writer of crafted
entries; random entries are held against qemu-io cluster by cluster.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcow2_forensics as q
from qcow2_forensics.errors import FormatError, Qcow2Error, ReadError
from qcow2_forensics.format.source import BytesSource, FileSource
from qcow2_forensics.reader.mapping import Kind
from tests import qemu
from tests.image_builder import COMPRESSED, COPIED, ZERO, Builder, compressed_entry, deflate
from tests.matrix import AES, Scenario, make
from tests.tiers import every, quick

pytestmark = qemu.requires_qemu

MiB = 1 << 20

SCENARIOS = {
    "plain": Scenario(65536),
    "small clusters": Scenario(512, "qcow2", "zlib", "qcow2-long"),
    "extended": Scenario(16384, "qcow2", "zlib", "chain", options=(("extended_l2", "on"),)),
    "zstd": Scenario(4096, "qcow2", "zstd", "raw-odd"),
    "large clusters": Scenario(2 * MiB, "qcow2", "zlib", "ext-short"),
    "data file": Scenario(65536, data_file="data", backing="qcow2-long", snapshots=0),
    "version 1": Scenario(512, "qcow", "zlib", "qcow2-long", snapshots=0),
    "encrypted": Scenario(4096, "qcow2", "zlib", "raw-short", encrypt=AES),
}


@dataclass
class Case:
    disk: q.Disk
    wanted: bytes
    path: Path
    options: dict[str, Any]


@pytest.fixture(scope="module", params=quick(SCENARIOS, SCENARIOS.keys() - {"plain", "large clusters"}))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    scenario = SCENARIOS[request.param]
    if scenario.encrypt:
        pytest.importorskip("cryptography", reason="cryptography is absent")
    view = make(scenario, tmp_path_factory.mktemp("properties"))[-1]
    with q.open_disk(view.path, **view.ours) as disk:
        yield Case(disk, qemu.raw_bytes(view.path, snapshot=view.snapshot, **view.oracle), view.path, view.ours)


def ranges(case: Case) -> st.SearchStrategy[tuple[int, int]]:
    """Offsets and lengths of all sizes, many beside cluster borders, some past the end."""
    size, cluster = case.disk.size, case.disk.image.cluster_size
    near = st.builds(
        lambda index, delta: max(0, index * cluster + delta), st.integers(0, size // cluster), st.integers(-3, 3)
    )
    offsets = st.one_of(st.integers(0, size + 10), near)
    lengths = st.one_of(st.integers(0, 3), st.integers(0, 3 * cluster), st.just(cluster), st.integers(0, size))
    return st.tuples(offsets, lengths)


@given(data=st.data())
def test_runs_tile_the_request(case: Case, data: st.DataObject) -> None:
    offset, length = data.draw(ranges(case))
    at = offset
    for run in case.disk.mapping.runs(offset, length):
        assert run.offset == at
        assert run.length > 0
        at += run.length
    assert at == offset + length


@given(data=st.data())
def test_extents_tile_the_clipped_request(case: Case, data: st.DataObject) -> None:
    offset, length = data.draw(ranges(case))
    at = offset
    for extent in case.disk.extents(offset, length):
        assert extent.offset == at
        assert extent.length > 0
        at += extent.length
    assert at == max(offset, min(offset + length, case.disk.size))


@given(data=st.data())
def test_parts_tile_the_request_and_a_piece_is_as_long_as_its_part(case: Case, data: st.DataObject) -> None:
    offset, length = data.draw(ranges(case))
    length = max(0, min(length, 4 * MiB, case.disk.size - offset))
    at = offset
    for part in case.disk._find(offset, length) if length else ():
        assert part.offset == at
        assert len(case.disk._piece(part)) == part.length > 0
        at += part.length
    assert at == offset + length


@given(data=st.data())
def test_a_read_into_a_buffer_gives_the_same_bytes_and_touches_no_others(case: Case, data: st.DataObject) -> None:
    offset, length = data.draw(ranges(case))
    buffer = bytearray(b"\xa5" * (length + 2))
    count = case.disk.read_into(offset, memoryview(buffer)[1 : 1 + length])
    wanted = case.wanted[offset : offset + length]
    assert count == len(wanted)
    assert buffer == b"\xa5" + wanted + b"\xa5" * (length - count + 1)


@given(data=st.data())
def test_a_read_is_the_slice_of_the_whole_disk(case: Case, data: st.DataObject) -> None:
    offset, length = data.draw(ranges(case))
    assert case.disk.read(offset, length) == case.wanted[offset : offset + length]


@given(data=st.data())
def test_any_split_of_a_read_gives_the_same_bytes(case: Case, data: st.DataObject) -> None:
    offset, length = data.draw(ranges(case))
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=6)))
    edges = [0, *cuts, length]
    pieces = [case.disk.read(offset + a, b - a) for a, b in itertools.pairwise(edges)]
    assert b"".join(pieces) == case.disk.read(offset, length)


@given(data=st.data())
def test_a_part_of_the_map_agrees_with_the_whole_map(case: Case, data: st.DataObject) -> None:
    offset, length = data.draw(ranges(case))
    whole = list(case.disk.extents())
    for part in case.disk.extents(offset, length):
        covering = [e for e in whole if e.offset < part.offset + part.length and part.offset < e.offset + e.length]
        for extent in covering:
            assert (extent.kind, extent.depth) == (part.kind, part.depth)
            if extent.host_offset is not None and part.host_offset is not None:
                assert extent.host_offset - extent.offset == part.host_offset - part.offset


def test_extents_of_data_name_the_host_bytes_and_the_rest_reads_as_zeros(case: Case) -> None:
    encrypted = bool(case.disk.image.header.crypt_method)
    for extent in case.disk.extents():
        got = case.disk.read(extent.offset, extent.length)
        if extent.kind in (Kind.ZERO, Kind.HOLE):
            assert got == bytes(extent.length)
        elif extent.kind == Kind.DATA and extent.depth == 0 and not encrypted:
            assert extent.host_offset is not None
            assert case.disk.host.read(extent.host_offset, extent.length).ljust(extent.length, b"\0") == got


@pytest.mark.parametrize("bad", [(-1, 1), (0, -1), (-5, -5)])
def test_negative_offsets_and_lengths_are_refused(case: Case, bad: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="negative"):
        case.disk.read(*bad)


def read_at_random(disk: q.Disk, wanted: bytes, seed: int, count: int) -> None:
    generator = random.Random(seed)
    cluster = disk.image.cluster_size
    for _ in range(count):
        offset = generator.randrange(len(wanted))
        length = generator.choice((1, 700, cluster, 5 * cluster))
        assert disk.read(offset, length) == wanted[offset : offset + length]


def test_many_threads_read_what_one_reads(case: Case) -> None:
    with q.open_disk(case.path, **case.options) as disk:  # its caches are cold: threads race to fill them
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                read_at_random(disk, case.wanted, seed, 60)
            except BaseException as error:  # noqa: BLE001 - shown by the test itself
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures
        assert not any(thread.is_alive() for thread in threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_disk_survives_a_fork(case: Case) -> None:
    with q.open_disk(case.path, **case.options) as disk:
        read_at_random(disk, case.wanted, 1, 5)
        disk.read(0, 3 * disk.image.cluster_size)
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=read_at_random, args=(disk, case.wanted, seed, 40)) for seed in (2, 3)]
        for child in children:
            child.start()
        read_at_random(disk, case.wanted, 4, 40)
        for child in children:
            child.join(60)
            if child.is_alive():
                child.kill()
                pytest.fail("a read after a fork hangs")
        assert [child.exitcode for child in children] == [0, 0]


# --- random table entries, held against qemu-io ---------------------------------------------------

CLUSTER = 65536


def random_entry(generator: random.Random, host: int, stream: int, extended: bool) -> tuple[int, int]:
    """Return an L2 entry and a subcluster bitmap that mix valid and invalid bits."""
    kind = generator.randrange(9)
    entry = (
        0,
        COPIED | host,
        host | generator.getrandbits(6) << 56 & ~COMPRESSED,  # reserved bits
        ZERO,
        host | ZERO,
        compressed_entry(stream, 60, 16),
        compressed_entry(stream + generator.choice((0, 1, 512)), 60, 16) | generator.choice((0, COPIED)),
        COPIED | (host + 512 * generator.randrange(3)),
        generator.choice((COPIED, COPIED | ZERO, generator.getrandbits(56) | COPIED, 2, 0x1FE)),
    )[kind]
    choices = (
        0,
        0xFFFFFFFF,
        0xFFFFFFFF << 32,
        0x0000FFFFFFFF0000,
        generator.getrandbits(32),
        generator.getrandbits(64),
    )
    bitmap = generator.choice(choices) if extended else 0
    if generator.random() < 0.6:
        bitmap &= ~(bitmap << 32)  # mostly no subcluster that is both allocated and zero
    return entry, bitmap


@pytest.mark.parametrize(
    ("version", "extended"),
    every(2, [(2, False), (3, False), (3, True)], unpack=True),
    ids=["2", "3", "3-extended"],
)
@pytest.mark.parametrize("seed", every(6, range(6)))
def test_random_entries_read_as_in_qemu_cluster_by_cluster(
    seed: int, version: int, extended: bool, tmp_path: Path
) -> None:
    generator = random.Random(seed)
    count = 48
    base = Builder(size=(count - 3) * CLUSTER)
    for index in range(0, count - 3, 2):
        base.data(index * CLUSTER, generator.randbytes(CLUSTER))
    base.write(tmp_path / "base.qcow2")
    builder = Builder(version=version, size=count * CLUSTER, extended_l2=extended, backing=b"base.qcow2")
    hosts = [builder.put(generator.randbytes(CLUSTER)) for _ in range(8)]
    stream = builder.put(deflate(b"compressed " * 5958)[:60].ljust(60, b"\0"))
    for index in range(count):
        builder.entry(index * CLUSTER, *random_entry(generator, generator.choice(hosts), stream, extended))
    path = builder.write(tmp_path / "random.qcow2")
    spots = [(index * CLUSTER, CLUSTER) for index in range(count)]
    wanted = qemu.reads(path, spots, cwd=tmp_path)
    with q.open_disk(path, eof="zeros") as disk:
        for (offset, length), expected in zip(spots, wanted, strict=True):
            try:
                got: bytes | None = disk.read(offset, length)
            except FormatError:
                got = None
            assert got == expected, (hex(offset), hex(disk.mapping.entry_offset(offset) or 0))
        all_readable = None not in wanted
        if all_readable:
            assert disk.read(0, disk.size) == b"".join(data for data in wanted if data is not None)
        else:
            with pytest.raises(FormatError):
                disk.read(0, disk.size)


# --- memory, imports, faults ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    every(3, [{"cluster_size": "64k"}, {"cluster_size": "2M"}, {"cluster_size": "64k", "extended_l2": "on"}]),
    ids=["64k", "2M", "extended"],
)
def test_reading_a_huge_disk_takes_little_memory(options: dict[str, Any], tmp_path: Path) -> None:
    size = 64 << 40 if options["cluster_size"] == "2M" else 1 << 40
    path = qemu.create(tmp_path / "huge", size, **options)
    parts = 5 if options["cluster_size"] == "2M" else 31
    spots = [size * part // parts // 65536 * 65536 for part in range(parts)]
    qemu.io(path, *(f"write -q -P {part + 1} {spot} 64k" for part, spot in enumerate(spots)))
    tracemalloc.start()
    try:
        with q.open_disk(path) as disk:
            for part, spot in enumerate(spots):
                assert disk.read(spot, 65536) == bytes([part + 1]) * 65536
            assert sum(extent.length for extent in disk.extents()) == size
        assert tracemalloc.get_traced_memory()[1] < 100 * MiB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("q.open_disk; q.open_image; q.open_vm_state", {"numpy", "volatility3", "dfvfs", "plaso", "pytsk3"}),
        # What takes longer to import than the reader itself, and no plain image needs.
        (
            "q.open_disk(sys.argv[1]).read(0, 512)",
            {"dataclasses", "inspect", "json", "pathlib", "zlib_ng", "backports"},
        ),
    ],
)
def test_reading_a_plain_image_imports_little(base_image: Path, code: str, absent: set[str]) -> None:
    code = (
        f"import sys, qcow2_forensics as q; {code}\nprint(sorted({{m.split('.')[0] for m in sys.modules}} & {absent}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-S", "-c", code, str(base_image)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["map"],
        ["snapshots"],
        ["audit", "--depth", "triage"],
        ["audit", "--depth=triage"],
        ["audit", "--help"],
        ["timeline", "--no-files"],
    ],
    ids=" ".join,
)
def test_commands_that_compute_nothing_over_whole_tables_start_without_numpy(
    base_image: Path, arguments: list[str]
) -> None:
    code = (
        "import sys\nfrom qcow2_forensics.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nsys.exit(3 if 'numpy' in sys.modules else 0)"
    )
    command = [sys.executable, "-c", code, *arguments, str(base_image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_that_shrinks_while_it_is_read_is_a_read_error(base_image: Path) -> None:
    with q.open_disk(base_image) as disk:
        assert disk.read(0, 1) == b"\x11"
        os.truncate(base_image, 0x50000)
        with pytest.raises(ReadError, match="shrank"):
            disk.read(0, 65536)


def test_a_file_system_that_answers_in_small_pieces_gives_whole_answers(
    base_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pread
    with q.open_disk(base_image) as disk:
        monkeypatch.setattr(os, "pread", lambda fd, length, offset: whole(fd, min(length, 1000), offset))
        assert disk.read(100, 0x20000) == b"\x11" * (0x10000 - 100) + b"\x22" * 0x10000 + b"\x33" * 100


class Failing(FileSource):
    """A file whose reads fail in one range, as a bad medium does."""

    bad = range(0)

    def read(self, offset: int, length: int, /) -> bytes:
        if offset < self.bad.stop and self.bad.start < offset + length:
            raise ReadError("a bad sector", offset=offset, length=length)
        return super().read(offset, length)


def test_a_bad_sector_fails_only_the_reads_that_need_it(base_image: Path) -> None:
    source = Failing(base_image)
    source.bad = range(0x60000, 0x60200)
    with q.open_disk(source) as disk:
        assert disk.read(0, 0x10000) == b"\x11" * 0x10000
        with pytest.raises(ReadError):
            disk.read(0x10000, 512)
        assert disk.read(0x10200, 512) == b"\x22" * 512
        assert disk.read(0x20000, 512) == b"\x33" * 512
    source.close()


def test_a_bad_sector_under_a_compressed_cluster_fails_only_that_cluster(tmp_path: Path) -> None:
    generator = random.Random(5)
    builder = Builder(cluster_bits=12)
    clusters = [generator.randbytes(2048) * 2 for _ in range(64)]
    offsets = []
    for index, data in enumerate(clusters):
        offsets.append(builder._end)
        builder.packed(index * 4096, deflate(data))
    source = Failing(builder.write(tmp_path / "packed.qcow2"))
    source.bad = range(offsets[20], offsets[20] + 512)
    with q.open_disk(source) as disk:
        for index, data in enumerate(clusters):  # sequential: neighbours are decoded ahead
            if index == 20:
                with pytest.raises(ReadError):
                    disk.read(index * 4096, 4096)
            else:
                assert disk.read(index * 4096, 4096) == data
    source.close()


class SingleThreaded(FileSource):
    """A source over somebody else's file object: it must be left alone but by who asks."""

    single_threaded = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.readers: set[int] = set()

    def read(self, offset: int, length: int, /) -> bytes:
        self.readers.add(threading.get_ident())
        return super().read(offset, length)


def test_a_single_threaded_source_is_read_only_by_the_thread_that_asks(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=12)
    for index in range(128):
        builder.packed(index * 4096, deflate(bytes([index]) * 4096))
    source = SingleThreaded(builder.write(tmp_path / "packed.qcow2"))
    with q.open_disk(source) as disk:
        for index in range(0, 128, 4):
            assert disk.read(index * 4096, 4 * 4096)[::4096] == bytes(range(index, index + 4))
    assert source.readers == {threading.get_ident()}
    source.close()


def test_errors_leave_the_disk_usable(base_image: Path) -> None:
    with q.open_disk(BytesSource(base_image.read_bytes()[:0x60000])) as disk:
        for _ in range(3):
            assert disk.read(0, 4) == b"\x11" * 4
            with pytest.raises(Qcow2Error):
                disk.read(0x10000, 4)
