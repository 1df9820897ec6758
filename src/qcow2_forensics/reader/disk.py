"""Bytes as the guest saw them: mapping, codec, key and backing disk put together.

A :class:`Disk` refuses to guess: opening it raises the first problem that makes reading unsound,
and a read that meets bytes it cannot be sure of raises, naming the structure and the file offset.
Longer than other modules: the ways to read share what the last read found, and a call between them takes time that shows.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from ..errors import FormatError, Locked, Qcow2Error
from ..format.codecs import codec_of
from ..format.entries import OFFSET_MASK
from ..format.header import SECTOR, Crypt
from ..format.header_rules import DISK, SNAPSHOTS, snapshot_part
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..format.source import Closing, FileSource, Source, close_source, source_name
from ..text import cut, plural, printable
from .chain_layers import Extent, Layer, RawDisk
from .clusters import Clusters
from .mapping import Kind, Mapping, Run
from .parts import Part, Parts, fill, gatherable, gathered, layer_parts

if TYPE_CHECKING:
    from .encryption import Decryptor
    from .passphrases import Passphrase
    from .states import Rebuilt

__all__ = ["Disk", "EofPolicy", "Extent", "Layer", "RawDisk"]

EofPolicy = Literal["strict", "zeros"]

_HAS_PREAD = hasattr(os, "pread")


class Disk(Closing):
    """The active state of an image, or one of its snapshots, as a positional source.

    ``backing`` supplies what this image does not hold; without one that reads as zeros, unless
    ``unbacked`` is an error to raise instead. ``data`` is the external data file. ``eof`` says
    what structures and clusters past the end of the file are: errors, or zeros as in QEMU, then
    counted in :attr:`filled`. Closes ``image``, ``backing`` and ``data`` with itself.

    Threads may share a disk, and it survives a fork: it has no position, and its caches hold only
    bytes that any reader would find.
    """

    def __init__(
        self,
        image: Image,
        *,
        snapshot: SnapshotEntry | None = None,
        backing: Layer | None = None,
        data: Source | None = None,
        decryptor: Decryptor | None = None,
        eof: EofPolicy = "strict",
        unbacked: Qcow2Error | None = None,
        unlocker: Callable[[Disk, Passphrase], Decryptor] | None = None,
    ) -> None:
        if snapshot is None or snapshot.index < 0:  # a deleted one: it is in no table
            image.require(DISK)
        else:
            image.require(DISK, SNAPSHOTS, snapshot_part(snapshot.index))
        header = image.header
        self.image = image
        self.name = image.name
        self.snapshot = snapshot
        self.rebuilt: Rebuilt | None = None  # the recovered state that this is
        self.backing = backing
        self.eof: EofPolicy = eof
        self.filled = {"clusters": 0, "bytes": 0}
        self.size = image.disk_size
        l1_table_offset, l1_size = header.l1_table_offset, header.l1_size
        if snapshot is not None:
            l1_table_offset, l1_size = snapshot.l1_table_offset, snapshot.l1_size
            if snapshot.disk_size is not None:
                self.size = snapshot.disk_size // SECTOR * SECTOR
        # The L1 table of a snapshot must map the whole disk that the snapshot records: nothing says what is past it.
        self.mapped_end = 2**64
        if snapshot is not None and eof == "strict":
            self.mapped_end = l1_size * header.l2_span
            if snapshot.disk_size is None:  # its size is not known; it may have been smaller than the disk is now
                self.mapped_end = max(self.mapped_end, self.size)
        self.mapping = Mapping(image, l1_table_offset, l1_size, eof_zeros=eof == "zeros")
        if eof == "strict" and l1_size and header.version != 1:
            image.read_exactly(l1_table_offset, 8, "the L1 table")
        self._owner: Disk | None = None  # whose files these are, of a disk made by `at`
        self._unbacked = unbacked
        self._unlocker = unlocker
        self._notes: list[str] = []
        self._encrypted = header.crypt_method != Crypt.NONE
        self._decryptor = decryptor
        self._data = data
        self._host: Source = data if data is not None else image.source
        self._clusters = Clusters(
            image,
            self.mapping,
            codec_of(header.compression_type).decode,
            self._count_filled if eof == "zeros" else None,
        )
        self._gatherable = None if self._encrypted else gatherable(self._host)
        self._file = self._host if type(self._host) is FileSource and _HAS_PREAD else None
        self._window = min(layer._clusters.window for layer in images_of(self))
        self._parts = Parts(header.cluster_bits, image.limits.table_cache_bytes)
        # For read(): the stored bytes found last, start, end, what to add for the offset in a file, and which.
        self._run: tuple[int, int, int, Source] = (0, 0, 0, self._host)
        self._cluster_size = header.cluster_size
        self._inside_mask = header.cluster_size - 1
        self._cluster_bits = header.cluster_bits
        self._slices = self.mapping.slices
        self._slice_shift = self.mapping.slice_shift
        self._slice_mask = self.mapping.slice_mask
        self._not_plain = 2**64 - 1 if self._encrypted else self.mapping.not_plain

    # --- facts -------------------------------------------------------------------------------

    @property
    def is_locked(self) -> bool:
        """Whether this disk, or a disk below it, is encrypted and has no key yet."""
        return self._locked is not None

    @property
    def locked_member(self) -> str:
        """The name of the first layer that has no key yet, empty when there is none."""
        return self._locked.name if self._locked is not None else ""

    @property
    def locked_method(self) -> str:
        """The encryption of that layer: ``AES`` or ``LUKS``, empty when there is none."""
        return self._locked.image.encryption if self._locked is not None else ""

    @property
    def _locked(self) -> Disk | None:
        return next((each for each in images_of(self) if each._encrypted and each._decryptor is None), None)

    @property
    def host(self) -> Source:
        """Where this layer's clusters are stored: the image, or its external data file."""
        return self._host

    @property
    def stored_size(self) -> int:
        """Bytes of the files of this disk: what reading all of it can be expected to cost."""
        return self._host.size + (
            0 if self.backing is None else getattr(self.backing, "stored_size", self.backing.size)
        )

    @property
    def depth(self) -> int:
        """Layers from here to the bottom of the chain, 1 without a backing file."""
        return 1 + (self.backing.depth if self.backing is not None else 0)

    @property
    def unbacked(self) -> Qcow2Error | None:
        """Why the backing file is not there, None when it is or none is named; reads that need it raise this."""
        return self._unbacked

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever reads from this disk should know of its chain: escaped sentences."""
        return (*self._notes, *(self.backing.notes if isinstance(self.backing, Disk) else ()))

    def note(self, sentence: str) -> None:
        """Add to the notes."""
        self._notes.append(sentence)

    def unlock(self, passphrase: Passphrase) -> None:
        """Derive the keys of every locked layer, of several passphrases each takes the first that fits.

        Raises :class:`Locked` naming the first layer that none opens; the others are open then.
        """
        failure: Locked | None = None
        if self._encrypted and self._decryptor is None and self._unlocker is not None:
            try:
                self._decryptor = self._unlocker(self, passphrase)
            except Locked as error:
                failure = error
        if isinstance(self.backing, Disk):
            try:
                self.backing.unlock(passphrase)
            except Locked as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def adopt_keys(self, other: Disk) -> None:
        """Take over the keys of another state of the same chain: deriving them takes seconds."""
        if self._encrypted and self._decryptor is None:
            self._decryptor = other._decryptor
        if isinstance(self.backing, Disk) and isinstance(other.backing, Disk):
            self.backing.adopt_keys(other.backing)

    def at(self, snapshot: SnapshotEntry | None) -> Disk:
        """Return another state of this image, over the same open files, which stay this disk's to close.

        Opening each of thousands of snapshots by itself reads the table of all of them each time.
        """
        other = Disk(
            self.image,
            snapshot=snapshot,
            backing=self.backing,
            data=self._data,
            decryptor=self._decryptor,
            eof=self.eof,
            unbacked=self._unbacked,
            unlocker=self._unlocker,
        )
        other._notes = list(self._notes)
        other.rebuilt = self.rebuilt if snapshot is None else None
        other._owner = self
        return other

    # --- bytes -------------------------------------------------------------------------------

    def read(self, offset: int, length: int, /) -> bytes:
        """Return ``length`` guest bytes at ``offset``, fewer only at the end of the disk."""
        # Files are read here, without the calls of other methods, which would take as long as all of the rest.
        start, end, shift, source = self._run
        try:
            if start <= offset <= end:  # at its end, a longer run helps whoever reads on: read_mapped() looks for one
                if 0 < length <= end - offset:
                    if type(source) is FileSource and _HAS_PREAD:
                        data = os.pread(source.fd, length, offset + shift)
                    else:
                        data = source.read(offset + shift, length)
                    if len(data) == length:
                        return data
            else:
                entry = self._slices[offset >> self._slice_shift][(offset >> self._cluster_bits) & self._slice_mask]
                inside = offset & self._inside_mask
                if 0 < length <= self._cluster_size - inside and length <= self.size - offset and offset >= 0:
                    host = entry & OFFSET_MASK
                    if host and not entry & self._not_plain:
                        file = self._file
                        if file is None:
                            data = self._host.read(host + inside, length)
                        else:
                            data = os.pread(file.fd, length, host + inside)
                        if len(data) == length:
                            return data
        except (LookupError, OSError):
            pass  # no table yet, or what read_mapped() meets again and reports
        if offset < 0 or length < 0:
            raise ValueError(f"negative offset or length: {offset}, {length}")
        return self.read_mapped(offset, min(length, self.size - offset))

    def read_mapped(self, offset: int, length: int) -> bytes:
        """Like :meth:`read`, but not clipped to the disk: VM state lies past its end."""
        if length <= 0:
            return b""
        part = self._parts.around(offset)
        if part is None and not self._encrypted:
            data = self._read_plain(offset, length)
            if data:
                return data
        parts = self._find(offset, length) if part is None else None
        part = part or self._parts.around(offset)
        if part is not None and part.source is not None and part.host_offset is not None:
            start, end = part.offset, part.offset + part.length
            if offset + length <= end:
                data = self._simply_stored(start, end, part.host_offset - start, part.source, offset, length)
                if data:
                    return data
        if parts is None:
            parts = self._find(offset, length)
        if len(parts) > 1:
            return gathered(parts, self._piece, self._prepare)
        if parts[0].kind == Kind.COMPRESSED:
            self._prepare(parts, 0)
        return self._piece(parts[0])

    def read_into(self, offset: int, buffer: memoryview, /) -> int:
        """Fill ``buffer`` from ``offset`` and return how many bytes it took, fewer only at the end of the disk."""
        length = min(len(buffer), self.size - offset)
        if length <= 0:
            return 0
        parts = self._find(offset, length)
        with buffer[:length] as view:
            fill(view, parts, self._piece, self._prepare)
        return length

    def _simply_stored(self, start: int, end: int, shift: int, source: Source, offset: int, length: int) -> bytes:
        """Return the bytes of a range of one run of a file; none where its file ends before."""
        self._run = (start, min(end, self.size), shift, source)
        data = source.read(offset + shift, length)
        return data if len(data) == length else b""  # what is past the end of the file is not simply stored

    def _read_plain(self, offset: int, length: int) -> bytes:
        """Return the bytes of a range that is simply stored in this layer, in however many runs; none where it is not.

        Nothing of it is kept but the last run: finding several again takes no longer than keeping them.
        """
        start, end, _, _ = self._run
        wanted = max(length, 2 * (end - start)) if start <= offset <= end else length
        parts: list[Part] = []
        at, end = offset, offset + length
        while at < end:
            run = self.mapping.plain_run(at, wanted)
            if run is None:
                return b""
            start, stop, shift = run
            if stop >= end and not parts:
                return self._simply_stored(start, stop, shift, self._host, offset, length)
            parts.append(Part(at, min(stop, end) - at, Kind.DATA, at + shift, 0, 0, self._gatherable))
            at, wanted = stop, end - stop
        return gathered(parts, self._piece, self._prepare)

    def _find(self, offset: int, length: int) -> list[Part]:
        """Return the parts that tile a range, through the whole chain."""
        return self._parts.find(self._look_up, offset, length)

    def _look_up(self, offset: int, length: int) -> list[Part]:
        """Find the parts of a range, layer by layer: each is asked for what the ones above do not hold."""
        parts: list[Part] = []
        wanted = [(offset, length)]
        layer: Layer | None = self
        depth = 0
        while wanted and layer is not None:
            if not isinstance(layer, Disk):
                for start, count in wanted:
                    parts.extend(layer_parts(layer, depth, start, count))
                break
            below: list[tuple[int, int]] = []
            for start, count in wanted:
                if layer.snapshot is not None and start + count > layer.mapped_end:
                    raise layer._past_the_table(layer.snapshot)
                for run in layer.mapping.runs(start, count):
                    if run.kind == Kind.HOLE:
                        rest = layer._hole_parts(run.offset, run.length, depth, below)
                        if rest is not None:
                            parts.append(rest)
                    else:
                        parts.append(Part(*run, depth, layer._gatherable if run.kind == Kind.DATA else None))
            wanted, layer, depth = below, layer.backing, depth + 1
        parts.sort()
        return parts

    def _hole_parts(self, offset: int, length: int, depth: int, below: list[tuple[int, int]]) -> Part | None:
        """Add the part of an unallocated range that the backing file answers for to ``below``; return the rest."""
        if self.backing is None:
            # Whether a missing backing file matters is decided where the range is read.
            return Part(offset, length, Kind.ZERO if self._unbacked is None else Kind.HOLE, None, 0, depth, None)
        # Past the end of the disk, where VM state is, the backing file plays no part.
        count = max(0, min(length, self.backing.size - offset, self.size - offset))
        if count:
            below.append((offset, count))
        return Part(offset + count, length - count, Kind.ZERO, None, 0, depth, None) if count < length else None

    def _prepare(self, parts: list[Part], index: int) -> int:
        """Start to decode the compressed parts from ``index`` on, as many as are kept until their turn comes."""
        stop = min(len(parts), index + self._window)
        runs: dict[int, list[Run]] = {}
        for part in parts[index:stop]:
            if part.kind == Kind.COMPRESSED:
                runs.setdefault(part.depth, []).append(Run(*part[:5]))
        for depth, wanted in runs.items():
            layer = self._layer(depth)
            if isinstance(layer, Disk):
                layer._clusters.prepare(wanted)
        return stop

    def _layer(self, depth: int) -> Layer | None:
        """Return the layer ``depth`` below this one."""
        layer: Layer | None = self
        for _ in range(depth):
            layer = layer.backing if isinstance(layer, Disk) else None
        return layer

    def _past_the_table(self, entry: SnapshotEntry) -> FormatError:
        return FormatError(
            f"snapshot {cut(entry.id)} reaches past what its L1 table of {plural(entry.l1_size, 'entry', 'entries')} maps",
            offset=entry.offset,
            field="l1_size",
        )

    def _piece(self, part: Part) -> bytes:
        """Return the bytes of one part, exactly as long as it, where they are not simply those of a source."""
        if part.kind == Kind.ZERO:
            return bytes(part.length)
        layer = self._layer(part.depth)
        if isinstance(layer, Disk):
            return layer._run_bytes(Run(*part[:5]))
        return layer.read(part.offset, part.length).ljust(part.length, b"\0") if layer is not None else b""

    def _run_bytes(self, run: Run) -> bytes:
        """Return the bytes of one run of this layer, exactly as long as the run."""
        if run.kind == Kind.COMPRESSED:
            return self._clusters.read(run)
        if run.host_offset is not None and run.kind == Kind.DATA:
            return self._stored(run.host_offset, run.offset, run.length)
        if run.kind == Kind.HOLE and self._unbacked is not None and run.offset < self.size:
            from copy import copy  # here: it takes longer to import than all of this module

            raise copy(self._unbacked)  # one object would gather the traceback of every read
        return bytes(run.length)

    def _stored(self, host: int, guest: int, length: int) -> bytes:
        if not self._encrypted:
            data = self._host.read(host, length) if host < self._host.size else b""
            return data if len(data) == length else self._fill(data, host, length)
        if self._decryptor is None:
            raise Locked(Crypt(self.image.header.crypt_method).name, member=self.name)
        before = guest % SECTOR
        whole = -(-(before + length) // SECTOR) * SECTOR
        host -= before
        data = self._host.read(host, whole) if host < self._host.size else b""
        if len(data) != whole:
            data = self._fill(data, host, whole)
        return self._decryptor.decrypt(data, host, guest - before)[before : before + length]

    def _fill(self, data: bytes, host: int, length: int) -> bytes:
        """Pad what the end of the file cut off.

        Normal for the rest of the file's last cluster; a cluster wholly past the end is an error,
        or with ``eof="zeros"`` zeros that are counted. What is encrypted has no such rest: zeros
        that were never stored would be decrypted to bytes that nobody wrote.
        """
        end = self._host.size
        last_cluster_end = -(-end // self._cluster_size) * self._cluster_size
        beyond = host + length - max(host, end if self._encrypted else last_cluster_end)
        if beyond > 0:
            if self.eof == "strict":
                raise self._past_the_end(host, length, last_cluster_end)
            self._count_filled(beyond)
        return data.ljust(length, b"\0")

    def _past_the_end(self, host: int, length: int, last_cluster_end: int) -> FormatError:
        end = self._host.size
        where = f"the end of {cut(source_name(self._host))} at {end:#x}"
        if host + length <= last_cluster_end:
            return FormatError(f"an encrypted cluster is cut off by {where}", offset=end, field="encrypted cluster")
        at = max(host, last_cluster_end)
        return FormatError(f"a data cluster lies past {where}", offset=at, field="data cluster")

    def _count_filled(self, count: int) -> None:
        self.filled["clusters"] += -(-count // self._cluster_size)
        self.filled["bytes"] += count

    # --- maps --------------------------------------------------------------------------------

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Yield extents that tile the range, clipped to the disk, through the whole chain."""
        if offset < 0 or (length is not None and length < 0):
            raise ValueError(f"negative offset or length: {offset}, {length}")
        end = self.size if length is None else min(self.size, offset + length)
        if offset >= end:
            return
        mapped = min(end, self.mapped_end)
        for run in self.mapping.runs(offset, mapped - offset):
            if run.kind != Kind.HOLE or self.backing is None:
                host = None if run.kind == Kind.COMPRESSED else run.host_offset
                kind = Kind.MISSING if run.kind == Kind.HOLE and self._unbacked is not None else run.kind
                yield Extent(run.offset, run.length, kind, host, 0)
                continue
            below = max(0, min(run.length, self.backing.size - run.offset))
            if below:
                for piece in self.backing.extents(run.offset, below):
                    yield piece._replace(depth=piece.depth + 1)
            if below < run.length:
                host = None if run.host_offset is None else run.host_offset + below
                yield Extent(run.offset + below, run.length - below, Kind.HOLE, host, 0)
        if self.snapshot is not None and mapped < end:
            raise self._past_the_table(self.snapshot)

    def open(self) -> io.RawIOBase:
        """Return a seekable file object over the disk."""
        from .stream import SourceStream  # here: most readers ask for ranges

        return SourceStream(self, self.name)

    # --- life --------------------------------------------------------------------------------

    def close(self) -> None:
        """Close every file of the chain that was opened for this disk; closing twice is fine."""
        if self._owner is not None:
            return
        self.image.close()
        if self.backing is not None:
            self.backing.close()
        close_source(self._data)

    def __repr__(self) -> str:
        state = f"snapshot {printable(self.snapshot.id)}" if self.snapshot is not None else "active state"
        return f"<Disk {printable(self.name)}, {state}, {self.size} bytes>"


def layers_of(layer: Layer | None) -> Iterator[Layer]:
    """Yield a layer and every one below it."""
    while layer is not None:
        yield layer
        layer = layer.backing if isinstance(layer, Disk) else None


def images_of(layer: Layer | None) -> Iterator[Disk]:
    """Yield the QCOW images among a layer and the ones below it."""
    return (each for each in layers_of(layer) if isinstance(each, Disk))
