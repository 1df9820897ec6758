"""The names an image carries, and the chain of files they lead to, under the caller's policy."""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ForbiddenReference, MissingFile, NotQcow2, Qcow2Error, reason
from ..format.extensions import ExtensionType
from ..format.header import SECTOR
from ..format.image import Image
from ..format.source import FileSource, Source
from ..reader.foreign import probe
from ..reader.references import Role, besides_the_file
from ..reader.resolver import Resolver
from ..reader.stand_in import misfit
from ..reader.window import part_of
from ..text import decoded
from .facts import Facts

CHAIN_DEEP = 16  # members; longer chains are reported
_PROTOCOL = re.compile(r"([^/\\]*?):")  # QEMU: a colon before the first slash
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@dataclass(frozen=True, slots=True)
class Name:
    """One name as stored: ``offset`` is where its bytes are, ``effective`` what QEMU uses."""

    role: Role
    stored: bytes
    offset: int

    @property
    def effective(self) -> bytes:
        """The bytes up to the first NUL."""
        return self.stored.split(b"\0", 1)[0]

    @property
    def text(self) -> str:
        """The effective name as text; undecodable bytes become lone surrogates."""
        return decoded(self.effective)

    @property
    def protocol(self) -> str:
        """What is before the first colon, where QEMU takes that for a driver; empty without."""
        if _DRIVE.match(self.text):
            return ""
        match = _PROTOCOL.match(self.text)
        return match.group(1) if match else ""

    @property
    def path(self) -> str:
        """The name without a ``file:`` prefix."""
        return self.text.removeprefix("file:").removeprefix("//") if self.protocol == "file" else self.text

    @property
    def leaves_folder(self) -> bool:
        """Whether a relative name leads above the image's folder."""
        if self.is_absolute or (self.protocol and self.protocol != "file"):
            return False
        path = posixpath.normpath(self.path.replace("\\", "/"))
        return path == ".." or path.startswith("../")

    @property
    def is_plain(self) -> bool:
        """Whether the name means a file in or below the image's folder."""
        return not (self.is_absolute or self.leaves_folder or (self.protocol and self.protocol != "file"))

    @property
    def is_absolute(self) -> bool:
        """Whether the name is a path from a root: POSIX, a drive letter or a network share."""
        return self.path.startswith(("/", "\\\\")) or bool(_DRIVE.match(self.path))


def names(facts: Facts) -> tuple[Name, ...]:
    """Return the backing and data file names the image carries, empty ones left out."""
    return facts.once(_names)


def _names(facts: Facts) -> tuple[Name, ...]:
    image, header = facts.image, facts.header
    found = []
    if image.backing_name:
        at = header.backing_file_offset
        found.append(Name("backing", image.read(at, header.backing_file_size), at))
    extension = image.extension(ExtensionType.DATA_FILE) if header.version > 1 else None
    if extension is not None and extension.data.split(b"\0", 1)[0]:
        found.append(Name("data", extension.data, extension.data_offset))
    return tuple(found)


# --- where the names lead ------------------------------------------------------------------------

Status = Literal["found", "missing", "refused", "broken", "loop", "unknown"]


@dataclass(frozen=True, slots=True)
class Member:
    """One file a name leads to, and what it is; only what is ``found`` may be read."""

    role: Role
    name: str
    status: Status
    why: str = ""
    path: str = ""
    probed: str = ""
    declared: str | None = None
    file_size: int = 0
    disk_size: int | None = None
    mtime: float | None = None
    tried: tuple[str, ...] = ()
    depth: int = 1
    overlay_mtime: float | None = None
    stands_in: bool = False


@dataclass(frozen=True, slots=True)
class Chain:
    """Everything the names lead to, nearest first; ``length`` counts the image itself."""

    backing: tuple[Member, ...]
    data: Member | None
    length: int

    @property
    def members(self) -> tuple[Member, ...]:
        """The backing files and the data file."""
        return (*self.backing, *((self.data,) if self.data is not None else ()))


def chain(facts: Facts) -> Chain:
    """Follow the names as far as the resolver allows; only headers are read."""
    return facts.once(_chain)


def files_followed(facts: Facts) -> list[str]:
    """Return the paths of the backing and data files that were opened, nearest first."""
    try:
        members = chain(facts).members if facts.image.has_geometry and names(facts) else ()
    except (Qcow2Error, OSError):
        return []
    return [member.path for member in members if member.status == "found" and member.path]


@contextmanager
def opened_data_file(facts: Facts) -> Iterator[FileSource | None]:
    """Open the external data file until the block ends; None where there is none that may be read."""
    member = chain(facts).data
    if member is None or member.status != "found" or not member.path:
        yield None
        return
    with closing(FileSource(member.path, regular_only=True)) as data:
        yield data


def _chain(facts: Facts) -> Chain:
    image = facts.image
    data = None
    if image.header.external_data and image.data_file_name:
        with _Follower(facts) as follower:
            data, _ = follower.open(image.data_file_name, "data", image)
    with _Follower(facts) as follower:
        members = tuple(_members(facts, follower))
    return Chain(members, data, 1 + len(members))


def _members(facts: Facts, follower: _Follower) -> Iterator[Member]:
    current, depth = facts.image, 1
    while current.backing_name and depth <= facts.limits.chain_depth + 1:
        declared = current.backing_format if current.header.version > 1 else None
        member, source = follower.open(current.backing_name, "backing", current, declared, depth)
        yield member
        if source is None or (declared or member.probed) not in ("qcow2", "qcow"):
            return
        depth += 1
        try:
            current = Image(source, limits=facts.limits)
        except (NotQcow2, OSError):
            return


def _identities(source: Source) -> list[Any]:
    """Return what identifies a file: what the source says, and device and inode of its path."""
    found = [getattr(source, "identity", None)]
    path = getattr(source, "path", None)
    if path is not None:
        with suppress(OSError, ValueError):
            status = os.stat(path)
            found.append((status.st_dev, status.st_ino))
    return [identity for identity in dict.fromkeys(found) if identity is not None]


class _Follower(ExitStack):
    """Opens what names lead to, until the block ends, and knows the files that were opened."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self._top = facts.image.source
        self._resolver = facts.resolver or Resolver()
        self._seen = _identities(self._top)

    def open(
        self, name: str, role: Role, parent: Image, declared: str | None = None, depth: int = 1
    ) -> tuple[Member, Source | None]:
        """Return what a name in ``parent`` leads to, and its source where it may be read."""
        try:
            source, driver = self._resolver.open(name, role, parent.source, self._top)
        except MissingFile as error:
            return Member(role, name, "missing", reason(error), tried=error.tried, depth=depth), None
        except ForbiddenReference as error:
            return Member(role, name, "unknown" if self._is_blind else "refused", error.why, depth=depth), None
        except (Qcow2Error, OSError) as error:
            return Member(role, name, "broken", reason(error), depth=depth), None
        self.callback(getattr(source, "close", lambda: None))
        path = str(getattr(source, "path", "") or "")
        stands_in = bool(getattr(source, "stands_for", ""))
        if stands_in:
            why = misfit(source, role, driver or declared, parent)
            if why:
                return Member(role, name, "refused", f"{path} cannot be that file: {why}", path, depth=depth), None
        if any(identity in self._seen for identity in _identities(source)):
            return Member(role, name, "loop", "the file is already part of the chain", path, depth=depth), None
        try:
            if role == "backing":
                source = part_of(source, besides_the_file(name, named=name in self._resolver.files))
            probed = probe(source)
            disk_size = _disk_size(source, driver or declared or probed)
        except (Qcow2Error, OSError) as error:
            return Member(role, name, "broken", reason(error), depth=depth), None
        self._seen += _identities(source)
        member = Member(
            role,
            name,
            "found",
            path=path,
            probed=probed,
            declared=driver or declared,
            file_size=source.size,
            disk_size=disk_size,
            mtime=mtime_of(source),
            depth=depth,
            overlay_mtime=mtime_of(parent.source),
            stands_in=stands_in,
        )
        return member, source

    @property
    def _is_blind(self) -> bool:
        """Whether there is no folder to look in: opened without a path, nothing is known about the file."""
        resolver = self._resolver
        return getattr(self._top, "path", None) is None and not resolver.files and not resolver.folders


def _disk_size(source: Source, kind: str) -> int | None:
    if kind == "raw":
        return -(-source.size // SECTOR) * SECTOR
    if kind in ("qcow2", "qcow"):
        try:
            return Image(source).disk_size
        except NotQcow2:
            return None
    return None


def mtime_of(source: Source) -> float | None:
    """Return when the file of a source was last changed, None when it is no open file."""
    fileno, path = getattr(source, "fileno", None), getattr(source, "path", None)
    try:
        status = os.fstat(fileno()) if fileno is not None else os.stat(path) if path is not None else None
    except (OSError, ValueError):
        return None
    if status is None:
        return None
    return status.st_mtime if stat.S_ISREG(status.st_mode) else None


def is_beside(facts: Facts, path: str) -> bool:
    """Whether a file of that base name is in the image's own folder; looks nowhere else."""
    base = re.split(r"[\\/]", path)[-1]
    if facts.path is None or base in ("", ".", ".."):
        return False
    try:
        return os.path.lexists(Path(os.path.abspath(facts.path)).parent / base)
    except ValueError:  # a NUL
        return False
