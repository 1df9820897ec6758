"""Guest-physical memory out of any QEMU migration stream."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from volatility3.framework import constants, exceptions, interfaces

from .common import ViewLayer, core_errors, source_under, warn
from .elision import Skip, allowed, finds_zeros
from .index_cache import identify, index_memory
from .layers import Mapped
from .options import optional_text, scan_zeros

if TYPE_CHECKING:
    from qcow2_forensics import GuestMemory

_MIB = 1024 * 1024


class QemuRamLayer(ViewLayer):
    """The RAM of a guest by guest-physical address.

    The layer below holds the stream: a snapshot's VM state, a bare or libvirt file, a Proxmox volume.
    """

    _view_start: int | None = None  # where the stream starts in the layer below; None when decompressed from it

    def _make_view(self) -> GuestMemory:
        from qcow2_forensics import FormatError, as_source, find_stream

        base = self.context.layers[self._base_layer]
        source = as_source(source_under(base))
        stream = find_stream(source, cache_dir=constants.CACHE_PATH)
        if stream is None:
            raise FormatError(f"{self._base_layer} holds no QEMU memory stream")
        stored_as_is = stream is source or getattr(stream, "source", None) is source
        self._view_start = int(getattr(stream, "start", 0)) if stored_as_is else None
        key, local = identify(base)
        layout = self.config.get("layout", None)
        memory = index_memory(stream, key, layout, on_disk=local)
        if not memory.regions:
            raise FormatError("the memory stream holds no RAM at a known address")
        self._report(memory)
        return memory

    def _report(self, memory: GuestMemory) -> None:
        if not memory.complete:
            held = sum(block.recorded for block in memory.blocks) // _MIB
            total = sum(block.size for block in memory.blocks) // _MIB
            warn(
                f"{self._title()}: the memory stream is cut off: {held} of {total} MiB of RAM are there, the rest is not"
            )
        for assumption in memory.layout.assumptions:
            warn(f"{self._title()}: {assumption}")

    def _title(self) -> str:
        base = self.context.layers[self._base_layer]
        return base._title() if isinstance(base, ViewLayer) else super()._title()

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        layout = optional_text("layout", "Where RAM blocks lie: BLOCK@ADDRESS[,...]")
        return [*super().get_requirements(), layout]

    # --- the interface -------------------------------------------------------------------------

    @property
    def metadata(self) -> Any:
        facts = dict(super().metadata)
        facts["machine"] = self.view.machine
        return interfaces.objects.ReadOnlyMapping(facts)

    @property
    def minimum_address(self) -> int:
        return int(self.view.regions[0].address)

    @property
    def maximum_address(self) -> int:
        return int(self.view.maximum_address)

    def is_valid(self, offset: int, length: int = 1) -> bool:
        return bool(self.view.is_valid(offset, length))

    def _read_padded(self, offset: int, length: int) -> bytes:
        low = max(offset, 0)
        try:
            data = bytes(self.view.read(low, max(0, offset + length - low), True))
            return data.rjust(length, b"\0")
        except core_errors():
            return super()._read_padded(offset, length)

    def mapping(self, offset: int, length: int, ignore_errors: bool = False) -> Iterable[Mapped]:
        memory, start = self.view, self._view_start
        position, end = offset, offset + max(length, 1)
        for run in memory.mapping(offset, end - offset):
            if run.address > position and not ignore_errors:
                break
            position = run.address + run.length
            if run.offset is None or start is None:
                yield run.address, run.length, 0, 1, self._base_layer
            else:
                yield run.address, run.length, start + run.offset, run.length, self._base_layer
        if position < end and not ignore_errors:
            raise exceptions.InvalidAddressException(self.name, position, f"no RAM at {position:#x} in {self.name}")

    def _scan_iterator(
        self,
        scanner: interfaces.layers.ScannerInterface,
        sections: Iterable[tuple[int, int]],
        linear: bool = False,
    ) -> Iterable[tuple[list[tuple[str, int, int]], int]]:
        """Yield contiguous chunks of what is RAM, without zeros that cannot matter to this scanner."""
        skip = Skip.NOTHING if scan_zeros(self.context) else allowed(scanner)
        memory, size, overlap = self.view, scanner.chunk_size, scanner.overlap
        for start, end in self._whole_sections(sections):
            zeros: list[tuple[int, int]] = []
            if skip is Skip.WHOLE:
                zeros = list(memory.zero_ranges(start, end - start, minimum=size + overlap))
                if zeros and finds_zeros(scanner, size + overlap):
                    zeros = []
            elide = skip is Skip.INSIDE
            for chunk in memory.chunks(size, overlap, address=start, length=end - start, elide=elide):
                if zeros and chunk.length == size + overlap and _inside(zeros, chunk.address, chunk.length):
                    continue
                yield [(self.name, chunk.address, chunk.length)], chunk.address + chunk.length


def _inside(ranges: list[tuple[int, int]], address: int, length: int) -> bool:
    """Return whether one of the sorted ranges covers all of a chunk."""
    number = bisect_right(ranges, (address, 1 << 64)) - 1
    return number >= 0 and address + length <= sum(ranges[number])
