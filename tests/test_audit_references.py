"""Findings about names and hostile images: each code fires on its trigger and not on the near miss."""

from __future__ import annotations

import itertools
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_forensics.audit import audit
from qcow2_forensics.findings import Finding, Severity
from qcow2_forensics.limits import Limits
from qcow2_forensics.reader.resolver import Resolver
from tests import qemu
from tests.image_builder import (
    B_L2,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    Builder,
    Poke,
    base_b,
    base_s,
    compressed_entry,
    deflate,
)
from tests.tiers import quick

pytestmark = qemu.requires_qemu
Recipe = Callable[[Path], object]


def found(path: Path, code: str, depth: str = "triage", **options: object) -> list[Finding]:
    report = audit(path, depth, **options)  # type: ignore[arg-type]
    assert not [finding for finding in report if finding.code == "QCOW2-AUDIT-INCOMPLETE"], report.to_json()
    return [finding for finding in report if finding.code == f"QCOW2-{code}"]


def severity(path: Path, code: str, depth: str = "triage", **options: object) -> Severity | None:
    return max((finding.severity for finding in found(path, code, depth, **options)), default=None)


def backing(name: bytes, kind: bytes | None = b"qcow2", *, stands: bool = False) -> Recipe:
    """Base image B with a backing file name written into it."""

    def make(path: Path) -> None:
        base_b(path)
        Poke(path).names([] if kind is None else [(EXT_BACKING_FORMAT, kind)], name)
        if stands:
            base_b(path.with_name(os.path.basename(name.decode())))

    return make


def data_file(name: bytes | None, *, autoclear: int = 0, content: bytes | None = None) -> Recipe:
    def make(path: Path) -> None:
        base_b(path)
        Poke(path).names([] if name is None else [(EXT_DATA_FILE, name)]).u64(72, 4).u64(88, autoclear)
        if content is not None and name is not None:
            path.with_name(name.decode()).write_bytes(content)

    return make


def guest(head: bytes) -> Recipe:
    def make(path: Path) -> None:
        base_b(path)
        Poke(path).write(0x50000, head)

    return make


def poked(edit: Callable[[Poke], object]) -> Recipe:
    def make(path: Path) -> None:
        base_b(path)
        edit(Poke(path))

    return make


def bomb(path: Path) -> None:
    base_b(path)
    stream = deflate(bytes(65536))
    entry = compressed_entry(0x50000, len(stream), 16)
    Poke(path).write(0x50000, stream).write(B_L2, struct.pack(">Q", entry) * 8192).u64(24, 512 << 20)


def thin_bomb(path: Path) -> None:
    """64 MiB of zeros compressed one after the other, as convert -S 0 packs them."""
    raw = path.with_suffix(".raw")
    with raw.open("wb") as stream:
        stream.truncate(65 << 20)
    options = ("-S", "0", "-c", "-O", "qcow2", "-o", "cluster_size=2M")
    qemu.img("convert", *options, "-f", "raw", raw, path)


def nested_bomb(path: Path) -> None:
    """The same, and one cluster of them begins as a gzip file, as a bomb in a bomb does."""
    raw = path.with_suffix(".raw")
    with raw.open("wb") as stream:
        stream.truncate(65 << 20)
        stream.seek(40 << 20)
        stream.write(b"\x1f\x8b\x08")
    options = ("-S", "0", "-c", "-O", "qcow2", "-o", "cluster_size=64k")
    qemu.img("convert", *options, "-f", "raw", raw, path)


def sharing_bomb(path: Path) -> None:
    """128 MiB in streams that begin a byte apart, in a few sectors."""
    builder = Builder(cluster_bits=21)
    host = builder.put(deflate(bytes(2 << 20)).ljust(4096, b"\0"))
    for index in range(64):
        builder.entry(index << 21, compressed_entry(host + index, 2048, 21))
    builder.write(path)


def compressed(path: Path) -> None:
    raw = path.with_suffix(".raw")
    raw.write_bytes(bytes(range(256)) * 4096)
    qemu.convert(raw, path, fmt="raw", target_format="qcow2", compressed=True)


def zip_end(size: int = 0) -> bytes:
    return b"PK\x05\x06" + bytes(8) + struct.pack("<I", size) + bytes(6)


def mbr() -> bytes:
    entry = b"\x80\0\0\0\x83\0\0\0" + struct.pack("<II", 2048, 4096)
    return entry + bytes(48) + b"\x55\xaa"


def overlay(declared: str, base: str) -> Recipe:
    def make(path: Path) -> None:
        if base == "qcow2":
            base_b(path.with_name("base"))
        else:
            path.with_name("base").write_bytes(bytes(1 << 20))
        qemu.create(path, "1M", backing="base", backing_format=declared, unsafe=True)

    return make


def plain(path: Path) -> None:
    base_b(path)


def changed_base(path: Path) -> None:
    overlay("qcow2", "qcow2")(path)
    os.utime(path.with_name("base"), (path.stat().st_mtime + 60,) * 2)


def chain(length: int) -> Recipe:
    def make(path: Path) -> None:
        names = [*(f"{number}.qcow2" for number in range(length - 1)), path.name]
        qemu.create(path.with_name(names[0]), "1M")
        for base, name in itertools.pairwise(names):
            qemu.create(path.with_name(name), "1M", backing=base, backing_format="qcow2", unsafe=True)

    return make


T = Severity
CASES: list[tuple[str, Recipe, Severity | None]] = [
    ("BACKING-NEWER", changed_base, T.LOW),
    ("BACKING-NEWER", overlay("qcow2", "qcow2"), None),
    ("BACKING-DEEP", chain(17), T.LOW),
    ("BACKING-DEEP", chain(16), None),
    ("REF-ABSOLUTE", backing(b"/srv/images/base.qcow2"), T.MEDIUM),
    ("REF-ABSOLUTE", backing(b"C:\\images\\base.qcow2"), T.MEDIUM),
    ("REF-ABSOLUTE", backing(b"\\\\server\\share\\base.qcow2"), T.MEDIUM),
    ("REF-ABSOLUTE", backing(b"file:/srv/base.qcow2"), T.MEDIUM),
    ("REF-ABSOLUTE", backing(b"/srv/images/base.qcow2", stands=True), T.LOW),
    ("REF-ABSOLUTE", data_file(b"/etc/passwd"), T.MEDIUM),
    ("REF-ABSOLUTE", backing(b"srv/base.qcow2"), None),
    ("REF-TRAVERSAL", backing(b"../../../../etc/hostname", b"raw"), T.HIGH),
    ("REF-TRAVERSAL", backing(b"a/../../b"), T.HIGH),
    ("REF-TRAVERSAL", data_file(b"../../etc/passwd"), T.HIGH),
    ("REF-TRAVERSAL", backing(b"a/../b"), None),
    ("REF-TRAVERSAL", backing(b"..base"), None),
    ("REF-REMOTE", backing(b"nbd://127.0.0.1:1/x", b"raw"), T.HIGH),
    ("REF-REMOTE", backing(b"rbd:pool/image", b"raw"), T.HIGH),
    ("REF-REMOTE", data_file(b"nbd://127.0.0.1:1/x"), T.HIGH),
    ("REF-REMOTE", backing(b"file:base.qcow2"), None),
    ("REF-REMOTE", backing(b"./a:b.qcow2"), None),
    ("REF-REMOTE", backing(b"C:\\base.qcow2"), None),
    ("REF-JSON", backing(b'json:{"driver":"file","filename":"/etc/hostname"}', b"raw"), T.HIGH),
    ("REF-JSON", data_file(b'json:{"driver":"file"}'), T.HIGH),
    ("REF-JSON", backing(b"json.qcow2"), None),
    ("REF-DEVICE", backing(b"/dev/sda", b"raw"), T.HIGH),
    ("REF-DEVICE", backing(b"fat:/etc", b"raw"), T.HIGH),
    ("REF-DEVICE", backing(b"\\\\.\\PhysicalDrive0", b"raw"), T.HIGH),
    ("REF-DEVICE", backing(b"dev/sda", b"raw"), None),
    ("REF-OBFUSCATED", backing(b"base.qcow2\0.png"), T.HIGH),
    ("REF-OBFUSCATED", backing("base\u202egpj.qcow2".encode()), T.HIGH),
    ("REF-OBFUSCATED", backing(b"base.qcow2 "), T.HIGH),
    ("REF-OBFUSCATED", backing(b"base\xff.qcow2"), T.HIGH),
    ("REF-OBFUSCATED", backing(b"base.qcow2\0\0"), None),
    ("REF-OBFUSCATED", backing("bäse 一.qcow2".encode()), None),
    ("REF-SELF", backing(b"disk.qcow2"), T.HIGH),
    ("REF-SELF", backing(b"./disk.qcow2"), T.HIGH),
    ("REF-SELF", data_file(b"disk.qcow2"), T.HIGH),
    ("REF-SELF", backing(b"base.qcow2", stands=True), None),
    ("BACKING-NO-FORMAT", backing(b"base.qcow2", None), T.MEDIUM),
    ("BACKING-NO-FORMAT", backing(b"base.qcow2", b""), T.MEDIUM),
    ("BACKING-NO-FORMAT", backing(b"base.qcow2"), None),
    ("BACKING-NO-FORMAT", plain, None),
    ("BACKING-FORMAT-MISMATCH", overlay("raw", "qcow2"), T.HIGH),
    ("BACKING-FORMAT-MISMATCH", overlay("qcow2", "raw"), T.HIGH),
    ("BACKING-FORMAT-MISMATCH", overlay("raw", "raw"), None),
    ("BACKING-FORMAT-MISMATCH", overlay("qcow2", "qcow2"), None),
    ("REF-STAND-IN", backing(b"/images/base.qcow2", stands=True), T.LOW),
    ("REF-STAND-IN", backing(b"base.qcow2", stands=True), None),
    ("BACKING-MISSING", backing(b"/images/base.qcow2"), T.MEDIUM),
    ("BACKING-MISSING", backing(b"base.qcow2"), T.MEDIUM),
    ("BACKING-MISSING", backing(b"base.qcow2", stands=True), None),
    ("BACKING-WITH-RAW-DATAFILE", poked(lambda p: p.names([], b"base").u64(88, 2)), T.HIGH),
    ("BACKING-WITH-RAW-DATAFILE", poked(lambda p: p.u64(88, 2)), None),
    ("DATAFILE-NAME", data_file(None), T.MEDIUM),
    ("DATAFILE-NAME", data_file(b""), T.MEDIUM),
    ("DATAFILE-NAME", data_file(b"gone.raw"), T.MEDIUM),
    ("DATAFILE-NAME", data_file(b"disk.qcow2"), T.MEDIUM),
    ("DATAFILE-NAME", data_file(b"d.raw", autoclear=2, content=bytes(4096)), T.MEDIUM),
    ("DATAFILE-NAME", data_file(b"d.raw", autoclear=2, content=bytes(1 << 20)), None),
    ("DATAFILE-NAME", data_file(b"d.raw", content=bytes(4096)), None),
    ("SIZE-ABSURD", lambda path: qemu.create(path, "1E", cluster_size="2M"), T.MEDIUM),
    ("SIZE-ABSURD", poked(lambda p: p.u64(24, 2**64 - 1)), T.MEDIUM),
    ("SIZE-ABSURD", lambda path: qemu.create(path, "1T"), T.INFO),
    ("SIZE-ABSURD", lambda path: qemu.create(path, "1G"), None),
    ("TABLE-ABSURD", poked(lambda p: p.u32(36, 4194304)), T.HIGH),
    ("TABLE-ABSURD", poked(lambda p: p.u32(56, 0xFFFFFFFF)), T.HIGH),
    ("TABLE-ABSURD", poked(lambda p: p.u32(60, 65536).u64(64, 0x1000000)), T.HIGH),
    ("TABLE-ABSURD", poked(lambda p: p.u32(36, 4096)), None),
    ("TABLE-ABSURD", lambda path: qemu.create(path, "1T", cluster_size="4k"), None),
    ("AMPLIFICATION", bomb, T.HIGH),
    ("AMPLIFICATION", compressed, None),
    ("AMPLIFICATION", base_s, None),
    ("COMPRESSION-BOMB", thin_bomb, T.LOW),
    ("COMPRESSION-BOMB", nested_bomb, T.MEDIUM),
    ("COMPRESSION-BOMB", sharing_bomb, T.MEDIUM),
    ("COMPRESSION-BOMB", compressed, None),
    ("NESTED-IMAGE", guest(b"QFI\xfb\0\0\0\3"), T.MEDIUM),
    ("NESTED-IMAGE", guest(b"KDMV"), T.MEDIUM),
    ("NESTED-IMAGE", guest(b"LUKS\xba\xbe\0\1"), T.INFO),
    ("NESTED-IMAGE", plain, None),
    ("POLYGLOT", poked(lambda p: p.append(zip_end())), T.HIGH),
    ("POLYGLOT", poked(lambda p: p.append(zip_end() + b"trailing")), None),
    ("POLYGLOT", poked(lambda p: p.write(0x8000, b"\1CD001\1")), T.HIGH),
    ("POLYGLOT", poked(lambda p: p.write(446, mbr())), T.HIGH),
    ("POLYGLOT", poked(lambda p: p.write(510, b"\x55\xaa")), None),
    ("POLYGLOT", guest(b"%PDF-1.4"), None),
    ("GATEKEEPER", plain, T.INFO),
]


@pytest.mark.parametrize(
    ("code", "recipe", "expected"),
    quick(CASES, [case for case in CASES if case[1] not in (thin_bomb, nested_bomb)], unpack=True),
    ids=[f"{code}-{wanted.name if wanted else 'absent'}" for code, _, wanted in CASES],
)
def test_code_fires_on_its_trigger_only(tmp_path: Path, code: str, recipe: Recipe, expected: Severity | None) -> None:
    path = tmp_path / "disk.qcow2"
    recipe(path)
    depth = "standard" if code in ("AMPLIFICATION", "COMPRESSION-BOMB") else "triage"
    assert severity(path, code, depth) == expected


def test_traversal_to_an_image_the_caller_allows_is_only_medium(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    base_b(tmp_path / "base.qcow2")
    path = tmp_path / "case" / "disk.qcow2"
    backing(b"../base.qcow2")(path)
    assert severity(path, "REF-TRAVERSAL") is Severity.HIGH
    assert severity(path, "REF-TRAVERSAL", resolver=Resolver(folders=[tmp_path])) is Severity.MEDIUM


def test_chains_longer_than_is_followed_are_high(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    chain(18)(path)
    assert severity(path, "BACKING-DEEP", limits=Limits(chain_depth=16)) is Severity.HIGH


def test_loop_of_two_ends_and_is_reported(tmp_path: Path) -> None:
    backing(b"b.qcow2")(tmp_path / "a.qcow2")
    backing(b"a.qcow2")(tmp_path / "b.qcow2")
    (finding,) = found(tmp_path / "a.qcow2", "REF-SELF")
    assert finding.evidence[0].file.endswith("a.qcow2")


def test_link_that_leads_outside_is_reported_as_refused(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    base_b(tmp_path / "secret.qcow2")
    (tmp_path / "case" / "base.qcow2").symlink_to(tmp_path / "secret.qcow2")
    path = tmp_path / "case" / "disk.qcow2"
    backing(b"base.qcow2")(path)
    (finding,) = found(path, "BACKING-MISSING")
    assert [item.field for item in finding.evidence] == ["backing_file", "refused"]


def test_a_data_file_that_is_refused_is_not_read(tmp_path: Path) -> None:
    """A file of that name beside the image is too short to be the raw data file that is named elsewhere."""
    path = tmp_path / "disk.qcow2"
    data_file(b"/nowhere/d.raw", autoclear=2)(path)
    Poke(path).l2(0, 1 << 63)  # the first cluster of the data file
    (tmp_path / "d.raw").write_bytes(b"LUKS\xba\xbe\0\1" + bytes(70_000))
    (finding,) = found(path, "DATAFILE-NAME")
    assert "refused" in {item.field for item in finding.evidence}
    assert not found(path, "NESTED-IMAGE")


def test_gatekeepers_refuse_what_they_refuse(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    backing(b"base.qcow2", None)(path)
    verdicts = {item.field.split()[0]: str(item.value) for item in found(path, "GATEKEEPER")[0].evidence}
    assert all(value.startswith("refuses") for value in verdicts.values())
    plain_path = base_b(tmp_path / "plain.qcow2")
    verdicts = {item.field.split()[0]: str(item.value) for item in found(plain_path, "GATEKEEPER")[0].evidence}
    assert set(verdicts.values()) == {"accepts"}
    old = qemu.create(tmp_path / "old.qcow", "1M", fmt="qcow")
    verdicts = {item.field: str(item.value) for item in found(old, "GATEKEEPER")[0].evidence}
    assert verdicts["KubeVirt CDI"] == "refuses: version 1"
    extended = qemu.create(tmp_path / "e.qcow2", "1M", extended_l2="on")
    verdicts = {item.field.split()[0]: str(item.value) for item in found(extended, "GATEKEEPER")[0].evidence}
    assert "above 3" in verdicts["OpenStack"]


def test_json_name_is_taken_apart_in_evidence(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    backing(b'json:{"driver":"raw","file":{"driver":"nbd","host":"10.0.0.1","export":"x"}}', b"raw")(path)
    reported = {item.field: item.value for item in found(path, "REF-JSON")[0].evidence}
    assert reported["file.driver"] == "nbd"
    assert reported["file.host"] == "10.0.0.1"


def test_a_json_name_that_names_two_files_shows_neither_as_the_file(tmp_path: Path) -> None:
    """QEMU refuses the one, and of the other takes the member of the object, wherever it stands."""
    path = tmp_path / "disk.qcow2"
    for inner, outer in (("one", "two"), ("two", "one")):
        twice = f'json:{{"driver":"qcow2","file.filename":"{inner}.qcow2","file.filename":"{outer}.qcow2"}}'
        outcome = qemu.img("info", twice, check=False, cwd=tmp_path)
        assert "duplicate key" in outcome.stderr
        nested = f'json:{{"driver":"qcow2","file.filename":"{outer}.qcow2","file":{{"filename":"{inner}.qcow2"}}}}'
        qemu.create(tmp_path / f"{inner}.qcow2", "1M")
        qemu.create(tmp_path / f"{outer}.qcow2", "2M")
        assert "virtual size: 1 MiB" in qemu.img("info", nested, cwd=tmp_path).text
        for text in (twice, nested):
            backing(text.encode())(path)
            reported = [
                (item.field, item.value) for item in found(path, "REF-JSON")[0].evidence if ", one" in item.field
            ]
            assert sorted(reported) == [("file.filename, one of 2", f"{file}.qcow2") for file in ("one", "two")]


def test_a_json_name_that_says_two_drivers_shows_both_where_one_is_not_the_recorded_format(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    backing(b'json:{"driver":"raw","driver":"qcow2","file.filename":"base"}', b"raw")(path)
    reported = [item.value for item in found(path, "BACKING-FORMAT-MISMATCH")[0].evidence if item.field == "driver"]
    assert reported == ["raw", "qcow2"]


def test_a_json_name_with_more_options_than_are_looked_at_says_so(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    for text in ('{"file.filename":"one",' + '"a":1,' * 70 + '"file.filename":"two"}', '{"x":[' + "{}," * 70 + "1]}"):
        backing(f"json:{text}".encode())(path)
        assert found(path, "REF-JSON")[0].evidence[-1].field.endswith("...")


def test_no_name_in_an_image_opens_a_file_outside_its_folder(tmp_path: Path) -> None:
    opened: list[str] = []
    armed = [True]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if armed[0] and event in ("open", "socket.connect", "subprocess.Popen"):
            opened.append(f"{event} {arguments[0]!r}")

    (tmp_path / "case").mkdir()
    path = tmp_path / "case" / "disk.qcow2"
    audit(base_b(path), "deep")  # imports done
    names = [b"/etc/passwd", b"../secret", b"nbd://127.0.0.1:1/x", b"/dev/zero", b"file:/etc/hostname", b"fat:/etc"]
    (tmp_path / "secret").write_bytes(b"QFI\xfb")
    sys.addaudithook(hook)
    try:
        for name in names:
            backing(name, b"raw")(path)
            opened.clear()
            audit(path, "deep")
            outside = [event for event in opened if str(tmp_path / "case") not in event]
            assert outside == []
    finally:
        armed[0] = False
