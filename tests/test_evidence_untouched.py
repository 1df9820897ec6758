"""Nothing an image says makes us open, write or reach anything: watched by an audit hook, at every edge.

Every hostile image and trap goes through the API, the command line, pytsk3, dfVFS and Volatility
while the interpreter reports each open, socket and subprocess. Only the image's own folder and code
may be read; nothing may be written. One image after the other must also be the same bytes afterwards.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from fuzz import targets
from fuzz.targets import TARGETS, Case, check_output, run_command
from fuzz.watch import Watch, watching

import qcow2_forensics as q
from qcow2_forensics.errors import ForbiddenReference, MissingFile, Qcow2Error
from tests import hostile, qemu, traps
from tests.image_builder import EXT_BACKING_FORMAT, EXT_DATA_FILE, Builder, base_b
from tests.tiers import every, quick
from tests.traps import TRAPS

pytestmark = qemu.requires_qemu

# Making a LUKS image takes seconds, and 65536 snapshots take seconds each time: neither names anything.
NAMES = [*hostile.IMAGES, *(name for name in TRAPS if not name.startswith(("LUKS", "SNAPSHOTS")))]
# Honest work, and much of it: millions of mapped ranges.
_SKIPPED = {
    "L1-EQUAL": ("map", "diff"),
    "BOMB": ("map", "diff"),
    "SPARSE-15T": ("audit", "residue"),
}
_NEEDS = {"img_info": "pytsk3", "dfvfs": "dfvfs", "volatility": "volatility3.framework"}


class FileCase(Case):
    """A case whose image lies in its own folder already, with what stands beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.source = q.FileSource(path)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        return self._path.read_bytes()

    @property
    def path(self) -> Path:  # type: ignore[override]
        return self._path

    @property
    def folder(self) -> Path:  # type: ignore[override]
        return self._path.parent


@dataclass
class Gallery:
    folder: Path
    paths: dict[str, Path]

    def hashes(self) -> dict[str, str]:
        """Return what every file is: its bytes, its times, its rights."""
        return {str(path.relative_to(self.folder)): _fingerprint(path) for path in sorted(self.folder.rglob("*"))}


def _fingerprint(path: Path) -> str:
    status = path.lstat()
    facts = f"{status.st_mode} {status.st_size} {status.st_mtime_ns} {status.st_nlink}"
    if stat.S_ISLNK(status.st_mode):
        return f"{facts} -> {os.readlink(path)}"
    if not stat.S_ISREG(status.st_mode):
        return facts
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        at = 0
        while at < status.st_size:  # data only: one trap is a sparse file of 15 TiB
            try:
                start = os.lseek(stream.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(stream.fileno(), start, os.SEEK_HOLE)
            for place in range(start, at, 1 << 20):
                digest.update(place.to_bytes(8, "big") + os.pread(stream.fileno(), min(1 << 20, at - place), place))
    return f"{facts} {digest.hexdigest()}"


@pytest.fixture(scope="module")
def gallery(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    """The hostile images of this run, each in a folder of its own, and the same bytes when all tests are done."""
    folder = tmp_path_factory.mktemp("gallery")
    paths = {}
    for name in sorted(_wanted(request.session)):
        own = folder / name
        own.mkdir()
        paths[name] = hostile.build(name, own) if name in hostile.IMAGES else TRAPS[name].build(own)
    found = Gallery(folder, paths)
    before = found.hashes()
    yield found
    assert found.hashes() == before


def _wanted(session: pytest.Session) -> set[str]:
    """Return the names of the images that the tests of this run use."""
    calls = (
        item.callspec.params
        for item in session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    )
    return {str(params["name"]) for params in calls if params.get("name") in NAMES}


def _api(path: Path) -> None:
    case = FileCase(path)
    with closing(case.source):
        skipped = _SKIPPED.get(path.parent.name, ())
        for name in ("read", "vm_state", "audit", "compare", "residue"):
            if name in skipped:
                continue
            with suppress(Qcow2Error):
                TARGETS[name](case)


def _command_line(path: Path) -> None:
    skipped = _SKIPPED.get(path.parent.name, ())
    for arguments in targets._commands(FileCase(path)):
        if arguments[0] in ("examine", "export", "residue", "memory", *skipped):
            continue  # they write: see below
        code, out, err = run_command(arguments)
        check_output(arguments, code, out, err)


def _adapter(name: str) -> Callable[[Path], None]:
    def use(path: Path) -> None:
        if name == "volatility":
            _volatility(path)
            return
        case = FileCase(path)
        with closing(case.source), suppress(Qcow2Error):
            TARGETS[name](case)

    return use


def _volatility(path: Path) -> None:
    from volatility3.framework import exceptions

    from tests import volatility_tools as tools

    tools.stack(path, snapshot="disk")
    context = tools.new_context()
    context.config["Disk.base_layer"] = tools.add_file(context, path.as_uri())
    try:
        layer = tools.layers.Qcow2DiskLayer(context, "Disk", "Disk")
        layer.read(0, 4096, pad=True)
        layer.read(max(0, layer.maximum_address - 4095), 4096, pad=True)
        layer.destroy()
    except exceptions.LayerException:
        pass


EDGES: dict[str, Callable[[Path], None]] = {
    "api": _api,
    "command line": _command_line,
    **{name: _adapter(name) for name in _NEEDS},
}


@pytest.fixture(scope="module", params=EDGES, name="edge")
def _edge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """One edge, warmed up: frameworks look at the machine when they are imported."""
    name = str(request.param)
    if name in _NEEDS:
        pytest.importorskip(_NEEDS[name], reason=f"{_NEEDS[name]} is absent")
    EDGES[name](base_b(tmp_path_factory.mktemp("warm") / "warm.qcow2"))
    return EDGES[name]


@pytest.mark.parametrize("name", quick(NAMES, [*hostile.REPRESENTATIVE[::4], *traps.REPRESENTATIVE[::2]]))
def test_an_image_makes_nobody_open_anything_else(name: str, edge: Callable[[Path], None], gallery: Gallery) -> None:
    path = gallery.paths[name]
    with watching(Watch(readable=[path.parent])) as watch:
        edge(path)
    assert watch.seen == []
    assert str(path) in watch.opened  # the hook was there


# --- what the hook sees --------------------------------------------------------------------------


def test_the_watch_sees_opens_sockets_and_subprocesses(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    with watching(Watch(readable=[inside])) as watch:
        (inside / "a").exists()
        with pytest.raises(FileNotFoundError):
            open(inside / "a", "rb")  # noqa: SIM115 - it is not there
        assert watch.take() == []
        with open("/etc/hostname", "rb"):
            assert watch.take() == [f"open {os.path.realpath('/etc/hostname')} to read"]
        with open(inside / "new", "wb"):
            assert len(watch.take()) == 1
        with socket.socket():
            assert watch.take()[0].startswith("socket.")
        subprocess.run(["true"], check=True)
        assert any(event.startswith("subprocess.") for event in watch.take())
        (inside / "new").unlink()
        assert watch.take() == [f"os.remove {inside / 'new'}"]


def test_the_watch_sees_changes_and_locks_by_name_by_descriptor_and_by_folder(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    case, out = tmp_path / "case", tmp_path / "out"
    for folder in (case, out):
        folder.mkdir()
        (folder / "a").write_bytes(b"a")
    folders = {place: os.open(place, os.O_RDONLY) for place in (case, out)}
    files = {place: os.open(place / "a", os.O_RDWR) for place in (case, out)}
    changes: dict[str, Callable[[Path], object]] = {
        "os.chmod of a descriptor": lambda place: os.chmod(files[place], 0o644),
        "os.truncate": lambda place: os.truncate(place / "a", 1),
        "os.truncate of a descriptor": lambda place: os.ftruncate(files[place], 1),
        "os.utime": lambda place: os.utime(place / "a"),
        "os.link": lambda place: os.link(place / "a", place / "b"),
        "os.rename to it": lambda place: os.rename(place / "b", place / "c"),
        "os.remove in a folder": lambda place: os.remove("c", dir_fd=folders[place]),
        "os.mkdir": lambda place: os.mkdir(place / "d"),
        "os.rmdir": lambda place: os.rmdir(place / "d"),
        "os.symlink": lambda place: os.symlink("nowhere", place / "link"),
        "fcntl.flock": lambda place: fcntl.flock(files[place], fcntl.LOCK_SH),
        "fcntl.lockf": lambda place: fcntl.lockf(files[place], fcntl.LOCK_SH),
        "os.lockf": lambda place: os.lockf(files[place], os.F_LOCK, 1),
        "fcntl.fcntl": lambda place: fcntl.fcntl(files[place], fcntl.F_SETLK, bytes(64)),
    }
    if hasattr(os, "setxattr"):
        changes["os.setxattr"] = lambda place: _suppressed(os.setxattr, place / "a", "user.a", b"")
    with watching(Watch(readable=[case], writable=[out])) as watch:
        for event, change in changes.items():
            change(out)
            assert watch.take() == [], event
            change(case)
            seen = watch.take()
            assert seen, event
            assert all(line.startswith(event.split()[0]) and str(case) in line for line in seen), seen
    for descriptor in (*folders.values(), *files.values()):
        os.close(descriptor)


def _suppressed(call: Callable[..., object], *arguments: object) -> None:
    with suppress(OSError):  # where the file system does not have it
        call(*arguments)


def test_an_open_of_a_name_from_the_image_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted defect: a resolver that follows whatever name it is given."""
    path = hostile.build("H66", tmp_path)
    targets.run("read", path.read_bytes())

    def follow(_self: object, name: str, *_: object) -> tuple[q.FileSource, None]:
        return q.FileSource(name), None

    monkeypatch.setattr(q.Resolver, "open", follow)
    with watching(Watch(readable=[tmp_path])) as watch:
        q.open_disk(path).close()
    assert watch.seen == ["open /etc/passwd to read"]


# --- kinds of files and names --------------------------------------------------------------------


def _overlay(path: Path, name: bytes, *, data: bool = False) -> Path:
    """Write an image of one cluster over ``name``, as its backing or its data file."""
    if data:
        builder = Builder(cluster_bits=16, size=1 << 20, extensions=[(EXT_DATA_FILE, name)])
        builder.incompatible = 4
    else:
        builder = Builder(cluster_bits=16, size=1 << 20, backing=name, extensions=[(EXT_BACKING_FORMAT, b"raw")])
    return builder.write(path)


def _watched_open(path: Path, allowed: Path) -> type[Exception] | bytes:
    with watching(Watch(readable=[allowed])) as watch:
        try:
            with q.open_disk(path) as disk:
                result: type[Exception] | bytes = disk.read(0x10000, 4)
        except Qcow2Error as error:
            result = type(error)
        q.audit(path)
    assert watch.seen == []
    return result


def _secret(folder: Path) -> Path:
    path = folder / "secret"
    path.write_bytes(b"SECRET__" * 32768)
    return path


@pytest.fixture
def case(tmp_path: Path) -> Path:
    folder = tmp_path / "case"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("data", [False, True], ids=["backing", "data"])
def test_links_that_leave_the_folder_are_not_followed(case: Path, tmp_path: Path, data: bool) -> None:
    secret = _secret(tmp_path)
    (case / "link").symlink_to(secret)
    (case / "folder").symlink_to(tmp_path)
    (case / "inside").write_bytes(b"OURS" * 65536)
    (case / "good").symlink_to("inside")
    for name in (b"link", b"folder/secret", b"../secret", b"x/../../secret", b"./../secret", os.fsencode(secret)):
        assert _watched_open(_overlay(case / "over.qcow2", name, data=data), case) is ForbiddenReference, name
    if not data:
        assert _watched_open(_overlay(case / "over.qcow2", b"good"), case) == b"OURS"


def test_a_hard_link_is_a_file_of_the_folder(case: Path, tmp_path: Path) -> None:
    # A name in the folder is in the folder: a hard link has no other place, and who made it could read it.
    os.link(_secret(tmp_path), case / "hard")
    assert _watched_open(_overlay(case / "over.qcow2", b"hard"), case) == b"SECR"


def test_a_link_loop_is_refused(case: Path) -> None:
    (case / "a").symlink_to("b")
    (case / "b").symlink_to("a")
    assert _watched_open(_overlay(case / "over.qcow2", b"a"), case) in (ForbiddenReference, MissingFile)


@pytest.mark.parametrize("data", [False, True], ids=["backing", "data"])
def test_fifos_sockets_devices_and_folders_are_not_opened(case: Path, data: bool) -> None:
    os.mkfifo(case / "fifo")
    (case / "folder").mkdir()
    (case / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        try:
            listening.bind(str(case / "socket"))
        except OSError:
            (case / "socket").symlink_to("/dev/null")
        for name in (b"fifo", b"folder", b"device", b"socket", b".", b"/dev/zero", b"/proc/self/mem", b"folder/"):
            assert _watched_open(_overlay(case / "over.qcow2", name, data=data), case) is ForbiddenReference, name


def test_the_image_itself_may_not_be_a_fifo_or_character_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(q.NotQcow2):
            q.open_image(path)
        code, out, err = run_command(["info", str(path)])
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "name",
    [
        b"secret\0",
        b"\0",
        b"base.raw\0.png",
        b"\xff\xfe\x80",
        b"n" * 255,
        b"n" * 1023,
        b"/" * 1023,
        b"../" * 300 + b"etc/passwd",
        b"%2e%2e/secret",
        b"..\\secret",
        b"C:\\secret",
        b"\\\\host\\share",
        b"~/secret",
        b"$HOME/secret",
        b"$(id)",
        b"`id`",
        b"|id",
        b"-",
        b" ",
        b"file:///etc/passwd",
        b"file:/etc/passwd",
        b"fd:0",
        b"/dev/fdset/1",
        b"/dev/stdin",
        b"/proc/self/fd/0",
        b"/proc/self/environ",
        b"nbd+unix:///x?socket=/tmp/s",
        b"json:{",
        b'json:{"driver":"nbd","host":"127.0.0.1"}',
        b'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
        b'json:{"driver":"raw","file.filename":"/etc/passwd"}',
        b'json:{"driver":"raw","file":{"driver":"host_device","filename":"/dev/zero"}}',
        b"\xe2\x80\xae\x1b[2J\x07",
        "sécret".encode("utf-16-le"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("data", every(2, [False, True]), ids=["backing", "data"])
def test_strange_names_are_refused_or_missing(name: bytes, data: bool, case: Path, tmp_path: Path) -> None:
    _secret(tmp_path)
    (case / "base.raw").write_bytes(b"OURS" * 65536)
    result = _watched_open(_overlay(case / "over.qcow2", name, data=data), case)
    if name == b"base.raw\0.png":  # what QEMU opens: the name ends at the NUL, and the file is the folder's own
        assert result in (bytes(4) if data else b"OURS", ForbiddenReference)
    elif name == b"\0" and not data:
        assert result == bytes(4)  # no name, as for QEMU
    else:
        assert isinstance(result, type), result
        assert issubclass(result, Qcow2Error)


def test_the_case_of_a_name_is_the_file_systems_matter(case: Path) -> None:
    (case / "Base.RAW").write_bytes(b"OURS" * 65536)
    result = _watched_open(_overlay(case / "over.qcow2", b"base.raw"), case)
    assert result is MissingFile or (case / "base.raw").exists()


def test_a_name_of_undecodable_bytes_is_found_and_shown_escaped(case: Path) -> None:
    name = b"b\xe9se\xff.raw"
    try:
        (case / os.fsdecode(name)).write_bytes(b"OURS" * 65536)
    except OSError:
        pytest.skip("the file system takes no such names")
    path = _overlay(case / os.fsdecode(b"over\xff.qcow2"), name)
    assert _watched_open(path, case) == b"OURS"
    for arguments in (["info", str(path)], ["audit", str(path)], ["map", str(path)], ["info", str(path) + "\x1b[2J"]):
        check_output(arguments, *run_command(arguments))


# --- evidence stays evidence ---------------------------------------------------------------------


def test_commands_that_write_touch_only_their_output(tmp_path: Path) -> None:
    case, out = tmp_path / "case", tmp_path / "out"
    case.mkdir()
    out.mkdir()
    path = hostile.build("H76", case)  # an overlay over base.qcow2
    found = Gallery(case, {})
    before = found.hashes()
    run_command(["info", str(path)])
    with watching(Watch(readable=[case], writable=[out])) as watch:
        for arguments in (
            ["export", str(path), str(out / "disk.raw")],
            ["residue", str(path), str(out / "residue")],
            ["audit", str(path), "-o", str(out / "report.html"), "--format", "html"],
            ["audit", str(path), str(case / "base.qcow2"), "-o", str(out / "lines.jsonl")],
        ):
            code, _, err = run_command(arguments)
            if len(arguments) < 5:
                assert code == 0, err
    # Many images are audited by worker processes, and an anonymous pipe is theirs.
    assert [
        event for event in watch.seen if not event.startswith(("subprocess", "os.posix", "os.fork", "open /dev"))
    ] == []
    assert found.hashes() == before
    assert sorted(path.name for path in out.iterdir()) == ["disk.raw", "lines.jsonl", "report.html", "residue"]


@pytest.mark.parametrize("extra", [[], ["--force"]], ids=["", "force"])
def test_no_command_writes_over_evidence(extra: list[str], tmp_path: Path) -> None:
    path, other = base_b(tmp_path / "a.qcow2"), base_b(tmp_path / "b.qcow2")
    link = tmp_path / "link.qcow2"
    os.link(path, link)
    before = Gallery(tmp_path, {}).hashes()
    for target in (path, link):
        for arguments in (
            ["export", str(path), str(target), *extra],
            ["memory", str(path), str(target), *extra],
            ["audit", str(path), "-o", str(target), *extra],
            ["audit", str(path), str(other), "-o", str(target), *extra],
            ["audit", str(other), str(path), "--resume", str(target)],
        ):
            code, _, err = run_command(arguments)
            assert code == 2, arguments
            assert err.startswith("qcow2-forensics: ")
            assert len(err.splitlines()) == 1, err
    assert run_command(["residue", str(path), str(other)])[0] == 2
    assert Gallery(tmp_path, {}).hashes() == before


def test_resuming_into_a_file_that_is_no_list_of_lines_leaves_it_alone(tmp_path: Path) -> None:
    path = base_b(tmp_path / "a.qcow2")
    for content in (b"no newline at all", b"QFI\xfb" + bytes(4096), b"a line\nand more", b'{"a": 1}\n'):
        victim = tmp_path / "victim"
        victim.write_bytes(content)
        assert run_command(["audit", str(path), "--resume", str(victim)])[0] == 2
        assert victim.read_bytes() == content


def test_the_evidence_folder_may_be_read_only(tmp_path: Path) -> None:
    path = hostile.build("H76", tmp_path)
    for file in tmp_path.iterdir():
        file.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        with q.open_disk(path) as disk:
            assert disk.read(0, 2) == b"\x11\x11"
        assert q.audit(path).findings
        if shutil.which("qemu-img"):
            assert _api(path) is None
    finally:
        tmp_path.chmod(0o755)
