"""Bytes of a RAM block out of the stream, without the words between its pages."""

from __future__ import annotations

import io

import numpy as np

from ..format.source import Source
from .model import NotInMemory
from .page_codecs import MISSING, decode, is_special, stored
from .page_index import RunIndex

_FEW = 16  # pages up to which pieces are joined; more are written into their place
_PIECE = 256  # pages taken from the stream at once: little enough for the allocator to use again


def read_pages(
    source: Source, index: RunIndex, page_size: int, offset: int, length: int, *, pad: bool, address: int | None = None
) -> bytes:
    """Return bytes of one block.

    Pages the stream never recorded read as zeros with ``pad`` and raise :class:`NotInMemory` without;
    ``address`` is what the error calls ``offset``.
    """
    shift = 0 if address is None else address - offset
    first = offset // page_size
    pages = -(-(offset + length) // page_size) - first
    skip = offset - first * page_size
    if pages <= _FEW:
        data = b"".join(_pieces(source, index, page_size, first, pages, pad, shift))
        return data if skip == 0 and len(data) == length else data[skip : skip + length]
    # The bytes inside a BytesIO are handed out without a copy, and begin as zeros that cost nothing.
    out = io.BytesIO(bytes(pages * page_size))
    with out.getbuffer() as view:
        _fill(source, index, page_size, first, pages, pad, shift, view)
        if skip or pages * page_size != length:
            return bytes(view[skip : skip + length])
    return out.getvalue()


def _pieces(
    source: Source, index: RunIndex, page_size: int, first: int, pages: int, pad: bool, shift: int
) -> list[bytes]:
    pieces = []
    for run in index.runs(first, pages):
        if run.value >= 0:
            raw = _raw(source, run.value, run.pages, page_size, index.stride)
            step = index.stride
            pieces += [raw[at : at + page_size] for at in range(0, run.pages * step, step)]
        elif is_special(run.value):
            pieces.append(decode(source, run.value, index.deltas.get(run.first, ()), page_size))
        else:
            _need(run.value, pad, shift + run.first * page_size, run.pages * page_size)
            fill = b"\0" if run.value == MISSING else bytes([-1 - run.value])
            pieces.append(fill * (run.pages * page_size))
    return pieces


def _fill(
    source: Source, index: RunIndex, page_size: int, first: int, pages: int, pad: bool, shift: int, view: memoryview
) -> None:
    stride = index.stride
    for run in index.runs(first, pages):
        at = (run.first - first) * page_size
        if is_special(run.value):
            view[at : at + page_size] = decode(source, run.value, index.deltas.get(run.first, ()), page_size)
            continue
        if run.value < 0:
            _need(run.value, pad, shift + run.first * page_size, run.pages * page_size)
            if run.value not in (-1, MISSING):
                view[at : at + run.pages * page_size] = bytes([-1 - run.value]) * (run.pages * page_size)
            continue
        for done in range(0, run.pages, _PIECE):
            count = min(_PIECE, run.pages - done)
            raw = _raw(source, run.value + done * stride, count, page_size, stride)
            begin = at + done * page_size
            target = np.frombuffer(view[begin : begin + count * page_size], np.uint8).reshape(count, page_size)
            target[:] = np.ndarray((count, page_size), np.uint8, raw, 0, (stride, 1))
            del target  # a view in use cannot be released


def _raw(source: Source, value: int, pages: int, page_size: int, stride: int) -> bytes:
    return stored(source, value, (pages - 1) * stride + page_size)


def _need(value: int, pad: bool, address: int, length: int) -> None:
    if value == MISSING and not pad:
        raise NotInMemory("the stream does not hold this memory", address=address, length=length)
