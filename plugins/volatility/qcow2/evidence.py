"""Opens what ``vol -f`` names for our plugins, which need neither a scan nor symbols."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from volatility3.framework import constants, exceptions, interfaces, renderers
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints

from .choice import choose
from .common import LayerSource, add_file_layer, warn
from .index_cache import identify, index_memory
from .options import passphrase, snapshot_option

if TYPE_CHECKING:
    from qcow2_forensics import GuestMemory, Image, Source
    from qcow2_forensics.structures import SnapshotEntry

Row = tuple[int, tuple[Any, ...]]
ABSENT = renderers.NotAvailableValue


class Stream(NamedTuple):
    """A memory stream and where it was found; ``snapshot`` is None outside of QCOW2 images."""

    source: Source
    snapshot: SnapshotEntry | None
    key: str | None
    local: bool

    def memory(self) -> GuestMemory:
        """Return the stream as guest memory, indexed."""
        return index_memory(self.source, self.key, on_disk=self.local)


class EvidencePlugin(interfaces.plugins.PluginInterface):
    """What our plugins share: the file is read as it is, and bad evidence is one sentence."""

    hidden = True
    _required_framework_version = (2, 0, 0)
    _version = (1, 0, 0)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        return [
            requirements.URIRequirement(
                name="location", description="The file to read, instead of the one given with -f", optional=True
            )
        ]

    def source(self) -> LayerSource:
        """Return the file that was named; raises :class:`Qcow2Error` and OSError."""
        from qcow2_forensics import Qcow2Error

        location = self.config.get("location", None) or self.context.config.get(
            "automagic.LayerStacker.single_location", None
        )
        if not location:
            raise Qcow2Error("no file is given: use -f")
        return LayerSource(add_file_layer(self.context, self.config_path, "Qcow2Evidence", str(location)))

    def image(self) -> Image:
        """Return the QCOW2 image that was named."""
        from qcow2_forensics import open_image

        return open_image(self.source())

    def stream(self) -> Stream:
        """Return the memory stream that is meant: of the chosen snapshot, or of the file itself."""
        from qcow2_forensics import Qcow2Error, open_image, open_vm_state
        from qcow2_forensics.errors import printable
        from qcow2_forensics.guest_memory import find_stream

        source = self.source()
        key, local = identify(source.layer)
        stream = find_stream(source, cache_dir=constants.CACHE_PATH)
        if stream is not None:
            return Stream(stream, None, key, local)
        image = open_image(source)
        choice = choose(image, snapshot_option(self.context), printable(source.name))
        if choice is None or not choice.memory or choice.snapshot is None:
            raise Qcow2Error(f"{printable(source.name)}: no snapshot with memory")
        state = open_vm_state(source, choice.snapshot, passphrase(self.context))
        state.read(0, 4)
        return Stream(
            state, choice.snapshot, key and f"{key}_{choice.snapshot.index}_{choice.snapshot.l1_table_offset}", local
        )

    def guarded(self, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        """Yield rows; what goes wrong with the evidence becomes a warning, and the end of them."""
        from qcow2_forensics import Qcow2Error
        from qcow2_forensics.errors import printable

        try:
            yield from rows()
        except Qcow2Error as error:
            warn(str(error))
        except (OSError, ImportError, exceptions.VolatilityException) as error:
            warn(printable(str(error)))


def hexadecimal(value: int | None) -> Any:
    """Return a number for a column of :class:`format_hints.Hex`."""
    return ABSENT() if value is None else format_hints.Hex(value)
