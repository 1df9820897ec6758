"""The tables of one mapping, the active one or a snapshot's, as arrays."""

from __future__ import annotations

import numpy as np

from ..reader.mapping import L1_PAGE, Mapping
from .arrays import U64, Mask
from .columns import Columns, table_offsets, table_words


def l2_offsets(mapping: Mapping | None, page: int) -> U64:
    """Return the L2 table offsets of a page of an L1 table, 0 for none and past its end.

    Raises :class:`FormatError` where the file ends inside the page.
    """
    tables = np.zeros(L1_PAGE, dtype=np.uint64)
    count = min(L1_PAGE, mapping.l1_size - page * L1_PAGE) if mapping is not None else 0
    if mapping is not None and count > 0:
        mapping.l1_entry(page * L1_PAGE + count - 1)  # raises where the file ends inside the table
        tables[:count] = table_offsets(np.asarray(mapping.l1_page(page), dtype=np.uint64), mapping.image.header)
    return tables


def l2_columns(mapping: Mapping, tables: U64) -> tuple[Columns, Mask]:
    """Return the L2 tables at some host offsets, a row each, and which of them are not in the file or not aligned.

    The rows of those, and of tables at 0, which are none, hold nothing.
    """
    header = mapping.image.header
    length = header.l2_entries * header.l2_entry_size
    lost = tables > np.uint64(max(0, mapping.image.file_size - length))
    lost |= False if mapping.version == 1 else (tables & np.uint64(mapping.cluster_size - 1)) != 0
    lost &= tables != 0
    words = np.zeros((len(tables), length // 8), dtype=np.uint64)
    kept = (tables != 0) & ~lost
    words[kept] = table_words(mapping.image, tables[kept], length)
    return Columns.of(words, header), lost
