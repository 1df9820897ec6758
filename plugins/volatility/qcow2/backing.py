"""The files under a disk as further base layers, found under the core's resolver policy."""

from __future__ import annotations

import os
import stat
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

from volatility3.framework import exceptions, interfaces

from .common import LayerSource, add_file_layer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qcow2_forensics import Source
    from qcow2_forensics.reader.resolver import Role


class LayerResolver:
    """Opens data and backing files as Volatility layers, in the order in which the chain asks; a core ``Resolver``.

    ``known`` are the layers of a configuration; what goes beyond them is opened and added to
    ``names``. Local names follow the core's policy; beside a URL only names below its folder count.
    """

    def __init__(
        self,
        context: interfaces.context.ContextInterface,
        config_path: str,
        known: Iterable[str] = (),
        folders: Iterable[str] = (),
    ) -> None:
        from qcow2_forensics import Resolver

        self._policy = Resolver(folders=folders)
        self._context = context
        self._config_path = config_path
        self._known = list(known)
        self.names: list[str] = []

    def open(self, name: str, role: Role, parent: Source, top: Source) -> tuple[Source, str | None]:
        """Return the file a name in ``parent`` means, as a source over its layer."""
        from qcow2_forensics.reader.resolver import parse_reference

        reference = parse_reference(name, role)
        if len(self.names) < len(self._known):
            layer = self._context.layers[self._known[len(self.names)]]
        else:
            layer = self._add(self._location(name, reference.path, role, parent, top), name, role)
        self.names.append(layer.name)
        return LayerSource(layer), reference.driver

    def _location(self, name: str, path: str, role: Role, parent: Source, top: Source) -> str:
        from qcow2_forensics import ForbiddenReference, MissingFile

        location = str(getattr(parent, "location", ""))
        if getattr(parent, "path", None) is not None or not location:
            place = self._policy.locate(name, path, role, parent, top)
            try:
                # Looked at before it is opened: opening a device or a FIFO can have effects.
                if not stat.S_ISREG(os.stat(place).st_mode):
                    raise ForbiddenReference(name, "it is not a regular file")
            except FileNotFoundError:
                raise MissingFile(role, name, [str(place)]) from None
            return Path(place).as_uri()
        parts = path.split("/")
        if "" in parts or ".." in parts or "!" in path:
            raise ForbiddenReference(name, "it leads outside the folder of the image")
        folder, mark = (location.rpartition("!")[0::2]) if "!" in location else ("", location)
        base = mark.rpartition("/")[0]
        beside = f"{base}/{urllib.parse.quote(path)}" if base else urllib.parse.quote(path)
        return f"{folder}!{beside}" if folder else beside

    def _add(self, location: str, name: str, role: Role) -> interfaces.layers.DataLayerInterface:
        from qcow2_forensics import MissingFile

        try:
            return add_file_layer(self._context, self._config_path, "Qcow2ChainLayer", location)
        except (OSError, ValueError, exceptions.VolatilityException) as error:
            raise MissingFile(role, name, [location]) from error
