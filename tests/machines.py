"""Real machines for memory tests: made by qemu-system under software emulation, asked over QMP.

A machine runs a boot sector written here, which counts in 128 pages for ever, and holds seeded
random bytes wherever the test asked the loader device to put them. Its disk is a small qcow2 that
``savevm`` can write into. Nothing needs an operating system, so one costs two seconds.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import qemu

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
DEADLINE = 60.0  # seconds for anything a machine is asked to do

# org 0x7c00: count in the first word of every page from 0x10000 to 0x90000, then say so at 0x7e00.
# Changing a bit of cr0 empties the TLB: without that, QEMU before 9.0 (under TCG) does not notice
# a second write to a page it has sent, and its own live streams hold old pages. For the same reason
# interrupts are off: the timer's would write the stack and the firmware's memory at any time.
_BOOT_SECTOR = bytes.fromhex(
    "fa"  # cli
    "31c0"  # xor ax, ax
    "8ed8"  # mov ds, ax
    "0f20c0"  # again: mov eax, cr0
    "663500000100"  # xor eax, 0x10000
    "0f22c0"  # mov cr0, eax
    "b80010"  # mov ax, 0x1000
    "8ec0"  # next: mov es, ax
    "26ff060000"  # inc word [es:0]
    "050001"  # add ax, 0x100
    "3d0090"  # cmp ax, 0x9000
    "72f1"  # jb next
    "c706007e514d"  # mov word [0x7e00], 0x4d51
    "ebda"  # jmp again
)
# The same that enters long mode: the tables at PAGING_FIRST_ROOT, which may lie nowhere above 4 GiB, map the first
# megabytes as they are; the root it goes on with is the quadword before them. Then it marks 0x7e00 and stays.
_PAGING_BOOT_SECTOR = bytes.fromhex(
    "fa31c08ed8"  # cli; xor ax, ax; mov ds, ax
    "660f0116807c"  # lgdt [0x7c80]
    "66b8200000000f22e0"  # mov eax, 0x20; mov cr4, eax: physical address extension
    "66b8000020000f22d8"  # mov eax, 0x200000; mov cr3, eax
    "66b9800000c00f32660d000100000f30"  # efer: long mode
    "0f20c0660d010000800f22c0"  # cr0: paging, protection
    "66ea607c00000800"  # ljmp 8:0x7c60
).ljust(0x60, b"\0") + bytes.fromhex(
    "bbf8ff1f00488b030f22d8"  # mov ebx, 0x1ffff8; mov rax, [rbx]; mov cr3, rax
    "bb007e000066c703514d"  # mov ebx, 0x7e00; mov word [rbx], 0x4d51
    "ebfe"  # jmp $
).ljust(0x20, b"\0") + bytes.fromhex(
    "0f00887c0000" + "0000" + "0000000000000000" + "00000000009b2000"  # the descriptor table: its size, place, entries
)  # fmt: skip
PAGING_FIRST_ROOT = 0x200000
DIRECT_MAP = 0xFFFF888000000000  # where Linux begins its direct map
MARKER_ADDRESS, MARKER = 0x7E00, 0x4D51
COUNTED = range(0x10000, 0x90000, 0x1000)

_REGISTERS = {f"E{name}": f"r{name.lower()}" for name in ("AX", "BX", "CX", "DX", "SI", "DI", "BP", "SP", "IP")}
_REGISTERS |= {"EFL": "rflags", "RFL": "rflags", **{f"X{number:02}": f"x{number}" for number in range(31)}}


@dataclass(frozen=True)
class Machine:
    """How to start a machine. ``loads`` are ``(address, length)`` that the loader fills."""

    name: str
    args: tuple[str, ...]
    loads: tuple[tuple[int, int], ...] = ()
    emulator: str = "qemu-system-x86_64"
    boots: bool = True
    """Whether it reads the boot sector; without, it is left to its firmware for half a second."""
    disk_args: tuple[str, ...] = ("-device", "virtio-blk-pci,drive=d0")
    contents: tuple[tuple[int, bytes], ...] = ()
    """``(address, bytes)`` that the loader puts there, besides ``loads``."""
    boot_sector: bytes = _BOOT_SECTOR


def paging(
    name: str, args: tuple[str, ...], tables: Sequence[int], ranges: Sequence[tuple[int, int]], **options: Any
) -> Machine:
    """Return a machine whose page tables lie at the addresses ``tables``, and whose direct map has ``ranges``.

    ``ranges`` are whole 2 MiB pages. The first table is the root; the more tables a range takes, the more are needed.
    """
    places = iter(tables)
    content: dict[int, dict[int, int]] = {}

    def table() -> int:
        address = next(places)
        content[address] = {}
        return address

    root = table()
    known: dict[tuple[int, ...], int] = {(): root}
    for address, length in ranges:
        for page in range(address, address + length, 2 * MiB):
            virtual = (DIRECT_MAP + page) & ((1 << 48) - 1)
            path: tuple[int, ...] = ()
            for index in (virtual >> 39, virtual >> 30 & 511):
                above, path = path, (*path, index)
                if path not in known:
                    known[path] = table()
                    content[known[above]][index] = known[path] | 3
            content[known[path]][virtual >> 21 & 511] = page | 0x83
    first = PAGING_FIRST_ROOT
    low = {first: {0: first + 0x1003}, first + 0x1000: {0: first + 0x2003}, first + 0x2000: {0: 0x83, 1: 0x200083}}
    content[root][0] = first + 0x1003
    pages = {
        place: b"".join(entries.get(index, 0).to_bytes(8, "little") for index in range(512))
        for place, entries in (content | low).items()
    }
    pages[first - 4096] = root.to_bytes(8, "little").rjust(4096, b"\0")
    return Machine(name, args, contents=tuple(pages.items()), boot_sector=_PAGING_BOOT_SECTOR, **options)


@dataclass
class Running:
    """A machine that runs: QMP commands, and files in a folder of its own."""

    folder: Path
    disk: Path
    process: subprocess.Popen[bytes]
    qmp: Any
    commands: list[str] = field(default_factory=list)

    def ask(self, command: str, **arguments: object) -> Any:
        """Run one QMP command and return its answer; events are passed over."""
        self.commands.append(command)
        self.qmp.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self.qmp.flush()
        while line := self.qmp.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise AssertionError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise AssertionError(f"qemu went away at {command}")

    def tell(self, line: str) -> str:
        """Run one command of the human monitor."""
        answer = self.ask("human-monitor-command", **{"command-line": line})
        assert "rror" not in answer, answer
        return str(answer)

    def memory(self, address: int, length: int) -> bytes:
        """Return guest-physical memory as QEMU writes it."""
        path = self.folder / "pmemsave"
        self.ask("pmemsave", val=address, size=length, filename=str(path))
        data = path.read_bytes()
        path.unlink()
        return data

    def memory_file(self, address: int, length: int) -> Path:
        """Have QEMU write guest-physical memory to a file."""
        path = self.folder / f"memory-{address:x}"
        self.ask("pmemsave", val=address, size=length, filename=str(path))
        return path

    def ram_ranges(self) -> list[tuple[int, int, str]]:
        """Return ``(address, length, block)`` of everything that is RAM for the processors."""
        views = self.tell("info mtree -f").split("FlatView")
        view = next(text for text in views if re.search(r'AS "memory"', text))
        found = re.findall(
            r"^ +([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:ram|nv-ram)\): (.+?)(?: @| KVM|$)", view, re.MULTILINE
        )
        return [(int(low, 16), int(high, 16) + 1 - int(low, 16), name.strip()) for low, high, name in found]

    def registers(self) -> list[dict[str, int]]:
        """Return what ``info registers -a`` shows, by the names :class:`Cpu` uses, one dictionary per processor."""
        found = []
        for text in re.split(r"^\s*CPU#\d+\s*$", self.tell("info registers -a"), flags=re.MULTILINE)[1:]:
            pairs = re.findall(r"\b([A-Z][A-Z0-9]+) ?= ?([0-9a-f]{8,16})\b", text)
            shown = {_REGISTERS.get(name, name.lower()): int(value, 16) for name, value in pairs}
            for name, base, limit in re.findall(r"\b([GI]DT)= +([0-9a-f]+) ([0-9a-f]+)", text):
                shown |= {f"{name.lower()}_base": int(base, 16), f"{name.lower()}_limit": int(limit, 16)}
            found.append(shown)
        return found

    def save(self, name: str) -> None:
        """Take an internal snapshot with VM state."""
        self.tell(f"savevm {name}")

    def migrate(
        self, name: str = "stream", *, rounds: int = 0, capabilities: Sequence[str] = (), offset: int = 0
    ) -> Path:
        """Write a migration stream to a file; live when ``rounds`` passes over what changed are wanted."""
        known = {entry["capability"] for entry in self.ask("query-migrate-capabilities")}
        for capability in capabilities:
            if capability not in known:
                pytest.skip(f"this QEMU has no migration capability {capability}")
            self.ask("migrate-set-capabilities", capabilities=[{"capability": capability, "state": True}])
        path = self.folder / name
        uri = f"file:{path},offset={offset:#x}" if "mapped-ram" in capabilities else f"exec:cat > {path}"
        if offset:
            path.write_bytes(b"\xaa" * offset)
        if rounds:
            # One page a millisecond: the last pass never comes by itself while the guest counts in 128.
            self.ask("migrate-set-parameters", **{"max-bandwidth": 4 * MiB, "downtime-limit": 1})
        self.ask("migrate", uri=uri)
        deadline = time.monotonic() + DEADLINE
        while (state := self.ask("query-migrate"))["status"] not in ("completed", "failed"):
            assert time.monotonic() < deadline, state
            if rounds and state.get("ram", {}).get("dirty-sync-count", 0) > rounds:
                self.ask("migrate-set-parameters", **{"max-bandwidth": GiB, "downtime-limit": 2000})
                rounds = 0
            time.sleep(0.05)
        assert state["status"] == "completed", state
        self.statistics = state["ram"]
        return path


@contextmanager
def running(machine: Machine, folder: Path) -> Iterator[Running]:
    """Start a machine, wait until its boot sector counts, and end it afterwards."""
    qemu.need(machine.emulator)
    raw = folder / "boot.raw"
    raw.write_bytes(machine.boot_sector.ljust(510, b"\0") + b"\x55\xaa" + bytes(MiB - 512))
    disk = folder / "disk.qcow2"
    qemu.convert(raw, disk, fmt="raw", target_format="qcow2")
    sockets = Path(tempfile.mkdtemp(prefix="qmp-"))  # a socket's path may have only 107 bytes
    command = [machine.emulator, "-accel", "tcg", "-display", "none", "-nodefaults", "-no-user-config", *machine.args]
    command += ["-drive", f"file={disk},format=qcow2,if=none,id=d0", *machine.disk_args]
    command += ["-qmp", f"unix:{sockets / 'qmp'},server=on,wait=off"]
    contents = [(address, loaded(number, length)) for number, (address, length) in enumerate(machine.loads)]
    for number, (address, data) in enumerate((*contents, *machine.contents)):
        content = folder / f"load-{number}"
        content.write_bytes(data)
        command += ["-device", f"loader,file={content},addr={address:#x},force-raw=on"]
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
    try:
        machine_at_work = Running(folder, disk, process, _connect(sockets / "qmp", process, folder / "stderr"))
        machine_at_work.ask("qmp_capabilities")
        _wait(machine, machine_at_work)
        yield machine_at_work
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(sockets)


def loaded(number: int, length: int) -> bytes:
    """Return what the loader put at the ``number``-th place: random, with every fourth page zero."""
    source = random.Random(number)
    return b"".join(
        bytes(4096) if page % 4 == 3 else source.randbytes(min(4096, length - page * 4096))
        for page in range(-(-length // 4096))
    )[:length]


def _connect(path: Path, process: subprocess.Popen[bytes], errors: Path) -> Any:
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(DEADLINE)
            client.connect(os.fspath(path))
            break
        except OSError:
            client.close()
            if "unsupported machine type" in errors.read_text():
                pytest.skip("this QEMU does not make this machine type")
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"qemu did not start: {errors.read_text()}") from None
            time.sleep(0.02)
    stream = client.makefile("rwb")
    client.close()
    stream.readline()  # the greeting
    return stream


def _wait(machine: Machine, running: Running) -> None:
    if not machine.boots:
        time.sleep(0.5)
        return
    deadline = time.monotonic() + DEADLINE
    while int.from_bytes(running.memory(MARKER_ADDRESS, 2), "little") != MARKER:
        assert time.monotonic() < deadline, "the boot sector never ran"
        time.sleep(0.1)
