"""A QEMU migration stream as guest-physical memory."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache

from ..format.source import Closing, Source
from ..limits import DEFAULT_LIMITS, Limits, MiB
from ..text import cut, quoted
from . import address_ranges, tpm
from .block_reader import read_pages
from .given_layout import parse as parse_layout
from .model import Block, Chunk, Cpu, Device, Layout, MemoryRun, NotInMemory, Region
from .page_codecs import MISSING, is_special, page_of
from .page_index import RunIndex
from .stream_analysis import Analysis, analyse

_CACHED_PAGES = 8192  # for the scattered small reads of page-table walks: 32 MiB at most


class GuestMemory(Closing):
    """Guest-physical memory of any :class:`Source` that holds a QEMU migration stream (``QEVM``).

    The stream is indexed once when the object is made; it is read again only where asked for, and
    only through ``source.read(offset, length)``. A stream inside another file (libvirt, Proxmox,
    compressed) is found by :func:`find_stream` first.

    With ``allow_truncated`` a stream that ends early is read as far as it goes, and ``complete`` is False.
    ``layout`` states where blocks lie, as ``BLOCK@ADDRESS[,...]``; a part of a block is ``BLOCK+OFFSET@ADDRESS``.

    Raises :class:`FormatError` (also :class:`LimitExceeded`) for bytes that contradict the grammar,
    :class:`Unsupported` for page encodings that need another channel or an older page.
    """

    source: Source
    machine: str
    """The machine type from the configuration section, "" in streams older than it. Not escaped."""
    architecture: str
    """"x86", "aarch64", "riscv" or ""."""
    page_size: int
    blocks: tuple[Block, ...]
    regions: tuple[Region, ...]
    """Sorted by address, not overlapping; neighbours of different blocks are separate entries."""
    layout: Layout
    devices: tuple[Device, ...]
    cpus: tuple[Cpu, ...]
    complete: bool

    def __init__(
        self,
        source: Source,
        limits: Limits = DEFAULT_LIMITS,
        *,
        allow_truncated: bool = False,
        layout: str | None = None,
    ) -> None:
        self._set(source, analyse(source, limits, allow_truncated, parse_layout(layout) if layout else ()))

    def _set(self, source: Source, analysis: Analysis) -> None:
        self.source = source
        self.machine = analysis.machine
        self.architecture = analysis.architecture
        self.page_size = analysis.page_size
        self.blocks = analysis.blocks
        self.regions = analysis.regions
        self.layout = analysis.layout
        self.devices = analysis.devices
        self.cpus = analysis.cpus
        self.complete = analysis.complete
        self._analysis = analysis
        self._index: dict[str, RunIndex] = {
            block.name: index for block, index in zip(analysis.blocks, analysis.runs, strict=True)
        }
        self._starts = array("q", (region.address for region in self.regions))
        self._valid = address_ranges.recorded(self.regions, self._index, self.page_size)
        self._zero_page = bytes(analysis.page_size)
        self._undo: list[Callable[[], object]] = []
        self._page = lru_cache(_CACHED_PAGES)(self._load_page)

    def on_close(self, undo: Callable[[], object]) -> None:
        """Have :meth:`close` call ``undo``: for callers that opened the source for this object."""
        self._undo.append(undo)

    def close(self) -> None:
        """Close what was opened for this object; a source that was handed in stays open."""
        while self._undo:
            self._undo.pop()()

    @property
    def maximum_address(self) -> int:
        """The highest address that is RAM; 0 when there is none."""
        return max(0, self.size - 1)

    @property
    def size(self) -> int:
        """One more than the highest address: with ``read`` this makes the memory a padded image of RAM."""
        return self.regions[-1].end if self.regions else 0

    @property
    def missing(self) -> int:
        """Bytes of RAM that the stream does not hold: never sent, or cut off."""
        held = sum(self._valid.ends) - sum(self._valid.starts)
        return sum(region.length for region in self.regions) - held

    def is_valid(self, address: int, length: int = 1) -> bool:
        """Return whether every byte of the range is RAM that the stream holds."""
        number = bisect_right(self._valid.starts, address) - 1
        return number >= 0 and address + max(length, 1) <= self._valid.ends[number]

    def read(self, address: int, length: int, pad: bool = False) -> bytes:
        """Return exactly ``length`` bytes at a guest-physical ``address``.

        An address that is not RAM, or RAM the stream never recorded, raises :class:`NotInMemory`;
        with ``pad`` it reads as zeros.
        """
        if length <= 0:
            return b""
        pieces: list[bytes] = []
        end = address + length
        while address < end:
            region, stop = self._at(address, end)
            if region is not None:
                offset = region.block_offset + address - region.address
                pieces.append(self._read(region.block, offset, stop - address, pad, address))
            elif pad:
                pieces.append(bytes(stop - address))
            else:
                raise NotInMemory("the address is not RAM", address=address, length=length)
            address = stop
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_block(self, name: str, offset: int, length: int, pad: bool = False) -> bytes:
        """Return bytes of a RAM block, also of one that lies at no known address (``vga.vram``)."""
        block = next((block for block in self.blocks if block.name == name), None)
        if block is None:
            known = ", ".join(cut(block.name) for block in self.blocks)
            raise LookupError(f"no RAM block '{cut(name)}'; the stream holds: {known}")
        if offset < 0 or offset + length > block.size:
            raise NotInMemory(f"outside of RAM block {quoted(name)}", address=offset, length=length)
        return self._read(name, offset, length, pad, offset) if length > 0 else b""

    def read_device(self, name: str) -> bytes:
        """Return the bytes of a device section, as QEMU wrote them.

        ``name`` is as :attr:`devices` has it, with ``#INSTANCE`` where several have it. The state of an emulated TPM
        is also there in parts, as the files of swtpm: ``tpm-emulator/permanent``, ``/volatile``, ``/savestate``.
        Raises :class:`LookupError` for none, or for several.
        """
        device, _, part = name.partition("/") if name.startswith(f"{tpm.DEVICE}/") else (name, "", "")
        found = [item for item in self.devices if device in (item.name, f"{item.name}#{item.instance}")]
        if len(found) != 1:
            known = ", ".join(f"{cut(item.name)}#{item.instance}" for item in found or self.devices)
            what = "several devices" if found else "no device"
            raise LookupError(f"{what} {quoted(device)}; the stream holds: {known or 'none'}")
        body = self.source.read(found[0].offset, found[0].length)
        if not part:
            return body
        parts = tpm.split(body)
        if part not in parts:
            raise LookupError(f"no part {quoted(part)} of {tpm.DEVICE}; there are: {', '.join(parts) or 'none'}")
        return parts[part]

    def device_files(self, name: str) -> dict[str, bytes]:
        """Return file names and contents for a device: its section, and for a TPM the files that swtpm keeps.

        Raises what :meth:`read_device` raises.
        """
        body = self.read_device(name)
        files = {f"{name}.bin": body}
        if name == tpm.DEVICE:
            files |= {f"tpm2-00.{tpm.PARTS[part]}": data for part, data in tpm.split(body).items()}
        return files

    def mapping(self, address: int, length: int) -> Iterator[MemoryRun]:
        """Yield runs in order of address; what is not valid is left out.

        A page of data is a run of its own, because the stream has a header before each; fill
        pages are joined.
        """
        end = address + length
        while address < end:
            region, stop = self._at(address, end)
            if region is not None:
                yield from self._map(region, address, stop)
            address = stop

    def valid_ranges(self, address: int = 0, length: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield ``(address, length)`` of maximal contiguous valid ranges."""
        yield from address_ranges.clip(self._valid, address, length)

    def zero_ranges(self, address: int = 0, length: int | None = None, minimum: int = MiB) -> Iterator[tuple[int, int]]:
        """Yield ``(address, length)`` of ranges of at least ``minimum`` bytes that the stream says are zero."""
        spans = address_ranges.zeros(self.regions, self._index, self.page_size, minimum)
        yield from (item for item in address_ranges.clip(spans, address, length) if item[1] >= minimum)

    def chunks(
        self,
        size: int,
        overlap: int,
        *,
        address: int = 0,
        length: int | None = None,
        elide: bool = False,
        minimum: int = MiB,
    ) -> Iterator[Chunk]:
        """Yield chunks of at most ``size + overlap`` bytes that together cover every valid byte.

        Chunks never cross an invalid byte. A signature of at most ``overlap + 1`` bytes is always
        whole in the chunk that owns its first byte. With ``elide`` the inside of zero runs of
        at least ``minimum`` bytes is left out, but for ``overlap`` bytes at each end: right for any
        scanner that finds nothing in zeros and looks no further than ``overlap`` bytes.
        """
        pieces = self.valid_ranges(address, length)
        if elide:
            zeros = self.zero_ranges(address, length, max(minimum, 2 * overlap + 1))
            pieces = address_ranges.subtract(pieces, zeros, overlap)
        for start, amount in pieces:
            end = start + amount
            for place in range(start, end, size):
                yield Chunk(place, min(size + overlap, end - place), min(size, end - place))

    def to_bytes(self) -> bytes:
        """Return the index in a compact form with a format version, for a cache."""
        from .index_cache import dump

        return dump(self._analysis)

    @classmethod
    def from_bytes(cls, data: bytes, source: Source, limits: Limits = DEFAULT_LIMITS) -> GuestMemory:
        """Rebuild from :meth:`to_bytes` over the same stream, checking everything.

        Raises :class:`FormatError` for another version, a damaged cache or a stream of another size.
        """
        from .index_cache import load

        memory = cls.__new__(cls)
        memory._set(source, load(data, source.size, limits))
        return memory

    def _at(self, address: int, end: int) -> tuple[Region | None, int]:
        """Return the region at an address, or None, and where it, or the hole, ends."""
        number = bisect_right(self._starts, address) - 1
        if number >= 0 and address < self.regions[number].end:
            region = self.regions[number]
            return region, min(end, region.end)
        following = number + 1
        return None, min(end, self.regions[following].address) if following < len(self.regions) else end

    def _read(self, block: str, offset: int, length: int, pad: bool, address: int) -> bytes:
        page, within = divmod(offset, self.page_size)
        if within + length <= self.page_size and (data := self._page(block, page)):
            return data[within : within + length]
        return read_pages(self.source, self._index[block], self.page_size, offset, length, pad=pad, address=address)

    def _load_page(self, block: str, page: int) -> bytes:
        """Return one page, b"" when the stream does not hold it."""
        index = self._index[block]
        value = index.find(page)
        if value == MISSING:
            return b""
        if value == -1:
            return self._zero_page  # one for all: thousands of pages are kept
        return page_of(self.source, value, index.deltas.get(page, ()), self.page_size)

    def _map(self, region: Region, address: int, end: int) -> Iterator[MemoryRun]:
        size, index = self.page_size, self._index[region.block]
        shift = region.address - region.block_offset  # guest address of the block's first byte, were it all here
        first = (address - shift) // size
        for run in index.runs(first, -(-(end - shift) // size) - first):
            start = shift + run.first * size
            stop = min(end, start + run.pages * size)
            start = max(start, address)
            if run.value == MISSING:
                continue
            if is_special(run.value):
                yield MemoryRun(start, stop - start, None, None)
                continue
            if run.value < 0:
                yield MemoryRun(start, stop - start, None, -1 - run.value)
                continue
            page_start = shift + run.first * size
            for number in range(run.pages):
                low, high = max(page_start, start), min(page_start + size, stop)
                yield MemoryRun(low, high - low, run.value + number * index.stride + low - page_start, None)
                page_start += size
