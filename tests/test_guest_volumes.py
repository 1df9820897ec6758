"""Files in volumes of every kind: what ``diff`` and ``timeline`` list is what the kernel shows, and the rest is named."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics import FileSource, open_disk
from qcow2_forensics.cli import main
from qcow2_forensics.files.protocol import FileSystem
from qcow2_forensics.files.readers import VolumeReader
from qcow2_forensics.files.signatures import signature_of
from qcow2_forensics.files.tolerant import TolerantReader
from qcow2_forensics.files.volumes import GuestVolumes, open_volumes
from qcow2_forensics.format import lvm
from qcow2_forensics.reader.disk import RawDisk
from tests import guest_disks, qemu
from tests.command_line import called
from tests.guest_disks import MIB, Disk, Seen

pytest.importorskip("pytsk3", reason="pytsk3 is absent")

LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


def volumes_of(path: Path, *passphrases: bytes) -> GuestVolumes:
    return open_volumes(RawDisk(FileSource(path)), "the disk", passphrases)


def seen(system: FileSystem) -> dict[str, Seen]:
    """What a back-end lists, in the form of the kernel's view; the sizes of folders are nobody's business."""
    found = {}
    for record in system.records():
        if record.allocated and not record.virtual:
            size = 0 if record.type == "d" else record.size
            digest = system.sha256(record) if record.type == "r" else ""
            times = record.times
            found[record.path] = Seen(
                record.type,
                size,
                record.mode,
                record.uid,
                record.gid,
                times.modified,
                times.changed,
                record.link,
                digest,
            )
    return found


def as_seen(tree: dict[str, Seen]) -> dict[str, Seen]:
    return {path: item._replace(size=0) if item.type == "d" else item for path, item in tree.items()}


def populate(folder: Path) -> None:
    noise = random.Random(1)
    (folder / "etc").mkdir()
    for number in range(120):
        (folder / "etc" / f"file{number}").write_bytes(noise.randbytes(number * 60))
    (folder / "big.bin").write_bytes(noise.randbytes(2 * MIB))
    (folder / "kept.txt").write_text("kept\n")
    (folder / "edited.txt").write_text("before\n" * 1000)
    os.symlink("etc/file1", folder / "link")
    os.mkfifo(folder / "pipe")
    with (folder / "sparse").open("wb") as stream:
        stream.truncate(3 * MIB)
        stream.seek(MIB)
        stream.write(b"x" * 5000)
    os.chmod(folder / "big.bin", 0o4711)  # noqa: S103 - the mark of a file that runs as its owner
    os.chown(folder / "big.bin", 1000, 1001)
    os.utime(folder / "kept.txt", ns=(4_000_000_000_000_000_001, -4_999_999_993))


def attack(folder: Path) -> None:
    (folder / "etc" / "file7").unlink()
    (folder / "edited.txt").write_text("after\n" * 2000)
    (folder / "implant").write_bytes(random.Random(2).randbytes(70_000))
    os.rename(folder / "kept.txt", folder / "moved.txt")
    os.chmod(folder / "pipe", 0o600)


ATTACK = {
    "/etc/file7": "removed",
    "/edited.txt": "content changed",
    "/implant": "added",
    "/moved.txt": "renamed",
    "/pipe": "metadata changed",
}

Diff = Callable[..., dict[str, Any]]


@pytest.fixture
def diff(capsys: pytest.CaptureFixture[str]) -> Diff:
    def run(image: Path, *options: str, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["diff", str(image), "--files", "--format", "json", *options]) == code
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def named(result: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Changes by path, without folders and deleted entries."""
    return {
        item["path"].removeprefix(prefix): item["change"]
        for item in result["files"]
        if (item["after"] or item["before"])["type"] != "d" and item["change"] != "deleted"
    }


# --- XFS ---------------------------------------------------------------------------------------------


@pytest.fixture
def xfs(tmp_path: Path) -> tuple[Disk, Disk]:
    pytest.importorskip("dfvfs", reason="dfVFS is absent")
    one = guest_disks.make(tmp_path, "xfs", 64 * MIB).change(populate)
    return one, one.copy("two.raw").change(attack)


def test_files_of_xfs_are_those_the_kernel_shows(xfs: tuple[Disk, Disk]) -> None:
    for disk in xfs:
        found = volumes_of(disk.path)
        (system,) = found.systems
        assert (system.volume.kind, system.volume.backend) == ("xfs", "dfVFS")
        assert seen(system) == as_seen(disk.tree())
        assert (found.unread, system.problems, system.is_incomplete) == ([], [], False)


@qemu.requires_qemu
def test_changes_on_xfs_are_named_and_placed(tmp_path: Path, xfs: tuple[Disk, Disk], diff: Diff) -> None:
    image = guest_disks.states(tmp_path / "disk.qcow2", [("old", xfs[0].path), (None, xfs[1].path)])
    result = diff(image, "--hash")
    assert named(result) == ATTACK
    by_path = {item["path"]: item for item in result["files"]}
    new, old = xfs[1].tree(), xfs[0].tree()
    assert by_path["/implant"]["after"]["sha256"] == new["/implant"].sha256
    assert by_path["/edited.txt"]["before"]["sha256"] == old["/edited.txt"].sha256
    assert by_path["/implant"]["changed_bytes"] == -(-70_000 // 512) * 512
    assert by_path["/etc/file7"]["recoverable"] == "yes"
    assert result["volumes"] == [
        {"partition": 0, "offset": 0, "path": "", "type": "xfs", "description": "", "backend": "dfVFS", "read": True}
    ]


def test_a_name_that_is_not_utf8_makes_an_xfs_listing_incomplete(tmp_path: Path) -> None:
    pytest.importorskip("dfvfs", reason="dfVFS is absent")
    disk = guest_disks.make(tmp_path, "xfs", 64 * MIB)
    disk.change(lambda folder: (folder / os.fsdecode(b"bad\xff")).touch())
    (system,) = volumes_of(disk.path).systems
    list(system.records())
    assert system.is_incomplete
    assert "invalid 1st UTF-8 character byte" in system.problems[0]


@qemu.requires_qemu
def test_without_dfvfs_xfs_is_named_and_its_changes_are_counted(
    tmp_path: Path, xfs: tuple[Disk, Disk], monkeypatch: pytest.MonkeyPatch, diff: Diff
) -> None:
    image = guest_disks.states(tmp_path / "disk.qcow2", [("old", xfs[0].path), (None, xfs[1].path)])
    from importlib.util import find_spec

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "dfvfs" else find_spec(name))
    result = diff(image, code=2)
    (volume,) = result["volumes"]
    assert (volume["type"], volume["read"]) == ("XFS", False)
    assert "pip install 'qcow2-forensics[dfvfs]'" in volume["why"]
    assert volume["changed_bytes"] == result["summary"]["bytes"] == result["summary"]["bytes_in_unread_volumes"] > 0
    assert result["summary"]["bytes_in_no_file"] == 0


# --- LVM2 --------------------------------------------------------------------------------------------


@pytest.fixture
def lvm_states(tmp_path: Path) -> list[tuple[Path, dict[str, Disk]]]:
    """Two raw disks: ext4 in partition 1, a volume group over partitions 2 and 3, and what is in its volumes."""
    pytest.importorskip("dfvfs", reason="dfVFS is absent")
    made = guest_disks.group(tmp_path, [80 * MIB, 64 * MIB])
    guest_disks.create_volume(made, "root", 32 * MIB, "{0}")
    guest_disks.create_volume(made, "home", 24 * MIB, "{0}")
    made.lvm(["lvextend", "-q", "-L", f"{68 * MIB}b", "vg0/root"])  # behind home, and on to the second one
    assert len(made.extents("root")) == 3
    found = []
    for number, work in enumerate([populate, attack]):
        inside = {}
        for name, kind, size in (("root", "xfs", 68), ("home", "ext4", 24)):
            if number:
                disk = found[0][1][name].copy(f"{name}-two.raw")
            else:
                disk = guest_disks.make(tmp_path, kind, size * MIB, f"{name}.raw")
            inside[name] = disk.change(work)
            made.write(name, disk.path)
        raw = tmp_path / f"disk{number}.raw"
        boot = guest_disks.make(tmp_path, "ext4", 8 * MIB, f"boot{number}.raw") if not number else found[0][1]["boot"]
        inside["boot"] = boot
        guest_disks.partitioned(raw, [boot.path, *made.devices])
        found.append((raw, inside))
    return found


@pytest.mark.slow
def test_logical_volumes_over_several_partitions_are_read(lvm_states: list[tuple[Path, dict[str, Disk]]]) -> None:
    for raw, inside in lvm_states:
        found = volumes_of(raw)
        assert not found.unread
        systems = {system.volume.prefix: system for system in found.systems}
        assert {prefix: (system.volume.kind, system.volume.backend) for prefix, system in systems.items()} == {
            "/p1": ("ext4", "The Sleuth Kit"),
            "/p2/vg0/root": ("xfs", "dfVFS"),
            "/p2/vg0/home": ("ext4", "The Sleuth Kit"),
        }
        assert seen(systems["/p2/vg0/root"]) == as_seen(inside["root"].tree())
        home = {path: item for path, item in seen(systems["/p2/vg0/home"]).items() if path != "/$OrphanFiles"}
        expected = as_seen(inside["home"].tree())
        assert {path: item._replace(modified=0) for path, item in home.items()} == {
            path: item._replace(modified=0) for path, item in expected.items()
        }


@pytest.mark.slow
def test_content_in_logical_volumes_is_where_the_records_say(lvm_states: list[tuple[Path, dict[str, Disk]]]) -> None:
    raw, _ = lvm_states[0]
    data = raw.read_bytes()
    for system in volumes_of(raw).systems:
        for record in system.records():
            if record.path == "/big.bin":
                stored = b"".join(data[span.offset : span.offset + span.length] for span in record.spans)
                assert stored[: record.size] == b"".join(system.chunks(record))


@qemu.requires_qemu
@pytest.mark.slow
def test_changes_in_logical_volumes_are_named(
    tmp_path: Path, lvm_states: list[tuple[Path, dict[str, Disk]]], diff: Diff
) -> None:
    image = guest_disks.states(tmp_path / "disk.qcow2", [("old", lvm_states[0][0]), (None, lvm_states[1][0])])
    result = diff(image)
    for volume in ("root", "home"):
        prefix = f"/p2/vg0/{volume}"
        changes = {
            path.removeprefix(prefix): change for path, change in named(result).items() if path.startswith(prefix)
        }
        assert changes == ATTACK
    assert not [path for path in named(result) if path.startswith("/p1/")]
    assert result["summary"]["bytes_in_unread_volumes"] == 0


def test_a_missing_physical_volume_and_a_thin_volume_are_named(tmp_path: Path) -> None:
    made = guest_disks.group(tmp_path, [64 * MIB, 64 * MIB])
    guest_disks.create_volume(made, "near", 16 * MIB, "{0}")
    guest_disks.create_volume(made, "far", 80 * MIB)
    (near,) = made.extents("near")
    found = volumes_of(made.devices[0])
    why = {item.volume.inside: (item.volume.kind, item.blank, item.why) for item in found.unread}
    assert why["/vg0/near"][:2] == ("", True)
    assert why["/vg0/far"][:2] == ("LVM2", False)
    assert "is on physical volume" in why["/vg0/far"][2]
    spans = next(item.spans for item in found.unread if item.volume.inside == "/vg0/near")
    assert spans == ((near.offset, near.length),)


def test_striped_volumes_are_read(tmp_path: Path) -> None:
    made = guest_disks.group(tmp_path, [64 * MIB, 64 * MIB])
    made.lvm(["lvcreate", "-y", "-q", "-an", "-Zn", "-Wn", "-i2", "-I64k", "-l8", "-n", "odd", "vg0"])
    readers = [TolerantReader(RawDisk(FileSource(path))) for path in made.devices]
    physical = [lvm.physical_volume(reader) for reader in readers]
    (volume,) = lvm.logical_volumes(item for item in physical if item)
    assert [part.below - volume.parts[0][1].below for _, part in volume.parts[:4]] == [0, 0, 65536, 65536]
    assert volume.parts[0][0] != volume.parts[1][0]
    assert sum(part.length for _, part in volume.parts) == volume.size == 32 * MIB


# The text that LVM 2.03 writes for a thin and a mirrored volume, without the fields that do not matter here.
_TEXT = """
vg0 {
  id = "aaaaaa" seqno = 5 extent_size = 8192
  physical_volumes { pv0 { id = "dddddd" pe_start = 2048 pe_count = 30 } }
  logical_volumes {
    pool { status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
      segment1 { start_extent = 0 extent_count = 4 type = "thin-pool" metadata = "pool_tmeta" pool = "pool_tdata" } }
    thin { status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
      segment1 { start_extent = 0 extent_count = 100 type = "thin" thin_pool = "pool" device_id = 1 } }
    pool_tdata { status = ["READ", "WRITE"] segment_count = 1
      segment1 { start_extent = 0 extent_count = 4 type = "striped" stripe_count = 1 stripes = ["pv0", 1] } }
    pool_tmeta { status = ["READ", "WRITE"] segment_count = 1
      segment1 { start_extent = 0 extent_count = 1 type = "striped" stripe_count = 1 stripes = ["pv0", 0] } }
    mirror { status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
      segment1 { start_extent = 0 extent_count = 2 type = "raid1" device_count = 1 raids = ["m_rmeta_0", "m_rimage_0"] } }
    m_rimage_0 { status = ["READ", "WRITE"] segment_count = 1
      segment1 { start_extent = 0 extent_count = 2 type = "striped" stripe_count = 1 stripes = ["pv0", 9] } }
  }
}
"""


def test_thin_and_mirrored_volumes_are_placed_though_not_read() -> None:
    volumes = {each.name: each for each in lvm.logical_volumes([lvm.PhysicalVolume("dddddd", lvm.parse(_TEXT))])}
    assert {name: each.why for name, each in volumes.items()} == {
        "pool": "it is of LVM type 'thin-pool', which is not read",
        "thin": "it is of LVM type 'thin', which is not read",
        "mirror": "it is of LVM type 'raid1', which is not read",
    }
    extent = 4 * MIB
    places = {name: {(part.below, part.length) for _, part in each.parts} for name, each in volumes.items()}
    assert places["thin"] == places["pool"] == {(MIB, extent), (MIB + extent, 4 * extent)}
    assert places["mirror"] == {(MIB + 9 * extent, 2 * extent)}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data, at: data.__setitem__(slice(at, at + 4), b"XXXX"), "checksum of its metadata text"),
        (lambda data, _: data.__setitem__(slice(4096 + 4, 4096 + 8), b"XXXX"), "has no LVM2 header"),
        (lambda data, _: data.__setitem__(slice(4096 + 32, 4096 + 40), b"\xff" * 8), "claims"),
    ],
)
def test_damaged_lvm_metadata_is_a_named_volume(
    tmp_path: Path, damage: Callable[[bytearray, int], None], sentence: str
) -> None:
    made = guest_disks.group(tmp_path, [32 * MIB])
    guest_disks.create_volume(made, "root", 8 * MIB)
    data = bytearray(made.devices[0].read_bytes())
    damage(data, data.rindex(b"logical_volumes"))
    made.devices[0].write_bytes(data)
    (item,) = volumes_of(made.devices[0]).unread
    assert item.volume.kind == "LVM2"
    assert sentence in item.why


@pytest.mark.parametrize(
    "text", ["a {", "a", "a = ", "a = [1", "a = {", "= 1", "a = b", "} }", '"x" = 1 "', "a {" * 99]
)
def test_hostile_lvm_text_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(lvm.LvmError, match="metadata text"):
        lvm.parse(text)
    assert lvm.parse('a { b = "q\\"q" # c\n l = ["x", 1,] }') == {"a": {"b": 'q"q', "l": ["x", 1]}}


def test_a_volume_of_segments_reads_and_places_like_their_concatenation(tmp_path: Path) -> None:
    data = random.Random(3).randbytes(100_000)
    (tmp_path / "raw").write_bytes(data)
    below = TolerantReader(RawDisk(FileSource(tmp_path / "raw")))
    noise = random.Random(4)
    parts, at, expected = [], 0, b""
    for _ in range(30):
        length, place = noise.randrange(1, 3000), noise.randrange(90_000)
        parts.append((below, lvm.Segment(at, length, place)))
        expected += data[place : place + length]
        at += length
    volume = VolumeReader(noise.sample(parts, len(parts)))
    for _ in range(200):
        offset, length = noise.randrange(at), noise.randrange(8000)
        assert volume.read(offset, length) == expected[offset : offset + length]
        placed = b"".join(data[span.offset : span.offset + span.length] for span in volume.place(offset, length))
        assert placed == expected[offset : offset + length]


def test_a_logical_volume_that_claims_more_than_its_disk_holds_is_not_made_up(tmp_path: Path) -> None:
    import pytsk3

    from qcow2_forensics.files.tsk_image import ReaderImage

    (tmp_path / "raw").write_bytes(b"x" * 8192)
    below = TolerantReader(RawDisk(FileSource(tmp_path / "raw")))
    volume = VolumeReader([(below, lvm.Segment(0, 4096, 4096)), (below, lvm.Segment(4096, 1 << 50, 6144))])
    image = ReaderImage(volume)
    assert image.read(0, 4096) == b"x" * 4096
    with pytest.raises(OSError, match="the disk ends inside the volume"):
        image.read(4096, 4096)
    with pytest.raises((OSError, RuntimeError)):
        pytsk3.FS_Info(image)


# --- encryption --------------------------------------------------------------------------------------


@qemu.requires_qemu
@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True], ids=["ext4", "LVM2"])
def test_luks_volumes_are_read_with_a_passphrase_and_named_without(tmp_path: Path, nested: bool, diff: Diff) -> None:
    pytest.importorskip("dfvfs", reason="dfVFS is absent")
    guest_disks.need_tools("sfdisk")
    raws = []
    inner = guest_disks.make(tmp_path, "ext4", 24 * MIB, "inner.raw")
    made = guest_disks.group(tmp_path, [40 * MIB]) if nested else None
    if made is not None:
        guest_disks.create_volume(made, "root", 24 * MIB)
    for number, work in enumerate([populate, attack]):
        inner.change(work)
        if made is not None:
            made.write("root", inner.path)
        plain = made.devices[0] if made is not None else inner.path
        if not number:
            locked = tmp_path / "locked.raw"
            qemu.img(
                *(
                    "convert",
                    "-O",
                    "luks",
                    "--object",
                    "secret,id=key,data=sesame",
                    "-o",
                    "key-secret=key,iter-time=10",
                ),
                *(plain, locked),
            )
        else:  # the same volume, written to as a guest does
            options = f"driver=luks,key-secret=key,file.filename={locked}"
            command = ["qemu-img", "convert", "-n", "--object", "secret,id=key,data=sesame", "-f", "raw"]
            subprocess.run([*command, "--target-image-opts", plain, options], check=True)
        raw = tmp_path / f"disk{number}.raw"
        guest_disks.partitioned(raw, [locked])
        raws.append(raw)
    image = guest_disks.states(tmp_path / "disk.qcow2", [("old", raws[0]), (None, raws[1])])
    result = diff(image, code=2)
    (volume,) = result["volumes"]
    assert (volume["type"], volume["why"]) == ("LUKS", "it is encrypted and it needs a passphrase")
    assert volume["changed_bytes"] > 0
    assert result["files"] == []
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    wrong.write_text("open\n")
    right.write_text("sesame\n")
    result = diff(image, "--guest-passphrase-file", str(wrong), code=2)
    assert result["volumes"][0]["why"] == "it is encrypted and no given passphrase opens it"
    result = diff(image, "--guest-passphrase-file", str(wrong), "--guest-passphrase-file", str(right), "--hash")
    prefix = "/p1/luks/vg0/root" if nested else "/p1/luks"
    assert named(result, prefix) == ATTACK
    by_path = {item["path"].removeprefix(prefix): item for item in result["files"]}
    assert by_path["/implant"]["after"]["sha256"] == inner.tree()["/implant"].sha256
    assert by_path["/implant"]["changed_bytes"] == -(-70_000 // 512) * 512  # found where it is, though encrypted
    assert result["summary"]["bytes_in_unread_volumes"] == 0


@pytest.mark.slow
@qemu.requires_qemu
def test_luks_is_read_in_a_process_that_has_used_dfvfs_for_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("dfvfs", reason="dfVFS is absent")
    inner = guest_disks.make(tmp_path, "ext4", 8 * MIB, "inner.raw").change(populate)
    locked = tmp_path / "locked.raw"
    qemu.img(
        *("convert", "-O", "luks", "--object", "secret,id=key,data=sesame", "-o", "key-secret=key,iter-time=10"),
        *(inner.path, locked),
    )
    (tmp_path / "key").write_text("sesame\n")
    image = guest_disks.states(tmp_path / "disk.qcow2", [(None, locked)])
    command = [sys.executable, "-m", "qcow2_forensics", "timeline", image, "--guest-passphrase-file", tmp_path / "key"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "/luks/kept.txt|" in done.stdout
    without = called("timeline", image)
    assert without.code == 2
    assert "it is encrypted and it needs a passphrase" in without.err
    assert "kept.txt" not in without.out


# --- what nobody reads -------------------------------------------------------------------------------


def _marked(offset: int, mark: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        data = bytearray(4 * MIB)
        data[offset : offset + len(mark)] = mark
        path.write_bytes(data)

    return make


def _by_tool(*command: str, size: int = 32 * MIB) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        guest_disks.need_tools(command[0])
        path.write_bytes(b"")
        os.truncate(path, size)
        try:
            guest_disks.run(*command, path)
        except AssertionError as error:
            pytest.skip(str(error))

    return make


VOLUMES: dict[str, Callable[[Path], None]] = {
    "btrfs": _by_tool("mkfs.btrfs", "-q", "-f", "-m", "single", size=128 * MIB),
    "swap": _by_tool("mkswap"),
    "LUKS": _by_tool(
        *("cryptsetup", "luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"),
        *("--key-file", "/etc/hostname"),
    ),
    "BitLocker": _marked(3, b"-FVE-FS-"),
    "f2fs": _marked(1024, b"\x10\x20\xf5\xf2"),
    "ReFS": _marked(3, b"ReFS\0"),
    "": _marked(0, b"nobody knows"),
}


@pytest.mark.slow
@qemu.requires_qemu
def test_one_readable_partition_does_not_silence_the_others(tmp_path: Path, diff: Diff) -> None:
    pytest.importorskip("dfvfs", reason="dfVFS is absent")
    parts = []
    for number, maker in enumerate(VOLUMES.values()):
        path = tmp_path / f"part{number}"
        try:
            maker(path)
        except pytest.skip.Exception:
            _marked(0, b"LUKS\xba\xbe\0\2")(path)
        parts.append(path)
    ext4 = guest_disks.make(tmp_path, "ext4", 8 * MIB)
    one, two = tmp_path / "one.raw", tmp_path / "two.raw"
    offsets = guest_disks.partitioned(one, [*parts, ext4.path])
    guest_disks.run("cp", one, two)
    with two.open("r+b") as stream:
        for number, offset in enumerate(offsets[:-1]):
            stream.seek(offset + 2 * MIB)
            stream.write(b"changed!" * (64 << number))
    image = guest_disks.states(tmp_path / "disk.qcow2", [("old", one), (None, two)])
    result = diff(image, code=2)
    volumes = {item["partition"]: item for item in result["volumes"]}
    assert [volumes[number]["type"] for number in range(1, 8)] == list(VOLUMES)
    assert [volumes[number]["changed_bytes"] for number in range(1, 8)] == [512 << number for number in range(7)]
    assert volumes[8]["read"]
    assert volumes[3]["why"] == "it is LUKS2, which dfVFS does not open"
    assert result["summary"]["bytes_in_no_file"] == 0


@qemu.requires_qemu
def test_text_says_what_was_not_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one.raw", tmp_path / "two.raw"
    for path, extra in ((one, b""), (two, b"changed")):
        _marked(0x10040, b"_BHRfS_M")(path)
        with path.open("r+b") as stream:
            stream.seek(MIB)
            stream.write(extra)
    image = guest_disks.states(tmp_path / "disk.qcow2", [("old", one), (None, two)])
    assert main(["diff", str(image), "--files"]) == 2
    streams = capsys.readouterr()
    assert (
        "512 B of it in the whole disk (btrfs): its files are not listed: no installed library reads it" in streams.out
    )
    assert "no files differ where files could be listed" in streams.out
    assert "512 B differ in the whole disk (btrfs), whose files are not listed" in streams.err
    assert main(["timeline", str(image)]) == 2
    assert "the files of the whole disk (btrfs) are not listed" in capsys.readouterr().err


@qemu.requires_qemu
def test_changes_in_swap_are_counted_and_hide_no_files(tmp_path: Path, diff: Diff) -> None:
    swap = tmp_path / "swap"
    VOLUMES["swap"](swap)
    ext4 = guest_disks.make(tmp_path, "ext4", 8 * MIB)
    one, two = tmp_path / "one.raw", tmp_path / "two.raw"
    offsets = guest_disks.partitioned(one, [ext4.path, swap])
    guest_disks.run("cp", one, two)
    with two.open("r+b") as stream:
        stream.seek(offsets[1] + MIB)
        stream.write(b"paged out" * 100)
    result = diff(guest_disks.states(tmp_path / "disk.qcow2", [("old", one), (None, two)]))
    (volume,) = [item for item in result["volumes"] if not item["read"]]
    assert (volume["type"], volume["holds_files"], volume["changed_bytes"]) == ("swap", False, 1024)


@pytest.mark.parametrize(
    "code", ["5256be1b81e839015ebff481668b2d837d08000f84e200", "52e82801740856be3381e84c015ebff481668b2d837d0800"]
)
def test_a_boot_loader_in_its_partition_holds_no_files(code: str) -> None:
    # The first bytes and the messages of diskboot.img in Debian's grub-pc-bin 2.06, and those of an older release.
    head = bytes.fromhex(code).ljust(0x11B, b"\0") + b"loading\0.\0\r\n\0Geom\0Read\0 Error\0\xbb\x01\0"
    found = signature_of(head.ljust(4096, b"\0"))
    assert found is not None
    assert (found.name, found.holds_files) == ("GRUB core image", False)
    assert signature_of(b"an essay about loading GRUB".ljust(4096, b"\0")) is None


@qemu.requires_qemu
def test_a_volume_that_one_state_cannot_read_is_not_compared(tmp_path: Path, diff: Diff) -> None:
    """Otherwise each of its files would be reported as removed."""
    ext4 = guest_disks.make(tmp_path, "ext4", 8 * MIB).change(populate)
    broken = ext4.copy("broken.raw")
    with broken.path.open("r+b") as stream:
        stream.write(b"LUKS\xba\xbe\0\1" + bytes(4088))
    result = diff(guest_disks.states(tmp_path / "disk.qcow2", [("old", ext4.path), (None, broken.path)]), code=2)
    assert result["files"] == []
    assert result["summary"]["bytes_in_unread_volumes"] == result["summary"]["bytes"]


@qemu.requires_qemu
def test_files_on_a_disk_that_was_blank_are_added(tmp_path: Path, diff: Diff) -> None:
    ext4 = guest_disks.make(tmp_path, "ext4", 8 * MIB).change(populate)
    blank = tmp_path / "blank"
    blank.write_bytes(bytes(8 * MIB))
    result = diff(guest_disks.states(tmp_path / "disk.qcow2", [("old", blank), (None, ext4.path)]))
    assert set(named(result).values()) == {"added"}
    assert "/etc/file7" in named(result)


@pytest.mark.parametrize("kind", [kind for kind in VOLUMES if kind])
def test_volumes_are_named_by_the_marks_of_the_real_tools(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "volume"
    VOLUMES[kind](path)
    found = signature_of(path.read_bytes()[: 256 << 10])
    assert found is not None
    assert found.name == kind
    assert found.holds_files == (kind != "swap")


def test_an_unreadable_range_is_not_relied_on(tmp_path: Path, xfs: tuple[Disk, Disk]) -> None:
    path = tmp_path / "cut.qcow2"
    qemu.img("convert", "-O", "qcow2", "-o", "cluster_size=4096", xfs[0].path, path)
    with open_disk(path) as disk:
        (system,) = open_volumes(disk, "x").systems
        (record,) = [record for record in system.records() if record.path == "/big.bin"]
        entry = disk.mapping.entry_offset(record.spans[0].offset + 8192)
    assert entry is not None
    with path.open("r+b") as stream:
        stream.seek(entry)
        stream.write((0x7000_0000_0000).to_bytes(8, "big"))  # far past the end of the file
    with open_disk(path) as disk:
        found = open_volumes(disk, "x")
        (system,) = found.systems
        records = {record.path: record for record in system.records()}
        for _ in range(2):
            with pytest.raises(OSError, match=r"part of the content cannot be read.*past the end of"):
                system.sha256(records["/big.bin"])
        assert system.sha256(records["/edited.txt"]) == xfs[0].tree()["/edited.txt"].sha256


@pytest.mark.parametrize("kept", ["nothing", "what follows the start"])
def test_a_volume_whose_start_cannot_be_read_is_not_called_blank(tmp_path: Path, kept: str) -> None:
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(bytes(2 * MIB) + b"\x5a" * MIB + bytes(MIB))
    qemu.img("convert", "-O", "qcow2", "-o", "cluster_size=65536", "-S", "0", raw, path)
    with open_disk(path) as disk:
        entry = disk.mapping.l1_table_offset if kept == "nothing" else disk.mapping.entry_offset(0)
    assert entry is not None
    with path.open("r+b") as stream:
        stream.seek(entry)
        stream.write((0x7000_0000_0000).to_bytes(8, "big"))  # far past the end of the file
    with open_disk(path) as disk:
        (unread,) = open_volumes(disk, "x").unread
    assert (unread.why, unread.blank) == ("its start cannot be read", False)
