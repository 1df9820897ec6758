"""The files under a disk as further base layers, found under the core's resolver policy."""

from __future__ import annotations

import logging
import os
import urllib.parse
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from volatility3.framework import exceptions, interfaces
from volatility3.framework.layers import physical

from .common import LayerSource, add_file_layer, configure, local_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcow2_forensics import FileSource, NamedFiles, Role, Source

_COMPRESSED = (".gz", ".bz2", ".xz")  # what Volatility's file layer decompresses by its name


def _once(record: logging.LogRecord, seen: set[str] = set()) -> bool:  # noqa: B006 - what it is kept for
    """Show a sentence of the core's once: Volatility builds every layer at least twice."""
    sentence = record.getMessage()
    new = sentence not in seen
    seen.add(sentence)
    return new


logging.getLogger("qcow2_forensics").addFilter(_once)


class Qcow2ChainFileLayer(physical.FileLayer):
    """A local file as it is stored; FileLayer decompresses what is named ``*.gz``, or looks like it.

    ``descriptor`` is the file that the resolver opened. In another process it is opened by its path, which
    has no links.
    """

    def __init__(
        self,
        context: interfaces.context.ContextInterface,
        config_path: str,
        name: str,
        metadata: dict[str, Any] | None = None,
        *,
        descriptor: int | None = None,
    ) -> None:
        self._descriptor = descriptor
        self._file_: IO[Any] | None
        super().__init__(context=context, config_path=config_path, name=name, metadata=metadata)

    @property
    def _file(self) -> IO[Any]:
        if self._file_ is None:
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is None:
                flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
                descriptor = os.open(local_path(self._location) or "", flags)
            self._file_ = os.fdopen(descriptor, "rb")
        return self._file_


class LayerResolver:
    """Opens data and backing files as Volatility layers, in the order in which the chain asks; a core ``Resolver``.

    ``known`` are the layers of a configuration; what goes beyond them is opened and added to
    ``names``. Local names follow the core's policy; beside a URL only names below its folder count.
    """

    def __init__(
        self,
        context: interfaces.context.ContextInterface,
        config_path: str,
        known: Sequence[str],
        folders: Sequence[str],
        named: NamedFiles,
    ) -> None:
        from qcow2_forensics import ALONE_VARIABLE, BACKING_VARIABLE, Remedies, Resolver

        self.remedies = Remedies(
            f"--qcow2-backing-folder FOLDER (or {BACKING_VARIABLE})",
            "--qcow2-backing-file NAME=PATH",
            f"--qcow2-no-backing (or {ALONE_VARIABLE}=1)",
        )
        self.files, formats = named
        self._policy = Resolver(folders=folders, files=self.files, formats=formats, remedies=self.remedies)
        self._context = context
        self._config_path = config_path
        self._known = known
        self.names: list[str] = []

    def open(self, name: str, role: Role, parent: Source, top: Source) -> tuple[Source, str | None]:
        """Return the file a name in ``parent`` means, as a source over its layer."""
        from qcow2_forensics import ForbiddenReference, parse_reference

        if len(self.names) < len(self._known):
            try:
                driver = self._policy.formats.get(name) if name in self.files else parse_reference(name, role).driver
            except ForbiddenReference:  # a file stands in for it
                driver = None
            source = LayerSource(self._context.layers[self._known[len(self.names)]])
        elif name in self.files or getattr(parent, "path", None) is not None or not getattr(parent, "location", ""):
            opened, driver = self._policy.open(name, role, parent, top)
            source = self._local(opened)  # type: ignore[arg-type]  # the core's resolver opens files
        else:
            reference = parse_reference(name, role)
            driver = reference.driver
            source = self._remote(name, reference.path, role, str(getattr(parent, "location", "")))
        self.names.append(source.layer.name)
        return source, driver

    def _local(self, opened: FileSource) -> LayerSource:
        """Return a file that the core's policy opened as a layer."""
        name = self._context.layers.free_layer_name("Qcow2ChainLayer")
        location = Path(os.path.realpath(opened.path)).as_uri()
        path = configure(self._context, self._config_path, name, location=location)
        layer = Qcow2ChainFileLayer(self._context, path, name, descriptor=os.dup(opened.fileno()))
        self._context.layers.add_layer(layer)
        source = LayerSource(layer)
        source.stands_for, source.folder = opened.stands_for, opened.folder
        opened.close()
        return source

    def _remote(self, name: str, path: str, role: Role, location: str) -> LayerSource:
        """Return a file beside an image that Volatility opened by a URL, or in an archive."""
        from qcow2_forensics import ForbiddenReference, MissingFile

        parts = path.split("/")
        if "" in parts or ".." in parts or "!" in path:
            raise ForbiddenReference(name, "it leads outside the folder of the image")
        if path.lower().endswith(_COMPRESSED):
            raise ForbiddenReference(name, "Volatility would decompress it; copy the files to a local folder")
        folder, mark = (location.rpartition("!")[0::2]) if "!" in location else ("", location)
        base = mark.rpartition("/")[0]
        beside = f"{base}/{urllib.parse.quote(path)}" if base else urllib.parse.quote(path)
        place = f"{folder}!{beside}" if folder else beside
        try:
            layer = add_file_layer(self._context, self._config_path, "Qcow2ChainLayer", place)
        except (OSError, ValueError, exceptions.VolatilityException) as error:
            raise MissingFile(role, name, [place]) from error
        return LayerSource(layer)
