"""Where RAM lies, on machines unlike the usual ones: no wrong page without a warning that names its range.

QEMU's ``pmemsave`` over every RAM range of ``info mtree -f`` is the oracle. Most machines run a boot sector
that enters long mode with page tables written by the test; they stand for a kernel with a direct map.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcow2_forensics.errors import FormatError
from qcow2_forensics.memory import GuestMemory, open_guest_memory
from tests.machines import GiB, Machine, MiB, Running, paging, running
from tests.test_guest_memory_machines import EVERYTHING, VGA, memory_backend

TIB = 1 << 40
PIECE = 24 * MiB  # compared at each end of a large range; all of everything with QCOW2_WHOLE_MEMORY=1
LOW = ((0, 64 * MiB),)  # a direct map of the first megabytes
Q35 = ("-M", "q35", "-m", "256M,slots=4,maxmem=8G")


def tables(*addresses: int) -> tuple[int, ...]:
    """Addresses of page tables; 16 more follow the last one."""
    return (*addresses[:-1], *(addresses[-1] + 4096 * n for n in range(16)))


def wrong_pages(guest: Running, memory: GuestMemory, blocks: tuple[str, ...] = ()) -> list[int]:
    """Pages of RAM that read otherwise than QEMU has them, those in doubt left out."""
    doubts = memory.layout.doubts
    found = []
    for start, size, name in guest.ram_ranges():
        if name.endswith((".rom", ".bios", "vram", "flash0")) or (blocks and name not in blocks):
            continue
        for address in (
            sorted({start, max(start, start + size - PIECE)}) if not EVERYTHING else range(start, start + size, PIECE)
        ):
            dump = guest.memory_file(address, min(PIECE, start + size - address))
            theirs = dump.read_bytes()
            dump.unlink()
            ours = memory.read(address, len(theirs), pad=True)
            if ours == theirs:
                continue
            found += [
                page
                for page in range(address, address + len(theirs), 4096)
                if ours[page - address : page - address + 4096] != theirs[page - address : page - address + 4096]
                and page not in VGA
                and not any(low <= page < low + length for low, length in doubts)
            ]
    return found


@contextmanager
def saved(machine: Machine, folder: Path, layout: str | None = None) -> Iterator[tuple[Running, GuestMemory]]:
    with running(machine, folder) as guest:
        guest.ask("stop")
        guest.save("one")
        with open_guest_memory(guest.disk, layout=layout) as memory:
            yield guest, memory


def addresses(memory: GuestMemory, block: str) -> list[int]:
    return [region.address for region in memory.regions if region.block == block]


AMD = ("-M", "q35", "-m", "3G", "-cpu", "EPYC,phys-bits=43", "-global", "q35-pcihost.pci-hole64-size=1T")


def test_ram_of_an_amd_guest_that_qemu_moved_to_1_tib_is_found_there(tmp_path: Path) -> None:
    machine = paging("amd", AMD, tables(TIB + 5 * MiB), (*LOW, (TIB, 256 * MiB)), loads=((TIB + 9 * MiB, MiB),))
    with saved(machine, tmp_path) as (guest, memory):
        assert addresses(memory, "pc.ram") == [0, TIB]
        assert not memory.layout.assumptions
        assert "all are sound" in memory.layout.checks[0]
        assert wrong_pages(guest, memory) == []


@pytest.mark.slow
def test_page_tables_alone_show_that_ram_is_at_1_tib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcow2_forensics.memory.layout.pci_windows", lambda _tables: ())
    machine = paging("amd", AMD, tables(TIB + 5 * MiB), (*LOW, (TIB, 256 * MiB)))
    with saved(machine, tmp_path) as (guest, memory):
        assert addresses(memory, "pc.ram") == [0, TIB]
        assert any("page tables fit" in note for note in memory.layout.notes)
        assert wrong_pages(guest, memory) == []


def test_a_module_in_the_place_of_the_second_is_found_by_the_direct_map(tmp_path: Path) -> None:
    place = 4 * GiB + 128 * MiB
    args = (*Q35, *memory_backend("m2", "128M"), "-device", f"pc-dimm,memdev=m2,addr={place:#x}")
    ranges = (*LOW, (64 * MiB, 192 * MiB), (place, 128 * MiB))
    machine = paging("hot", args, tables(16 * MiB), ranges, loads=((place + MiB, 2 * MiB),))
    with saved(machine, tmp_path) as (guest, memory):
        assert addresses(memory, "m2") == [place]
        assert not memory.layout.assumptions
        assert wrong_pages(guest, memory) == []


def test_a_module_that_nothing_shows_is_placed_with_a_warning_that_names_its_range(tmp_path: Path) -> None:
    place = 4 * GiB + 128 * MiB
    args = (*Q35, *memory_backend("m2", "128M"), "-device", f"pc-dimm,memdev=m2,addr={place:#x}")
    machine = Machine("hot", args, loads=((place + MiB, 2 * MiB),))
    with saved(machine, tmp_path) as (guest, memory):
        assert memory.layout.doubts == ((4 * GiB, 128 * MiB),)
        assert "0x100000000-0x107ffffff" in memory.layout.assumptions[0]
        with open_guest_memory(guest.disk, layout=f"m2@{place:#x}") as stated:
            assert addresses(stated, "m2") == [place]
            assert not stated.layout.assumptions
            assert stated.layout.reasons[1] == "stated by the examiner"
            assert wrong_pages(guest, stated) == []
        with pytest.raises(FormatError, match="no RAM block 'm9'"):
            open_guest_memory(guest.disk, layout="m9@0")
        with pytest.raises(FormatError, match="overlaps"):
            open_guest_memory(guest.disk, layout="m2@0,pc.ram@0x1000")


def test_an_examiner_can_move_a_part_of_a_block(tmp_path: Path) -> None:
    machine = Machine("moved", ("-M", "pc", "-m", "128"), loads=((100 * MiB, MiB),))
    with saved(machine, tmp_path, "pc.ram+0x6000000@0x20000000") as (guest, memory):
        assert [tuple(region) for region in memory.regions] == [
            (0, 96 * MiB, "pc.ram", 0), (512 * MiB, 32 * MiB, "pc.ram", 96 * MiB)
        ]  # fmt: skip
        assert memory.read(512 * MiB + 4 * MiB, MiB) == guest.memory(100 * MiB, MiB)


@pytest.mark.slow
def test_modules_of_two_sizes_fill_what_the_direct_map_has(tmp_path: Path) -> None:
    one, two = 4 * GiB + 512 * MiB, 4 * GiB + 128 * MiB
    args = (*Q35, *memory_backend("ma", "128M"), *memory_backend("mb", "256M"))
    args += ("-device", f"pc-dimm,memdev=ma,addr={one:#x}", "-device", f"pc-dimm,memdev=mb,addr={two:#x}")
    machine = paging("two", args, tables(16 * MiB), (*LOW, (two, 256 * MiB), (one, 128 * MiB)), loads=((one, MiB),))
    with saved(machine, tmp_path) as (guest, memory):
        assert (addresses(memory, "ma"), addresses(memory, "mb")) == ([one], [two])
        assert not memory.layout.doubts
        assert wrong_pages(guest, memory) == []


@pytest.mark.slow
def test_a_module_beside_virtio_mem_takes_the_place_that_is_left(tmp_path: Path) -> None:
    args = ("-M", "q35", "-m", "256M,slots=4,maxmem=8G", *memory_backend("vm0", "256M"), *memory_backend("dm", "128M"))
    args += ("-device", "virtio-mem-pci,memdev=vm0,requested-size=128M,memaddr=0x100000000")
    args += ("-device", "pc-dimm,memdev=dm")
    machine = Machine("beside", args, loads=((4 * GiB + 256 * MiB, MiB),))
    with saved(machine, tmp_path) as (guest, memory):
        assert addresses(memory, "dm") == [4 * GiB + 256 * MiB]
        assert [region.address for region in memory.regions if region.block.endswith("/vm0")] == [4 * GiB]
        assert wrong_pages(guest, memory, ("dm", "pc.ram")) == []


@pytest.mark.parametrize("node_blocks", [("b0", "b1", "b2", "b3")])
def test_nodes_of_one_size_are_ordered_by_the_page_tables(node_blocks: tuple[str, ...], tmp_path: Path) -> None:
    args = ("-M", "q35", "-m", "512")
    for name in ("b2", "b0", "b3", "b1"):
        args += memory_backend(name, "128M")
    for number, name in enumerate(node_blocks):
        args += ("-numa", f"node,nodeid={number},memdev={name}")
    root = 400 * MiB
    places = tables(root, 140 * MiB, 300 * MiB, 410 * MiB)
    machine = paging("nodes", args, places, ((0, 512 * MiB),), loads=((200 * MiB, MiB), (330 * MiB, MiB)))
    with saved(machine, tmp_path) as (guest, memory):
        assert [region.block for region in memory.regions] == list(node_blocks)
        assert not memory.layout.assumptions
        assert wrong_pages(guest, memory) == []


@pytest.mark.slow
def test_nodes_of_one_size_without_page_tables_are_in_doubt(tmp_path: Path) -> None:
    args = ("-M", "q35", "-m", "384")
    for name in ("b2", "b0", "b1"):
        args += memory_backend(name, "128M")
    for number in range(3):
        args += ("-numa", f"node,nodeid={number},memdev=b{number}")
    machine = Machine("nodes", args, loads=((200 * MiB, MiB), (330 * MiB, MiB)))
    with saved(machine, tmp_path) as (guest, memory):
        assert memory.layout.doubts == ((128 * MiB, 256 * MiB),)
        assert wrong_pages(guest, memory) == []


@pytest.mark.slow
def test_a_size_that_cmos_cannot_hold_exactly_is_taken_from_the_stream(tmp_path: Path) -> None:
    args = ("-M", "pc,max-ram-below-4g=1G", "-m", "1100004k")
    machine = Machine("odd", args, loads=((GiB - 2 * MiB, MiB), (4 * GiB, MiB)))
    with saved(machine, tmp_path) as (guest, memory):
        assert (memory.layout.method, memory.layout.below_4g) == ("cmos", GiB)
        assert not memory.layout.assumptions
        assert wrong_pages(guest, memory) == []


def test_a_backend_with_the_name_of_a_rom_is_ram_when_cmos_has_its_size(tmp_path: Path) -> None:
    args = ("-M", "q35,memory-backend=m.rom", "-m", "128", *memory_backend("m.rom", "128M"))
    with saved(Machine("rom", args, loads=((99 * MiB, MiB),)), tmp_path) as (guest, memory):
        assert addresses(memory, "m.rom") == [0]
        assert wrong_pages(guest, memory) == []


def test_the_memory_of_a_tpm_is_not_taken_for_a_module(tmp_path: Path) -> None:
    if shutil.which("swtpm") is None:
        pytest.skip("swtpm is not installed")
    state = tmp_path / "tpm"
    state.mkdir()
    socket = Path("/tmp") / f"swtpm-{tmp_path.name}-{time.monotonic_ns()}"  # noqa: S108 - a socket's path may have 107 bytes
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={socket}"]
    emulator = subprocess.Popen(command)
    try:
        while not socket.exists():
            assert emulator.poll() is None
            time.sleep(0.05)
        args = (*Q35, *memory_backend("dm", "128M"), "-device", "pc-dimm,memdev=dm")
        args += ("-chardev", f"socket,id=chrtpm,path={socket}", "-tpmdev", "emulator,id=tpm0,chardev=chrtpm")
        machine = Machine("tpm", (*args, "-device", "tpm-crb,tpmdev=tpm0"), loads=((4 * GiB, MiB),))
        with saved(machine, tmp_path) as (guest, memory):
            assert addresses(memory, "dm") == [4 * GiB]
            assert memory.read_device("tpm-emulator/permanent") == (state / "tpm2-00.permall").read_bytes()
            assert {"tpm-ppi", "tpm-crb-cmd"} <= set(memory.layout.unplaced)
            assert wrong_pages(guest, memory, ("pc.ram", "dm")) == []
    finally:
        emulator.kill()
        emulator.wait()
        socket.unlink(missing_ok=True)
