"""Faults on the way: unreadable media, broken file objects, interrupts, full disks, forks, dying workers.

Nothing hangs, nothing half-written keeps its final name, and what fails says so.
"""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fuzz.targets import run_command

import qcow2_forensics as q
from qcow2_forensics.cli import fleet
from qcow2_forensics.errors import FormatError, Locked, Qcow2Error, ReadError
from qcow2_forensics.files.spans import Spans
from qcow2_forensics.files.tolerant import TolerantReader
from qcow2_forensics.format.source import BytesSource
from qcow2_forensics.reader.salvage import SalvagedDisk
from tests import qemu
from tests.image_builder import B_DATA, B_L2, COPIED, Builder, Poke, base_b, base_s

pytestmark = qemu.requires_qemu

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return base_b(tmp_path / "disk.qcow2")


class Failing:
    """A source that fails from the ``after``-th read on, with whatever is given."""

    def __init__(self, data: bytes, after: int, error: BaseException) -> None:
        self._data, self._left, self._error = data, after, error
        self.size = len(data)
        self.reads = 0

    def read(self, offset: int, length: int, /) -> bytes:
        self.reads += 1
        if self.reads > self._left:
            raise self._error
        return self._data[offset : offset + length]


def _everything(source: object) -> None:
    """Use the public interface the way an examination does."""
    with q.open_image(source) as opened:  # type: ignore[arg-type]
        entries = [*opened.snapshots, None]
        assert opened.problems is not None
    for entry in entries:
        with q.open_disk(source, entry) as disk:  # type: ignore[arg-type]
            assert list(disk.extents())
            disk.read(0, disk.size)


def _reads_of(work: Callable[[object], None], data: bytes) -> int:
    counting = Failing(data, 1 << 30, ValueError())
    work(counting)
    return counting.reads


# --- media and file objects ----------------------------------------------------------------------


def test_an_error_at_any_read_is_passed_on_and_never_becomes_bytes(tmp_path: Path) -> None:
    data = base_s(tmp_path / "s.qcow2").read_bytes()
    for after in range(_reads_of(_everything, data)):
        with pytest.raises(ReadError):
            _everything(Failing(data, after, ReadError("bad sector", offset=0, length=512)))
        # What a source raises of its own is the caller's, not ours to hide.
        with pytest.raises((OSError, Qcow2Error)):
            _everything(Failing(data, after, OSError(errno.EIO, "Input/output error")))


class BadCluster:
    """A source of which one cluster cannot be read, once it was opened."""

    def __init__(self, data: bytes, size: int, error: Exception) -> None:
        self._data, self._cluster, self._error = data, size, error
        self.size = len(data)
        self.bad = -1

    def read(self, offset: int, length: int, /) -> bytes:
        if offset < (self.bad + 1) * self._cluster and self.bad * self._cluster < offset + length:
            raise self._error
        return self._data[offset : offset + length]


_BAD_SECTOR = ReadError("bad sector", offset=0, length=512)


def _of_file_systems(disk: q.Disk) -> TolerantReader:
    return TolerantReader(disk, "zeros")


@pytest.mark.parametrize(
    ("zeros", "error"),
    [
        pytest.param(SalvagedDisk, _BAD_SECTOR, id="salvage"),
        pytest.param(
            SalvagedDisk,
            OSError(errno.EIO, "I/O error"),
            id="salvage of a source of the caller's",
            marks=pytest.mark.slow,
        ),
        # tests/test_tsk_img.py has what is quick of the file systems
        pytest.param(_of_file_systems, _BAD_SECTOR, id="file systems", marks=pytest.mark.slow),
        pytest.param(
            _of_file_systems,
            OSError(errno.EIO, "I/O error"),
            id="file systems in a source of the caller's",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_bad_cluster_anywhere_costs_what_it_maps_and_nothing_else(
    zeros: Callable[[q.Disk], Any], error: Exception, tmp_path: Path
) -> None:
    data = base_s(tmp_path / "s.qcow2").read_bytes()
    with q.open_disk(BytesSource(data)) as disk:
        whole = disk.read(0, disk.size)
        cluster = disk.image.cluster_size
    for bad in range(len(data) // cluster):
        source = BadCluster(data, cluster, error)
        with q.open_disk(source) as disk:
            source.bad = bad
            reader = zeros(disk)
            read = reader.read(0, disk.size)
        wanted = bytearray(whole)
        for offset, length, *_ in getattr(reader, "missing", None) or getattr(reader, "unreadable", ()):
            wanted[offset : offset + length] = bytes(length)
        assert read == wanted


def _cut_data(folder: Path) -> bytes:
    return base_b(folder / "b.qcow2").read_bytes()[: B_DATA + 1000]


def _bad_table(folder: Path) -> bytes:
    return Poke(base_b(folder / "b.qcow2")).l1(0, 1 << 40).path.read_bytes()


def _encrypted(folder: Path) -> bytes:
    builder = Builder(size=8192, cluster_bits=12, crypt_method=1)
    builder.data(4096, b"\x11" * 4096).entry(0, (1 << 20) | COPIED)
    return builder.write(folder / "disk").read_bytes().ljust((1 << 20) + 1000, b"\x22")


def _of_subclusters(folder: Path) -> bytes:
    builder = Builder(size=1 << 20, extended_l2=True)
    builder.data(0, b"\x11" * 65536, at=1 << 20)
    return builder.write(folder / "disk").read_bytes()[: (1 << 20) + 3000]


@pytest.mark.parametrize("make", [_cut_data, _bad_table, _encrypted, _of_subclusters])
def test_whatever_fills_with_zeros_reads_the_same_bytes_and_misses_the_same(
    make: Callable[[Path], bytes], tmp_path: Path
) -> None:
    with q.open_disk(BytesSource(make(tmp_path)), passphrase="secret") as disk:
        salvaged, tolerant = SalvagedDisk(disk), _of_file_systems(disk)
        assert salvaged.read(0, disk.size) == tolerant.read(0, disk.size)
        assert list(Spans(tolerant.unreadable)) == list(Spans((at, length) for at, length, _ in salvaged.missing)) != []
        assert {item.why for item in salvaged.missing} <= set(tolerant.errors)


@pytest.mark.parametrize("make", [SalvagedDisk, _of_file_systems])
def test_a_missing_key_is_never_filled_with_zeros(make: Callable[[q.Disk], Any], tmp_path: Path) -> None:
    with q.open_disk(BytesSource(_encrypted(tmp_path))) as disk, pytest.raises(Locked):
        make(disk).read(0, 4096)


def test_an_audit_over_failing_media_is_a_report_that_says_so(tmp_path: Path) -> None:
    data = base_s(tmp_path / "s.qcow2").read_bytes()
    whole = _reads_of(lambda source: q.audit(source, depth="deep"), data)  # type: ignore[arg-type, return-value]
    for after in range(0, whole, max(1, whole // 40)):
        report = q.audit(Failing(data, after, OSError(errno.EIO, "Input/output error")), depth="deep")
        assert {"QCOW2-UNREADABLE", "QCOW2-AUDIT-INCOMPLETE"} & {finding.code for finding in report}, after


def test_a_bad_sector_of_a_real_file_is_a_read_error_with_its_offset(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if offset <= B_DATA + 0x10200 < offset + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, length, offset)

    with q.open_disk(image) as disk:
        monkeypatch.setattr(os, "pread", pread)
        assert disk.read(0, 512) == b"\x11" * 512
        with pytest.raises(ReadError) as caught:
            disk.read(0x10000, 0x10000)
        assert caught.value.offset <= B_DATA + 0x10200 < caught.value.offset + caught.value.length
        assert disk.read(0x20000, 512) == b"\x33" * 512


def test_short_reads_are_read_on(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    with q.open_disk(image) as disk:
        wanted = disk.read(0, disk.size)
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, max(1, min(length, 1000)), offset))
    with q.open_disk(image) as disk:
        assert disk.read(0, disk.size) == wanted


class ShortStream(io.BytesIO):
    """A file object that gives a few bytes at a time, as sockets and pipes do."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size, 777) if size and size > 0 else size)


def test_a_file_object_that_reads_short_is_read_on(image: Path) -> None:
    with q.open_disk(ShortStream(image.read_bytes())) as disk:
        assert disk.read(0, 0x30000) == b"\x11" * 0x10000 + b"\x22" * 0x10000 + b"\x33" * 0x10000


@pytest.mark.parametrize("change", [-1, -511, 1, None], ids=["a byte less", "a sector less", "a byte more", "nothing"])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
def test_a_source_that_breaks_its_contract_is_a_read_error(change: int | None, at: int, image: Path) -> None:
    class Short:
        def __init__(self, data: bytes) -> None:
            self.data, self.size, self.left = data, len(data), at

        def read(self, offset: int, length: int, /) -> bytes:
            self.left -= 1
            if self.left >= 0 or length <= 1:
                return self.data[offset : offset + length]
            end = offset + length + change if change is not None else offset
            return self.data[offset:end].ljust(max(0, end - offset), b"?")[: max(0, length + (change or -length))]

    def everything() -> None:
        source = Short(image.read_bytes())
        with q.open_disk(source) as disk:
            for offset in range(0, disk.size, 0x10000):
                disk.read(offset, 0x10000)
        q.audit(source, depth="deep")

    with pytest.raises(ReadError):
        everything()


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "gone"), TimeoutError("slow"), ValueError("closed file"), ZeroDivisionError("bug")]
)
def test_an_error_of_a_file_object_is_passed_on(error: Exception, image: Path) -> None:
    class Raising(io.BytesIO):
        broken = False

        def read(self, size: int | None = -1, /) -> bytes:
            if self.broken:
                raise error
            return super().read(size)

    stream = Raising(image.read_bytes())
    with q.open_disk(stream) as disk:
        assert disk.read(0, 2) == b"\x11\x11"
        stream.broken = True
        with pytest.raises((ReadError, type(error))):
            disk.read(0x10000, 0x10000)
        stream.broken = False
        assert disk.read(0x10000, 2) == b"\x22\x22"


def test_a_closed_file_object_is_an_error(image: Path) -> None:
    stream = image.open("rb")
    disk = q.open_disk(stream)
    stream.close()
    with pytest.raises((ValueError, ReadError)):
        disk.read(0x10000, 0x10000)


def test_a_closed_disk_is_an_error_not_another_file(image: Path) -> None:
    disk = q.open_disk(image)
    disk.close()
    disk.close()
    with open(image, "rb"), pytest.raises((OSError, ValueError, Qcow2Error)):  # takes the number just freed
        disk.read(0x10000, 0x10000)


# --- evidence that changes -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, B_L2 + 8, B_DATA + 0x8000])
def test_a_file_that_shrinks_while_read_is_an_error(size: int, image: Path) -> None:
    with q.open_disk(image) as disk:
        os.truncate(image, size)
        with pytest.raises((ReadError, FormatError)):
            disk.read(0, disk.size)


def test_a_file_that_shrinks_under_an_audit_is_a_report(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pread, []

    def pread(fd: int, length: int, offset: int) -> bytes:
        calls.append(offset)
        if len(calls) == 3:
            os.truncate(image, 4096)
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    report = q.audit(image, depth="deep")
    assert report.findings


def test_a_file_that_grows_or_is_replaced_reads_as_it_was_opened(image: Path, tmp_path: Path) -> None:
    with q.open_disk(image) as disk:
        other = tmp_path / "other"
        other.write_bytes(bytes(1 << 20))
        other.replace(image)
        assert disk.read(0, 2) == b"\x11\x11"
    image = base_b(tmp_path / "second.qcow2")
    with q.open_disk(image) as disk, image.open("ab") as stream:
        stream.write(bytes(1 << 20))
        stream.flush()
        assert disk.read(0x10000, 2) == b"\x22\x22"


# --- interrupts ----------------------------------------------------------------------------------


def test_an_interrupt_at_any_read_leaves_no_output_and_no_open_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = base_s(tmp_path / "s.qcow2")
    out = tmp_path / "out"
    out.mkdir()
    real = os.pread
    commands = [
        ["export", str(path), str(out / "disk.raw")],
        ["audit", str(path), "-o", str(out / "report.json"), "--format", "json"],
        ["residue", str(path), str(out / "residue")],
        ["map", str(path)],
        ["diff", str(path)],
    ]
    for arguments in commands:
        for after in (0, 1, 2, 3, 5, 8, 13, 21):
            left = [after]

            def pread(fd: int, length: int, offset: int, left: list[int] = left) -> bytes:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return real(fd, length, offset)

            before = _descriptors()
            with monkeypatch.context() as patch:
                patch.setattr(os, "pread", pread)
                code, _, err = run_command(arguments)
            if left[0] < 0:
                assert (code, err) == (130, "qcow2-forensics: interrupted\n"), arguments
                assert list(out.iterdir()) == [], arguments
            else:
                for item in out.iterdir():
                    subprocess.run(["rm", "-r", str(item)], check=True)
            assert _descriptors() <= before


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_an_interrupted_process_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    image = tmp_path / "large.qcow2"
    qemu.create(image, "2G", preallocation="metadata")
    out = tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "qcow2_forensics", "export", str(image), str(out / "disk.raw")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        waited = 0.0
        while not list(out.iterdir()) and waited < 30 and process.poll() is None:
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                waited += 0.05
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert list(out.iterdir()) == []


# --- full disks ----------------------------------------------------------------------------------


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """Have writes past ``size`` fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [0, 4096, 100_000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(room: int, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for arguments in (
        ["export", str(image), str(out / "disk.raw")],
        ["residue", str(image), str(out / "residue"), "--kind", "free"],
        ["audit", str(image), "--format", "html", "-o", str(out / "report.html")],
    ):
        if room and arguments[0] != "export":
            continue  # they are smaller than that
        with _largest_file(room):
            code, _, err = run_command(arguments)
        assert code == 2, arguments
        assert len(err.splitlines()) == 1, err
        assert err.startswith("qcow2-forensics: ")
        assert list(out.iterdir()) == []


def test_an_output_folder_that_is_missing_or_not_writable_is_one_sentence(image: Path, tmp_path: Path) -> None:
    for target in (tmp_path / "no" / "such" / "disk.raw", image / "disk.raw"):
        code, _, err = run_command(["export", str(image), str(target)])
        assert code == 2
        assert len(err.splitlines()) == 1


def test_a_full_standard_output_is_no_traceback(image: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is absent")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qcow2_forensics", "map", str(image)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            check=False,
        )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


# --- processes -----------------------------------------------------------------------------------


def test_a_disk_open_across_a_fork_reads_right_in_both(image: Path) -> None:
    with q.open_disk(image) as disk:
        disk.read(0, 512)
        ours, theirs = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if child == 0:
            try:
                theirs.send([disk.read(at, 512) for at in (0x20000, 0, 0x10000) for _ in range(50)])
            finally:
                os._exit(0)
        theirs.close()
        mine = [disk.read(at, 512) for at in (0x20000, 0, 0x10000) for _ in range(50)]
        assert ours.poll(30)
        assert ours.recv() == mine
        os.waitpid(child, 0)


def die(path: str, depth: str = "standard", folders: tuple[str, ...] = ()) -> str:
    """Audit, except that an image called ``killer`` takes its worker with it; runs in worker processes."""
    if "killer" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    if "raiser" in path:
        raise RuntimeError("planted")
    return fleet.audit_line(path, depth, folders)


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_own_image_only(tmp_path: Path) -> None:
    names = [str(base_b(tmp_path / name)) for name in ("a.qcow2", "killer.qcow2", "b.qcow2", "raiser.qcow2", "c.qcow2")]
    found = {
        data["identity"]["path"]: {finding["code"] for finding in data["findings"]}
        for data in map(json.loads, fleet.lines(names, die, 2))
    }
    assert sorted(found) == sorted(names)
    crashed = {Path(name).stem for name, codes in found.items() if "QCOW2-AUDIT-CRASHED" in codes}
    assert crashed == {"killer", "raiser"}


def test_bytes_sources_do_not_change_under_us() -> None:
    data = bytearray(b"QFI\xfb" + bytes(508))
    source = BytesSource(bytes(data))
    data[:] = bytes(512)
    assert source.read(0, 4) == b"QFI\xfb"


_FAIL = """
import gc, sys
import qcow2_forensics as q
from qcow2_forensics.memory import GuestMemory
from tests.test_faults import unreadable_parts, unsent_memory
failed = []
for read in (*unreadable_parts(sys.argv[1]), unsent_memory()):
    try:
        read()
    except q.Qcow2Error as error:
        failed.append(error)  # and its traceback
    del read
counts = [len(failed)]
failed.clear()
gc.collect()
print(*counts)
"""


def unreadable_parts(path: str) -> Iterator[Callable[[], object]]:
    """Reads of several parts of which one fails: a stream, a cluster past the end of the file, and that in a backing file."""
    for name in ("zlib", "medium", "overlay"):
        yield lambda name=name: q.open_disk(f"{path}.{name}").read(0, 3 * 65536)  # type: ignore[misc]


def unsent_memory() -> Callable[[], object]:
    from tests.stream_builder import page, simple
    from tests.test_guest_memory import open_bytes

    memory = open_bytes(simple([page(0, 1, "pc.ram")], {"pc.ram": 64 * 4096}))
    return lambda: memory.read(0, 64 * 4096)


def test_a_read_that_failed_leaves_nothing_that_complains_later(tmp_path: Path) -> None:
    """A buffer that is in use when it goes prints to standard error, in Python 3.13 always."""
    path = tmp_path / "disk"
    data = bytes(random.Random(1).choices(b"ab", k=65536))
    (tmp_path / "raw").write_bytes(data * 3)
    zlib, medium, overlay = (tmp_path / f"disk.{name}" for name in ("zlib", "medium", "overlay"))
    qemu.img("convert", "-O", "qcow2", "-c", tmp_path / "raw", zlib)
    qemu.img("convert", "-O", "qcow2", tmp_path / "raw", medium)
    qemu.io(medium, "write -z 64k 64k")
    for image, cluster, value in ((zlib, 1, 1 << 62 | 0x10000), (medium, 2, 0x7000_0000_0000)):
        with q.open_disk(image) as disk:
            entry = disk.mapping.entry_offset(cluster * 65536)
        assert entry is not None
        with image.open("r+b") as stream:
            stream.seek(entry)
            stream.write(value.to_bytes(8, "big"))  # no stream is there, or it is past the end of the file
    qemu.create(overlay, backing=medium.name, backing_format="qcow2", cwd=tmp_path)
    qemu.io(overlay, "write -P 7 0 4k")
    run = subprocess.run(
        [sys.executable, "-X", "dev", "-c", _FAIL, path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.stdout, run.returncode) == ("4\n", 0), run.stderr
    assert "Exception ignored" not in run.stderr
