"""Hostile images give the findings they are listed with, and cost little; nothing makes an audit raise."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest

from qcow2_forensics.audit import audit, audit_path
from qcow2_forensics.errors import ReadError
from qcow2_forensics.findings import Report, Severity
from qcow2_forensics.format.source import BytesSource
from tests import hostile, qemu
from tests.image_builder import base_b
from tests.tiers import every, quick
from tests.traps import TRAPS

pytestmark = qemu.requires_qemu


def codes(report: Report) -> set[str]:
    return {finding.code for finding in report}


@pytest.mark.parametrize("ident", quick(hostile.IMAGES, hostile.REPRESENTATIVE))
def test_each_hostile_image_gives_the_findings_listed_for_it(ident: str, tmp_path: Path) -> None:
    report = audit(hostile.build(ident, tmp_path), "deep")
    assert hostile.IMAGES[ident].findings <= codes(report)
    assert "QCOW2-AUDIT-INCOMPLETE" not in codes(report), report.to_json()


# Runs in a process of its own: peak memory is that of one audit, and an endless one can be ended.
_COST = """
import sys
from pathlib import Path
from tests.peak_memory import peak_mib
from tests.traps import TRAPS
from tests.work import at_most
from qcow2_forensics.audit import audit, catalog
from qcow2_forensics.format.source import FileSource

catalog()
path = TRAPS[sys.argv[1]].build(Path(sys.argv[2]))
stored = 512 * path.stat().st_blocks
read, given = FileSource.read, 0

def counted(self, offset, length, /):
    global given
    data = read(self, offset, length)
    given += len(data)
    return data

FileSource.read = counted
before = peak_mib()
with at_most(1_000_000 + 8 * stored):
    audit(path, "standard")
print(given - 16 * stored >> 20, peak_mib() - before)
"""


# Making a LUKS image takes seconds; one stands for all.
_COSTLY = [ident for ident in TRAPS if not ident.startswith("LUKS") or ident == "LUKS-TIME"]


@pytest.mark.parametrize("ident", quick(_COSTLY, ["BOMB"]))
def test_a_trap_costs_little_work_and_memory(ident: str, tmp_path: Path) -> None:
    if ident.startswith("LUKS"):
        pytest.importorskip("cryptography")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _COST, ident, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    read_beside_what_is_stored, memory = map(int, run.stdout.split())  # MiB; 16 times what is stored is as promised
    assert read_beside_what_is_stored < 32
    assert memory < 200


# --- what cannot be read at all ------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"QFI", b"QFI\xfb", b"a text file\n" * 99, bytes(4096)])
def test_a_file_that_is_no_image_is_a_report_with_a_finding(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    report = audit(path)
    assert codes(report) == {"QCOW2-UNREADABLE"}
    assert report.image["file_size"] == len(content)
    assert report.worst is Severity.HIGH


def test_a_missing_file_and_a_folder_are_reports_with_a_finding(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.qcow2", tmp_path):
        assert codes(audit(path)) == {"QCOW2-UNREADABLE"}


def test_an_image_cut_anywhere_in_its_metadata_is_reported(tmp_path: Path) -> None:
    whole = base_b(tmp_path / "b.qcow2").read_bytes()
    for size in (8, 9, 47, 71, 100, 104, 300, 0x10001, 0x20003, 0x30001, 0x40010):
        report = audit(BytesSource(whole[:size]), "deep")
        assert report.worst is not None
        assert report.worst >= Severity.HIGH


class _Failing:
    """A source whose second half cannot be read, like a disk with bad sectors."""

    def __init__(self, data: bytes, bad: int) -> None:
        self._data, self._bad, self.size = data, bad, len(data)

    def read(self, offset: int, length: int, /) -> bytes:
        if offset + length > self._bad:
            raise ReadError("bad sector", offset=offset, length=length)
        return self._data[offset : offset + length]


@pytest.mark.parametrize("bad", [0, 100, 5000, 0x10010, 0x30000, 0x40008, 0x60000])
def test_media_that_cannot_be_read_give_findings_and_no_exception(bad: int, tmp_path: Path) -> None:
    whole = base_b(tmp_path / "b.qcow2").read_bytes()
    report = audit(_Failing(whole, bad), "deep")
    assert codes(report) & {"QCOW2-UNREADABLE", "QCOW2-AUDIT-INCOMPLETE"}
    report.to_json()


@pytest.mark.parametrize(("seed", "rounds"), every(2, [(7, 30), (8, 150)], unpack=True))
def test_random_bytes_behind_the_magic_never_raise(seed: int, rounds: int, tmp_path: Path) -> None:
    whole = bytearray(base_b(tmp_path / "b.qcow2").read_bytes())
    generator = random.Random(seed)
    for _ in range(rounds):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 30)):
            data[generator.randrange(4, generator.choice((112, 1024, len(data))))] = generator.randrange(256)
        audit(BytesSource(bytes(data)), "deep").to_json()


# --- reports -------------------------------------------------------------------------------------


def test_an_audit_and_its_report_cross_process_borders(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    function = pickle.loads(pickle.dumps(audit_path))
    report = function(str(path))
    assert pickle.loads(pickle.dumps(report)) == report
    assert report == audit(path)


def test_the_same_image_gives_the_same_report_from_any_kind_of_source(tmp_path: Path) -> None:
    path = base_b(tmp_path / "b.qcow2")
    with path.open("rb") as stream:
        reports = [audit(origin) for origin in (path, str(path), stream, BytesSource(path.read_bytes()))]
    assert all(codes(report) == codes(reports[0]) for report in reports)
