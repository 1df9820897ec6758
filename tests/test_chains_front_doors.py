"""A chain reads the same, or is refused with the same reason, through every front door.

The situations are names as they are found in evidence; the images are made by qemu-img and the builder.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import qcow2_forensics as q
from qcow2_forensics.cli import main
from tests import qemu
from tests.image_builder import EXT_BACKING_FORMAT, EXT_DATA_FILE, Poke, base_b, empty

pytestmark = qemu.requires_qemu

MiB = 1 << 20
BASE = b"\x11" * 512  # how the base begins; the overlays begin with what is below them
AES = {"format": "aes"}


class Case(NamedTuple):
    """A file to open, what the caller gives, and what must come of it."""

    path: Path
    folders: tuple[Path, ...] = ()
    keys: tuple[str, ...] = ()
    begins: bytes | None = BASE  # the first sector; None: refused
    says: tuple[str, ...] = ()  # of the refusal, or of the notes
    notes: int = 0


def overlay(path: Path, name: str, fmt: str | None = "qcow2") -> Path:
    Poke(empty(path)).names([] if fmt is None else [(EXT_BACKING_FORMAT, fmt.encode())], os.fsencode(name))
    return path


def _named(name: str, *, notes: int = 1, fmt: str | None = "qcow2") -> Callable[[Path], Case]:
    """The base is beside the image, which names it in this way."""

    def build(folder: Path) -> Case:
        base_b(folder / "base.qcow2")
        says = ("was taken for the backing file", "of ") if notes else ()
        return Case(overlay(folder / "disk.qcow2", name, fmt), says=says, notes=notes)

    return build


def _refused(name: str, *says: str, fmt: str | None = "qcow2") -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        base_b(folder / "base.qcow2")
        return Case(overlay(folder / "disk.qcow2", name, fmt), begins=None, says=("of disk.qcow2", *says))

    return build


def _below(folder: Path) -> Case:
    (folder / "sub").mkdir()
    base_b(folder / "sub" / "base.qcow2")
    return Case(overlay(folder / "disk.qcow2", "sub/base.qcow2"))


def _in_a_folder_of_the_callers(folder: Path) -> Case:
    for name in ("case", "store"):
        (folder / name).mkdir()
    base_b(folder / "store" / "base.qcow2")
    path = overlay(folder / "case" / "disk.qcow2", "D:\\images\\base.qcow2")
    return Case(path, folders=(folder / "store",), says=("was taken for",), notes=1)


def _exactly_in_a_folder_of_the_callers(folder: Path) -> Case:
    case = _in_a_folder_of_the_callers(folder)
    return Case(overlay(case.path, "../store/base.qcow2"), folders=case.folders)


def _of_another_format(folder: Path) -> Case:
    (folder / "base.qcow2").write_bytes(bytes(MiB))
    path = overlay(folder / "disk.qcow2", "/srv/vm/base.qcow2")
    return Case(path, begins=None, says=("cannot be that file", "starts as raw, and qcow2 is recorded"))


def _a_link_that_leaves(folder: Path) -> Case:
    (folder / "case").mkdir()
    base_b(folder / "base.qcow2")
    (folder / "case" / "base.qcow2").symlink_to(folder / "base.qcow2")
    return Case(overlay(folder / "case" / "disk.qcow2", "base.qcow2"), begins=None, says=("leads outside the folder",))


def _json_part(folder: Path) -> Case:
    (folder / "base.raw").write_bytes(b"\x77" * 4096 + BASE + b"\x66" * 4096)
    name = 'json:{"driver":"raw","offset":4096,"size":"512","file":{"driver":"file","filename":"base.raw"}}'
    return Case(overlay(folder / "disk.qcow2", name, "raw"), begins=BASE)


def _json_alone(folder: Path) -> Case:
    base_b(folder / "base.qcow2")
    overlay(folder / "middle.qcow2", "base.qcow2")
    name = 'json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"middle.qcow2"}}'
    return Case(overlay(folder / "disk.qcow2", name), begins=bytes(512))


def _its_own_name(folder: Path) -> Case:
    path = overlay(folder / "disk.qcow2", "/srv/vm/disk.qcow2")
    return Case(path, begins=None, says=("'/srv/vm/disk.qcow2' of disk.qcow2", "leads outside the folder"))


def _moved_data_file(folder: Path) -> Case:
    path = qemu.create(folder / "disk.qcow2", "1M", data_file=folder / "own.data")
    qemu.io(path, "write -P 0x11 0 64k")
    Poke(path).names([(EXT_DATA_FILE, b"/srv/vm/own.data")])
    return Case(path, says=("was taken for the data file",), notes=1)


def _two_keys(folder: Path) -> Case:
    pytest.importorskip("cryptography", reason="cryptography is absent")
    for name, secret, write in (("base", "low", "write -P 0x11 0 64k"), ("disk", "top", "write -P 9 64k 64k")):
        qemu.create(folder / name, "1M", secret=secret, encrypt=AES)
        qemu.io(folder / name, write, secret=secret)
    Poke(folder / "disk").names([(EXT_BACKING_FORMAT, b"qcow2")], b"base")
    return Case(folder / "disk", keys=("top", "low"), says=("plausible",), notes=0)


def _locked_base(folder: Path) -> Case:
    qemu.create(folder / "base", "1M", secret="low", encrypt=AES)
    qemu.io(folder / "base", "write -P 0x11 0 64k", secret="low")
    return Case(overlay(folder / "disk.qcow2", "base"), begins=None, says=("base is encrypted",))


SITUATIONS: dict[str, Callable[[Path], Case]] = {
    "beside": _named("base.qcow2", notes=0),
    "beside, file:": _named("file:base.qcow2", notes=0),
    "below": _below,
    "absolute": _named("/srv/vm/base.qcow2"),
    "absolute, no format": _named("/srv/vm/base.qcow2", fmt=None),
    "parent folder": _named("../images/base.qcow2"),
    "drive": _named("C:\\vm\\base.qcow2"),
    "drive, slashes": _named("C:/vm/base.qcow2"),
    "Windows parent": _named("..\\base.qcow2"),
    "share": _named("\\\\server\\share\\base.qcow2"),
    "URL": _named("https://host/images/base.qcow2?raw=1"),
    "caller's folder": _in_a_folder_of_the_callers,
    "caller's folder, exactly": _exactly_in_a_folder_of_the_callers,
    "json": _named('json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}', notes=0),
    "json, elsewhere": _named('json:{"driver":"qcow2","file":{"driver":"file","filename":"/srv/base.qcow2"}}'),
    "json, encrypted": _named('json:{"encrypt.key-secret":"s","driver":"qcow2","file.filename":"base.qcow2"}', notes=0),
    "json, part": _json_part,
    "json, alone": _json_alone,
    "data file": _moved_data_file,
    "two keys": _two_keys,
    "gone": _refused("gone.qcow2", "is missing"),
    "gone elsewhere": _refused("/srv/vm/gone.qcow2", "leads outside the folder"),
    "network": _refused("nbd://127.0.0.1:1/gone", "is a protocol"),
    "device": _refused("/dev/null", "leads outside the folder", fmt="raw"),
    "host folder": _refused("fat:/etc", "is a protocol"),
    "json, network": _refused('json:{"driver":"qcow2","file":{"driver":"nbd","host":"h"}}', "more than an image"),
    "other format": _of_another_format,
    "link": _a_link_that_leaves,
    "its own name": _its_own_name,
    "locked base": _locked_base,
}


# --- the doors: the first sector, or an error's sentence ------------------------------------------


def _python(case: Case, _tmp: Path) -> bytes:
    with q.open_disk(case.path, passphrase=case.keys or None, resolver=q.Resolver(folders=case.folders)) as disk:
        return disk.read(0, 512)


def _command_line(case: Case, tmp: Path) -> bytes:
    arguments = ["export", str(case.path), str(tmp / "exported"), "--no-hash"]
    arguments += [item for folder in case.folders for item in ("--backing-dir", str(folder))]
    for number, key in enumerate(case.keys):
        (tmp / f"key{number}").write_text(key + "\r\n")
        arguments += ["--passphrase-file", str(tmp / f"key{number}")]
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main(arguments)
    if code:
        raise OSError(errors.getvalue())
    for sentence in errors.getvalue().splitlines():  # printed here, logged by the other doors
        logging.getLogger("qcow2_forensics").info("%s", sentence)
    return (tmp / "exported").read_bytes()[:512]


def _pytsk3(case: Case, _tmp: Path) -> bytes:
    pytest.importorskip("pytsk3")
    from pytsk3_qcow2 import Img_Info

    keys = list(case.keys) or None
    image = Img_Info(str(case.path), passphrase=keys, resolver=q.Resolver(folders=case.folders))
    try:
        return bytes(image.read(0, 512))
    finally:
        image.close()


def _dfvfs(case: Case, tmp: Path) -> bytes:
    pytest.importorskip("dfvfs")
    from dfvfs.path import factory
    from dfvfs.resolver import context, resolver

    import dfvfs_qcow2  # noqa: F401 - activates the back-end

    new = factory.Factory.NewPathSpec
    with _environment(case, tmp):
        path_spec = new("QCOW", parent=new("OS", location=str(case.path)))
        file_object = resolver.Resolver.OpenFileObject(path_spec, resolver_context=context.Context())
        return bytes(file_object.read(512))


def _volatility(case: Case, tmp: Path) -> bytes:
    pytest.importorskip("volatility3.framework")
    from volatility3.framework import contexts

    from tests.volatility_tools import add_file, layers

    with _environment(case, tmp), _root_warnings() as warnings:
        context = contexts.Context()

        add_file(context, case.path.as_uri())
        context.config["disk.base_layer"] = "FileLayer"
        try:
            return bytes(layers.Qcow2DiskLayer(context, "disk", "disk").read(0, 512))
        except Exception as error:
            raise OSError(" ".join([*warnings, str(error)])) from error


def _dissect(case: Case, tmp: Path) -> bytes:
    pytest.importorskip("dissect.target")
    from dissect_qcow2 import Qcow2Container

    with _environment(case, tmp):
        opened = Qcow2Container(case.path)
        try:
            return opened.read(512)
        finally:
            opened.close()


@contextlib.contextmanager
def _environment(case: Case, tmp: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QCOW2_BACKING_DIR", os.pathsep.join(map(str, case.folders)))
        for number, key in enumerate(case.keys):
            (tmp / f"key{number}").write_text(key + "\n")
        patch.setenv("QCOW2_PASSPHRASE_FILE", os.pathsep.join(str(tmp / f"key{i}") for i in range(len(case.keys))))
        yield


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.sentences: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.sentences.append(record.getMessage())


@contextlib.contextmanager
def _root_warnings() -> Iterator[list[str]]:
    collector, logger = _Collector(), logging.getLogger()
    logger.addHandler(collector)
    try:
        yield collector.sentences
    finally:
        logger.removeHandler(collector)


DOORS = {
    "Python": _python,
    "command line": _command_line,
    "pytsk3": _pytsk3,
    "dfVFS": _dfvfs,
    "Volatility": _volatility,
    "dissect": _dissect,
}
CURES = {
    "Python": "Resolver(",
    "command line": "--backing-",
    "pytsk3": "Resolver(",
    "dfVFS": "QCOW2_BACKING_DIR",
    "Volatility": "--qcow2-backing-",
    "dissect": "QCOW2_BACKING_DIR",
}


def _row(situation: str, case: Case) -> str:
    with q.open_image(case.path) as image:
        name = image.backing_name or image.data_file_name
    answer = "read, with a warning" if case.notes else "read"
    return f"| {situation} | `{name}` | {answer if case.begins is not None else f'refused: {case.says[-1]}'} |"


def test_the_page_lists_every_situation_with_its_answer(tmp_path: Path) -> None:
    rows = []
    for number, (situation, build) in enumerate(SITUATIONS.items()):
        (tmp_path / str(number)).mkdir()
        rows.append(_row(situation, build(tmp_path / str(number))))
    page = (Path(__file__).parents[1] / "docs" / "chains.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in page, "\n".join(rows)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("door", DOORS)
def test_every_door_gives_the_same_answer(door: str, situation: str, tmp_path: Path) -> None:
    (tmp_path / "evidence").mkdir()
    case = SITUATIONS[situation](tmp_path / "evidence")
    collector, logger = _Collector(), logging.getLogger("qcow2_forensics")
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    try:
        if case.begins is None:
            with pytest.raises((OSError, q.Qcow2Error)) as caught:
                DOORS[door](case, tmp_path)
            sentence = str(caught.value)
            assert all(text in sentence for text in case.says), sentence
            assert CURES[door] in sentence or "is encrypted" in sentence
        else:
            assert DOORS[door](case, tmp_path) == case.begins
            stand_ins = [sentence for sentence in collector.sentences if "was taken for" in sentence]
            assert len(set(stand_ins)) == case.notes
            assert all(any(text in sentence for sentence in collector.sentences) for text in case.says)
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
