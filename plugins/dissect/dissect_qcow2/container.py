"""One state of a QCOW2 image as a dissect container."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

from dissect.target import container
from dissect.target.container import Container
from dissect.target.helpers import keychain

from qcow2_forensics import Disk, Locked, Resolver, StreamSource, open_disk
from qcow2_forensics.errors import ForbiddenReference, MissingFile
from qcow2_forensics.format.source import Source
from qcow2_forensics.reader.opening import SnapshotName
from qcow2_forensics.reader.passphrases import KEY_FILE_VARIABLE, from_environment
from qcow2_forensics.reader.resolver import Role, parse_reference

MAGIC = b"QFI\xfb"


class Qcow2Container(Container):
    """The active state of an image, or the snapshot that is named.

    ``fh`` is a path, local or inside another target, or a binary file object. Encrypted images take their passphrase from
    dissect's keychain (``-K``, ``-Kv``).
    """

    __type__ = "qcow2"

    def __init__(self, fh: Any, snapshot: SnapshotName = None, *args: Any, **kwargs: Any) -> None:
        first = fh[0] if isinstance(fh, list) else fh
        self.disk = open_state(first, snapshot)
        self.stream = self.disk.open()
        super().__init__(fh, self.disk.size, *args, **kwargs)

    @staticmethod
    def _detect_fh(fh: BinaryIO, original: Any) -> bool:  # noqa: ARG004 - dissect's interface
        return fh.read(len(MAGIC)) == MAGIC

    @staticmethod
    def detect_path(path: Path, original: Any) -> bool:  # noqa: ARG004
        """Leave it to the first bytes of the file: a name proves nothing."""
        return False

    def read(self, length: int = -1) -> bytes:
        return self.stream.read(length) or b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()

    def close(self) -> None:
        self.stream.close()
        self.disk.close()


def open_state(origin: Any, snapshot: SnapshotName) -> Disk:
    """Open a state of an image, with the passphrases of the keychain: every member of a chain takes the one that fits."""
    if hasattr(origin, "read"):
        disk = open_disk(origin, snapshot)
    elif type(origin).__module__.startswith("dissect."):  # a path inside another target
        disk = open_disk(_PathSource(origin), snapshot, resolver=_Inside(origin))
    else:
        disk = open_disk(origin, snapshot)
    try:
        if disk.is_locked:
            _unlock(disk)
    except BaseException:
        disk.close()
        raise
    return disk


def _unlock(disk: Disk) -> None:
    keys = [key.value for key in keychain.get_all_keys() if key.key_type == keychain.KeyType.PASSPHRASE]
    keys += from_environment()
    if not keys:
        why = f"dissect's keychain holds no passphrase; give -K or -Kv, or set {KEY_FILE_VARIABLE}"
        raise Locked("encrypted image", why, member=disk.locked_member)
    disk.unlock(keys)


class _PathSource(StreamSource):
    """A file inside another target; it keeps its path, against which names in the image are resolved."""

    def __init__(self, path: Any) -> None:
        super().__init__(path.open("rb"), str(path))
        self.place = path


class _Inside(Resolver):
    """The policy of :class:`Resolver` inside another target: files below the folder of the image, no others."""

    def __init__(self, top: Any) -> None:
        super().__init__()
        self._root = top.resolve().parent

    def open(self, name: str, role: Role, parent: Source, top: Source) -> tuple[Source, str | None]:  # noqa: ARG002
        reference = parse_reference(name, role)
        beside = getattr(parent, "place", None)
        if beside is None:
            raise ForbiddenReference(name, "the image was not opened by path, so it has no folder")
        place = beside.resolve().parent.joinpath(reference.path).resolve()
        if not place.is_relative_to(self._root):
            raise ForbiddenReference(name, "it leads outside the folder of the image")
        if not place.is_file():
            raise MissingFile(role, name, [str(place)])
        return _PathSource(place), reference.driver


container.CONTAINERS.insert(0, Qcow2Container)  # before dissect's own
