"""Every reader of ours reads the same bytes: the disk, its streams, and each framework's object."""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import qemu
from tests.conformance import ADAPTERS, NEEDS, Adapter, Reader, need
from tests.image_builder import B_DATA, PASSPHRASE, Poke, base_b, luks
from tests.matrix import Scenario, make

pytestmark = qemu.requires_qemu

SCENARIOS = {
    "plain": Scenario(65536, snapshots=1),
    "extended over a chain": Scenario(16384, "qcow2", "zlib", "chain", options=(("extended_l2", "on"),)),
    "zstd over raw": Scenario(4096, "qcow2", "zstd", "raw-odd"),
    "small clusters": Scenario(512, "qcow2", "zlib", "qcow2-long"),
    "data file": Scenario(65536, data_file="data", snapshots=0),
    "version 1": Scenario(512, "qcow", "zlib", "raw-odd", snapshots=0),
}


@dataclass(frozen=True)
class Subject:
    """One state of one image, what it must read as, and the reader in question."""

    adapter: Adapter
    path: Path
    snapshot: str | None
    wanted: bytes
    reader: Reader


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str | None, bytes]]:
    found: dict[str, tuple[Path, str | None, bytes]] = {}
    for name, scenario in SCENARIOS.items():
        for view in make(scenario, tmp_path_factory.mktemp("conformance")):
            key = name if view.snapshot is None else f"{name}, snapshot"
            found[key] = (view.path, view.snapshot, qemu.raw_bytes(view.path, snapshot=view.snapshot, **view.oracle))
    return found


NAMES = [
    *SCENARIOS,
    *(f"{name}, snapshot" for name, scenario in SCENARIOS.items() if scenario.snapshots),
]


@pytest.fixture(scope="module", params=ADAPTERS, ids=str)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    chosen: Adapter = request.param
    need(chosen)
    return chosen


@pytest.fixture(scope="module", params=NAMES)
def subject(
    request: pytest.FixtureRequest, adapter: Adapter, states: dict[str, tuple[Path, str | None, bytes]]
) -> Iterator[Subject]:
    path, snapshot, wanted = states[request.param]
    with adapter.open(path, snapshot) as reader:
        yield Subject(adapter, path, snapshot, wanted, reader)


def test_the_size_is_that_of_the_state(subject: Subject) -> None:
    assert subject.reader.size == len(subject.wanted)


def test_the_whole_disk_is_read_in_one_call(subject: Subject) -> None:
    assert subject.reader.read(0, subject.reader.size) == subject.wanted


def test_every_kind_of_offset_and_length_gives_the_same_bytes(subject: Subject) -> None:
    generator = random.Random(7)
    size = subject.reader.size
    spots = [0, 1, 511, 512, 4095, 65535, 65536, size - 513, size - 1]
    spots += [generator.randrange(size) for _ in range(60)]
    for offset in spots:
        for length in (1, 2, 64, 512, 4096, generator.randrange(1, 200_000)):
            part = min(length, size - offset)
            assert subject.reader.read(offset, part) == subject.wanted[offset : offset + part], (offset, part)


def test_backward_and_repeated_reads_give_the_same_bytes(subject: Subject) -> None:
    step = max(512, subject.reader.size // 40)
    for offset in range(subject.reader.size - step, 0, -step):
        for _ in range(2):
            assert subject.reader.read(offset, step) == subject.wanted[offset : offset + step]


def test_a_read_of_nothing_is_empty(subject: Subject) -> None:
    assert subject.reader.read(0, 0) == b""
    assert subject.reader.read(subject.reader.size // 2, 0) == b""


def test_a_read_across_the_end_is_short_or_an_error_never_padded(subject: Subject) -> None:
    size = subject.reader.size
    if subject.adapter.clipped is None:
        assert subject.reader.read(size - 10, 4096) == subject.wanted[-10:]
    else:
        with pytest.raises(subject.adapter.clipped):
            subject.reader.read(size - 10, 4096)


@pytest.mark.parametrize("beyond", [0, 1, 1 << 20, 1 << 62])
def test_a_read_past_the_end_is_empty_or_an_error(subject: Subject, beyond: int) -> None:
    if subject.adapter.past_end is None:
        assert subject.reader.read(subject.reader.size + beyond, 512) == b""
    else:
        with pytest.raises(subject.adapter.past_end):
            subject.reader.read(subject.reader.size + beyond, 512)


@pytest.mark.parametrize("bad", [(-1, 16), (-(1 << 40), 16), (0, -5)])
def test_negative_requests_are_errors_and_leave_the_reader_usable(subject: Subject, bad: tuple[int, int]) -> None:
    with pytest.raises(subject.adapter.negative):
        subject.reader.read(*bad)
    assert subject.reader.read(0, 512) == subject.wanted[:512]


# A file object has one position; each thread opens its own.
@pytest.mark.parametrize("adapter", [one for one in ADAPTERS if one.positional], ids=str, indirect=True)
def test_threads_may_share_a_positional_reader(subject: Subject) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        try:
            for _ in range(40):
                offset = generator.randrange(subject.reader.size - 4096)
                assert subject.reader.read(offset, 4096) == subject.wanted[offset : offset + 4096]
        except BaseException as error:  # noqa: BLE001 - shown by the test itself
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


@pytest.mark.parametrize("adapter", [one for one in ADAPTERS if one.pickles], ids=str, indirect=True)
def test_a_pickled_copy_reads_on_where_that_is_promised(subject: Subject) -> None:
    copy = pickle.loads(pickle.dumps(subject.reader.native))
    assert copy.read(0, subject.reader.size) == subject.wanted
    assert subject.reader.read(0, 512) == subject.wanted[:512]


def test_two_readers_of_one_image_do_not_disturb_each_other(subject: Subject) -> None:
    with subject.adapter.open(subject.path, subject.snapshot) as other:
        assert other.read(512, 512) == subject.wanted[512:1024]
        assert subject.reader.read(0, 512) == subject.wanted[:512]
        assert other.read(1024, 512) == subject.wanted[1024:1536]
    assert subject.reader.read(1536, 512) == subject.wanted[1536:2048]


def test_an_unreadable_cluster_is_an_error_and_its_neighbours_read_on(adapter: Adapter, tmp_path: Path) -> None:
    path = base_b(tmp_path / "damaged.qcow2")
    Poke(path).l2(1, B_DATA + 0x200 | 1 << 63)  # an unaligned host offset
    with adapter.open(path) as reader:
        assert reader.read(0, 0x10000) == b"\x11" * 0x10000
        with pytest.raises(adapter.failed):
            reader.read(0x10000, 16)
        with pytest.raises(adapter.failed):
            reader.read(0x1FFF0, 16)
        assert reader.read(0x20000, 0x10000) == b"\x33" * 0x10000


def test_a_missing_backing_file_never_reads_as_zeros(adapter: Adapter, tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "overlay.qcow2", "1M", backing="gone.qcow2", backing_format="qcow2", unsafe=True)
    qemu.create(tmp_path / "gone.qcow2", "1M")
    qemu.io(path, "write -P 0x44 64k 64k")
    (tmp_path / "gone.qcow2").unlink()
    # Refused when it is opened, or when bytes of the backing file are asked for: both say so.
    with pytest.raises(Exception, match=r"gone|missing"), adapter.open(path) as reader:
        reader.read(0, 512)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("adapter", [one for one in ADAPTERS if one.name in NEEDS], ids=str, indirect=True)
def test_a_key_file_opens_through_every_framework_however_its_line_ends(
    adapter: Adapter, end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = luks(tmp_path / "disk.qcow2")
    (tmp_path / "key").write_bytes(PASSPHRASE.encode() + end)
    monkeypatch.setenv("QCOW2_PASSPHRASE_FILE", str(tmp_path / "key"))
    with adapter.open(path) as reader:
        assert reader.read(0, 4096) == b"\x11" * 4096
