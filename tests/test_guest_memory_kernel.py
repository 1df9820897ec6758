"""Which kernel a memory holds and which symbols it needs."""

from __future__ import annotations

import uuid

import pytest

from qcow2_forensics.memory import GuestMemory, open_guest_memory
from qcow2_forensics.memory.kernel import find_kernel, linux
from tests.conftest import EvidenceCase
from tests.stream_builder import PAGE, page, simple
from tests.test_guest_memory import open_bytes

DEBIAN = "Linux version 6.1.0-9-amd64 (debian-kernel@lists.debian.org) (gcc-12 (Debian 12.2.0-14) 12.2.0, GNU ld) #1 SMP Debian 6.1.27-1 (2023-05-08)"
UBUNTU = "Linux version 6.8.0-31-generic (buildd@host) (x86_64-linux-gnu-gcc-13 (Ubuntu 13.2.0-23ubuntu4) 13.2.0) #31-Ubuntu SMP (2024)"
FEDORA = "Linux version 6.8.5-301.fc40.x86_64 (mockbuild@host) (gcc (GCC) 14.0.1) #1 SMP PREEMPT_DYNAMIC Thu Apr 11"
OTHER = "Linux version 6.8.0$(reboot) (a@b) (gcc) #1 SMP"


def memory_with(content: bytes) -> GuestMemory:
    """A memory in which ``content`` crosses a border of pages."""
    data = (bytes(2 * PAGE - 20) + content).ljust(4 * PAGE, b"\0")
    records = [page(n, data[n * PAGE : (n + 1) * PAGE], "pc.ram" if n == 0 else None) for n in range(4)]
    return open_bytes(simple(records, {"pc.ram": 4 * PAGE}))


@pytest.mark.parametrize(
    ("banner", "package"),
    [
        (DEBIAN, "linux-image-6.1.0-9-amd64-dbg"),
        (UBUNTU, "linux-image-unsigned-6.8.0-31-generic-dbgsym"),
        (FEDORA, "kernel-debuginfo-6.8.5-301.fc40.x86_64"),
    ],
)
def test_a_linux_kernel_names_its_package_and_how_symbols_are_made(banner: str, package: str) -> None:
    found = find_kernel(memory_with(b"Linux version %s (%s)\0" + banner.encode() + b"\n\0"))
    assert found is not None
    assert (found.system, found.identity, found.package) == ("linux", banner, package)
    assert found.symbol_file == f"linux/{banner.split()[2]}.json.xz"
    assert len(found.commands) == 2


def test_a_release_that_a_shell_would_run_makes_no_command() -> None:
    assert linux(OTHER).commands == ()
    assert linux(OTHER).symbol_file == "linux/"


def test_a_windows_kernel_names_its_debug_file() -> None:
    guid = uuid.UUID("3844dbb9-2017-4967-be7a-a4a2c20430fa")
    found = find_kernel(memory_with(b"RSDS" + guid.bytes_le + (2).to_bytes(4, "little") + b"ntkrnlmp.pdb\0"))
    assert found is not None
    assert found.symbol_file == "windows/ntkrnlmp.pdb/3844DBB920174967BE7AA4A2C20430FA-2.json.xz"


def test_a_memory_without_a_kernel_has_none() -> None:
    assert find_kernel(memory_with(b"Linux version of a story")) is None


def test_the_kernel_of_the_case_is_found_at_the_entry_of_system_calls(evidence: EvidenceCase) -> None:
    with open_guest_memory(evidence.image, "during-incident") as memory:
        found = find_kernel(memory, everywhere=False)
        assert found is not None
        assert found.package == "linux-image-6.1.0-56-cloud-amd64-dbg"
        assert memory.read(found.address, 32) == found.identity[:32].encode()
