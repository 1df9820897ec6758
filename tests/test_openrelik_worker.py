"""The example worker for OpenRelik: what it writes, and what it does with images that are none."""

from __future__ import annotations

import base64
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests import qemu

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "examples" / "openrelik_worker"
PACKAGE = "openrelik_worker_example"  # its own name, src, says nothing in this process
needs_openrelik = pytest.mark.skipif(
    importlib.util.find_spec("openrelik_worker_common") is None or importlib.util.find_spec("celery") is None,
    reason="openrelik-worker-common or celery is absent",
)


@pytest.fixture
def package() -> Iterator[str]:
    spec = importlib.util.spec_from_file_location(
        PACKAGE, FOLDER / "src" / "__init__.py", submodule_search_locations=[str(FOLDER / "src")]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    yield PACKAGE
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def work(package: str) -> ModuleType:
    return importlib.import_module(f"{package}.work")


@pytest.fixture
def deleted(tmp_path: Path) -> Path:
    path = qemu.create(tmp_path / "disk.qcow2", "1M")
    qemu.io(path, "write -P 0x11 0 256k")
    qemu.snapshot(path, "alpha")
    qemu.io(path, "write -P 0x22 0 256k")
    qemu.snapshot(path, "alpha", action="-d", opts={"pass-discard-snapshot": "off"})
    return path


@qemu.requires_qemu
def test_worker_writes_reports_and_residue(work: ModuleType, deleted: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = work.examine(deleted, "disk.qcow2", tmp_path / "out", depth="deep", carve=True)
    assert [item.display_name for item in result.files] == ["disk.qcow2.audit.html", "disk.qcow2.audit.json"]
    assert result.summary.startswith("High")
    assert {item.data_type for item in result.residue} == {"qcow2:residue:index", "qcow2:residue:data"}
    assert sorted((tmp_path / "out").iterdir()) == sorted(item.path for item in (*result.files, *result.residue))


def test_worker_reports_a_file_that_is_no_image(work: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x.qcow2").write_bytes(b"nothing")
    result = work.examine(tmp_path / "x.qcow2", "x.qcow2", tmp_path, carve=True)
    assert [finding.code for finding in result.report.findings] == ["QCOW2-UNREADABLE"]
    assert result.error
    assert result.residue == ()


@needs_openrelik
@qemu.requires_qemu
def test_task_gives_openrelik_its_files_and_a_report(package: str, deleted: Path, tmp_path: Path) -> None:
    tasks = importlib.import_module(f"{package}.tasks")
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "evil|<b>.qcow2").write_bytes(b"nothing")
    inputs = [
        {"path": str(deleted), "display_name": "disk.qcow2", "id": 1},
        {"path": str(tmp_path / "evil|<b>.qcow2"), "display_name": "evil|<b>.qcow2", "id": 2},
        {"path": str(tmp_path / "notes.txt"), "display_name": "notes.txt", "id": 3},
    ]
    answer = tasks.audit.apply(
        kwargs={"input_files": inputs, "output_path": str(out), "workflow_id": "7", "task_config": {"depth": ["deep"]}}
    ).get()
    result = json.loads(base64.b64decode(answer))
    assert result["meta"] == {"images": 2}
    assert len(result["output_files"]) == 4
    assert all(Path(item["path"]).is_file() for item in result["output_files"])
    assert {Path(item["path"]) for item in result["output_files"]} == set(out.iterdir())
    content = json.dumps(result["task_report"])
    assert "QCOW2-RECOVERABLE-SNAPSHOT" in content
    assert "<b>" not in content


@needs_openrelik
def test_task_is_registered_under_the_name_openrelik_routes_by(package: str) -> None:
    tasks = importlib.import_module(f"{package}.tasks")
    assert tasks.audit.name == tasks.TASK_NAME
