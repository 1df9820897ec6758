"""The one decoder of L2 tables by the thousand: what their entries mean, as arrays.

Every array has the shape of ``entries``: mostly ``(tables, entries)``, a row each table. Nothing is computed
before it is asked for, and each column once::

    words   (tables, words) uint64     [ entry | bitmap | entry | bitmap | ... ]   extended L2 entries
                                       [ entry | entry  | entry | ...          ]   all others
    columns.hosts                      host cluster offsets, 0 where there is none or the entry is compressed
    columns.compressed                 which entries are compressed; :func:`compressed_extents` says where
    columns.zero_flags                 which clusters read as zeros as a whole
    columns.allocated_bits, .zero_bits the 32 subclusters of an extended entry, a bit each

Entries alone, without the arrays, are decoded by :mod:`qcow2_forensics.format.entries`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from ..format.entries import (
    BITMAP_ALL_ONES,
    BITMAP_TABLE_RESERVED,
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    QCOW1_COMPRESSED,
    REFTABLE_OFFSET_MASK,
    REFTABLE_RESERVED,
    SUBCLUSTER_MASK,
    ZERO,
)
from ..format.header import SECTOR
from ..format.image import Image
from .arrays import U64, Mask, Places

_OFFSET, _COPIED, _ZERO = np.uint64(OFFSET_MASK), np.uint64(COPIED), np.uint64(ZERO)
_SUBCLUSTERS = np.uint64(SUBCLUSTER_MASK)
_NONE = np.uint64(0)

BATCH = 1 << 20  # bytes of L2 tables looked at together: temporaries stay in the cache


class EntryFormat(Protocol):
    """What decides how L2 entries are read; a header has it."""

    @property
    def version(self) -> int: ...

    @property
    def cluster_bits(self) -> int: ...

    @property
    def extended_l2(self) -> bool: ...

    @property
    def external_data(self) -> bool: ...


@dataclass(frozen=True)
class Columns:
    """The entries of L2 tables; ``bitmaps`` is the second word of extended ones, None where there is none."""

    entry_format: EntryFormat
    entries: U64
    bitmaps: U64 | None

    @classmethod
    def of(cls, words: U64, entry_format: EntryFormat) -> Columns:
        """Return tables, given as words, the last axis those of a table, as columns."""
        if entry_format.extended_l2:
            return cls(entry_format, np.ascontiguousarray(words[..., 0::2]), np.ascontiguousarray(words[..., 1::2]))
        return cls(entry_format, words, None)

    def rows(self, chosen: Mask | Places | slice) -> Columns:
        """Return some of the tables."""
        return Columns(self.entry_format, self.entries[chosen], None if self.bitmaps is None else self.bitmaps[chosen])

    @cached_property
    def compressed(self) -> Mask:
        """Which entries are compressed cluster descriptors."""
        flag = QCOW1_COMPRESSED if self.entry_format.version == 1 else COMPRESSED
        flags: Mask = (self.entries & np.uint64(flag)) != 0
        return flags

    @cached_property
    def has_compressed(self) -> bool:
        """Whether any entry is compressed."""
        return bool(self.compressed.any())

    @cached_property
    def hosts(self) -> U64:
        """Host cluster offsets in bytes; 0 where there is none or the entry is compressed."""
        hosts = self.entries if self.entry_format.version == 1 else self.entries & _OFFSET
        return np.where(self.compressed, _NONE, hosts) if self.has_compressed else hosts

    @cached_property
    def copied(self) -> Mask:
        """Which entries have the copied flag: the refcount of their cluster is one."""
        return has_copied(self.entries)

    @cached_property
    def present(self) -> Mask:
        """Which entries name a host cluster, compressed ones left out.

        In an external data file the first cluster is at 0, and the copied flag says that it is there.
        """
        present: Mask = self.hosts != 0
        return present | (self.copied & ~self.compressed) if self.entry_format.external_data else present

    @cached_property
    def zero_flags(self) -> Mask:
        """Which whole clusters read as zeros; extended entries and version 1 have no such flag."""
        if self.bitmaps is not None or self.entry_format.version == 1:
            return np.zeros(self.entries.shape, np.bool_)
        return self.bit_zero

    @cached_property
    def bit_zero(self) -> Mask:
        """Which plain entries have bit 0 set: the zero flag, or in an extended entry a reserved bit."""
        flags: Mask = (self.entries & _ZERO) != 0
        return flags & ~self.compressed if self.has_compressed else flags

    @cached_property
    def reserved(self) -> Mask:
        """Which plain entries have reserved bits set; the zero flag, bit 0, is not among them."""
        flags: Mask = (self.entries & np.uint64(L2_RESERVED)) != 0
        return flags & ~self.compressed if self.has_compressed else flags

    @cached_property
    def allocated_bits(self) -> U64:
        """The subclusters an extended entry allocates, lowest bit first; none for other entries."""
        return np.zeros(self.entries.shape, np.uint64) if self.bitmaps is None else self.bitmaps & _SUBCLUSTERS

    @cached_property
    def zero_bits(self) -> U64:
        """The subclusters of an extended entry that read as zeros, lowest bit first; none for other entries."""
        return np.zeros(self.entries.shape, np.uint64) if self.bitmaps is None else self.bitmaps >> np.uint64(32)

    @cached_property
    def data_hosts(self) -> U64:
        """The same as ``hosts``, and 0 where no byte of the cluster is read as data."""
        unread = self.zero_flags if self.bitmaps is None else self.allocated_bits == 0
        return np.where(unread, _NONE, self.hosts)

    @cached_property
    def named(self) -> U64:
        """What each entry names, equal where two name the same: a host offset, or a compressed cluster's whole entry."""
        return np.where(self.compressed, self.entries, self.entries & _OFFSET)

    def compressed_extents(self) -> tuple[U64, U64]:
        """Return host offsets and lengths in bytes of the compressed clusters, in the order of their entries."""
        return compressed_extents(self.entries[self.compressed], self.entry_format)


def compressed_extents(entries: U64, entry_format: EntryFormat) -> tuple[U64, U64]:
    """Return host offsets and lengths in bytes of compressed clusters ("Compressed Clusters Descriptor")."""
    bits = entry_format.cluster_bits
    if entry_format.version == 1:
        split = np.uint64(63 - bits)
        return entries & np.uint64((1 << (63 - bits)) - 1), (entries >> split) & np.uint64((1 << bits) - 1)
    split = np.uint64(70 - bits)
    offsets = entries & np.uint64((1 << (70 - bits)) - 1)
    sectors = ((entries & np.uint64(COMPRESSED - 1)) >> split) + np.uint64(1)
    return offsets, sectors * np.uint64(SECTOR) - (offsets & np.uint64(SECTOR - 1))


def named_offsets(entries: U64) -> U64:
    """Return the host offsets that L1, bitmap table or plain L2 entries name, 0 for none; not those of version 1."""
    return entries & _OFFSET


def refcount_block_offsets(entries: U64) -> U64:
    """Return the host offsets of the blocks that refcount table entries name, 0 for none."""
    return entries & np.uint64(REFTABLE_OFFSET_MASK)


def has_reserved_refcount_table_bits(entries: U64) -> Mask:
    """Return which refcount table entries have reserved bits set."""
    flags: Mask = (entries & np.uint64(REFTABLE_RESERVED)) != 0
    return flags


def has_copied(entries: U64) -> Mask:
    """Return which L1 or L2 entries have the copied flag."""
    flags: Mask = (entries & _COPIED) != 0
    return flags


def without_copied(entries: U64) -> U64:
    """Return entries without the copied flag, which differs between states that map the same cluster."""
    return entries & ~_COPIED


def is_packed(entries: U64) -> Mask:
    """Return which L2 entries are compressed cluster descriptors; not those of version 1."""
    flags: Mask = (entries & np.uint64(COMPRESSED)) != 0
    return flags


def has_reserved_l1(entries: U64) -> Mask:
    """Return which L1 entries have reserved bits set."""
    flags: Mask = (entries & np.uint64(L1_RESERVED)) != 0
    return flags


def has_reserved_bitmap(entries: U64) -> Mask:
    """Return which bitmap table entries have reserved bits set: without a cluster, bit 0 has a meaning."""
    reserved: Mask = (entries & np.uint64(BITMAP_TABLE_RESERVED)) != 0
    reserved |= ((entries & np.uint64(BITMAP_ALL_ONES)) != 0) & (named_offsets(entries) != 0)
    return reserved


def table_offsets(l1_entries: U64, entry_format: EntryFormat) -> U64:
    """Return the host offsets of the L2 tables that L1 entries name, 0 for none; nothing is checked."""
    return l1_entries if entry_format.version == 1 else l1_entries & _OFFSET


def big_endian(data: bytes) -> U64:
    """Return big-endian 64-bit words in the machine's order; a cut one at the end is left out."""
    return np.frombuffer(data, dtype=">u8", count=len(data) // 8).astype(np.uint64)


def table_words(image: Image, offsets: U64, length: int) -> U64:
    """Return the words of tables of ``length`` bytes at some host offsets, ``(tables, words)``.

    What the end of the file cuts off is zeros. Tables that follow each other in the file are one read.
    """
    if len(offsets) > 1 and bool((offsets[1:] - offsets[:-1] == np.uint64(length)).all()):
        whole = len(offsets) * length
        data = image.read(int(offsets[0]), whole).ljust(whole, b"\0")
    else:
        data = b"".join(image.read(offset, length).ljust(length, b"\0") for offset in offsets.tolist())
    return big_endian(data).reshape(len(offsets), length // 8)
