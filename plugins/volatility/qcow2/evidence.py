"""Opens what ``vol -f`` names for our plugins, which need neither a scan nor symbols."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from volatility3.framework import constants, exceptions, interfaces, renderers
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints

from . import choice, common, index_cache
from .options import assumptions, layout_option, optional_text, passphrase, snapshot_option

if TYPE_CHECKING:
    from qcow2_forensics import GuestMemory, Image, SnapshotEntry, Source, VmState

Row = tuple[int, tuple[Any, ...]]
ABSENT = renderers.NotAvailableValue


class FoundStream:
    """A memory stream and where it was found.

    ``snapshot`` is None outside of QCOW2 images, and for a state that no snapshot lists: ``label`` chooses that,
    ``unlisted`` says what it is.
    """

    def __init__(self, source: Source, key: str | None, local: bool, layout: str | None = None) -> None:
        self.source = source
        self.snapshot: SnapshotEntry | None = getattr(source, "snapshot", None)
        self.label: str = getattr(source, "label", "")
        self.unlisted: str = getattr(source, "unlisted", "")
        self._layout = layout
        self._key = key
        self._local = local

    def memory(self) -> GuestMemory:
        """Return the stream as guest memory, indexed."""
        return index_cache.index_memory(self.source, self._key, self._layout, on_disk=self._local)


class EvidencePlugin(interfaces.plugins.PluginInterface):
    """What our plugins share: the file is read as it is, and bad evidence is one sentence.

    A plugin names its ``columns``, each with its type, and yields what belongs into them from ``_rows``.
    """

    hidden = True
    columns: ClassVar[Sequence[tuple[str, type]]] = ()
    _required_framework_version = (2, 0, 0)
    _version = (1, 0, 0)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        return [
            requirements.URIRequirement(
                name="location", description="The file to read, instead of the one given with -f", optional=True
            ),
            optional_text("state", "The snapshot, where --qcow2-snapshot does not say"),
            optional_text("layout", "Where RAM blocks lie, where --qcow2-layout does not say"),
            optional_text("assume", "Header fields that are assumed, where --qcow2-assume does not say"),
        ]

    def build_configuration(self) -> interfaces.configuration.HierarchicalDict:
        """Return the configuration with the file and the options that are used, so that it can be run again."""
        configuration = super().build_configuration()
        stated = {"state": self.wanted(), "layout": self._layout(), "assume": self._assume()}
        for name, value in {"location": self._location(), **stated}.items():
            if value:
                configuration[name] = value
        return configuration

    def wanted(self) -> str | None:
        """Return the snapshot that was named."""
        return snapshot_option(self.context) or self.config.get("state", None)

    def _layout(self) -> str | None:
        return layout_option(self.context) or self.config.get("layout", None)

    def _assume(self) -> str | None:
        return assumptions(self.context) or self.config.get("assume", None)

    def _location(self) -> str | None:
        location = self.config.get("location", None)
        return location or self.context.config.get("automagic.LayerStacker.single_location", None)

    def source(self) -> common.LayerSource:
        """Return the file that was named; raises :class:`Qcow2Error` and OSError."""
        from qcow2_forensics import Qcow2Error

        location = self._location()
        if not location:
            raise Qcow2Error("no file is given: use -f")
        return common.LayerSource(common.add_file_layer(self.context, self.config_path, "Qcow2Evidence", str(location)))

    def _assumed(self, source: common.LayerSource) -> Source:
        return common.image_source(source, self._assume())

    def image(self) -> Image:
        """Return the QCOW2 image that was named."""
        from qcow2_forensics import open_image

        return open_image(self._assumed(self.source()))

    def stream(self) -> FoundStream:
        """Return the memory stream that is meant: of the chosen snapshot, or of the file itself."""
        from qcow2_forensics import Qcow2Error, open_image, recovered_memory
        from qcow2_forensics.text import cut, printable

        source = self.source()
        stream = self._own_stream(source)
        if stream is not None:
            return stream
        chosen = recovered_memory(self._assumed(source), self.wanted())
        if chosen is None:
            chosen = choice.choose(open_image(self._assumed(source)), self.wanted(), printable(source.name))
        if chosen is not None and chosen.is_unlisted:
            return self._stored(source, chosen.name)
        if chosen is None or not chosen.is_memory or chosen.snapshot is None:
            raise Qcow2Error(f"{cut(source.name)}: no snapshot with memory")
        return self._stored(source, chosen.snapshot)

    def streams(self) -> Iterator[FoundStream]:
        """Yield every memory stream of the file: of each snapshot, oldest first, and one that no snapshot lists.

        What cannot be opened is a warning.
        """
        from qcow2_forensics import Qcow2Error, leftover_name, leftover_vm_state, memory_snapshots, open_image
        from qcow2_forensics.text import cut, printable

        source = self.source()
        stream = self._own_stream(source)
        if stream is not None:
            yield stream
            return
        image = open_image(self._assumed(source))
        choice.warn_of_problems(image, printable(source.name))
        left = leftover_vm_state(image)  # also maps what a snapshot of just now holds
        held: list[SnapshotEntry | str] = [*memory_snapshots(image)]
        if left is not None:
            held.append(leftover_name(image))
        if not held:
            raise Qcow2Error(f"{cut(source.name)}: no snapshot with memory")
        places: set[int | None] = set()
        for wanted in held:
            if isinstance(wanted, str) and left in places:
                continue
            try:
                stored = self._stored(source, wanted)
                places.add(next(iter(cast("VmState", stored.source).runs(0, 4))).host_offset)
                yield stored
            except Qcow2Error as error:
                what = wanted if isinstance(wanted, str) else choice.describe(wanted)
                common.warn(f"{printable(source.name)}: {what} is left out: {error}")

    def _own_stream(self, source: common.LayerSource) -> FoundStream | None:
        """Return the memory stream that the file itself is, None for an image."""
        from qcow2_forensics import find_stream

        stream = find_stream(source, cache_dir=constants.CACHE_PATH)
        return None if stream is None else FoundStream(stream, *index_cache.identify(source.layer), self._layout())

    def _stored(self, source: common.LayerSource, wanted: SnapshotEntry | str) -> FoundStream:
        """Return the memory stream of a snapshot, or of a state that no snapshot lists, by its name."""
        from qcow2_forensics import open_vm_state

        key, local = index_cache.identify(source.layer)
        state = open_vm_state(self._assumed(source), wanted, passphrase(self.context))
        state.read(0, 4)
        which = re.sub(r"\W", "_", wanted) if isinstance(wanted, str) else f"{wanted.index}_{wanted.l1_table_offset}"
        if assume := self._assume():
            which += "_" + re.sub(r"\W", "_", assume)
        return FoundStream(state, key and f"{key}_{which}", local, self._layout())

    def run(self) -> Any:
        """Return the table."""
        return renderers.TreeGrid(list(self.columns), self.guarded(self._rows))

    def _rows(self) -> Iterator[Row]:
        raise NotImplementedError

    def guarded(self, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        """Yield rows; what goes wrong with the evidence becomes a warning, and the end of them."""
        from qcow2_forensics import Qcow2Error
        from qcow2_forensics.text import printable

        try:
            yield from rows()
        except Qcow2Error as error:
            common.warn(str(error))
        except (OSError, ImportError, exceptions.VolatilityException) as error:
            common.warn(printable(str(error)))


def hexadecimal(value: int | None) -> Any:
    """Return a number for a column of :class:`format_hints.Hex`."""
    return ABSENT() if value is None else format_hints.Hex(value)
