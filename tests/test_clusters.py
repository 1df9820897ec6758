"""Decoding in a pool of threads: never a deadlock, never a neighbour's error, never a guess at cut streams."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.errors import FormatError, MissingFile, ReadError
from qcow2_forensics.format.source import FileSource
from qcow2_forensics.reader import clusters
from qcow2_forensics.reader.cache import Fifo
from tests import qemu
from tests.image_builder import EXT_BACKING_FORMAT, Builder, Poke, compressed_entry, deflate, empty

CLUSTER = 4096


def packed(path: Path, content: bytes, cluster_bits: int = 12) -> Path:
    """Write an image whose clusters are all compressed."""
    builder = Builder(cluster_bits=cluster_bits, size=-(-len(content) // 512) * 512)
    for at in range(0, len(content), builder.cluster_size):
        data = content[at : at + builder.cluster_size]
        builder.packed(at, deflate(data.ljust(builder.cluster_size, b"\0")))
    return builder.write(path)


def letters(length: int) -> bytes:
    return bytes(random.Random(7).choices(b"abcd", k=length))


@pytest.mark.parametrize("step", [CLUSTER, 1 << 19])
def test_an_image_inside_an_image_never_waits_for_its_own_thread(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = letters(1 << 19)
    inner = packed(tmp_path / "inner", content, 16)  # streams over several clusters of the outer image
    outer = packed(tmp_path / "outer", inner.read_bytes())
    # One thread for everything: whoever waits in it for another task waits for ever.
    monkeypatch.setattr(clusters, "_WORKERS", 2)
    with ThreadPoolExecutor(1, initializer=clusters.decode_here) as pool:
        monkeypatch.setattr(clusters, "_pool", pool)
        got: list[bytes] = []

        def read() -> None:
            with q.open_disk(q.open_disk(outer)) as disk:
                got.extend(disk.read(at, step) for at in range(0, len(content), step))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(60)
        assert not reader.is_alive()
    assert b"".join(got) == content


def test_the_pool_marks_its_threads() -> None:
    pool = clusters._shared_pool()
    assert pool.submit(clusters._in_worker).result() is True
    assert clusters._in_worker() is False


@pytest.mark.parametrize("stored", [set(), {3}, {0, 3}], ids=["all compressed", "ends stored", "starts and ends so"])
def test_what_a_sequential_reader_needs_next_is_decoded_ahead(
    stored: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "_WORKERS", 2)
    content = letters(1 << 19)
    builder = Builder(cluster_bits=12, size=len(content))
    for at in range(0, len(content), CLUSTER):  # of every four clusters some are stored as they are
        data = content[at : at + CLUSTER]
        if at // CLUSTER % 4 in stored:
            builder.data(at, data)
        else:
            builder.packed(at, deflate(data))
    ahead: list[int] = []
    with q.open_disk(builder.write(tmp_path / "disk")) as disk:
        submit = disk._clusters._submit
        monkeypatch.setattr(
            disk._clusters, "_submit", lambda batch: (ahead.extend(guest for _, guest in batch), submit(batch))
        )
        assert disk.read(0, 4 * CLUSTER) == content[: 4 * CLUSTER]
        assert not any(guest >= 4 * CLUSTER for guest in ahead)  # one read is no sequence
        assert disk.read(4 * CLUSTER, 4 * CLUSTER) == content[4 * CLUSTER : 8 * CLUSTER]
        assert max(ahead) >= 12 * CLUSTER


def test_a_disk_can_be_read_while_the_interpreter_exits(tmp_path: Path) -> None:
    path = packed(tmp_path / "disk", letters(1 << 18))
    code = (
        "import atexit, sys, qcow2_forensics as q\n"
        "disk = q.open_disk(sys.argv[1])\n"
        "disk.read(0, 1 << 17)\n"
        "def last():\n"
        "    sys.stdout.write(str(len(b''.join(disk.read(at, 16384) for at in range(0, disk.size, 16384)))))\n"
        "atexit.register(last)\n"
    )
    command = [sys.executable, "-c", "import sys; sys.path[:0] = sys.argv[2:]\n" + code, str(path), *sys.path]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (outcome.stdout, outcome.stderr) == (str(1 << 18), "")


class OneBadPlace(FileSource):
    """A source that cannot read one range."""

    bad = range(0)

    def read(self, offset: int, length: int, /) -> bytes:
        if offset < self.bad.stop and offset + length > self.bad.start:
            raise ReadError("bad sector", offset=offset, length=length)
        return super().read(offset, length)


def test_an_l2_table_that_cannot_be_read_fails_nothing_before_it(tmp_path: Path) -> None:
    builder = Builder(cluster_bits=12, size=4 << 20)
    data = letters(CLUSTER)
    for at in range(0, 4 << 20, CLUSTER):
        builder.packed(at, deflate(data))
    path = builder.write(tmp_path / "disk")
    source = OneBadPlace(path)
    table = Poke(path).get(builder.l1 + 8) & ~(1 << 63)
    source.bad = range(table, table + CLUSTER)
    with q.open_disk(source) as disk:
        for at in range(0, 2 << 20, 2 * CLUSTER):  # sequential: clusters behind the bad table are decoded ahead
            assert disk.read(at, 2 * CLUSTER) == data * 2
        with pytest.raises(ReadError):
            disk.read(2 << 20, CLUSTER)
    source.close()


@qemu.requires_qemu
def test_a_cut_stream_that_zeros_complete_is_an_error_unless_zeros_were_asked_for(tmp_path: Path) -> None:
    # A stored block: its bytes are cut off, and zeros after the end of the file make it whole.
    data = letters(65536)
    stream = b"".join(
        bytes([last]) + len(part).to_bytes(2, "little") + (len(part) ^ 0xFFFF).to_bytes(2, "little") + part
        for last, part in ((0, data[:32768]), (1, data[32768:]))
    )
    builder = Builder()
    at = builder.put(stream)
    builder.entry(0, compressed_entry(at, len(stream), 16))
    path = builder.write(tmp_path / "disk")
    end = path.stat().st_size
    moved = Poke(path).append(stream[:40000])
    l2 = moved.get(builder.l1) & 0x00FF_FFFF_FFFF_FE00
    moved.u64(l2, compressed_entry(end, len(stream), 16))
    with q.open_disk(path) as disk, pytest.raises(FormatError, match="past the end of the file"):
        disk.read(0, 65536)
    with q.open_disk(path, eof="zeros") as disk:
        got = disk.read(0, 65536)
        assert disk.filled["bytes"] > 0
    assert got == qemu.read(path, 0, 65536)
    assert got[:39000] == data[:39000]
    assert got[-1000:] == bytes(1000)


def test_a_missing_backing_file_raises_a_fresh_error_each_time(tmp_path: Path) -> None:
    qemu.need()
    path = empty(tmp_path / "disk")
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2")], b"gone.qcow2")
    depths = []
    with q.open_disk(path, missing="raise") as disk:
        for _ in range(3):
            with pytest.raises(MissingFile) as caught:
                disk.read(0, 512)
            depths.append(len(traceback.extract_tb(caught.value.__traceback__)))
    assert depths[0] == depths[-1]


def test_a_cache_stays_bounded_when_threads_race() -> None:
    cache: Fifo[int, bytes] = Fifo(4)
    # What a race leaves: entries that stand in no order.
    for key in range(100, 109):
        cache.entries[key] = b""
    cache.add(1, b"x")
    assert len(cache.entries) <= 8
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        try:
            for _ in range(5000):
                key = generator.randrange(12)
                cache.add(key, b"")
                cache.take(generator.randrange(12))
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(cache.entries) <= 8
