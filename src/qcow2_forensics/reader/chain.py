"""Opens an image with its data file and the files below it, with one policy for all of them."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from ..errors import (
    ForbiddenReference,
    FormatError,
    LimitExceeded,
    Locked,
    MissingFile,
    Qcow2Error,
    Unsupported,
)
from ..format.header import MAGIC, Crypt
from ..format.header_rules import DISK
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..format.source import ClosedOnError, Source, close_source, source_name
from ..limits import Limits
from ..text import cut, quoted
from .disk import Disk, EofPolicy, Layer, RawDisk
from .notes import log_note

if TYPE_CHECKING:
    from .encryption import Decryptor
    from .passphrases import Passphrase
    from .references import Role
    from .resolver import Remedies, Resolver

_BOTH = "it can be read alone, and a deep audit says where the two differ"
MissingPolicy = Literal["refuse", "raise", "zeros"]


def unlocked(disk: Disk, passphrase: Passphrase) -> Decryptor:
    """Return the decryptor of a disk for the first passphrase that opens it; raises :class:`Locked` for none."""
    from .encryption import method_name, unlock  # hashlib and OpenSSL: only where there is something to unlock
    from .passphrases import none_fits, secrets

    image = disk.image
    tried: set[bytes] = set()  # a key file with the end of its line, and without, is one to whoever gave it
    unsound: FormatError | None = None
    found: list[Decryptor] = []  # of legacy AES every passphrase gives one
    for secret in secrets(passphrase, disk.name):
        tried.add(secret.rstrip(b"\r\n"))
        try:
            decryptor = unlock(image.header, image.read, image.crypto_header, secret, image.limits)
        except Locked as error:
            if error.is_final:
                raise
            continue
        except FormatError as error:  # of one key slot, perhaps: another passphrase may open another
            unsound = unsound or error
            continue
        if image.header.crypt_method != Crypt.AES:
            return decryptor
        found.append(decryptor)
    if unsound is not None:
        raise unsound
    if not found:
        raise none_fits(method_name(image.header), disk.name, len(tried))
    return _most_plausible(disk, found)


def _most_plausible(disk: Disk, found: list[Decryptor]) -> Decryptor:
    """Return the decryptor of legacy AES that gives the most plausible disk, and note what makes it so."""
    from .encryption.plausibility import sample

    samples = [sample(disk, decryptor) for decryptor in found]
    best = max(range(len(found)), key=lambda index: samples[index].plain)
    sectors, plain = samples[best]
    begin = f"{cut(disk.name)} is encrypted with legacy AES, which cannot tell a wrong passphrase"
    if plain:
        note(
            disk, f"{begin}; what was looked at is plausible: {plain} of {sectors} sectors are not random", doubt=False
        )
    elif sectors:
        note(disk, f"{begin}, and this may be one: all {sectors} sectors looked at decrypt to random bytes", doubt=True)
    else:
        note(disk, f"{begin}, and no sector is stored to try it on", doubt=False)
    return found[best]


def note(disk: Disk, sentence: str, *, doubt: bool) -> None:
    """Add to a disk's notes and log it: as a warning where the bytes are in doubt."""
    disk.note(sentence)
    log_note(sentence, doubt=doubt)


class Opener:
    """Opens a chain from the top down, locked where it is encrypted."""

    def __init__(
        self,
        resolver: Resolver | None,
        limits: Limits,
        eof: EofPolicy,
        missing: MissingPolicy,
        follow: bool,
    ) -> None:
        self._given = resolver
        self._limits = limits
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
        notes: list[str] = []
        with ExitStack() as undo:
            data = self._data_file(image, top, notes) if image.header.external_data else None
            if data is not None:
                undo.callback(close_source, data)
            backing, unbacked = (None, None) if alone else self._backing(image, top, notes)
            if backing is not None:
                undo.callback(backing.close)
            disk = Disk(
                image,
                snapshot=snapshot,
                backing=backing,
                data=data,
                eof=self._eof,
                unbacked=unbacked,
                unlocker=unlocked,
            )
            for sentence in notes:
                note(disk, sentence, doubt=True)
            if data is not None and image.header.raw_data_file:
                note(disk, f"{cut(source_name(data))} is declared to be the raw disk itself: {_BOTH}", doubt=False)
            undo.pop_all()
            return disk

    def _enter(self, source: Source, name: str) -> None:
        identity = getattr(source, "identity", None)
        if identity is not None and identity in self._seen:
            raise ForbiddenReference(name, "the file is already part of the chain")
        self._seen.append(identity)
        if len(self._seen) > self._limits.chain_depth:
            raise LimitExceeded("chain depth", len(self._seen), self._limits.chain_depth)

    def _data_file(self, image: Image, top: Source, notes: list[str]) -> Source:
        name = image.data_file_name or ""  # a caller may supply what the image does not name
        named = name in self._resolver.files
        if not name and not named:
            raise MissingFile("data", "", member=image.name, remedy=self._remedies.for_file())
        source, _ = self._resolver.open(name, "data", image.source, top)
        with ClosedOnError(source):
            identity = getattr(source, "identity", None)
            if identity is not None and identity in self._seen:
                raise self._refused(name, "the data file is the image itself", image)
            if self._eof == "strict" and not named and source.read(0, 4) == MAGIC:
                raise self._refused(
                    name, "the data file is itself a QCOW image; name it explicitly to read it raw", image
                )
            notes += self._stand_in_notes(source, "data", name, None, image)
        return source

    def _refused(self, name: str, why: str, image: Image) -> ForbiddenReference:
        return ForbiddenReference(name, why, member=image.name, remedy=self._remedies.for_file())

    def _stand_in_notes(self, source: Source, role: Role, name: str, recorded: str | None, image: Image) -> list[str]:
        """Return that a file stands in for a name, if it does; raises when what is known of it does not fit."""
        if not getattr(source, "stands_for", ""):
            return []
        from .stand_in import misfit

        why = misfit(source, role, recorded, image)
        place = cut(str(getattr(source, "path", None) or source_name(source)))
        if why:
            raise self._refused(name, f"it leads elsewhere, and {place} cannot be that file: {why}", image)
        return [f"{place} was taken for the {role} file {quoted(name)} of {cut(image.name)}"]

    def _backing(self, image: Image, top: Source, notes: list[str]) -> tuple[Layer | None, Qcow2Error | None]:
        name = image.backing_name
        if not self._follow:
            return None, None
        self._check_backing_name(image)
        if name is None:
            return None, None
        try:
            source, driver = self._resolver.open(name, "backing", image.source, top)
            with ClosedOnError(source):
                recorded = driver or image.backing_format
                notes += self._stand_in_notes(source, "backing", name, recorded, image)
        except (MissingFile, ForbiddenReference) as error:
            if self._missing == "refuse":
                raise
            return None, error if self._missing == "raise" else None
        with ClosedOnError(source):
            return self._layer(source, recorded, top, name), None

    def _check_backing_name(self, image: Image) -> None:
        at, length = image.header.backing_file_offset, image.header.backing_file_size
        if self._eof == "strict" and at and at + length > image.file_size:
            raise FormatError(
                "the backing file name reaches past the end of the file", offset=at, field="backing_file_offset"
            )

    def _layer(self, source: Source, recorded: str | None, top: Source, name: str) -> Layer:
        from .foreign import open_foreign, probe
        from .references import besides_the_file
        from .window import part_of

        meant = besides_the_file(name, named=name in self._resolver.files)
        source = part_of(source, meant)
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
