"""The plugin ``qcow2.vmstatedump.VmStateDump``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from volatility3.framework import interfaces
from volatility3.framework.configuration import requirements

from .evidence import EvidencePlugin, FoundStream, Row
from .options import optional_text

if TYPE_CHECKING:
    from qcow2_forensics import GuestMemory

_PIECE = 1024 * 1024


class OutputError(SystemExit):
    """The file could not be written: ends ``vol`` with this sentence and exit code 1, where others end in a traceback."""


class VmStateDump(EvidencePlugin):
    """Writes the memory of a snapshot to a file: raw RAM, one RAM block or device, or the stream itself."""

    hidden = False
    columns = (("File", str), ("Bytes", int))

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
            optional_text("block", "Write only the RAM block of this name, as qcow2.info lists it"),
            optional_text(
                "device", "Write only the state of this device, as qcow2.info lists it; a TPM's also as swtpm's files"
            ),
        ]

    def _rows(self) -> Iterator[Row]:
        from qcow2_forensics import ended_by_signals
        from qcow2_forensics.text import printable

        stream = self.stream()
        suffix = f"snapshot-{stream.snapshot.id}" if stream.snapshot is not None else "memory"
        for name, size, read in self._wanted(stream):
            with ended_by_signals():
                written = self._write(f"{suffix}{name}", size, read)
            yield 0, (printable(written), size)

    def _wanted(self, stream: FoundStream) -> Iterator[tuple[str, int, Callable[[int, int], bytes]]]:
        """Yield what to write: the rest of a file name, how many bytes, and what reads them."""
        block, device = self.config.get("block", None), self.config.get("device", None)
        if block:
            yield self._block(stream.memory(), block)
        elif device:
            for name, data in self._device(stream.memory(), device):
                yield f"-{name}", len(data), lambda at, count, data=data: data[at : at + count]  # type: ignore[misc]
        elif self.config.get("form", "raw") == "stream":
            yield ".qevm", stream.source.size, stream.source.read
        else:
            memory = stream.memory()
            yield ".raw", memory.size, lambda at, count: memory.read(at, count, pad=True)

    def _device(self, memory: GuestMemory, name: str) -> Iterator[tuple[str, bytes]]:
        from qcow2_forensics import FormatError

        try:
            yield from memory.device_files(name).items()
        except LookupError as error:
            raise FormatError(str(error)) from None

    def _block(self, memory: GuestMemory, block: str) -> tuple[str, int, Callable[[int, int], bytes]]:
        from qcow2_forensics import FormatError
        from qcow2_forensics.text import cut, quoted

        size = next((item.size for item in memory.blocks if item.name == block), None)
        if size is None:
            names = ", ".join(cut(item.name) for item in memory.blocks)
            raise FormatError(f"no RAM block {quoted(block)}; the stream has {names}")
        return f"-{block}.raw", size, lambda at, count: memory.read_block(block, at, count, pad=True)

    def _write(self, name: str, size: int, read: Callable[[int, int], bytes]) -> str:
        """Write a file that gets its name when it is whole, and return the name; what is unfinished is removed."""
        from qcow2_forensics import signals_wait
        from qcow2_forensics.text import cut, printable

        wanted = self.open.sanitize_filename(name)
        file: Any = None
        try:
            with _to_output(), signals_wait():
                file = self.open(f"{wanted}.partial")
            for offset in range(0, size, _PIECE):
                self._progress_callback(100 * offset / size, f"Writing {printable(wanted, 60)}")
                data = read(offset, min(_PIECE, size - offset))
                with _to_output():
                    _put(file, data, offset, size)
            file.preferred_filename = wanted
            with _to_output():
                file.close()
        except BaseException as error:
            if file is not None:
                with signals_wait():
                    _discard(file)
            if isinstance(error, _NotWritten):
                reason = error.strerror or str(error)
            elif isinstance(error, KeyboardInterrupt):
                reason = "interrupted"
            else:
                raise
            raise OutputError(f"\nqcow2.vmstatedump: {cut(wanted)} is not written: {printable(reason)}") from error
        return str(file.preferred_filename)


class _NotWritten(OSError):
    """An error of the output; an OSError of the evidence is none of it."""


@contextlib.contextmanager
def _to_output() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _NotWritten(*error.args) from error


def _put(file: Any, data: bytes, offset: int, size: int) -> None:
    """Write one piece of a file of ``size`` bytes; zeros become a hole, where the file system has them."""
    if data.count(0) == len(data) and offset + len(data) < size:
        file.seek(offset + len(data))
    else:
        file.write(data)
    if offset + len(data) == size:
        file.flush()


def _discard(file: Any) -> None:
    """Remove an unfinished file: closing a handler of Volatility gives the file its name, and nothing else ends it.

    The handler of ``vol`` knows its file on disk as ``_name``, which is removed first. Any other handler is left with
    an empty file called ``.partial``.
    """
    place = getattr(file, "_name", None)
    if isinstance(place, str):
        with contextlib.suppress(OSError):
            os.unlink(place)
    if not file.closed:
        with contextlib.suppress(OSError):
            file.seek(0)  # may write what is buffered, to the disk that is full
        with contextlib.suppress(OSError):
            file.truncate(0)
        with contextlib.suppress(OSError, ValueError):
            file.preferred_filename = f"{file.preferred_filename.removesuffix('.partial')}.partial"
            file.close()
