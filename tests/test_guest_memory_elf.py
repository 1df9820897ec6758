"""ELF core files of guest memory: QEMU's own dump-guest-memory is the oracle, and drgn opens them."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics.cli import main
from qcow2_forensics.memory import open_guest_memory
from qcow2_forensics.memory.elf_core import vmcoreinfo
from tests.conftest import EvidenceCase
from tests.machines import MiB, paging, running
from tests.stream_builder import PAGE, page, simple
from tests.test_guest_memory import open_bytes
from tests.test_guest_memory_machines import VGA

REGISTERS = slice(112, 112 + 27 * 8)
FLAGS = [8 + 18 * 8 + 24 * n + 8 for n in range(10)]  # of the segments in QEMU's note: a stream's registers lack them


def elf(path: Path) -> tuple[list[tuple[bytes, int, bytes]], list[tuple[int, bytes]]]:
    """Return notes (name, type, content) and segments (physical address, content) of a core file."""
    data = path.read_bytes()
    offset, count = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
    notes, loads = [], []
    for number in range(count):
        kind, _, at, _, address, size, _, _ = struct.unpack_from("<IIQQQQQQ", data, offset + 56 * number)
        if kind == 1:
            loads.append((address, data[at : at + size]))
            continue
        end = at + size
        while at < end:
            name, content, what = struct.unpack_from("<III", data, at)
            start = at + 12 + -(-name // 4) * 4
            notes.append((data[at + 12 : at + 12 + name], what, data[start : start + content]))
            at = start + -(-content // 4) * 4
    return notes, loads


def test_a_core_file_has_what_qemus_own_has(tmp_path: Path) -> None:
    tables = [16 * MiB + 4096 * number for number in range(8)]
    machine = paging("core", ("-M", "pc", "-m", "64"), tables, ((0, 64 * MiB),), loads=((8 * MiB, MiB),))
    with running(machine, tmp_path) as guest:
        guest.ask("stop")
        guest.ask("dump-guest-memory", paging=False, protocol=f"file:{tmp_path / 'qemu.elf'}")
        guest.save("one")
    assert main(["memory", str(guest.disk), str(tmp_path / "ours.elf"), "--format", "elf"]) == 0
    (notes, loads), (theirs, their_loads) = elf(tmp_path / "ours.elf"), elf(tmp_path / "qemu.elf")
    assert [(name, kind) for name, kind, _ in sorted(notes)] == [(name, kind) for name, kind, _ in sorted(theirs)]
    for name in (b"CORE\0", b"QEMU\0"):
        for one, other in zip(
            *([note for who, _, note in table if who == name] for table in (notes, theirs)), strict=True
        ):
            assert len(one) == len(other)
            if name == b"CORE\0":
                assert one[REGISTERS] == other[REGISTERS]
            else:
                plain = bytearray(other)
                for at in FLAGS:
                    plain[at : at + 4] = bytes(4)
                assert one == bytes(plain)
    ours = {address + at: content[at : at + 4096] for address, content in loads for at in range(0, len(content), 4096)}
    for address, content in their_loads:
        for at in range(0, len(content), 4096):
            assert (
                address + at in VGA
                or ours.get(address + at, bytes(4096)) == content[at : at + 4096]
                or address >= 64 * MiB
            )


def test_the_kernels_own_note_is_found_and_what_only_looks_like_it_is_not() -> None:
    text = b"OSRELEASE=6.1.0\nPAGESIZE=4096\n"
    note = struct.pack("<III", 11, len(text), 0) + b"VMCOREINFO\0\0" + text.ljust(32, b"\0")
    bait = struct.pack("<III", 11, 1 << 30, 0) + b"VMCOREINFO\0\0OSRELEASE="
    content = (b"VMCOREINFO\0OSRELEASE=%s\n" + bait).ljust(PAGE - 20, b"\0") + note
    content = content.ljust(2 * PAGE, b"\0")
    memory = open_bytes(simple([page(0, content[:PAGE], "pc.ram"), page(1, content[PAGE:])], {"pc.ram": 2 * PAGE}))
    assert vmcoreinfo(memory) == note


def test_drgn_opens_the_case_as_a_linux_kernel_and_follows_its_page_tables(
    evidence: EvidenceCase, tmp_path: Path
) -> None:
    drgn = pytest.importorskip("drgn")
    core = tmp_path / "core.elf"
    assert main(["memory", str(evidence.image), str(core), "--format", "elf"]) == 0
    program = drgn.Program()
    program.set_core_dump(str(core))
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    with open_guest_memory(evidence.image) as memory:
        assert program.read(0xFFFFFFFF81C00080, 64) == memory.read(0x1C00080, 64)


@pytest.fixture(scope="module")
def vmlinux() -> Path:
    """The case's kernel with its debug symbols, from Debian's package or from QCOW2_VMLINUX."""
    package = "linux-image-6.1.0-56-cloud-amd64-dbg"
    path = Path(os.environ.get("QCOW2_VMLINUX", f"/usr/lib/debug/boot/vmlinux{package[11:-4]}"))
    if not path.is_file():
        pytest.skip(f"debug symbols are absent: install {package}, or set QCOW2_VMLINUX to its vmlinux")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("snapshot", ["before-incident", "during-incident"])
def test_drgn_lists_the_processes_that_volatility_lists(
    evidence: EvidenceCase, vmlinux: Path, tmp_path: Path, snapshot: str
) -> None:
    drgn: Any = pytest.importorskip("drgn")
    pytest.importorskip("volatility3.framework", reason="volatility3 is absent")
    from drgn.helpers.linux.pid import for_each_task

    from tests.volatility_tools import vol

    core = tmp_path / "core.elf"
    assert main(["memory", str(evidence.image), str(core), "--format", "elf", "--snapshot", snapshot]) == 0
    program = drgn.Program()
    program.set_core_dump(str(core))
    program.load_debug_info([str(vmlinux)])
    found = [
        (task.pid.value_(), task.real_parent.tgid.value_(), task.comm.string_().decode())
        for task in for_each_task(program)
        if task.pid.value_() == task.tgid.value_()
    ]
    options = ["-s", evidence.symbols, "-r", "json", "--qcow2-snapshot", snapshot, "-f", evidence.image]
    done = vol(*options, "linux.pslist.PsList", cwd=tmp_path, every_stacker=True)
    assert done.returncode == 0, done.stderr
    assert found == [(row["PID"], row["PPID"], row["COMM"]) for row in json.loads(done.stdout)]
    assert len(found) > 40
    assert (".cache_helper" in {name for _, _, name in found}) == (snapshot == "during-incident")
