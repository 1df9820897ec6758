"""Names found in an image become files, under a policy the caller chooses.

A name in an image is data, not an instruction. By default only plain files below the folder of
the image the caller named are opened; everything else is refused with the reason.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import ForbiddenReference, MissingFile, Qcow2Error
from ..format.source import FileSource, Source
from ..text import printable

Role = Literal["backing", "data"]

_PROTOCOL = re.compile(r"[^/]*?:")  # QEMU: a colon before the first slash
_JSON_LENGTH = 65_536  # characters; backing file names have up to 1023 bytes
_JSON_LIMIT = 64  # levels and members; deeper graphs are no plain file reference


class Reference(NamedTuple):
    """What a name says: a path, and the driver that a ``json:`` name fixes (None otherwise)."""

    path: str
    driver: str | None = None


def parse_reference(name: str, role: Role) -> Reference:
    """Return the plain file a name means; raises :class:`ForbiddenReference` for anything else.

    Data file names are literal. Backing names may be ``file:PATH``, or ``json:`` with nothing but
    a qcow2, qcow or raw driver over a local file.
    """
    if "\0" in name:
        raise ForbiddenReference(name, "it contains a NUL character")
    if role == "data":
        return Reference(name)
    if name.startswith("json:"):
        return _parse_json(name)
    if name.startswith("file:"):
        return Reference(name.removeprefix("file:"))
    protocol = _PROTOCOL.match(name)
    if protocol:
        raise ForbiddenReference(name, f"{printable(protocol.group(), 80)} is a protocol or driver, not a plain file")
    return Reference(name)


def json_options(name: str) -> Iterator[tuple[str, object]]:
    """Yield the options of a ``json:`` name, those inside others under dotted keys; one may come twice."""
    if len(name) > _JSON_LENGTH:
        raise ForbiddenReference(name, "its json: options are too long")
    try:
        options = json.loads(name.removeprefix("json:"), object_pairs_hook=_Options)
    except (ValueError, RecursionError) as error:
        raise ForbiddenReference(name, "its json: options cannot be parsed") from error
    if not isinstance(options, _Options):
        raise ForbiddenReference(name, "its json: options are not an object")
    yield from _flatten(options)


def _parse_json(name: str) -> Reference:
    pairs = list(json_options(name))
    flat = dict(pairs)
    if len(flat) != len(pairs):  # QEMU refuses some, and of others it may take another one
        raise ForbiddenReference(name, "its json: options say one thing twice")
    driver = flat.pop("driver", None)
    path = flat.pop("file.filename", None)
    protocol = flat.pop("file.driver", "file")
    if flat or driver not in ("qcow2", "qcow", "raw") or protocol != "file" or not isinstance(path, str):
        raise ForbiddenReference(name, "its json: options are more than an image in a local file")
    if "\0" in path:
        raise ForbiddenReference(name, "it contains a NUL character")
    return Reference(path, str(driver))


class _Options(tuple[tuple[object, object], ...]):
    """The members of a JSON object as they are written: a dictionary would drop all but the last of a name."""

    __slots__ = ()


def _flatten(options: _Options, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    for count, (key, value) in enumerate(options):
        if count > _JSON_LIMIT or depth > _JSON_LIMIT:
            yield f"{prefix}...", "not looked at"  # an option nobody knows: refused
            return
        if value and isinstance(value, (_Options, list)):
            members = value if isinstance(value, _Options) else _Options(enumerate(value))
            yield from _flatten(members, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


class Resolver:
    """Opens backing and data files.

    ``folders`` are further folders the caller trusts: names that lead below them are followed, and
    a file of the same base name in them is taken for a name that leads elsewhere. ``files`` maps
    names exactly as the image has them to paths. Subclass and override :meth:`open` to resolve
    names inside another file system.
    """

    def __init__(
        self,
        *,
        folders: Iterable[str | os.PathLike[str]] = (),
        files: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> None:
        self.folders = tuple(Path(os.path.realpath(folder)) for folder in folders)
        self.files = {name: Path(path) for name, path in (files or {}).items()}

    def open(self, name: str, role: Role, parent: Source, top: Source) -> tuple[Source, str | None]:
        """Return the file a name in ``parent`` means, and the driver the name itself fixes, if any.

        ``top`` is the image the caller opened: its folder bounds what is followed. Raises
        :class:`ForbiddenReference` or :class:`MissingFile`.
        """
        if name in self.files:
            return self._open_file(self.files[name], name, role), None
        reference = parse_reference(name, role)
        return self._open_file(self.locate(name, reference.path, role, parent, top), name, role), reference.driver

    def locate(self, name: str, path: str, role: Role, parent: Source, top: Source) -> Path:
        """Return the real path of the file ``path`` means in ``parent``, if the policy allows it."""
        try:
            os.fsencode(path)
        except UnicodeError as error:  # json: names may escape lone surrogates, which no file name can hold
            raise ForbiddenReference(name, "it cannot be a file name here") from error
        if path.endswith("/"):
            raise ForbiddenReference(name, "it names a folder")
        beside = getattr(parent, "path", None)
        if beside is None and not os.path.isabs(path):
            if not self.folders:
                raise ForbiddenReference(name, "the image was not opened by path, so it has no folder")
            candidates = []
        else:
            candidates = [Path(os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(beside or "/")), path)))]
        top_path = getattr(top, "path", None)
        roots = [*self.folders]
        if top_path is not None:
            roots.append(Path(os.path.realpath(os.path.dirname(os.path.abspath(top_path)))))
        allowed = [place for place in candidates if any(place.is_relative_to(root) for root in roots)]
        base = os.path.basename(path)
        if base not in ("", ".", ".."):
            named = [Path(os.path.realpath(folder / base)) for folder in self.folders]
            allowed += [place for place in named if any(place.is_relative_to(root) for root in roots)]
        if not allowed:
            raise ForbiddenReference(name, "it leads outside the folder of the image")
        for place in allowed:
            if os.path.lexists(place):
                return place
        raise MissingFile(role, name, [str(place) for place in dict.fromkeys(allowed)])

    def _open_file(self, path: Path, name: str, role: Role) -> Source:
        try:
            # Looked at before it is opened: opening a device or a FIFO can have effects.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ForbiddenReference(name, "it is not a regular file")
            return FileSource(path, regular_only=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            if isinstance(error, Qcow2Error):
                raise
            raise MissingFile(role, name, [str(path)]) from error
        except Qcow2Error:
            raise
        except (OSError, ValueError) as error:
            raise ForbiddenReference(name, f"it cannot be opened: {getattr(error, 'strerror', error)}") from error
