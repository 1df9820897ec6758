"""Hostile images through every adapter: the stated bytes, or the framework's own error, and quickly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import hostile, qemu, traps, work
from tests.conformance import ADAPTERS, Adapter, Reader, need
from tests.hostile import IMAGES, Answer
from tests.tiers import quick
from tests.traps import TRAPS

pytestmark = qemu.requires_qemu

Build = Callable[[Path], Path]


def _rows() -> dict[str, tuple[Answer, Build]]:
    rows: dict[str, tuple[Answer, Build]] = {}
    for ident, image in IMAGES.items():
        rows[ident] = (image.refuses or image.expected, lambda folder, ident=ident: hostile.build(ident, folder))  # type: ignore[misc]
    for ident, trap in TRAPS.items():
        if trap.passphrase is None:
            rows[ident] = (trap.strict, trap.build)
    return rows


ROWS = _rows()


def assert_answer(adapter: Adapter, reader: Reader, wanted: Answer) -> None:
    if isinstance(wanted, type):  # opened although the disk is refused: then nothing of it may be read
        with pytest.raises((adapter.failed, *adapter.refused)):
            reader.read(0, 512)
        return
    for offset, data in wanted.items():
        if isinstance(data, type):
            with pytest.raises(adapter.failed):
                reader.read(offset, 2)
        elif offset + 2 <= reader.size:
            assert reader.read(offset, 2) == data, hex(offset)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
@pytest.mark.parametrize("ident", quick(ROWS, [*hostile.REPRESENTATIVE[1::2], *traps.REPRESENTATIVE[1::2]]))
def test_every_adapter_gives_the_stated_outcome(ident: str, adapter: Adapter, tmp_path: Path) -> None:
    need(adapter)
    wanted, build = ROWS[ident]
    path = build(tmp_path)
    refusal: Exception | None = None
    try:
        with work.at_most(500_000 + 2 * 512 * path.stat().st_blocks), adapter.open(path) as reader:
            assert_answer(adapter, reader, wanted)
    except adapter.refused as error:
        refusal = error
    # A refusal is right where the disk is refused, or where its first bytes cannot be read.
    assert refusal is None or isinstance(wanted, type) or isinstance(wanted[0], type), refusal
