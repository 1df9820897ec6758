"""Opens regular files below the folders a caller allows, whatever links the evidence holds.

The path is walked here, one component at a time, from the descriptor of an allowed folder. Nothing
outside the allowed folders is looked at, not even to see whether it exists::

    allowed: /case                  walked                      result
    /case/sub/../base.raw           open sub, back, open base   the file
    /case/link -> /case/base.raw    back to /, down to /case    the file
    /case/link -> /etc/passwd       /etc is on no way           refused, nothing touched
    /case/../other/base.raw         /other is on no way         refused, nothing touched

The kernel follows no link: every descriptor is opened with ``O_NOFOLLOW`` relative to the one before,
so that a file swapped for a link between two steps is an error and not another file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..limits import PATH_BYTES, SYMBOLIC_LINKS

_FILE_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)  # a FIFO put there in between must not block
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_BINARY", 0)
)
_FOLDER_FLAGS = (
    getattr(os, "O_PATH", os.O_RDONLY)
    | getattr(os, "O_DIRECTORY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
)
HAS_DESCRIPTOR_PATHS = {os.stat, os.readlink} <= os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")


class LeavesFolders(Exception):
    """The path, or a link on its way, leads outside the allowed folders."""


class NotRegular(Exception):
    """The path leads to something that is not a regular file."""


class Folder(NamedTuple):
    """A folder the caller allows: ``real`` without links, ``named`` as the caller wrote it; both absolute."""

    real: str
    named: str


def folder(path: str | os.PathLike[str]) -> Folder | None:
    """Return a folder the caller named, None when there is no such folder."""
    text = os.fsdecode(os.fspath(path)) or os.curdir
    try:
        real = os.path.realpath(text, strict=True)
    except (OSError, ValueError):
        return None
    # ".." is not taken out of the name: behind a link it leads elsewhere than the text says.
    named = os.path.join(os.getcwd(), text) if ".." not in _components(text) else real
    return Folder(real, named)


def open_below(folders: Sequence[Folder], path: str) -> tuple[int, str]:
    """Open the regular file that the absolute ``path`` means; returns its descriptor and its real path.

    Raises :class:`LeavesFolders`, :class:`NotRegular`, and OSError, of which FileNotFoundError and
    NotADirectoryError say that there is no such file.
    """
    if len(os.fsencode(path)) >= PATH_BYTES + max((len(os.fsencode(item.real)) for item in folders), default=0):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if not HAS_DESCRIPTOR_PATHS:
        return _open_by_name(folders, path)
    walk = _Walk(folders)
    try:
        return walk.open(path)
    finally:
        walk.close()


def _components(path: str) -> list[str]:
    return path.replace(os.altsep, os.sep).split(os.sep) if os.altsep else path.split(os.sep)


class _Walk:
    """A position in the file system, with the descriptors from the allowed folder it is in down to it."""

    def __init__(self, folders: Sequence[Folder]) -> None:
        self._roots = [_plain(item.real) for item in folders]
        self._names = [(_plain(item.named), _plain(item.real)) for item in folders]
        self._at: list[str] = []  # real components of the position
        self._open: list[int] = []  # descriptors of the allowed folder and of the folders below; empty outside
        self._links = 0

    def open(self, path: str) -> tuple[int, str]:
        pending = self._from_the_top(path)
        while pending:
            name = pending.pop()
            if name in ("", "."):
                continue
            if name == "..":
                self._up()
            elif not self._open:
                self._approach(name)
            else:
                status = os.stat(name, dir_fd=self._open[-1], follow_symlinks=False)
                if stat.S_ISLNK(status.st_mode):
                    pending += self._follow(name)
                elif pending:  # also "name/" and "name/.": a folder is meant
                    self._down(name)
                else:
                    return self._regular(name, status), os.sep + os.sep.join([*self._at, name])
        raise NotRegular

    def close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    def _from_the_top(self, path: str) -> list[str]:
        """Return what is to be walked from the root on, last component first."""
        self.close()
        self._at = []
        self._enter()
        parts = _components(path)
        plain = [part for part in parts if part not in ("", ".")]
        for named, real in self._names:
            if plain[: len(named)] == named and named != real:
                used, at = len(named), 0
                while used:  # of the parts as they are written: "name/." at the end keeps its meaning
                    used -= parts[at] not in ("", ".")
                    at += 1
                parts = [*real, *parts[at:]]
                break
        return parts[::-1]

    def _up(self) -> None:
        if self._open:
            os.close(self._open.pop())
        del self._at[-1:]
        if not self._open:
            self._enter()  # the root folder is above itself

    def _approach(self, name: str) -> None:
        """Go down outside the allowed folders: on the way to one of them only, which needs no look at it."""
        self._at.append(name)
        if not any(root[: len(self._at)] == self._at for root in self._roots):
            raise LeavesFolders
        self._enter()

    def _enter(self) -> None:
        if any(root == self._at for root in self._roots):
            self._open.append(os.open(os.sep + os.sep.join(self._at), _FOLDER_FLAGS))

    def _down(self, name: str) -> None:
        self._open.append(os.open(name, _FOLDER_FLAGS, dir_fd=self._open[-1]))
        self._at.append(name)

    def _follow(self, name: str) -> list[str]:
        self._links += 1
        if self._links > SYMBOLIC_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = os.readlink(name, dir_fd=self._open[-1])
        return self._from_the_top(target) if os.path.isabs(target) else _components(target)[::-1]

    def _regular(self, name: str, status: os.stat_result) -> int:
        if not stat.S_ISREG(status.st_mode):
            raise NotRegular  # not opened: opening a device or a FIFO can have effects
        descriptor = os.open(name, _FILE_FLAGS, dir_fd=self._open[-1])
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was swapped in between
            os.close(descriptor)
            raise NotRegular
        return descriptor


def _plain(path: str) -> list[str]:
    return [part for part in _components(path) if part not in ("", ".")]


def _open_by_name(folders: Sequence[Folder], path: str) -> tuple[int, str]:
    """Do without descriptors of folders: resolve strictly, open, and see that the name still leads there."""
    lexical = os.path.normpath(path)
    if not is_below(lexical, [name for item in folders for name in item]):
        raise LeavesFolders
    roots = [item.real for item in folders]
    real = os.path.realpath(path, strict=True)
    if not is_below(real, roots):
        raise LeavesFolders
    if _components(path)[-1] in ("", "."):  # "name/" and "name/.": a folder is meant
        raise NotRegular if os.path.isdir(real) else NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not stat.S_ISREG(os.stat(real).st_mode):
        raise NotRegular
    descriptor = os.open(real, _FILE_FLAGS)
    try:
        opened = os.fstat(descriptor)
        if not stat.S_ISREG(opened.st_mode):
            raise NotRegular
        again = os.path.realpath(real, strict=True)
        if not is_below(again, roots) or not os.path.samestat(opened, os.stat(again)):
            raise LeavesFolders
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, real


def is_below(path: str, folders: Iterable[str]) -> bool:
    """Whether a path lies below a folder by its text."""
    return any(path.startswith(item.rstrip(os.sep) + os.sep) for item in folders)
