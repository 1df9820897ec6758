"""Persistent dirty bitmaps decode to exactly the ranges that were written since they were made."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics.errors import FormatError, LimitExceeded, Qcow2Error
from qcow2_forensics.reader.bitmaps import dirty_ranges
from tests import qemu
from tests.image_builder import EXT_BITMAPS, Builder, Poke
from tests.tiers import quick

pytestmark = qemu.requires_qemu

KiB, MiB = 1 << 10, 1 << 20


def ranges_of(path: Path, name: str = "b") -> list[tuple[int, int]]:
    with q.open_image(path) as image:
        bitmap = next(item for item in image.bitmaps if item.name == name)
        return list(dirty_ranges(image, bitmap))


def marked(writes: list[tuple[int, int]], granularity: int, size: int) -> list[tuple[int, int]]:
    """Return the ranges a bitmap of that granularity marks after the writes: the definition, naively."""
    bits = sorted({bit for at, length in writes for bit in range(at // granularity, -(-(at + length) // granularity))})
    found: list[tuple[int, int]] = []
    for bit in bits:
        start, end = bit * granularity, min(size, (bit + 1) * granularity)
        if found and found[-1][0] + found[-1][1] == start:
            found[-1] = (found[-1][0], end - found[-1][0])
        else:
            found.append((start, end - start))
    return found


@pytest.mark.parametrize(
    ("granularity", "cluster"),
    quick(
        [(granularity, cluster) for granularity in (512, 4096, 65536, 1 << 20) for cluster in (512, 65536)],
        [(512, 65536), (4096, 512), (65536, 65536)],
        unpack=True,
    ),
)
def test_random_writes_are_marked_as_defined(granularity: int, cluster: int, make_image: Callable[..., Path]) -> None:
    size = 5 * MiB + 512
    path = make_image("disk", size, "write -P 1 0 5M", cluster_size=cluster)
    qemu.bitmap(path, "--add", "b", "-g", str(granularity))
    generator = random.Random(granularity)
    writes = []
    for _ in range(30):
        at = generator.randrange(size // 512) * 512
        writes.append((at, min(size - at, generator.choice((512, 4096, 200 * KiB)))))
    qemu.io(path, *(f"write -q -P 2 {at} {length}" for at, length in writes))
    assert ranges_of(path) == marked(writes, granularity, size)


def test_a_bitmap_of_no_writes_marks_nothing(make_image: Callable[..., Path]) -> None:
    path = make_image()
    qemu.bitmap(path, "--add", "b")
    assert ranges_of(path) == []


def test_a_disabled_bitmap_marks_nothing_further(make_image: Callable[..., Path]) -> None:
    path = make_image("disk", "4M")
    qemu.bitmap(path, "--add", "b", "-g", "65536")
    qemu.io(path, "write -P 1 0 64k")
    qemu.bitmap(path, "--disable", "b")
    qemu.io(path, "write -P 1 1M 64k")
    assert ranges_of(path) == [(0, 65536)]


def test_a_whole_written_disk_is_one_range(make_image: Callable[..., Path]) -> None:
    path = make_image("disk", "16M", cluster_size=512)
    qemu.bitmap(path, "--add", "b", "-g", "512")
    qemu.io(path, "write -z 0 16M")
    assert ranges_of(path) == [(0, 16 * MiB)]


def test_directory_entries_are_those_qemu_lists(make_image: Callable[..., Path]) -> None:
    path = make_image("disk", "4M")
    for name, granularity in (("one", 512), ("zwei", 65536), ("третий", 1 << 21), ("gone", 4096)):
        qemu.bitmap(path, "--add", name, "-g", str(granularity))
    qemu.bitmap(path, "--remove", "gone")
    qemu.bitmap(path, "--disable", "zwei")
    shown = qemu.info_json(path)["format-specific"]["data"]["bitmaps"]
    with q.open_image(path) as image:
        assert image.bitmaps_current
        ours = [
            {
                "name": item.name,
                "granularity": item.granularity,
                "flags": [flag for bit, flag in ((1, "in-use"), (2, "auto")) if item.flags & bit],
            }
            for item in image.bitmaps
        ]
        assert ours == shown
        assert not image.problems


def test_a_crash_leaves_the_bitmap_in_use(make_image: Callable[..., Path]) -> None:
    path = make_image("disk", "4M")
    qemu.bitmap(path, "--add", "b")
    qemu.io(path, "write -P 1 0 64k", "abort", check=False)
    with q.open_image(path) as image:
        assert image.bitmaps[0].flags & 1


def test_a_version_of_qemu_without_bitmaps_leaves_them_stale(make_image: Callable[..., Path]) -> None:
    path = make_image("disk", "4M")
    qemu.bitmap(path, "--add", "b")
    Poke(path).u64(88, 0)
    with q.open_image(path) as image:
        assert not image.bitmaps_current
        assert [item.name for item in image.bitmaps] == ["b"]


def test_bitmaps_of_an_encrypted_image_are_not_encrypted(make_image: Callable[..., Path]) -> None:
    path = make_image("disk", "4M", secret="pw", encrypt={"format": "aes"})
    options = ["--object", "secret,id=key0,data=pw", "--image-opts", "--add", "-g", "65536"]
    target = f"driver=qcow2,file.filename={path},encrypt.key-secret=key0"
    qemu.img("bitmap", *options, target, "b")
    qemu.io(path, "write -P 1 1M 100k", secret="pw")
    assert ranges_of(path) == [(MiB, 128 * KiB)]


# --- hostile bitmaps ------------------------------------------------------------------------------


def crafted(path: Path, **fields: int) -> Path:
    """Write an image with one bitmap whose directory entry has the given fields."""
    builder = Builder(autoclear=1)
    bits = builder.put(b"\x05" + bytes(65535))
    table = builder.put(fields.pop("entry", bits).to_bytes(8, "big"))
    values = {"table": table, "size": 1, "flags": 0, "kind": 1, "granularity": 16, "name": 1, "extra": 0} | fields
    entry = struct.pack(
        ">QIIBBHI",
        *(values[key] for key in ("table", "size", "flags", "kind", "granularity", "name", "extra")),
    )
    directory = builder.put((entry + b"b").ljust(32, b"\0"))
    builder.extensions.append((EXT_BITMAPS, struct.pack(">IIQQ", 1, 0, 32, directory)))
    return builder.write(path)


def test_bits_count_from_the_least_significant(tmp_path: Path) -> None:
    path = crafted(tmp_path / "disk")
    assert qemu.io(path, "length", read_only=True).ok
    assert ranges_of(path) == [(0, 65536), (131072, 65536)]


def test_a_table_entry_of_all_ones_marks_everything(tmp_path: Path) -> None:
    path = crafted(tmp_path / "disk", entry=1)
    assert qemu.io(path, "length", read_only=True).ok
    assert ranges_of(path) == [(0, MiB)]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"table": 0x1000000}, FormatError),
        ({"entry": 0x1000000}, FormatError),
        ({"size": 0x8000000}, LimitExceeded),
        ({"size": 0x7FFFFFFF}, LimitExceeded),
        ({"granularity": 8}, FormatError),
        ({"granularity": 64}, FormatError),
        ({"granularity": 255}, FormatError),
    ],
    ids=str,
)
def test_a_broken_bitmap_is_an_error_when_it_is_decoded(
    fields: dict[str, int], error: type[Qcow2Error], tmp_path: Path
) -> None:
    path = crafted(tmp_path / "disk", **fields)
    with pytest.raises(error):
        ranges_of(path)
    with q.open_disk(path) as disk:
        assert disk.read(0, 512) == bytes(512)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": 2},
        {"granularity": 8},
        {"granularity": 32},
        {"extra": 1},
        {"flags": 8},
        {"size": 0x8000001},
        {"size": 0},
        {"table": 0},
        {"name": 0},
        {"name": 2000},
    ],
    ids=str,
)
def test_what_qemu_refuses_is_a_problem_of_the_bitmaps_alone(fields: dict[str, int], tmp_path: Path) -> None:
    path = crafted(tmp_path / "disk", **fields)
    assert not qemu.io(path, "length", read_only=True, check=False).ok
    with q.open_disk(path) as disk:
        assert {problem.code for problem in disk.image.problems} == {"QCOW2-BITMAP-INVALID"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"entry": 1 << 56}, "Could not read bitmap_table table"),
        ({"entry": 1 << 8}, "Could not read bitmap_table table"),
        ({"entry": 2}, "Could not read bitmap_table table"),
        ({"entry": 0x50001}, "Could not read bitmap_table table"),  # a cluster, and all ones instead of it
        ({"entry": 0x20200}, "Could not read bitmap_table table"),
        ({"kind": 2}, "doesn't satisfy the constraints"),
        ({"size": 0}, "doesn't satisfy the constraints"),
        ({"table": 0}, "doesn't satisfy the constraints"),
    ],
    ids=str,
)
def test_what_qemu_refuses_to_load_is_no_bitmap_that_marks_nothing(
    fields: dict[str, int], reason: str, tmp_path: Path
) -> None:
    for flags in (0, 1):
        path = crafted(tmp_path / "disk", flags=flags, **fields)
        if flags and "entry" in fields:  # QEMU does not load what was not saved; its check looks at it
            refused = qemu.img("check", path, check=False)
            reason = "Check failed: Invalid argument"
        else:
            refused = qemu.io(path, "length", read_only=True, check=False)
        assert not refused.ok
        assert reason in refused.stderr
        with pytest.raises(FormatError):
            ranges_of(path)


def test_a_saved_bitmap_for_less_than_the_disk_is_an_error_not_a_rest_that_did_not_change(tmp_path: Path) -> None:
    reach = 256 * MiB  # what a cluster of bits of 512 bytes is for
    for flags, disk_size in ((0, reach + 511), (0, reach + 512), (1, reach + 512)):
        path = crafted(tmp_path / "disk", granularity=9, flags=flags)
        Poke(path).u64(24, disk_size)
        opened = qemu.io(path, "length", read_only=True, check=False)
        with q.open_image(path) as image:
            reported = "QCOW2-BITMAP-INVALID" in {problem.code for problem in image.problems}
        findings = q.audit(path).findings
        assert any(finding.code == "QCOW2-BITMAP-INVALID" for finding in findings) == reported
        assert reported == (not opened.ok) == (flags == 0 and disk_size == reach + 512)
        if opened.ok:
            assert ranges_of(path) == [(0, 512), (1024, 512)]
            continue
        assert "Bitmap 'b' doesn't satisfy the constraints" in opened.stderr
        with pytest.raises(FormatError, match="ends before the disk"):
            ranges_of(path)


def test_a_granularity_beyond_the_disk_is_one_range(tmp_path: Path) -> None:
    assert ranges_of(crafted(tmp_path / "disk", granularity=31)) == [(0, MiB)]
