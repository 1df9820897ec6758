"""Watches what this process opens: evidence's own folder and code, and nothing else.

The hook sees every open, socket and subprocess of Python code, ours or a framework's. What it saw
is kept, not raised: somebody on the way could catch an exception. The hook is given names; what was
opened relative to an open folder is judged by the path of its own descriptor.
"""

from __future__ import annotations

import fcntl
import os
import sys
import sysconfig
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LOCKING = {
    getattr(fcntl, name, None)
    for name in ("F_SETLK", "F_SETLKW", "F_SETLK64", "F_SETLKW64", "F_OFD_SETLK", "F_OFD_SETLKW", "F_SETLEASE")
}
_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.")
# What an event changes: the place of each path among its arguments, and of the open folder it is relative to.
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((0, 2), (1, 3)),  # a further name changes the link count of the first
    "os.symlink": ((1, 2),),
    "os.utime": ((0, 3),),
    "os.setxattr": ((0, None),),
    "os.removexattr": ((0, None),),
}
_LOCKS = {"os.lockf": None, "fcntl.flock": None, "fcntl.lockf": None, "fcntl.fcntl": _LOCKING}  # of which commands
_HARMLESS = ("/dev/null", "/clear_refs")  # the second by our own budget
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def trusted_folders() -> tuple[str, ...]:
    """Return where the interpreter itself reads: code and its caches, and what describes the machine."""
    paths = {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parent.parent)}
    machine = (f"/proc/{os.getpid()}", "/proc/self", "/sys/devices", "/usr/share/zoneinfo", "/etc/localtime")
    return (*(os.path.realpath(path) for path in paths), *machine, "/dev/null")


class Watch:
    """What may be read and written while it is active; :attr:`seen` lists everything else."""

    def __init__(self, readable: Iterable[Path] = (), writable: Iterable[Path] = ()) -> None:
        self._writable = [os.path.realpath(path) for path in writable]
        self._trusted = trusted_folders()
        self._readable = [*self._writable, *(os.path.realpath(path) for path in readable), *self._trusted]
        self.seen: list[str] = []
        self.opened: set[str] = set()

    def take(self) -> list[str]:
        """Return what was seen since the last call, and forget it."""
        found = list(dict.fromkeys(self.seen))
        self.seen.clear()
        return found

    def note(self, event: str, arguments: tuple[object, ...]) -> None:
        """Look at one event of the interpreter."""
        if event == "open":
            self._open(*arguments[:3])
        elif event.startswith(_FORBIDDEN):
            self.seen.append(f"{event} {arguments!r}"[:300])
        elif event in _LOCKS:
            wanted = _LOCKS[event]
            if wanted is None or arguments[1] in wanted:
                self._change(f"{event} of", _of_descriptor(arguments[0]))
        elif event in _CHANGES:
            for place, folder in _CHANGES[event]:
                path = arguments[place]
                beside = -1 if folder is None else arguments[folder]
                if isinstance(path, int):
                    self._change(event, _of_descriptor(path))
                elif isinstance(beside, int) and beside >= 0:
                    self._change(event, os.path.join(_of_descriptor(beside), os.fsdecode(path)))  # type: ignore[arg-type]
                else:
                    self._change(event, _real(path))

    def _change(self, event: str, name: str) -> None:
        if not (_below(name, self._writable) or self._is_of_modules(name)):
            self.seen.append(f"{event} {name}")

    def _is_of_modules(self, name: str) -> bool:
        """Whether this is where the interpreter keeps what it compiled, which it writes when a module is first imported."""
        folder = name if os.path.basename(name) == "__pycache__" else os.path.dirname(name)
        return os.path.basename(folder) == "__pycache__" and _below(folder, self._trusted)

    def _open(self, path: object, _mode: object = None, flags: object = 0) -> None:
        if path is None or isinstance(path, int):
            return
        self.look_at(_real(path), flags)

    def look_at(self, name: str, flags: object) -> None:
        """Look at one file that is opened, by its real path."""
        self.opened.add(name)
        writes = isinstance(flags, int) and flags & _WRITING and not self._is_of_modules(name)
        if not _below(name, self._writable if writes and not name.endswith(_HARMLESS) else self._readable):
            self.seen.append(f"open {name} {'to write' if writes else 'to read'}")


def _of_descriptor(descriptor: object) -> str:
    """Return the path of what is open, as far as the system says it."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return f"descriptor {descriptor}"


def _real(path: object) -> str:
    """Return the path without links; of a file that is not there yet, that of its folder and its name.

    Not by halves: ``realpath`` that is not strict stops at a loop, and what is left may look harmless.
    """
    text = os.path.join(os.getcwd(), os.fsdecode(path))  # type: ignore[arg-type]
    try:
        return os.path.realpath(text, strict=True)
    except OSError:
        pass
    try:
        return os.path.join(os.path.realpath(os.path.dirname(text), strict=True), os.path.basename(text))
    except OSError:
        return text if ".." in text.split(os.sep) else os.path.realpath(text)


def _below(name: str, folders: Iterable[str]) -> bool:
    return any(name == folder or name.startswith(folder + os.sep) for folder in folders)


_active: list[Watch] = []
_installed: list[bool] = []
_relative = threading.local()  # set while this thread opens a name relative to an open folder
_really_open = os.open


def _open_and_look(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    """Open as ``os.open`` does; what is relative to a folder is looked at when it is open."""
    if dir_fd is None or not _active or os.path.isabs(path):
        return _really_open(path, flags, mode, dir_fd=dir_fd)
    _relative.busy = True
    try:
        descriptor = _really_open(path, flags, mode, dir_fd=dir_fd)
    finally:
        _relative.busy = False
    if os.path.isdir("/proc/self/fd"):
        name = _of_descriptor(descriptor)
        for watch in _active:
            watch.look_at(name, flags)
    return descriptor


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and getattr(_relative, "busy", False):
        return
    if _active and (event == "open" or event in _CHANGES or event in _LOCKS or event.startswith(_FORBIDDEN)):
        watchers, _active[:] = list(_active), []  # what looking itself opens is not evidence's doing
        try:
            for watch in watchers:
                watch.note(event, arguments)
        finally:
            _active[:] = watchers


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Have ``watch`` see what happens inside."""
    if not _installed:
        sys.addaudithook(_hook)  # there is no way to take a hook out again
        os.open = _open_and_look  # type: ignore[assignment]
        _installed.append(True)
    _active.append(watch)
    try:
        yield watch
    finally:
        _active.remove(watch)
