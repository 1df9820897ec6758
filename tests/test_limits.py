"""Every limit holds exactly where it says: the subject's own number is accepted, one less is not.

Nothing is known here about messages: a subject is looked at in every way there is, under smaller and
smaller values of one limit, and what is seen must change right below the number the subject has. The
subjects are made by qemu-img; memory streams are built by hand.
"""

from __future__ import annotations

import ast
import inspect
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

import qcow2_forensics as q
from qcow2_forensics import limits as module
from qcow2_forensics.format.source import BytesSource
from qcow2_forensics.limits import DEFAULT_LIMITS, Limits
from qcow2_forensics.reader.bitmaps import dirty_ranges
from tests import qemu, stream_builder
from tests.image_builder import PASSPHRASE
from tests.stream_builder import PAGE
from tests.tiers import every

FIELDS = list(Limits._fields)
Look = Callable[[Limits], list[str]]


def _attempt(work: Callable[[], object]) -> str:
    try:
        return repr(work())
    except q.Qcow2Error as error:
        return f"{type(error).__name__}: {error}"


def _disk_bytes(path: Path, limits: Limits, snapshot: int | None = None) -> str:
    with q.open_disk(
        path, None if snapshot is None else f"index:{snapshot}", PASSPHRASE.encode(), limits=limits
    ) as disk:
        return str(zlib.crc32(disk.read(0, disk.size)))


def look_at_image(path: Path, limits: Limits) -> list[str]:
    """Return all there is to see of an image."""
    with q.open_image(path, limits=limits) as image:
        seen = [f"{problem.code} {problem.field}" for problem in image.problems]
        seen += [repr(image.snapshots), repr(image.backing_name), repr(image.extensions)]
        for bitmap in image.bitmaps:
            seen += [bitmap.name, _attempt(lambda b=bitmap: list(dirty_ranges(image, b)))]  # type: ignore[misc]
        count = len(image.snapshots)
    seen.append(_attempt(lambda: _disk_bytes(path, limits)))
    seen += [_attempt(lambda n=number: _disk_bytes(path, limits, n)) for number in range(count)]  # type: ignore[misc]
    return seen


def look_at_stream(data: bytes, limits: Limits) -> list[str]:
    """Return all there is to see of a memory stream."""

    def use() -> object:
        with q.open_guest_memory(BytesSource(data), limits=limits) as memory:
            return memory.machine, memory.regions, memory.layout, memory.devices, memory.cpus, memory.read(0, PAGE)

    return [_attempt(use)]


def smallest_value(name: str, look: Look, most: int) -> int:
    """Return the smallest value of a limit under which the subject looks as it does without one."""
    whole = look(DEFAULT_LIMITS)
    assert look(DEFAULT_LIMITS._replace(**{name: most})) == whole
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if look(DEFAULT_LIMITS._replace(**{name: middle})) == whole:
            high = middle
        else:
            low = middle + 1
    return low


# --- images --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay of an overlay, with two snapshots, two bitmaps and long names."""
    qemu.need()
    folder = tmp_path_factory.mktemp("limits")
    qemu.create(folder / "base.qcow2", "1M", cluster_size="4k")
    qemu.create(folder / "middle.qcow2", "1M", backing="base.qcow2", backing_format="qcow2", cluster_size="4k")
    path = folder / "top.qcow2"
    qemu.create(path, "1M", backing="middle.qcow2", backing_format="qcow2", cluster_size="4k")
    qemu.io(path, "write -P 1 0 64k", "write -P 2 512k 64k")
    for name in ("first", "the second snapshot"):
        qemu.img("snapshot", "-c", name, path)
    for name in ("bitmap", "bitmap-with-the-longer-name"):
        qemu.img("bitmap", "--add", "-g", "512", path, name)
    qemu.io(path, "write -P 3 4k 8k")
    return path


def _expected(path: Path) -> dict[str, int]:
    """What the subject has of everything that is limited."""
    with q.open_image(path) as image:
        table = image.snapshots[-1]
        return {
            "l1_bytes": max(image.header.l1_size, *(entry.l1_size for entry in image.snapshots)) * 8,
            "refcount_table_bytes": image.header.refcount_table_clusters * image.cluster_size,
            "header_extensions": len(image.extensions),
            "snapshots": len(image.snapshots),
            "snapshot_table_bytes": table.offset + table.length - image.snapshots[0].offset,
            "snapshot_extra_bytes": max(len(entry.extra) for entry in image.snapshots),
            "name_bytes": max(len(bitmap.name_bytes) for bitmap in image.bitmaps),
            "bitmaps": len(image.bitmaps),
            "bitmap_directory_bytes": sum(-(-bitmap.length // 8) * 8 for bitmap in image.bitmaps),
            "bitmap_table_entries": max(bitmap.table_size for bitmap in image.bitmaps),
            "bitmap_data_bytes": max(bitmap.table_size for bitmap in image.bitmaps) * image.cluster_size,
            "chain_depth": 3,
        }


IMAGE_LIMITS = [
    "l1_bytes",
    "refcount_table_bytes",
    "header_extensions",
    "snapshots",
    "snapshot_table_bytes",
    "snapshot_extra_bytes",
    "name_bytes",
    "bitmaps",
    "bitmap_directory_bytes",
    "bitmap_table_entries",
    "bitmap_data_bytes",
    "chain_depth",
]
# Rounding that belongs to the format: padding of the last entry.
_SLACK = {"snapshot_table_bytes": 8, "header_extensions": 1}


@qemu.requires_qemu
@pytest.mark.parametrize("name", IMAGE_LIMITS)
def test_an_image_at_a_limit_reads_and_one_above_does_not(name: str, subject: Path) -> None:
    wanted = _expected(subject)[name]
    found = smallest_value(name, lambda limits: look_at_image(subject, limits), max(4 * wanted, 64))
    assert wanted <= found <= wanted + _SLACK.get(name, 0)


@qemu.requires_qemu
@pytest.mark.parametrize("name", IMAGE_LIMITS)
def test_what_a_limit_refuses_is_reported_and_never_shown_as_empty(name: str, subject: Path) -> None:
    tight = DEFAULT_LIMITS._replace(**{name: _expected(subject)[name] - 1})
    with q.open_image(subject, limits=tight) as image:
        said = [problem.message for problem in image.problems]
    known = [item for item in look_at_image(subject, DEFAULT_LIMITS) if "Error" in item]
    said += [item for item in look_at_image(subject, tight) if "Exceeded: " in item or "Error: " in item]
    assert len(said) > len(known)
    assert all(len(item) > 20 for item in said), said


@qemu.requires_qemu
def test_an_audit_under_tight_limits_is_a_report(subject: Path) -> None:
    for name in FIELDS:
        for value in (0, 1):
            report = q.audit(subject, limits=DEFAULT_LIMITS._replace(**{name: value}))
            assert report.to_json()


@qemu.requires_qemu
@pytest.mark.parametrize("value", every(2, [0, 1, 4096, 1 << 20]))
def test_caches_of_any_size_give_the_same_bytes_and_keep_to_it(value: int, tmp_path: Path) -> None:
    path = tmp_path / "compressed.qcow2"
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"".join(bytes([number % 251]) * 4096 for number in range(512)))
    qemu.img("convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", raw, path)
    small = Limits(table_cache_bytes=value, cluster_cache_bytes=value)
    generator = random.Random(1)
    with q.open_disk(path, limits=small) as disk:
        for _ in range(300):
            at = generator.randrange(disk.size - 8192)
            assert disk.read(at, 8192) == raw.read_bytes()[at : at + 8192]
        kept = sum(len(entries) * 8 for entries in disk.mapping.slices.values())
        assert kept <= max(value, 16 * 4096)  # a handful of tables is always kept


@qemu.requires_qemu
def test_luks_iterations_and_payload_hold_on_both_sides(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    path = qemu.create(tmp_path / "luks.qcow2", "1M", secret=PASSPHRASE)
    with q.open_image(path) as image:
        assert image.crypto_header is not None
        offset, payload = image.crypto_header[:2]
        header = image.read(offset, 592)
    slots = [header[208 + 48 * number :][:48] for number in range(8)]
    rounds = int.from_bytes(header[164:168], "big")  # of the digest, which checks what the one active slot gives
    rounds += sum(int.from_bytes(slot[4:8], "big") for slot in slots if slot[:4] == b"\x00\xac\x71\xf3")
    for name, wanted in (("luks_iterations", rounds), ("luks_payload_bytes", payload)):
        assert not _attempt(lambda n=name, w=wanted: _disk_bytes(path, Limits(**{n: w}))).startswith("Lim"), name  # type: ignore[misc]
        with (
            pytest.raises(q.LimitExceeded),
            q.open_disk(path, None, PASSPHRASE.encode(), limits=Limits(**{name: wanted - 1})),
        ):
            pass


# --- memory streams ------------------------------------------------------------------------------

_PAGES = 8192  # 32 MiB: a machine's CMOS records more than 16
_MACHINE = "pc-i440fx-7.2"


def _stream() -> bytes:
    records = [stream_builder.page(0, bytes(range(256)) * 16, "pc.ram")]
    records += [stream_builder.page(number * 2, bytes([number]) * PAGE) for number in range(1, 20)]
    return stream_builder.simple(records, {"pc.ram": _PAGES * PAGE}, machine=_MACHINE)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("stream_name_bytes", len(_MACHINE)), ("guest_memory_bytes", _PAGES * PAGE), ("ram_blocks", 1)],
)
def test_a_stream_at_a_limit_reads_and_one_above_does_not(name: str, wanted: int) -> None:
    data = _stream()
    assert smallest_value(name, lambda limits: look_at_stream(data, limits), 2 * wanted + 64) == wanted
    assert "limit" in look_at_stream(data, DEFAULT_LIMITS._replace(**{name: wanted - 1}))[0]


@pytest.mark.parametrize("name", ["ram_runs", "device_state_bytes", "device_description_bytes"])
def test_a_stream_has_a_threshold_for(name: str) -> None:
    data = _stream()
    found = smallest_value(name, lambda limits: look_at_stream(data, limits), 1 << 16)
    assert 0 < found < 1 << 16


# --- the list itself -----------------------------------------------------------------------------


def test_every_limit_is_tested_here() -> None:
    source = inspect.getsource(inspect.getmodule(test_every_limit_is_tested_here))  # type: ignore[arg-type]
    elsewhere = {"decompressed_stream_bytes", "stream_repeats"}  # test_guest_memory_containers, test_hostile_streams
    elsewhere |= {"work_repeats", "work_spare"}  # test_work_budget
    assert [name for name in FIELDS if name not in source and name not in elsewhere] == []


def test_every_limit_says_its_reason() -> None:
    lines = {
        node.target.id: inspect.getsource(module).splitlines()[node.lineno - 1]
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert sorted(lines) == sorted(FIELDS)
    for name, line in lines.items():
        assert len(line.partition("#")[2].strip()) > 10, name


_SOURCES = Path(module.__file__).parent


def _bound_names(tree: ast.Module) -> set[str]:
    """Return the names and numbers by which a module cuts what it iterates over, and does not compute."""
    calls = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("islice")
    )
    parts = (part for call in calls for part in ast.walk(call.args[-1]))
    return {
        ast.unparse(part)
        for part in parts
        if (isinstance(part, ast.Constant) and part.value not in (1, None))
        or (isinstance(part, ast.Name) and part.id.isupper())
    }


@pytest.mark.slow
def test_what_is_looked_at_of_evidence_is_cut_by_numbers_from_limits() -> None:
    constants = {name for name in vars(module) if name.isupper()} | {"EVIDENCE_LIMIT"}
    found = {
        f"{path.relative_to(_SOURCES)}: {name}"
        for path in _SOURCES.rglob("*.py")
        for name in _bound_names(ast.parse(path.read_text(encoding="utf-8"))) - constants
    }
    assert found == set()


def test_every_number_in_limits_says_its_reason_and_is_used() -> None:
    text = inspect.getsource(module)
    used = "".join(path.read_text(encoding="utf-8") for path in _SOURCES.rglob("*.py") if path.name != "limits.py")
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) not in ("KiB", "MiB", "GiB", "DEFAULT_LIMITS"):
            name = ast.unparse(node.targets[0])
            assert len(text.splitlines()[node.lineno - 1].partition("#")[2].strip()) > 10, name
            assert name in used, name


def test_limits_cannot_be_changed_in_place() -> None:
    with pytest.raises(AttributeError):
        DEFAULT_LIMITS.snapshots = 1  # type: ignore[misc]
