"""What a name in an image says: a plain file, its driver, a part of it; nothing is opened here.

A name in an image is data, not an instruction. What QEMU would take for anything but an image in a
local file is refused with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from ..errors import ForbiddenReference
from ..format.header import SECTOR
from ..limits import JSON_REFERENCE_CHARACTERS, JSON_REFERENCE_DEPTH
from ..text import cut

Role = Literal["backing", "data"]

_PROTOCOL = re.compile(r"[^/]*?:")  # QEMU: a colon before the first slash
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")  # an absolute name written on Windows
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/]*/")
_IMAGE_DRIVERS = ("qcow2", "qcow", "raw", "vmdk", "vhdx", "vpc")
_OFFSETS = 1 << 63  # what QEMU takes for an offset or a size


class Reference(NamedTuple):
    """What a name says: a path, and what a ``json:`` name adds to it.

    ``driver`` is the format it fixes. ``offset`` and ``size`` are bytes of the file that are meant;
    ``alone`` says that the file's own backing file is not (``"backing": null``).
    """

    path: str
    driver: str | None = None
    offset: int = 0
    size: int | None = None
    alone: bool = False


def parse_reference(name: str, role: Role) -> Reference:
    """Return the plain file a name means; raises :class:`ForbiddenReference` for anything else.

    Data file names are literal. Backing names may be ``file:PATH``, or ``json:`` with an image
    driver over a local file.
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
        raise ForbiddenReference(name, f"{cut(protocol.group(), 80)} is a protocol or driver, not a plain file")
    return Reference(name)


def besides_the_file(name: str, *, named: bool) -> Reference:
    """Return which part of its file a backing name means, and with what driver; a file the caller named is read whole."""
    try:
        reference = parse_reference(name, "backing")
    except ForbiddenReference:  # a file stands in for it, or the caller named one
        return Reference("")
    return reference._replace(offset=0, size=None) if named else reference


def base_name(name: str, role: Role) -> str:
    """Return the base name of the file a name leads to on the machine it was written on; empty without one.

    Understands the separators and drives of Windows, network shares and URLs. Devices, ``json:``
    graphs and pseudo protocols such as ``fat:`` have none.
    """
    path = name
    if role == "data" or not (_DRIVE.match(name) or _URL.match(name)):
        try:
            path = parse_reference(name, role).path
        except ForbiddenReference:
            return ""
    elif _URL.match(name):
        path = re.split(r"[?#]", name, maxsplit=1)[0]
    base = re.split(r"[\\/]", path)[-1]
    return "" if base in ("", ".", "..") or "\0" in base else base


def json_options(name: str) -> Iterator[tuple[str, object]]:
    """Yield the options of a ``json:`` name, those inside others under dotted keys; one may come twice."""
    if len(name) > JSON_REFERENCE_CHARACTERS:
        raise ForbiddenReference(name, "its json: options are too long")
    try:
        options = json.loads(name.removeprefix("json:"), object_pairs_hook=_Options)
    except (ValueError, RecursionError) as error:
        raise ForbiddenReference(name, "its json: options cannot be parsed") from error
    if not isinstance(options, _Options):
        raise ForbiddenReference(name, "its json: options are not an object")
    yield from _flatten(options)


def _parse_json(name: str) -> Reference:
    """Read ``{driver: IMAGE, file: {driver: raw, offset:, size:, file: ...{driver: file, filename: PATH}}}``."""
    pairs = list(json_options(name))
    options = dict(pairs)
    if len(options) != len(pairs):  # QEMU refuses some, and of others it may take another one
        raise ForbiddenReference(name, "its json: options say one thing twice")
    driver = options.pop("driver", None)
    alone = "backing" in options
    known = driver in _IMAGE_DRIVERS and options.pop("backing", None) in (None, "")
    if driver in ("qcow2", "qcow"):  # the secret QEMU was given there: here the key comes from the caller
        for key in ("encrypt.key-secret", "encrypt.format"):
            options.pop(key, None)
    offset, size = _window(name, options) if driver == "raw" else (0, None)
    prefix = "file."
    while options.get(f"{prefix}driver") == "raw":  # a raw layer that QEMU puts over a part of a file
        del options[f"{prefix}driver"]
        inner, length = _window(name, options, prefix)
        if size is None:
            size = length
        elif length is not None and offset + size > length:
            raise ForbiddenReference(name, "its json: offset and size lead past the part of the file they are in")
        offset += inner
        prefix += "file."
    path = options.pop(f"{prefix}filename", None)
    protocol = options.pop(f"{prefix}driver", "file")
    if options or not known or protocol != "file" or not isinstance(path, str):
        raise ForbiddenReference(name, "its json: options are more than an image in a local file")
    if "\0" in path:
        raise ForbiddenReference(name, "it contains a NUL character")
    return Reference(path, str(driver), offset, size, alone)


def _window(name: str, options: dict[str, object], prefix: str = "") -> tuple[int, int | None]:
    offset = _number(name, options.pop(f"{prefix}offset", 0))
    if f"{prefix}size" not in options:
        return offset, None
    size = _number(name, options.pop(f"{prefix}size"))
    if size % SECTOR:  # QEMU refuses it
        raise ForbiddenReference(name, f"its json: size is no multiple of {SECTOR}")
    return offset, size


def _number(name: str, value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _OFFSETS:
        return value
    raise ForbiddenReference(name, "its json: offset or size is no number of bytes")


class _Options(tuple[tuple[object, object], ...]):
    """The members of a JSON object as they are written: a dictionary would drop all but the last of a name."""

    __slots__ = ()


def _flatten(options: _Options, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    for count, (key, value) in enumerate(options):
        if count > JSON_REFERENCE_DEPTH or depth > JSON_REFERENCE_DEPTH:
            yield f"{prefix}...", "not looked at"  # an option nobody knows: refused
            return
        if value and isinstance(value, (_Options, list)):
            members = value if isinstance(value, _Options) else _Options(enumerate(value))
            yield from _flatten(members, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value
