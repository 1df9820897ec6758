"""The index of a memory stream, kept for the process and, for local files, on disk.

Volatility builds each layer at least twice per run and anew in every worker process; an index is
a few kilobytes that took a pass over the stream. What is kept is bytes, checked when they are
used, and never an open file: worker processes must not share one.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from volatility3.framework import constants, interfaces
from volatility3.framework.layers import physical

from .common import LayerSource, local_path, vollog

if TYPE_CHECKING:
    from qcow2_forensics import GuestMemory, Source

KEPT = 8  # indexes in this process; a worst-case one is some megabytes
WORTH_A_FILE = 512 * 1024 * 1024  # bytes of guest memory below which indexing is as fast as looking it up

_kept: dict[str, bytes] = {}


def index_memory(stream: Source, key: str | None, layout: str | None, *, on_disk: bool) -> GuestMemory:
    """Return the guest memory of a stream, indexed now or before; ``key`` None keeps nothing.

    ``layout`` states where RAM blocks lie, as :class:`GuestMemory` has it.
    """
    from qcow2_forensics import FormatError, GuestMemory, Qcow2Error

    if key is not None and layout:
        key = f"{key}_{hashlib.sha256(layout.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
    path = _path(key) if key is not None and on_disk else None
    for stored in (_kept.get(key or ""), _load(path)):
        if stored is not None:
            try:
                return GuestMemory.from_bytes(stored, stream)
            except FormatError as error:
                vollog.debug("The kept index is of no use: %s", error)
    try:
        memory = GuestMemory(stream, allow_truncated=True, layout=layout)
    except Qcow2Error:
        if (discard := getattr(stream, "discard", None)) is not None:
            discard()  # a decompressed stream that is of no use is not kept
        raise
    if key is not None:
        data = memory.to_bytes()
        while len(_kept) >= KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = data
        if memory.size >= WORTH_A_FILE:
            _store(path, data)
    return memory


def identify(layer: interfaces.layers.DataLayerInterface) -> tuple[str | None, bool]:
    """Return a key for the bytes of a layer, None when nothing identifies them, and whether they are local files.

    The key is made of the configuration of the layer and what the file system says about its files.
    """
    import qcow2_forensics

    configuration = json.dumps(dict(layer.build_configuration()), sort_keys=True, default=repr)
    facts: list[object] = [qcow2_forensics.__version__, configuration]
    local = True
    waiting = [layer]
    while waiting:
        current = waiting.pop()
        below = [layer.context.layers[name] for name in current.dependencies]
        waiting += below
        if below:
            continue
        if not isinstance(current, physical.FileLayer):
            return None, False
        path = local_path(current.location)
        if path is None:
            local = False
            facts += [current.location, LayerSource(current).size]
            continue
        try:
            status = os.stat(path)
        except OSError:
            return None, False
        facts += [os.path.realpath(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest(), local


def _path(key: str) -> Path:
    # The suffix is what Volatility's --clear-cache looks for.
    return Path(constants.CACHE_PATH) / f"qcow2_{key}.cache"


def _load(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path is not None else None
    except OSError:
        return None


def _store(path: Path | None, data: bytes) -> None:
    from qcow2_forensics import cache_file

    if path is None:
        return
    try:
        with cache_file(path) as file:
            file.write(data)
    except OSError as error:
        vollog.info("The index could not be kept in %s: %s", path.parent, error.strerror)
