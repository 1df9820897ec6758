"""One state of a QCOW2 image as a dissect container."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

from dissect.target import container
from dissect.target.container import Container
from dissect.target.exceptions import Error as TargetError
from dissect.target.helpers import keychain

from qcow2_forensics import (
    ALONE_VARIABLE,
    BACKING_VARIABLE,
    KEY_FILE_VARIABLE,
    Disk,
    ForbiddenReference,
    Locked,
    MissingFile,
    Qcow2Error,
    Remedies,
    Resolver,
    Role,
    SnapshotName,
    Source,
    StreamSource,
    assumptions_from_environment,
    base_name,
    folders_from_environment,
    open_disk,
    passphrases_from_environment,
    reason,
    virtual_size_from_environment,
)

from . import MAGIC

_REMEDIES = Remedies(f"{BACKING_VARIABLE}=FOLDER", "", f"{ALONE_VARIABLE}=1")


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
    resolver: Resolver
    if type(origin).__module__.startswith("dissect.") and not hasattr(origin, "read"):  # a path inside another target
        origin = _PathSource(origin)
        resolver = _Inside(origin)
    else:
        resolver = Resolver(folders=folders_from_environment(), remedies=_REMEDIES)
    disk = open_disk(
        origin,
        snapshot,
        resolver=resolver,
        follow=not os.environ.get(ALONE_VARIABLE),
        assume=assumptions_from_environment(),
        virtual_size=virtual_size_from_environment(),
    )
    try:
        if disk.is_locked:
            _unlock(disk)
    except BaseException:
        disk.close()
        raise
    return disk


def _unlock(disk: Disk) -> None:
    keys = [key.value for key in keychain.get_all_keys() if key.key_type == keychain.KeyType.PASSPHRASE]
    keys += passphrases_from_environment()
    if not keys:
        why = f"dissect's keychain holds no passphrase; give -K or -Kv, or set {KEY_FILE_VARIABLE}"
        raise Locked(disk.locked_method, why, member=disk.locked_member)
    disk.unlock(keys)


class _PathSource(StreamSource):
    """A file inside another target; it keeps its place, against which names in the image are resolved."""

    def __init__(self, place: Any) -> None:
        super().__init__(place.open("rb"), str(place))
        self.place = place.resolve()
        self.identity = ("dissect", self.place)
        self.stands_for = ""  # the name in an image for which this file beside it was taken


class _Inside(Resolver):
    """The policy of :class:`Resolver` inside another target: files below the folder of the image there.

    For a name that leads elsewhere a file of the same base name stands in: of a folder the caller named, else one beside the image.
    """

    def __init__(self, top: _PathSource) -> None:
        super().__init__(folders=folders_from_environment(), remedies=_REMEDIES)
        self._root = top.place.parent

    def _follow(self, name: str, role: Role, parent: Source, top: Source) -> tuple[Source, str | None]:
        try:
            return self._found(name, role, parent, top)
        except Qcow2Error:
            raise
        except (TargetError, OSError, ValueError) as error:  # a loop of links, say
            raise ForbiddenReference(name, f"it cannot be opened: {reason(error, 200)}") from error

    def _found(self, name: str, role: Role, parent: Source, top: Source) -> tuple[Source, str | None]:
        beside = getattr(parent, "place", None)
        if beside is None:  # a file that stands in from a folder of the caller's
            return super()._follow(name, role, parent, top)
        driver, place = None, None
        reference, why = self.parsed(name, role)
        if reference is not None:
            driver, place = reference.driver, beside.parent.joinpath(reference.path).resolve()
            if not place.is_relative_to(self._root):
                why = "it leads outside the folder of the image"
            elif place.is_file():
                return _PathSource(place), driver
        found = self.stand_in(name, role, parent, top) or self._stand_in_inside(name, role, parent, top)
        if found is not None:
            return found, driver
        if why:
            raise ForbiddenReference(name, why)
        raise MissingFile(role, name, [str(place)])

    def _stand_in_inside(self, name: str, role: Role, parent: Source, top: Source) -> _PathSource | None:
        base = base_name(name, role)
        members = [getattr(source, "place", None) for source in (parent, top)]
        for folder in dict.fromkeys(place.parent for place in members if place is not None) if base else ():
            place = folder.joinpath(base).resolve()
            if place.is_relative_to(self._root) and place.is_file() and place not in members:
                found = _PathSource(place)
                found.stands_for = name
                return found
        return None


container.CONTAINERS.insert(0, Qcow2Container)  # before dissect's own
