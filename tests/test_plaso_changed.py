"""``--qcow_snapshots changed``: of a snapshot only the files that no later state has in the same way.

The file systems are changed by the kernel between the snapshots; what it shows of each state says which files
are the same. What log2timeline extracts is compared with what it extracts with ``all``.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plaso")
pytest.importorskip("dfvfs")

from dfvfs.helpers import volume_scanner
from dfvfs.path import factory
from dfvfs.resolver import context, resolver

import dfvfs_qcow2
from dfvfs_qcow2 import later_states, plaso_changed
from dfvfs_qcow2.selection import VARIABLE, Selection
from qcow2_forensics.format.image import Image
from tests import guest_disks, plaso_tools, qemu
from tests.filesystems import MIB
from tests.guest_disks import Disk, Seen
from tests.plaso_tools import Variant, log2timeline
from tests.tiers import every

assert dfvfs_qcow2

State = tuple[str | None, Path, dict[str, dict[str, Seen]]]  # name, raw disk, what the kernel shows of each volume


def first(folder: Path) -> None:
    for number in range(60):
        place = folder / f"folder{number % 6}"
        place.mkdir(exist_ok=True)
        (place / f"file{number}").write_bytes(os.urandom(number * 500))
    (folder / "log").write_text("2026-05-01T00:00:00.000000+00:00 host program[1]: message\n" * 40)
    (folder / "reverted").write_text("as it was\n")
    os.utime(folder / "reverted", (1_700_000_000, 1_700_000_000))
    (folder / "removed").write_text("only before\n" * 900)
    with (folder / "sparse").open("wb") as stream:
        stream.truncate(3 * MIB)
        stream.seek(MIB)
        stream.write(b"x" * 5000)
    os.symlink("log", folder / "link")
    database = sqlite3.connect(folder / "notes.sqlite", isolation_level=None)
    database.execute("CREATE TABLE notes (id INTEGER)")
    database.close()


def second(folder: Path) -> None:
    with (folder / "log").open("a") as stream:
        stream.write("2026-05-02T00:00:00.000000+00:00 host program[2]: more\n")
    (folder / "removed").unlink()
    (folder / "dropped").write_bytes(os.urandom(70_000))
    os.rename(folder / "folder1", folder / "renamed")  # the files in it stay as they are
    with (folder / "folder2/file8").open("r+b") as stream:  # bytes alone differ
        info = os.fstat(stream.fileno())
        stream.seek(100)
        stream.write(b"patched")
    os.utime(folder / "folder2/file8", ns=(info.st_atime_ns, info.st_mtime_ns))


def third(folder: Path) -> None:
    (folder / "dropped").unlink()
    os.utime(folder / "folder3/file9", (1_600_000_000, 1_600_000_000))
    (folder / "later").write_text("later\n")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def make_states(folder: Path, build: Callable[[Path, int], State], count: int = 3) -> tuple[Path, list[State]]:
    states = [build(folder, number) for number in range(count)]
    return guest_disks.states(folder / "disk.qcow2", [(name, raw) for name, raw, _ in states]), states


def _one_volume(kind: str, size: int) -> Callable[[Path, int], State]:
    def build(folder: Path, number: int) -> State:
        before = folder / f"{kind}{number - 1}.raw"
        disk = (
            Disk(before, kind).copy(f"{kind}{number}.raw")
            if number
            else guest_disks.make(folder, kind, size, f"{kind}0.raw")
        )
        disk.change([first, second, third][number])
        raw = folder / f"disk{number}.raw"
        guest_disks.partitioned(raw, [disk.path])
        return ["one", "two", None][number], raw, {"": disk.tree()}

    return build


def file_systems(image: Path, wanted: str) -> list[Any]:
    options = volume_scanner.VolumeScannerOptions()
    options.qcow_snapshots, options.partitions, options.volumes, options.snapshots = wanted, ["all"], ["all"], ["none"]
    return volume_scanner.VolumeScanner().GetBasePathSpecs(str(image), options=options)


def walk(entry: Any) -> Iterator[Any]:
    for sub in entry.sub_file_entries:
        yield sub
        if sub.IsDirectory():
            yield from walk(sub)


def processed(folder: Any, resolver_context: Any) -> set[str]:
    """The locations that workers would process below a folder."""
    found = set()
    states = later_states.states_of(folder, resolver_context)
    for entry in (plaso_changed._Folder(folder, states) if states else folder).sub_file_entries:
        if entry.IsDirectory():
            found |= processed(entry, resolver_context)
        if not plaso_changed.repeats(entry, resolver_context):
            found.add(entry.path_spec.location.replace("\\", "/"))
    return found


def expected(states: list[State], number: int, volume: str) -> set[str]:
    """The locations that the kernel shows otherwise, or not at all, in the next and in the last state."""
    tree = states[number][2][volume]
    others = [states[later][2][volume] for later in {number + 1, len(states) - 1} if later < len(states)]
    return {path for path, item in tree.items() if all(other.get(path) != item for other in others)}


@qemu.requires_qemu
@pytest.mark.parametrize(("kind", "size"), every(3, [("ext4", 24), ("xfs", 64), ("ntfs", 24)], unpack=True))
def test_files_that_are_processed_are_those_that_no_later_state_has(
    kind: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, states = make_states(tmp_path, _one_volume(kind, size * MIB))
    monkeypatch.setenv(VARIABLE, "changed")
    active, *snapshots = file_systems(image, "changed")
    resolver_context = context.Context()
    root = resolver.Resolver.OpenFileEntry(active, resolver_context=resolver_context)
    assert processed(root, resolver_context) >= set(states[-1][2][""])
    for number, spec in enumerate(snapshots):
        root = resolver.Resolver.OpenFileEntry(spec, resolver_context=resolver_context)
        found = {path for path in processed(root, resolver_context) if not path.startswith("/$")}
        wanted = expected(states, number, "")
        folders = {path for path, item in states[number][2][""].items() if item.type == "d"}
        assert {path for path in found - folders if path != "/lost+found"} == wanted - folders
        assert found < set(states[number][2][""])
        assert "/folder2/file8" not in found or number == 0
        assert ("/renamed/file7" in found) is False
    assert "/folder1/file7" in expected(states, 0, "")


class Rows:
    """Keeps the events that a parser gives, in place of plaso's mediator."""

    def __init__(self, entry: Any, resolver_context: Any) -> None:
        self.resolver_context = resolver_context
        self.rows: list[str] = []
        self._entry = entry

    def GetFileEntry(self) -> Any:  # noqa: N802 - plaso's names
        return self._entry

    def GetDisplayName(self) -> str:  # noqa: N802
        return "NTFS:$MFT"

    def GetRelativePath(self) -> str:  # noqa: N802
        return "$MFT"

    def ProduceEventData(self, event_data: Any, **_: Any) -> None:  # noqa: N802
        values = {name: getattr(value, "timestamp", value) for name, value in event_data.GetAttributes()}
        self.rows.append(repr(sorted(values.items())))

    def ProduceWarning(self, message: str) -> None:  # noqa: N802
        raise AssertionError(message)


def mft_rows(root: Any) -> list[str]:
    resolver_context = context.Context()
    spec = factory.Factory.NewPathSpec("NTFS", location="\\$MFT", parent=root.parent)
    entry = resolver.Resolver.OpenFileEntry(spec, resolver_context=resolver_context)
    mediator = Rows(entry, resolver_context)
    from plaso.parsers import ntfs  # brings all parsers, which takes two seconds

    ntfs.NTFSMFTParser().ParseFileObject(mediator, entry.GetFileObject())
    return mediator.rows


@qemu.requires_qemu
def test_records_of_an_mft_give_the_rows_that_no_later_state_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, _ = make_states(tmp_path, _one_volume("ntfs", 24 * MIB))
    specs = file_systems(image, "changed")
    active, one, two = (mft_rows(spec) for spec in specs)
    monkeypatch.setenv(VARIABLE, "changed")
    found_active, found_one, found_two = (mft_rows(spec) for spec in specs)
    assert found_active == active
    assert found_one == [row for row in one if row not in {*two, *active}]
    assert found_two == [row for row in two if row not in active]
    assert 0 < len(found_two) < len(two) / 4
    assert any("folder1" in row for row in found_one)  # renamed: a path of files whose records did not change
    assert any("dropped" in row for row in found_two)
    monkeypatch.setenv(VARIABLE, "one,changed:two")
    assert mft_rows(specs[1]) == one


# --- the words -----------------------------------------------------------------------------------


@pytest.fixture
def named_image(tmp_path: Path) -> Callable[..., Image]:
    qemu.need()

    def make(*names: str) -> Image:
        path = qemu.create(tmp_path / "named.qcow2", MIB)
        for name in names:
            qemu.snapshot(path, name)
        return Image(path)

    return make


def plan(text: str, image: Image) -> dict[int, list[int | None]]:
    found = Selection(text).later_states(image)
    return {key.place: [None if later is None else later.place for later in states] for key, states in found.items()}


def test_each_snapshot_is_compared_with_the_next_one_asked_for_and_with_the_active_state(
    named_image: Callable[..., Image],
) -> None:
    image = named_image("one", "two", "three")
    assert plan("changed", image) == {0: [1, None], 1: [2, None], 2: [None]}
    assert plan("changed:one,changed:three", image) == {0: [2, None], 2: [None]}
    assert plan("one,changed:two", image) == {1: [None]}
    assert plan("all", image) == plan("none", image) == {}
    assert plan("CHANGED", image) == plan("changed:all", image) == plan("changed", image)
    assert [entry.name for entry in Selection("changed:#2..#3").choose(image)] == ["two", "three"]


def test_words_may_be_in_upper_case_unless_a_snapshot_is_called_so(named_image: Callable[..., Image]) -> None:
    from qcow2_forensics.errors import SnapshotNotFound

    image = named_image("one", "two")
    assert len(Selection("All").choose(image)) == 2
    assert not Selection("None").wants_any
    image = named_image("All", "changed")
    assert [entry.name for entry in Selection("All").choose(image)] == ["All"]
    assert len(Selection("all").choose(image)) == 2
    with pytest.raises(SnapshotNotFound, match="name:changed|=changed|2 \\(changed\\)"):
        Selection("changed").choose(image)
    assert plan("=changed", image) == {0: [1, None], 1: [None]}


def test_names_with_commas_are_items_of_a_list(named_image: Callable[..., Image]) -> None:
    from qcow2_forensics.errors import SnapshotNotFound

    image = named_image("a,b", "c", "d, e, f")
    for text in ("a,b,c", "c,a,b", "c, a,b", "name:a,b,c", "changed:a,b,c"):
        assert [entry.name for entry in Selection(text).choose(image)] == ["a,b", "c"]
    assert [entry.name for entry in Selection("d, e, f,a,b").choose(image)] == ["a,b", "d, e, f"]
    assert plan("c,changed:a,b", image) == {0: [1, None]}
    image = named_image("a,b", "a", "b")
    for text in ("a,b", "name:a,b"):
        with pytest.raises(SnapshotNotFound, match=r"1 \(a,b\)"):
            Selection(text).choose(image)
    assert [entry.name for entry in Selection("1").choose(image)] == ["a,b"]


# --- log2timeline --------------------------------------------------------------------------------


def stripped(lines: list[str]) -> set[str]:
    """The lines without the state that they are of."""
    return {re.sub(r"QCOW2-SNAPSHOT\d+\[[^]]*\]:", "", line) for line in plaso_tools.evidence_lines(lines)}


@pytest.mark.slow
@qemu.requires_qemu
@pytest.mark.parametrize(("kind", "size", "method"), [("ext4", 24, "fork"), ("xfs", 64, "spawn"), ("ntfs", 24, "fork")])
def test_rows_of_changed_are_those_of_all_without_repeats(kind: str, size: int, method: str, tmp_path: Path) -> None:
    image, _ = make_states(tmp_path, _one_volume(kind, size * MIB))
    runs = {
        wanted: log2timeline(Variant(image), tmp_path / wanted, "--qcow_snapshots", wanted, start_method=method)
        for wanted in ("none", "all", "changed")
    }
    assert all(run.rc == 0 for run in runs.values())
    lines = {wanted: plaso_tools.evidence_lines(run.lines) for wanted, run in runs.items()}
    assert stripped(lines["changed"]) == stripped(lines["all"])
    assert set(lines["none"]) <= set(lines["changed"]) <= set(lines["all"])
    count = {wanted: len(found) for wanted, found in lines.items()}
    assert 0 < count["changed"] - count["none"] < (count["all"] - count["none"]) / 2
