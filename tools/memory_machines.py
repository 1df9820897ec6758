#!/usr/bin/env python3
"""Makes machines whose memory is laid out in unusual ways, and compares what is read with what QEMU had.

    python tools/memory_machines.py list                    the machines
    python tools/memory_machines.py make FOLDER [NAME ...]  make them (needs qemu-system and the tests' helpers)
    python tools/memory_machines.py check FOLDER            compare each with the pmemsave beside it

``make`` writes the image, or the stream, of each machine, and ``ADDRESS.ram`` files: what ``pmemsave`` wrote of
every RAM range of ``info mtree -f``, at most 16 MiB at each end of a range unless ``--whole`` is given. ``check``
counts pages that differ and that no warning names; its exit code is 1 when there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests import machines, qemu  # noqa: E402
from tests.machines import GiB, Machine, MiB, Running, paging  # noqa: E402

from qcow2_forensics.memory import open_guest_memory  # noqa: E402 - needs the path above

TIB = 1 << 40
_PAGE = 4096
_EDGE = 16 * MiB
_VGA = range(0xA0000, 0xC0000)  # a stream has the RAM behind the window, pmemsave the device
_NOT_RAM = (".rom", ".bios", "vram", "flash0", "tpm-ppi", "tpm-crb-cmd")
_PLACE = 4 * GiB + 128 * MiB  # of the second of two modules, whose first was unplugged
_MODULES = ("-M", "q35", "-m", "256M,slots=4,maxmem=8G")
_TABLES = tuple(16 * MiB + _PAGE * number for number in range(16))
_LOW = (0, 64 * MiB)  # of the direct map


@dataclass(frozen=True)
class Scenario:
    """A machine, how its memory is saved, and what is known of the answer."""

    about: str
    machine: Callable[[Path], contextlib.AbstractContextManager[Machine]]
    save: Callable[[Running], Path]
    is_doubtful: bool = False
    """Whether nothing in the stream shows where a part lies, so that a warning has to name it."""


def _is(machine: Machine) -> Callable[[Path], contextlib.AbstractContextManager[Machine]]:
    return lambda _folder: contextlib.nullcontext(machine)


def _backend(name: str, size: str) -> tuple[str, str]:
    return "-object", f"memory-backend-ram,id={name},size={size}"


def _snapshot(guest: Running) -> Path:
    guest.save("one")
    return guest.disk


def _migrated(*capabilities: str) -> Callable[[Running], Path]:
    return lambda guest: guest.migrate(capabilities=capabilities)


def _libvirt(guest: Running) -> Path:
    """Wrap a stream as ``virsh save`` does, with the addresses of the modules in the domain's XML."""
    body = guest.migrate().read_bytes()
    domain = (
        "<domain><devices><memory model='dimm'><target><size unit='MiB'>128</size></target><alias name='dimm0'/>"
        f"<address type='dimm' slot='0' base='{_PLACE:#x}'/></memory></devices></domain>\0"
    ).encode()
    path = guest.folder / "guest.save"
    path.write_bytes(struct.pack("<16s19I", b"LibvirtQemudSave", 2, len(domain), 1, 0, *[0] * 15) + domain + body)
    return path


@contextlib.contextmanager
def _with_tpm(folder: Path) -> Iterator[Machine]:
    if shutil.which("swtpm") is None:
        raise SkippedError("swtpm is not installed")
    state = folder / "tpm"
    state.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="swtpm-") as short:  # a socket's path may have only 107 bytes
        socket = Path(short) / "s"
        emulator = subprocess.Popen(
            ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={socket}"]
        )
        try:
            while not socket.exists():
                if emulator.poll() is not None:
                    raise SkippedError("swtpm does not start")
                time.sleep(0.05)
            args = (*_MODULES, *_backend("dm", "128M"), "-device", "pc-dimm,memdev=dm")
            args += ("-chardev", f"socket,id=chrtpm,path={socket}", "-tpmdev", "emulator,id=tpm0,chardev=chrtpm")
            yield Machine("tpm", (*args, "-device", "tpm-crb,tpmdev=tpm0"), loads=((4 * GiB, MiB),))
        finally:
            emulator.kill()
            emulator.wait()


class SkippedError(Exception):
    """This machine cannot be made here."""


def _module(name: str, address: int) -> tuple[str, ...]:
    return (*_MODULES, *_backend(name, "128M"), "-device", f"pc-dimm,memdev={name},addr={address:#x}")


SCENARIOS = {
    "amd-above-1-tib": Scenario(
        "RAM above 4 GiB that QEMU moved to 1 TiB for an AMD processor",
        _is(
            paging(
                "amd",
                ("-M", "q35", "-m", "3G", "-cpu", "EPYC,phys-bits=43", "-global", "q35-pcihost.pci-hole64-size=1T"),
                tuple(TIB + 5 * MiB + _PAGE * number for number in range(16)),
                (_LOW, (TIB, 256 * MiB)),
                loads=((TIB + 9 * MiB, MiB),),
            )
        ),
        _snapshot,
    ),
    "second-of-two-modules": Scenario(
        "a module where the second was plugged, the first unplugged; the guest's page tables map it",
        _is(paging("hot", _module("m2", _PLACE), _TABLES, (_LOW, (_PLACE, 128 * MiB)), loads=((_PLACE + MiB, MiB),))),
        _snapshot,
    ),
    "second-of-two-modules-unmapped": Scenario(
        "the same, and nothing in the stream shows where it is",
        _is(Machine("hot", _module("m2", _PLACE), loads=((_PLACE + MiB, MiB),))),
        _snapshot,
        is_doubtful=True,
    ),
    "virtio-mem-beside-module": Scenario(
        "a virtio-mem device at 4 GiB, a module after it",
        _is(
            Machine(
                "beside",
                (
                    *(*_MODULES, *_backend("vm0", "256M"), *_backend("dm", "128M")),
                    *("-device", "virtio-mem-pci,memdev=vm0,requested-size=128M,memaddr=0x100000000"),
                    *("-device", "pc-dimm,memdev=dm"),
                ),
                loads=((4 * GiB + 256 * MiB, MiB),),
            )
        ),
        _snapshot,
        is_doubtful=True,
    ),
    "tpm-beside-module": Scenario(
        "the command buffer of a TPM (CRB), and a module", _with_tpm, _snapshot, is_doubtful=True
    ),
    "odd-cmos-size": Scenario(
        "a size that is no multiple of 64 KiB, with max-ram-below-4g",
        _is(Machine("odd", ("-M", "pc,max-ram-below-4g=1G", "-m", "1100004k"), loads=((GiB - 2 * MiB, MiB),))),
        _snapshot,
    ),
    "applied-then-deleted": Scenario(
        "a memory that no snapshot lists: qemu-img snapshot -a, then -d",
        _is(Machine("leftover", ("-M", "pc", "-m", "64"), ((8 * MiB, MiB),))),
        _snapshot,
    ),
    "background-snapshot": Scenario(
        "a stream without an end of its RAM section",
        _is(Machine("background", ("-M", "pc", "-m", "64"), ((8 * MiB, MiB),))),
        _migrated("background-snapshot"),
    ),
    "compressed-pages": Scenario(
        "pages that QEMU compressed",
        _is(Machine("compress", ("-M", "pc", "-m", "64"), ((8 * MiB, MiB),))),
        _migrated("compress"),
    ),
    "libvirt-module-address": Scenario(
        "a libvirt save file whose XML states the address of a module",
        _is(Machine("libvirt", _module("memdimm0", _PLACE), loads=((_PLACE + MiB, MiB),))),
        _libvirt,
    ),
}


def make(name: str, folder: Path, *, whole: bool = False) -> Path:
    """Make one machine in a new folder and return its image or stream; raises :class:`SkippedError`."""
    import pytest

    scenario = SCENARIOS[name]
    folder.mkdir(parents=True)
    work = folder / "work"
    work.mkdir()
    try:
        with scenario.machine(work) as machine, machines.running(machine, work) as guest:
            guest.ask("stop")
            for address, size, block in guest.ram_ranges():
                if block.endswith(_NOT_RAM):
                    continue
                ends = [(address, size)] if whole or size <= 2 * _EDGE else [
                    (address, _EDGE), (address + size - _EDGE, _EDGE)
                ]  # fmt: skip
                for place, length in (*ends, *(item for item in machine.loads if address <= item[0] < address + size)):
                    if not (folder / f"{place:x}.ram").exists():
                        os.replace(guest.memory_file(place, length), folder / f"{place:x}.ram")
            saved = scenario.save(guest)
    except pytest.skip.Exception as error:
        raise SkippedError(str(error)) from None
    except AssertionError as error:
        if name == "background-snapshot":  # needs a kernel that lets QEMU write-protect pages
            raise SkippedError(f"no background snapshots here: {error}") from None
        raise
    if name == "applied-then-deleted":
        qemu.img("snapshot", "-a", "one", saved)
        qemu.img("snapshot", "-d", "one", saved)
    image = folder / ("image.qcow2" if saved.suffix == ".qcow2" else "stream")
    os.replace(saved, image)
    shutil.rmtree(work)
    return image


def check(folder: Path) -> tuple[int, int, int, list[str]]:
    """Return how many pages were compared, how many differ without a warning, how many cannot be read, and the warnings.

    A page that cannot be read is an error to whoever reads it: its place is not known, or the stream does not hold it.
    """
    image = next(path for path in folder.iterdir() if path.suffix != ".ram")
    compared = wrong = unreadable = 0
    with open_guest_memory(image) as memory:
        doubts = memory.layout.doubts
        for dump in sorted(folder.glob("*.ram")):
            start, theirs = int(dump.stem, 16), dump.read_bytes()
            ours = memory.read(start, len(theirs), pad=True)
            for at in range(0, len(theirs), _PAGE):
                if start + at in _VGA:
                    continue
                compared += 1
                if not memory.is_valid(start + at, _PAGE):
                    unreadable += any(theirs[at : at + _PAGE])
                elif ours[at : at + _PAGE] != theirs[at : at + _PAGE]:
                    wrong += not any(low <= start + at < low + length for low, length in doubts)
        return compared, wrong, unreadable, list(memory.layout.assumptions)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    maker = commands.add_parser("make")
    maker.add_argument("folder", type=Path)
    maker.add_argument("names", nargs="*", metavar="NAME", choices=[*SCENARIOS, []])
    maker.add_argument("--whole", action="store_true", help="compare all of RAM; several gigabytes are written")
    checker = commands.add_parser("check")
    checker.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "list":
        for name, scenario in SCENARIOS.items():
            print(f"{name:32} {scenario.about}")
        return 0
    if args.command == "make":
        for name in args.names or SCENARIOS:
            try:
                print(f"{name:32} {make(name, args.folder / name, whole=args.whole)}", flush=True)
            except SkippedError as error:
                shutil.rmtree(args.folder / name, ignore_errors=True)
                print(f"{name:32} skipped: {error}", flush=True)
        return 0
    failed = False
    for folder in sorted(path for path in args.folder.iterdir() if path.is_dir()):
        compared, wrong, unreadable, warnings = check(folder)
        failed |= bool(wrong or (unreadable and not warnings))
        print(
            f"{folder.name:32} {compared} pages compared, {wrong} wrong without a warning, "
            f"{unreadable} with content are not readable there"
        )
        for warning in warnings:
            print(f"{'':32} warning: {warning}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
