"""Guest memory against the machines it came from: QEMU's own pmemsave is the oracle.

Each machine is stopped, its memory written by ``pmemsave``, and its state taken by ``savevm`` or
``migrate``; what :class:`GuestMemory` reads must be the same bytes. Legitimate differences: the VGA
window (0xa0000 to 0xbffff), where the stream holds the RAM behind it and pmemsave the device, and
the firmware's place below 1 MiB on microvm, which keeps its ROM mapped over the RAM.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from qcow2_forensics.errors import ReadError
from qcow2_forensics.format.source import FileSource
from qcow2_forensics.memory import GuestMemory, StreamWindow, open_guest_memory
from tests import machines
from tests.machines import GiB, KiB, Machine, MiB, running

pytestmark = pytest.mark.slow  # boots machines; test_guest_memory.py has the essentials

VGA = range(0xA0000, 0xC0000)
FIRMWARE = range(0xE0000, 0x100000)
UNDESCRIBED = ("pc-before-footers", "pc-1.7-4G")  # machine types whose streams end without a description
WHOLE = 768 * MiB  # up to this size all of memory is compared
PIECE = 16 * MiB
STEP = 256 * MiB  # written by QEMU at once
EVERYTHING = os.environ.get("QCOW2_WHOLE_MEMORY") == "1"


def memory_backend(name: str, size: str, kind: str = "ram") -> tuple[str, str]:
    return "-object", f"memory-backend-{kind},id={name},size={size}"


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("pc-256M", ("-M", "pc", "-m", "256"), ((8 * MiB, 3 * MiB), (254 * MiB, MiB))),
        Machine("q35-512M", ("-M", "q35", "-m", "512", "-smp", "2"), ((100 * MiB, 2 * MiB + 4096),)),
        Machine(
            "pc-5G",
            ("-M", "pc", "-m", "5G"),
            ((3 * GiB - 3 * MiB, 2 * MiB), (4 * GiB, 2 * MiB), (6 * GiB - MiB, MiB)),
        ),
        Machine(
            "q35-5G",
            ("-M", "q35", "-m", "5G"),
            ((2 * GiB - 3 * MiB, 2 * MiB), (4 * GiB, 2 * MiB), (7 * GiB - MiB, MiB)),
        ),
        Machine(
            "max-ram-below-4g",
            ("-M", "pc,max-ram-below-4g=1G", "-m", "3G"),
            ((GiB - 2 * MiB, MiB), (4 * GiB, 2 * MiB), (6 * GiB - MiB, MiB)),
        ),
        Machine(
            "numa-unequal",
            (
                *("-M", "q35", "-m", "512"),
                *memory_backend("mA", "192M"),
                *memory_backend("mB", "320M"),
                *("-numa", "node,nodeid=0,memdev=mA", "-numa", "node,nodeid=1,memdev=mB"),
            ),
            ((190 * MiB, 4 * MiB), (500 * MiB, 10 * MiB)),
        ),
        Machine(
            "numa-5G",
            (
                *("-M", "pc", "-m", "5G"),
                *memory_backend("mA", "2G"),
                *memory_backend("mB", "3G"),
                *("-numa", "node,nodeid=0,memdev=mA", "-numa", "node,nodeid=1,memdev=mB"),
            ),
            ((2 * GiB - MiB, 2 * MiB), (3 * GiB - 2 * MiB, MiB), (4 * GiB, MiB), (6 * GiB - MiB, MiB)),
        ),
        Machine(
            "numa-equal",
            (
                *("-M", "q35", "-m", "256"),
                *memory_backend("zz", "128M"),
                *memory_backend("aa", "128M"),
                *("-numa", "node,memdev=aa", "-numa", "node,memdev=zz"),
            ),
            ((100 * MiB, MiB), (200 * MiB, MiB)),
        ),
        Machine(
            "amd-above-1T",
            ("-M", "q35", "-m", "5G,maxmem=1100G,slots=2", "-cpu", "EPYC,phys-bits=42"),
            ((1024 * GiB + MiB, MiB),),
        ),
        Machine(
            "memfd-odd-id",
            ("-M", "q35,memory-backend=od.d-7_x", "-m", "256", *memory_backend("od.d-7_x", "256M", "memfd")),
            ((33 * MiB, MiB),),
        ),
        Machine(
            "path-named-backend",
            ("-M", "pc-q35-4.0", "-m", "256", *memory_backend("m0", "256M"), "-numa", "node,memdev=m0"),
            ((33 * MiB, MiB),),
        ),
        Machine(
            "cold-dimm",
            (
                *("-M", "pc", "-m", "256M,slots=2,maxmem=4G"),
                *memory_backend("dm0", "128M"),
                *("-device", "pc-dimm,memdev=dm0"),
            ),
            ((4 * GiB + 5 * MiB, MiB),),
        ),
        Machine(
            "microvm",
            ("-M", "microvm", "-m", "512"),
            ((16 * MiB, MiB), (500 * MiB, MiB)),
            boots=False,
            disk_args=(),
        ),
        Machine("microvm-4G", ("-M", "microvm", "-m", "4G"), ((4 * GiB, MiB),), boots=False, disk_args=()),
        Machine("pc-before-footers", ("-M", "pc-i440fx-2.0", "-m", "128"), ((16 * MiB, MiB),)),
        Machine("pc-1.7-4G", ("-M", "pc-i440fx-1.7", "-m", "4G"), ((3584 * MiB - 2 * MiB, MiB), (4 * GiB, MiB))),
        Machine(
            "aarch64-virt",
            ("-M", "virt", "-cpu", "cortex-a57", "-m", "256"),
            ((GiB + 3 * MiB, MiB), (GiB + 255 * MiB, MiB)),
            emulator="qemu-system-aarch64",
            boots=False,
            disk_args=(),
        ),
        Machine(
            "aarch64-virt-numa",
            (
                *("-M", "virt", "-cpu", "cortex-a57", "-m", "256"),
                *memory_backend("big", "192M"),
                *memory_backend("abc", "64M"),
                *("-numa", "node,nodeid=0,memdev=big", "-numa", "node,nodeid=1,memdev=abc"),
            ),
            ((GiB + 3 * MiB, MiB), (GiB + 191 * MiB, 2 * MiB)),
            emulator="qemu-system-aarch64",
            boots=False,
            disk_args=(),
        ),
    )
}


def compared_ranges(memory: GuestMemory, machine: Machine) -> Iterable[tuple[int, int]]:
    """Everything of a small machine; of a large one the edges of each region and what was loaded.

    With QCOW2_WHOLE_MEMORY=1 everything of every machine: minutes, and gigabytes written.
    """
    if EVERYTHING or sum(region.length for region in memory.regions) <= WHOLE:
        for region in memory.regions:
            for address in range(region.address, region.end, STEP):
                yield address, min(STEP, region.end - address)
        return
    for region in memory.regions:
        yield region.address, min(PIECE, region.length)
        yield region.end - min(PIECE, region.length), min(PIECE, region.length)
    yield from machine.loads


def differing_pages(memory: GuestMemory, address: int, dump: Path) -> list[int]:
    found = []
    with dump.open("rb") as file:
        while theirs := file.read(PIECE):
            ours = memory.read(address, len(theirs))
            if ours != theirs:
                found += [
                    address + at for at in range(0, len(ours), 4096) if ours[at : at + 4096] != theirs[at : at + 4096]
                ]
            address += len(theirs)
    dump.unlink()
    return found


def allowed(machine: Machine, pages: list[int]) -> bool:
    if machine.name.startswith("microvm"):
        return all(page in FIRMWARE for page in pages)
    return all(page in VGA for page in pages)


@pytest.mark.parametrize("name", MACHINES)
def test_memory_of_a_saved_machine_equals_pmemsave(name: str, tmp_path: Path) -> None:
    machine = MACHINES[name]
    with running(machine, tmp_path) as guest:
        guest.ask("stop")
        guest.save("one")
        with open_guest_memory(guest.disk, "one") as memory:
            assert memory.complete
            assert memory.regions
            assert bool(memory.layout.assumptions) == (name == "cold-dimm")  # nothing shows where a module is
            unusual = [note for note in memory.layout.notes if "not the" in note]  # the table against the machine
            assert bool(unusual) == (name == "max-ram-below-4g")
            for address, length in compared_ranges(memory, machine):
                pages = differing_pages(memory, address, guest.memory_file(address, length))
                assert allowed(machine, pages), [hex(page) for page in pages[:20]]
            for number, (address, length) in enumerate(machine.loads):
                assert memory.read(address, length) == machines.loaded(number, length)
            for cpu, shown in zip(memory.cpus, guest.registers(), strict=name not in UNDESCRIBED):
                known = {key: value for key, value in shown.items() if key in cpu.registers}
                assert known == {key: cpu.registers[key] for key in known}
                assert {"cr3", "rip", "gdt_base"} <= known.keys() or {"pc", "x30"} <= known.keys()


def test_hot_plugged_module_is_placed_where_the_machine_has_it(tmp_path: Path) -> None:
    content = tmp_path / "module"
    content.write_bytes(machines.loaded(7, 4 * MiB) + bytes(124 * MiB))
    machine = Machine("hot", ("-M", "q35", "-m", "256M,slots=4,maxmem=8G"))
    with running(machine, tmp_path) as guest:
        guest.ask(
            "object-add",
            **{"qom-type": "memory-backend-file", "id": "zz", "size": 128 * MiB, "mem-path": str(content)},
        )
        guest.ask("device_add", driver="pc-dimm", id="d0", memdev="zz")
        guest.ask("stop")
        (module,) = guest.ask("query-memory-devices")
        guest.save("one")
        with open_guest_memory(guest.disk) as memory:
            region = next(region for region in memory.regions if region.block == "zz")
            assert (region.address, region.length) == (module["data"]["addr"], module["data"]["size"])
            for region in memory.regions:
                pages = differing_pages(memory, region.address, guest.memory_file(region.address, region.length))
                assert allowed(machine, pages)


def test_memory_of_virtio_mem_is_placed_and_what_is_not_plugged_is_not_valid(tmp_path: Path) -> None:
    args = ("-M", "q35", "-m", "256M,maxmem=2G,slots=1", *memory_backend("vm0", "512M"))
    machine = Machine("virtio-mem", (*args, "-device", "virtio-mem-pci,memdev=vm0,requested-size=128M"))
    with running(machine, tmp_path) as guest:
        guest.ask("stop")
        (device,) = guest.ask("query-memory-devices")
        guest.save("one")
        with open_guest_memory(guest.disk) as memory:
            region = next(region for region in memory.regions if region.block.endswith("/vm0"))
            assert (region.address, region.length) == (device["data"]["memaddr"], 512 * MiB)
            assert not memory.is_valid(region.address)
            assert memory.missing == 512 * MiB
            assert not memory.layout.assumptions
            assert allowed(machine, differing_pages(memory, 0, guest.memory_file(0, 256 * MiB)))


def test_live_stream_with_repeated_pages_equals_the_memory_it_ended_with(tmp_path: Path) -> None:
    machine = Machine("live", ("-M", "pc", "-m", "128"), ((40 * MiB, 3 * MiB),))
    with running(machine, tmp_path) as guest:
        path = guest.migrate(rounds=3)
        sent = guest.statistics["normal"] + guest.statistics["duplicate"]
        memory = GuestMemory(FileSource(path))
        assert sent > sum(block.size for block in memory.blocks) // 4096 + len(machines.COUNTED)
        pages = differing_pages(memory, 0, guest.memory_file(0, 128 * MiB))
        assert allowed(machine, pages)
        assert all(memory.read(page, 2) != bytes(2) for page in machines.COUNTED)


@pytest.mark.parametrize("offset", [0, 0x20000])
def test_mapped_ram_file_equals_the_memory_it_ended_with(offset: int, tmp_path: Path) -> None:
    machine = Machine("mapped", ("-M", "q35", "-m", "128"), ((40 * MiB, 3 * MiB),))
    with running(machine, tmp_path) as guest:
        path = guest.migrate(rounds=2, capabilities=["mapped-ram"], offset=offset)
        file = FileSource(path)
        memory = GuestMemory(StreamWindow(file, offset, file.size - offset) if offset else file)
        assert memory.cpus
        pages = differing_pages(memory, 0, guest.memory_file(0, 128 * MiB))
        assert allowed(machine, pages)


def test_pages_sent_as_differences_equal_the_memory_they_ended_as(tmp_path: Path) -> None:
    machine = Machine("xbzrle", ("-M", "pc", "-m", "128"), ((40 * MiB, 3 * MiB),))
    with running(machine, tmp_path) as guest:
        memory = GuestMemory(FileSource(guest.migrate(rounds=4, capabilities=["xbzrle"])))
        assert any(index.deltas for index in memory._index.values())
        assert allowed(machine, differing_pages(memory, 0, guest.memory_file(0, 128 * MiB)))
        cached = GuestMemory.from_bytes(memory.to_bytes(), memory.source)
        assert cached.read(0, 128 * MiB) == memory.read(0, 128 * MiB)


def test_compressed_pages_equal_the_memory_they_were(tmp_path: Path) -> None:
    machine = Machine("compress", ("-M", "pc", "-m", "64"), ((8 * MiB, MiB),))
    with running(machine, tmp_path) as guest:
        memory = GuestMemory(FileSource(guest.migrate(rounds=1, capabilities=["compress"])))
        runs = list(memory.mapping(0, 64 * MiB))
        assert any(run.offset is None and run.fill is None for run in runs)
        assert allowed(machine, differing_pages(memory, 0, guest.memory_file(0, 64 * MiB)))


def test_background_snapshot_has_no_end_of_ram(tmp_path: Path) -> None:
    machine = Machine("background", ("-M", "pc", "-m", "64"), ((8 * MiB, MiB),))
    with running(machine, tmp_path) as guest:
        guest.ask("stop")
        dump = guest.memory_file(0, 64 * MiB)  # the machine goes on as soon as its state is taken
        try:
            path = guest.migrate(capabilities=["background-snapshot"])
        except AssertionError as error:
            pytest.skip(f"no background snapshots here: {error}")
        memory = GuestMemory(FileSource(path))
        assert memory.cpus
        assert allowed(machine, differing_pages(memory, 0, dump))


def test_shared_memory_left_out_of_a_stream_is_not_valid_and_never_zeros(tmp_path: Path) -> None:
    backing = tmp_path / "ram"
    backing.write_bytes(bytes(64 * MiB))
    args = ("-M", "pc,memory-backend=shared", "-m", "64")
    args += ("-object", f"memory-backend-file,id=shared,size=64M,share=on,mem-path={backing}")
    with running(Machine("shared", args), tmp_path) as guest:
        path = guest.migrate(capabilities=["x-ignore-shared"])
        memory = GuestMemory(FileSource(path))
        assert [region.block for region in memory.regions] == ["shared"]
        assert not memory.is_valid(0x10000)
        assert list(memory.valid_ranges()) == []
        assert any("x-ignore-shared" in text for text in memory.layout.assumptions)
        with pytest.raises(ReadError):
            memory.read(0x10000, 16)
        assert memory.read(0x10000, 16, pad=True) == bytes(16)


def test_shared_memory_of_a_device_is_not_taken_for_a_module(tmp_path: Path) -> None:
    args = ("-M", "pc", "-m", "64", "-object", "memory-backend-ram,id=ivs,share=on,size=4M")
    with running(Machine("ivshmem", (*args, "-device", "ivshmem-plain,memdev=ivs,master=on")), tmp_path) as guest:
        guest.ask("stop")
        guest.save("one")
        with open_guest_memory(guest.disk) as memory:
            assert [region.block for region in memory.regions] == ["pc.ram"]
            assert any(name.endswith("/ivs") for name in memory.layout.unplaced)
            assert not memory.layout.assumptions


def test_video_memory_can_be_read_by_the_name_of_its_block(tmp_path: Path) -> None:
    with running(Machine("vga", ("-M", "pc", "-m", "64", "-device", "VGA")), tmp_path) as guest:
        guest.ask("stop")
        guest.save("one")
        with open_guest_memory(guest.disk) as memory:
            name = next(block.name for block in memory.blocks if block.name.endswith("vga.vram"))
            assert name in memory.layout.unplaced
            assert any(memory.read_block(name, 0, 64 * KiB))
