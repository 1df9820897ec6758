"""The seam between Volatility's layers and the core's sources, and what our layers share."""

from __future__ import annotations

import logging
import lzma
import os
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from volatility3.framework import exceptions, interfaces
from volatility3.framework.configuration import requirements
from volatility3.framework.layers import physical

if TYPE_CHECKING:
    from qcow2_forensics import Source

vollog = logging.getLogger(__name__)

MAXIMUM_PIECE = 4096  # with pad, an unreadable range is narrowed down to pieces of this size
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what a gz, xz, zip or plain location raises

_shown: set[str] = set()


def warn(message: str) -> None:
    """Show a warning once per process: Volatility builds every layer at least twice.

    Exceptions inside a stacker are shown to nobody, so this is how anything reaches the user.
    """
    if message not in _shown:
        _shown.add(message)
        vollog.warning(message)


def core_errors() -> type[Exception]:
    """Return the root of the core's errors; imported only where one is being raised."""
    from qcow2_forensics import Qcow2Error

    return Qcow2Error


def local_path(location: str) -> str | None:
    """Return the path a ``file:`` location means, None for any other."""
    parts = urllib.parse.urlsplit(location)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        return None
    return urllib.request.url2pathname(parts.path)


class LayerSource:
    """A Volatility layer as a core source, so that whatever Volatility can open, we can read.

    ``path`` and ``identity`` are set where the location is a plain local file: names inside the
    image are resolved against the one, loops are found by the other.
    """

    single_threaded = True  # Volatility's file layer seeks, then reads, without a lock

    def __init__(self, layer: interfaces.layers.DataLayerInterface) -> None:
        self.layer = layer
        self.location = str(getattr(layer, "location", ""))
        self.name = urllib.parse.unquote(self.location.rsplit("/", 1)[-1]) or str(layer.name)
        self.path = local_path(self.location) if self.location else None
        status = _status(self.path)
        self.identity: object = (status.st_dev, status.st_ino) if status is not None else self.location or None
        self.mtime_ns = None if status is None else status.st_mtime_ns
        self.folder: str | None = None  # as of the core's FileSource
        self.stands_for = ""
        self.size = int(layer.maximum_address) + 1

    def read(self, offset: int, length: int, /) -> bytes:
        """Return bytes of the layer, fewer only at its end."""
        from qcow2_forensics import ReadError

        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        try:
            return bytes(self.layer.read(offset, length))
        except exceptions.InvalidAddressException as error:
            raise ReadError(f"{self.name}: {error}", offset=offset, length=length) from error
        except _UNREADABLE as error:
            raise ReadError(f"{self.name}: {error}", offset=offset, length=length) from error


def image_source(source: LayerSource, assume: str | None) -> Source:
    """Return the file of an image with the header fields that are assumed; raises :class:`Qcow2Error`."""
    from qcow2_forensics import assuming, parse_assumptions

    return assuming(source, parse_assumptions(assume or ""))


def _status(path: str | None) -> os.stat_result | None:
    """Return what identifies a local file and when it was changed, None where there is none."""
    try:
        return None if path is None else os.stat(path)
    except (OSError, ValueError):
        return None


def source_under(layer: interfaces.layers.DataLayerInterface) -> Source:
    """Return a layer as a source; the core's own object where the layer is one of ours."""
    view = getattr(layer, "view", None)
    return view if isinstance(layer, ViewLayer) and view is not None else LayerSource(layer)


def chunks(start: int, end: int, size: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield ``(position, length)`` of the chunks a scanner of that size and overlap gets."""
    for position in range(start, end, size):
        yield position, min(size + overlap, end - position)


class ViewLayer(interfaces.layers.TranslationLayerInterface):
    """What our layers share: they show a core object, the view, over the layers they depend on.

    The view is made on first use and left out of pickles and clones: it holds other layers, which
    worker processes have to open anew.
    """

    _view: Any = None

    def __init__(
        self,
        context: interfaces.context.ContextInterface,
        config_path: str,
        name: str,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(context=context, config_path=config_path, name=name, metadata=metadata)
        self._base_layer: str = self.config["base_layer"]
        self._make_view_or_warn()

    def _make_view_or_warn(self) -> None:
        from qcow2_forensics import Qcow2Error

        try:
            self._view = self._make_view()
        except (Qcow2Error, ImportError) as error:
            # Volatility swallows what a constructor raises, so this warning is what the user sees.
            warn(f"{self._title()}: {error}")
            raise exceptions.LayerException(self.name, str(error)) from error

    def _title(self) -> str:
        """What the layer is of, to begin a message with."""
        from qcow2_forensics.text import printable

        return printable(LayerSource(self.context.layers[self._base_layer]).name)

    def _make_view(self) -> Any:
        raise NotImplementedError

    @property
    def view(self) -> Any:
        """The core object this layer shows."""
        if self._view is None:
            self._view = self._make_view()
        return self._view

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_view")}

    # --- the interface -------------------------------------------------------------------------

    @property
    def dependencies(self) -> list[str]:
        return [self._base_layer]

    @property
    def minimum_address(self) -> int:
        return 0

    @property
    def maximum_address(self) -> int:
        return int(self.view.size) - 1

    def is_valid(self, offset: int, length: int = 1) -> bool:
        return offset >= 0 and offset + max(length, 1) <= self.view.size

    def read(self, offset: int, length: int, pad: bool = False) -> bytes:
        """Read without the unbounded caches of the parent classes."""
        why = f"no data at {offset:#x}"
        try:
            data: bytes = self.view.read(offset, length) if offset >= 0 else b""
            if len(data) == length:
                return data
        except core_errors() as error:
            why = str(error)
            if self.is_valid(offset, length):
                warn(f"{self._title()}: {error}")
        if pad:
            return self._read_padded(offset, length)
        end = self.maximum_address + 1
        raise exceptions.InvalidAddressException(
            self.name, end if self.is_valid(offset) and offset + length > end else offset, f"{self.name}: {why}"
        )

    def _read_padded(self, offset: int, length: int) -> bytes:
        """Read with zeros for what cannot be read, narrowing the unreadable ranges down by halves."""
        try:
            if self.is_valid(offset, length):
                return bytes(self.view.read(offset, length))
        except core_errors() as error:
            vollog.info(f"{self._title()}: read as zeros: {error}")
        if length <= MAXIMUM_PIECE or offset > self.maximum_address or offset + length <= 0:
            readable = self.view.read(offset, length) if self._only_clipped(offset, length) else b""
            return bytes(readable).ljust(length, b"\0")
        half = length // 2
        return self._read_padded(offset, half) + self._read_padded(offset + half, length - half)

    def _only_clipped(self, offset: int, length: int) -> bool:
        end = self.maximum_address + 1
        return 0 <= offset < end < offset + length and self.is_valid(offset, end - offset)

    def write(self, offset: int, value: bytes) -> None:
        raise exceptions.LayerException(self.name, f"{self.name} is evidence and cannot be written")

    def _decode_data(self, data: bytes, mapped_offset: int, offset: int, output_length: int) -> bytes:
        return self.read(offset, output_length)

    def _scan_iterator(
        self,
        scanner: interfaces.layers.ScannerInterface,
        sections: Iterable[tuple[int, int]],
        linear: bool = False,
    ) -> Iterable[tuple[list[tuple[str, int, int]], int]]:
        """Yield contiguous chunks, so that what crosses a border of the mapping is found."""
        for start, end in self._whole_sections(sections):
            for position, length in chunks(start, end, scanner.chunk_size, scanner.overlap):
                yield [(self.name, position, length)], position + length

    def _whole_sections(self, sections: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Yield start and end of each section, with the last byte that ``scan()`` forgets."""
        for start, length in sections:
            end = start + length
            yield start, end + 1 if end == self.maximum_address else end

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        return [requirements.TranslationLayerRequirement(name="base_layer", optional=False)]


def add_file_layer(
    context: interfaces.context.ContextInterface, config_path: str, prefix: str, location: str
) -> physical.FileLayer:
    """Open a location as a further base layer; raises OSError and what Volatility's handlers raise."""
    name = context.layers.free_layer_name(prefix)
    layer = physical.FileLayer(context, configure(context, config_path, name, location=location), name)
    context.layers.add_layer(layer)
    return layer


# --- configurations --------------------------------------------------------------------------------


def configure(context: interfaces.context.ContextInterface, *path: str, **settings: Any) -> str:
    """Put settings at a place of the configuration, but for those that are None, and return the place."""
    place = interfaces.configuration.path_join(*path)
    for key, value in settings.items():
        if value is not None:
            context.config[interfaces.configuration.path_join(place, key)] = value
    return place
