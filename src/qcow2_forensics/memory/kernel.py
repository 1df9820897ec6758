"""Which kernel a memory holds, and which symbols its analysis needs.

The kernel is looked for around its entries, whose addresses every x86-64 processor keeps in registers, and then,
where asked for, in all of memory. Linux has its banner; a Windows kernel names its
debug file (a CodeView record) by a GUID.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ..limits import GiB, MiB
from .guest_memory import GuestMemory
from .kernel_place import entries

_BANNER = re.compile(rb"Linux version (\d[^\s()]{0,127}) \([^\n\0]{1,600}?#\d[^\n\0]{1,200}(?=\n|\0)")
_CODEVIEW = re.compile(rb"RSDS(.{16})(.{4})(nt(?:krnlmp|krnlpa|krpamp|oskrnl)\.pdb)\0", re.DOTALL)
_SAFE = re.compile(r"[A-Za-z0-9.+~_-]{1,128}")
_BEFORE, _AFTER = 16 * MiB, 48 * MiB  # a kernel's image around its entry
_SCANNED: Final = 4 * GiB  # bytes that are looked at in all of memory, zeros not counted
_CHUNK, _OVERLAP = 4 * MiB, 1024
_FIVE_LEVELS = 1 << 12  # of CR4


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel by what identifies its symbols. Texts from evidence are not escaped."""

    system: str
    """"linux" or "windows"."""
    identity: str
    """The Linux banner; or the name, GUID and age of the debug file of a Windows kernel."""
    address: int
    """The guest-physical address at which that was found."""
    symbol_file: str
    """What Volatility's symbol folder must have: a path below it."""
    package: str = ""
    """The package with the debug symbols, "" when it is not known."""
    commands: tuple[str, ...] = ()
    """What makes the symbol file, on a machine of that distribution."""


def find_kernel(memory: GuestMemory, *, everywhere: bool = True) -> Kernel | None:
    """Return the kernel, None when it is not found; ``everywhere`` also looks in all of memory, which takes seconds."""
    for address, data in _near_entry(memory):
        if found := _search(data, address):
            return found
    looked = 0
    if everywhere:
        for chunk in memory.chunks(_CHUNK, _OVERLAP, elide=True):
            if found := _search(memory.read(chunk.address, chunk.length), chunk.address):
                return found
            looked += chunk.length
            if looked > _SCANNED:
                break
    return None


def uses_five_levels(memory: GuestMemory) -> bool:
    """Return whether a processor translates addresses by five levels of tables (LA57)."""
    return any(
        cpu.registers.get("cr4", 0) & _FIVE_LEVELS and cpu.registers.get("efer", 0) >> 10 & 1
        for cpu in memory.cpus
        if not cpu.runs_nested_guest
    )


def _near_entry(memory: GuestMemory) -> Iterator[tuple[int, bytes]]:
    """Yield address and bytes of memory around the kernel's entries."""
    seen = set()
    for entry in entries(memory):
        start = max(0, entry.physical - _BEFORE) // _CHUNK * _CHUNK
        for low, length in memory.valid_ranges(start, entry.physical + _AFTER - start):
            for at in range(low, low + length, _CHUNK):
                if at not in seen:
                    seen.add(at)
                    yield at, memory.read(at, min(_CHUNK + _OVERLAP, low + length - at))


def _search(data: bytes, address: int) -> Kernel | None:
    at = data.find(b"Linux version ")
    while at >= 0:
        if found := _BANNER.match(data, at):
            return linux(found[0].decode("ascii", "surrogateescape"), address + at)
        at = data.find(b"Linux version ", at + 1)
    found = _CODEVIEW.search(data)
    return (
        windows(found[3].decode(), found[1], int.from_bytes(found[2], "little"), address + found.start())
        if found
        else None
    )


def linux(banner: str, address: int = 0) -> Kernel:
    """Return what a Linux banner identifies."""
    match = _BANNER.match(banner.encode("ascii", "surrogateescape") + b"\n")
    release = match[1].decode("ascii", "surrogateescape") if match else ""
    if not _SAFE.fullmatch(release):  # goes into commands that a person copies
        return Kernel("linux", banner, address, "linux/")
    target = f"linux/{release}.json.xz"
    image = f"/usr/lib/debug/boot/vmlinux-{release}"
    if "Ubuntu" in banner:
        package = f"linux-image-unsigned-{release}-dbgsym"
        install = f"apt-get install {package}"
    elif "Debian" in banner:
        package = f"linux-image-{release}-dbg"
        install = f"apt-get install {package}"
    elif re.search(r"\.(fc|el|amzn)\d+", release):
        package = f"kernel-debuginfo-{release}"
        install = f"dnf debuginfo-install kernel-{release}"
        image = f"/usr/lib/debug/lib/modules/{release}/vmlinux"
    elif "SUSE" in banner:
        package = "kernel-default-debuginfo"
        install = f"zypper install {package}"
        image = f"/usr/lib/debug/boot/vmlinux-{release}.debug"
    else:
        return Kernel("linux", banner, address, target)
    return Kernel(
        "linux", banner, address, target, package, (install, f"dwarf2json linux --elf {image} | xz > {target}")
    )


def windows(name: str, guid: bytes, age: int, address: int = 0) -> Kernel:
    """Return what the debug record of a Windows kernel identifies."""
    text = f"{uuid.UUID(bytes_le=guid).hex.upper()}-{age}"
    return Kernel("windows", f"{name} {text}", address, f"windows/{name}/{text}.json.xz")
