"""The two layers over a QCOW2 image: the memory stream of a snapshot, and the virtual disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

from volatility3.framework import exceptions, interfaces
from volatility3.framework.configuration import requirements

from .common import LayerSource, ViewLayer, image_source, vollog
from .options import (
    HOW_TO_UNLOCK,
    backing_file,
    backing_folders,
    optional_flag,
    optional_text,
    passphrase,
    without_backing,
)

if TYPE_CHECKING:
    from qcow2_forensics import Disk, Resolver, Run, VmState

Mapped = tuple[int, int, int, int, str]

_STATE = (
    optional_text("snapshot", "ID of the snapshot"),
    optional_text("assume", "Header fields that are assumed"),
)

# Volatility has no list of layers that it builds from a saved configuration by itself. What lies
# deeper in a chain is found anew by its name.
CHAIN = tuple(f"chain_{number}" for number in range(16))


class Qcow2VmStateLayer(ViewLayer):
    """The QEMU migration stream that a snapshot of a QCOW2 image holds, as bytes.

    ``snapshot`` is the ID of the snapshot; the latest with VM state when the configuration has none.
    """

    def _make_view(self) -> VmState:
        from qcow2_forensics import open_vm_state

        source = image_source(LayerSource(self.context.layers[self._base_layer]), self.config.get("assume", None))
        state = open_vm_state(source, self.config.get("snapshot", None), passphrase(self.context))
        state.read(0, 4)  # an encrypted image without its key fails here, not at the first page
        return state

    def _title(self) -> str:
        from qcow2_forensics.text import printable

        snapshot = self.config.get("snapshot", None)
        return super()._title() + (f", snapshot {printable(str(snapshot))}" if snapshot else "")

    def mapping(self, offset: int, length: int, ignore_errors: bool = False) -> Iterable[Mapped]:
        return _mapped(self, self.view.runs(offset, length), offset, length, ignore_errors)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        return [*super().get_requirements(), *_STATE]


class Qcow2DiskLayer(ViewLayer):
    """The virtual disk of a QCOW2 image as bytes: for a disk that is itself a memory dump.

    Data and backing files are further base layers, in the order in which the chain opens them.
    With ``ordinary`` the disk is known to hold no memory, and scans of it find nothing.
    """

    @property
    def dependencies(self) -> list[str]:
        return [self._base_layer, *self._chain()]

    def _chain(self) -> list[str]:
        """Return the names of the layers below besides the base layer."""
        names = (self.config.get(name, None) for name in CHAIN)
        return [str(name) for name in names if name]

    def _make_view(self) -> Disk:
        from qcow2_forensics import Locked, open_disk

        from .backing import LayerResolver

        folders, named = backing_folders(self.context), backing_file(self.context)
        resolver = LayerResolver(self.context, self.config_path, self._chain(), folders, named)
        disk = open_disk(
            image_source(LayerSource(self.context.layers[self._base_layer]), self.config.get("assume", None)),
            self.config.get("snapshot", None),
            passphrase(self.context),
            cast("Resolver", resolver),
            missing="raise",
            follow=not without_backing(self.context),
            virtual_size=self.config.get("virtual_size", None),
        )
        self._remember(resolver.names)
        if disk.is_locked:
            raise Locked(disk.locked_method, HOW_TO_UNLOCK, member=disk.locked_member)
        disk.read(0, 512)
        return disk

    def _remember(self, names: list[str]) -> None:
        for key, name in zip(CHAIN, names, strict=False):
            self.context.config[interfaces.configuration.path_join(self.config_path, key)] = name
        self._config_cache = None

    def mapping(self, offset: int, length: int, ignore_errors: bool = False) -> Iterable[Mapped]:
        disk: Disk = self.view
        end = min(disk.size, offset + length)
        return _mapped(self, disk.mapping.runs(offset, max(0, end - offset)), offset, length, ignore_errors)

    def _scan_iterator(
        self,
        scanner: interfaces.layers.ScannerInterface,
        sections: Iterable[tuple[int, int]],
        linear: bool = False,
    ) -> Iterable[tuple[list[tuple[str, int, int]], int]]:
        if self.config.get("ordinary", False):
            vollog.info("%s is an ordinary disk and is not scanned for memory", self.name)
            return ()
        return super()._scan_iterator(scanner, sections, linear)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        return [
            *super().get_requirements(),
            *_STATE,
            requirements.IntRequirement(name="virtual_size", description="Size of a recovered disk", optional=True),
            optional_flag("ordinary", "The disk holds no memory"),
            *(requirements.TranslationLayerRequirement(name=name, optional=True) for name in CHAIN),
        ]


def _mapped(layer: ViewLayer, runs: Iterable[Run], offset: int, length: int, ignore_errors: bool) -> Iterator[Mapped]:
    """Yield runs as Volatility's mappings; what the image does not store is one byte of its start.

    The bytes of encrypted and compressed runs are not those of the base layer: only ``read`` gives them.
    """
    done = offset
    for run in runs:
        done = run.offset + run.length
        if run.host_offset is None:
            yield run.offset, run.length, 0, 1, layer.dependencies[0]
        else:
            yield run.offset, run.length, run.host_offset, run.size or run.length, layer.dependencies[0]
    if done < offset + length and not ignore_errors:
        raise exceptions.InvalidAddressException(layer.name, done, f"no data at {done:#x} in {layer.name}")
