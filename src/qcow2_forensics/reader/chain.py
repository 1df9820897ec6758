"""Opens an image with its data file and the files below it, with one policy for all of them."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from ..errors import (
    ForbiddenReference,
    FormatError,
    LimitExceeded,
    MissingFile,
    Qcow2Error,
    Unsupported,
)
from ..format.header import MAGIC, Crypt
from ..format.image import Image
from ..format.rules import DISK
from ..format.snapshot_table import SnapshotEntry
from ..format.source import Source, source_name
from ..limits import Limits
from ..text import cut, quoted
from .disk import Disk, EofPolicy, Layer, RawDisk

if TYPE_CHECKING:
    from .encryption import Decryptor
    from .references import Reference, Role
    from .resolver import Remedies, Resolver

MissingPolicy = Literal["refuse", "raise", "zeros"]
Passphrase = str | bytes | None


def close_source(source: Source) -> None:
    """Close a source that can be closed."""
    close = getattr(source, "close", None)
    if close is not None:
        close()


def derive(image: Image, passphrase: str | bytes) -> Decryptor:
    """Return the decryptor that a passphrase gives for an image."""
    from .encryption import unlock  # hashlib and OpenSSL: only where there is something to unlock

    return unlock(image.header, image.read, image.crypto_header, passphrase, image.limits)


class Opener:
    """Opens a chain from the top down. :attr:`notes` gathers what the caller should know of it."""

    def __init__(
        self,
        resolver: Resolver | None,
        limits: Limits,
        passphrase: Passphrase,
        eof: EofPolicy,
        missing: MissingPolicy,
        follow: bool,
    ) -> None:
        self.notes: list[str] = []
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

    @property
    def _remedies(self) -> Remedies:
        return self._resolver.remedies

    def disk(self, image: Image, top: Source, snapshot: SnapshotEntry | None = None, *, alone: bool = False) -> Disk:
        """Return the disk of an image of the chain; ``alone``: whatever it names, nothing is below it."""
        image.require(DISK)
        self._enter(image.source, image.name)
        encrypted = image.header.crypt_method != Crypt.NONE
        with ExitStack() as undo:
            data = self._data_file(image, top) if image.header.external_data else None
            if data is not None:
                undo.callback(close_source, data)
            backing, unbacked = (None, None) if alone else self._backing(image, top)
            if backing is not None:
                undo.callback(backing.close)
            disk = Disk(
                image,
                snapshot=snapshot,
                backing=backing,
                data=data,
                decryptor=derive(image, self._passphrase) if encrypted and self._passphrase is not None else None,
                eof=self._eof,
                unbacked=unbacked,
                unlocker=lambda key: derive(image, key),
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
        named = name in self._resolver.files
        if not name and not named:
            raise MissingFile("data", "", member=image.name, remedy=self._remedies.for_file())
        source, _ = self._resolver.open(name, "data", image.source, top)
        with ExitStack() as undo:
            undo.callback(close_source, source)
            identity = getattr(source, "identity", None)
            if identity is not None and identity in self._seen:
                raise self._refused(name, "the data file is the image itself", image)
            if self._eof == "strict" and not named and source.read(0, 4) == MAGIC:
                raise self._refused(
                    name, "the data file is itself a QCOW image; name it explicitly to read it raw", image
                )
            self._check_stand_in(source, "data", name, None, image)
            undo.pop_all()
        return source

    def _refused(self, name: str, why: str, image: Image) -> ForbiddenReference:
        return ForbiddenReference(name, why, member=image.name, remedy=self._remedies.for_file())

    def _check_stand_in(self, source: Source, role: Role, name: str, recorded: str | None, image: Image) -> None:
        """Note that a file stands in for a name; raises when what is known of that file does not fit."""
        if not getattr(source, "stands_for", ""):
            return
        from .stand_in import misfit

        why = misfit(source, role, recorded, image)
        place = cut(source_name(source))
        if why:
            raise self._refused(name, f"it leads elsewhere, and {place} cannot be that file: {why}", image)
        self._note(f"{place} was taken for the {role} file {quoted(name)} of {cut(image.name)}")

    def _note(self, sentence: str) -> None:
        import logging  # here: few images need it

        self.notes.append(sentence)
        logging.getLogger("qcow2_forensics").warning("%s", sentence)

    def _backing(self, image: Image, top: Source) -> tuple[Layer | None, Qcow2Error | None]:
        name = image.backing_name
        if not self._follow:
            return None, None
        self._check_backing_name(image)
        if name is None:
            return None, None
        try:
            source, driver = self._resolver.open(name, "backing", image.source, top)
            with ExitStack() as undo:
                undo.callback(close_source, source)
                recorded = driver or image.backing_format
                self._check_stand_in(source, "backing", name, recorded, image)
                undo.pop_all()
        except (MissingFile, ForbiddenReference) as error:
            if self._missing == "refuse":
                raise
            return None, error if self._missing == "raise" else None
        with ExitStack() as undo:
            undo.callback(close_source, source)
            layer = self._layer(source, recorded, top, name)
            undo.pop_all()
            return layer, None

    def _check_backing_name(self, image: Image) -> None:
        at, length = image.header.backing_file_offset, image.header.backing_file_size
        if self._eof == "strict" and at and at + length > image.file_size:
            raise FormatError(
                "the backing file name reaches past the end of the file", offset=at, field="backing_file_offset"
            )

    def _meant(self, name: str) -> Reference:
        """Return what a name says besides which file: nothing, where the caller named that."""
        from .references import Reference, parse_reference

        try:
            reference = parse_reference(name, "backing")
        except ForbiddenReference:  # a file stands in for it, or the caller named one
            return Reference("")
        return reference._replace(offset=0, size=None) if name in self._resolver.files else reference

    def _layer(self, source: Source, recorded: str | None, top: Source, name: str) -> Layer:
        from .foreign import open_foreign, probe

        meant = self._meant(name)
        if meant.offset or meant.size is not None:
            from .window import WindowSource

            source = WindowSource(source, meant.offset, meant.size)
        kind = recorded or probe(source)
        if kind == "raw":
            self._enter(source, name)
            return RawDisk(source)
        if kind not in ("qcow2", "qcow"):
            self._enter(source, name)
            try:
                return open_foreign(kind, source)
            except Unsupported as error:
                raise Unsupported(
                    f"{error.feature}; convert {cut(source_name(source))} with qemu-img convert -O qcow2 "
                    f"and {self._remedies.for_file()}"
                ) from error
        image = Image(source, limits=self._limits, owns_source=True)
        if (image.header.version == 1) != (kind == "qcow"):
            raise FormatError(
                f"{cut(image.name)} is recorded as {kind} but is of version {image.header.version}", offset=4
            )
        return self.disk(image, top, alone=meant.alone)
