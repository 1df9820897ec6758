"""Watches what this process opens: evidence's own folder and code, and nothing else.

The hook sees every open, socket and subprocess of Python code, ours or a framework's. What it saw
is kept, not raised: somebody on the way could catch an exception.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.")
_CHANGES = frozenset(
    f"os.{name}"
    for name in (
        "remove",
        "rename",
        "rmdir",
        "mkdir",
        "truncate",
        "chmod",
        "chown",
        "link",
        "symlink",
        "utime",
        "lockf",
    )
) | {"fcntl.flock", "fcntl.lockf", "os.setxattr", "os.removexattr"}
_HARMLESS = ("/dev/null", "/clear_refs")  # the second by our own budget
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def trusted_folders() -> tuple[str, ...]:
    """Return where the interpreter itself reads: code and its caches, and what tells of the machine."""
    paths = {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parent.parent)}
    machine = (f"/proc/{os.getpid()}", "/proc/self", "/sys/devices", "/usr/share/zoneinfo", "/etc/localtime")
    return (*(os.path.realpath(path) for path in paths), *machine, "/dev/null")


class Watch:
    """What may be read and written while it is active; :attr:`seen` lists everything else."""

    def __init__(self, readable: Iterable[Path] = (), writable: Iterable[Path] = ()) -> None:
        self._writable = [os.path.realpath(path) for path in writable]
        self._readable = [*self._writable, *(os.path.realpath(path) for path in readable), *trusted_folders()]
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
        elif event in _CHANGES:
            if isinstance(arguments[0], int) or (isinstance(arguments[-1], int) and arguments[-1] >= 0):
                return  # a descriptor, or a name relative to an open folder, as rmtree has them
            name = _real(arguments[0])
            if not _below(name, self._writable):
                self.seen.append(f"{event} {name}")

    def _open(self, path: object, _mode: object = None, flags: object = 0) -> None:
        if path is None or isinstance(path, int):
            return
        name = _real(path)
        self.opened.add(name)
        writes = isinstance(flags, int) and flags & _WRITING
        if not _below(name, self._writable if writes and not name.endswith(_HARMLESS) else self._readable):
            self.seen.append(f"open {name} {'to write' if writes else 'to read'}")


def _real(path: object) -> str:
    return os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]


def _below(name: str, folders: Iterable[str]) -> bool:
    return any(name == folder or name.startswith(folder + os.sep) for folder in folders)


_active: list[Watch] = []
_installed: list[bool] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _active and (event == "open" or event in _CHANGES or event.startswith(_FORBIDDEN)):
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
        _installed.append(True)
    _active.append(watch)
    try:
        yield watch
    finally:
        _active.remove(watch)
