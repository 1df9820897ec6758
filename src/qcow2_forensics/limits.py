"""The cap on every number an image can choose, each with its reason, and the one bound on work over crafted metadata."""

from __future__ import annotations

from typing import NamedTuple

from .errors import LimitExceeded

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB


class Limits(NamedTuple):
    """What one image may cost. Sizes are bytes. The defaults read everything QEMU reads."""

    l1_bytes: int = 32 * MiB  # what QEMU accepts for the active table and each snapshot's
    refcount_table_bytes: int = 8 * MiB  # what QEMU accepts
    header_extensions: int = 4096  # writers make up to six; a first cluster of 2 MiB has room for 262,130
    snapshots: int = 65_536  # what QEMU accepts
    snapshot_table_bytes: int = 64 * MiB  # what QEMU accepts
    snapshot_extra_bytes: int = 1024  # what QEMU accepts
    name_bytes: int = 1023  # backing and bitmap names, what QEMU accepts
    bitmaps: int = 65_535  # what QEMU accepts
    bitmap_directory_bytes: int = 65_535 * KiB  # what QEMU accepts
    bitmap_table_entries: int = 0x8000000  # what QEMU accepts
    bitmap_data_bytes: int = 512 * MiB  # what QEMU accepts
    chain_depth: int = 200  # QEMU has none; sixty were seen to work, backup tools make dozens
    table_cache_bytes: int = 32 * MiB  # cached L1 and L2 pages per image: 256 GiB of 64 KiB clusters
    cluster_cache_bytes: int = 8 * MiB  # inflated clusters kept per disk; 128 of 64 KiB
    luks_iterations: int = 200_000_000  # PBKDF2 rounds a passphrase may cost, all slots together: a few minutes
    luks_payload_bytes: int = 64 * MiB  # LUKS header area with key material
    stream_name_bytes: int = 1024  # a machine type name; QEMU's own are under 40
    guest_memory_bytes: int = 1 << 52  # all RAM blocks of a stream: what x86-64 can address
    ram_blocks: int = 4096  # RAM blocks of a stream; a large machine has dozens
    stream_repeats: int = 8  # stream bytes read for each one stored: QEMU stores all, compressed clusters a third
    ram_runs: int = 1 << 24  # pages after joining like neighbours: a 64 GiB guest without any; fewer in small files
    device_state_bytes: int = 16 * MiB  # everything after RAM; seen 0.02 to 0.8 MiB, with 64 processors
    device_description_bytes: int = 2 * MiB  # the JSON after it: 8 KiB a processor and 0.1 MiB
    decompressed_stream_bytes: int = 1024 * GiB  # a compressed save file, written to disk once
    work_repeats: int = 4  # bytes of tables or streams worked over for each one stored: genuine ones are there once
    work_spare: int = 64 * MiB  # and so many beside, whatever the file holds: a second of work


DEFAULT_LIMITS = Limits()


class Budget:
    """Bounds one kind of work over metadata by the bytes that the file stores.

    Genuine tables and streams are in a file once, so that looking at all of them costs what is stored; crafted
    ones overlap, and a small file could ask for any amount of work. Reading a disk needs no budget.
    ``what`` names what is counted, in bytes.
    """

    def __init__(self, what: str, stored: int, limits: Limits = DEFAULT_LIMITS) -> None:
        self.what = what
        self.most = limits.work_repeats * stored + limits.work_spare
        self.spent = 0

    def spend(self, amount: int) -> None:
        """Take ``amount`` bytes; raises :class:`LimitExceeded`, and takes nothing, where that is more than is left."""
        if self.spent + amount > self.most:
            raise LimitExceeded(self.what, self.spent + amount, self.most)
        self.spent += amount

    @property
    def left(self) -> int:
        """Bytes that may still be spent."""
        return self.most - self.spent
