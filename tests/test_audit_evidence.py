"""What evidence says stands in the file stands there, and what it says of an entry is true of it.

Images are made by QEMU and edited byte by byte, or built; see :mod:`tests.image_builder`.
"""

from __future__ import annotations

from pathlib import Path

from qcow2_forensics.audit import audit
from qcow2_forensics.findings import Evidence, Finding
from tests import qemu

pytestmark = qemu.requires_qemu


def told(path: Path, code: str) -> Finding:
    """Return the one finding of a code."""
    (found,) = (finding for finding in audit(path, "deep") if finding.code == code)
    return found


def bytes_of(path: Path, item: Evidence) -> bytes:
    """Return what stands where an item of evidence says it does."""
    assert item.offset is not None
    assert item.length is not None
    return path.read_bytes()[item.offset : item.offset + item.length]


def test_names_in_header_extensions_are_told_with_their_own_place(tmp_path: Path) -> None:
    base = qemu.create(tmp_path / "base.qcow2", "1M")
    overlay = qemu.create(tmp_path / "overlay.qcow2", "1M", backing=base, backing_format="qcow2")
    (item,) = (item for item in told(overlay, "QCOW2-BACKING-FILE").evidence if item.field == "backing format")
    assert (item.value, bytes_of(overlay, item)) == ("qcow2", b"qcow2")
    image = qemu.create(tmp_path / "x.qcow2", "1M", data_file=tmp_path / "x.raw")
    (item,) = (item for item in told(image, "QCOW2-EXTERNAL-DATA").evidence if item.field == "data file name")
    assert (item.value, bytes_of(image, item).decode()) == (str(tmp_path / "x.raw"),) * 2
