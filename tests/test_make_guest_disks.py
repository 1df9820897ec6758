"""Disks of every kind, in four known states: diff and timeline say of them what the mounted file systems show.

So does ``diff`` of the dirty bitmap that QEMU keeps from a state to the next.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import guest_disks, qemu

KINDS = (
    *("ext4", "xfs", "btrfs", "ntfs", "exfat", "lvm", "lvm-plain", "luks", "swap"),
    *("luks-in-lvm", "lvm-in-luks", "hybrid", "ntfs-short", "hfsplus"),
)
TOOL = Path(__file__).parent.parent / "tools" / "make_guest_disks.py"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run(
        [sys.executable, TOOL, folder, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=1200,
    )


@pytest.mark.slow
@qemu.requires_qemu
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_listed_is_what_the_kernel_shows(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("dfvfs", reason="dfVFS is absent")
    guest_disks.need_mounts()
    done = run(tmp_path, kind, "--check", "--bitmaps")
    if "skipped: " in done.stdout:
        pytest.skip(done.stdout.splitlines()[0])
    assert done.stdout.endswith("as the kernel has it\n"), done.stdout + done.stderr
    assert done.returncode == 0
