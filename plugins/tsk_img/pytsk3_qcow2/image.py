"""``pytsk3.Img_Info`` over any state of a QCOW2 image."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, TypeGuard

import pytsk3

from qcow2_forensics import (
    DEFAULT_LIMITS,
    KEY_FILE_VARIABLE,
    PASSPHRASE_VARIABLE,
    Disk,
    EofPolicy,
    Layer,
    Limits,
    Locked,
    NotQcow2,
    PathOrSource,
    Qcow2Error,
    SnapshotEntry,
    as_source,
    open_disk,
    passphrases_from_environment,
)
from qcow2_forensics import open_image as open_metadata
from qcow2_forensics.files import ReaderImage, TolerantReader, as_io_error
from qcow2_forensics.reader.states import is_recovered_state, labels
from qcow2_forensics.text import printable

if TYPE_CHECKING:
    from qcow2_forensics import Finding, MissingPolicy, Passphrase, Resolver, SnapshotName
    from qcow2_forensics.files import Unreadable


def _given_or_set(passphrase: Passphrase) -> Passphrase:
    """Return the passphrases that were given, or else those of the environment."""
    return passphrase if passphrase is not None else passphrases_from_environment() or None


def _is_disk(origin: PathOrSource | Layer) -> TypeGuard[Layer]:
    """Whether this is a disk already, not the file of one: only disks know their extents."""
    return hasattr(origin, "extents")


class Img_Info(ReaderImage):  # noqa: N801 - named as the class it stands in for
    """The active state of a QCOW2 image, or one snapshot, for ``Volume_Info`` and ``FS_Info``.

    ``url``, ``type`` and ``sector_size`` are the arguments of ``pytsk3.Img_Info``, in its order.
    ``url`` is a path, a binary file object, a source of the image's bytes, or a disk that is open
    already, which then stays the caller's to close. The format of the image is found by reading it,
    whatever ``type`` says. ``snapshot`` is an ID or a name; the other options are those of
    :func:`qcow2_forensics.open_disk`. Everything that fails raises ``IOError``. ``unreadable="zeros"``,
    which ``export`` calls ``--salvage``, gives zeros for sectors that cannot be read, and lists them in
    :attr:`unreadable`. :attr:`read_errors` keeps the reasons either way.
    """

    def __init__(
        self,
        url: PathOrSource | Layer,
        type: int = pytsk3.TSK_IMG_TYPE_DETECT,  # noqa: A002 - pytsk3's own argument name
        sector_size: int = 0,
        *,
        snapshot: SnapshotName = None,
        passphrase: Passphrase = None,
        resolver: Resolver | None = None,
        limits: Limits = DEFAULT_LIMITS,
        eof: EofPolicy = "strict",
        missing: MissingPolicy = "refuse",
        follow: bool = True,
        unreadable: Unreadable = "raise",
        assume: Mapping[str, str] | None = None,
        virtual_size: int | None = None,
    ) -> None:
        if not isinstance(type, int):
            raise TypeError("the second argument is pytsk3's type; a snapshot is named with snapshot=...")
        self._owned = False
        disk: Layer
        try:
            if _is_disk(url):
                disk = url
            else:
                disk = open_disk(
                    url,
                    snapshot,
                    _given_or_set(passphrase),
                    resolver,
                    limits,
                    eof=eof,
                    missing=missing,
                    follow=follow,
                    assume=assume,
                    virtual_size=virtual_size,
                )
            if isinstance(disk, Disk) and disk.is_locked:
                if disk is not url:
                    disk.close()
                method, member = disk.locked_method, disk.locked_member
                why = f"give passphrase=..., or set {PASSPHRASE_VARIABLE} or {KEY_FILE_VARIABLE}"
                raise Locked(method, why, member=member)
        except Qcow2Error as error:
            raise as_io_error(error)  # noqa: B904 - it names its cause
        super().__init__(TolerantReader(disk, unreadable), sector_size)
        self._disk = disk
        self._owned = disk is not url

    def close(self) -> None:
        """Close the image and its chain; closing twice is fine, reading afterwards raises ``IOError``."""
        super().close()
        if self._owned:
            self._disk.close()

    @property
    def disk(self) -> Layer:
        """The disk of this object, for ranges and extents."""
        return self._disk

    @property
    def snapshot(self) -> SnapshotEntry | None:
        """The snapshot shown, None for the active state."""
        return self._disk.snapshot if isinstance(self._disk, Disk) else None

    @cached_property
    def state(self) -> str:
        """What to call this state: the snapshot's name (its ID when it has none), ``active``, or ``recovered:N``.

        More is added where another state has that name too: no two states of an image have the same label.
        """
        if not isinstance(self._disk, Disk):
            return labels(())(None)
        rebuilt = self._disk.rebuilt
        return rebuilt.label if rebuilt is not None else labels(self._disk.image.snapshots)(self.snapshot)

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What the auditor observes about the image file; audited on first use, then kept."""
        from qcow2_forensics import audit

        return audit(self._disk.image.source).findings if isinstance(self._disk, Disk) else ()

    def __enter__(self) -> Img_Info:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<pytsk3_qcow2.Img_Info {printable(self.state)}, {self.get_size()} bytes>"


def open_image(
    path: str | os.PathLike[str],
    snapshot: SnapshotName = None,
    passphrase: Passphrase = None,
    resolver: Resolver | None = None,
    *,
    unreadable: Unreadable = "raise",
) -> pytsk3.Img_Info:
    """Return an :class:`Img_Info` for a QCOW image and pytsk3's own for anything else.

    Anything else has no snapshots: asking for one there is an ``IOError``. A recovered state needs no header.
    ``unreadable`` is that of :class:`Img_Info`.
    """
    if is_recovered_state(snapshot) or _is_qcow(path, snapshot):
        return Img_Info(path, snapshot=snapshot, passphrase=passphrase, resolver=resolver, unreadable=unreadable)
    return pytsk3.Img_Info(os.fspath(path))


def _is_qcow(path: str | os.PathLike[str], snapshot: SnapshotName) -> bool:
    try:
        open_metadata(path).close()
    except NotQcow2 as error:
        if snapshot is not None:
            raise OSError(f"{printable(os.fspath(path))} is not a QCOW image and has no snapshots") from error
        return False
    except OSError:
        return False  # pytsk3 says what is wrong with the path: a directory, a split raw image, nothing there
    return True


def states(
    path: PathOrSource,
    passphrase: Passphrase = None,
    resolver: Resolver | None = None,
    *,
    unreadable: Unreadable = "raise",
    recovered: bool = False,
    follow: bool = True,
    assume: Mapping[str, str] | None = None,
    virtual_size: int | None = None,
) -> Iterator[Img_Info]:
    """Yield every state of an image: each snapshot in the order of its table, then the active one.

    ``recovered`` adds the states that can be put together from what is left of a damaged image, which needs no
    header and reads the whole file. The other options are those of :class:`Img_Info`.
    Each is open until the caller closes it or lets it go. ``state.state`` is what to call it. Where the
    snapshot table cannot be read to its end, ``IOError`` follows the states that can be; with ``recovered``, a warning.
    """
    # One source for all of them: states of one file object must not move its position under each other.
    origin = as_source(path) if hasattr(path, "seek") else path
    try:
        with open_metadata(origin) as image:
            entries, unread = image.snapshots, image.unreadable("snapshots")
            listed: tuple[SnapshotEntry | None, ...] = (*entries, None)
    except Qcow2Error as error:
        if not recovered or not isinstance(error, NotQcow2):
            raise as_io_error(error)  # noqa: B904 - it names its cause
        entries, listed, unread = (), (), None
    label = labels(entries)
    base: Disk | None = None  # of which the other states are read without opening the image again
    for wanted in listed:
        try:
            base = base or open_disk(origin, wanted, _given_or_set(passphrase), resolver, follow=follow, assume=assume)
            image = Img_Info(base if base.snapshot is wanted else base.at(wanted), unreadable=unreadable)
        except Qcow2Error as error:
            if recovered:  # the tables of this one are what is damaged
                logging.getLogger("pytsk3_qcow2").warning("%s: %s", label(wanted), error)
                continue
            raise as_io_error(error)  # noqa: B904 - it names its cause
        image.state = label(wanted)
        yield image
    if unread is not None and not recovered:
        raise as_io_error(unread.error())
    if unread is not None:
        logging.getLogger("pytsk3_qcow2").warning("snapshots are missing: %s", unread.error())
    if recovered:
        from qcow2_forensics.recovery import recovered_states

        for state in recovered_states(origin, virtual_size=virtual_size):
            if not state.is_memory:
                yield Img_Info(
                    origin,
                    snapshot=state,
                    passphrase=passphrase,
                    resolver=resolver,
                    follow=follow,
                    unreadable=unreadable,
                    assume=assume,
                    virtual_size=virtual_size,
                )
