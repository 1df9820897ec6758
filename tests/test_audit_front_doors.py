"""One image gives one set of findings, however it is handed to the auditor."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from qcow2_forensics.audit import audit
from qcow2_forensics.findings import Finding, Severity
from qcow2_forensics.format.image import Image
from qcow2_forensics.format.source import FileSource
from tests import hostile, qemu
from tests.damage import Bases, damaged
from tests.image_builder import EXT_BACKING_FORMAT, Poke, base_b
from tests.tiers import every

pytestmark = qemu.requires_qemu

CHOSEN = random.Random(16).sample(sorted(hostile.IMAGES), 30)


class PathSource:
    """A source as an adapter makes it: it knows its path and nothing else of the file."""

    def __init__(self, path: Path) -> None:
        self.path = os.fspath(path)
        self.name = path.name
        self.identity = f"file://{path}"
        self._data = path.read_bytes()
        self.size = len(self._data)

    def read(self, offset: int, length: int, /) -> bytes:
        return self._data[offset : offset + length]


def reported(findings: Any) -> list[tuple[Any, ...]]:
    """What an examiner would compare: code, severity, title, count and evidence."""

    def shown(finding: Finding) -> tuple[Any, ...]:
        return finding.code, finding.severity, finding.title, finding.count, finding.evidence

    return [shown(finding) for finding in findings]


def ask_every_door(path: Path, depth: str = "deep") -> None:
    wanted = reported(audit(path, depth))
    assert reported(audit(str(path), depth)) == wanted
    source = FileSource(path)
    with Image(FileSource(path)) as image:
        assert reported(audit(image, depth)) == wanted
    assert reported(audit(source, depth)) == wanted
    assert reported(audit(PathSource(path), depth)) == wanted
    source.close()


@pytest.mark.parametrize("ident", every(3, CHOSEN))
def test_hostile_images_give_the_same_findings_through_every_door(tmp_path: Path, ident: str) -> None:
    path = hostile.build(ident, tmp_path)
    try:
        Image(path).close()
    except (OSError, ValueError):
        pytest.skip("not an image at all")
    ask_every_door(path)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("seed", every(5, range(5000, 5020)))
def test_damaged_images_give_the_same_findings_through_every_door(tmp_path: Path, seed: int, bases: Bases) -> None:
    ask_every_door(damaged(seed, bases, tmp_path).path)


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """An image whose absolute backing file name is also that of a file beside it."""
    path = tmp_path / "disk.qcow2"
    base_b(path)
    base_b(tmp_path / "base.qcow2")
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2")], b"/elsewhere/base.qcow2")
    return path


def test_an_absolute_name_of_a_file_beside_the_image_is_low_through_every_door(named: Path) -> None:
    ask_every_door(named, "triage")
    with Image(FileSource(named)) as image:
        found = [finding for finding in audit(image) if finding.code == "QCOW2-REF-ABSOLUTE"]
    assert [finding.severity for finding in found] == [Severity.LOW]


def test_a_loop_is_found_through_every_door(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    base_b(path)
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2")], b"disk.qcow2")
    ask_every_door(path, "triage")
    assert "QCOW2-REF-SELF" in {finding.code for finding in audit(PathSource(path), "triage")}


def test_dfvfs_gives_the_same_findings(named: Path) -> None:
    pytest.importorskip("dfvfs")
    from dfvfs.lib import definitions
    from dfvfs.path.factory import Factory

    import dfvfs_qcow2

    spec = Factory.NewPathSpec(definitions.TYPE_INDICATOR_OS, location=str(named))
    qcow = Factory.NewPathSpec(definitions.TYPE_INDICATOR_QCOW, parent=spec)
    assert reported(dfvfs_qcow2.audit(qcow).findings) == reported(audit(named))


def test_pytsk3_gives_the_same_findings(tmp_path: Path) -> None:
    pytest.importorskip("pytsk3")
    import pytsk3_qcow2

    path = tmp_path / "disk.qcow2"
    base_b(path)
    with pytsk3_qcow2.Img_Info(str(path)) as image:
        assert reported(image.findings) == reported(audit(path))


def test_volatility_gives_the_same_findings(named: Path) -> None:
    pytest.importorskip("volatility3.framework")
    from tests.volatility_tools import add_file, common, new_context

    context = new_context()
    layer = context.layers[add_file(context, named.as_uri())]
    assert reported(audit(common.source_under(layer))) == reported(audit(named))
