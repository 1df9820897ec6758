"""dissect reads every state of a QCOW2 image through our container and loader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qcow2_forensics import Qcow2Error, SnapshotNotFound, open_image
from qcow2_forensics.cli import demo
from qcow2_forensics.reader.states import find_snapshot
from tests import filesystems, guest_disks, qemu
from tests.guest_disks import need_mounts
from tests.image_builder import EXT_BACKING_FORMAT, PASSPHRASE, Builder, Poke, empty
from tests.tiers import every

pytest.importorskip("dissect.target", reason="dissect.target is absent")
pytest.importorskip("dissect.extfs", reason="dissect.extfs is absent")

from dissect.target import Target, container
from dissect.target.exceptions import ContainerError, TargetError
from dissect.target.filesystem import VirtualFilesystem
from dissect.target.helpers import keychain
from dissect.target.helpers.fsutil import TargetPath

import dissect_qcow2
from dissect_qcow2 import Qcow2Container
from dissect_qcow2.loader import Qcow2Loader, image_and_state, state_names

dissect_qcow2.register()

ROOT = Path(__file__).parents[1]


@pytest.fixture
def keys() -> Iterator[list[keychain.Key]]:
    """dissect's keychain, emptied afterwards."""
    yield keychain.KEYCHAIN
    keychain.KEYCHAIN.clear()


def guest(folder: Path, name: str, *users: str) -> Path:
    """Return a raw disk of a small Linux with these users."""
    made = filesystems.make(folder, "ext4", f"{name}.ext4", populated=False)
    for inside in ("etc", "var", "opt", "home", "usr", "bin", "tmp"):
        made.folder(inside)
    lines = [f"{user}:x:{number}:{number}::/home/{user}:/bin/sh\n" for number, user in enumerate(users, 1000)]
    made.put("etc/passwd", "".join(lines).encode())
    made.put("etc/hostname", b"victim\n")
    return filesystems.disk_of(folder, [made], f"{name}.raw")[0]


@pytest.fixture
def linux(tmp_path: Path) -> Path:
    """An image with the snapshot ``before`` (user alice) and an active state (alice and mallory)."""
    states = [("before", guest(tmp_path, "one", "alice")), (None, guest(tmp_path, "two", "alice", "mallory"))]
    return filesystems.states_of(tmp_path / "disk.qcow2", states)


def users(target: Target) -> list[str]:
    return [user.name for user in target.users()]


def contents(opened: container.Container) -> bytes:
    opened.seek(0)
    return opened.read(opened.size)


def test_each_state_is_a_target_that_says_which_it_is(linux: Path) -> None:
    found = {str(target.path): users(target) for target in Target.open_all(linux)}
    assert found == {f"{linux}/before": ["alice"], str(linux): ["alice", "mallory"]}
    assert list(found) == [f"{linux}/before", str(linux)]


@pytest.mark.parametrize("first", ["dissect_qcow2.container", "dissect_qcow2.loader", "dissect.target.loader"])
def test_container_and_loader_are_in_place_whichever_module_is_imported_first(first: str) -> None:
    code = (
        "import qcow2_forensics_autoload as hook; hook.install()\n"
        f"import {first}\n"
        "from dissect.target import container, loader\n"
        "print(container.CONTAINERS[0].__module__, loader.LOADERS[0].__module__)"
    )
    paths = [str(ROOT / "src"), str(ROOT / "plugins/dissect"), str(ROOT / "plugins/autoload")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    assert (done.stdout, done.stderr) == ("dissect_qcow2.container dissect_qcow2.loader\n", "")


BY_HAND = {"QCOW2_FORENSICS_AUTOLOAD": "0", "DISSECT_PLUGINS": "plugins/dissect/dissect_qcow2/plugin.py"}
START = "import sys, qcow2_forensics_autoload as hook; hook.install(); sys.argv[0] = 'target-query'; "


def target_query(image: Path, function: str, **variables: str) -> list[tuple[str, str]]:
    """Run ``target-query``; return the state and the user or path of each record."""
    start = START + "from dissect.target.tools.query import main; main()"
    command = [sys.executable, "-P", "-c", start, "-q", "-j", "-f", function, str(image)]
    paths = [str(ROOT / "src"), str(ROOT / "plugins/dissect"), str(ROOT / "plugins/autoload")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment, cwd=ROOT)
    records = [record for line in done.stdout.splitlines() if "_source" in (record := json.loads(line))]
    key = "name" if function == "users" else "path"
    return [(Path(record["_source"]).name, record[key]) for record in records]


USERS = [("before", "alice"), ("disk.qcow2", "alice"), ("disk.qcow2", "mallory")]


@pytest.mark.slow
@pytest.mark.parametrize("variables", every(2, [{}, BY_HAND]), ids=["hook", "DISSECT_PLUGINS"])
def test_target_query_lists_the_users_of_every_state(linux: Path, variables: dict[str, str]) -> None:
    assert target_query(linux, "users", **variables) == USERS


@pytest.mark.slow
def test_target_query_lists_the_users_of_every_state_of_an_xfs_guest(tmp_path: Path) -> None:
    need_mounts()
    filesystems.need_tools("mkfs.xfs")
    pytest.importorskip("dissect.xfs", reason="dissect.xfs is absent")
    raws = []
    first = guest_disks.Disk(tmp_path / "one.xfs", "xfs")
    with first.path.open("wb") as stream:
        stream.truncate(300 << 20)  # the least that mkfs.xfs makes
    qemu.run("mkfs.xfs", "-q", first.path)
    for made, names in ((first, ["alice"]), (None, ["alice", "mallory"])):
        disk = made or first.copy("two.xfs")
        with disk.mounted(writing=True) as folder:
            for inside in ("etc", "var", "opt", "home", "usr", "bin", "tmp"):
                (folder / inside).mkdir(exist_ok=True)
            lines = [f"{name}:x:{number}:{number}::/home/{name}:/bin/sh\n" for number, name in enumerate(names, 1000)]
            (folder / "etc/passwd").write_text("".join(lines))
        raws.append(disk.path)
    image = filesystems.states_of(tmp_path / "disk.qcow2", [("before", raws[0]), (None, raws[1])])
    assert target_query(image, "users") == USERS


@pytest.mark.slow
def test_target_query_walks_every_state_of_the_demo(tmp_path: Path) -> None:
    demo.write_files(tmp_path)
    found = target_query(tmp_path / "demo.qcow2", "walkfs")
    expected = {
        "baseline": {"plan.txt", "secret_key.txt"},
        "intrusion": {"plan.txt", ".cache_helper"},
        "demo.qcow2": {"plan.txt", "readme.txt"},
    }
    listed = {state: {Path(path).name for at, path in found if at == state and "/alice/" in path} for state in expected}
    assert listed == expected
    assert {state for state, _ in found} == set(expected)


@pytest.mark.parametrize("state", ["before", "1", "index:0"])
def test_a_state_is_opened_by_its_path(linux: Path, state: str) -> None:
    assert users(Target.open(linux / state)) == ["alice"]


def test_a_state_that_is_not_there_is_an_error(linux: Path) -> None:
    with pytest.raises(TargetError):
        Target.open(linux / "never")


def test_a_library_user_opens_any_state_as_a_container(linux: Path) -> None:
    with Qcow2Container(linux, snapshot="before") as opened:
        assert contents(opened) == qemu.raw_bytes(linux, snapshot="before")
        target = Target()
        target.disks.add(opened)
        target.apply()
        assert users(target) == ["alice"]


@pytest.mark.parametrize(
    "options", [{"extended_l2": "on"}, {"compat": "0.10"}, {"cluster_size": "512"}, {"compression_type": "zstd"}]
)
def test_container_reads_what_qemu_reads(make_image: Callable[..., Path], options: dict[str, str]) -> None:
    image = make_image("disk.img", "2M", "write -P 1 0 100k", "write -P 2 1M 33k", **options)
    with container.open(image) as opened:
        assert isinstance(opened, Qcow2Container)
        assert contents(opened) == qemu.raw_bytes(image)


def test_a_grown_overlay_keeps_its_size(make_image: Callable[..., Path]) -> None:
    base = make_image("base.qcow2", "1M", "write -P 1 0 1M")
    overlay = make_image("overlay.qcow2", "3M", "write -P 2 2M 64k", backing=base, backing_fmt="qcow2")
    with container.open(overlay) as opened:
        assert opened.size == 3 << 20
        assert contents(opened) == qemu.raw_bytes(overlay)


@pytest.mark.slow
def test_an_encrypted_image_takes_its_passphrase_from_the_keychain(
    make_image: Callable[..., Path], keys: list[keychain.Key]
) -> None:
    pytest.importorskip("cryptography")
    image = make_image("locked.qcow2", "1M", "write -P 7 0 64k", secret=PASSPHRASE)
    with pytest.raises(ContainerError) as failure:
        container.open(image)
    assert "(LUKS): dissect's keychain holds no passphrase; give -K" in str(failure.value.__cause__)
    for value in ("wrong", PASSPHRASE):
        keychain.register_key(keychain.KeyType.PASSPHRASE, value)
    with container.open(image) as opened:
        assert contents(opened) == qemu.raw_bytes(image, secret=PASSPHRASE)


def inside(files: dict[str, Path]) -> VirtualFilesystem:
    """Return a file system of dissect's that holds these files."""
    fs = VirtualFilesystem()
    for name, path in files.items():
        fs.map_file(name, str(path))
    return fs


def test_an_image_inside_another_target_finds_its_backing_file_there(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_image("base.qcow2", "1M", "write -P 1 0 1M")
    overlay = make_image("overlay.qcow2", "1M", "write -P 2 0 64k", backing="base.qcow2", backing_fmt="qcow2")
    expected = qemu.raw_bytes(overlay)
    fs = inside({"vms/overlay.qcow2": overlay, "vms/base.qcow2": base})
    with container.open(fs.path("/vms/overlay.qcow2")) as opened:
        assert contents(opened) == expected


def test_an_image_inside_another_target_opens_nothing_outside_its_folder(make_image: Callable[..., Path]) -> None:
    base = make_image("base.qcow2", "1M")
    overlay = make_image("overlay.qcow2", "1M")
    qemu.img("rebase", "-u", "-F", "qcow2", "-b", "../secret.qcow2", overlay)
    fs = inside({"vms/overlay.qcow2": overlay, "secret.qcow2": base})
    place = fs.path("/vms/overlay.qcow2")
    assert isinstance(place, TargetPath)
    with pytest.raises(ContainerError) as failure:
        container.open(place)
    assert "outside the folder" in str(failure.value.__cause__)


@pytest.mark.parametrize("name", [b"loop", b"loop/x", b"folder", b"disk.qcow2/x", b"n" * 1000, b"\xff", b"outside"])
def test_a_name_that_leads_nowhere_inside_another_target_is_an_error_of_ours(name: bytes, tmp_path: Path) -> None:
    overlay = empty(tmp_path / "disk.qcow2")
    Poke(overlay).names([(EXT_BACKING_FORMAT, b"raw")], name)
    fs = inside({"vms/disk.qcow2": overlay, "secret": overlay})
    fs.makedirs("vms/folder")
    fs.symlink("loop", "vms/loop")
    fs.symlink("/secret", "vms/outside")
    with pytest.raises(Qcow2Error):
        Qcow2Container(fs.path("/vms/disk.qcow2"))


@pytest.mark.parametrize("name", ["/srv/vm/base.qcow2", "../images/base.qcow2", "C:\\vm\\base.qcow2"])
def test_a_file_beside_an_image_inside_another_target_stands_in(name: str, make_image: Callable[..., Path]) -> None:
    base = make_image("base.qcow2", "1M", "write -P 1 0 1M")
    overlay = make_image("overlay.qcow2", "1M", "write -P 2 0 64k")
    Poke(overlay).names([(EXT_BACKING_FORMAT, b"qcow2")], name.encode())
    files = {"vms/overlay.qcow2": overlay, "vms/base.qcow2": base}
    with container.open(inside(files).path("/vms/overlay.qcow2")) as opened:
        assert contents(opened) == b"\2" * (64 << 10) + b"\1" * (960 << 10)
        assert [note for note in opened.disk.notes if "was taken for the backing file" in note]


def test_a_refusal_inside_another_target_names_what_helps(
    make_image: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_image("base.qcow2", "1M", "write -P 1 0 1M")
    overlay = make_image("overlay.qcow2", "1M", "write -P 2 0 64k")
    Poke(overlay).names([(EXT_BACKING_FORMAT, b"qcow2")], b"/srv/vm/base.qcow2")
    (tmp_path / "store").mkdir()
    (tmp_path / "case").mkdir()
    base.rename(tmp_path / "store" / "base.qcow2")
    overlay = overlay.rename(tmp_path / "case" / "overlay.qcow2")
    for place in (overlay, inside({"vms/overlay.qcow2": overlay}).path("/vms/overlay.qcow2")):
        with pytest.raises(ContainerError) as failure:
            container.open(place)
        assert "of overlay.qcow2" in str(failure.value.__cause__)
        assert "QCOW2_BACKING_DIR=FOLDER" in str(failure.value.__cause__)
        with monkeypatch.context() as patch:
            patch.setenv("QCOW2_BACKING_DIR", str(tmp_path / "store"))
            with container.open(place) as opened:
                assert contents(opened) == b"\2" * (64 << 10) + b"\1" * (960 << 10)
        with monkeypatch.context() as patch:
            patch.setenv("QCOW2_NO_BACKING", "1")
            with container.open(place) as opened:
                assert contents(opened) == b"\2" * (64 << 10) + bytes(960 << 10)


def test_an_image_inside_another_target_is_not_its_own_backing_file(make_image: Callable[..., Path]) -> None:
    overlay = make_image("overlay.qcow2", "1M")
    for name, words in ((b"overlay.qcow2", "already part of the chain"), (b"/srv/overlay.qcow2", "leads outside")):
        Poke(overlay).names([(EXT_BACKING_FORMAT, b"qcow2")], name)
        with pytest.raises(ContainerError) as failure:
            container.open(inside({"vms/overlay.qcow2": overlay}).path("/vms/overlay.qcow2"))
        assert words in str(failure.value.__cause__)


def test_every_snapshot_gets_a_path_that_opens_it(make_image: Callable[..., Path]) -> None:
    image = make_image()
    for name in ("plain", "a/b", "same", "same", "2", "deleted:7", "active"):
        qemu.snapshot(image, name)
    with open_image(image) as opened:
        names = list(state_names(opened))
        assert names == ["plain", "index:1", "3", "4", "5", "6", "7"]  # "2" is the ID of one and the name of another
        assert [find_snapshot(opened, name) for name in names] == list(opened.snapshots)
    assert [image_and_state(image / name) for name in names] == [(image, name) for name in names]
    assert list(Qcow2Loader.find_all(image / "active")) == [image / "active"]
    with pytest.raises(SnapshotNotFound, match="ambiguous"):
        Qcow2Container(image, "active")


def test_a_snapshot_whose_name_does_not_show_as_it_is_gets_another_path(tmp_path: Path) -> None:
    names = ["plain", "\x1b[2J", "a\nb", "\u202e", "\U000e0100", "n" * 300, "\udcff", ".", "..", "nul\0", "caf\u00e9"]
    builder = Builder()
    for number, name in enumerate(names):
        builder.snapshot(b"\x1b%d" % number, name.encode("utf-8", "surrogateescape"), l1_offset=65536 * 3, l1_size=1)
    image = builder.write(tmp_path / "disk.qcow2")
    with open_image(image) as opened:
        found = list(state_names(opened))
        assert [find_snapshot(opened, name) for name in found] == list(opened.snapshots)
    assert [name if name.startswith("index:") else names[at] for at, name in enumerate(found)] == found
    assert [names[at] for at, name in enumerate(found) if not name.startswith("index:")] == ["plain", "caf\u00e9"]
    assert [image_and_state(image / name) for name in found] == [(image, name) for name in found]


def test_other_files_are_left_to_dissect(tmp_path: Path) -> None:
    raw = tmp_path / "disk.qcow2"  # by name alone
    raw.write_bytes(bytes(4096))
    assert not Qcow2Container.detect(raw)
