"""Images inside others: in a host's file system (``--archives qcow``), in LVM volumes, in E01."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("plaso")
pytest.importorskip("dfvfs")

from dfvfs.helpers import volume_scanner
from dfvfs.path import factory
from dfvfs.resolver import resolver
from plaso.engine import worker as worker_module

from dfvfs_qcow2 import audit_notes, plaso_archives
from dfvfs_qcow2.volume_scanner import Request
from qcow2_forensics.findings import Severity
from tests import guest_disks, qemu
from tests.filesystems import MIB
from tests.plaso_tools import Variant, log2timeline, psort


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ext4 disk with one file."""
    qemu.need("mke2fs")
    return ext4(tmp_path_factory.mktemp("guest"), "guest.raw", {"inner.txt": b"inner\n"}, 4 * MIB)


def ext4(folder: Path, name: str, files: dict[str, bytes | Path], size: int) -> Path:
    tree = folder / f"{name}-tree"
    for location, content in files.items():
        path = tree / location
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_bytes(content)
    raw = folder / name
    raw.write_bytes(b"")
    os.truncate(raw, size)
    qemu.run("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", str(tree), str(raw))
    return raw


@pytest.fixture
def hypervisor(guest: Path, tmp_path: Path) -> Path:
    """A host's disk with an image with a snapshot, and an overlay over a base beside it."""
    qemu.need()
    web = tmp_path / "web.qcow2"
    qemu.convert(guest, web, fmt="raw", target_format="qcow2")
    qemu.snapshot(web, "before")
    base = tmp_path / "base.qcow2"
    qemu.convert(guest, base, fmt="raw", target_format="qcow2", compressed=True)
    over = tmp_path / "db.qcow2"
    qemu.create(over, guest.stat().st_size, backing="base.qcow2", backing_format="qcow2", cwd=tmp_path)
    files = {"images/web.qcow2": web, "images/base.qcow2": base, "images/db.qcow2": over, "host.txt": b"host\n"}
    return ext4(tmp_path, "host.raw", files, 32 * MIB)


@pytest.mark.slow
@qemu.requires_qemu
def test_images_in_a_hosts_file_system_are_processed_with_their_snapshots(hypervisor: Path, tmp_path: Path) -> None:
    options = ("--archives", "qcow", "--qcow_snapshots", "all", "--parsers", "filestat", "--hashers", "none")
    run = log2timeline(Variant(hypervisor), tmp_path / "out", *options)
    assert run.rc == 0, run.output
    for lines in (run.lines, psort(run.storage, tmp_path / "active.csv", active=True)):
        shown = {line.split(",")[6].split(" ")[0] for line in lines if "inner.txt" in line}
        assert shown == {
            "QCOW2-IMAGE[/images/web.qcow2]:EXT:/inner.txt",
            "QCOW2-IMAGE[/images/web.qcow2]:QCOW2-SNAPSHOT1[before]:EXT:/inner.txt",
            "QCOW2-IMAGE[/images/base.qcow2]:EXT:/inner.txt",
            "QCOW2-IMAGE[/images/db.qcow2]:EXT:/inner.txt",
        }
    assert any("EXT:/host.txt" in line for line in run.lines)
    none = log2timeline(Variant(hypervisor), tmp_path / "none", *options[4:])
    assert none.rc == 0
    assert not [line for line in none.lines if "inner.txt" in line]


# --- an image that holds itself ------------------------------------------------------------------

CLUSTER = 32768


def image_of_itself(path: Path, names: int) -> Path:
    """Write an image whose guest has a FAT file system with ``names`` files that are the bytes of the image.

    The clusters of those files map every cluster of the image; its first one, which no entry can name, has a copy::

        host    0 header  1 refcounts  2 block  3 L1  4 L2  5 file system  6 header again
        guest   0 file system    1 .. 7 the files: host 6, 1, 2, 3, 4, 5, 6
    """
    hosts = [6, 1, 2, 3, 4, 5, 6]
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, 0, 0, 15, 64 * CLUSTER, 0, 1, 3 * CLUSTER, CLUSTER, 1, 0, 0, 0, 0, 0, 4, 104),
    )
    boot = bytearray(512)
    boot[:11] = b"\xeb\x3c\x90MSDOS5.0"
    struct.pack_into("<HBHBHHBHHHII", boot, 11, 512, 64, 1, 1, 62 * 16, 64 * 64, 0xF8, 1, 63, 255, 0, 0)
    boot[38:62] = b"\x29" + bytes(4) + b"NO NAME    FAT12   "
    boot[510:] = b"\x55\xaa"
    chain = [0xFF8, 0xFFF, *range(3, 3 + len(hosts) - 1), 0xFFF, 0]
    table = b"".join(
        (even | odd << 12).to_bytes(3, "little") for even, odd in zip(chain[::2], chain[1::2], strict=False)
    )
    root = b"".join(
        b"COPY%04dQCW " % name + bytes(10) + struct.pack("<HHHI", 0x6000, 0x5A21, 2, len(hosts) * CLUSTER)
        for name in range(names)
    )
    clusters = [
        header,
        struct.pack(">Q", 2 * CLUSTER),
        struct.pack(">7H", *[2] * 7),
        struct.pack(">Q", 4 * CLUSTER | 1 << 63),
        struct.pack(">8Q", 5 * CLUSTER, *(host * CLUSTER for host in hosts)),
        bytes(boot) + table.ljust(512, b"\0") + root,
        header,
    ]
    path.write_bytes(b"".join(cluster.ljust(CLUSTER, b"\0") for cluster in clusters))
    return path


class Mediator:
    """What plaso gives its workers, as far as it is used here."""

    def __init__(self) -> None:
        self.sources: list[Any] = []
        self.warnings: list[str] = []

    # The names below are those of plaso's mediator.

    def ProduceEventSource(self, source: Any) -> None:  # noqa: N802
        self.sources.append(source.path_spec)

    def ProduceWarning(self, message: str, path_spec: Any) -> None:  # noqa: N802, ARG002
        self.warnings.append(message)

    def AppendToParserChain(self, _name: str) -> None:  # noqa: N802
        pass

    def PopFromParserChain(self) -> None:  # noqa: N802
        pass


def copies_in(root: Any) -> list[Any]:
    return [entry for entry in resolver.Resolver.OpenFileEntry(root).sub_file_entries if entry.name.endswith("QCW")]


def processed(worker: Any, mediator: Mediator, source: Any) -> list[int]:
    """Process a file system and what comes of it, level by level; return how many images there were on each."""
    counts, waiting = [], [source]
    while waiting:
        entries = [entry for root in waiting for entry in copies_in(root)]
        counts.append(len(entries))
        assert len(counts) < 10, "there is no end"
        for entry in entries:
            plaso_archives._extract_content(None, worker, mediator, entry, "")
        waiting, mediator.sources = mediator.sources, []
    return counts


def test_an_image_that_holds_itself_is_processed_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = image_of_itself(tmp_path / "disk.qcow2", 2)
    spec = factory.Factory.NewPathSpec("QCOW", parent=factory.Factory.NewPathSpec("OS", location=str(image)))
    root = factory.Factory.NewPathSpec("TSK", location="/", parent=spec)
    assert copies_in(root)[0].GetFileObject().read() == image.read_bytes()
    worker, mediator = SimpleNamespace(_archive_types=["qcow"], _abort=False), Mediator()
    assert processed(worker, mediator, root) == [2, 4, 8]
    assert mediator.warnings.count("not processed: it is inside 3 images; export it to process it") == 8
    monkeypatch.setattr(plaso_archives, "_IMAGES", 3)
    worker, mediator = SimpleNamespace(_archive_types=["qcow"], _abort=False), Mediator()
    assert processed(worker, mediator, root) == [2, 4, 2]
    assert mediator.warnings.count("not processed: more than 3 images inside others") == 3


# --- locked, and audited -------------------------------------------------------------------------


@pytest.fixture
def locked(guest: Path, tmp_path: Path) -> Path:
    """A host's disk with an encrypted image in it, whose guest has LUKS in a partition; both have the same passphrase."""
    qemu.need()
    volume = tmp_path / "volume.luks"
    secret = ("--object", "secret,id=key,data=sesame")
    qemu.img("convert", *secret, "-O", "luks", "-o", "key-secret=key,iter-time=10", guest, volume)
    disk = tmp_path / "disk.raw"
    guest_disks.partitioned(disk, [volume, guest])
    image = qemu.create(tmp_path / "secret.qcow2", disk.stat().st_size, secret="sesame")
    target = f"driver=qcow2,encrypt.key-secret=key,file.filename={image}"
    qemu.img("convert", "-n", *secret, "-f", "raw", "--target-image-opts", disk, target)
    return ext4(tmp_path, "host.raw", {"images/secret.qcow2": image}, 32 * MIB)


def inner_files(host: Path) -> Any:
    """The path specification of the root folder in the LUKS volume of the image in the host."""
    spec = factory.Factory.NewPathSpec("RAW", parent=factory.Factory.NewPathSpec("OS", location=str(host)))
    spec = factory.Factory.NewPathSpec("EXT", location="/images/secret.qcow2", parent=spec)
    spec = factory.Factory.NewPathSpec("QCOW", parent=spec)
    spec = factory.Factory.NewPathSpec("GPT", location="/p1", parent=spec)
    spec = factory.Factory.NewPathSpec("LUKSDE", parent=spec)
    return factory.Factory.NewPathSpec("EXT", location="/", parent=spec)


@pytest.mark.slow
@qemu.requires_qemu
def test_a_locked_volume_hides_no_other(locked: Path) -> None:
    image = inner_files(locked).parent.parent.parent

    def scan() -> tuple[list[str], list[str]]:
        request = Request()
        scanner = worker_module.EventExtractionWorkerVolumeScanner(mediator=plaso_archives._Unattended(request))
        found = plaso_archives._scan(scanner, image, request)
        return [spec.parent.type_indicator for spec in found], request.notices

    assert scan() == ([], ["Nothing in the image is processed: no file system was found, or it is locked."])
    resolver.Resolver.key_chain.SetCredential(image, "password", "sesame")
    found, notices = scan()
    assert found == ["GPT"]
    assert notices == [
        "A volume (LUKSDE) is locked: credentials are not tried inside images, and its files are not processed."
    ]
    resolver.Resolver.key_chain.Empty()


def test_findings_of_inner_images_are_counted_from_their_warnings() -> None:
    def warning(image: str, message: str, parser: str = "qcow2") -> Any:
        return SimpleNamespace(message=message, parser_chain=parser, path_spec=SimpleNamespace(comparable=image))

    counted = audit_notes.severities_of(
        [
            warning("a", "High QCOW2-OVERLAP: two tables"),
            warning("b", "Low QCOW2-LEAK: one"),
            warning("a", "High QCOW2-OVERLAP: two more"),
            warning("a", "High water"),
            warning("a", "the image could not be audited: OSError"),
            warning("a", "High QCOW2-OVERLAP: of somebody else", "sqlite"),
        ]
    )
    found = {spec.comparable: counts for spec, counts in counted}
    assert found == {"a": {Severity.HIGH: 2}, "b": {Severity.LOW: 1}}


@pytest.mark.slow
@qemu.requires_qemu
def test_audits_of_images_in_a_host_end_the_run(guest: Path, tmp_path: Path) -> None:
    leaky = tmp_path / "leaky.qcow2"
    qemu.convert(guest, leaky, fmt="raw", target_format="qcow2")
    with leaky.open("r+b") as stream:  # L1 table without QCOW_OFLAG_COPIED
        stream.seek(40)  # l1_table_offset
        stream.seek(int.from_bytes(stream.read(8), "big"))
        entry = int.from_bytes(stream.read(8), "big")
        stream.seek(-8, os.SEEK_CUR)
        stream.write((entry & ~(1 << 63)).to_bytes(8, "big"))
    host = ext4(tmp_path, "both.raw", {"leaky.qcow2": leaky}, 48 * MIB)
    options = ("--archives", "qcow", "--parsers", "filestat", "--hashers", "none")
    run = log2timeline(Variant(host), tmp_path / "out", *options)
    assert run.rc == 0, run.output
    lines = psort(run.storage, tmp_path / "active.csv", active=True)
    shown = {line.split(",")[6].split(" ")[0] for line in lines if "inner.txt" in line}
    assert shown == {"QCOW2-IMAGE[/leaky.qcow2]:EXT:/inner.txt"}
    (note,) = [line for line in run.output.splitlines() if line.startswith("audit: ") and line.endswith("leaky.qcow2")]
    assert "no findings" not in note
    assert "pinfo --sections warnings lists the findings." in run.output


# --- in volumes ----------------------------------------------------------------------------------


def names(source: Path, wanted: str | None = None) -> dict[str, list[str]]:
    """The names in the root folder of each file system that the scan finds, by the path to it."""
    options = volume_scanner.VolumeScannerOptions()
    options.partitions, options.volumes, options.snapshots = ["all"], ["all"], ["none"]
    if wanted:
        options.qcow_snapshots = wanted
    found = {}
    for spec in volume_scanner.VolumeScanner().GetBasePathSpecs(str(source), options=options):
        kinds, step = [], spec
        while step is not None:
            kinds.append(
                f"{step.type_indicator}{getattr(step, 'location', '') if step.type_indicator == 'LVM' else ''}"
            )
            step = step.parent
        root = resolver.Resolver.OpenFileEntry(spec)
        found[" > ".join(reversed(kinds[:-1]))] = sorted(entry.name for entry in root.sub_file_entries)
    return found


@pytest.mark.parametrize(
    "backing", ["snap_disk-1.qcow2", "/dev/vg0/snap_disk-1.qcow2", "/dev/mapper/vg0-snap_disk--1.qcow2", "json"]
)
@qemu.requires_qemu
def test_an_image_in_a_logical_volume_has_its_backing_image_in_another(
    backing: str, guest: Path, tmp_path: Path
) -> None:
    made = guest_disks.group(tmp_path, [64 * MIB])
    base, over = tmp_path / "snap_disk-1.qcow2", tmp_path / "disk.qcow2"
    qemu.convert(guest, base, fmt="raw", target_format="qcow2")
    qemu.snapshot(base, "in-the-base")
    if backing == "json":
        device = {"driver": "host_device", "filename": "/dev/vg0/snap_disk-1.qcow2"}
        backing = f"json:{json.dumps({'driver': 'qcow2', 'file': device})}"
    qemu.create(over, guest.stat().st_size, backing=base.name, backing_format="qcow2", cwd=tmp_path)
    qemu.img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, over)
    for name, path in (("snap_disk-1.qcow2", base), ("disk.qcow2", over)):
        guest_disks.create_volume(made, name, 16 * MIB)
        made.write(name, path)
    found = names(made.devices[0], "all")
    chain = {path: listed for path, listed in found.items() if "QCOW" in path}
    assert chain == {
        "RAW > LVM/lvm1 > QCOW > EXT": ["inner.txt", "lost+found"],
        "RAW > LVM/lvm1 > QCOW > ENCODED_STREAM > EXT": ["inner.txt", "lost+found"],
        "RAW > LVM/lvm2 > QCOW > EXT": ["inner.txt", "lost+found"],
    }


@qemu.requires_qemu
def test_an_image_in_an_e01_is_found(guest: Path, tmp_path: Path) -> None:
    if shutil.which("ewfacquirestream") is None:
        pytest.skip("ewfacquirestream is absent")
    image = tmp_path / "disk.qcow2"
    qemu.convert(guest, image, fmt="raw", target_format="qcow2")
    qemu.run("ewfacquirestream", "-q", "-t", str(tmp_path / "disk"), stdin=image.read_bytes())
    assert names(tmp_path / "disk.E01") == {"EWF > QCOW > EXT": ["inner.txt", "lost+found"]}


@qemu.requires_qemu
def test_four_bytes_hide_no_file_system(guest: Path, tmp_path: Path) -> None:
    image = tmp_path / "decoy.qcow2"
    raw = tmp_path / "decoy.raw"
    shutil.copyfile(guest, raw)
    with raw.open("r+b") as stream:  # where ext has its boot block
        stream.write(b"QFI\xfb\0\0\0\3")
    qemu.convert(raw, image, fmt="raw", target_format="qcow2")
    assert names(image) == {"QCOW > EXT": ["inner.txt", "lost+found"]}


@qemu.requires_qemu
def test_a_damaged_image_in_a_volume_is_a_warning(
    guest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = guest_disks.group(tmp_path, [64 * MIB])
    for name, content in (("damaged", b"QFI\xfb\0\0\0\3"), ("sound", guest.read_bytes())):
        path = tmp_path / name
        path.write_bytes(content + bytes(-len(content) % 4096))
        guest_disks.create_volume(made, name, 8 * MIB)
        made.write(name, path)
    assert names(made.devices[0])["RAW > LVM/lvm2 > EXT"] == ["inner.txt", "lost+found"]
    assert "the image in /lvm1" in caplog.text.replace(f"{made.devices[0]}:", "")
