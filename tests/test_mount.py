"""``mount``: every state as a read-only raw file. Where FUSE cannot be used, what needs it skips by name."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2_forensics import open_disk
from qcow2_forensics.mount import filesystem
from qcow2_forensics.mount.served_files import UniqueNames, safe_name, seek_data, seek_hole
from tests import filesystems, qemu
from tests.conftest import EvidenceCase
from tests.guest_disks import need_mounts, run
from tests.tiers import every

COMMAND = [sys.executable, "-m", "qcow2_forensics"]


class Mounted:
    """One ``mount`` in the foreground: where it is, and the process that serves it."""

    def __init__(self, point: Path, process: subprocess.Popen[str]) -> None:
        self.point = point
        self.process = process

    def unmount(self) -> str:
        """Unmount, wait for the server to end well, and return what it printed."""
        tool = shutil.which("fusermount3") or shutil.which("fusermount") or "umount"
        subprocess.run([tool, "-u", str(self.point)] if tool != "umount" else [tool, str(self.point)], check=True)
        return self.ended(0)

    def ended(self, code: int) -> str:
        _, printed = self.process.communicate(timeout=30)
        assert self.process.returncode == code, printed
        return printed


def start(point: Path, *arguments: str | Path) -> Mounted:
    process = subprocess.Popen([*COMMAND, "mount", *map(str, arguments), str(point)], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not os.path.ismount(point):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(process.communicate()[1])
        time.sleep(0.02)
    return Mounted(point, process)


@contextmanager
def mounted(point: Path, *arguments: str | Path) -> Iterator[Path]:
    """Mount, yield the folder, unmount; nothing may be left."""
    here = start(point, *arguments)
    try:
        yield point
    finally:
        here.unmount()
    assert not point.exists()


@pytest.fixture(scope="session")
def fuse(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip by name where a mount is impossible, found out by trying: libfuse says so itself."""
    try:
        filesystem.need_fuse()
    except filesystem.Unmountable as error:
        pytest.skip(f"FUSE is absent: {error}")
    qemu.need()
    folder = tmp_path_factory.mktemp("fuse")
    try:
        with mounted(folder / "mnt", qemu.create(folder / "probe.qcow2", "1M"), "--no-audit"):
            pass
    except AssertionError as error:
        if "libfuse could not mount" not in str(error):
            raise
        pytest.skip("FUSE is absent: nothing can be mounted here")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def exported(image: Path, out: Path, *options: str | Path, command: str = "export") -> Path:
    subprocess.run([*COMMAND, command, str(image), str(out), *map(str, options)], check=True, capture_output=True)
    return out


# --- with FUSE --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("fuse")
def test_each_state_of_the_case_is_a_file_equal_to_its_export(evidence: EvidenceCase, tmp_path: Path) -> None:
    before = sha256(evidence.image)
    with mounted(tmp_path / "mnt", evidence.image) as point:
        folder = point / "case.qcow2"
        assert sorted(item.name for item in folder.iterdir()) == [
            "README.txt",
            "active.raw",
            "audit.json",
            "snapshot-1-before-incident.memory.raw",
            "snapshot-1-before-incident.raw",
            "snapshot-2-during-incident.memory.raw",
            "snapshot-2-during-incident.raw",
        ]
        for name, options in (("active", ()), ("snapshot-1-before-incident", ("--snapshot", "1"))):
            assert sha256(folder / f"{name}.raw") == sha256(exported(evidence.image, tmp_path / name, *options))
        memory = exported(evidence.image, tmp_path / "memory", "--snapshot", "2", command="memory")
        assert sha256(folder / "snapshot-2-during-incident.memory.raw") == sha256(memory)
        if shutil.which("fls"):
            listed = subprocess.run(
                ["fls", "-o", "2048", "-r", "-p", str(folder / "snapshot-1-before-incident.raw")],
                check=True,
                capture_output=True,
                text=True,
            )
            assert "home/alice/secret_key.txt" in listed.stdout
        status = (folder / "snapshot-2-during-incident.raw").stat()
        assert status.st_mtime_ns // 10**9 == 1795226880  # the snapshot's date, not today's
        assert status.st_mode & 0o222 == 0
        readme = (folder / "README.txt").read_text()
        assert 'snapshot 1 "before-incident" of 2026-11-21 02:07:58 UTC' in readme
    assert sha256(evidence.image) == before


@pytest.mark.slow
@pytest.mark.usefixtures("fuse")
def test_encrypted_and_zstd_images_read_as_qemu_reads_them(make_image: Callable[..., Path], tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    locked = make_image("luks.qcow2", "2M", "write -P 0x5a 100k 300k", secret="sesame")
    plain = make_image("plain.qcow2", "2M", "write -P 0x77 0 1M")
    zstd = tmp_path / "zstd.qcow2"
    qemu.run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", plain, zstd)
    with mounted(tmp_path / "mnt", "--passphrase-file", key, locked, zstd) as point:
        assert sorted(item.name for item in point.iterdir()) == ["luks.qcow2", "zstd.qcow2"]
        for image, secret in ((locked, "sesame"), (zstd, None)):
            raw = (point / image.name / "active.raw").read_bytes()
            assert raw == qemu.raw_bytes(image, secret=secret)


def _mounted_files(raw: Path, offset: int, point: Path) -> dict[str, str]:
    """Return the hash of each file that the kernel finds in a file system inside ``raw``."""
    point.mkdir(exist_ok=True)
    run("mount", "-t", "ext4", "-o", f"loop,ro,noload,offset={offset}", raw, point)
    try:
        return {str(item.relative_to(point)): sha256(item) for item in point.rglob("*") if item.is_file()}
    finally:
        run("umount", point)


@pytest.mark.slow
@pytest.mark.usefixtures("fuse")
@pytest.mark.parametrize("kind", ["evidence", "luks", "zstd"])
def test_the_kernel_sleuthkit_and_cp_find_on_the_mount_what_they_find_in_the_export(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    need_mounts()
    filesystems.need_tools("fls")
    options: list[str | Path] = []
    states = {"active": None}
    if kind == "evidence":
        image = request.getfixturevalue("evidence").image
        states |= {"snapshot-1-before-incident": "1", "snapshot-2-during-incident": "2"}
    else:
        disk, _ = filesystems.disk_of(tmp_path, [filesystems.make(tmp_path, "ext4")])
        image = tmp_path / "disk.qcow2"
        if kind == "luks":
            (tmp_path / "key").write_text("sesame")
            options += ["--passphrase-file", tmp_path / "key"]
            secret = ("--object", f"secret,id=s,file={tmp_path / 'key'}")
            form = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
            qemu.img("convert", *secret, "-O", "qcow2", "-o", form, disk, image)
        else:
            qemu.run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", disk, image)
    before = sha256(image)
    with mounted(tmp_path / "mnt", *options, "--no-audit", "--no-memory", image) as point:
        for name, snapshot in states.items():
            served = point / image.name / f"{name}.raw"
            chosen = ("--snapshot", snapshot) if snapshot else ()
            out = exported(image, tmp_path / f"{name}.out", *options, *chosen)
            assert sha256(served) == sha256(out)
            run("cp", "--sparse=always", served, tmp_path / "copy")
            assert sha256(tmp_path / "copy") == sha256(out)
            assert (tmp_path / "copy").stat().st_blocks <= 1.05 * out.stat().st_blocks
            listings = [run("fls", "-o", "2048", "-r", "-p", path) for path in (served, out)]
            assert listings[0] == listings[1] != ""
            files = [_mounted_files(path, 1 << 20, tmp_path / "files") for path in (served, out)]
            assert files[0] == files[1] != {}
    assert sha256(image) == before


def _reads_equal(work: tuple[str, str, int]) -> int:
    image, mounted_file, seed = work
    randomness = random.Random(seed)
    with open_disk(image) as disk, open(mounted_file, "rb", buffering=0) as stream:
        for _ in range(125):
            offset, length = randomness.randrange(disk.size), randomness.randrange(1, 1 << 16)
            wanted = disk.read(offset, length)
            assert os.pread(stream.fileno(), length, offset) == wanted
    return 125


@pytest.mark.slow
@pytest.mark.usefixtures("fuse")
def test_eight_processes_read_at_random_and_get_the_right_bytes(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    writes = [f"write -P {number + 1} {number * 96}k 64k" for number in range(80)]
    image = make_image("disk.qcow2", "8M", *writes, cluster_size="4k")
    with mounted(tmp_path / "mnt", image, "--no-audit") as point, ProcessPoolExecutor(8) as pool:
        work = [(str(image), str(point / "disk.qcow2/active.raw"), seed) for seed in range(8)]
        assert sum(pool.map(_reads_equal, work)) == 1000


@pytest.mark.usefixtures("fuse")
def test_holes_are_holes_for_lseek_du_and_cp(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image("disk.qcow2", "64M", "write -P 1 1M 64k", "write -z 4M 1M", "write -P 2 40M 128k")
    with mounted(tmp_path / "mnt", image, "--no-audit") as point:
        raw = point / "disk.qcow2/active.raw"
        assert raw.stat().st_blocks * 512 == 192 * 1024
        with raw.open("rb", buffering=0) as stream:
            seek = stream.seek
            assert [seek(0, os.SEEK_DATA), seek(1 << 20, os.SEEK_HOLE)] == [1 << 20, (1 << 20) + 65536]
            assert [seek(0, os.SEEK_HOLE), seek(2 << 20, os.SEEK_DATA)] == [0, 40 << 20]
            with pytest.raises(OSError, match="No such device or address"):
                seek(50 << 20, os.SEEK_DATA)
        subprocess.run(["cp", "--sparse=auto", str(raw), str(tmp_path / "copy")], check=True)
        assert sha256(tmp_path / "copy") == sha256(raw)
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20


@pytest.mark.usefixtures("fuse")
def test_nothing_in_the_mount_can_be_changed(make_image: Callable[..., Path], tmp_path: Path) -> None:
    with mounted(tmp_path / "mnt", make_image(), "--no-audit") as point:
        raw = point / "disk.qcow2/active.raw"
        for change in (
            lambda: raw.open("r+b"),
            raw.unlink,
            lambda: raw.chmod(0o777),
            (point / "new").touch,
            lambda: os.truncate(raw, 0),
            lambda: raw.rename(point / "other"),
        ):
            with pytest.raises(OSError, match=r"Read-only|Permission|not permitted|not implemented"):
                change()


@pytest.mark.usefixtures("fuse")
def test_names_from_the_image_become_safe_and_stay_apart(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image()
    for name in ("../../etc/passwd", "a b\x1b[31m", "ünï", "same", "same "):
        qemu.snapshot(image, name)
    with mounted(tmp_path / "mnt", image, "--no-audit") as point:
        names = sorted(item.name for item in (point / "disk.qcow2").iterdir())
        readme = (point / "disk.qcow2/README.txt").read_text()
    assert names == [
        "README.txt",
        "active.raw",
        "snapshot-1-etc_passwd.raw",
        "snapshot-2-a_b_31m.raw",
        "snapshot-3-n.raw",
        "snapshot-4-same.raw",
        "snapshot-5-same.raw",
    ]
    assert '"../../etc/passwd"' in readme
    assert "\x1b" not in readme


@pytest.mark.usefixtures("fuse")
def test_what_cannot_be_read_is_an_error_with_its_reason(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image("disk.qcow2", "1M", "write -P 1 0 128k")
    qemu.snapshot(image, "gone")
    with open_disk(image) as disk:
        last = max(extent.host_offset or 0 for extent in disk.extents())
        table = disk.image.snapshots[0].offset
    content = bytearray(image.read_bytes())
    content[table : table + 8] = (1 << 55).to_bytes(8, "big")  # the snapshot's L1 table: far past the end
    image.write_bytes(content)
    here = start(tmp_path / "mnt", image, "--no-audit")
    folder = here.point / "disk.qcow2"
    assert sorted(item.name for item in folder.iterdir()) == ["README.txt", "active.raw"]
    assert "Not here" in (folder / "README.txt").read_text()
    assert last
    subprocess.run([shutil.which("fusermount3") or "fusermount", "-u", str(here.point)], check=True)
    assert 'not served: snapshot 1 "gone"' in here.ended(2)


@pytest.mark.usefixtures("fuse")
def test_a_bad_range_is_an_io_error_and_the_rest_reads(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image("disk.qcow2", "1M", "write -P 1 0 64k", "write -P 2 64k 64k")
    with open_disk(image) as disk:
        end = next(extent.host_offset for extent in disk.extents(65536) if extent.host_offset is not None)
    os.truncate(image, end)  # the second cluster is cut off
    here = start(tmp_path / "mnt", image, "--no-audit")
    with (here.point / "disk.qcow2/active.raw").open("rb", buffering=0) as stream:
        assert os.pread(stream.fileno(), 4096, 0) == b"\1" * 4096
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(stream.fileno(), 4096, 65536)
    assert "a data cluster lies past the end of" in here.unmount()


@pytest.mark.usefixtures("fuse")
def test_interrupt_unmounts(make_image: Callable[..., Path], tmp_path: Path) -> None:
    here = start(tmp_path / "mnt", make_image(), "--no-audit")
    here.process.send_signal(signal.SIGINT)
    here.ended(0)
    assert not here.point.exists()


@pytest.mark.usefixtures("fuse")
def test_deleted_snapshots_are_served_when_asked_for(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image("disk.qcow2", "1M", "write -P 1 0 64k")
    qemu.snapshot(image, "former")
    qemu.io(image, "write -P 2 0 64k")
    keep = {"pass-discard-snapshot": "off", "discard": "ignore"}  # what the deletion frees keeps its bytes
    qemu.snapshot(image, "former", action="-d", opts=keep)
    with mounted(tmp_path / "mnt", image, "--no-audit", "--deleted") as point:
        names = [item.name for item in (point / "disk.qcow2").iterdir() if item.name.startswith("deleted-")]
        assert names == ["deleted-1-former.raw"]
        with (point / "disk.qcow2" / names[0]).open("rb") as stream:
            assert stream.read(4096) == b"\1" * 4096


@pytest.mark.usefixtures("fuse")
@pytest.mark.parametrize("lost", every(2, ["header", "L1 table"]))
def test_recovered_states_are_served_when_asked_for(lost: str, make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image("disk.qcow2", "1M", *(f"write -P {at} {at * 64}k 64k" for at in range(1, 9)))
    expected = qemu.raw_bytes(image)
    with open_disk(image) as disk:
        table = disk.image.header.l1_table_offset
    data = bytearray(image.read_bytes())
    at, length = (0, 65536) if lost == "header" else (table, 8)
    data[at : at + length] = bytes(length)
    image.write_bytes(data)
    here = start(tmp_path / "mnt", "--recovered", "--virtual-size", "1M", image)
    folder = here.point / "disk.qcow2"
    assert (folder / "recovered-1.raw").read_bytes() == expected
    assert "recovered state 1: " in (folder / "README.txt").read_text()
    assert (folder / "active.raw").exists() == (lost == "L1 table")
    subprocess.run([shutil.which("fusermount3") or "fusermount", "-u", str(here.point)], check=True)
    printed = here.ended(2 if lost == "header" else 0)
    assert ("not served: the disk as it is now" in printed) == (lost == "header")


def test_an_image_without_a_header_is_an_error_unless_recovery_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("mfusepy", exc_type=(ImportError, OSError))
    image = tmp_path / "disk.qcow2"
    image.write_bytes(bytes(1 << 20))
    for option in ((), ("--recovered",)):
        command = [*COMMAND, "mount", str(image), str(tmp_path / "mnt"), *option]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "mnt").exists()


@pytest.mark.usefixtures("fuse")
def test_background_returns_when_the_mount_is_there(make_image: Callable[..., Path], tmp_path: Path) -> None:
    point = tmp_path / "mnt"
    subprocess.run([*COMMAND, "mount", str(make_image()), str(point), "--background", "--no-audit"], check=True)
    try:
        assert (point / "disk.qcow2/active.raw").stat().st_size == 1 << 20
    finally:
        subprocess.run([shutil.which("fusermount3") or "fusermount", "-u", str(point)], check=True)
    end = time.monotonic() + 10
    while point.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not point.exists()


# --- without FUSE -----------------------------------------------------------------------------------


def test_without_the_device_a_sentence_says_what_to_do(
    make_image: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qcow2_forensics.cli import main

    pytest.importorskip("mfusepy", exc_type=(ImportError, OSError))
    monkeypatch.setattr(filesystem, "_DEVICE", str(tmp_path / "absent"))
    assert main(["mount", str(make_image()), str(tmp_path / "mnt")]) == 2
    assert "mounting needs" in (printed := capsys.readouterr().err)
    assert "--device /dev/fuse" in printed
    assert not (tmp_path / "mnt").exists()


def test_without_the_library_a_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mfusepy", None)
    with pytest.raises(filesystem.Unmountable, match=r"pip install 'qcow2-forensics\[mount\]'"):
        filesystem.need_fuse()


@given(st.text(st.characters(codec="utf-8")))
def test_a_safe_name_holds_nothing_that_anybody_interprets(text: str) -> None:
    assert set(safe_name(text)) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    assert not safe_name(text).startswith((".", "-"))
    assert len(safe_name(text)) <= 80


def test_equal_names_are_numbered_whatever_their_case() -> None:
    names = UniqueNames()
    given = [names.of(stem, ".raw") for stem in ("A", "a-2", "a", "A", "a-2", "a-5", "a")]
    assert given == ["A.raw", "a-2.raw", "a-3.raw", "A-4.raw", "a-2-2.raw", "a-5.raw", "a-6.raw"]


def test_a_name_that_very_many_snapshots_have_is_numbered_without_a_look_at_all_others() -> None:
    names = UniqueNames()
    given = [names.of("snapshot-1-a", suffix) for _ in range(65_536) for suffix in (".raw", ".memory.raw")]
    assert len(set(given)) == len(given)
    assert given[-1] == "snapshot-1-a-65536.memory.raw"


class _Ranges:
    """Content with given data ranges."""

    def __init__(self, data: list[bool]) -> None:
        self.size = self.stored_bytes = len(data)
        self._data = data

    def read(self, offset: int, length: int, /) -> bytes:
        return bytes(self._data[offset : offset + length])

    def data_ranges(self, offset: int) -> Iterator[tuple[int, int]]:
        return ((at, at + 1) for at in range(offset, self.size) if self._data[at])


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.data())
def test_data_and_holes_are_found_as_a_search_byte_by_byte_finds_them(data: list[bool], draw: st.DataObject) -> None:
    offset = draw.draw(st.integers(0, len(data) - 1))
    content = _Ranges(data)
    assert seek_data(content, offset) == next((at for at in range(offset, len(data)) if data[at]), None)
    assert seek_hole(content, offset) == next((at for at in range(offset, len(data)) if not data[at]), len(data))
