"""The plugin ``qcow2.vmstatedump.VmStateDump``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from volatility3.framework import interfaces, renderers
from volatility3.framework.configuration import requirements

from .evidence import EvidencePlugin, Row

_PIECE = 1024 * 1024


class VmStateDump(EvidencePlugin):
    """Writes the memory of a snapshot to a file: raw RAM, one RAM block, or the stream itself."""

    hidden = False

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        return [
            *super().get_requirements(),
            requirements.ChoiceRequirement(
                name="form",
                choices=["raw", "stream"],
                description="Padded guest-physical memory, or QEMU's migration stream as it is stored",
                default="raw",
                optional=True,
            ),
            requirements.StringRequirement(
                name="block", description="Write only the RAM block of this name, as qcow2.info lists it", optional=True
            ),
        ]

    def _rows(self) -> Iterator[Row]:
        from qcow2_forensics import FormatError
        from qcow2_forensics.text import cut, printable, quoted

        stream = self.stream()
        block = self.config.get("block", None)
        suffix = f"snapshot-{stream.snapshot.id}" if stream.snapshot is not None else "memory"
        if block:
            memory = stream.memory()
            size = next((item.size for item in memory.blocks if item.name == block), None)
            if size is None:
                names = ", ".join(cut(item.name) for item in memory.blocks)
                raise FormatError(f"no RAM block {quoted(block)}; the stream has {names}")
            name = f"{suffix}-{block}.raw"
            written = self._write(name, size, lambda at, count: memory.read_block(block, at, count, pad=True))
        elif self.config.get("form", "raw") == "stream":
            written = self._write(f"{suffix}.qevm", stream.source.size, stream.source.read)
        else:
            memory = stream.memory()
            written = self._write(f"{suffix}.raw", memory.size, lambda at, count: memory.read(at, count, pad=True))
        yield 0, (printable(written[0]), written[1])

    def _write(self, name: str, size: int, read: Callable[[int, int], bytes]) -> tuple[str, int]:
        """Write a file that gets its name when it is whole; of one that is not, an empty ``.partial`` is left."""
        from qcow2_forensics.text import printable

        wanted = self.open.sanitize_filename(name)
        with self.open(f"{wanted}.partial") as file:
            try:
                for offset in range(0, size, _PIECE):
                    self._progress_callback(100 * offset / size, f"Writing {printable(wanted, 60)}")
                    data = read(offset, min(_PIECE, size - offset))
                    if data.count(0) == len(data) and offset + len(data) < size:
                        file.seek(offset + len(data))  # a hole, where the file system has them
                    else:
                        file.write(data)
                file.flush()
            except BaseException:
                file.seek(0)
                file.truncate()
                raise
            file.preferred_filename = wanted
        return file.preferred_filename, size

    def run(self) -> Any:
        return renderers.TreeGrid([("File", str), ("Bytes", int)], self.guarded(self._rows))
