"""Healthy images made by QEMU give nothing above Low: an auditor that cries wolf is switched off.

Some features are graded Medium by their nature, whatever the state of the image (guest data in
another file, encryption, saved memory). Those codes, and no others, are allowed where QEMU was
asked for the feature. What guests discard and snapshots leave is gone only where the file system
punches holes, as all common ones do.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qcow2_forensics.audit import audit
from qcow2_forensics.findings import Severity
from tests import qemu
from tests.healthy_lives import COMBINATIONS, Life
from tests.matrix import commands, pattern_file
from tests.tiers import every, quick

pytestmark = qemu.requires_qemu
MiB = 1 << 20

OVERLAY = frozenset({"QCOW2-BACKING-FILE"})
ENCRYPTED = frozenset({"QCOW2-ENCRYPTED", "QCOW2-LEGACY-AES", "QCOW2-WEAK-CRYPTO"})
DATA_FILE = frozenset({"QCOW2-EXTERNAL-DATA", "QCOW2-REF-ABSOLUTE", "QCOW2-DATAFILE-RESIDUE"})
MEMORY = frozenset({"QCOW2-SNAPSHOT-VMSTATE"})
OVERWRITTEN = frozenset(
    {"QCOW2-COMPRESSED-SLACK", "QCOW2-RESIDUAL-CLUSTERS"}
)  # deleted data of the guest: QEMU punches no hole there

# --- option combinations -------------------------------------------------------------------------


def loud(path: Path, allowed: frozenset[str] = frozenset()) -> list[str]:
    """Return what an audit says above Low beside what is allowed."""
    report = audit(path, "deep")
    return [finding.code for finding in report.at_least(Severity.MEDIUM) if finding.code not in allowed]


def allowed(life: Life) -> frozenset[str]:
    """Return what is above Low by its nature in such an image, and what overwritten compressed clusters leave."""
    combination = life.combination
    codes = ENCRYPTED if combination.encrypt else DATA_FILE if combination.data_file else frozenset()
    codes |= OVERLAY if combination.backing else frozenset()
    return codes | (OVERWRITTEN if "compress" in life.log else frozenset())


@pytest.mark.parametrize(
    "name", quick(COMBINATIONS, ["luks", *(name for name in list(COMBINATIONS)[::4] if not name.startswith("luks"))])
)
def test_a_written_image_of_any_options_is_quiet(name: str, tmp_path: Path) -> None:
    life = Life(COMBINATIONS[name], len(name), tmp_path / "x.qcow2")
    assert loud(life.path, allowed(life)) == []
    life.write()
    assert loud(life.path, allowed(life)) == []


@pytest.mark.parametrize("name", every(18, COMBINATIONS))
def test_a_life_of_any_operations_with_any_options_is_quiet(name: str, tmp_path: Path) -> None:
    life = Life(COMBINATIONS[name], 4000 + list(COMBINATIONS).index(name), tmp_path / "x.qcow2")
    life.live(6)
    if not life.combination.encrypt:
        assert qemu.check_json(life.path).rc == 0
    assert loud(life.path, allowed(life)) == [], life.log


@pytest.mark.parametrize("name", ["lazy", "lazy, 4k", "lazy, subclusters", "default", "zstd", "version 2, 64k"])
def test_a_killed_writer_leaves_only_what_the_dirty_bit_accounts_for(name: str, tmp_path: Path) -> None:
    life = Life(COMBINATIONS[name], 3, tmp_path / "x.qcow2")
    life.write()
    life.die()
    report = audit(life.path, "deep")
    assert {finding.explained_by for finding in report.at_least(Severity.MEDIUM)} <= {("QCOW2-DIRTY",)}


@pytest.mark.parametrize("cluster", [4096, 65536])
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_a_compressed_image_is_quiet(cluster: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    options = {"compression_type": kind, "cluster_size": cluster}
    qemu.convert(pattern_file(), path, fmt="raw", target_format="qcow2", compressed=True, target_options=options)
    assert loud(path) == []
    qemu.io(path, *_writes("after", MiB))
    # The overwritten streams stay where they were: no fault, but residue that decodes.
    assert loud(path, OVERWRITTEN) == []


# --- life cycles ---------------------------------------------------------------------------------


def _writes(seed: str, size: int, count: int = 12) -> list[str]:
    return list(commands(random.Random(seed).randrange(1 << 30), size, 65536, count=count))


def _snapshots(path: Path) -> None:
    qemu.create(path, 2 * MiB, cluster_size="4k")
    for name in ("a", "b", "c", "d"):
        qemu.io(path, *_writes(name, 2 * MiB))
        qemu.snapshot(path, name)


def _snapshot_deleted(path: Path) -> None:
    _snapshots(path)
    qemu.snapshot(path, "b", action="-d")
    qemu.io(path, *_writes("later", 2 * MiB))


def _rolled_back(path: Path) -> None:
    _snapshots(path)
    qemu.snapshot(path, "a", action="-a")
    qemu.io(path, *_writes("again", 2 * MiB))


def _grown(path: Path) -> None:
    qemu.create(path, MiB, cluster_size="4k")
    qemu.io(path, *_writes("small", MiB))
    qemu.resize(path, 300 * MiB)
    qemu.io(path, "write -P 5 299M 64k")


def _shrunk(path: Path) -> None:
    qemu.create(path, 4 * MiB)
    qemu.io(path, *_writes("large", 4 * MiB))
    qemu.resize(path, 2 * MiB, shrink=True)


def _bitmaps(path: Path) -> None:
    qemu.create(path, 2 * MiB)
    qemu.bitmap(path, "--add", "one", "-g", "65536")
    qemu.io(path, *_writes("one", 2 * MiB))
    qemu.bitmap(path, "--add", "two")
    qemu.io(path, *_writes("two", 2 * MiB))
    qemu.bitmap(path, "--remove", "one")


def _amended(path: Path) -> None:
    qemu.create(path, 2 * MiB, compat="0.10")
    qemu.io(path, *_writes("old", 2 * MiB))
    qemu.amend(path, compat="1.1")
    qemu.io(path, *_writes("new", 2 * MiB))


def _downgraded(path: Path) -> None:
    qemu.create(path, 2 * MiB)
    qemu.io(path, "write -P 1 0 1M", "write -z 512k 128k")
    qemu.amend(path, compat="0.10")


def _refcounts_amended(path: Path) -> None:
    qemu.create(path, 2 * MiB, cluster_size="4k")
    qemu.io(path, *_writes("narrow", 2 * MiB))
    qemu.amend(path, refcount_bits=32)


def _overlay(path: Path) -> None:
    base = qemu.create(path.with_name("base.qcow2"), 2 * MiB)
    qemu.io(base, *_writes("base", 2 * MiB))
    qemu.create(path, backing=base.name, backing_format="qcow2")
    qemu.io(path, *_writes("top", 2 * MiB))


def _committed(path: Path) -> None:
    _overlay(path)
    qemu.img("commit", "-q", path)


def _rebased(path: Path) -> None:
    _overlay(path)
    qemu.img("rebase", "-b", "", path)


def _converted(path: Path) -> None:
    source = path.with_name("source.qcow2")
    _snapshot_deleted(source)
    qemu.convert(source, path, target_format="qcow2", target_options={"cluster_size": "64k"})


def _luks(path: Path) -> None:
    options = {"encrypt.format": "luks", "encrypt.iter-time": 10}
    qemu.create(path, MiB, secret="pw", **options)
    qemu.io(path, f"write -s {pattern_file()} 0 512k", secret="pw")


def _aes(path: Path) -> None:
    qemu.create(path, MiB, secret="pw", encrypt={"format": "aes"})
    qemu.io(path, f"write -s {pattern_file()} 0 512k", secret="pw")


def _data_file(path: Path) -> None:
    qemu.create(path, MiB, data_file=path.with_suffix(".data"))
    qemu.io(path, *_writes("data", MiB))


def _raw_data_file(path: Path) -> None:
    qemu.create(path, MiB, data_file=path.with_suffix(".data"), data_file_raw="on")
    qemu.io(path, *_writes("data", MiB))


def _memory(path: Path) -> None:
    qemu.need("qemu-system-x86_64")
    qemu.create(path, 8 * MiB)
    qemu.io(path, *_writes("disk", 8 * MiB))
    qemu.monitor(path, "savevm one")
    qemu.monitor(path, "savevm two")


def _memory_applied(path: Path) -> None:
    _memory(path)
    qemu.snapshot(path, "one", action="-a")


def _memory_deleted(path: Path) -> None:
    _memory(path)
    qemu.monitor(path, "delvm one", "delvm two")


def _repaired(path: Path) -> None:
    qemu.create(path, MiB, lazy_refcounts="on")
    qemu.io(path, "write -P 1 0 256k", "abort", check=False)
    qemu.img("check", "-q", "-r", "all", path, check=False)


def _daemon_killed(path: Path) -> None:
    """A storage daemon that serves the disk with discards, killed under load, and the repair."""
    qemu.need("qemu-storage-daemon")
    qemu.create(path, 2 * MiB, lazy_refcounts="on", cluster_size="4k")
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        socket = Path(folder) / "nbd"
        node = f"driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.discard=unmap,file.filename={path}"
        export = "type=nbd,id=one,node-name=disk,name=disk,writable=on"
        server = f"addr.type=unix,addr.path={socket}"
        command = ["qemu-storage-daemon", "--blockdev", node, "--nbd-server", server, "--export", export]
        with subprocess.Popen(command) as daemon:
            while not socket.exists():
                assert daemon.poll() is None
                time.sleep(0.02)
            try:
                qemu.io(f"nbd+unix:///disk?socket={socket}", *_writes("served", 2 * MiB), fmt="raw")
            finally:
                daemon.kill()
    qemu.img("check", "-q", "-r", "all", path, check=False)


def _qcow1(path: Path) -> None:
    qemu.create(path, MiB, fmt="qcow")
    qemu.io(path, "write -P 1 0 256k", fmt="qcow")


def _huge_empty(path: Path) -> None:
    qemu.create(path, "1T")


LIVES: dict[str, tuple[Callable[[Path], None], frozenset[str]]] = {
    "snapshots": (_snapshots, frozenset()),
    "snapshot deleted": (_snapshot_deleted, frozenset()),
    "rolled back": (_rolled_back, frozenset()),
    "grown": (_grown, frozenset()),
    "shrunk": (_shrunk, frozenset()),
    "bitmaps": (_bitmaps, frozenset()),
    "upgraded": (_amended, frozenset()),
    "downgraded": (_downgraded, frozenset()),
    "refcounts amended": (_refcounts_amended, frozenset()),
    "overlay": (_overlay, OVERLAY),
    "committed": (_committed, OVERLAY),
    "rebased": (_rebased, frozenset()),
    "converted": (_converted, frozenset()),
    "luks": (_luks, ENCRYPTED),
    "aes": (_aes, ENCRYPTED),
    "data file": (_data_file, DATA_FILE),
    "raw data file": (_raw_data_file, DATA_FILE),
    "memory": (_memory, MEMORY),
    "memory applied": (_memory_applied, MEMORY),
    "memory deleted": (_memory_deleted, frozenset()),
    "repaired": (_repaired, frozenset()),
    "daemon killed": (_daemon_killed, frozenset()),
    "version 1": (_qcow1, frozenset()),
    "huge and empty": (_huge_empty, frozenset()),
}


@pytest.mark.parametrize("name", every(2, LIVES))
def test_a_healthy_life_is_quiet(name: str, tmp_path: Path) -> None:
    live, allowed = LIVES[name]
    path = tmp_path / "x.qcow2"
    live(path)
    assert loud(path, allowed) == []


def test_there_are_at_least_forty_combinations_of_options() -> None:
    assert len(COMBINATIONS) >= 40
    assert len(LIVES) >= 20
