"""Images become disks: snapshots chosen, keys derived, data and backing files found and opened."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from ..errors import ForbiddenReference, FormatError, LimitExceeded, MissingFile, Qcow2Error, SnapshotNotFound
from ..format.header import MAGIC, Crypt
from ..format.image import Image
from ..format.rules import DISK
from ..format.snapshot_table import SnapshotEntry
from ..format.source import PathOrSource, Source, as_source
from ..limits import DEFAULT_LIMITS, Limits
from ..text import printable
from .disk import Disk, EofPolicy, Layer, RawDisk
from .vm_state import VmState

if TYPE_CHECKING:
    from .encryption import Decryptor
    from .resolver import Resolver

MissingPolicy = Literal["refuse", "raise", "zeros"]
SnapshotName = str | int | SnapshotEntry | None
Passphrase = str | bytes | None

# Further ways to name a snapshot, by prefix: "deleted:3" asks the function under "deleted".
SNAPSHOT_SELECTORS: dict[str, Callable[[Image, str], SnapshotEntry]] = {}
_SELECTOR_MODULES = {"deleted": "residue"}  # above this one: each adds its selector when imported


def open_image(origin: PathOrSource, *, limits: Limits = DEFAULT_LIMITS) -> Image:
    """Open the metadata of one file, leniently; raises :class:`NotQcow2` and OSError only."""
    return Image(origin, limits=limits)


def open_disk(
    origin: PathOrSource,
    snapshot: SnapshotName = None,
    passphrase: Passphrase = None,
    resolver: Resolver | None = None,
    limits: Limits = DEFAULT_LIMITS,
    *,
    eof: EofPolicy = "strict",
    missing: MissingPolicy = "refuse",
    follow: bool = True,
) -> Disk:
    """Open the guest's disk as it is now, or as it was at ``snapshot``.

    ``snapshot`` is an ID or a name (an ID wins), ``"index:N"`` for the table index, or an entry.
    ``passphrase`` is tried on every encrypted layer; without it such layers open locked and
    their reads raise :class:`Locked`. ``eof="zeros"`` reads what lies past the end of a file as
    zeros, as QEMU does, and counts it. ``missing`` says what a backing file that cannot be found
    or followed means: an error now, an error for each read that needs it, or zeros.
    ``follow=False`` opens this file alone: what it does not hold reads as zeros.
    """
    opener = _Opener(resolver, limits, passphrase, eof, missing, follow)
    source = as_source(origin)
    with ExitStack() as undo:
        if source is not origin:
            undo.callback(_close, source)
        image = Image(source, limits=limits, owns_source=source is not origin)
        disk = opener.disk(image, source, find_snapshot(image, snapshot))
        undo.pop_all()
        return disk


def open_vm_state(
    origin: PathOrSource,
    snapshot: SnapshotName = None,
    passphrase: Passphrase = None,
    limits: Limits = DEFAULT_LIMITS,
    *,
    eof: EofPolicy = "strict",
) -> VmState:
    """Open the VM state of a snapshot, of the latest that holds one when None.

    Neither backing nor data files are needed: QEMU stores VM state in the image itself.
    """
    image = Image(origin, limits=limits)
    with ExitStack() as undo:
        undo.callback(image.close)
        entry = find_snapshot(image, snapshot) or latest_vm_state(image)
        disk = Disk(
            image,
            snapshot=entry,
            decryptor=_derive(image, passphrase) if passphrase is not None else None,
            eof=eof,
            unlocker=lambda key: _derive(image, key),
        )
        state = VmState(disk)
        undo.pop_all()
        return state


def find_snapshot(image: Image, wanted: SnapshotName) -> SnapshotEntry | None:
    """Return the snapshot ``wanted`` names, None for None; raises :class:`SnapshotNotFound`."""
    if wanted is None or (isinstance(wanted, SnapshotEntry) and wanted.index >= 0):
        return wanted
    if isinstance(wanted, SnapshotEntry):  # of no table: what it no longer owns must be refused
        return _selector("deleted")(image, f"{wanted.offset:#x}")
    text = str(wanted)
    prefix, _, rest = text.partition(":")
    by_id = [entry for entry in image.snapshots if entry.id == text]
    found = by_id or [entry for entry in image.snapshots if entry.name == text]
    if not found and (prefix in _SELECTOR_MODULES or prefix in SNAPSHOT_SELECTORS):
        return _selector(prefix)(image, rest)
    if not found and prefix == "index" and rest.isdecimal():
        found = [entry for entry in image.snapshots if entry.index == int(rest)]
    if len(found) == 1:
        return found[0]
    if not found:
        image.require("snapshots")  # perhaps it is in the part of the table that cannot be read
    raise SnapshotNotFound(text, snapshot_choices(image, found), ambiguous=bool(found))


def _selector(prefix: str) -> Callable[[Image, str], SnapshotEntry]:
    if prefix in _SELECTOR_MODULES:
        importlib.import_module(f"qcow2_forensics.{_SELECTOR_MODULES[prefix]}")
    return SNAPSHOT_SELECTORS[prefix]


def snapshot_choices(image: Image, entries: list[SnapshotEntry]) -> Iterator[str]:
    """Yield ``id (name)`` of the given snapshots, of all when none are given; index for equal IDs."""
    ids = Counter(entry.id for entry in image.snapshots)
    for entry in entries or image.snapshots:
        key = printable(entry.id) if ids[entry.id] == 1 else f"index:{entry.index}"
        yield f"{key} ({printable(entry.name)})"


def latest_vm_state(image: Image) -> SnapshotEntry:
    """Return the snapshot with VM state that was taken last, by its date, then by its place."""
    held = [entry for entry in image.snapshots if entry.vm_state_size]
    if not held:
        image.require("snapshots")
        raise SnapshotNotFound("with VM state", snapshot_choices(image, []))
    return max(held, key=lambda entry: (entry.date_sec, entry.date_nsec, entry.index))


def _close(source: Source) -> None:
    close = getattr(source, "close", None)
    if close is not None:
        close()


def _derive(image: Image, passphrase: str | bytes) -> Decryptor:
    from .encryption import unlock  # hashlib and OpenSSL: only where there is something to unlock

    return unlock(image.header, image.read, image.crypto_header, passphrase, image.limits)


class _Opener:
    """Opens a chain from the top down, with one policy for all of it."""

    def __init__(
        self,
        resolver: Resolver | None,
        limits: Limits,
        passphrase: Passphrase,
        eof: EofPolicy,
        missing: MissingPolicy,
        follow: bool,
    ) -> None:
        self._given = resolver
        self._limits = limits
        self._passphrase = passphrase
        self._eof: EofPolicy = eof
        self._missing = missing
        self._follow = follow
        self._seen: list[object] = []

    @cached_property
    def _resolver(self) -> Resolver:
        if self._given is not None:
            return self._given
        from .resolver import Resolver  # only for an image that names another file

        return Resolver()

    def disk(self, image: Image, top: Source, snapshot: SnapshotEntry | None = None) -> Disk:
        image.require(DISK)
        self._enter(image.source, image.name)
        encrypted = image.header.crypt_method != Crypt.NONE
        with ExitStack() as undo:
            data = self._data_file(image, top) if image.header.external_data else None
            if data is not None:
                undo.callback(_close, data)
            backing, unbacked = self._backing(image, top)
            if backing is not None:
                undo.callback(backing.close)
            disk = Disk(
                image,
                snapshot=snapshot,
                backing=backing,
                data=data,
                decryptor=_derive(image, self._passphrase) if encrypted and self._passphrase is not None else None,
                eof=self._eof,
                unbacked=unbacked,
                unlocker=lambda key: _derive(image, key),
            )
            undo.pop_all()
            return disk

    def _enter(self, source: Source, name: str) -> None:
        identity = getattr(source, "identity", None)
        if identity is not None and identity in self._seen:
            raise ForbiddenReference(name, "the file is already part of the chain")
        self._seen.append(identity)
        if len(self._seen) > self._limits.chain_depth:
            raise LimitExceeded("chain depth", len(self._seen), self._limits.chain_depth)

    def _data_file(self, image: Image, top: Source) -> Source:
        name = image.data_file_name or ""  # a caller may supply what the image does not name
        if not name and "" not in getattr(self._resolver, "files", ()):
            raise MissingFile("data", "")
        source, _ = self._resolver.open(name, "data", image.source, top)
        identity = getattr(source, "identity", None)
        if identity is not None and identity in self._seen:
            _close(source)
            raise ForbiddenReference(name, "the data file is the image itself")
        if self._eof == "strict" and name not in getattr(self._resolver, "files", ()) and source.read(0, 4) == MAGIC:
            _close(source)
            raise ForbiddenReference(name, "the data file is itself a QCOW image; name it explicitly to read it raw")
        return source

    def _backing(self, image: Image, top: Source) -> tuple[Layer | None, Qcow2Error | None]:
        name = image.backing_name
        if not self._follow:
            return None, None
        self._check_backing_name(image)
        if name is None:
            return None, None
        try:
            source, driver = self._resolver.open(name, "backing", image.source, top)
        except (MissingFile, ForbiddenReference) as error:
            if self._missing == "refuse":
                raise
            return None, error if self._missing == "raise" else None
        with ExitStack() as undo:
            undo.callback(_close, source)
            layer = self._layer(source, driver or image.backing_format, top, name)
            undo.pop_all()
            return layer, None

    def _check_backing_name(self, image: Image) -> None:
        at, length = image.header.backing_file_offset, image.header.backing_file_size
        if self._eof == "strict" and at and at + length > image.file_size:
            raise FormatError(
                "the backing file name reaches past the end of the file", offset=at, field="backing_file_offset"
            )

    def _layer(self, source: Source, recorded: str | None, top: Source, name: str) -> Layer:
        from .foreign import open_foreign, probe

        kind = recorded or probe(source)
        if kind == "raw":
            self._enter(source, name)
            return RawDisk(source)
        if kind not in ("qcow2", "qcow"):
            self._enter(source, name)
            return open_foreign(kind, source)
        image = Image(source, limits=self._limits, owns_source=True)
        if (image.header.version == 1) != (kind == "qcow"):
            raise FormatError(
                f"{printable(image.name)} is recorded as {kind} but is of version {image.header.version}", offset=4
            )
        return self.disk(image, top)
