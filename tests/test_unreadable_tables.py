"""Where a table cannot be read nobody says that there are none: front doors times damaged structures.

The images are the demo's (two snapshots, made by QEMU) with one structure damaged. Each front door must name the
error; an empty list, ``0`` or "no snapshots" would hide what is there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fuzz.targets import run_command

import qcow2_forensics as q
from qcow2_forensics.cli import demo
from tests import qemu
from tests.image_builder import EXT_BITMAPS, Poke

SNAPSHOTS_AT = 64  # snapshots_offset in the header
FAR = 1 << 40


def _first_entry_lost(poke: Poke) -> None:
    poke.u64(SNAPSHOTS_AT, FAR)


def _second_entry_lost(poke: Poke) -> None:
    second = poke.get(SNAPSHOTS_AT) + 0x50
    poke.u32(second + 36, 0xFFFFFFFF)  # its extra data


def _too_many(poke: Poke) -> None:
    poke.u32(60, 70_000)


DAMAGES: dict[str, Callable[[Poke], None]] = {
    "the first entry is lost": _first_entry_lost,
    "the second entry is lost": _second_entry_lost,
    "more snapshots than QEMU accepts": _too_many,
}
LISTED = {"the second entry is lost": ["baseline"]}  # what can still be read


class Damaged(NamedTuple):
    path: Path
    listed: list[str]


@pytest.fixture(params=DAMAGES)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Damaged:
    demo.write_files(tmp_path)
    path = tmp_path / "demo.qcow2"
    DAMAGES[request.param](Poke(path))
    return Damaged(path, LISTED.get(request.param, []))


NAMES_IT = r"snapshot table entry|nb_snapshots is|extra_data_size is"


@pytest.mark.parametrize("form", ["text", "json", "jsonl", "csv"])
def test_snapshots_lists_what_it_can_read_and_ends_with_the_error(form: str, damaged: Damaged) -> None:
    code, out, err = run_command(["snapshots", str(damaged.path), "--format", form])
    assert code == 2
    assert "file offset 0x" in err
    assert "no snapshots" not in out
    assert all(name in out for name in damaged.listed)
    if form == "text" and not damaged.listed:
        assert "unknown" in out
    if form == "json":
        shown = json.loads(out)
        assert [row["name"] for row in shown] == damaged.listed if damaged.listed else shown is None


def test_info_has_no_list_where_there_is_none_to_read(damaged: Damaged) -> None:
    shown = json.loads(run_command(["info", str(damaged.path), "--format", "json"])[1])
    assert (
        [row["name"] for row in shown["snapshots"]] == damaged.listed if damaged.listed else shown["snapshots"] is None
    )
    assert any(problem["code"] == "QCOW2-SNAPSHOT-TABLE-INVALID" for problem in shown["problems"])


@pytest.mark.parametrize("form", ["body", "jsonl"])
def test_a_timeline_without_some_snapshots_is_incomplete(form: str, damaged: Damaged) -> None:
    code, out, err = run_command(["timeline", str(damaged.path), "--no-files", "--format", form])
    assert code == 2
    assert "dated facts are missing" in err
    assert "file offset 0x" in err
    assert all(name in out for name in damaged.listed)


def test_diff_does_not_choose_a_state_from_a_table_it_cannot_read(damaged: Damaged) -> None:
    code, out, err = run_command(["diff", str(damaged.path)])
    assert (code, out) == (2, "")
    assert "file offset 0x" in err
    assert "no snapshots" not in err


@pytest.mark.parametrize("form", ["json", "jsonl", "text", "html"])
def test_an_audit_does_not_count_what_it_cannot_read(form: str, damaged: Damaged) -> None:
    code, out, _ = run_command(["audit", str(damaged.path), "--format", form])
    assert code == 0
    assert "QCOW2-SNAPSHOT-TABLE-INVALID" in out
    if form in ("json", "jsonl"):
        shown = json.loads(out)
        assert shown.get("image", shown.get("report", {}).get("image"))["snapshots"] is None
    else:
        assert "an unknown number of snapshots" in out


def test_memory_is_not_reported_absent(damaged: Damaged, tmp_path: Path) -> None:
    code, _, err = run_command(["memory", str(damaged.path), str(tmp_path / "memory.raw")])
    assert code == 2
    assert "file offset 0x" in err


def test_a_mount_lists_the_snapshots_as_missing(damaged: Damaged) -> None:
    from qcow2_forensics.mount.folder import ImageFolder, Openers

    def disk(selector: Any, keys: q.Disk | None) -> q.Disk:
        return q.open_disk(damaged.path, selector)

    with ImageFolder(str(damaged.path), Openers(disk, None, None)) as folder:
        assert any("file offset 0x" in sentence for sentence in folder.missing)
        assert "active.raw" in folder.files


def test_pytsk3_states_end_in_an_error(damaged: Damaged) -> None:
    pytest.importorskip("pytsk3", reason="pytsk3 is absent")
    import pytsk3_qcow2

    seen = []
    with pytest.raises(OSError, match="file offset 0x"):
        seen.extend(image.state for image in pytsk3_qcow2.states(damaged.path))
    assert seen == ([] if damaged.listed else ["active"])  # a snapshot of a damaged table is not opened


def test_dfvfs_reports_the_table(damaged: Damaged, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("dfvfs", reason="dfvfs is absent")
    from dfvfs.lib import definitions
    from dfvfs.path import factory

    import dfvfs_qcow2

    spec = factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_OS, location=str(damaged.path))
    spec = factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_QCOW, parent=spec)
    if not damaged.listed:
        with pytest.raises(OSError, match="file offset 0x"):
            dfvfs_qcow2.snapshot_path_specs(spec)
        return
    with caplog.at_level(logging.WARNING):
        assert len(dfvfs_qcow2.snapshot_path_specs(spec)) == len(damaged.listed)
    assert any("file offset 0x" in record.getMessage() for record in caplog.records)


def test_dissect_reports_the_table(damaged: Damaged, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("dissect.target", reason="dissect.target is absent")
    from dissect_qcow2.loader import Qcow2Loader

    with caplog.at_level(logging.WARNING):
        found = list(Qcow2Loader.find_all(damaged.path))
    assert [path.name for path in found[:-1]] == damaged.listed
    assert any("file offset 0x" in record.getMessage() for record in caplog.records)


def test_volatility_does_not_count_what_it_cannot_read(damaged: Damaged, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("volatility3.framework", reason="volatility3 is absent")
    from tests import volatility_tools as tools

    with tools.warnings_of(caplog) as warnings:
        tools.plugin_rows("snapshots.Snapshots", damaged.path)
    assert any("file offset 0x" in warning for warning in warnings)
    rows = tools.plugin_rows("info.Info", damaged.path)
    (count,) = [row["Value"] for row in rows if (row["Subject"], row["Item"]) == ("image", "snapshots")]
    assert count.startswith("unknown")


@qemu.requires_qemu
def test_a_bitmap_directory_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    path = qemu.create(tmp_path / "bitmaps.qcow2", "1M")
    qemu.bitmap(path, "--add", "daily")
    with q.open_image(path) as image:
        at = next(item.offset for item in image.extensions if item.type == EXT_BITMAPS)
    Poke(path).u64(at + 8 + 16, FAR)
    assert json.loads(run_command(["info", str(path), "--format", "json"])[1])["bitmaps"] is None
    assert json.loads(run_command(["audit", str(path), "--format", "json"])[1])["image"]["bitmaps"] is None
    code, out, err = run_command(["timeline", str(path), "--no-files"])
    assert (code, out) == (2, "")
    assert "bitmap" in err
    code, _, err = run_command(["diff", str(path), "--from", "bitmap:daily"])
    assert code == 2
    assert "it holds: none" not in err


# --- other structures -------------------------------------------------------------------------------


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """An image with a backing file, its format, and a bitmap: made by qemu-img, clean."""
    qemu.need("qemu-img")
    (tmp_path / "base.raw").write_bytes(b"x" * 65536)
    path = tmp_path / "overlay.qcow2"
    qemu.img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", str(path), "1M")
    qemu.bitmap(path, "--add", "daily")
    return path


def _info(path: Path) -> tuple[dict[str, Any], str]:
    return json.loads(run_command(["info", str(path), "--format", "json"])[1]), run_command(["info", str(path)])[1]


def _audit(path: Path) -> tuple[dict[str, Any], set[str], str]:
    report = json.loads(run_command(["audit", str(path), "--format", "json"])[1])
    text = " ".join(run_command(["audit", str(path)])[1].split())
    return report, {finding["code"] for finding in report["findings"]}, text


def _doors_refuse(path: Path, message: str) -> None:
    """Every command that reads the disk, or compares states, ends with the error."""
    for command in (
        ["map"],
        ["map", "--format", "json"],
        ["export", str(path.with_name("out.raw"))],
        ["diff"],
        ["diff", "--from", "backing"],
    ):
        code, out, err = run_command([command[0], str(path), *command[1:]])
        assert (command, code, out) == (command, 2, "")
        assert message in err
        assert "file offset 0x" in err
    with pytest.raises(q.Qcow2Error, match=message):
        q.open_disk(path)


def test_a_healthy_image_has_nothing_unreadable(overlay: Path) -> None:
    facts, text = _info(overlay)
    assert facts["unreadable"] == []
    assert "unknown" not in text
    assert _audit(overlay)[0]["image"]["unreadable"] == []


@qemu.requires_qemu
@pytest.mark.parametrize(("kind", "lost"), [(0xE2792ACA, "backing_format"), (EXT_BITMAPS, "bitmaps")])
def test_extensions_behind_one_that_overruns_are_unknown(kind: int, lost: str, overlay: Path) -> None:
    with q.open_image(overlay) as image:
        at = next(item.offset for item in image.extensions if item.type == kind)
    Poke(overlay).u32(at + 4, 0xFFFFF)
    facts, text = _info(overlay)
    assert facts["bitmaps"] is None
    assert facts["backing_file"] == "base.raw"
    assert {lost, "bitmaps"} <= set(facts["unreadable"])
    assert "unknown" in text
    report, codes, text = _audit(overlay)
    assert report["image"]["bitmaps"] is None
    assert lost in report["image"]["unreadable"]
    assert "an unknown number of bitmaps" in text
    assert "QCOW2-EXTENSION-INVALID" in codes
    assert not codes & {"QCOW2-BACKING-NO-FORMAT", "QCOW2-AUTOCLEAR-ODD"}  # both would say that it is absent
    code, out, err = run_command(["timeline", str(overlay), "--no-files"])
    assert (code, out) == (2, "")
    assert "header extension" in err
    _doors_refuse(overlay, "reaches past the header extension area")


@qemu.requires_qemu
@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (8, FAR, "the backing file name lies outside the first cluster"),
        (16, 5000 << 32, "backing_file_size is 5000"),
    ],
)
def test_a_backing_name_that_cannot_be_read_is_not_absent(offset: int, value: int, message: str, overlay: Path) -> None:
    poke = Poke(overlay)
    poke.u64(8, value) if offset == 8 else poke.u32(16, value >> 32)
    facts, text = _info(overlay)
    assert facts["backing_file"] is None
    assert facts["unreadable"] == ["backing_file"]
    assert "backing file     unknown" in text
    report, _, text = _audit(overlay)
    assert report["image"]["unreadable"] == ["backing_file"]
    assert "with a backing file whose name cannot be read" in text
    assert "backing file: cannot be read" in run_command(["audit", str(overlay), "--format", "html"])[1]
    _doors_refuse(overlay, message)


def test_a_backing_name_past_the_end_of_a_short_file_is_not_absent(tmp_path: Path) -> None:
    """A file of the header alone; QEMU would read zeros, which is another name or none."""
    demo.write_files(tmp_path)
    path = tmp_path / "demo.qcow2"
    Poke(path).u64(8, 0x7FF8).u32(16, 20).u32(60, 0).cut(0x8000)
    facts, text = _info(path)
    assert "backing_file" in facts["unreadable"]
    assert "backing file     unknown" in text
    _doors_refuse(path, "the backing file name reaches past the end of the file")


@qemu.requires_qemu
@pytest.mark.parametrize("lost", ["table", "block"])
def test_refcounts_that_cannot_be_read_are_not_a_clean_check(lost: str, overlay: Path) -> None:
    poke = Poke(overlay)
    poke.u64(48 if lost == "table" else poke.get(48), FAR)
    report, codes, text = _audit(overlay)
    theirs = json.loads(qemu.img("check", "--output=json", overlay, check=False).text)
    assert report["check"]["corruptions"] == theirs["corruptions"] > 0
    assert "no errors" not in text
    assert codes & {"QCOW2-HEADER-INVALID", "QCOW2-REFTABLE-INVALID"}
    assert "QCOW2-REFCOUNTS-ABSENT" not in codes  # "the image counts none of its clusters" is not known
    if lost == "table":
        facts, text = _info(overlay)
        assert facts["unreadable"] == ["refcount_table"]
        assert "refcount table   unknown" in text


@qemu.requires_qemu
def test_an_l1_table_past_the_end_maps_nothing_known(overlay: Path) -> None:
    Poke(overlay).u64(40, FAR)
    _doors_refuse(overlay, "the L1 table reaches past the end of the file")
    facts, text = _info(overlay)
    assert facts["unreadable"] == ["l1_table"]
    assert "l1 table         unknown" in text
    report, codes, text = _audit(overlay)
    assert report["check"]["corruptions"] > 0
    assert "QCOW2-HEADER-INVALID" in codes
    assert "an unknown number of 16 clusters allocated" in text
