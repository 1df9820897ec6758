"""Finding the migration stream inside the files that carry one.

::

    QEVM ...                                    bare stream; Proxmox state volume, padded at its end
    LibvirtQemudSave header, XML, stream        "virsh save", memory part of external snapshots
    LibvirtQemudSave header, XML, gzip | bzip2 | xz | lzop | zstd of a stream
"""

from __future__ import annotations

import bz2
import hashlib
import io
import lzma
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, Protocol, cast

from ..errors import FormatError, LimitExceeded, Qcow2Error, Unsupported
from ..format.codecs import zstd_module
from ..format.source import (
    ClosedOnError,
    FileSource,
    PathOrSource,
    Source,
    StreamSource,
    as_source,
    close_source,
    source_name,
)
from ..limits import (
    DEFAULT_LIMITS,
    LIBVIRT_DESCRIPTION_BYTES,
    SAVE_FILE_MEMBERS,
    UNPACKED_BYTES,
    UNPACKED_TIMES,
    XZ_DECODER_BYTES,
    Budget,
    KiB,
    Limits,
    MiB,
)
from ..reader.stream import SourceStream
from ..reader.writer import cache_file
from .lzop import DamagedError, LzopReader
from .sections import MAGIC

_LIBVIRT: Final = b"LibvirtQemudSave"
_LIBVIRT_UNFINISHED: Final = b"LibvirtQemudPart"
_LIBVIRT_HEADER = struct.Struct("16sIIIII14I")  # magic, version, XML length, was running, format, cookie, unused
_PIECE = 4 * MiB
_INPUT = 64 * KiB
_BYTES_PER_MEMBER = MiB  # of a compressed file: libvirt writes one member, parallel compressors one for a few MiB

Unpacker = tuple[IO[bytes], type[Exception]]  # the decompressed file, and what it raises for damage
Opener = Callable[[BinaryIO, int], Unpacker]  # the compressed file and its size


class StreamWindow:
    """A stream that starts inside another source; ``start`` is where.

    Mapped-ram streams name positions in the whole file, so the window has to be known. ``domain`` is the
    description of the machine in a libvirt save file, which is XML.
    """

    def __init__(
        self, source: Source, start: int, size: int, domain: bytes = b"", *, decompressed: bool = False
    ) -> None:
        self.domain = domain
        self._decompressed = decompressed  # for this window alone
        self.source = source
        self.start = start
        self.size = size
        self.stored_size = int(getattr(source, "stored_size", source.size))
        self.name = source_name(source)

    def read(self, offset: int, length: int, /) -> bytes:
        """Return bytes of the stream, short only at its end."""
        return self.source.read(self.start + offset, max(0, min(length, self.size - offset)))

    def discard(self) -> None:
        """Delete the file that the stream was decompressed into, if it was: for a stream that turned out unusable."""
        if self._decompressed and isinstance(self.source, FileSource):
            Path(self.source.path).unlink(missing_ok=True)

    def close(self) -> None:
        """Close what the stream was decompressed into; a file that holds the stream as it is stays its owner's."""
        if self._decompressed:
            close_source(self.source)


class _TemporarySource(StreamSource):
    """A file nobody else has; it is gone when it is closed."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__(file, name)
        self.close = file.close


def find_stream(
    origin: PathOrSource, *, cache_dir: str | os.PathLike[str] | None = None, limits: Limits = DEFAULT_LIMITS
) -> Source | None:
    """Return the migration stream in a file: bare, libvirt save file, padded state volume; None for anything else.

    A compressed libvirt file (gzip, bzip2, xz, lzop, zstd) is decompressed once into ``cache_dir``, or into an
    unnamed temporary file when it is None. Damage raises :class:`FormatError`, an absent decoder :class:`Unsupported`.
    """
    source = as_source(origin)
    head = source.read(0, _LIBVIRT_HEADER.size)
    if head.startswith(MAGIC):
        return source
    if head.startswith(_LIBVIRT_UNFINISHED):
        raise FormatError("libvirt marks this save file as unfinished", field="vm_state")
    if not head.startswith(_LIBVIRT):
        return None
    if len(head) < _LIBVIRT_HEADER.size:
        raise FormatError("libvirt save file ends inside its header", offset=len(head), field="vm_state")
    return _libvirt(source, head, cache_dir, limits)


def _libvirt(source: Source, head: bytes, cache_dir: str | os.PathLike[str] | None, limits: Limits) -> Source:
    """Follow the header, which is in the byte order of the host that wrote it."""
    order = next((order for order in "<>" if 1 <= struct.unpack_from(order + "I", head, 16)[0] <= 16), "<")
    version, length, _running, packing = struct.unpack_from(order + "4I", head, 16)
    if version not in (1, 2):
        raise Unsupported(f"libvirt save file version {version}")
    start = _LIBVIRT_HEADER.size + length
    if start >= source.size:
        raise FormatError("libvirt save file ends before its memory", offset=source.size, field="vm_state")
    domain = source.read(_LIBVIRT_HEADER.size, min(length, LIBVIRT_DESCRIPTION_BYTES))
    window = StreamWindow(source, start, source.size - start, domain)
    if window.read(0, len(MAGIC)) == MAGIC:
        return window
    opener = _OPENERS.get(packing)
    if opener is None:
        words = f"of format {packing}" if packing else "without a QEMU stream"
        raise Unsupported(f"libvirt save file {words}")
    unpacked = _unpacked(window, opener, cache_dir, limits)
    return StreamWindow(unpacked, 0, unpacked.size, domain, decompressed=True)


class _Decoder(Protocol):
    """What decodes one member of a file: a gzip member, a bzip2 or xz stream, a zstd frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Inflate:
    """The decoder of one gzip member, which checks its checksum and length."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


class _MembersReader(io.RawIOBase):
    """The decompressed bytes of a file of one member, or of a few that follow each other.

    Decoders are made by ``new``. A file may not be of empty members only, which cost work and give nothing.
    """

    def __init__(self, stream: BinaryIO, new: Callable[[], _Decoder], size: int) -> None:
        self._stream = stream
        self._new = new
        self._decoder = new()
        self._members = Budget.up_to("members of a compressed save file", SAVE_FILE_MEMBERS + size // _BYTES_PER_MEMBER)

    def read(self, size: int = -1, /) -> bytes:
        while True:
            if self._decoder.eof:
                rest = self._decoder.unused_data.lstrip(b"\0") or self._behind_zeros()
                if not rest:
                    return b""
                self._members.spend(1)
                self._decoder = self._new()
            else:
                rest = self._stream.read(_INPUT) if self._decoder.needs_input else b""
                if not rest and self._decoder.needs_input:
                    raise EOFError("the file ends before its end-of-stream marker was reached")
            if data := self._decoder.decompress(rest, _PIECE if size < 0 else size):
                return data

    def _behind_zeros(self) -> bytes:
        """Return the next bytes after padding, none at the end of the file."""
        while piece := self._stream.read(_INPUT):
            if rest := piece.lstrip(b"\0"):
                return rest
        return b""


def _members(new: Callable[[], _Decoder], damage: type[Exception]) -> Opener:
    """Return what opens a file of members whose decoders ``new`` makes."""
    return lambda stream, size: (cast("IO[bytes]", _MembersReader(stream, new, size)), damage)


def _xz() -> _Decoder:
    # The module's own reader of files accepts any dictionary up to 4 GiB.
    return lzma.LZMADecompressor(memlimit=XZ_DECODER_BYTES)


def _lzop(stream: BinaryIO, size: int) -> Unpacker:
    return cast("IO[bytes]", LzopReader(stream, size)), DamagedError


def _zstd(stream: BinaryIO, size: int) -> Unpacker:
    try:
        zstd: Any = zstd_module()
    except ImportError:
        raise Unsupported("zstd on this Python: install backports.zstd") from None
    return _members(zstd.ZstdDecompressor, zstd.ZstdError)(stream, size)


# By libvirt's number of the format.
_OPENERS: dict[int, Opener] = {
    1: _members(_Inflate, zlib.error),
    2: _members(bz2.BZ2Decompressor, OSError),
    3: _members(_xz, lzma.LZMAError),
    4: _lzop,
    5: _zstd,
}


def _unpacked(window: StreamWindow, opener: Opener, cache_dir: str | os.PathLike[str] | None, limits: Limits) -> Source:
    """Decompress into a file that is complete or not there at all."""
    if cache_dir is None:
        temporary = tempfile.TemporaryFile(prefix="qcow2-memory-")  # noqa: SIM115 - the source keeps it open
        with ClosedOnError(temporary):
            _decompress(window, opener, temporary, limits)
        return _TemporarySource(cast("BinaryIO", temporary), window.name)
    target = Path(cache_dir) / f"qcow2_stream_{_fingerprint(window)}.cache"
    if not target.exists():
        with cache_file(target) as file:
            _decompress(window, opener, file, limits)
    return FileSource(target)


def _fingerprint(window: StreamWindow) -> str:
    """Return a name for the compressed bytes: everything, so that no edited file meets an old cache."""
    digest = hashlib.sha256()
    for offset in range(0, window.size, _PIECE):
        digest.update(window.read(offset, _PIECE))
    return digest.hexdigest()[:32]


def _decompress(window: StreamWindow, opener: Opener, target: IO[bytes], limits: Limits) -> None:
    written = 0
    most = min(limits.decompressed_stream_bytes, UNPACKED_BYTES + UNPACKED_TIMES * window.stored_size)
    packed, damage = opener(cast("BinaryIO", SourceStream(window)), window.size)
    try:
        with packed:
            while data := packed.read(_PIECE):
                if not written and not data.startswith(MAGIC):
                    raise FormatError("compressed libvirt save file holds no QEMU stream", field="vm_state")
                written += len(data)
                if written > most:
                    raise LimitExceeded("decompressed_stream_bytes", written, most)
                target.write(data)
    except Qcow2Error:
        raise
    except (damage, EOFError) as error:
        raise FormatError(f"libvirt save file cannot be decompressed: {error}", field="vm_state") from error
    target.flush()
