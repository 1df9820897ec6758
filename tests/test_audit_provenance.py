"""Findings about the writer of an image: each code fires on its trigger and not on the near miss."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_forensics.audit import audit
from qcow2_forensics.findings import Finding, Severity
from qcow2_forensics.format.image import Image
from tests import qemu
from tests.image_builder import EXT_FEATURE_NAMES, Poke, base_b

pytestmark = qemu.requires_qemu
Recipe = Callable[[Path], object]
ROW = 48
TABLE_AT = 112  # the first extension of a version 3 header without backing file


def found(path: Path, code: str, depth: str = "standard") -> list[Finding]:
    report = audit(path, depth)
    assert not [finding for finding in report if finding.code == "QCOW2-AUDIT-INCOMPLETE"], report.to_json()
    return [finding for finding in report if finding.code == f"QCOW2-{code}"]


def severity(path: Path, code: str, depth: str = "standard") -> Severity | None:
    return max((finding.severity for finding in found(path, code, depth)), default=None)


def poked(edit: Callable[[Poke], object]) -> Recipe:
    return lambda path: edit(Poke(base_b(path)))


def extension(kind: int, data: bytes) -> Recipe:
    return poked(lambda p: p.names([(kind, data)]))


def created(**options: object) -> Recipe:
    return lambda path: qemu.create(path, "8M", **options)


def written(path: Path) -> None:
    qemu.create(path, "4M")
    qemu.io(path, "write -P 7 0 4M")


T = Severity
CASES: list[tuple[str, Recipe, Severity | None]] = [
    ("FEATURE-TABLE-ODD", poked(lambda p: p.write(TABLE_AT + 8 + 2, b"renamed")), T.LOW),
    ("FEATURE-TABLE-ODD", poked(lambda p: p.u8(TABLE_AT + 8 + 1, 60)), T.LOW),
    ("FEATURE-TABLE-ODD", poked(lambda p: p.u32(TABLE_AT + 4, 8 * ROW - 8)), T.LOW),
    ("FEATURE-TABLE-ODD", base_b, None),
    ("UNKNOWN-INCOMPATIBLE", poked(lambda p: p.u64(72, 1 << 40)), T.HIGH),
    ("UNKNOWN-INCOMPATIBLE", created(extended_l2="on", compression_type="zstd"), None),
    ("UNKNOWN-COMPATIBLE", poked(lambda p: p.u8(86, 1)), T.LOW),
    ("UNKNOWN-COMPATIBLE", created(lazy_refcounts="on"), None),
    ("UNKNOWN-EXTENSION", extension(0xDEADBEEF, b"\x01\x02\x03\x04"), T.LOW),
    ("UNKNOWN-EXTENSION", extension(0xDEADBEEF, b"meet me at noon"), T.MEDIUM),
    ("UNKNOWN-EXTENSION", extension(0xDEADBEEF, bytes(range(1, 256)) * 2), T.MEDIUM),
    ("UNKNOWN-EXTENSION", base_b, None),
    ("PREALLOCATED", created(preallocation="metadata"), T.INFO),
    ("PREALLOCATED", created(preallocation="full"), T.INFO),
    ("PREALLOCATED", written, None),
    ("PREALLOCATED", created(), None),
    ("QCOW1-MTIME", lambda path: Poke(qemu.create(path, "1M", fmt="qcow")).u32(20, 1_000_000_000), T.INFO),
    ("QCOW1-MTIME", lambda path: qemu.create(path, "1M", fmt="qcow"), None),
    ("WRITER-PROFILE", base_b, T.INFO),
    ("FEATURES", created(cluster_size="4k", refcount_bits=1), T.INFO),
]


@pytest.mark.parametrize(
    ("code", "recipe", "expected"),
    CASES,
    ids=[f"{code}-{wanted.name if wanted else 'absent'}" for code, _, wanted in CASES],
)
def test_code_fires_on_its_trigger_only(tmp_path: Path, code: str, recipe: Recipe, expected: Severity | None) -> None:
    path = tmp_path / "disk.qcow2"
    recipe(path)
    assert severity(path, code) == expected


NAMES = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (1, 0, b"lazy refcounts"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
    (0, 4, b"extended L2 entries"),
)


def table(rows: int) -> bytes:
    return b"".join(struct.pack(">BB46s", *row) for row in NAMES[:rows])


@pytest.mark.parametrize(
    ("rows", "reading"),
    [(3, "1.7 to 3.x"), (4, "4.0 to 5.0"), (7, "QEMU 5.1"), (8, "QEMU 5.2 or later"), (5, "unknown writer")],
)
def test_writer_is_read_from_the_rows_of_the_feature_table(tmp_path: Path, rows: int, reading: str) -> None:
    path = tmp_path / "disk.qcow2"
    extension(EXT_FEATURE_NAMES, table(rows))(path)
    (finding,) = found(path, "WRITER-PROFILE")
    assert reading in finding.title


def test_writer_of_an_image_made_here_is_read_as_recent_qemu(tmp_path: Path) -> None:
    (finding,) = found(base_b(tmp_path / "b.qcow2"), "WRITER-PROFILE")
    assert finding.title.endswith("QEMU 5.2 or later")
    reported = {item.field: item for item in finding.evidence}
    assert reported["feature_table_rows"].value == 8
    assert reported["feature_table_rows"].offset == TABLE_AT
    assert "QEMU" in str(reported["layout"].value)


def test_flag_in_a_refcount_table_points_to_its_writer(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    Poke(path).set_bits(0x10000, 1 << 63)
    (finding,) = found(path, "WRITER-PROFILE")
    assert any("tcmu-runner" in str(item.value) for item in finding.evidence)


def test_features_show_the_options_the_image_was_made_with(tmp_path: Path) -> None:
    path = qemu.create(
        tmp_path / "d.qcow2", "1M", cluster_size="16k", extended_l2="on", compression_type="zstd", refcount_bits=8
    )
    reported = {item.field for item in found(path, "FEATURES")[0].evidence}
    assert {"compression_type", "incompatible_features", "refcount_order", "cluster_bits"} <= reported
    assert "compression_type" not in {item.field for item in found(base_b(tmp_path / "b"), "FEATURES")[0].evidence}


def test_features_that_are_unknown_are_named_from_the_images_own_table(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    extension(EXT_FEATURE_NAMES, struct.pack(">BB46s", 0, 40, b"holographic"))(path)
    Poke(path).u64(72, 1 << 40)
    values = [item.value for item in found(path, "UNKNOWN-INCOMPATIBLE")[0].evidence]
    assert values == [hex(1 << 40), "holographic"]


def test_version_1_images_are_read_as_qemus(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "d.qcow", "1M", fmt="qcow")
    with Image(path) as image:
        assert image.header.version == 1
    (finding,) = found(path, "WRITER-PROFILE")
    assert "version 1" in finding.title


# --- writers other than QEMU ---------------------------------------------------------------------


def profile(path: Path) -> str:
    (finding,) = found(path, "WRITER-PROFILE")
    return finding.title


def laid_out(version: int, bits: int, header_length: int = 104, **places: int) -> Callable[[Path], object]:
    """An image with its tables at the clusters a writer puts them; only what says where they are."""

    def make(path: Path) -> None:
        size = 1 << bits
        data = bytearray(max(places.values()) * size + size)
        head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", version, 0, 0, bits, 1 << 20, 0, 1, places["l1"] * size,
                           places["reftable"] * size, 1, 0, 0)  # fmt: skip
        if version == 3:
            head += struct.pack(">QQQII", 0, 0, 0, 4, header_length)
        data[: len(head)] = head
        for table, target in (("l1", "l2"), ("reftable", "block")):
            data[places[table] * size :][:8] = b""
            struct.pack_into(
                ">Q", data, places[table] * size, places[target] * size | ((1 << 63) if target == "l2" else 0)
            )
        for cluster in range(max(places.values()) + 1) if "counted" not in places else ():
            struct.pack_into(">H", data, places["block"] * size + 2 * cluster, 1)
        path.write_bytes(data)

    return make


WRITERS = {
    "FreeBSD's mkimg (version 2)": laid_out(2, 16, l1=1, reftable=2, l2=3, block=4),
    "QEMU before 1.1": laid_out(2, 16, l1=1, reftable=2, block=3, l2=4),
    "e2image": laid_out(2, 12, l1=1, reftable=2, l2=4, block=5),
    "crosvm": laid_out(3, 16, l1=1, reftable=2, block=3, l2=4),
    "as Go libraries do": laid_out(3, 16, 112, l1=3, reftable=4, block=5, l2=6, counted=0),
    "unknown writer": laid_out(3, 16, 112, l1=3, reftable=4, block=5, l2=6),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_other_than_todays_qemu_is_read_from_the_layout(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "disk.qcow2"
    WRITERS[writer](path)
    assert writer in profile(path)


def test_what_e2image_makes_is_read_as_its_own_and_healthy(tmp_path: Path) -> None:
    tools = {name: shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin") for name in ("mkfs.ext4", "e2image")}
    if None in tools.values():
        pytest.skip("e2fsprogs is absent")
    for block_size in (1024, 4096):
        raw, path = tmp_path / "raw", tmp_path / f"{block_size}.qcow2"
        raw.write_bytes(b"")
        os.truncate(raw, 16 << 20)
        subprocess.run([str(tools["mkfs.ext4"]), "-q", "-F", "-b", str(block_size), raw], check=True)
        subprocess.run([str(tools["e2image"]), "-Q", raw, path], check=True, capture_output=True)
        assert "e2image" in profile(path)
        assert audit(path, "deep").at_least(Severity.MEDIUM) == ()


def as_mkimg(version: int, disk: bytes) -> bytes:
    """An image of a disk with everything where FreeBSD's mkimg puts it: holes are the clusters of zeros."""
    bits = 12 if version == 1 else 16
    size, per_table = 1 << bits, 1 << bits - 3
    clusters = [disk[at : at + size] for at in range(0, len(disk), size)]
    used = [number for number, data in enumerate(clusters) if any(data)]
    slots = sorted({number // per_table for number in used})
    l1_size = -(-len(clusters) // per_table)
    flag = 1 << 63 if version == 2 else 0
    first_l2 = 2 + (version == 2)
    block = first_l2 + len(slots)
    data_at = block + (version == 2)
    if version == 1:
        head = struct.pack(">4sIQIIQBBHIQ", b"QFI\xfb", 1, 0, 0, 0, len(disk), bits, bits - 3, 0, 0, size)
    else:
        head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, bits, len(disk), 0, l1_size, size, 2 * size, 1, 0, 0)
    l1 = [(first_l2 + slots.index(slot)) * size | flag if slot in slots else 0 for slot in range(l1_size)]
    parts = [head, struct.pack(f">{len(l1)}Q", *l1)]
    parts += [struct.pack(">Q", block * size)] if version == 2 else []
    places = {number: (data_at + at) * size | flag for at, number in enumerate(used)}
    for slot in slots:
        entries = [places.get(slot * per_table + column, 0) for column in range(per_table)]
        parts.append(struct.pack(f">{per_table}Q", *entries))
    parts += [struct.pack(">H", 1) * (data_at + len(used))] if version == 2 else []
    return b"".join(part.ljust(size, b"\0") for part in [*parts, *(clusters[number] for number in used)])


@pytest.mark.parametrize("version", [1, 2])
def test_what_mkimg_makes_is_read_as_its_own_and_healthy(version: int, tmp_path: Path) -> None:
    disk = b"".join(bytes([number % 3]) * 65536 for number in range(80))
    path = tmp_path / "disk"
    path.write_bytes(as_mkimg(version, disk))
    fmt = "qcow" if version == 1 else "qcow2"
    assert qemu.raw_bytes(path, fmt=fmt) == disk
    if version == 2:
        assert qemu.check_json(path).rc == 0
    assert f"FreeBSD's mkimg (version {version})" in profile(path)
    assert audit(path, "deep").at_least(Severity.MEDIUM) == ()


def test_version_1_of_mkimg_is_not_qemus(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "d.qcow", "1M", fmt="qcow")
    Poke(path).u64(40, 0x1000).append(bytes(8192))
    assert "mkimg" in profile(path)
