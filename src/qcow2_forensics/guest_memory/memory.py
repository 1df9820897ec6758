"""A QEMU migration stream as guest-physical memory."""

from __future__ import annotations

from collections.abc import Iterator

from ..limits import DEFAULT_LIMITS, MiB, Limits
from ..source import Source
from .model import Block, Chunk, Cpu, Device, Layout, MemoryRun, Region


class GuestMemory:
    """Guest-physical memory of any :class:`Source` that holds a QEMU migration stream (``QEVM``).

    The stream is indexed once when the object is made; it is read again only where asked for, and
    only through ``source.read(offset, length)``. A stream inside another file (libvirt, Proxmox,
    compressed) is found by :func:`find_stream` first.

    With ``allow_truncated`` a stream that ends early is read as far as it goes; ``complete`` tells.

    Raises :class:`FormatError` (also :class:`LimitExceeded`) for bytes that contradict the grammar,
    :class:`Unsupported` for page encodings that need another channel or an older page.
    """

    def __init__(self, source: Source, limits: Limits = DEFAULT_LIMITS, *, allow_truncated: bool = False) -> None:
        raise NotImplementedError

    machine: str
    """The machine type from the configuration section, "" in streams older than it. Not escaped."""
    architecture: str
    """"x86", "aarch64" or ""."""
    page_size: int
    blocks: tuple[Block, ...]
    regions: tuple[Region, ...]
    """Sorted by address, not overlapping; neighbours of different blocks are separate entries."""
    layout: Layout
    devices: tuple[Device, ...]
    cpus: tuple[Cpu, ...]
    complete: bool
    source: Source

    @property
    def maximum_address(self) -> int:
        """The highest address that is RAM; 0 when there is none."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """``maximum_address + 1``: with ``read`` this makes the memory a padded image of RAM."""
        raise NotImplementedError

    def is_valid(self, address: int, length: int = 1) -> bool:
        """Tell whether every byte of the range is RAM that the stream holds."""
        raise NotImplementedError

    def read(self, address: int, length: int, pad: bool = False) -> bytes:
        """Return exactly ``length`` bytes at a guest-physical ``address``.

        An address that is not RAM, or RAM the stream never recorded, raises :class:`ReadError`;
        with ``pad`` it reads as zeros.
        """
        raise NotImplementedError

    def read_block(self, name: str, offset: int, length: int, pad: bool = False) -> bytes:
        """Return bytes of a RAM block, also of one that lies at no known address (``vga.vram``)."""
        raise NotImplementedError

    def mapping(self, address: int, length: int) -> Iterator[MemoryRun]:
        """Yield runs in order of address; what is not valid is left out.

        A page of data is a run of its own, because the stream has a header before each; fill
        pages are joined.
        """
        raise NotImplementedError

    def valid_ranges(self, address: int = 0, length: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield ``(address, length)`` of maximal contiguous valid ranges."""
        raise NotImplementedError

    def zero_ranges(self, address: int = 0, length: int | None = None, minimum: int = MiB) -> Iterator[tuple[int, int]]:
        """Yield ``(address, length)`` of ranges of at least ``minimum`` bytes that the stream says are zero."""
        raise NotImplementedError

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
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """Return the index in a compact form with a format version, for a cache."""
        raise NotImplementedError

    @classmethod
    def from_bytes(cls, data: bytes, source: Source, limits: Limits = DEFAULT_LIMITS) -> GuestMemory:
        """Rebuild from :meth:`to_bytes` over the same stream, checking everything.

        Raises :class:`FormatError` for another version, a damaged cache or a stream of another size.
        """
        raise NotImplementedError
