"""What is opened below a folder is what the kernel would open, if every step of the way is allowed; else nothing is.

The trees of links are random. The reference resolver here works on a dictionary, and shares nothing with the code.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.watch import Watch, watching
from hypothesis import example, given
from hypothesis import strategies as st

from qcow2_forensics.errors import Qcow2Error
from qcow2_forensics.format.source import FileSource
from qcow2_forensics.reader import confined
from qcow2_forensics.reader.confined import LeavesFolders, NotRegular, open_below
from qcow2_forensics.reader.resolver import Resolver

NAMES = ("a", "b", "c", "loop")
FOLDERS = ("", "out", "case", "case/sub", "case/sub/deep", "case/other", "extra")
TARGETS = st.lists(
    st.sampled_from([*NAMES, "sub", "deep", "other", "case", "out", "extra", "..", "..", ".", ""]),
    min_size=1,
    max_size=5,
).map("/".join)
Tree = dict[str, str]  # path -> target of a link, or "" for a file


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Files and links, some of them relative, some absolute (marked by a leading slash)."""
    places = [f"{folder}/{name}".lstrip("/") for folder in FOLDERS for name in NAMES]
    chosen = draw(st.lists(st.sampled_from(places), min_size=1, max_size=12, unique=True))
    return {place: draw(st.one_of(st.just(""), TARGETS, TARGETS.map(lambda text: "/" + text))) for place in chosen}


def build(root: Path, tree: Tree) -> None:
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for place, target in tree.items():
        if not target:
            (root / place).write_text(place)
        else:
            os.symlink(f"{root}{target}" if target.startswith("/") else target, root / place)


class Refused(Exception):
    pass


def reference(tree: Tree, allowed: list[str], path: str) -> str:
    """Return the file ``path`` (from the root of the tree) leads to; raises Refused, FileNotFoundError, OSError."""
    links = 0

    def walk(at: tuple[str, ...], parts: list[str]) -> tuple[str, ...]:
        nonlocal links
        if not parts:
            return at
        part, rest = parts[0], parts[1:]
        if "/".join(at) in tree:  # a file has nothing below it, not even "."
            raise FileNotFoundError
        if part in ("", "."):
            return walk(at, rest)
        if part == "..":
            return walk(at[:-1], rest)
        here = (*at, part)
        text = "/".join(here)
        inside = any(text == root or text.startswith(root + "/") or root == "" for root in allowed)
        if not inside and not any((root + "/").startswith(text + "/") for root in allowed):
            raise Refused
        target = tree.get(text)
        if target:
            links += 1
            if links > 40:
                raise OSError(errno.ELOOP, "")
            return walk(() if target.startswith("/") else at, [*target.split("/"), *rest])
        if text not in FOLDERS and text not in tree:
            raise FileNotFoundError
        return walk(here, rest)

    found = "/".join(walk((), path.split("/")))
    if found not in tree:
        raise IsADirectoryError
    return found


def attempt(root: Path, allowed: list[str], path: str) -> str:
    try:
        folders = [confined.folder(root / item) for item in allowed]
        descriptor, real = open_below([item for item in folders if item], f"{root}/{path}")
    except LeavesFolders:
        return "refused"
    except NotRegular:
        return "not a file"
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    with os.fdopen(descriptor) as file:
        assert os.path.realpath(real) == real
        if confined.HAS_DESCRIPTOR_PATHS or ".." not in path:  # by name ".." is taken out of the text, as Windows does
            assert os.path.samestat(os.fstat(descriptor), os.stat(f"{root}/{path}"))
        return file.read()


def expected(tree: Tree, allowed: list[str], path: str) -> str:
    try:
        return reference(tree, allowed, path)
    except Refused:
        return "refused"
    except IsADirectoryError:
        return "not a file"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return errno.errorcode[error.errno or 0]


@example(tree={"case/b": "", "case/a": "b"}, allowed=["case"], path="case/a")
@example(
    tree={"case/sub/b": "", "case/a": "/case/sub", "case/sub/deep/a": "../../a/b"},
    allowed=["case"],
    path="case/sub/deep/a",
)
@example(tree={"out/a": "", "case/a": "/out/a"}, allowed=["case"], path="case/a")
@example(tree={"out/a": "", "case/a": "../out"}, allowed=["case"], path="case/a/a")
@example(tree={"extra/a": "", "case/a": "../extra/a"}, allowed=["case", "extra"], path="case/a")
@example(
    tree={"out/a": "", "case/loop": "loop", "case/a": "loop/../b", "case/b": "/out/a"}, allowed=["case"], path="case/a"
)
@example(tree={"case/a": ""}, allowed=["case"], path="case/../case/a")
@example(tree={"case/a": ""}, allowed=["case"], path="case/../out/../case/a")
@example(tree={"case/a": "sub"}, allowed=["case"], path="case/a")
@given(
    tree=trees(),
    allowed=st.sampled_from([["case"], ["case", "extra"], ["case", "case/sub"], ["case/sub", "case"], ["case/sub"]]),
    path=st.builds(lambda start, rest: f"{start}/{rest}", st.sampled_from(["case", "case/sub", "extra"]), TARGETS),
)
def test_random_links_are_followed_as_far_as_is_allowed(
    tree: Tree, allowed: list[str], path: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("tree").resolve()
    build(root, tree)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert attempt(root, allowed, path) == expected(tree, allowed, path)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before  # other tests may leave files to the garbage collector


@example(tree={"case/b": "", "case/a": "b"}, path="a")
@example(tree={"case/a": ""}, path="a/.")
@example(tree={"case/a": "", "case/b": ""}, path="a/../b")
@example(tree={"out/a": "", "case/a": "/out/a"}, path="a")
@example(tree={"out/a": "", "case/loop": "loop", "case/a": "loop/../b", "case/b": "/out/a"}, path="a")
@given(tree=trees(), path=TARGETS)
def test_without_descriptor_paths_nothing_else_is_opened(
    tree: Tree, path: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("tree").resolve()
    build(root, tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confined, "HAS_DESCRIPTOR_PATHS", False)
        found = attempt(root, ["case"], f"case/{path}")
    assert found in ("refused", "not a file", "missing", "ELOOP") or found.startswith("case/")
    wanted = expected(tree, ["case"], f"case/{path}")
    if wanted in tree:
        assert found == wanted or (found == "refused" and ".." in path)  # out of the folder and in again, by its text


@pytest.mark.parametrize("simple", [False, True], ids=["by descriptors", "by name"])
def test_a_link_behind_a_loop_leads_nowhere(simple: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # realpath() stops at a loop, and what is left of the path looks like one inside the folder.
    if simple:
        monkeypatch.setattr(confined, "HAS_DESCRIPTOR_PATHS", False)
    (tmp_path / "secret").write_text("secret")
    case = tmp_path / "case"
    case.mkdir()
    os.symlink("loop", case / "loop")
    os.symlink("loop/../z", case / "base.raw")
    os.symlink(tmp_path / "secret", case / "z")
    for name in ("base.raw", "loop/../z", "z", 'json:{"driver":"raw","file.filename":"base.raw"}'):
        (case / "disk").touch()
        source = FileSource(case / "disk")
        with watching(Watch(readable=[case])) as watch, pytest.raises(Qcow2Error, match="is not followed"):
            Resolver().open(name, "backing", source, source)
        assert watch.take() == [], name
        source.close()


@pytest.mark.parametrize("simple", [False, True], ids=["by descriptors", "by name"])
def test_what_is_no_regular_file_is_never_opened(simple: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if simple:
        monkeypatch.setattr(confined, "HAS_DESCRIPTOR_PATHS", False)
    os.mkfifo(tmp_path / "fifo")
    (folder,) = (item for item in [confined.folder(tmp_path)] if item)
    with watching(Watch(readable=[tmp_path])) as watch, pytest.raises(NotRegular):
        open_below([folder], f"{folder.real}/fifo")
    assert f"{folder.real}/fifo" not in watch.opened


@pytest.mark.parametrize("simple", [False, True], ids=["by descriptors", "by name"])
def test_a_fifo_that_takes_the_place_of_a_file_is_not_taken_for_it(
    simple: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if simple:
        monkeypatch.setattr(confined, "HAS_DESCRIPTOR_PATHS", False)
    place = tmp_path / "base"
    place.write_bytes(b"x")
    (folder,) = (item for item in [confined.folder(tmp_path)] if item)
    look = os.stat

    def then_swap(path: object, **options: object) -> os.stat_result:
        status = look(path, **options)  # type: ignore[call-overload]
        if str(path).endswith("base") and stat.S_ISREG(status.st_mode):
            place.unlink()
            os.mkfifo(place)
        return status

    monkeypatch.setattr(os, "stat", then_swap)
    with pytest.raises(NotRegular):
        open_below([folder], f"{folder.real}/base")


def test_nothing_outside_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tmp_path / "case"
    case.mkdir()
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "share").write_text("x")
    os.symlink(tmp_path / "net" / "share", case / "link")
    (case / "disk").write_bytes(b"")
    source = FileSource(case / "disk")
    touched: list[str] = []
    for name in ("stat", "lstat", "open", "readlink", "listdir", "access", "scandir"):
        real = getattr(os, name)

        def spy(path: object, *rest: object, _real: object = real, **options: object) -> object:
            folder = options.get("dir_fd")
            start = os.path.realpath(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
            touched.append(os.path.join(start, os.fsdecode(path)))  # type: ignore[arg-type]
            return _real(path, *rest, **options)  # type: ignore[operator]

        monkeypatch.setattr(os, name, spy)
    for text in (str(tmp_path / "net/share"), "../net/share", "link", "/net/host/share", "../net/../case/disk2"):
        with pytest.raises(Qcow2Error):
            Resolver().open(text, "backing", source, source)
    monkeypatch.undo()
    source.close()
    assert not [item for item in touched if item.startswith((str(tmp_path / "net"), "/net"))]


@pytest.mark.parametrize("simple", [False, True], ids=["by descriptors", "by name"])
def test_a_file_swapped_for_a_link_is_never_the_other_file(
    simple: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if simple:
        monkeypatch.setattr(confined, "HAS_DESCRIPTOR_PATHS", False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "base").write_text("secret")
    case = tmp_path / "case"
    (case / "sub").mkdir(parents=True)
    (case / "sub" / "base").write_text("plain")
    (case / "disk").write_bytes(b"")
    source = FileSource(case / "disk")
    stop = threading.Event()

    def swap() -> None:
        places = itertools.cycle([(case, "sub", tmp_path / "out"), (case / "sub", "base", tmp_path / "out/base")])
        while not stop.is_set():
            folder, name, link = next(places)
            os.symlink(link, folder / "link")
            os.rename(folder / name, folder / "aside")
            os.rename(folder / "link", folder / name)
            time.sleep(0.0003)
            os.unlink(folder / name)
            os.rename(folder / "aside", folder / name)
            time.sleep(0.0003)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        outcomes = set(_openings(source, 400))
    finally:
        stop.set()
        swapper.join()
        source.close()
    assert outcomes == {"plain", "refused"}


def _openings(source: FileSource, times: int) -> Iterator[str]:
    for _ in range(times):
        try:
            found, _driver = Resolver().open("sub/base", "backing", source, source)
        except Qcow2Error:
            yield "refused"
            continue
        yield found.read(0, 10).decode()
        found.close()  # type: ignore[attr-defined]


def test_an_image_named_through_a_link_is_beside_its_files(tmp_path: Path) -> None:
    case = tmp_path / "case"
    case.mkdir()
    (case / "disk").write_bytes(b"")
    (case / "base").write_text("base")
    os.symlink(case, tmp_path / "alias")
    source = FileSource(tmp_path / "alias" / "disk")
    for name in ("base", str(tmp_path / "alias" / "base"), str(case / "base"), f"{tmp_path}/./alias//base"):
        found, _ = Resolver().open(name, "backing", source, source)
        assert found.read(0, 4) == b"base"
        assert found.stands_for == ""  # type: ignore[attr-defined]
        found.close()  # type: ignore[attr-defined]
    source.close()


def test_a_path_of_very_many_components_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"")
    source = FileSource(tmp_path / "disk")
    for name in ("a/" * 320_000 + "a", "./" * 320_000 + "disk", "../" * 320_000 + "a"):
        with pytest.raises(Qcow2Error):
            Resolver().open(name, "data", source, source)
    source.close()


def test_the_watch_of_the_fuzzer_sees_through_loops_and_open_folders(tmp_path: Path) -> None:
    case = tmp_path / "case"
    case.mkdir()
    (tmp_path / "secret").write_text("secret")
    (case / "plain").write_text("plain")
    os.symlink("loop", case / "loop")
    os.symlink(tmp_path / "secret", case / "z")
    folder = os.open(case, os.O_RDONLY)
    for name, beside in (("z", folder), (str(case / "z"), None)):
        with watching(Watch(readable=[case])) as watch:
            os.close(os.open(name, os.O_RDONLY, dir_fd=beside))
        assert watch.take(), name
    with watching(Watch(readable=[case])) as watch:
        os.close(os.open("plain", os.O_RDONLY, dir_fd=folder))
    assert not watch.take()
    os.close(folder)
