"""Where every write ends: sparse files, hashed on the way, that get their name when they are whole.

One writer serves disks, memory and residue. A file is written under a hidden name beside its own and
renamed at the end; whatever ends the work before that, a full disk, Ctrl-C or SIGTERM, leaves nothing.
Standard output, FIFOs and character devices take the same bytes one after the other, zeros included.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import Qcow2Error
from ..format.source import is_being_read
from ..limits import KiB, MiB
from ..text import cut
from .signals import unfinished
from .tree_hash import TreeHash

HASHES = ("sha256", "sha1", "md5", "blake2b", "sha256-tree")
_BLOCK = 4 * KiB  # of zeros at least, at such a place, become a hole: what file systems and qemu-img count in
_ZERO_BLOCK = bytes(_BLOCK)
_ZEROS = bytes(MiB)
_STANDARD_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_seeking = threading.Lock()

Path_ = str | os.PathLike[str]


class OutputExists(Qcow2Error):
    """An output file is already there and replacing it was not asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{cut(str(path))} exists; use --force to replace it")


class IsEvidence(Qcow2Error):
    """An output would replace a file that is being examined."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{cut(str(path))} is part of the evidence, which is never written to")


def data_stretches(data: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of what of ``data`` is not aligned blocks of zeros; ``offset`` is its place in the file."""
    start, first = 0, -offset % _BLOCK
    heads = data[first::_BLOCK]  # the first byte of every aligned block: nearly all blocks of data show here
    number = heads.find(0)
    while number >= 0:
        at = first + number * _BLOCK
        if data.startswith(_ZERO_BLOCK, at):
            if start < at:
                yield start, at
            start = at + _BLOCK
        number = heads.find(0, number + 1)
    if start < len(data):
        yield start, len(data)


class Writer:
    """Appends to an empty file or a pipe.

    A file gets holes where there would be blocks of zeros, and ``hashes`` names the digests of what it
    reads as. ``advance`` is called with the bytes that were counted.
    """

    def __init__(
        self,
        descriptor: int,
        advance: Callable[[int], object] = int,
        *,
        hashes: Sequence[str] = HASHES[:1],
        sparse: bool = True,
    ) -> None:
        self._descriptor = descriptor
        self._advance = advance
        self._trees = {name: TreeHash() for name in hashes if name == "sha256-tree"}
        self._digests = {name: hashlib.new(name, usedforsecurity=False) for name in hashes if name not in self._trees}
        self.sparse = sparse
        self.size = 0

    @property
    def hashes(self) -> dict[str, str]:
        """The digests so far, by name, in hex."""
        flat = {name: digest.hexdigest() for name, digest in self._digests.items()}
        return flat | {name: tree.hexdigest() for name, tree in self._trees.items()}

    @property
    def sha256(self) -> str | None:
        """The SHA-256, in hex; None when it was not wanted."""
        return self.hashes.get("sha256")

    def expect(self, size: int) -> None:
        """Fail now if no file can have this many bytes."""
        if self.sparse:
            os.ftruncate(self._descriptor, size)

    def data(self, content: bytes, *, stored: bool = False) -> None:
        """Append bytes; ``stored`` says that :meth:`store` has written them to their place."""
        if not stored and self.sparse:
            self.store(self.size, content)
        elif not stored:
            self._write_on(content)
        for tree in self._trees.values():
            tree.update(content)
        self._append(content)

    def _append(self, content: bytes) -> None:
        for digest in self._digests.values():
            digest.update(content)
        self.size += len(content)
        self._advance(len(content))

    def zeros(self, length: int) -> None:
        """Append zeros: a hole, where there can be one. Only a tree hash does not have to run through them."""
        for tree in self._trees.values():
            tree.zeros(length)
        if self.sparse and not self._digests:
            self.size += length
            self._advance(length)
            return
        while length:
            piece = _ZEROS if length >= len(_ZEROS) else _ZEROS[:length]
            if not self.sparse:
                self._write_on(piece)
            self._append(piece)
            length -= len(piece)

    def store(self, offset: int, content: bytes) -> None:
        """Write bytes to their place in the file, ahead of their turn; threads may do so in parallel."""
        view = memoryview(content)
        for start, end in data_stretches(content, offset):
            done = start
            while done < end:  # a disk that is full takes a part, and says so at the next call
                piece = content if end - done == len(content) else view[done:end]
                done += _write_at(self._descriptor, piece, offset + done)

    def finish(self) -> None:
        """Give the file its size, which may end in a hole."""
        if self.sparse:
            os.ftruncate(self._descriptor, self.size)

    def _write_on(self, content: bytes) -> None:
        view = memoryview(content)
        while view:
            view = view[os.write(self._descriptor, view) :]


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    with _seeking:  # Windows
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


# --- names ---------------------------------------------------------------------------------------


def is_standard_output(path: Path_) -> bool:
    """Whether ``path`` means what this process writes to, and not a file of its own."""
    return os.fspath(path) in _STANDARD_OUTPUT


def refuse_evidence(path: Path_, evidence: Collection[Path_] = ()) -> None:
    """Raise :class:`IsEvidence` when ``path`` is one of ``evidence``, or any file that is open as a source."""
    target = Path(path)
    if not target.exists():
        return
    if is_being_read(target) or any(Path(item).exists() and target.samefile(item) for item in evidence):
        raise IsEvidence(target)


def refuse_existing(path: Path_, *, force: bool = False, evidence: Collection[Path_] = ()) -> None:
    """Raise what a writer of this file would raise at once: before hours of work, not after them."""
    target = Path(path)
    refuse_missing_folder(target)
    refuse_evidence(target, evidence)
    if target.exists() and not target.is_file():
        raise Qcow2Error(f"{cut(str(target))} is not a regular file")
    if os.path.lexists(target) and not force:
        raise OutputExists(target)


@contextlib.contextmanager
def writing(
    path: Path_,
    advance: Callable[[int], object] = int,
    *,
    force: bool = False,
    evidence: Collection[Path_] = (),
    hashes: Sequence[str] = HASHES[:1],
) -> Iterator[Writer]:
    """Yield the writer of a file, which is there under its name when the block ends well, or of a pipe.

    ``-`` and ``/dev/stdout`` are standard output. Neither ``evidence`` nor any file that is open as a
    source, at the beginning or at the end, is ever replaced, whatever ``force`` says.
    """
    descriptor = _sequential(path)
    if descriptor is None:
        with _whole(Path(path), force=force, evidence=evidence) as descriptor:
            writer = Writer(descriptor, advance, hashes=hashes)
            yield writer
            writer.finish()
        return
    try:
        yield Writer(descriptor, advance, hashes=hashes, sparse=False)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_writer(path: Path_, *, force: bool = False, evidence: Collection[Path_] = ()) -> Iterator[BinaryIO]:
    """Yield a binary file object that gets its name when the block ends well; see :func:`writing`."""
    with (
        _whole(Path(path), force=force, evidence=evidence) as descriptor,
        os.fdopen(descriptor, "w+b", closefd=False) as stream,
    ):
        yield stream


@contextlib.contextmanager
def whole_folder(path: Path_, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder that gets its name when the block ends well, and is gone with all in it when not.

    With ``replace`` the folder that has the name goes away when the new one is whole; one that holds a file
    which was read as a source is refused.
    """
    target = Path(path)
    if os.path.lexists(target) and not replace:
        raise Qcow2Error(f"{cut(str(target))} exists; name a new folder")
    refuse_missing_folder(target)
    partial = _partial(target)

    def make() -> Path:
        with _errors_name(target):
            partial.mkdir(parents=False)
        return partial

    with unfinished(make, lambda folder: shutil.rmtree(folder, ignore_errors=True)):
        yield partial
        with _errors_name(target):
            if replace and target.exists():
                _replace_folder(target, partial)
            else:
                partial.rename(target)


def _replace_folder(target: Path, new: Path) -> None:
    """Give ``new`` the name of a folder, which is then removed; where that fails the folder keeps its name."""
    for path in target.rglob("*"):
        refuse_evidence(path)
    former = new.with_name(f"{new.name}.former")
    try:
        target.rename(former)
        new.rename(target)
        shutil.rmtree(former)
    except BaseException:
        if target.exists():
            shutil.rmtree(former, ignore_errors=True)
        else:
            former.rename(target)
        raise


@contextlib.contextmanager
def _whole(target: Path, *, force: bool, evidence: Collection[Path_]) -> Iterator[int]:
    """Yield the descriptor of an empty file that gets its name when the block ends well."""
    refuse_existing(target, force=force, evidence=evidence)
    partial = _partial(target)

    def make() -> int:
        with _errors_name(target):
            return os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)

    with unfinished(make, lambda _: partial.unlink(missing_ok=True)) as descriptor:
        try:
            yield descriptor
        finally:
            os.close(descriptor)  # may be the first to say that the disk is full
        refuse_evidence(target, evidence)  # what was opened since the beginning, too
        with _errors_name(target):
            os.replace(partial, target)


@contextlib.contextmanager
def cache_file(target: Path) -> Iterator[BinaryIO]:
    """Yield a file for a cache, which only this user may read; it gets its name when the block ends well."""
    import tempfile  # takes time to import, which the writers of outputs do not need

    target.parent.mkdir(parents=True, exist_ok=True)

    def make() -> tuple[int, str]:
        return tempfile.mkstemp(dir=target.parent, prefix=target.stem, suffix=".part")

    def remove(made: tuple[int, str]) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made[1])

    with unfinished(make, remove) as (handle, partial):
        with open(handle, "wb") as file:
            yield file
        os.replace(partial, target)


def refuse_missing_folder(target: Path) -> None:
    """Raise where the folder of a new file is not there."""
    if not target.parent.is_dir():
        known = "is not a folder" if target.parent.exists() else "does not exist"
        raise Qcow2Error(f"{cut(str(target))} cannot be written: the folder {cut(str(target.parent))} {known}")


@contextlib.contextmanager
def _errors_name(target: Path) -> Iterator[None]:
    """Have errors of the operating system name the output, not the hidden name that it has meanwhile."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error


def _partial(target: Path) -> Path:
    # Half of a long name: with what is added it must still be a name.
    kept = target.name if len(os.fsencode(target.name)) < 200 else target.name[: len(target.name) // 2]
    return target.with_name(f".{kept}.{os.getpid()}.partial")


def _sequential(path: Path_) -> int | None:
    """Open what takes bytes only one after the other; None for a name of a file."""
    if is_standard_output(path):
        sys.stdout.flush()
        return os.dup(sys.stdout.fileno())
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode):
        return None
    return os.open(path, os.O_WRONLY)
