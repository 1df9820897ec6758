"""``pytsk3.Img_Info`` over any state of a QCOW2 image.

What pytsk3 does with an exception from a Python image was found by trying (version 20260715). A
direct ``read`` passes it on as it is. A read that libtsk asked for becomes ``RuntimeError`` with our
sentence in it, and fails everything else libtsk reads in that call, even if it was only probing for
a file system and would have gone on; :meth:`Img_Info.read` mends that. A short answer instead can make
libtsk hand out bytes it never got, so there is none: unreadable sectors are errors, or, when asked
for with ``unreadable="zeros"``, zeros that are listed in :attr:`Img_Info.unreadable`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, TypeGuard

import pytsk3

from qcow2_forensics import open_disk
from qcow2_forensics import open_image as open_metadata
from qcow2_forensics.errors import FormatError, Locked, NotQcow2, Qcow2Error, ReadError
from qcow2_forensics.format.header import SECTOR, Crypt
from qcow2_forensics.format.snapshot_table import SnapshotEntry
from qcow2_forensics.format.source import PathOrSource, as_source
from qcow2_forensics.limits import DEFAULT_LIMITS, Limits
from qcow2_forensics.reader.disk import Disk, EofPolicy, Layer, RawDisk
from qcow2_forensics.text import printable

if TYPE_CHECKING:
    from qcow2_forensics.findings import Finding
    from qcow2_forensics.reader.opening import MissingPolicy, Passphrase, SnapshotName
    from qcow2_forensics.reader.resolver import Resolver

Unreadable = Literal["raise", "zeros"]

_ERRORS_KEPT = 100  # of read_errors; a damaged image can fail a million reads
_RANGES_KEPT = 100_000  # of unreadable; with more, reads raise


def _as_io_error(error: Qcow2Error) -> OSError:
    """Return the error as the one class that pytsk3 scripts catch; the sentence is kept."""
    if isinstance(error, OSError):
        return error
    translated = OSError(str(error))
    translated.__cause__ = error
    return translated


def _is_disk(origin: PathOrSource | Layer) -> TypeGuard[Layer]:
    """Whether this is a disk already, not the file of one: only disks know their extents."""
    return hasattr(origin, "extents")


def _locked_method(disk: Disk) -> str:
    """Return the encryption of the first layer that has a method; the locked one, in practice."""
    methods: list[str] = []
    layer: object = disk
    while isinstance(layer, Disk):
        if layer.image.header.crypt_method != Crypt.NONE:
            methods.append(Crypt(layer.image.header.crypt_method).name)
        layer = layer.backing
    return ", ".join(methods)


def _smallest_cluster(layer: Layer | None) -> int:
    """Return the bytes that a chain reads or refuses as a whole: the smallest cluster, or subcluster, in it."""
    unit = 1 << 21
    while isinstance(layer, Disk):
        header = layer.image.header
        if header.version == 1:  # its clusters stand anywhere: the end of the file may cut one at any sector
            return SECTOR
        unit = min(unit, header.cluster_size // 32 if header.extended_l2 else header.cluster_size)
        layer = layer.backing
    return unit if layer is None or isinstance(layer, RawDisk) else SECTOR


def _is_cut_anywhere(error: Qcow2Error) -> bool:
    """Whether the sectors beside an unreadable one may be readable, though they are of one cluster."""
    return isinstance(error, ReadError) or (isinstance(error, FormatError) and error.field == "encrypted cluster")


class Img_Info(pytsk3.Img_Info):  # noqa: N801 - named as the class it stands in for
    """The active state of a QCOW2 image, or one snapshot, for ``Volume_Info`` and ``FS_Info``.

    ``url`` is a path, a binary file object, a source of the image's bytes, or a disk that is open
    already, which then stays the caller's to close. ``snapshot`` is an
    ID or a name; the other options are those of :func:`qcow2_forensics.open_disk`. Everything
    that fails raises ``IOError``. ``unreadable="zeros"`` gives zeros for sectors that cannot be read,
    and lists them in :attr:`unreadable`. :attr:`read_errors` keeps the reasons either way.
    """

    def __init__(
        self,
        url: PathOrSource | Layer,
        snapshot: SnapshotName = None,
        passphrase: Passphrase = None,
        resolver: Resolver | None = None,
        *,
        limits: Limits = DEFAULT_LIMITS,
        eof: EofPolicy = "strict",
        missing: MissingPolicy = "refuse",
        unreadable: Unreadable = "raise",
    ) -> None:
        self.read_errors: list[str] = []
        self.unreadable: list[tuple[int, int]] = []
        self._policy = unreadable
        self._findings: tuple[Finding, ...] | None = None
        self._owned = not _is_disk(url)
        self._closed = False
        try:
            self._disk: Layer = (
                url
                if _is_disk(url)
                else open_disk(url, snapshot, passphrase, resolver, limits, eof=eof, missing=missing)
            )
            if isinstance(self._disk, Disk) and self._disk.is_locked:
                self.close()
                raise Locked(_locked_method(self._disk))
        except Qcow2Error as error:
            raise _as_io_error(error) from error.__cause__
        self._size = self._disk.size
        super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

    # --- what libtsk calls -------------------------------------------------------------------

    def get_size(self) -> int:
        """Return the size of the disk in bytes; also after :meth:`close`, as pytsk3 does."""
        return self._size

    def read(self, off: int, len: int) -> bytes:  # noqa: A002 - pytsk3's own argument name
        """Return ``len`` bytes at ``off``, fewer only at the end of the disk; ``IOError`` past it."""
        if self.read_errors:
            # An earlier failure is remembered for the thread until a method of pytsk3 is called, and would
            # make pytsk3 report this read as failed too: call one. Without it one bad sector hides the rest.
            super().get_size()
        if self._closed:
            raise OSError("the image is closed")
        if off < 0 or len < 0:
            raise OSError(f"negative offset or length: {off}, {len}")
        if off >= self._size:
            raise OSError(f"read offset {off} is past the end of the disk at {self._size}")
        try:
            return self._disk.read(off, len)
        except Qcow2Error as error:
            self._remember(str(error))
            if self._policy == "raise" or len_(self.unreadable) >= _RANGES_KEPT:
                raise _as_io_error(error) from error.__cause__
            return b"".join(self._with_zeros(off, min(len, self._size - off)))

    def _with_zeros(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield a range by halves, down to what is read or not as a whole; zeros for what cannot be read."""
        try:
            yield self._disk.read(offset, length)
            return
        except Qcow2Error as error:
            unit = SECTOR if _is_cut_anywhere(error) else _smallest_cluster(self._disk)
            middle = (offset + length // 2) // unit * unit
            if middle <= offset:
                middle = offset // unit * unit + unit
            never = isinstance(self._disk, Disk) and offset >= self._disk.mapped_end
            if never or middle >= offset + length:
                self._remember(str(error))
                self._list(offset, length)
                yield bytes(length)
                return
        yield from self._with_zeros(offset, middle - offset)
        yield from self._with_zeros(middle, offset + length - middle)

    def _remember(self, sentence: str) -> None:
        if sentence not in self.read_errors and len(self.read_errors) < _ERRORS_KEPT:
            self.read_errors.append(sentence)

    def _list(self, offset: int, length: int) -> None:
        if self.unreadable and sum(self.unreadable[-1]) == offset:
            offset, length = self.unreadable[-1][0], self.unreadable[-1][1] + length
            self.unreadable.pop()
        self.unreadable.append((offset, length))

    def close(self) -> None:
        """Close the image and its chain; closing twice is fine, reading afterwards raises ``IOError``."""
        self._closed = True
        disk = getattr(self, "_disk", None)
        if disk is not None and self._owned:
            disk.close()

    # --- what scripts ask --------------------------------------------------------------------

    @property
    def disk(self) -> Layer:
        """The disk behind this object, for ranges and extents."""
        return self._disk

    @property
    def snapshot(self) -> SnapshotEntry | None:
        """The snapshot shown, None for the active state."""
        return self._disk.snapshot if isinstance(self._disk, Disk) else None

    @property
    def state(self) -> str:
        """What to call this state: the snapshot's name (its ID when it has none), or ``active``."""
        shown = self.snapshot
        return "active" if shown is None else shown.name or shown.id

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the auditor observes about the image file; audited on first use, then kept."""
        if self._findings is None:
            from qcow2_forensics import audit

            self._findings = audit(self._disk.image.source).findings if isinstance(self._disk, Disk) else ()
        return self._findings

    def __enter__(self) -> Img_Info:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<pytsk3_qcow2.Img_Info {printable(self.state)}, {self._size} bytes>"


len_ = len  # `read` has an argument called len, as pytsk3's has


def open_image(
    path: str | os.PathLike[str],
    snapshot: SnapshotName = None,
    passphrase: Passphrase = None,
    resolver: Resolver | None = None,
) -> pytsk3.Img_Info:
    """Return an :class:`Img_Info` for a QCOW image and pytsk3's own for anything else.

    Anything else has no snapshots: asking for one there is an ``IOError``.
    """
    try:
        open_metadata(path).close()
    except NotQcow2 as error:
        if snapshot is not None:
            raise OSError(f"{printable(os.fspath(path))} is not a QCOW image and has no snapshots") from error
    except OSError:
        pass  # pytsk3 says what is wrong with the path: a directory, a split raw image, nothing there
    else:
        return Img_Info(path, snapshot, passphrase, resolver)
    return pytsk3.Img_Info(os.fspath(path))


def states(path: PathOrSource, passphrase: Passphrase = None, resolver: Resolver | None = None) -> Iterator[Img_Info]:
    """Yield every state of an image: each snapshot in the order of its table, then the active one.

    Each is open until the caller closes it or lets it go. ``state.state`` is what to call it.
    """
    # One source for all of them: states of one file object must not move its position under each other.
    origin = as_source(path) if hasattr(path, "seek") else path
    try:
        with open_metadata(origin) as image:
            entries = image.snapshots
    except Qcow2Error as error:
        raise _as_io_error(error) from error.__cause__
    for wanted in (*entries, None):
        yield Img_Info(origin, wanted, passphrase, resolver)
