"""The stream's grammar, the index and the layout, on streams made by hand; and the evidence case.

What real machines send is in ``test_guest_memory_machines``.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import subprocess
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcow2_forensics
from qcow2_forensics.errors import FormatError, LimitExceeded, NotQcow2, Qcow2Error, ReadError, Unsupported
from qcow2_forensics.format.source import BytesSource
from qcow2_forensics.limits import DEFAULT_LIMITS
from qcow2_forensics.memory import Block, GuestMemory, StreamWindow, cursor, open_guest_memory, pages
from qcow2_forensics.memory.dump import Writer, write_lime, write_raw
from qcow2_forensics.memory.layout import place
from qcow2_forensics.memory.system_ram import RamEvidence
from tests.conftest import EvidenceCase
from tests.stream_builder import (
    EOS_FLAG,
    PAGE,
    capabilities,
    cmos,
    configuration,
    devices,
    name,
    page,
    ram,
    section,
    simple,
    sizes,
    srat,
    stream,
    subsection,
    u32,
    u64,
)
from tests.tiers import every
from tests.work import assert_proportional

MiB, GiB = 1 << 20, 1 << 30
BLOCK = "pc.ram"
PAGES = 64  # of the small streams


def content(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE)


def open_bytes(data: bytes, **options: bool) -> GuestMemory:
    return GuestMemory(BytesSource(data), **options)


def whole(extra: bytes = b"", block: str = BLOCK) -> bytes:
    """Records that fill every page: numbered content, with a zero page after each two."""
    records = [page(0, content(0), block)]
    records += [page(n, 0 if n % 3 == 2 else content(n)) for n in range(1, PAGES)]
    return b"".join(records) + extra


def expected_whole() -> bytes:
    return b"".join(bytes(PAGE) if n % 3 == 2 else content(n) for n in range(PAGES))


# --- records ------------------------------------------------------------------------------------


records_strategy = st.lists(
    st.tuples(
        st.sampled_from(("a", "b")),
        st.integers(0, PAGES - 1),
        st.integers(1, PAGES),
        st.one_of(st.just(0), st.integers(0, 255), st.integers(256, 270)),
    ),
    max_size=30,
)


@given(records_strategy, st.sampled_from((300, 5000, 4 * MiB)))
def test_every_page_is_what_its_last_record_holds(records: list[tuple[str, int, int, int]], window: int) -> None:
    """Runs of equal records, fill bytes and repeats in any order, read through windows of any size."""
    model: dict[tuple[str, int], bytes] = {}
    out = []
    last = None
    for block, first, count, kind in records:
        for number in range(first, min(PAGES, first + count)):
            data = content(kind) if kind > 255 else bytes([kind]) * PAGE
            model[block, number] = data
            out.append(page(number, data if kind > 255 else kind, None if last == block else block))
            last = block
    data = simple(out, {"a": PAGES * PAGE, "b": PAGES * PAGE})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cursor, "WINDOW", window)
        patch.setattr(pages, "WINDOW", window)
        memory = open_bytes(data)
    for block in ("a", "b"):
        expected = b"".join(model.get((block, number), bytes(PAGE)) for number in range(PAGES))
        assert memory.read_block(block, 0, PAGES * PAGE, pad=True) == expected
        for number in range(PAGES):
            if (block, number) not in model:
                with pytest.raises(ReadError):
                    memory.read_block(block, number * PAGE + 1, 1)
    assert memory.blocks[0].recorded == PAGE * sum(block == "a" for block, _ in model)
    assert_consistent(memory)


def assert_consistent(memory: GuestMemory) -> None:
    """Mapping, validity and reading say the same of every address, and a cached index all of it again."""
    for view in (memory, GuestMemory.from_bytes(memory.to_bytes(), memory.source)):
        padded = bytearray(view.size)
        covered = 0
        for run in view.mapping(0, view.size):
            data = bytes([run.fill]) * run.length if run.fill is not None else b""
            if run.offset is not None:
                data = view.source.read(run.offset, run.length)
            assert view.is_valid(run.address, run.length)
            padded[run.address : run.address + run.length] = data
            covered += run.length
        assert bytes(padded) == view.read(0, view.size, pad=True)
        places = random.Random(view.size)
        for _ in range(20):
            start = places.randrange(view.size)
            length = places.choice((1, 100, PAGE, 5 * PAGE, 20 * PAGE, 40 * PAGE)) + places.randrange(2) * 17
            assert view.read(start, length, pad=True) == bytes(padded[start : start + length]).ljust(length, b"\0")
        assert covered == sum(length for _, length in view.valid_ranges())
        assert view.missing == sum(region.length for region in view.regions) - covered
        assert [view.blocks, view.regions, view.layout, view.machine] == [
            memory.blocks, memory.regions, memory.layout, memory.machine
        ]  # fmt: skip


def test_index_of_long_runs_is_found_by_numpy_and_is_small() -> None:
    count = 6000
    data = [page(0, content(0), BLOCK)]
    data += [page(n, content(1) if n < 2000 else 0) for n in range(1, count)]
    memory = open_bytes(simple(data, {BLOCK: count * PAGE}))
    assert len(memory.to_bytes()) < 2000
    assert memory.read(0, count * PAGE) == content(0) + content(1) * 1999 + bytes((count - 2000) * PAGE)


def test_data_that_looks_like_records_is_not_taken_for_them() -> None:
    trap = (u64(5 * PAGE | 0x28) * (PAGE // 8))[:PAGE]
    records = [page(0, trap, BLOCK), *(page(n, trap) for n in range(1, 40)), page(40, 7), page(2, 9)]
    memory = open_bytes(simple(records, {BLOCK: 41 * PAGE}))
    assert memory.read(0, 41 * PAGE) == trap * 2 + b"\x09" * PAGE + trap * 37 + b"\x07" * PAGE


def test_target_page_bits_of_the_configuration_are_used() -> None:
    bits = subsection("configuration/target-page-bits", u32(10))
    records = (
        u64(0x08) + name("mach-virt.ram") + b"x" * 1024 + u64(1024 | 0x28) + b"y" * 1024 + u64(2048 | 0x22) + b"\0"
    )
    body = ram(sizes({"mach-virt.ram": 3072}), records)
    memory = open_bytes(stream(configuration("virt-7.2", bits), body, b"\0"))
    assert memory.page_size == 1024
    assert memory.read(GiB, 3072) == b"x" * 1024 + b"y" * 1024 + bytes(1024)


# --- sections -----------------------------------------------------------------------------------


def test_commands_are_passed_over_wherever_they_are() -> None:
    command = b"\x08\x00\x0b\x00\x00"  # what QEMU 10 sends before the end of RAM
    ping = b"\x08\x00\x02\x00\x04abcd"
    start = section(1, 2, sizes({BLOCK: PAGES * PAGE}) + u64(EOS_FLAG), "ram")
    end = section(3, 2, whole() + u64(EOS_FLAG))
    memory = open_bytes(stream(configuration(), ping, start, command, end, b"\0"))
    assert memory.read(0, PAGES * PAGE) == expected_whole()


def test_flush_records_of_multifd_are_passed_over() -> None:
    memory = open_bytes(simple([u64(0x200), whole(u64(0x200))], {BLOCK: PAGES * PAGE}))
    assert memory.read(0, PAGES * PAGE) == expected_whole()


def test_sections_between_those_of_ram_are_passed_over() -> None:
    bitmap = section(1, 7, b"\x01", "dirty-bitmap")
    proxmox = section(1, 8, u64(5) + b"state", "pbs-state")
    disk = section(1, 9, u64(0x01) + name("ide0-hd0") + bytes(MiB) + u64(0x09) + name("x") + u64(0x02), "block")
    unknown = section(1, 10, b"\x7e\0\0\0\0 nobody knows this", "htab")
    early = section(4, 11, b"0123456789", "virtio-mem-early")
    late = section(4, 12, b"0123456789", "virtio-mem-early")  # where QEMU 10 puts it
    start = section(1, 2, sizes({BLOCK: PAGES * PAGE}) + u64(EOS_FLAG), "ram")
    end = section(3, 2, whole() + u64(EOS_FLAG))
    data = stream(
        configuration(), early, bitmap, start, late, proxmox, disk, section(2, 7, b"\x01"), unknown, end, b"\0"
    )
    memory = open_bytes(data)
    assert memory.read(0, PAGES * PAGE) == expected_whole()
    assert sum("passed by its footer" in note for note in memory.layout.notes) == 3


@pytest.mark.parametrize("kind", [1, 4])
def test_a_part_of_ram_that_damage_made_a_beginning_is_refused_and_not_passed_over(kind: int) -> None:
    parts = [page(0, b"\1" * 4096, "pc.ram"), page(0, b"\2" * 4096, "pc.ram")]
    data = stream(configuration(), ram(sizes({"pc.ram": 8192}), *parts), devices([]))
    assert GuestMemory(BytesSource(data)).read_block("pc.ram", 0, 1) == b"\2"
    at = data.index(b"\3" + u32(2))
    damaged = data[:at] + bytes([kind]) + data[at + 1 :]
    with pytest.raises(FormatError, match="section 2 begins twice"):
        GuestMemory(BytesSource(damaged))


def test_a_page_that_damage_made_the_end_of_its_section_is_refused_where_the_footer_is_missing() -> None:
    """What follows reads as sections of any kind: here as a command, then as one more part with a newer page."""
    hidden = b"\x08" + struct.pack(">HH", 0, 4096 - 5)
    parts = [page(0, b"\1" * 4096, "pc.ram") + page(1, hidden.ljust(4096, b"\2")), page(0, b"\3" * 4096, "pc.ram")]
    data = stream(configuration(), ram(sizes({"pc.ram": 8192}), *parts), devices([]))
    assert GuestMemory(BytesSource(data)).read_block("pc.ram", 4096, 1) == b"\x08"
    at = data.index(u64(4096 | 0x28)) + 7
    damaged = data[:at] + bytes([EOS_FLAG]) + data[at + 1 :]
    with pytest.raises(FormatError, match="no footer after section 2"):
        GuestMemory(BytesSource(damaged))


def test_a_section_without_an_end_in_sight_is_named() -> None:
    data = stream(configuration(), section(1, 7, bytes(100), "vfio", footer=False))
    with pytest.raises(Unsupported, match="vfio"):
        open_bytes(data)


def test_a_stream_without_configuration_footers_or_description_is_read() -> None:
    body = ram(sizes({BLOCK: PAGES * PAGE}), whole(), footer=False)
    memory = open_bytes(stream(body, devices([("timer", b"x"), ("mc146818rtc", cmos(16 * MiB, 0))], False, False)))
    assert (memory.machine, memory.architecture, memory.devices) == ("", "x86", ())
    assert memory.read(0, PAGES * PAGE) == expected_whole()


def test_padding_after_the_stream_changes_nothing() -> None:
    data = simple([whole()], {BLOCK: PAGES * PAGE})
    noise = random.Random(1).randbytes(300_000)
    plain, padded = open_bytes(data), open_bytes(data + noise)
    assert padded.read(0, PAGES * PAGE) == plain.read(0, PAGES * PAGE)
    assert padded.devices == plain.devices
    assert [device.name for device in padded.devices] == ["mc146818rtc"]


def test_a_migration_over_rdma_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="RDMA"):
        open_bytes(simple([whole(u64(PAGE | 0x80 | 0x20) + bytes(20))], {BLOCK: PAGES * PAGE}))


def differences(offset: int, data: bytes) -> bytes:
    """One run of XBZRLE: ``data`` in the place ``offset``, both below 128 bytes."""
    return b"\x01" + struct.pack(">H", 2 + len(data)) + bytes([offset, len(data)]) + data


def test_differences_change_the_page_as_it_was_sent_last() -> None:
    page_3 = u64(3 * PAGE | 0x60)
    records = [whole(), page_3 + differences(5, b"one"), page_3 + differences(100, b"two"), page(2, 7, BLOCK)]
    records += [
        u64(2 * PAGE | 0x60) + differences(0, b"\1"),
        u64(4 * PAGE | 0x60) + differences(9, b"x"),
        page(4, content(9)),
    ]
    memory = open_bytes(simple(records, {BLOCK: PAGES * PAGE}))
    expected = bytearray(expected_whole())
    expected[3 * PAGE + 5 : 3 * PAGE + 8] = b"one"
    expected[3 * PAGE + 100 : 3 * PAGE + 103] = b"two"
    expected[2 * PAGE : 3 * PAGE] = b"\1" + b"\7" * (PAGE - 1)
    expected[4 * PAGE : 5 * PAGE] = content(9)
    assert memory.read(0, PAGES * PAGE) == bytes(expected)
    again = GuestMemory.from_bytes(memory.to_bytes(), memory.source)
    assert b"".join(again.read(n * PAGE, PAGE) for n in range(PAGES)) == bytes(expected)


def test_differences_to_a_page_that_the_stream_does_not_hold_are_refused_with_their_place() -> None:
    records = [page(0, 1, BLOCK), u64(3 * PAGE | 0x60) + differences(5, b"one")]
    with pytest.raises(Unsupported, match=r"'pc.ram', offsets 0x3000"):
        open_bytes(simple(records, {BLOCK: PAGES * PAGE}))


def test_compressed_pages_are_decoded_and_damaged_ones_are_errors() -> None:
    packed = zlib.compress(content(50))
    record = u64(5 * PAGE | 0x120) + u32(len(packed)) + packed
    data = simple([whole(), record], {BLOCK: PAGES * PAGE})
    memory = open_bytes(data)
    assert memory.read(5 * PAGE, PAGE) == content(50)
    assert memory.read(0, PAGES * PAGE)[5 * PAGE : 6 * PAGE] == content(50)
    bad = open_bytes(data.replace(packed, packed[:-30] + bytes(30)))
    with pytest.raises(ReadError, match="compressed page"):
        bad.read(5 * PAGE, PAGE)
    packed = zlib.compress(bytes(9000))
    large = open_bytes(simple([whole(), u64(5 * PAGE | 0x120) + u32(len(packed)) + packed], {BLOCK: PAGES * PAGE}))
    with pytest.raises(ReadError, match="compressed page"):
        large.read(5 * PAGE, PAGE)


# --- mapped-ram ---------------------------------------------------------------------------------


def mapped_stream(start: int) -> bytes:
    """A mapped-ram stream of two blocks for a file in which it begins at ``start``."""
    head = stream(configuration("pc-q35-9.0", capabilities("mapped-ram")))
    head += b"\x01" + u32(2) + name("ram") + u32(0) + u32(4)
    blocks = {BLOCK: 70 * PAGE, "vga.vram": 2 * PAGE}
    out = bytearray(head + u64(sum(blocks.values()) | 0x04))
    for block, size in blocks.items():
        out += name(block) + u64(size)
        bitmap = len(out) + 28 + 11
        data = -(-(bitmap + 16) // PAGE) * PAGE
        out += struct.pack(">IQQQ", 1, PAGE, start + bitmap, start + data)
        present = [number for number in range(size // PAGE) if number % 5 in (1, 2)]
        out += bytes(bitmap - len(out))
        out += sum(1 << number for number in present).to_bytes(16, "little")
        out += bytes(data + size - len(out))
        for number in present:
            out[data + number * PAGE : data + (number + 1) * PAGE] = content(number)
    out += u64(EOS_FLAG) + b"\x7e" + u32(2) + section(3, 2, u64(EOS_FLAG))
    return bytes(out) + devices([("mc146818rtc", cmos(16 * MiB, 0))])


@pytest.mark.parametrize("start", [0, 0x20000])
def test_mapped_ram_offsets_count_from_the_start_of_the_file(start: int) -> None:
    data = mapped_stream(start)
    file = BytesSource(random.Random(2).randbytes(start) + data)
    memory = GuestMemory(StreamWindow(file, start, len(data)) if start else file)
    expected = b"".join(content(n) if n % 5 in (1, 2) else bytes(PAGE) for n in range(70))
    assert memory.read(0, 70 * PAGE) == expected
    assert memory.read_block("vga.vram", 0, 2 * PAGE) == bytes(PAGE) + content(1)
    assert memory.read(PAGE + 5, 2 * PAGE) == expected[PAGE + 5 : 3 * PAGE + 5]
    assert [device.name for device in memory.devices] == ["mc146818rtc"]


@pytest.mark.parametrize("place", [(1 << 63) + PAGE, (1 << 64) - 1, 1 << 40])
def test_mapped_ram_outside_of_the_file_is_refused(place: int) -> None:
    data = mapped_stream(0)
    at = data.index(struct.pack(">IQ", 1, PAGE)) + 12
    for field in (at, at + 8):
        with pytest.raises(FormatError):
            open_bytes(data[:field] + u64(place) + data[field + 8 :])


# --- hostile streams ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"QEVM" + u32(2), Unsupported),
        (stream(b"\x07" + u32(0xFFFFFFFF)), LimitExceeded),
        (stream(configuration("pc", capabilities(*["x"] * 300))), FormatError),
        (stream(configuration("pc", subsection("configuration/target-page-bits", u32(63)))), FormatError),
        (stream(configuration("pc", subsection("configuration/new", b""))), Unsupported),
        (simple([], {BLOCK: 1 << 60}), LimitExceeded),
        (stream(ram(u64((1 << 40) | 4) + (name("a") + u64(1 << 62)))), FormatError),
        (stream(ram(u64((1 << 40) | 4) + (name("a") + u64(0)) * 2)), FormatError),
        (stream(ram(sizes({f"block{n}": 0 for n in range(5000)} | {"x": PAGE}))), LimitExceeded),
        (simple([sizes({BLOCK: PAGE})], {BLOCK: PAGE}), FormatError),
        (simple([page(1, 0, BLOCK)], {BLOCK: PAGE}), FormatError),
        (simple([page((1 << 52) - 1, 0, BLOCK)], {BLOCK: PAGE}), FormatError),
        (simple([page(0, 0, "other")], {BLOCK: PAGE}), FormatError),
        (simple([page(0, 0)], {BLOCK: PAGE}), FormatError),
        (simple([u64(0x400 | 0x20)], {BLOCK: PAGE}), FormatError),
        (stream(configuration(), section(2, 99, b"")), FormatError),
        (stream(configuration(), ram(sizes({BLOCK: PAGE}))[:-1] + b"\x55"), FormatError),
        (stream(configuration(), b"\x55"), FormatError),
        (stream(configuration(), b"\0"), FormatError),
        (stream(configuration(), section(1, 2, sizes({BLOCK: PAGE}) + u64(EOS_FLAG), "ram"), b"\0"), FormatError),
    ],
)  # fmt: skip
def test_a_stream_that_contradicts_the_grammar_is_refused(data: bytes, error: type[Qcow2Error]) -> None:
    with pytest.raises(error):
        open_bytes(data)


def test_the_number_of_runs_has_a_limit() -> None:
    records = [page(0, 1, BLOCK), *(page(n, n % 2) for n in range(1, PAGES))]
    limits = DEFAULT_LIMITS._replace(ram_runs=10)
    with pytest.raises(LimitExceeded, match="ram_runs"):
        GuestMemory(BytesSource(simple(records, {BLOCK: PAGES * PAGE})), limits)


def test_a_huge_block_costs_nothing_by_its_size() -> None:
    memory = open_bytes(simple([page(0, 3, BLOCK)], {BLOCK: 1 << 50}))
    assert memory.blocks[0].recorded == PAGE
    assert memory.missing == (1 << 50) - PAGE


@pytest.mark.parametrize("step", every(2, [37, 7]))
def test_a_stream_cut_anywhere_is_refused_or_read_as_far_as_it_goes(step: int) -> None:
    records = [page(0, content(0), BLOCK), *(page(n, content(n) if n % 3 else 0) for n in range(1, 8))]
    data = simple(records, {BLOCK: 8 * PAGE})
    full = open_bytes(data)
    ram_end = data.index(b"mc146818rtc") - 6
    for cut in range(0, len(data), step):
        part = data[:cut]
        if cut < ram_end:
            with pytest.raises(FormatError):
                open_bytes(part)
        try:
            memory = open_bytes(part, allow_truncated=True)
        except FormatError:
            assert cut < 100
            continue
        if not ram_end < cut < ram_end + 30:  # inside the first device's header
            assert memory.complete == (cut > ram_end)
        for address, length in memory.valid_ranges():
            assert memory.read(address, length) == full.read(address, length)


@given(st.data())
def test_damage_anywhere_is_an_error_of_ours_or_no_error(data: st.DataObject) -> None:
    base = bytearray(FUZZ_BASE)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.sampled_from(FUZZ_PLACES))
        base[place] = data.draw(st.integers(0, 255))
    try:
        memory = open_bytes(bytes(base))
    except Qcow2Error:
        return
    for region in memory.regions[:4]:
        memory.read(region.address, min(region.length, MiB), pad=True)
    GuestMemory.from_bytes(memory.to_bytes(), memory.source)


def fuzz_base() -> bytes:
    tables = srat((0, 0, 8 * MiB, 1), (1, 8 * MiB, 8 * MiB, 1), (1, 4 * GiB, GiB, 3)).ljust(PAGE, b"\0")
    blocks = {"n0": 8 * MiB, "n1": 8 * MiB, "/rom@etc/acpi/tables": PAGE, "dimm": MiB}
    records = page(0, tables, "/rom@etc/acpi/tables") + page(0, 0, "n0") + page(0, content(1), "n1") + page(1, 5)
    cpu = bytes(200)
    tail = devices([("timer", b"1234"), ("mc146818rtc", cmos(16 * MiB, 0)), ("cpu", cpu)])
    return stream(configuration(), ram(sizes(blocks), records), tail)


FUZZ_BASE = fuzz_base()
FUZZ_PLACES = [n for n, byte in enumerate(FUZZ_BASE) if byte or n < 300 or n > len(FUZZ_BASE) - 900]


@given(st.data())
def test_a_damaged_cache_is_an_error_and_never_another_memory(data: st.DataObject) -> None:
    memory = open_bytes(FUZZ_BASE)
    packed = bytearray(memory.to_bytes())
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FormatError):
        GuestMemory.from_bytes(bytes(packed), memory.source)
    with pytest.raises(FormatError):
        GuestMemory.from_bytes(memory.to_bytes()[: data.draw(st.integers(0, len(packed) - 1))], memory.source)
    with pytest.raises(FormatError):
        GuestMemory.from_bytes(memory.to_bytes(), BytesSource(FUZZ_BASE + b"x"))


# --- layout -------------------------------------------------------------------------------------


def laid_out(
    blocks: dict[str, int],
    *,
    machine: str = "pc-q35-7.2",
    clock: bytes | None = None,
    tables: bytes = b"",
    extra: dict[str, bytes] | None = None,
) -> GuestMemory:
    """A stream of empty blocks."""
    records = b""
    if tables:
        blocks = blocks | {"/rom@etc/acpi/tables": PAGE}
        records = page(0, tables.ljust(PAGE, b"\0"), "/rom@etc/acpi/tables")
    found = [("mc146818rtc", clock)] if clock else [("timer", b"x")]
    config = configuration(machine, capabilities("x-ignore-shared")) if extra else configuration(machine)
    return open_bytes(stream(config, ram(sizes(blocks, extra), records), devices(found)))


def shape(memory: GuestMemory) -> list[tuple[int, int, str, int]]:
    return [tuple(region) for region in memory.regions]


@pytest.mark.parametrize(
    ("machine", "size", "below"),
    [
        ("pc-i440fx-7.2", 3 * GiB, 3 * GiB),
        ("pc-i440fx-7.2", 4 * GiB, 3 * GiB),
        ("pc-i440fx-8.1+pve0", 5 * GiB, 3 * GiB),
        ("pc-i440fx-noble-v2", 5 * GiB, 3 * GiB),
        ("pc-i440fx-jammy-hpb", 5 * GiB, 3 * GiB),
        ("pc-1.3", 5 * GiB, 0xE0000000),
        ("pc-i440fx-1.7", 5 * GiB, 0xE0000000),
        ("rhel6.6.0", 5 * GiB, 3 * GiB),
        ("pc-q35-7.2", 2 * GiB, 2 * GiB),
        ("pc-q35-7.2", 0xB0000000 - MiB, 0xB0000000 - MiB),
        ("pc-q35-7.2", 5 * GiB, 2 * GiB),
        ("pc-q35-2.12-sle15", 5 * GiB, 2 * GiB),
        ("pc-q35-rhel9.2.0", 5 * GiB, 2 * GiB),
        ("pc-q35-1.7", 5 * GiB, 0xB0000000),
        ("microvm", 4 * GiB, 3 * GiB),
    ],
)
def test_without_a_sound_cmos_the_machine_type_decides(machine: str, size: int, below: int) -> None:
    for clock in (None, cmos(17 * MiB, 0)):
        memory = laid_out({BLOCK: size}, machine=machine, clock=clock)
        expected = [(0, below, BLOCK, 0), (4 * GiB, size - below, BLOCK, below)]
        assert shape(memory) == [entry for entry in expected if entry[1]]
        assert memory.layout.method == "machine"
        assert any("machine types" in note for note in memory.layout.notes)


def test_cmos_decides_when_it_adds_up() -> None:
    memory = laid_out({BLOCK: 3 * GiB}, clock=cmos(GiB, 2 * GiB))
    assert shape(memory) == [(0, GiB, BLOCK, 0), (4 * GiB, 2 * GiB, BLOCK, GiB)]
    assert (memory.layout.method, memory.layout.below_4g, memory.layout.above_4g) == ("cmos", GiB, 2 * GiB)
    assert "not the 0x80000000 of the machine type" in memory.layout.notes[-1]


def test_cmos_counts_more_than_a_tebibyte_modulo_its_three_bytes() -> None:
    size = (1 << 40) + 8 * GiB
    memory = laid_out({BLOCK: size}, clock=cmos(2 * GiB, 6 * GiB))
    assert shape(memory)[1] == (4 * GiB, size - 2 * GiB, BLOCK, 2 * GiB)


def test_cmos_of_a_machine_without_memory_above_16_mib_is_read() -> None:
    clock = bytearray(128)
    clock[0x30:0x32] = (7 * 1024).to_bytes(2, "little")
    memory = laid_out({BLOCK: 8 * MiB}, clock=bytes(clock))
    assert (memory.layout.method, memory.layout.below_4g) == ("cmos", 8 * MiB)


def test_nodes_take_the_blocks_of_their_size_whatever_their_names_and_order() -> None:
    tables = srat((0, 0, 0xA0000, 1), (0, MiB, 2 * GiB - MiB, 1), (1, 2 * GiB, GiB, 1), (1, 4 * GiB, 2 * GiB, 1))
    memory = laid_out({"a": 3 * GiB, "b": 2 * GiB}, clock=cmos(3 * GiB, 2 * GiB), tables=tables)
    assert shape(memory) == [(0, 2 * GiB, "b", 0), (2 * GiB, GiB, "a", 0), (4 * GiB, 2 * GiB, "a", GiB)]
    assert (memory.layout.order, memory.layout.assumptions) == ("srat", ())
    assert memory.layout.unplaced == ("/rom@etc/acpi/tables",)


def test_nodes_of_one_size_keep_the_order_of_the_stream_and_their_ranges_are_in_doubt() -> None:
    blocks = {f"ram-node{n}": 256 * MiB for n in (1, 10, 2, 0)}
    tables = srat(*((n, n * 256 * MiB, 256 * MiB, 1) for n in range(4)))
    memory = laid_out(blocks, clock=cmos(GiB, 0), tables=tables)
    assert [region.block for region in memory.regions] == ["ram-node1", "ram-node10", "ram-node2", "ram-node0"]
    (assumption,) = memory.layout.assumptions
    assert assumption.startswith("blocks of one size are taken to lie in the order they were made (in doubt: 0x0-0xf")
    assert memory.layout.doubts == ((0, GiB),)


def test_blocks_nobody_orders_are_taken_by_name_in_the_order_people_count() -> None:
    memory = laid_out({f"ram-node{n}": 256 * MiB for n in (1, 10, 2, 0)}, clock=cmos(GiB, 0))
    assert [region.block for region in memory.regions] == ["ram-node0", "ram-node1", "ram-node2", "ram-node10"]
    assert (memory.layout.order, len(memory.layout.assumptions)) == ("names", 1)


def test_more_memory_than_an_amd_guest_has_below_its_hole_is_an_assumption() -> None:
    memory = laid_out({BLOCK: 1 << 40}, clock=cmos(2 * GiB, (1 << 40) - 2 * GiB))
    assert memory.regions[1].address == 4 * GiB
    assert "AMD" in memory.layout.assumptions[0]


def test_memory_above_4_gib_lies_where_the_srat_has_it() -> None:
    tables = srat((0, 0, 2 * GiB, 1), (0, 1 << 40, 3 * GiB, 1))
    memory = laid_out({"x": 5 * GiB}, clock=cmos(2 * GiB, 3 * GiB), tables=tables)
    assert shape(memory)[1] == (1 << 40, 3 * GiB, "x", 2 * GiB)


def test_modules_lie_in_the_window_and_non_volatile_ones_where_the_srat_has_them() -> None:
    tables = srat((0, 0, GiB, 1), (0, 6 * GiB, 32 * GiB, 3), (0, 20 * GiB, 512 * MiB, 5))
    blocks = {BLOCK: GiB, "dimm1": GiB, "nv": 512 * MiB + 128 * 1024, "dimm2": GiB}
    memory = laid_out(blocks, clock=cmos(GiB, 0), tables=tables)
    assert [(region.address, region.block) for region in memory.regions] == [
        (0, BLOCK), (6 * GiB, "dimm1"), (7 * GiB, "dimm2"), (20 * GiB, "nv")
    ]  # fmt: skip
    assert memory.layout.doubts == ((6 * GiB, 2 * GiB),)
    assert "the SRAT has a non-volatile module here" in memory.layout.reasons


def test_modules_without_a_described_window_are_placed_only_on_machines_that_had_none() -> None:
    old = laid_out({BLOCK: GiB, "dimm": GiB}, machine="pc-i440fx-2.6", clock=cmos(GiB, 0))
    assert [(region.address, region.block) for region in old.regions] == [(0, BLOCK), (4 * GiB, "dimm")]
    assert "taken to start" in old.layout.assumptions[0]
    new = laid_out({BLOCK: GiB, "shm": MiB}, clock=cmos(GiB, 0))
    assert [region.block for region in new.regions] == [BLOCK]
    assert (new.layout.unplaced, new.layout.assumptions) == (("shm",), ())


def test_offsets_in_a_stream_that_has_them_decide_the_order() -> None:
    extra = {"n1": u64(GiB), "n0": u64(0)}
    memory = laid_out({"n1": 2 * GiB, "n0": GiB}, clock=cmos(2 * GiB, GiB), extra=extra)
    assert [region.block for region in memory.regions] == ["n0", "n1", "n1"]
    assert memory.layout.order == "offsets"


def test_firmware_and_video_blocks_are_not_placed_but_can_be_read() -> None:
    blocks = {"0000:00:02.0/vga.vram": 16 * PAGE, "pc.bios": PAGE, "odd.id": PAGE, "/objects/old": PAGE}
    memory = open_bytes(simple([page(0, 7, "pc.bios")], blocks))
    assert {region.block for region in memory.regions} == {"odd.id", "/objects/old"}
    assert memory.read_block("pc.bios", 0, 4) == b"\7\7\7\7"
    with pytest.raises(LookupError, match=r"pc\.bios"):
        memory.read_block("nope", 0, 1)
    with pytest.raises(ReadError):
        memory.read_block("pc.bios", PAGE, 1)


def test_an_unknown_machine_is_not_placed_and_says_so() -> None:
    memory = open_bytes(stream(configuration("s390-ccw-virtio-9.0"), ram(sizes({"s390.ram": PAGE}), b""), b"\0"))
    assert (memory.regions, memory.size, memory.maximum_address) == ((), 0, 0)
    assert "s390-ccw-virtio-9.0" in memory.layout.notes[-1]
    with pytest.raises(ReadError):
        memory.read(0, 1)


def test_addresses_that_are_not_ram_raise_and_are_padded_only_when_asked() -> None:
    memory = laid_out({BLOCK: 3 * GiB}, clock=cmos(GiB, 2 * GiB))
    assert not memory.is_valid(GiB)
    for address in (GiB, 4 * GiB - 1, 6 * GiB):
        with pytest.raises(ReadError, match=r"not RAM \(guest-physical address"):
            memory.read(address, 16)
        assert memory.read(address, 16, pad=True) == bytes(16)
    with pytest.raises(ReadError, match="does not hold"):
        memory.read(0, 1)
    assert memory.read(0, 0) == b""


# --- scanning -----------------------------------------------------------------------------------


def scan_memory() -> GuestMemory:
    random_pages = random.Random(5)
    records, fresh = [], True
    for number in range(1500):
        if 900 <= number < 905:
            continue  # never sent
        data: bytes | int = 0 if random_pages.random() < 0.97 and number > 100 else content(number)
        if 300 < number < 800:
            data = 0
        records.append(page(number, data, BLOCK if fresh else None))
        fresh = False
    return open_bytes(simple(records, {BLOCK: 1500 * PAGE}))


@given(st.integers(1, 3 * MiB), st.integers(0, 9000), st.booleans())
def test_chunks_own_every_byte_once_or_leave_out_only_zeros(size: int, overlap: int, elide: bool) -> None:
    memory = SCANNED
    size = max(size, 4096)
    minimum = 16 * PAGE
    owned = []
    for chunk in memory.chunks(size, overlap, elide=elide, minimum=minimum):
        assert chunk.own <= min(size, chunk.length)
        assert chunk.length <= size + overlap
        assert memory.is_valid(chunk.address, chunk.length)
        owned.append((chunk.address, chunk.address + chunk.own))
    assert owned == sorted(owned)
    position = 0
    for start, end in [*owned, (memory.size, memory.size)]:
        assert start >= position
        if start > position:
            left_out = b"".join(memory.read(a, n) for a, n in memory.valid_ranges(position, start - position))
            assert not any(left_out)
            assert elide or not left_out
        position = end


SCANNED = scan_memory()


def test_a_signature_across_pages_and_beside_zeros_is_found_in_exactly_one_chunk() -> None:
    memory = SCANNED
    overlap = 64
    flat = memory.read(0, memory.size, pad=True)
    edges = [address for start, length in memory.zero_ranges(minimum=PAGE) for address in (start, start + length)]
    for edge in edges[:40]:
        for start in range(max(0, edge - 40), edge):
            if not memory.is_valid(start, 50) or not any(flat[start : start + 50]):
                continue
            owners = [
                chunk
                for chunk in memory.chunks(100_000, overlap, elide=True, minimum=4 * PAGE)
                if chunk.address <= start < chunk.address + chunk.own
            ]
            assert len(owners) == 1
            assert start + 50 <= owners[0].address + owners[0].length


# --- the evidence case, and the package ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("snapshot", ["before-incident", "during-incident"])
def test_memory_of_the_evidence_case_is_what_qemu_wrote_at_that_moment(evidence: EvidenceCase, snapshot: str) -> None:
    truth = evidence.truth["guest_memory"][snapshot]
    with qcow2_forensics.open_guest_memory(evidence.image, snapshot) as memory:
        assert memory.size == truth["size"]
        for item in truth["ranges"]:
            digest = hashlib.sha256(memory.read(item["address"], item["length"])).hexdigest()
            assert digest == item["sha256"]
        assert [cpu.index for cpu in memory.cpus] == [0]
        assert memory.cpus[0].registers["cr0"] & 0x80000001 == 0x80000001
        cached = GuestMemory.from_bytes(memory.to_bytes(), memory.source)
        assert cached.cpus == memory.cpus
        assert_consistent(memory)


def test_a_file_that_is_neither_says_so() -> None:
    with pytest.raises(NotQcow2, match="neither a QCOW2 image nor a QEMU memory stream"):
        open_guest_memory(BytesSource(b"something else" * 100))


def test_numpy_is_not_imported_before_guest_memory_is_asked_for() -> None:
    code = "import qcow2_forensics, sys; print('numpy' in sys.modules); qcow2_forensics.GuestMemory; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout.split() == ["False", "True"]


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_description_cannot_mislead_the_walk() -> None:
    """Sizes that are negative, huge, of the wrong type or nested without end only end the walk."""
    deep: dict[str, object] = {"name": "timer", "fields": []}
    for _ in range(200):
        deep = {"name": "timer", "vmsd_name": "x", "fields": [], "subsections": [deep]}
    for description in (
        [{"name": "timer", "fields": [{"name": "data", "size": -1}]}],
        [{"name": "timer", "fields": [{"name": "data", "size": 1 << 70}]}],
        [{"name": "timer", "fields": [{"name": "data", "size": "4"}]}],
        [{"name": "timer", "fields": [{"size": 4, "array_len": [1]}]}],
        [{"name": "timer", "fields": {"a": 1}}],
        [{"name": "timer", "fields": 7, "subsections": [1]}],
        [{"name": "other", "fields": [{"name": "data", "size": 4}]}],
        [deep],
    ):
        text = json.dumps({"devices": description}).encode()
        tail = section(4, 100, b"1234", "timer") + b"\0\x06" + u32(len(text)) + text
        memory = open_bytes(stream(configuration(), ram(sizes({BLOCK: PAGES * PAGE}), whole()), tail))
        assert memory.devices == ()
        assert memory.read(0, PAGES * PAGE) == expected_whole()


def test_texts_that_look_like_the_description_do_not_hide_it() -> None:
    """A guest writes them into what a device keeps for it, as 128 bytes of CMOS."""
    bait = (b"\x7e\0\0\0\0\0\x06" + u32(13) + b'{"devices":0}') * 30
    plain = stream(
        configuration(), ram(sizes({BLOCK: PAGES * PAGE}), whole()), devices([("timer", bait), ("rtc", b"x")])
    )
    memory = open_bytes(plain)
    assert [device.name for device in memory.devices] == ["timer", "rtc"]
    late = open_bytes(plain + bait * 3)
    assert late.devices == ()
    assert any("the search was given up" in note for note in late.layout.notes)


def test_a_stream_that_claims_more_memory_than_it_holds_is_not_written_as_a_raw_file() -> None:
    memory = laid_out({BLOCK: 1 << 51}, clock=cmos(GiB, 0))
    with pytest.raises(LimitExceeded, match="raw_memory_bytes"):
        write_raw(memory, Writer(io.BytesIO()))
    write_lime(memory, Writer(io.BytesIO()))


def _crowded(count: int, values: int = 8000) -> RamEvidence:
    """Return a machine with twice so many blocks and twice so many memory devices beside its RAM."""
    blocks = {f"p{n}/x": MiB for n in range(count)} | {f"b{n}": MiB for n in range(count)} | {BLOCK: GiB}
    bodies = [(f"p{n % count}/virtio-mem", u64(5) * values) for n in range(2 * count)]
    return RamEvidence(
        "pc-i440fx-2.6", [Block(name, size) for name, size in blocks.items()], None, lambda *_: b"", (), bodies
    )


@pytest.mark.slow
def test_thousands_of_blocks_and_devices_cost_little() -> None:
    facts = {count: _crowded(count, 100) for count in (256, 2048)}
    assert_proportional(lambda count: place(facts[count]), 256, 2048)


def test_of_thousands_of_modules_as_many_are_placed_as_a_machine_can_have() -> None:
    _, layout, regions = place(_crowded(2000))
    assert any("no machine has more than 256 modules" in text for text in layout.assumptions)
    assert len(regions) <= 258


def test_fields_of_a_processor_without_names_or_with_absurd_counts_are_passed_over() -> None:
    keys = [{"name": f"cpreg_vmstate_{what}", "size": 0, "array_len": 1 << 39} for what in ("indexes", "values")]
    wide = {"name": "env.pc", "size": 3000}
    fields = [{"size": 4}, {"name": "env.xregs", "size": 8, "array_len": 40}, *keys, wide]
    text = json.dumps({"devices": [{"name": "cpu", "fields": fields}]}).encode()
    tail = section(4, 100, b"\xff" * (4 + 320 + 3000), "cpu") + b"\0\x06" + u32(len(text)) + text
    memory = open_bytes(stream(configuration("virt-7.2"), ram(sizes({BLOCK: PAGES * PAGE}), whole()), tail))
    (cpu,) = memory.cpus
    assert cpu.registers["x30"] == cpu.registers["pc"] == (1 << 64) - 1
    assert GuestMemory.from_bytes(memory.to_bytes(), memory.source).cpus == memory.cpus
