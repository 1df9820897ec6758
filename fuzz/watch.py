"""Watches what the process opens: a case may touch its own folder and nothing else.

The hook sees every open, socket and subprocess of Python code, ours or a framework's. What it saw
is kept, not raised: some library might catch an exception.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from pathlib import Path

_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.")
_CHANGES = ("os.remove", "os.rename", "os.truncate", "os.chmod", "os.chown", "os.link", "os.symlink", "os.utime")

seen: list[str] = []
_active = False


def _trusted() -> tuple[str, ...]:
    """Folders the interpreter itself reads from: code, its caches, and what tells it about the machine."""
    paths = {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parent.parent)}
    return (
        *(os.path.realpath(path) for path in paths),
        f"/proc/{os.getpid()}/",
        "/proc/self/",
        "/sys/devices",
        "/etc/localtime",
        "/dev/null",
    )


_folders: tuple[str, ...] = ()


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _active:
        return
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, int):
            return
        name = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        if not name.startswith(_temporary) and not name.startswith(_folders):
            seen.append(f"open {name}")
    elif event.startswith(_FORBIDDEN):
        seen.append(f"{event} {arguments!r}"[:300])
    elif event in _CHANGES:
        if isinstance(arguments[-1], int) and arguments[-1] >= 0:
            return  # relative to an open folder, as rmtree does
        name = os.path.realpath(os.fsdecode(arguments[0]))  # type: ignore[arg-type]
        if not name.startswith(_temporary):
            seen.append(f"{event} {name}")


_temporary = os.path.realpath(tempfile.gettempdir()) + os.sep
_installed = False


def start() -> None:
    """Begin watching; from now on what is seen belongs to cases."""
    global _active, _folders, _installed
    _folders = _trusted()  # of this process
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    _active = True


def take() -> list[str]:
    """Return what was seen since the last call, and forget it."""
    found = list(dict.fromkeys(seen))
    seen.clear()
    return found
