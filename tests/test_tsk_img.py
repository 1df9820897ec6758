"""pytsk3 sees through our Img_Info what The Sleuth Kit's own tools see in QEMU's raw export."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics import FileSource, open_disk
from qcow2_forensics.files.records import FileRecord, Volume
from qcow2_forensics.files.spans import Spans
from tests import filesystems, qemu
from tests.conftest import EvidenceCase
from tests.filesystems import KINDS, make, sleuthkit
from tests.image_builder import COPIED, PASSPHRASE, Builder
from tests.tiers import every

pytsk3 = pytest.importorskip("pytsk3", reason="pytsk3 is absent")

import pytsk3_qcow2  # noqa: E402
from pytsk3_qcow2 import Img_Info, open_image, states  # noqa: E402
from pytsk3_qcow2.files import FileSystem, NoFileSystem, file_systems  # noqa: E402
from pytsk3_qcow2.lines import body_line, fls_line, mode_text  # noqa: E402

SIZE = 1 << 20
pytestmark = pytest.mark.usefixtures("utc")


@pytest.fixture
def two(make_image: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A qcow2 image and the raw file QEMU exports of it."""
    path = make_image("disk.qcow2", SIZE, "write -P 1 0 64k", "write -P 2 500k 100k", "write -P 3 1023k 1k")
    raw = tmp_path / "disk.raw"
    qemu.convert(path, raw)
    return path, raw


# --- the same edges as pytsk3's own ----------------------------------------------------------------


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except OSError:
        return OSError


@qemu.requires_qemu
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 512),
        (0, 0),
        (3, 5),
        (SIZE - 1, 1),
        (SIZE - 10, 20),
        (SIZE - 512, 4096),
        (SIZE, 1),
        (SIZE, 0),
        (SIZE + 4096, 512),
        (SIZE * 100, 0),
        (-1, 10),
        (65000, 70000),
    ],
)
def test_reads_behave_as_those_of_a_plain_image(two: tuple[Path, Path], offset: int, length: int) -> None:
    path, raw = two
    ours, theirs = Img_Info(path), pytsk3.Img_Info(str(raw))
    assert outcome(lambda: ours.read(offset, length)) == outcome(lambda: theirs.read(offset, length))
    assert ours.get_size() == theirs.get_size()


@qemu.requires_qemu
def test_closing_twice_is_fine_and_reading_afterwards_is_an_ioerror(two: tuple[Path, Path]) -> None:
    for image in (Img_Info(two[0]), pytsk3.Img_Info(str(two[1]))):
        image.close()
        image.close()
        assert image.get_size() == SIZE
        assert outcome(lambda image=image: image.read(0, 512)) is OSError
        assert outcome(lambda image=image: image.read(0, 0)) is OSError


@qemu.requires_qemu
def test_it_is_an_img_info_and_takes_the_argument_names_of_one(two: tuple[Path, Path]) -> None:
    image = Img_Info(url=os.fspath(two[0]))
    assert isinstance(image, pytsk3.Img_Info)
    assert image.read(off=0, len=3) == b"\1\1\1"


@qemu.requires_qemu
def test_the_arguments_of_pytsk3_are_accepted_by_place_and_by_name(make_image: Callable[..., Path]) -> None:
    path = make_image("disk.qcow2", SIZE, "write -P 1 0 64k")
    qemu.snapshot(path, "old")  # its ID is 1, as pytsk3.TSK_IMG_TYPE_RAW is
    qemu.io(path, "write -P 2 0 64k")
    for image in (
        Img_Info(str(path), pytsk3.TSK_IMG_TYPE_RAW),
        Img_Info(str(path), pytsk3.TSK_IMG_TYPE_DETECT, 512),
        Img_Info(url=str(path), type=pytsk3.TSK_IMG_TYPE_EXTERNAL, sector_size=4096),
    ):
        assert image.read(0, 1) == b"\2"
    assert Img_Info(str(path), pytsk3.TSK_IMG_TYPE_RAW, snapshot="1").read(0, 1) == b"\1"
    with pytest.raises(TypeError, match="snapshot="):
        Img_Info(str(path), "1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional"):
        Img_Info(str(path), 1, 512, "1")  # type: ignore[misc]


@qemu.requires_qemu
def test_any_source_of_the_image_will_do_and_an_open_disk_stays_open(two: tuple[Path, Path]) -> None:
    path, raw = two
    expected = raw.read_bytes()
    with path.open("rb") as stream:
        assert Img_Info(stream).read(0, SIZE) == expected
    assert Img_Info(FileSource(path)).read(0, SIZE) == expected
    with open_disk(path) as disk:
        image = Img_Info(disk)
        assert image.read(0, SIZE) == expected
        image.close()
        assert disk.read(0, 1) == b"\1"


@qemu.requires_qemu
def test_an_overlay_is_read_alone_when_that_is_asked_for(make_image: Callable[..., Path]) -> None:
    base = make_image("base.qcow2", SIZE, "write -P 1 0 64k")
    overlay = make_image("overlay.qcow2", SIZE, "write -P 2 64k 64k", backing=base.name, backing_format="qcow2")
    assert Img_Info(overlay).read(0, 1) == b"\1"
    base.unlink()
    assert Img_Info(overlay, follow=False).read(65535, 2) == b"\0\2"


@qemu.requires_qemu
def test_anything_but_qcow_opens_as_a_plain_image(two: tuple[Path, Path]) -> None:
    path, raw = two
    assert type(open_image(raw)) is pytsk3.Img_Info
    assert type(open_image(path)) is Img_Info
    assert open_image(raw).read(0, SIZE) == open_image(path).read(0, SIZE)
    with pytest.raises(OSError, match="has no snapshots"):
        open_image(raw, snapshot="1")


@qemu.requires_qemu
def test_every_state_takes_its_passphrase_from_the_environment(
    make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    path = make_image("locked.qcow2", SIZE, "write -P 7 0 64k", secret=PASSPHRASE)
    monkeypatch.setenv("QCOW2_PASSPHRASE", PASSPHRASE)
    assert open_image(path).read(0, 1) == b"\7"
    assert [image.read(0, 1) for image in states(path)] == [b"\7"]


# --- errors ------------------------------------------------------------------------------------------


def test_paths_that_are_no_image_are_ioerrors(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello\n" * 1000)
    for name in ("missing", "empty", "text", "."):
        with pytest.raises(OSError, match=r"\w"):
            Img_Info(tmp_path / name)
    for name in ("missing", "."):
        with pytest.raises(OSError, match=r"\w"):
            open_image(tmp_path / name)
        with pytest.raises(OSError, match=r"\w"):
            list(states(tmp_path / name))


@qemu.requires_qemu
def test_an_unknown_or_ambiguous_snapshot_lists_the_choices(make_image: Callable[..., Path]) -> None:
    path = make_image("disk.qcow2", SIZE)
    qemu.snapshot(path, "one")
    qemu.snapshot(path, "twin")
    qemu.snapshot(path, "twin")
    with pytest.raises(OSError, match=r"no snapshot 'nope'.*1 \(one\), 2 \(twin\), 3 \(twin\)"):
        Img_Info(path, snapshot="nope")
    with pytest.raises(OSError, match=r"ambiguous.*2 \(twin\), 3 \(twin\)"):
        Img_Info(path, snapshot="twin")
    assert Img_Info(path, snapshot="3").state == "twin (ID 3)"


@qemu.requires_qemu
def test_a_locked_image_asks_for_its_passphrase(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "aes.qcow2", SIZE, secret="pw", encrypt={"format": "aes"})
    qemu.io(path, "write -P 7 0 64k", secret="pw")
    with pytest.raises(OSError, match=r"encrypted \(AES\): give passphrase="):
        Img_Info(path)
    pytest.importorskip("cryptography")
    assert Img_Info(path, passphrase="pw").read(0, 4) == b"\7\7\7\7"


@qemu.requires_qemu
def test_a_missing_backing_file_is_an_ioerror_naming_it(tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "base.qcow2", SIZE)
    over = qemu.create(tmp_path / "over.qcow2", backing="base.qcow2", backing_format="qcow2", cwd=tmp_path)
    base.unlink()
    with pytest.raises(OSError, match=r"backing file 'base.qcow2' of over.qcow2 is missing"):
        Img_Info(over)


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, int, bytes]:
    """An ext4 disk whose file ``large.bin`` has one cluster that the file end cuts off."""
    made = make(tmp_path, "ext4")
    path = tmp_path / "damaged.qcow2"
    qemu.img("convert", "-O", "qcow2", "-o", "cluster_size=4096", made.path, path)
    content = made.files["large.bin"]
    with open_disk(path) as disk:
        at = disk.read(0, disk.size).index(content[100 << 10 : 101 << 10]) & ~4095
        entry = disk.mapping.entry_offset(at)
    assert entry is not None
    with path.open("r+b") as stream:
        stream.seek(entry)
        stream.write((0x7000_0000_0000).to_bytes(8, "big"))  # far past the end of the file
    return path, at, content


@qemu.requires_qemu
def test_bytes_that_cannot_be_read_are_an_error_with_our_sentence(damaged: tuple[Path, int, bytes]) -> None:
    path, at, content = damaged
    image = Img_Info(path)
    with pytest.raises(OSError, match="past the end of"):
        image.read(at, 512)
    assert "past the end of" in image.read_errors[0]
    file = pytsk3.FS_Info(image).open("/large.bin")
    assert file.read_random(0, 1000) == content[:1000]
    # pytsk3 turns whatever a Python image raises into RuntimeError; the sentence is kept.
    with pytest.raises((OSError, RuntimeError), match="past the end of"):
        file.read_random(0, len(content))


@qemu.requires_qemu
@pytest.mark.parametrize("known", [False, True], ids=["first", "again"])
def test_one_unreadable_cluster_hides_nothing_else(damaged: tuple[Path, int, bytes], known: bool) -> None:
    path, at, _ = damaged
    image = Img_Info(path)
    if known:
        with pytest.raises(OSError, match="past the end of"):
            image.read(at, 512)
    system = pytsk3.FS_Info(image)  # looks for every kind of file system, also in the bad cluster
    assert system.open("/letters.txt").read_random(0, 1 << 20) == b"abcdefgh" * 9000
    with pytest.raises((OSError, RuntimeError)):
        system.open("/large.bin").read_random(0, 1 << 20)
    assert system.open("/small.txt").read_random(0, 100) == b"a few bytes\n"


@qemu.requires_qemu
def test_a_truncated_image_opens_and_fails_only_where_it_is_cut(tmp_path: Path) -> None:
    made = make(tmp_path, "ext4")
    path = tmp_path / "cut.qcow2"
    qemu.img("convert", "-O", "qcow2", "-o", "cluster_size=4096", made.path, path)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size * 3 // 4)
    system = pytsk3.FS_Info(Img_Info(path))
    sentences = []
    for name, content in made.files.items():
        try:
            assert system.open(f"/{name}").read_random(0, 1 << 20) == content
        except (OSError, RuntimeError) as error:
            sentences.append(str(error))
    assert 0 < len(sentences) < len(made.files)
    assert all("past the end of" in sentence for sentence in sentences)


@qemu.requires_qemu
def test_a_caller_may_have_zeros_and_a_list_of_them_instead(damaged: tuple[Path, int, bytes]) -> None:
    path, at, content = damaged
    image = Img_Info(path, unreadable="zeros")
    around = image.read(at - 1000, 6096)
    with open_disk(path) as disk:
        assert around == disk.read(at - 1000, 1000) + bytes(4096) + disk.read(at + 4096, 1000)
    assert image.unreadable == [(at, 4096)]
    assert "past the end of" in image.read_errors[0]
    (system,) = file_systems(image)
    records = {record.path: record for record in system.records()}
    assert len(records) > 4
    assert system.sha256(records["/letters.txt"]) == hashlib.sha256(b"abcdefgh" * 9000).hexdigest()
    for _ in range(2):  # libtsk's cache hides the second failure, the list of ranges does not
        with pytest.raises(OSError, match=r"part of the content cannot be read.*past the end of"):
            system.sha256(records["/large.bin"])
    assert len(content) == records["/large.bin"].size


def test_a_large_range_that_cannot_be_read_is_not_tried_sector_by_sector(tmp_path: Path) -> None:
    """The second cluster lies past the end of the file, and a snapshot claims more than its L1 table maps."""
    builder = Builder(size=16 << 20)
    builder.data(0, b"\x11" * 65536).entry(65536, (1 << 40) | COPIED)
    l1 = builder.put(bytes(8))
    builder.snapshot(b"1", b"wide", l1_offset=l1, l1_size=1, disk_size=4 << 30)
    path = builder.write(tmp_path / "disk.qcow2")
    for snapshot, at, length, wanted, most in [
        (None, 0, 16 << 20, [(65536, 65536)], 40),
        ("wide", 448 << 20, 128 << 20, [(512 << 20, 64 << 20)], 40),
    ]:
        with open_disk(path, snapshot) as disk:
            tried = _counting(disk)
            image = Img_Info(disk, unreadable="zeros")
            assert len(image.read(at, length)) == length
            assert image.unreadable == wanted
            assert len(tried) < most


def test_a_version_1_cluster_that_the_end_of_the_file_cuts_is_read_up_to_there() -> None:
    header = b"QFI\xfb" + struct.pack(">IQIIQBBHIQ", 1, 0, 0, 0, 1 << 21, 12, 9, 0, 0, 4096)
    parts = [header, struct.pack(">Q", 8192), struct.pack(">Q", 12288 + 512), b"\x11" * 4096]  # not on a cluster
    image = Img_Info(io.BytesIO(b"".join(part.ljust(4096, b"\0") for part in parts)), unreadable="zeros")
    assert image.read(0, 4096) == b"\x11" * 3584 + bytes(512)
    assert image.unreadable == [(3584, 512)]


def test_an_encrypted_cluster_that_the_end_of_the_file_cuts_is_read_up_to_there(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography is absent")
    builder = Builder(size=8192, cluster_bits=12, crypt_method=1)
    builder.data(4096, b"\x11" * 4096).entry(0, (1 << 20) | COPIED)
    path = builder.write(tmp_path / "disk.qcow2")
    os.truncate(path, (1 << 20) + 1000)
    image = Img_Info(path, passphrase="secret", unreadable="zeros")
    with open_disk(path, passphrase="secret") as disk:
        assert image.read(0, 8192) == disk.read(0, 512) + bytes(3584) + disk.read(4096, 4096)
    assert image.unreadable == [(512, 3584)]


def _counting(disk: Any) -> list[int]:
    """Have a disk note the places at which it is read."""
    places: list[int] = []
    read = disk.read

    def noting(offset: int, length: int) -> bytes:
        places.append(offset)
        return bytes(read(offset, length))

    disk.read = noting
    return places


# --- life --------------------------------------------------------------------------------------------


@qemu.requires_qemu
def test_the_image_outlives_its_creator(tmp_path: Path) -> None:
    made = make(tmp_path, "ext4")
    path = filesystems.states_of(tmp_path / "disk.qcow2", [(None, made.path)])

    def opened() -> Any:
        return pytsk3.FS_Info(Img_Info(path)).open("/large.bin")

    file = opened()
    gc.collect()
    assert file.read_random(0, 1 << 20) == made.files["large.bin"]


@qemu.requires_qemu
def test_several_threads_may_share_one_image(tmp_path: Path) -> None:
    made = make(tmp_path, "ext4")
    path = tmp_path / "disk.qcow2"
    qemu.img("convert", "-c", "-O", "qcow2", made.path, path)
    image = Img_Info(path)
    system = pytsk3.FS_Info(image)
    raw = made.path.read_bytes()
    results: list[bool] = []

    def work(number: int) -> None:
        for turn in range(10):
            name = ("small.txt", "large.bin", "folder/inside.txt")[(number + turn) % 3]
            results.append(system.open(f"/{name}").read_random(0, 1 << 20) == made.files[name])
            offset = (number * 7919 + turn * 104729) % (len(raw) - 5000)
            results.append(image.read(offset, 5000) == raw[offset : offset + 5000])

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 120
    assert all(results)


@qemu.requires_qemu
def test_findings_are_those_of_the_audit_and_made_on_first_use(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = pytest.importorskip("qcow2_forensics.audit")
    calls = []

    def counted(origin: Any) -> Any:
        calls.append(origin)
        return audit.audit(origin)

    monkeypatch.setattr("qcow2_forensics.audit", counted, raising=False)
    image = Img_Info(two[0])
    assert not calls
    found = image.findings
    assert image.findings is found
    assert len(calls) == 1
    assert {item.code for item in found} == {item.code for item in audit.audit(two[0]).findings}


def test_importing_the_adapter_imports_no_numpy() -> None:
    code = "import sys, pytsk3_qcow2; sys.exit('numpy' in sys.modules)"
    folders = [os.path.dirname(os.path.dirname(module.__file__ or "")) for module in (pytsk3_qcow2, filesystems)]
    source = os.path.dirname(os.path.dirname(sys.modules["qcow2_forensics"].__file__ or ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, source])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


# --- file systems --------------------------------------------------------------------------------------


def contents(system: FileSystem) -> dict[str, bytes]:
    found = {}
    for record in system.records():
        if record.type == "r" and record.allocated and not record.path.startswith("/$"):
            name = f"{record.path}:{record.stream}" if record.stream else record.path
            found[name.removeprefix("/")] = b"".join(system.chunks(record))
    return found


def comparable(lines: list[str]) -> list[str]:
    """Sorted, as versions of The Sleuth Kit differ in order; its 4.11 misreads the unset times of $MFT."""
    return sorted(line for line in lines if "|/$MFT" not in line)


@qemu.requires_qemu
@pytest.mark.parametrize("partitioned", every(2, [False, True]), ids=["whole", "partitioned"])
@pytest.mark.parametrize("kind", KINDS)
def test_listings_and_contents_are_those_of_the_sleuth_kit_on_the_raw_export(
    tmp_path: Path, kind: str, partitioned: bool
) -> None:
    made = make(tmp_path, kind)
    raw, offset = made.path, 0
    if partitioned:
        raw, (offset,) = filesystems.disk_of(tmp_path, [made])
    path = filesystems.states_of(tmp_path / "disk.qcow2", [(None, raw)])
    (system,) = file_systems(Img_Info(path))
    assert (system.volume.kind, system.volume.offset, system.volume.number) == (kind, offset, int(partitioned))
    records = list(system.records(names=True))
    assert not system.problems
    listed = sleuthkit("fls", raw, offset, "-r", "-p").splitlines()
    assert sorted(fls_line(record) for record in records if not record.of_name) == sorted(listed)
    bodies = sleuthkit("fls", raw, offset, "-r", "-m", "/").splitlines()
    assert comparable([body_line(record) for record in records]) == comparable(bodies)
    found = contents(system)
    skipped = {name for name in found if name.startswith("EVIDENCE ")}  # the volume label entry of FAT
    assert {name: found[name] for name in found.keys() - skipped} == made.files
    large = next(record for record in records if record.path == "/large.bin" and not record.of_name)
    icat = qemu.run("icat", "-o", str(offset // 512), raw, large.address).stdout
    assert icat == made.files["large.bin"]


@qemu.requires_qemu
def test_every_partition_is_listed(tmp_path: Path) -> None:
    parts = [make(tmp_path, kind) for kind in ("ext4", "fat12", "ntfs")]
    raw, offsets = filesystems.disk_of(tmp_path, parts)
    path = filesystems.states_of(tmp_path / "disk.qcow2", [(None, raw)])
    systems = file_systems(open_image(path))
    assert [system.volume.kind for system in systems] == ["ext4", "fat12", "ntfs"]
    assert [system.volume.offset for system in systems] == offsets
    assert [system.volume.prefix for system in systems] == ["/p1", "/p2", "/p3"]
    assert systems[1].read("/small.txt") == b"a few bytes\n"


@qemu.requires_qemu
def test_a_disk_without_a_file_system_says_so(tmp_path: Path, make_image: Callable[..., Path]) -> None:
    with pytest.raises(NoFileSystem, match="no file system was found in x"):
        file_systems(Img_Info(make_image("empty.qcow2", SIZE)), "x")
    part = filesystems.Made(tmp_path / "nothing", "ext4")
    part.path.write_bytes(bytes(2 * SIZE))
    raw, _ = filesystems.disk_of(tmp_path, [part])
    path = filesystems.states_of(tmp_path / "disk.qcow2", [(None, raw)])
    with pytest.raises(NoFileSystem, match=r"looked at partition 1 \(Linux \(0x83\)\)"):
        file_systems(Img_Info(path))


@qemu.requires_qemu
def test_each_state_shows_its_own_files(tmp_path: Path) -> None:
    one = make(tmp_path, "ext4")
    two = one.copy("two.raw")
    two.put("new.txt", b"new")
    two.remove("letters.txt")
    three = two.copy("three.raw")
    three.rename("new.txt", "renamed.txt")
    path = filesystems.states_of(
        tmp_path / "disk.qcow2", [("first", one.path), ("second", two.path), (None, three.path)]
    )
    seen = {state.state: contents(file_systems(state)[0]) for state in states(path)}
    assert list(seen) == ["first", "second", "active"]
    assert seen == {"first": one.files, "second": two.files, "active": three.files}


def test_the_states_of_the_case_list_different_files(evidence: EvidenceCase) -> None:
    listings = {}
    for image in states(evidence.image):
        system = pytsk3.FS_Info(image, 2048 * 512)
        names = [entry.info.name.name.decode() for entry in system.open_dir("/home/alice")]
        listings[image.state] = sorted(name for name in names if name not in (".", ".."))
    assert listings == {
        "before-incident": ["diary.txt", "plan.txt", "secret_key.txt"],
        "during-incident": [".cache_helper", "diary.txt", "plan.txt"],
        "active": ["diary.txt", "plan.txt", "readme.txt"],
    }


@qemu.requires_qemu
def test_names_from_evidence_are_escaped_in_lines(tmp_path: Path) -> None:
    made = make(tmp_path, "ext4", populated=False)
    (tmp_path / "content").write_bytes(b"x")
    for name in ("bar|bar", "esc\x1b[31m", "flip\u202etxt.exe"):
        made.debugfs(f'write {tmp_path / "content"} "{name}"')
    path = filesystems.states_of(tmp_path / "disk.qcow2", [(None, made.path)])
    records = [record for record in file_systems(Img_Info(path))[0].records() if record.type == "r"]
    lines = [line for record in records for line in (fls_line(record), body_line(record))]
    assert all(line.isprintable() or "\t" in line for line in lines)
    assert not any(character in line for line in lines for character in "\x1b\u202e")
    assert all(line.count("|") == 10 for line in (body_line(record) for record in records))


def test_modes_read_as_those_of_ls() -> None:
    def shown(mode: int) -> str:
        volume = Volume(0, 0, "", "ext4")
        return mode_text(FileRecord(volume, "/x", 1, "r", True, has_metadata=True, type="r", mode=mode))

    assert shown(0o4755) == "rrwsr-xr-x"
    assert shown(0o2644) == "rrw-r-Sr--"
    assert shown(0o1777) == "rrwxrwxrwt"


def test_spans_count_overlapping_bytes_once() -> None:
    spans = Spans([(100, 50), (120, 50), (300, 10), (5, 0)])
    assert list(spans) == [(100, 70), (300, 10)]
    assert spans.overlap([(0, 1000)]) == 80
    assert spans.overlap([(0, 100), (170, 130), (310, 5)]) == 0
    assert spans.overlap([(149, 2), (305, 100)]) == 7
    assert Spans([]).overlap([(0, 10)]) == 0
