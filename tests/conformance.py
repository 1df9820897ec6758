"""One way to read, whatever reads: small adapters that give every reader of ours the same face.

An :class:`Adapter` opens an image file as one kind of reader. What readers are allowed to differ in
(what past-the-end and negative requests do, whether they pickle) is data on the adapter; everything
else in ``tests/test_conformance.py`` is one set of claims for all of them.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import qcow2_forensics as q

Read = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Reader:
    """One opened reader: its size, and ``read(offset, length)`` in its own manner."""

    size: int
    read: Read
    native: Any


Opener = Callable[..., AbstractContextManager[Reader]]


@dataclass(frozen=True)
class Adapter:
    """One kind of reader. ``past_end`` and ``clipped`` are errors, or None where bytes run short.

    ``past_end`` is for requests that start at or after the end, ``clipped`` for those that cross it.
    """

    name: str
    open: Opener
    past_end: type[Exception] | None = None
    clipped: type[Exception] | None = None
    negative: type[Exception] | tuple[type[Exception], ...] = ValueError
    failed: type[Exception] = q.Qcow2Error  # what a read of unreadable evidence raises
    refused: tuple[type[Exception], ...] = (q.Qcow2Error,)  # what opening unsound evidence raises
    positional: bool = True  # threads may share one object
    pickles: bool = False  # worker processes get a copy

    def __str__(self) -> str:
        return self.name


# --- the core --------------------------------------------------------------------------------------


@contextmanager
def _disk(path: Path, snapshot: str | None = None) -> Iterator[Reader]:
    with q.open_disk(path, snapshot) as disk:
        yield Reader(disk.size, disk.read, disk)


@contextmanager
def _over_file_object(path: Path, snapshot: str | None = None) -> Iterator[Reader]:
    resolver = q.Resolver(folders=[path.parent])  # a file object has no folder of its own
    with path.open("rb") as file, q.open_disk(file, snapshot, resolver=resolver) as disk:
        yield Reader(disk.size, disk.read, disk)


@contextmanager
def _stream(path: Path, snapshot: str | None = None) -> Iterator[Reader]:
    with q.open_disk(path, snapshot) as disk, disk.open() as stream:
        size = stream.seek(0, io.SEEK_END)

        def read(offset: int, length: int) -> bytes:
            if length < 0:
                raise ValueError("a negative length means the rest to a file object")
            stream.seek(offset)
            return stream.read(length) or b""

        yield Reader(size, read, stream)


@contextmanager
def _buffered(path: Path, snapshot: str | None = None) -> Iterator[Reader]:
    with _stream(path, snapshot) as reader:
        buffered = io.BufferedReader(reader.native, 4096)

        def read(offset: int, length: int) -> bytes:
            if length < 0:
                raise ValueError("a negative length means the rest to a file object")
            buffered.seek(offset)
            return buffered.read(length)

        yield Reader(reader.size, read, buffered)
        buffered.detach()


# --- Volatility ------------------------------------------------------------------------------------


@contextmanager
def _volatility(path: Path, snapshot: str | None = None) -> Iterator[Reader]:
    from tests import volatility_tools as tools

    context = tools.new_context()
    context.config["Disk.base_layer"] = tools.add_file(context, path.as_uri())
    if snapshot is not None:
        context.config["Disk.snapshot"] = snapshot
    layer = tools.layers.Qcow2DiskLayer(context, "Disk", "Disk")
    context.layers.add_layer(layer)
    yield Reader(layer.maximum_address + 1, layer.read, layer)
    layer.destroy()


# --- dfVFS -----------------------------------------------------------------------------------------


@contextmanager
def _dfvfs(path: Path, snapshot: str | None = None) -> Iterator[Reader]:
    from dfvfs.lib import definitions
    from dfvfs.path import factory
    from dfvfs.resolver import resolver

    import dfvfs_qcow2

    spec = factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_OS, location=str(path))
    spec = factory.Factory.NewPathSpec(definitions.TYPE_INDICATOR_QCOW, parent=spec)
    if snapshot is not None:
        index = next(i for i, entry in enumerate(dfvfs_qcow2.snapshots(spec)) if snapshot in (entry.id, entry.name))
        spec = dfvfs_qcow2.snapshot_path_specs(spec)[index]
    file_object = resolver.Resolver.OpenFileObject(spec)

    def read(offset: int, length: int) -> bytes:
        if length < 0:
            raise ValueError("a negative length means the rest to a file object")
        file_object.seek(offset)
        return bytes(file_object.read(length))

    yield Reader(file_object.get_size(), read, file_object)


# --- pytsk3 ----------------------------------------------------------------------------------------


@contextmanager
def _tsk(path: Path, snapshot: str | None = None) -> Iterator[Reader]:
    import pytsk3_qcow2

    image = pytsk3_qcow2.Img_Info(str(path), snapshot=snapshot)
    yield Reader(image.get_size(), image.read, image)
    image.close()


def _named(module: str, name: str) -> type[Exception]:
    """Return an exception class of a framework, any exception where that is absent."""
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    except ImportError:
        return Exception


_INVALID_ADDRESS = _named("volatility3.framework.exceptions", "InvalidAddressException")
_LAYER_EXCEPTION = _named("volatility3.framework.exceptions", "LayerException")
_BACK_END_ERROR = _named("dfvfs.lib.errors", "BackEndError")


ADAPTERS = (
    Adapter("Disk", _disk),
    Adapter("Disk over a file object", _over_file_object),
    Adapter("SourceStream", _stream, positional=False),
    Adapter("BufferedReader", _buffered, positional=False),
    Adapter(
        "Volatility layer",
        _volatility,
        past_end=_INVALID_ADDRESS,
        clipped=_INVALID_ADDRESS,
        negative=(_INVALID_ADDRESS, ValueError),
        failed=_INVALID_ADDRESS,
        refused=(_LAYER_EXCEPTION,),
        positional=False,  # the file layer below it is not
        pickles=True,
    ),
    Adapter(
        "dfVFS file object",
        _dfvfs,
        negative=(OSError, ValueError),
        failed=OSError,
        refused=(OSError, _BACK_END_ERROR),
        positional=False,
    ),
    Adapter("Img_Info", _tsk, past_end=OSError, negative=OSError, failed=OSError, refused=(OSError,)),
)

NEEDS = {"Volatility layer": "volatility3.framework", "dfVFS file object": "dfvfs", "Img_Info": "pytsk3"}


def need(adapter: Adapter) -> None:
    """Skip by name where the adapter's framework is absent."""
    module = NEEDS.get(adapter.name)
    if module is not None:
        pytest.importorskip(module, reason=f"{module} is absent")
