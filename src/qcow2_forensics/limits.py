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
    ``what`` names what is counted, mostly in bytes.
    """

    def __init__(self, what: str, stored: int, limits: Limits = DEFAULT_LIMITS) -> None:
        self.what = what
        self.most = limits.work_repeats * stored + limits.work_spare
        self.spent = 0

    @classmethod
    def up_to(cls, what: str, most: int) -> Budget:
        """Return one for ``most`` of what is counted, where that is another number than bytes stored allow."""
        budget = cls(what, 0)
        budget.most = most
        return budget

    def spend(self, amount: int) -> None:
        """Take ``amount``; raises :class:`LimitExceeded`, and takes nothing, where that is more than is left."""
        if self.spent + amount > self.most:
            raise LimitExceeded(self.what, self.spent + amount, self.most)
        self.spent += amount

    @property
    def left(self) -> int:
        """How much may still be spent."""
        return self.most - self.spent


# --- how much of one file is looked at, kept or listed, however much it holds ---------------------
# What is left out is reported. Sizes of buffers and caches, and how much is shown to people, are where they are used.

L1_ENTRIES = DEFAULT_LIMITS.l1_bytes // 8  # of one L1 table: what QEMU accepts

# Reading
ZSTD_FRAMES = 1 << 14  # of one cluster: more than 64 KiB can hold, and a decoder for each takes 20 microseconds
ZSTD_SKIPPABLE_FRAMES = 1 << 12  # of one cluster: they give nothing, and writers make none
BROKEN_TABLES_KEPT = 1 << 17  # L2 tables without a sound entry that are remembered: as many as fit in a file of 64 MiB
JSON_REFERENCE_CHARACTERS = 65_536  # of a json: reference; backing file names have up to 1023 bytes
JSON_REFERENCE_DEPTH = 64  # levels, and members, of one; a deeper graph is no plain file reference
SYMBOLIC_LINKS = 40  # followed for one path, as in Linux
PATH_BYTES = 4096  # of one path with its terminating zero, as in Linux
FOLDER_ENTRIES_SEARCHED = 4096  # files beside a raw file that may be the image it belongs to
KEY_FILE_BYTES = 1 << 20  # key files have some KiB; a device would never end
KEY_CHECK_RUNS = 4096  # runs of the map looked at for sectors that show whether a key is right
KEY_CHECK_SECTORS = 256  # of those, decrypted

# Memory streams
STREAM_READ_SPARE = 16 * MiB  # bytes of any stream that may be read, and ``stream_repeats`` more for each one stored
STREAM_RECORDS_SPARE = 1 << 16  # runs, and sections and what else holds no pages, of any stream
STREAM_BYTES_PER_ENCODED = 12  # stored bytes that allow one more encoded page: the smallest takes as many
STREAM_BYTES_PER_RECORD = 512  # stored bytes that allow one more record of any other kind; a page has 4096
EARLY_DEVICE_BYTES = 1 << 16  # kept of a device written before RAM; what is wanted is at its start
EARLY_DEVICES = 64  # of those that are kept; a machine has a few virtio-mem devices
STREAM_NOTES = 64  # sections that are reported one by one
DESCRIPTION_CANDIDATES = 64  # texts like the description that are tried, from the end: it comes last
DESCRIPTION_BYTES_PER_STRUCTURE = 32  # bytes of the description for each object or list in it; QEMU writes 48
DESCRIPTION_DEPTH = 64  # nested structures in it; QEMU's own stay under 10
ARM_REGISTERS = 4096  # system registers of one processor; some 300 are seen
LIBVIRT_DESCRIPTION_BYTES = 1 << 20  # of a domain's description; libvirt's have some KiB
LIBVIRT_MEMORY_ELEMENTS = 4096  # <memory> elements looked at; QEMU allows 256 slots
UNPACKED_BYTES = GiB  # that any compressed save file may decompress to, and
UNPACKED_TIMES = 100  # bytes more for each one it has
SAVE_FILE_MEMBERS = 1024  # members, frames or streams of a compressed one, and one for each MiB: libvirt writes one
SAVE_FILE_LZOP_BLOCKS = 1 << 14  # of one, and one for each 512 bytes: 256 KiB of zeros take 1 KiB
XZ_DECODER_BYTES = 160 * MiB  # of memory: the largest preset takes 65 MiB, a dictionary of 128 MiB fits
ACPI_BYTES = 16 * MiB  # of the tables looked at; QEMU's have 128 KiB
SRAT_CANDIDATES = 8  # places that read "SRAT" and are tried
SRAT_RANGES = 512  # ranges believed; QEMU allows 128 nodes, some in two parts
PCI_WINDOWS = 64  # looked at; QEMU writes one for each host bridge
MODULES = 256  # memory modules that a machine can have
MODULE_DEVICES = 256  # virtio-mem sections looked at; a machine has a few
MODULE_SECTION_BYTES = 1 << 16  # of one searched for its address, which is near its start
MODULE_LAYOUTS = 64  # ways to lay modules into ranges that are tried
SWAPPED_NODES = 16  # NUMA nodes of one size whose order the page tables decide; each pair is tried
PAGE_TABLES = 8192  # of one check, 32 MiB; a guest of 1 TiB that maps its RAM in 2 MiB pages has 1024
VMCOREINFO_BYTES = 1 * MiB  # of a note in the guest's memory that is copied into an ELF core
PADDED_DUMP_BYTES = 4 * 1024 * GiB  # of a raw dump of any memory: RAM at 1 TiB fits, and
PADDED_DUMP_TIMES = 1024  # bytes more for each one of memory

# The census and the audit
HOST_CLUSTERS = 1 << 30  # of a file; 64 TiB of 64 KiB clusters, 2 to 7 GiB of counters if all are in use
UNALIGNED_TABLES_REPEATS = 1  # unaligned L2 tables, which QEMU does not read, may take as many bytes as the file has
UNALIGNED_TABLES_SPARE = 8 * MiB  # and so many more
UNALIGNED_TABLES_FILE = GiB  # bytes of a sparse file that count for that
FINDINGS_PER_RULE = 1000  # a snapshot table may hold 65,536 entries
REPORTED_CHARACTERS = 1024  # of an ID or a name; an entry has room for 65,535 bytes of each, and there may be many
SAMPLES = 64  # clusters of an image that are looked at as a sample
SAMPLED_CONTENT = 256 * MiB  # of decoded clusters, evenly spread, in which compressed files are looked for
ENCRYPTED_SAMPLES = 1 << 17  # clusters of an encrypted image looked at for plain text
LEAKED_TABLES_SEARCHED = 4096  # leaked clusters looked at for L2 tables
JSON_MEMBERS_LISTED = 32  # drivers and file names inside a json: reference
ISSUES_PER_BATCH = 1000  # table entries of one kind, of one batch of tables, from which evidence is chosen
BITMAPS_COUNTED = 20  # bitmaps whose dirty ranges are counted: what fits in one finding
DIRTY_RANGES_LISTED = 20  # of each of those
BITMAP_TABLE_ENTRIES_COUNTED = 1 << 16  # of their tables together; a table of 64 KiB clusters has 8192 at most
VM_STATE_CLUSTERS = 1 << 18  # clusters past the end of the disk looked at for the start of a VM state
RESIDUE_RANGES_DRAWN = 1_000_000  # ranges kept for the map
ACCOUNT_ROWS = 2000  # of the table of a file's account; more are joined
ACCOUNT_REMAINDERS = 1000  # remainders that are not zeros, listed beside it; the totals count all of them
CLUSTERS_DRAWN = 1 << 26  # host clusters of a map; with more it would show in memory
SNAPSHOTS_DRAWN = 24  # with a colour of their own
STATES_COMPARED = 64  # states whose shared clusters are counted
L1_ENTRIES_COMPARED = 1 << 20  # of their L1 tables
L2_TABLES_COMPARED = 20_000  # L2 tables of those

# Residue and recovery
FORMER_ENTRIES = 65_536  # former snapshot or bitmap entries: as many as QEMU accepts live ones
DELETED_SNAPSHOTS_FOLLOWED = 1000  # into their tables
FORMER_BITMAPS_FOLLOWED = 1000  # into their tables
FORMER_BITMAP_TABLE_ENTRIES = 65_536  # of each of those
FORMER_ENTRY_CANDIDATES = 4096  # places of one batch of clusters looked at in detail
FORMER_REFCOUNT = 64  # the greatest refcount that is believed in a former refcount block
FORMER_TABLE_TARGETS = 64  # clusters of a former table, read to see whether they still hold bytes
FORMER_L1_TARGETS = 8  # clusters of what may be an L1 table, read to see whether they are L2 tables
FORMER_PLACES = 1 << 23  # clusters whose places in former states are remembered, 16 bytes each
FORMER_STREAM_PLACES = 512  # places in one cluster of a gap between streams where an old one is looked for
REBUILT_L1_BYTES = 64 * MiB  # of L1 tables rebuilt for the recovered states of a file, as far as evidence asks for them
RECOVERY_READS_OF_EACH_BYTE = 16  # of a file, by all that looks for lost states; a genuine one takes three to six
RECOVERY_TABLE_BYTES = 8 * MiB  # of tables that a genuine file holds once, beside the bytes it has
RECOVERED_STATES = 64  # put together for one file, of those that an L1 table or a header was found for
INNER_IMAGES_SEARCHED = 4096  # places looked at for an image inside the file
RECOVERY_HINT_BYTES = 8 * MiB  # from the start of a file, looked at to say whether recovery is worth a try
RECOVERED_TABLES = 1 << 18  # L2 tables kept for one file: those of 128 TiB in 64 KiB clusters
CLUSTER_REFERENCES = 4096  # to one cluster, by what looks like L2 tables: streams share clusters, and snapshots do
REFCOUNT_BLOCKS_LOOKED_AT = 8  # of a possible refcount table
TABLES_COMPARED = 8  # of those that a possible L1 table names
GEOMETRY_SECTORS = 4096  # sectors of each kind kept to find out the cluster size
GEOMETRY_STREAMS = 16  # decoded at most for that
PLACED_FILE_SYSTEM_BYTES = 16 * MiB  # read of file systems on placed tables, and four times what the file has
PLACED_FILE_SYSTEM_BLOCKS = 1 << 24  # of their maps: 64 GiB in blocks of 4 KiB; and one for each 32 bytes of the file
PLACED_CONTENT_BYTES = 64 * MiB  # of guest data read under one L2 table to find out where it belongs
PLACED_STRUCTURES = 4096  # structures in it that are asked where they belong
PARTITIONS_LOOKED_AT = 256  # of a partition table
VM_STATE_CLUSTERS_RECOVERED = 1 << 21  # of all that are taken in the order of the file: 128 GiB in 64 KiB clusters
VM_STATES_RECOVERED = 16  # of one file, each of which may be read as a guest's memory
L1_GAP_BYTES = MiB  # of zeros inside an L1 table that is found by its form
LOST_TABLES_REBUILT = 4096  # L2 tables of one image that were overwritten
FILE_SYSTEM_STARTS = 64  # places on a disk that are tried as the start of a file system
FILE_SYSTEM_BLOCKS = 1 << 28  # of one file system whose use is looked at: 1 TiB in blocks of 4 KiB
FILE_SYSTEM_GROUPS = 1 << 16  # block groups or allocation groups: 8 TiB in ext groups of 128 MiB
FILE_SYSTEM_TREE_BLOCKS = 1 << 16  # blocks of the tree of free extents of one allocation group
INODES_LOOKED_AT = 1 << 16  # of a file system, in which directories are looked for
FILE_RECORDS_LOOKED_AT = 1 << 17  # of a Master File Table
FILE_RECORD_RUNS = 4096  # of one attribute; a record of 4 KiB has room for fewer
PLACEMENT_TRIALS = 1 << 17  # reads that look for what a file system must have somewhere
PLACEMENT_PAIRS = 1 << 24  # of L2 tables and free slots that are compared
PLACEMENT_WORK = 1 << 34  # multiplications for that: some seconds
PLACEMENT_CELLS = 1 << 27  # tables times slots of one arrangement, a byte each

# Files of the guest, and mounts
ORPHAN_INODES = 2_000_000  # looked at for files without a name, where the library does not list them
FILE_SYSTEM_ENTRIES = 20_000_000  # records of one file system; more is a damaged one
FOLDER_DEPTH = 512  # directories inside each other; more is a damaged file system
FILE_BYTES = 1 << 30  # bytes of a file that are read however small the disk
READ_ERRORS_KEPT = 100  # errors of a volume that are kept; a damaged image can fail a million reads
UNREADABLE_RANGES_KEPT = 100_000  # of a volume; with more, reads raise
PARTITION_GAP = 1 << 20  # bytes before and between partitions that tables and boot loaders use
BLANK_BYTES_READ = 256 << 20  # stored bytes of all volumes of a disk that are read to find out that all are zeros
VOLUME_DEPTH = 4  # volumes inside each other: a partition, LUKS, LVM, and LUKS again
JOURNAL_BLOCKS = 1 << 19  # of one ext file system: 2 GiB of 4 KiB each; mke2fs makes 1 GiB at most
JOURNAL_CONTROL_BYTES = 64 << 20  # of descriptors, revocations and commits, whose checksums are checked: some seconds
LVM_AREAS = 64  # metadata or data areas of one physical volume; LVM writes one or two
LVM_TEXT_READS = 16  # of as many bytes: each physical volume of a group holds the same text
LVM_TEXT_BYTES = 2 << 20  # of metadata of all groups of a disk; LVM's default area holds 1 MiB, two texts at least
LVM_VOLUMES = 1024  # of one group; LVM's own tools become slow with more
LVM_SEGMENTS = 100_000  # of all logical volumes
LVM_DEPTH = 16  # sections of metadata inside each other
MOUNT_TABLES_COUNTED = 256  # L2 tables walked for one look at a size; each takes a millisecond or two
MOUNT_MESSAGES = 1000  # about unreadable ranges; a damaged image can fail a million reads
