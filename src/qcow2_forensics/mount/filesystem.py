"""Folders of read-only files as a mounted file system, through mfusepy over libfuse.

FUSE calls from several threads at once, so nothing here changes after the start. What cannot be read
is EIO to whoever reads, and a sentence for the caller, once.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from ctypes.util import find_library
from typing import Any

from ..errors import Qcow2Error
from ..limits import MOUNT_MESSAGES
from .served_files import File, seek_data, seek_hole

Folder = Mapping[str, File]

_DEVICE = "/dev/fuse"
_BLOCK = 512  # the unit of st_blocks
_ENDED = 7  # what libfuse returns when its loop ended otherwise than by unmounting: by a signal


class Unmountable(Qcow2Error):
    """Nothing can be mounted here; the message says what is missing."""


def need_fuse() -> None:
    """Raise :class:`Unmountable` where this machine or this Python cannot mount."""
    # libfuse 2 knows no SEEK_HOLE; mfusepy would prefer it where both are installed.
    if find_library("fuse3"):
        os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")
    try:
        import mfusepy  # noqa: F401 - asked for here, used below
    except ModuleNotFoundError as error:
        raise Unmountable("mounting needs mfusepy: pip install 'qcow2-forensics[mount]'") from error
    except (OSError, AttributeError) as error:  # no libfuse, or one too old
        raise Unmountable(f"mounting needs libfuse (Debian and Ubuntu: apt install fuse3): {error}") from error
    if sys.platform == "linux" and not os.path.exists(_DEVICE):
        raise Unmountable(
            f"mounting needs {_DEVICE}, which this machine or container does not have "
            "(load the kernel module fuse, or start the container with --device /dev/fuse --cap-add SYS_ADMIN); "
            "'export' writes a state to a file instead"
        )
    if sys.platform == "linux" and not os.access(_DEVICE, os.R_OK | os.W_OK):
        raise Unmountable(f"{_DEVICE} may not be opened by this user")


class FuseOperations:
    """The operations FUSE asks for: look up, list, read, seek to data and holes. Everything else is refused."""

    use_ns = True  # times are integers in nanoseconds

    def __init__(self, folders: Mapping[str, Folder], say: Callable[[str], object]) -> None:
        self._folders = folders
        self._say = say
        self._owner = {"st_uid": os.getuid(), "st_gid": os.getgid()}
        self._opened: list[File] = [file for folder in folders.values() for file in folder.values()]
        self._handles = {id(file): number for number, file in enumerate(self._opened)}
        self._sentences: set[str] = set()

    def _find(self, path: str) -> File | Folder | Mapping[str, Folder]:
        found: Any = self._folders
        for part in path.strip("/").split("/") if path != "/" else ():
            if not isinstance(found, Mapping) or part not in found:
                raise _refused(errno.ENOENT)
            found = found[part]
        return found  # type: ignore[no-any-return]

    def getattr(self, path: str, handle: int | None = None) -> dict[str, int]:  # noqa: ARG002 - the interface's
        found = self._find(path)
        if isinstance(found, File):
            size, time = found.content.size, found.time
            blocks = -(-found.content.stored_bytes // _BLOCK)
            kind = {"st_mode": stat.S_IFREG | 0o444, "st_nlink": 1, "st_size": size, "st_blocks": blocks}
        else:
            below = [item for item in found.values() if not isinstance(item, File)]
            files = [item for item in found.values() if isinstance(item, File)]
            files += [file for folder in below for file in folder.values()]
            time = max((file.time for file in files), default=0)
            kind = {"st_mode": stat.S_IFDIR | 0o555, "st_nlink": 2 + len(below)}
        return {**kind, **self._owner, "st_mtime": time, "st_ctime": time, "st_atime": time}

    def readdir(self, path: str, handle: int) -> Iterator[str]:  # noqa: ARG002
        found = self._find(path)
        if isinstance(found, File):
            raise _refused(errno.ENOTDIR)
        yield from (".", "..", *found)

    def open(self, path: str, flags: int) -> int:
        found = self._find(path)
        if not isinstance(found, File):
            raise _refused(errno.EISDIR)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise _refused(errno.EROFS)
        return self._handles[id(found)]

    def read(self, path: str, size: int, offset: int, handle: int) -> bytes:  # noqa: ARG002
        file = self._opened[handle]
        length = min(size, file.content.size - offset)
        if length <= 0:
            return b""
        try:
            return file.content.read(offset, length)
        except (Qcow2Error, OSError) as error:
            raise self._failed(file, error) from error

    def lseek(self, path: str, offset: int, whence: int, handle: int) -> int:  # noqa: ARG002
        """Answer ``SEEK_DATA`` and ``SEEK_HOLE``; the kernel answers every other seek itself."""
        file = self._opened[handle]
        if offset >= file.content.size:
            raise _refused(errno.ENXIO)
        try:
            found = (seek_data if whence == os.SEEK_DATA else seek_hole)(file.content, offset)
        except (Qcow2Error, OSError) as error:
            raise self._failed(file, error) from error
        if found is None:
            raise _refused(errno.ENXIO)
        return found

    def statfs(self, path: str) -> dict[str, int]:  # noqa: ARG002
        stored = sum(file.content.stored_bytes for file in self._opened)
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": -(-stored // 4096), "f_namemax": 255}

    def _failed(self, file: File, error: Exception) -> OSError:
        sentence = f"{file.name}: {error}"
        if sentence not in self._sentences and len(self._sentences) < MOUNT_MESSAGES:
            self._sentences.add(sentence)
            self._say(sentence)
        return _refused(errno.EIO)


def _refused(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def serve(
    folders: Mapping[str, Folder],
    mount_point: str,
    say: Callable[[str], object],
    *,
    foreground: bool,
    allow_other: bool,
    label: str,
) -> None:
    """Mount ``folders`` at an empty folder and answer until it is unmounted, or Ctrl-C.

    ``say`` is given a sentence for each range that cannot be read. Not in the foreground, the calling
    process ends here with 0 once the mount is there, and a child of it goes on. ``label`` is what
    ``mount`` and ``df`` show.
    """
    need_fuse()
    import mfusepy

    class Mount(mfusepy.FUSE):  # type: ignore[misc]
        """mfusepy's loop, with the one operation it has no wrapper for."""

        def lseek(self, path: bytes | None, offset: int, whence: int, info: Any) -> int:
            return self.operations.lseek(path, offset, whence, info.contents.fh)  # type: ignore[no-any-return]

    # libfuse 3.14 grumbles at its own default.
    more = {"max_idle_threads": 10} if mfusepy.fuse_version_major == 3 else {}
    try:
        Mount(
            FuseOperations(folders, say),
            mount_point,
            foreground=foreground,
            nothreads=False,
            ro=True,
            nosuid=True,
            nodev=True,
            noexec=True,
            default_permissions=True,
            allow_other=allow_other,
            kernel_cache=True,  # what is cached stays true: nothing here ever changes
            attr_timeout=3600,
            entry_timeout=3600,
            fsname=label,
            subtype="qcow2-forensics",
            **more,
        )
    except RuntimeError as error:
        if error.args[0] >= _ENDED:
            return
        hint = "; --allow-other needs user_allow_other in /etc/fuse.conf" if allow_other and os.getuid() else ""
        raise Unmountable(f"libfuse could not mount at {mount_point}; its reason is above{hint}") from error
