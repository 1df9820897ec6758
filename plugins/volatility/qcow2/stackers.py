"""Offers our layers to Volatility's LayerStacker, and says at once what an image is."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from volatility3.framework import constants, exceptions, interfaces

from . import choice, common, content, layers, linux_kernel, ram
from .options import assumptions, layout_option, snapshot_option, virtual_size

if TYPE_CHECKING:
    from qcow2_forensics import Image, MemoryChoice

_MAGIC = b"QFI\xfb"
_STREAMS = (b"QEVM", b"LibvirtQemudSave", b"LibvirtQemudPart")


class Qcow2Stacker(interfaces.automagic.StackerLayerInterface):
    """Stacks the memory of a snapshot, or the disk, on a QCOW2 image."""

    stack_order = 5

    @classmethod
    def stack(
        cls,
        context: interfaces.context.ContextInterface,
        layer_name: str,
        progress_callback: constants.ProgressCallback = None,
    ) -> interfaces.layers.DataLayerInterface | None:
        """Return the layer of the state that is meant; None, with a warning, when it cannot be read."""
        if not _starts_with(context, layer_name, (_MAGIC,)) and not _is_damaged_file(context, layer_name):
            return None
        from qcow2_forensics import Qcow2Error, SnapshotNotFound, open_image, recovered_memory
        from qcow2_forensics.text import printable

        layer = common.LayerSource(context.layers[layer_name])
        title = printable(layer.name)
        try:
            source = common.image_source(layer, assumptions(context))
            found = recovered_memory(source, snapshot_option(context), virtual_size(context))
            if found is not None:
                return _layer(context, layer_name, found)
            image = open_image(source)
            chosen = choice.choose(image, snapshot_option(context), title)
            if chosen is None:
                return _disk(context, layer_name, title, image)
            return _layer(context, layer_name, chosen)
        except SnapshotNotFound as error:  # the file itself, scanned in its place, would pass for that memory
            common.warn(f"{title}: {error}")
            with contextlib.suppress(exceptions.LayerException):  # the layer has warned of the reason
                stated = _stated(context, is_memory=False)
                return _new(context, layer_name, layers.Qcow2DiskLayer, ordinary=True, **stated)
        except Qcow2Error as error:
            common.warn(f"{title}: {error}")
        except exceptions.LayerException:
            pass  # the layer has warned of the reason
        return None


class QemuRamStacker(interfaces.automagic.StackerLayerInterface):
    """Stacks guest memory on any QEMU migration stream, before Volatility's own QEMU layer is asked."""

    stack_order = 9

    @classmethod
    def stack(
        cls,
        context: interfaces.context.ContextInterface,
        layer_name: str,
        progress_callback: constants.ProgressCallback = None,
    ) -> interfaces.layers.DataLayerInterface | None:
        """Return the memory layer; None, with a warning, when the stream cannot be read."""
        if not _starts_with(context, layer_name, _STREAMS):
            return None
        if progress_callback is not None:
            progress_callback(0, "Indexing QEMU memory")
        try:
            layer = _new(context, layer_name, ram.QemuRamLayer, layout=layout_option(context))
            _warn_of_symbols(layer)
            return layer
        except exceptions.LayerException:
            return None  # the layer has warned of the reason


def _warn_of_symbols(layer: common.ViewLayer) -> None:
    """Say which symbols the kernel in a memory needs, when Volatility has none for it."""
    from volatility3.framework.automagic import symbol_cache

    from qcow2_forensics import find_kernel, uses_five_levels
    from qcow2_forensics.text import printable

    found = find_kernel(layer.view, everywhere=False)
    if found is None or found.system != "linux":  # Volatility fetches Windows symbols by itself
        if uses_five_levels(layer.view):
            common.warn(linux_kernel.FIVE_LEVELS)
        return
    known = symbol_cache.load_cache_manager().get_identifier_dictionary(operating_system="linux")
    banner = found.identity.encode("ascii", "surrogateescape")
    if not any(identifier and identifier.startswith(banner) for identifier in known):
        how = f"; to make it: {' && '.join(found.commands)}" if found.commands else ""
        common.warn(
            f"no symbols for the kernel in this memory, so plugins for Linux cannot run: {printable(found.identity)}. "
            f"They go into a file such as {printable(found.symbol_file)} below a folder of -s{how}"
        )


def _is_damaged_file(context: interfaces.context.ContextInterface, layer_name: str) -> bool:
    """Whether this is a file, of which the user wants a recovered state: it may have no header."""
    from qcow2_forensics import is_recovered_state

    wanted = snapshot_option(context) or ""
    return is_recovered_state(wanted.removeprefix("disk:")) and not context.layers[layer_name].dependencies


def _starts_with(context: interfaces.context.ContextInterface, layer_name: str, magics: tuple[bytes, ...]) -> bool:
    layer = context.layers[layer_name]
    if layer.metadata.get("mapped", False) or layer.minimum_address != 0:
        return False
    longest = max(map(len, magics))
    head = layer.read(0, min(longest, layer.maximum_address + 1)) if layer.maximum_address > 0 else b""
    return bool(head.startswith(magics))


def _new(
    context: interfaces.context.ContextInterface,
    layer_name: str,
    kind: type[common.ViewLayer],
    **settings: str | int | None,
) -> common.ViewLayer:
    name = context.layers.free_layer_name(kind.__name__)
    path = common.configure(context, "automagic", "LayerStacker", "stack", name, base_layer=layer_name, **settings)
    return kind(context, path, name)


def _layer(context: interfaces.context.ContextInterface, layer_name: str, chosen: MemoryChoice) -> common.ViewLayer:
    kind = layers.Qcow2VmStateLayer if chosen.is_memory else layers.Qcow2DiskLayer
    stated = _stated(context, chosen.is_memory)
    return _new(context, layer_name, kind, snapshot=chosen.name or None, **stated)


def _stated(context: interfaces.context.ContextInterface, is_memory: bool) -> dict[str, str | int | None]:
    """Return what the user states of a damaged image, for the configuration of its layer."""
    return {
        "assume": assumptions(context) or None,
        "virtual_size": None if is_memory else virtual_size(context),
    }


def _disk(
    context: interfaces.context.ContextInterface, layer_name: str, title: str, image: Image
) -> common.ViewLayer | None:
    """Return the disk's layer when it may be a memory dump; else one that costs no scan."""
    stated = _stated(context, is_memory=False)
    layer = _new(context, layer_name, layers.Qcow2DiskLayer, **stated)
    what = content.ordinary_disk(layer.view)
    if what is None:
        return layer
    if image.snapshots:
        memory = (
            f"its {len(image.snapshots)} snapshot(s) hold no memory: QEMU keeps the memory of all of a machine's "
            "disks in one of them, usually the first writable one"
        )
    elif image.unreadable("snapshots"):
        memory = "its snapshot table cannot be read"
    else:
        memory = "it has no snapshot with memory"
    common.warn(
        f"{title} is an ordinary disk that starts with {what}; {memory}. Nothing is scanned. For its files use "
        "log2timeline, The Sleuth Kit or 'qcow2-forensics'; to scan it all the same give --qcow2-snapshot disk"
    )
    return _new(context, layer_name, layers.Qcow2DiskLayer, ordinary=True, **stated)
