"""States of guests that were running: what the log of a file system holds is shown, or is reported as not read.

The oracles are e2fsck, which copies a journal to its place, the kernel, which does so when it mounts, and ntfs-3g.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics import FileSource
from qcow2_forensics.cli import main
from qcow2_forensics.errors import LimitExceeded
from qcow2_forensics.files import hfs_journal
from qcow2_forensics.files.ext_journal import read_journal
from qcow2_forensics.files.tolerant import TolerantReader
from qcow2_forensics.files.volumes import open_volumes
from qcow2_forensics.files.xfs_log import has_changes
from qcow2_forensics.reader.disk import RawDisk
from tests import filesystems, guest_disks, qemu
from tests.filesystems import MIB
from tests.tiers import every

pytest.importorskip("pytsk3", reason="pytsk3 is absent")

BLOCK = 1024


def diff(before: Path, after: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str], str]:
    """The exit code of ``diff --files``, the changes by path without folders, and what it says beside."""
    capsys.readouterr()
    code = main(["diff", str(before), str(after), "--files", "--format", "json"])
    streams = capsys.readouterr()
    listed: dict[str, Any] = json.loads(streams.out)
    files = [item for item in listed["files"] if (item["after"] or item["before"])["type"] != "d"]
    return code, {item["path"]: item["change"] for item in files if item["change"] != "deleted"}, streams.err


# --- ext ---------------------------------------------------------------------------------------------

JOURNALS = {
    "32 bit": (["-O", "^64bit,^metadata_csum"], ""),
    "64 bit": ([], ""),
    "checksums of version 2": ([], "-c -v 2"),
    "checksums of version 3": ([], "-c -v 3"),
    "version 3, 32 bit": (["-O", "^64bit"], "-c -v 3"),
}


def debugfs(path: Path, *commands: str) -> None:
    qemu.run("debugfs", "-w", "-f", "-", path, stdin="".join(f"{command}\n" for command in commands).encode())


def with_journal(folder: Path, extra: list[str], how: str, *, revoked: bool = False) -> tuple[Path, Path]:
    """An ext4 file system in which five files are removed by its journal only, and one without that change."""
    filesystems.need_tools("mke2fs", "debugfs", "e2fsck")
    before, changed, after = folder / "before.raw", folder / "changed.raw", folder / "after.raw"
    with before.open("wb") as stream:
        stream.truncate(16 * MIB)
    qemu.run("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), *extra, before)
    (folder / "content").write_bytes(b"content\n")
    debugfs(before, *(f"write {folder / 'content'} file{number}" for number in range(9)))
    shutil.copyfile(before, changed)
    debugfs(changed, *(f"rm file{number}" for number in range(5)))
    old, new = before.read_bytes(), changed.read_bytes()
    numbers = [
        at
        for at in range(2, len(old) // BLOCK)
        if old[at * BLOCK : (at + 1) * BLOCK] != new[at * BLOCK : (at + 1) * BLOCK]
    ]
    pieces = folder / "pieces"
    pieces.write_bytes(b"".join(new[at * BLOCK : (at + 1) * BLOCK] for at in numbers))
    shutil.copyfile(before, after)
    places = ",".join(map(str, numbers))
    debugfs(after, f"jo {how}", f"jw -b {places} {pieces}", *([f"jw -r {places}"] if revoked else ()), "jc")
    return before, after


@pytest.mark.parametrize("kind", every(2, JOURNALS))
@pytest.mark.parametrize("revoked", [False, True], ids=["written", "revoked"])
def test_blocks_in_a_journal_are_those_that_e2fsck_copies(
    kind: str, revoked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = with_journal(tmp_path, *JOURNALS[kind], revoked=revoked)
    code, changes, text = diff(before, after, capsys)
    assert code == 0
    assert changes == ({} if revoked else {f"/file{number}": "removed" for number in range(5)})
    assert ("in its journal are read in place of what they replace" in text) is not revoked
    copied = tmp_path / "copied.raw"
    shutil.copyfile(after, copied)
    subprocess.run(["e2fsck", "-y", "-E", "journal_only", copied], capture_output=True, check=False)
    (system,) = open_volumes(RawDisk(FileSource(after)), "the disk").systems
    expected = copied.read_bytes()
    for offset, length in system.replaced:
        assert system.image.read(offset, length) == expected[offset : offset + length]  # type: ignore[attr-defined]
    shown, stored = system.image.read(0, len(expected)), after.read_bytes()  # type: ignore[attr-defined]
    places = {offset // BLOCK for offset, _ in system.replaced}
    different = {
        at
        for at in range(len(stored) // BLOCK)
        if shown[at * BLOCK : (at + 1) * BLOCK] != stored[at * BLOCK : (at + 1) * BLOCK]
    }
    assert different <= places
    assert bool(different) is not revoked


def test_reads_of_any_part_show_the_journal(tmp_path: Path) -> None:
    _, after = with_journal(tmp_path, [], "")
    (system,) = open_volumes(RawDisk(FileSource(after)), "the disk").systems
    whole = system.image.read(0, after.stat().st_size)  # type: ignore[attr-defined]
    noise = random.Random(1)
    starts = [span.offset for span in system.replaced]
    for _ in range(300):
        at = max(0, noise.choice(starts) + noise.randrange(-3 * BLOCK, 3 * BLOCK))
        length = noise.randrange(1, 5 * BLOCK)
        assert system.image.read(at, length) == whole[at : at + length]  # type: ignore[attr-defined]


def test_a_transaction_without_its_commit_never_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = with_journal(tmp_path, [], "-c -v 3")
    data = bytearray(after.read_bytes())
    commit = data.index(b"\xc0\x3b\x39\x98\0\0\0\2")
    data[commit + 48] ^= 1  # its time
    after.write_bytes(data)
    assert diff(before, after, capsys)[:2] == (0, {})


@pytest.mark.parametrize("damage", ["superblock", "length", "inode"])
def test_a_journal_that_cannot_be_read_is_reported(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = with_journal(tmp_path, [], "")
    data = bytearray(after.read_bytes())
    head = data.index(b"\xc0\x3b\x39\x98\0\0\0\4")
    if damage == "superblock":
        data[head] ^= 1
    elif damage == "length":
        struct.pack_into(">I", data, head + 16, 1 << 31)
    after.write_bytes(data)
    if damage == "inode":
        debugfs(after, "ssv journal_inum 0")
    code, _, text = diff(before, after, capsys)
    assert code == 2
    assert "journal" in text
    assert "files may be missing from the list" in text


@pytest.mark.parametrize("where", ["the journal's superblock", "the file system's superblock"])
def test_an_ext_log_is_clean_only_where_its_superblocks_are_as_they_were_written(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the checksum, a damaged byte makes the journal an empty one, and the flag a file system that was unmounted."""
    before, after = with_journal(tmp_path, [], "-c -v 3")
    data = bytearray(after.read_bytes())
    if where == "the journal's superblock":
        at = data.index(b"\xc0\x3b\x39\x98\0\0\0\4")
        data[at + 28 : at + 32] = bytes(4)  # where its first transaction is
    else:
        data[1024 + 0x60] &= ~4
    after.write_bytes(data)
    code, _, text = diff(before, after, capsys)
    assert code == 2
    assert "the checksum of its superblock is wrong" in text
    assert "files may be missing from the list" in text


def test_a_journal_with_a_feature_of_the_future_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = with_journal(tmp_path, [], "")
    data = bytearray(after.read_bytes())
    data[data.index(b"\xc0\x3b\x39\x98\0\0\0\4") + 41] |= 1
    after.write_bytes(data)
    code, _, text = diff(before, after, capsys)
    assert code == 2
    assert "its journal is not read: it has features that are not known" in text


def test_a_journal_without_which_alone_the_file_system_opens_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, _ = with_journal(tmp_path, [], "")
    after, noise = tmp_path / "noise.raw", tmp_path / "noise"
    shutil.copyfile(before, after)
    noise.write_bytes(b"\xa5" * BLOCK)
    debugfs(after, "jo", f"jw -b {1024 // BLOCK} {noise}", "jc")
    code, _, text = diff(before, after, capsys)
    assert code == 2
    assert "with it the file system cannot be opened" in text
    assert "in place of what they replace" not in text


def test_a_crafted_journal_ends_at_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors without tags, as many as there is room for."""
    monkeypatch.setattr("qcow2_forensics.files.ext_journal.JOURNAL_CONTROL_BYTES", 100 * 1024)
    path = tmp_path / "journal"
    head = struct.pack(">4s8I", b"\xc0\x3b\x39\x98", 4, 0, BLOCK, 1000, 1, 7, 1, 0)
    empty = struct.pack(">4sII", b"\xc0\x3b\x39\x98", 5, 7)
    path.write_bytes(head.ljust(BLOCK, b"\0") + empty.ljust(BLOCK, b"\0") * 999)
    with pytest.raises(LimitExceeded, match="descriptors and commits of a journal"):
        read_journal(TolerantReader(RawDisk(FileSource(path))))
    whole = path.read_bytes()[: 50 * BLOCK]
    path.write_bytes(whole[:16] + struct.pack(">I", 50) + whole[20:])
    assert read_journal(TolerantReader(RawDisk(FileSource(path)))).blocks == {}


# --- guests that run ---------------------------------------------------------------------------------


@contextlib.contextmanager
def running(path: Path, kind: str, *options: str) -> Iterator[Path]:
    """The folder under which a kernel has a file system mounted, and writes to it when it likes."""
    guest_disks.need_mounts()
    folder = path.with_name("mounted")
    folder.mkdir(exist_ok=True)
    try:
        guest_disks.run("mount", "-t", kind, "-o", ",".join(("loop", *options)), path, folder)
    except AssertionError as error:
        pytest.skip(f"{kind} cannot be mounted here: {error}")
    try:
        yield folder
    finally:
        guest_disks.run("umount", folder)


def populate(folder: Path) -> None:
    (folder / "folder").mkdir()
    for number in range(40):
        (folder / "folder" / f"file{number}").write_bytes(b"content\n" * number)
    (folder / "edited").write_bytes(b"before")
    (folder / "removed").write_bytes(b"secret" * 900)


def attack(folder: Path) -> None:
    (folder / "folder" / "implant").write_bytes(b"new" * 3000)
    (folder / "edited").write_bytes(b"after, and longer")
    (folder / "removed").unlink()
    (folder / "folder" / "file3").rename(folder / "folder" / "moved")
    for name in ("folder/implant", "edited", "folder"):
        handle = os.open(folder / name, os.O_RDONLY)
        os.fsync(handle)  # what a program asks for: the journal is written, and not more
        os.close(handle)


ATTACK = {
    "/folder/implant": "added",
    "/edited": "content changed",
    "/removed": "removed",
    "/folder/moved": "renamed",
}


def states_of_a_running_guest(folder: Path, kind: str, *options: str) -> tuple[Path, Path, Path]:
    """An unmounted file system, and copies of it while it is mounted: as it was, and just after the attack."""
    disk = guest_disks.make(folder, kind, 64 * MIB)
    disk.change(populate)
    before = disk.copy("before.raw").path
    with running(disk.path, kind, *options) as mounted:
        attack(mounted)
        return before, disk.copy("after.raw").path, disk.path


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ordered", "journal"])
def test_files_of_a_running_ext4_guest_are_those_that_the_kernel_mounts(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after, _ = states_of_a_running_guest(tmp_path, "ext4", f"data={mode}")
    code, changes, text = diff(before, after, capsys)
    assert (code, changes) == (0, ATTACK)
    assert "in its journal are read in place of what they replace" in text
    (system,) = open_volumes(RawDisk(FileSource(after)), "the disk").systems
    seen = {
        record.path: (record.size, record.times.modified, system.sha256(record))
        for record in system.records()
        if record.allocated and record.type == "r" and not record.virtual
    }
    with running(after, "ext4") as mounted:  # which copies the journal
        tree = dict(guest_disks._tree(mounted))
    assert seen == {path: (item.size, item.modified, item.sha256) for path, item in tree.items() if item.type == "r"}


@pytest.mark.slow
def test_the_log_of_a_running_xfs_guest_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dfvfs", reason="dfVFS is absent")
    before, after, disk = states_of_a_running_guest(tmp_path, "xfs")
    code, _, text = diff(before, after, capsys)
    assert code == 2
    assert "its XFS log is not read: what was changed last may be missing" in text
    assert main(["timeline", str(qcow2_of(after)), "--state", "active"]) == 2
    code, changes, text = diff(before, disk, capsys)  # unmounted by now
    assert (code, changes, text) == (0, ATTACK, "")


def qcow2_of(raw: Path) -> Path:
    path = raw.with_suffix(".qcow2")
    qemu.img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


def xfs_volume(path: Path) -> TolerantReader:
    return TolerantReader(RawDisk(FileSource(path)))


def new_xfs(folder: Path) -> Path:
    filesystems.need_tools("mkfs.xfs")
    path = folder / "xfs.raw"
    with path.open("wb") as stream:
        stream.truncate(64 * MIB)
    small = {"TEST_DIR": "1", "TEST_DEV": "1", "QA_CHECK_FS": "1"}
    subprocess.run(["mkfs.xfs", "-q", "-f", path], check=True, env={**os.environ, **small})
    return path


def test_a_new_xfs_has_nothing_in_its_log(tmp_path: Path) -> None:
    path = new_xfs(tmp_path)
    assert not has_changes(xfs_volume(path))
    data = bytearray(path.read_bytes())
    record = data.index(b"\xfe\xed\xba\xbe")
    data[record + 512 + 9] &= ~0x20  # the flag of an unmount
    path.write_bytes(data)
    assert has_changes(xfs_volume(path))


def says_clean(path: Path) -> bool:
    """Whether an XFS log is recognised as one that holds nothing."""
    try:
        return not has_changes(xfs_volume(path))
    except OSError:
        return False


def test_an_xfs_log_is_clean_only_where_its_last_record_is_recognised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every byte that makes the record one of an unmount, of this log and this place, is needed."""
    pytest.importorskip("dfvfs", reason="dfVFS is absent")
    path = new_xfs(tmp_path)
    assert says_clean(path)
    data = path.read_bytes()
    record = data.index(b"\xfe\xed\xba\xbe")
    for at in (*range(24), *range(40, 44), *range(300, 320), 512, 512 + 8, 512 + 9):
        write(path, record + at, bytes([data[record + at] ^ 0x21]))
        assert not says_clean(path), at
        write(path, record + at, data[record + at : record + at + 1])
    for content in (b"\0", b"\xff", b"log!"):
        write(path, record, content * (MIB // len(content)))
        assert not says_clean(path), content
    code, _, text = diff(path, path, capsys)
    assert code == 2
    assert "it is not known whether its log holds changes" in text


def write(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(data)


@pytest.mark.slow
def test_an_xfs_log_is_clean_whenever_it_was_unmounted(tmp_path: Path) -> None:
    """Rounds of work fill the log of 5 MiB and more, so that it starts again in the middle."""
    disk = guest_disks.make(tmp_path, "xfs", 64 * MIB)
    for number in range(12):
        with running(disk.path, "xfs") as mounted:
            for name in range(700):
                (mounted / f"{number}-{name}").write_bytes(b"x")
            os.sync()
            assert has_changes(xfs_volume(disk.path))
            for name in range(700):
                (mounted / f"{number}-{name}").unlink()
        assert not has_changes(xfs_volume(disk.path)), number


def restart_page(size: int, flags: int, in_use: int, number: int = 1) -> bytearray:
    """A restart page of a log of ``size`` bytes, as Windows has it."""
    page = bytearray(4096)
    bits = 67 - size.bit_length()  # of sequence numbers
    struct.pack_into("<4sHHQIIHHH", page, 0, b"RSTR", 30, 9, 0, 4096, 4096, 48, 1, 1)
    area = struct.pack(
        "<QHHHHIHHQIHHI", number, 1, 0xFFFF, in_use, flags, bits, 224, 64, size, 0, 48, 64, 0
    )  # LSN, clients, free, in use, flags, sequence bits, length, client array, size, ...
    client = struct.pack("<QQHHH6xI", 0, 0, 0xFFFF, 0xFFFF, 0, 8) + "NTFS".encode("utf-16-le").ljust(128, b"\0")
    page[48 : 48 + len(area)] = area
    page[112 : 112 + len(client)] = client
    struct.pack_into("<H", page, 30, 1)
    for sector in range(8):
        page[sector * 512 + 510 : sector * 512 + 512] = b"\1\0"
    return page


class NtfsVolume:
    """An NTFS volume whose log is written over."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        filesystems.need_tools("mkntfs", "ntfscp", "ntfsinfo")
        self.folder = folder
        self._capsys = capsys
        self._volume = filesystems.make(folder, "ntfs")
        (folder / "small").write_bytes(b"small\n")
        self.before = self._volume.copy("before.raw").path
        (system,) = open_volumes(RawDisk(FileSource(self.before)), "the disk").systems
        assert system.problems == []
        (log,) = [record for record in system.records() if record.path == "/$LogFile"]
        self.size = log.size
        self._at = log.spans[0].offset

    def judged(self, log: bytes, at: int = 0) -> tuple[int, str, bool]:
        """The exit code of ``diff``, what it says, and whether ntfs-3g refuses to write."""
        data = bytearray(self.before.read_bytes())
        data[self._at + at : self._at + at + len(log)] = log
        after = self.folder / "after.raw"
        after.write_bytes(data)
        code, _, text = diff(self.before, after, self._capsys)
        refused = subprocess.run(["ntfscp", after, self.folder / "small", "new"], capture_output=True, check=False)
        return code, text, bool(refused.returncode)


def test_an_unclean_ntfs_log_is_reported_as_ntfs_3g_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A restart page with a client in use, as Windows has it while a volume is mounted."""
    volume = NtfsVolume(tmp_path, capsys)
    for flags, in_use in ((0, 0), (2, 0), (0, 0xFFFF)):
        code, text, refused = volume.judged(bytes(restart_page(volume.size, flags, in_use) * 2))
        assert refused == (code == 2) == (flags == 0 and in_use == 0), (flags, in_use, text)
        assert ("its NTFS log is not read" in text) == (code == 2)


@pytest.mark.parametrize("newer", [0, 1])
def test_the_newer_restart_page_of_an_ntfs_log_counts(
    newer: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = NtfsVolume(tmp_path, capsys)
    pages = [restart_page(volume.size, 2, 0, number=1), restart_page(volume.size, 0, 0, number=2)]
    code, text, refused = volume.judged(bytes(b"".join(pages[::-1] if newer == 0 else pages)))
    assert (code, refused) == (2, True), text


@pytest.mark.parametrize("count", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_an_ntfs_log_is_clean_only_where_it_is_recognised(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where ntfs-3g refuses to write it is never called clean, and neither is a page that was written in part."""
    volume = NtfsVolume(tmp_path, capsys)
    clean = restart_page(volume.size, 2, 0)
    torn = bytearray(clean)
    torn[1022] ^= 1
    garbage = random.Random(1).randbytes(8192)
    for log, at in (
        (bytes(8192), 0), (garbage, 0), (b"RCRD" + bytes(8188), 0), (b"BAAD" + bytes(8188), 0),
        (b"\0", 70_000), (bytes(volume.size), 0),
        (bytes(clean + torn), 0), (bytes(torn + clean), 0), (bytes(clean) + garbage[:4096], 0), (bytes(clean) + b"\xff" * 4096, 0),
    ):  # fmt: skip
        code, text, _ = volume.judged(log, at)
        assert code == 2, (log[:4], at)
        assert "it is not known whether its log holds changes" in text
        assert "files may be missing from the list" in text
    noise = random.Random(2)
    for _ in range(count):  # what nobody thought of
        pages = bytearray(restart_page(volume.size, noise.choice((0, 2)), noise.choice((0, 0xFFFF))) * 2)
        for _ in range(noise.randrange(1, 4)):
            pages[noise.randrange(4) * 2048 % 8192 + noise.randrange(96)] = noise.randrange(256)
        code, text, refused = volume.judged(bytes(pages))
        assert code == 2 or not refused, pages[:96]


# --- HFS+ -------------------------------------------------------------------------------------------


def hfs_volume(folder: Path, journal: bytes | None, flags: int = 1) -> TolerantReader:
    """The headers of a volume of HFS+, as Apple's technical note 1150 has them."""
    data = bytearray(16384)
    struct.pack_into(">2sHI4sI", data, 1024, b"H+", 4, 1 << 13 if journal is not None else 1 << 8, b"HFSJ", 2)
    struct.pack_into(">I", data, 1024 + 40, 4096)
    if journal is not None:
        struct.pack_into(">I32xQQ", data, 2 * 4096, flags, 3 * 4096, 4096)
        data[3 * 4096 : 3 * 4096 + len(journal)] = journal
    path = folder / "hfs.raw"
    path.write_bytes(data)
    return TolerantReader(RawDisk(FileSource(path)))


def journal_header(order: str, start: int, end: int) -> bytes:
    header = bytearray(struct.pack(f"{order}2I3Q3I", 0x4A4E4C78, 0x12345678, start, end, 4096, 512, 0, 512))
    value = 0
    for byte in header:
        value = ((value << 8) ^ (value + byte)) & 0xFFFF_FFFF
    struct.pack_into(f"{order}I", header, 36, ~value & 0xFFFF_FFFF)
    return bytes(header)


def test_an_hfs_journal_is_clean_only_where_it_is_recognised(tmp_path: Path) -> None:
    assert not hfs_journal.has_changes(hfs_volume(tmp_path, None), 0)
    assert not hfs_journal.has_changes(hfs_volume(tmp_path, b"", flags=5), 0)
    for order in "<>":
        empty = journal_header(order, 1024, 1024)
        assert not hfs_journal.has_changes(hfs_volume(tmp_path, empty), 0)
        assert hfs_journal.has_changes(hfs_volume(tmp_path, journal_header(order, 512, 1024)), 0)
        for at in range(len(empty)):
            damaged = empty[:at] + bytes([empty[at] ^ 0x10]) + empty[at + 1 :]
            with pytest.raises(OSError, match="no valid header"):
                hfs_journal.has_changes(hfs_volume(tmp_path, damaged), 0)
    for journal, flags in ((b"", 1), (empty, 2)):
        with pytest.raises(OSError, match=r"no valid header|another device"):
            hfs_journal.has_changes(hfs_volume(tmp_path, journal, flags), 0)
