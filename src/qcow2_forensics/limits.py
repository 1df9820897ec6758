"""The cap on every number an image can choose, each with its reason."""

from __future__ import annotations

from typing import NamedTuple

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


DEFAULT_LIMITS = Limits()
