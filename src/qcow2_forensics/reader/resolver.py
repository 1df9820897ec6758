r"""Names found in an image become files, under a policy the caller chooses.

::

    name --parse--> path --below an allowed folder?--> the file it means
                      \--elsewhere, or not there--> a file of the same base name in the folders the
                         caller named, or in the image's own: it stands in, if it fits, and is reported

By default only plain files below the folder of the image the caller named are opened; everything else
is refused with the reason and with what would allow it. Nothing outside those folders is looked at.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import ForbiddenReference, MissingFile, Qcow2Error
from ..format.source import FileSource, Source, source_name
from .confined import Folder, LeavesFolders, NotRegular, folder, is_below, open_below
from .references import Reference, Role, base_name, parse_reference

BACKING_VARIABLE = "QCOW2_BACKING_DIR"  # further folders, for tools that take no options of ours
ALONE_VARIABLE = "QCOW2_NO_BACKING"  # not empty: images are read without their backing files there


class Remedies(NamedTuple):
    """The options of a front door that allow a reference, as errors name them; empty where there is none."""

    folder: str  # names a further folder
    file: str = ""  # names the file
    alone: str = ""  # reads the image without its backing file

    def for_file(self) -> str:
        """What gives a file of the caller's for a name."""
        return f"give the file with {self.file}" if self.file else f"put the file in a folder and give {self.folder}"

    def for_reference(self) -> str:
        """What to do about a name that is not followed."""
        named = f", or the file with {self.file}" if self.file else ""
        return f"to allow it, give its folder with {self.folder}{named}"

    def for_missing(self, role: Role) -> str:
        """What to do about a file that is not there."""
        named = f", or the file with {self.file}" if self.file else ""
        without = f", or do without it: {self.alone}" if self.alone and role == "backing" else ""
        return f"give its folder with {self.folder}{named}{without}"


PYTHON = Remedies("Resolver(folders=[FOLDER])", "Resolver(files={NAME: PATH})", "open_disk(..., follow=False)")
COMMAND_LINE = Remedies("--backing-dir DIR", "--backing-file NAME=PATH", "--no-backing")


def folders_from_environment() -> list[str]:
    """Return the folders that ``QCOW2_BACKING_DIR`` names, separated as in ``PATH``."""
    return [item for item in os.environ.get(BACKING_VARIABLE, "").split(os.pathsep) if item]


class Resolver:
    """Opens backing and data files.

    ``folders`` are further folders the caller trusts: names that lead below them are followed, and
    a file of the same base name in them stands in for a name that leads elsewhere. ``files`` maps
    names exactly as the image has them to paths, ``formats`` the same names to their formats.
    ``remedies`` says how errors call all this. Subclass and override :meth:`open` to resolve names
    inside another file system.
    """

    def __init__(
        self,
        *,
        folders: Iterable[str | os.PathLike[str]] = (),
        files: Mapping[str, str | os.PathLike[str]] | None = None,
        formats: Mapping[str, str] | None = None,
        remedies: Remedies = PYTHON,
    ) -> None:
        self._folders = tuple(found for found in map(folder, folders) if found is not None)
        self.folders = tuple(Path(item.real) for item in self._folders)
        self.files = {name: os.fspath(path) for name, path in (files or {}).items()}
        self.formats = dict(formats or {})
        self.remedies = remedies

    def open(self, name: str, role: Role, parent: Source, top: Source) -> tuple[Source, str | None]:
        """Return the file a name in ``parent`` means, and the driver the name itself fixes, if any.

        ``top`` is the image the caller opened: its folder bounds what is followed. A file that was
        taken for a name that leads elsewhere says so in ``stands_for``. Raises
        :class:`ForbiddenReference` or :class:`MissingFile`.
        """
        if name in self.files:
            return self._open_named(name, role), self.formats.get(name)
        try:
            return self._follow(name, role, parent, top)
        except (ForbiddenReference, MissingFile) as error:
            raise self.with_remedy(error, role, parent) from error.__cause__

    def _follow(self, name: str, role: Role, parent: Source, top: Source) -> tuple[Source, str | None]:
        search = self._search(name, top)
        driver = None
        reference, why = self.parsed(name, role)
        if reference is not None:
            if reference.path.endswith("/"):
                raise ForbiddenReference(name, "it names a folder")
            driver = reference.driver
            place = _place(reference.path, parent)
            found = search.open(place) if place is not None else None
            if found is not None:
                return found, driver
            if search.leaves:
                why = "it leads outside the folder of the image"
            elif place is None:
                why = "the image was not opened by path, so it has no folder"
        stand_in = self._beside(search, role, parent, top)
        if stand_in is not None:
            return stand_in, driver
        if why:
            raise ForbiddenReference(name, why)
        raise MissingFile(role, name, dict.fromkeys(search.tried))

    def parsed(self, name: str, role: Role) -> tuple[Reference | None, str]:
        """Return what a name asks for; None and the reason where only a file that stands in may be opened for it."""
        try:
            return parse_reference(name, role), ""
        except ForbiddenReference as error:
            if not base_name(name, role):
                raise
            return None, error.why

    def stand_in(self, name: str, role: Role, parent: Source, top: Source) -> FileSource | None:
        """Return what stands in for a name in the folders that the caller or ``top`` allows, None without."""
        return self._beside(self._search(name, top), role, parent, top)

    def _search(self, name: str, top: Source) -> _Search:
        own = _folder_of(top)
        return _Search(name, [*self._folders, *([own] if own is not None else [])])

    def _beside(self, search: _Search, role: Role, parent: Source, top: Source) -> FileSource | None:
        """Return the file of the same base name in the caller's folders, or in the image's own."""
        base = base_name(search.name, role)
        if not base:
            return None
        folders = [*self._folders, _folder_of(parent), _folder_of(top)]
        members = [getattr(source, "identity", None) for source in (parent, top)]
        for place in dict.fromkeys(os.path.join(item.real, base) for item in folders if item is not None):
            found = search.open(place)
            if found is not None and found.identity not in members:
                found.stands_for = search.name
                return found
            if found is not None:  # the image has the name its backing file had in another folder
                found.close()
        return None

    def _open_named(self, name: str, role: Role) -> Source:
        """Open the file the caller named: with its links, wherever it is, but a regular file."""
        path = self.files[name]
        try:
            # Looked at before it is opened: opening a device or a FIFO can have effects.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ForbiddenReference(name, "it is not a regular file")
            return FileSource(path, regular_only=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingFile(role, name, [str(path)]) from error
        except Qcow2Error:
            raise
        except (OSError, ValueError) as error:
            raise ForbiddenReference(name, f"it cannot be opened: {getattr(error, 'strerror', error)}") from error

    def with_remedy(
        self, error: ForbiddenReference | MissingFile, role: Role, parent: Source
    ) -> ForbiddenReference | MissingFile:
        """Return the error with the member it is about and what would allow the reference."""
        member = source_name(parent)
        if isinstance(error, MissingFile):
            return MissingFile(
                error.role, error.name, error.tried, member=member, remedy=self.remedies.for_missing(role)
            )
        return ForbiddenReference(error.name, error.why, member=member, remedy=self.remedies.for_reference())


class _Search:
    """Opens places below the allowed folders for one name, and remembers how it went."""

    def __init__(self, name: str, allowed: list[Folder]) -> None:
        self.name = name
        self.allowed = allowed
        self.tried: list[str] = []
        self.leaves = False  # a place, or a link on its way, was outside the allowed folders

    def open(self, place: str) -> FileSource | None:
        """Return the regular file at ``place``, None when there is none that may be opened."""
        try:
            descriptor, real = open_below(self.allowed, place)
        except LeavesFolders:
            self.leaves = True
            return None
        except (FileNotFoundError, NotADirectoryError):
            lexical = os.path.normpath(place)
            if is_below(lexical, [name for item in self.allowed for name in item]):
                self.tried.append(lexical)
            else:
                self.leaves = True
            return None
        except NotRegular as error:
            raise ForbiddenReference(self.name, "it is not a regular file") from error
        except UnicodeError as error:  # json: names may escape lone surrogates, which no file name can hold
            raise ForbiddenReference(self.name, "it cannot be a file name here") from error
        except (OSError, ValueError) as error:
            raise ForbiddenReference(self.name, f"it cannot be opened: {getattr(error, 'strerror', error)}") from error
        source = FileSource(real, regular_only=True, descriptor=descriptor)
        source.folder = os.path.dirname(place)
        return source


def _folder_of(source: Source) -> Folder | None:
    path = getattr(source, "path", None)
    return None if path is None else folder(os.path.dirname(os.fspath(path)))


def _place(path: str, parent: Source) -> str | None:
    """Return ``path`` as an absolute one, None where ``parent`` has no folder it could start from."""
    if os.path.isabs(path):
        return path
    start = getattr(parent, "folder", None)
    if start is None:
        beside = _folder_of(parent)
        start = None if beside is None else beside.real
    return None if start is None else os.path.join(start, path)
