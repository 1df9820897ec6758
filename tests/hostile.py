"""Hostile and damaged images: 84 numbered ones, each with what must happen.

Every row of :data:`IMAGES` says how the image is made (edits of the base images of
:mod:`tests.image_builder`), what QEMU 7.2 does with it, what our reader does, and which findings
an audit must contain. ``build("H10", folder)`` writes one. All were run against the real tools;
``tests/test_hostile_reading.py`` does so again.

Columns: ``opens`` is whether ``qemu-img info`` accepts the image; ``qemu`` maps guest offsets to
the first two bytes QEMU reads there (run in the image's folder), None for an I/O error, and is empty when
it refuses;
``check`` is the exit code and the non-zero counters of ``qemu-img check``; ``strict`` is our
reader's answer where it is not QEMU's: an error class raised on opening, or a mapping of guest
offsets to bytes or error classes; ``snapshots`` maps snapshot IDs to ``strict``-like answers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qcow2_forensics import errors
from tests import qemu
from tests.image_builder import (
    B_DATA,
    B_END,
    B_L1,
    B_L2,
    B_REFTABLE,
    COMPRESSED,
    COPIED,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    EXT_FEATURE_NAMES,
    S_SNAPSHOT_STEP,
    S_SNAPSHOTS,
    Poke,
    base_b,
    base_s,
    compressed_entry,
    deflate,
    empty,
)

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30

Refusal = type[errors.Qcow2Error]
Reads = Mapping[int, bytes | None]
Answer = Refusal | Mapping[int, bytes | Refusal]


@dataclass(frozen=True)
class Hostile:
    """One image: how it is made and what must happen. See the module for the columns."""

    id: str
    base: str  # "B", "S", "empty", "data" (external data file) or "" (made from nothing)
    what: str
    edit: Callable[[Path], object]
    opens: bool = True
    qemu: Reads = field(default_factory=dict)
    check: tuple[int, Mapping[str, int]] | None = None
    strict: Answer | None = None
    snapshots: Mapping[str, Answer] = field(default_factory=dict)
    findings: frozenset[str] = frozenset()

    @property
    def machine_dependent(self) -> bool:
        """Whether what QEMU reads depends on the machine's own files, which we never open."""
        return self.id in ("H66", "H67", "H70", "H73", "H79", "H81")

    @property
    def refuses(self) -> Refusal | None:
        """The error our strict reader raises on opening, None when it opens."""
        return self.strict if isinstance(self.strict, type) else None

    @property
    def expected(self) -> Mapping[int, bytes | Refusal]:
        """What our strict reader gives at each guest offset."""
        if self.strict is None:
            return {offset: data if data is not None else errors.FormatError for offset, data in self.qemu.items()}
        return {} if isinstance(self.strict, type) else self.strict


IMAGES: dict[str, Hostile] = {}

# A few of each kind, for matrices that are large: see tests/tiers.py.
REPRESENTATIVE = [
    "H01",
    "H06",
    "H08",
    "H11",
    "H13",
    "H15",
    "H20",
    "H24",
    "H26",
    "H28",
    "H30",
    "H33",
    "H37",
    "H40",
    "H45",
    "H47",
    "H49",
    "H51",
    "H54",
    "H55",
    "H59",
    "H60",
    "H62",
    "H66",
    "H69",
    "H72",
    "H79",
    "H84",
]


def build(ident: str, folder: Path) -> Path:
    """Write image ``ident`` (and what stands beside it) into ``folder`` and return its path."""
    image = IMAGES[ident]
    path = folder / f"{ident}.qcow2"
    match image.base:
        case "B":
            base_b(path)
        case "S":
            base_s(path)
        case "empty":
            empty(path)
        case "data":
            _with_data_file(path)
    image.edit(path)
    return path


def _add(
    ident: str,
    base: str,
    what: str,
    edit: Callable[[Path], object],
    findings: str,
    *,
    opens: bool = True,
    reads: Reads | None = None,
    check: tuple[int, Mapping[str, int]] | None = None,
    strict: Answer | None = None,
    snapshots: Mapping[str, Answer] | None = None,
) -> None:
    codes = frozenset("QCOW2-" + word for word in findings.split())
    IMAGES[ident] = Hostile(ident, base, what, edit, opens, reads or {}, check, strict, snapshots or {}, codes)


def _counts(
    rc: int, corr: int = 0, leaks: int = 0, alloc: int = 0, *rest: int, err: int = 0, end: int = B_END
) -> tuple[int, dict[str, int]]:
    """Return ``check`` as exit code and non-zero counters; ``rest`` is fragmented, compressed."""
    frag, comp = (*rest, 0, 0)[:2]
    names = {
        "corruptions": corr,
        "leaks": leaks,
        "allocated-clusters": alloc,
        "fragmented-clusters": frag,
        "compressed-clusters": comp,
        "check-errors": err,
        "image-end-offset": end,
    }
    return rc, {name: value for name, value in names.items() if value}


ABORTED: tuple[int, dict[str, int]] = (1, {})  # check prints no counters
OK = {0: b"\x11\x11", 0x10000: b"\x22\x22", 0x20000: b"\x33\x33", 0x30000: b"\0\0"}
SOK = {0: b"\x22\x22", 0x10000: b"\0\0"}
ZEROS = {0: b"\0\0", 0x10000: b"\0\0", 0x20000: b"\0\0"}
FORMAT, LIMIT, NOT_QCOW2 = errors.FormatError, errors.LimitExceeded, errors.NotQcow2
FORBIDDEN, MISSING = errors.ForbiddenReference, errors.MissingFile
UNSUPPORTED, LOCKED = errors.Unsupported, errors.Locked

# One row per image, as a table: the formatter would give each argument a line.
# fmt: off

# --- tables over tables --------------------------------------------------------------------------

_add("H01", "B", "guest cluster 0 is the L1 table",
     lambda p: Poke(p).l2(0, B_L1).refcount(3, 2).refcount(5, 0),
     "DATA-OVER-METADATA", reads=OK | {0: b"\x80\0"}, check=_counts(0, 0, 0, 3, 1))
_add("H02", "B", "guest cluster 0 is the refcount table",
     lambda p: Poke(p).l2(0, 0x10000).refcount(1, 2).refcount(5, 0),
     "DATA-OVER-METADATA", reads=OK | {0: b"\0\0"}, check=_counts(0, 0, 0, 3, 1))
_add("H03", "B", "guest cluster 0 is a refcount block",
     lambda p: Poke(p).l2(0, 0x20000).refcount(2, 2).refcount(5, 0),
     "DATA-OVER-METADATA REFTABLE-INVALID CHECK-CORRUPTIONS", reads=OK | {0: b"\0\x01"}, check=_counts(2, 1, 0, 3, 1))
_add("H04", "B", "guest cluster 0 is its own L2 table",
     lambda p: Poke(p).l2(0, B_L2).refcount(4, 2).refcount(5, 0).l1(0, B_L2),
     "DATA-OVER-METADATA", reads=OK | {0: b"\0\0"}, check=_counts(0, 0, 0, 3, 1))
_add("H05", "B", "an L2 entry of offset 0 with the copied flag",
     lambda p: Poke(p).l2(0, COPIED),
     "ALLOC-AT-ZERO LEAKED-DATA CHECK-LEAKS", reads=OK | {0: b"\0\0"}, check=_counts(3, 0, 1, 2))
_add("H06", "B", "two guest clusters share a host cluster, refcounts agree",
     lambda p: Poke(p).l2(0, B_DATA).l2(1, B_DATA).refcount(5, 2).refcount(6, 0),
     "SHARED-CLUSTER RESIDUAL-CLUSTERS", reads=OK | {0x10000: b"\x11\x11"}, check=_counts(0, 0, 0, 3, 2))


def _h07(path: Path) -> None:
    poke = Poke(path).u32(36, 2).l1(0, B_L2).l1(1, B_L2).refcount(4, 2)
    for index in range(3):
        poke.l2(index, B_DATA + index * 0x10000).refcount(5 + index, 2)


_add("H07", "B", "two L1 slots share an L2 table, refcounts agree",
     _h07,
     "SHARED-L2 SHARED-CLUSTER", reads=OK, check=_counts(0, 0, 0, 6))
_add("H08", "B", "the L1 table is its own L2 table",
     lambda p: Poke(p).l1(0, COPIED | B_L1),
     "METADATA-OVERLAP DATA-OVER-METADATA CHECK-CORRUPTIONS CHECK-LEAKS", reads={0: b"\x80\0", 0x10000: b"\0\0"},
     check=_counts(2, 1, 4, 1))
_add("H09", "B", "an L1 entry of offset 0 with the copied flag",
     lambda p: Poke(p).l1(0, COPIED),
     "METADATA-OVERLAP RESERVED-BITS CHECK-CORRUPTIONS CHECK-LEAKS", reads=ZEROS, check=_counts(2, 45, 4, 27, 26, 14))

# --- past the end of the file --------------------------------------------------------------------

_add("H10", "B", "an L2 table past the end of the file",
     lambda p: Poke(p).l1(0, COPIED | 0x1000000),
     "BEYOND-EOF LEAKED-DATA CHECK-CORRUPTIONS CHECK-LEAKS", reads=ZEROS, check=_counts(2, 2, 4),
     strict=dict.fromkeys(ZEROS, FORMAT))
_add("H11", "B", "a data cluster past the end of the file",
     lambda p: Poke(p).l2(0, COPIED | 0x1000000),
     "BEYOND-EOF CHECK-CORRUPTIONS CHECK-LEAKS", reads=OK | {0: b"\0\0"}, check=_counts(2, 2, 1, 3, 1),
     strict=OK | {0: FORMAT})
_add("H12", "B", "a data cluster at the highest offset there is",
     lambda p: Poke(p).l2(0, COPIED | 0x00FF_FFFF_FFFF_0000),
     "BEYOND-EOF", reads=OK | {0: b"\0\0"}, check=_counts(2, 2, 1, 3, 1), strict=OK | {0: FORMAT})
_add("H13", "B", "the L1 table past the end of the file",
     lambda p: Poke(p).u64(40, 0x10000000000),
     "BEYOND-EOF HEADER-INVALID CHECK-CORRUPTIONS CHECK-LEAKS", reads=ZEROS, check=_counts(2, 1, 5), strict=FORMAT)

# --- header numbers ------------------------------------------------------------------------------

_add("H14", "B", "an L1 table of 32 MiB, the most QEMU takes",
     lambda p: Poke(p).u32(36, 4194304),
     "TABLE-ABSURD L1-OVERSIZED TRUNCATED", reads=OK)
_add("H15", "B", "an L1 table of one entry more than QEMU takes",
     lambda p: Poke(p).u32(36, 4194305),
     "HEADER-INVALID TABLE-ABSURD", opens=False, check=ABORTED, strict=LIMIT)
_add("H16", "B", "no L1 table for a disk of 1 MiB",
     lambda p: Poke(p).u32(36, 0),
     "HEADER-INVALID", opens=False, check=ABORTED, strict=FORMAT)
_add("H17", "B", "an unaligned L1 table",
     lambda p: Poke(p).add(40, 512),
     "HEADER-INVALID UNALIGNED-OFFSET", opens=False, check=ABORTED, strict=FORMAT)
_add("H18", "B", "a refcount table of 2^32 - 1 clusters",
     lambda p: Poke(p).u32(56, 0xFFFFFFFF),
     "TABLE-ABSURD HEADER-INVALID", opens=False, check=ABORTED, strict=OK)
_add("H19", "B", "a refcount table of no clusters",
     lambda p: Poke(p).u32(56, 0),
     "HEADER-INVALID ORPHAN-CLUSTERS REFCOUNT-ZERO-METADATA", opens=False, check=_counts(2, 10, 0, 3), strict=OK)
_add("H20", "B", "a refcount table entry with bit 63, as tcmu-runner wrote it",
     lambda p: Poke(p).set_bits(B_REFTABLE, 1 << 63),
     "REFTABLE-INVALID WRITER-PROFILE", reads=OK, check=_counts(1, 1, 0, 3, err=8, end=65536))
_add("H21", "B", "a refcount table entry with a reserved bit",
     lambda p: Poke(p).set_bits(B_REFTABLE, 1),
     "REFTABLE-INVALID", reads=OK, check=_counts(2, 1, 1, 3))
_add("H22", "B", "an empty refcount table",
     lambda p: Poke(p).u64(B_REFTABLE, 0),
     "ORPHAN-CLUSTERS REFCOUNT-ZERO-METADATA COPIED-FLAG", reads=OK, check=_counts(2, 11, 0, 3))
_add("H23", "B", "an unaligned refcount block",
     lambda p: Poke(p).u64(B_REFTABLE, 0x22A00),
     "REFTABLE-INVALID UNALIGNED-OFFSET", reads=OK, check=_counts(1, 1, 0, 3, err=8, end=65536))
_add("H24", "B", "a refcount block used twice",
     lambda p: Poke(p).u64(B_REFTABLE + 8, Poke(p).get(B_REFTABLE)),
     "REFTABLE-INVALID", reads=OK, check=_counts(2, 2, 0, 3))
_add("H25", "B", "a refcount for a cluster past the end of the file",
     lambda p: Poke(p).refcount(500, 1),
     "REFCOUNT-PAST-END", reads=OK, check=_counts(0, 0, 0, 3))

# --- snapshot tables -----------------------------------------------------------------------------

S0, S1 = S_SNAPSHOTS, S_SNAPSHOTS + S_SNAPSHOT_STEP
_S_DAMAGED = _counts(2, 1, 3, 1, end=0xC0000)

_add("H26", "B", "2^32 - 1 snapshots",
     lambda p: Poke(p).u32(60, 0xFFFFFFFF),
     "TABLE-ABSURD SNAPSHOT-TABLE-INVALID", opens=False, check=ABORTED, strict=OK, snapshots={"1": FORMAT})
_add("H27", "B", "65536 snapshots past the end of the file",
     lambda p: Poke(p).u32(60, 65536).u64(64, 0x1000000),
     "TABLE-ABSURD BEYOND-EOF SNAPSHOT-TABLE-INVALID", reads=OK, check=_counts(2, 65537, 0, 3),
     snapshots={"1": FORMAT})
_add("H28", "B", "a snapshot table at offset 0, over the header",
     lambda p: Poke(p).u32(60, 1),
     "METADATA-OVERLAP SNAPSHOT-TABLE-INVALID", reads=OK, check=_counts(2, 3, 0, 3))
_add("H29", "B", "an unaligned snapshot table of no snapshots",
     lambda p: Poke(p).u64(64, 0x123),
     "HEADER-INVALID", opens=False, check=ABORTED, strict=OK)
_add("H30", "S", "a snapshot with an unaligned L1 table",
     lambda p: Poke(p).add(S0, 0x200),
     "UNALIGNED-OFFSET SNAPSHOT-TABLE-INVALID", reads=SOK, check=_S_DAMAGED, snapshots={"1": FORMAT, "2": SOK})
_add("H31", "S", "a snapshot with an L1 table of 2 GiB",
     lambda p: Poke(p).u32(S0 + 8, 0x10000000),
     "SNAPSHOT-TABLE-INVALID TABLE-ABSURD", reads=SOK, check=_S_DAMAGED, snapshots={"1": LIMIT, "2": SOK})
_add("H32", "S", "a snapshot that uses the active L1 table",
     lambda p: Poke(p).u64(S0, Poke(p).get(40)),
     "SNAPSHOT-L1-ALIAS METADATA-OVERLAP CHECK-CORRUPTIONS CHECK-LEAKS", reads=SOK,
     check=_counts(2, 3, 3, 1, end=0xC0000), snapshots={"1": SOK, "2": SOK})
_add("H33", "S", "a snapshot with 64 KiB of extra data",
     lambda p: Poke(p).u32(S0 + 36, 0x10000),
     "SNAPSHOT-TABLE-INVALID", opens=False, check=ABORTED, strict=SOK, snapshots={"1": FORMAT, "2": FORMAT})
_add("H34", "S", "a version 3 snapshot with 8 bytes of extra data",
     lambda p: Poke(p).u32(S0 + 36, 8),
     "SNAPSHOT-TABLE-INVALID", opens=False, check=ABORTED, strict=SOK, snapshots={"1": FORMAT, "2": FORMAT})
_add("H35", "S", "a snapshot with ID and name of 65535 bytes",
     lambda p: Poke(p).u16(S0 + 12, 0xFFFF).u16(S0 + 14, 0xFFFF),
     "SNAPSHOT-TABLE-INVALID BEYOND-EOF", reads=SOK, check=_counts(2, 2, 4, 1, end=0xC0000), snapshots={"2": FORMAT})
_add("H36", "S", "two snapshots of the same ID",
     lambda p: Poke(p).write(S1 + 64, b"1"),
     "SNAPSHOT-ORDER", reads=SOK, check=_counts(0, 0, 0, 1, end=0xC0000))
_add("H37", "S", "a snapshot with its L1 table above 2^63",
     lambda p: Poke(p).u64(S0, COPIED | 0x30000),
     "SNAPSHOT-TABLE-INVALID CHECK-ABORTED", reads=SOK, check=ABORTED, snapshots={"1": FORMAT, "2": SOK})

# --- more header numbers -------------------------------------------------------------------------

_add("H38", "B", "version 9",
     lambda p: Poke(p).u32(4, 9),
     "HEADER-INVALID", opens=False, check=ABORTED, strict=UNSUPPORTED)
_add("H39", "B", "clusters of 2^63 bytes",
     lambda p: Poke(p).u32(20, 63),
     "HEADER-INVALID", opens=False, check=ABORTED, strict=FORMAT)
_add("H40", "B", "a disk of 2^64 - 1 bytes",
     lambda p: Poke(p).u64(24, 0xFFFFFFFFFFFFFFFF),
     "HEADER-INVALID SIZE-ABSURD", opens=False, check=ABORTED, strict=FORMAT)
_add("H41", "B", "a disk one sector larger than its L1 table maps",
     lambda p: Poke(p).u64(24, 512 * MiB + 512),
     "HEADER-INVALID", opens=False, check=ABORTED, strict=FORMAT)
_add("H42", "B", "a disk of 1000 bytes",
     lambda p: Poke(p).u64(24, 1000),
     "HEADER-INVALID DATA-BEYOND-END", reads={0: b"\x11\x11", 512: None}, check=_counts(0, 0, 0, 3),
     strict={0: b"\x11\x11", 512: b""})
_add("H43", "B", "a header of 2^32 - 1 bytes",
     lambda p: Poke(p).u32(100, 0xFFFFFFFF),
     "HEADER-INVALID", opens=False, check=ABORTED, strict=FORMAT)
_add("H44", "B", "a header of 105 bytes",
     lambda p: Poke(p).u32(100, 105),
     "HEADER-INVALID", reads=OK, check=_counts(0, 0, 0, 3))
_add("H45", "B", "a header extension of 2 GiB",
     lambda p: Poke(p).u32(116, 0x7FFFFFFF),
     "EXTENSION-INVALID", opens=False, check=ABORTED, strict=FORMAT)
_add("H46", "B", "an unknown header extension with text",
     lambda p: Poke(p).names([(EXT_FEATURE_NAMES, Poke(p).read(120, 336)), (0xDEADBEEF, b"sixteen chars ok")]),
     "UNKNOWN-EXTENSION", reads=OK, check=_counts(0, 0, 0, 3))
_add("H47", "B", "an unknown incompatible feature",
     lambda p: Poke(p).u64(72, 1 << 40),
     "UNKNOWN-INCOMPATIBLE", opens=False, check=ABORTED, strict=UNSUPPORTED)
_add("H48", "B", "the dirty and corrupt bits",
     lambda p: Poke(p).u64(72, 3),
     "CORRUPT DIRTY", reads=OK, check=_counts(0, 0, 0, 3))
_add("H49", "B", "LUKS without its header extension (crashes qemu-img info)",
     lambda p: Poke(p).u32(32, 2),
     "CRYPTO-HEADER-INVALID ENCRYPTED PLAINTEXT-CONTENT", opens=False, check=ABORTED, strict=FORMAT)
_add("H50", "B", "encryption method 7",
     lambda p: Poke(p).u32(32, 7),
     "HEADER-INVALID", opens=False, check=ABORTED, strict=UNSUPPORTED)
_add("H51", "B", "an external data file without a name",
     lambda p: Poke(p).u64(72, 4),
     "DATAFILE-NAME EXTERNAL-DATA DATAFILE-MISMATCH", check=ABORTED, strict=MISSING)
_add("H52", "B", "a raw data file flag without a data file",
     lambda p: Poke(p).u64(88, 2),
     "AUTOCLEAR-ODD HEADER-INVALID", check=ABORTED, strict=FORMAT)
_add("H53", "B", "the compression type bit with type 0",
     lambda p: Poke(p).u64(72, 8),
     "HEADER-INVALID", opens=False, check=ABORTED, strict=FORMAT)
_add("H54", "B", "a compression type after the end of the header",
     lambda p: Poke(p).u8(104, 1).u32(100, 104),
     "HEADER-PADDING", reads=OK, check=_counts(0, 0, 0, 3))

# --- compressed clusters and flags ---------------------------------------------------------------

_add("H55", "B", "a compressed cluster with the copied flag",
     lambda p: Poke(p).l2(0, COPIED | COMPRESSED | B_DATA),
     "COMPRESSED-INVALID", reads=OK | {0: None}, check=_counts(2, 1, 0, 3, 1, 1))
_add("H56", "B", "a compressed cluster of all bits",
     lambda p: Poke(p).l2(0, (1 << 63) - 1),
     "COMPRESSED-INVALID BEYOND-EOF", reads=OK | {0: None}, check=_counts(2, 1, 1, 3, 1, 1))
_add("H57", "B", "a compressed cluster that points at plain data",
     lambda p: Poke(p).l2(0, COMPRESSED | B_DATA),
     "COMPRESSED-INVALID", reads=OK | {0: None}, check=_counts(0, 0, 0, 3, 1, 1))


def _h58(path: Path) -> None:
    stream = deflate(bytes(65536))
    entry = compressed_entry(B_END, len(stream), 16)
    Poke(path).append(stream).u64(24, 512 * MiB).write(B_L2, struct.pack(">Q", entry) * 8192)


_add("H58", "B", "512 MiB from one stream of 80 bytes",
     _h58,
     "AMPLIFICATION ORPHAN-CLUSTERS", reads={0: b"\0\0", 0x1FFF0000: b"\0\0"},
     check=_counts(2, 1, 3, 8192, 8192, 8192, end=589824))
_add("H59", "B", "a zero flag in version 2",
     lambda p: Poke(p).u32(4, 2).set_bits(B_L2, 1),
     "ZERO-FLAG-V2", reads=OK | {0: None}, check=_counts(0, 0, 0, 3))
_add("H60", "B", "a file cut in the middle of its L2 table",
     lambda p: Poke(p).cut(0x48000),
     "TRUNCATED BEYOND-EOF CHECK-CORRUPTIONS", reads=ZEROS, check=_counts(2, 3, 0, 3, end=327680),
     strict=dict.fromkeys(ZEROS, FORMAT))
_add("H61", "B", "a file cut at 96 bytes",
     lambda p: Poke(p).cut(96),
     "HEADER-INVALID TRUNCATED", opens=False, check=ABORTED, strict=errors.Qcow2Error)
_add("H62", "B", "a file cut at 72 bytes",
     lambda p: Poke(p).cut(72),
     "HEADER-INVALID TRUNCATED", opens=False, check=ABORTED, strict=errors.Qcow2Error)
_add("H63", "B", "300 KiB behind the last cluster",
     lambda p: Poke(p).append(b"appended" * (300 * KiB // 8)),
     "TRAILING-DATA", reads=OK, check=_counts(0, 0, 0, 3))
_add("H64", "B", "text in the header cluster",
     lambda p: Poke(p).write(0x8000, b"a note in the slack of the header cluster"),
     "HEADER-SLACK", reads=OK, check=_counts(0, 0, 0, 3))
_add("H65", "B", "a zero flag over data",
     lambda p: Poke(p).set_bits(B_L2 + 8, 1),
     "ZERO-ALLOC-DATA", reads=OK | {0x10000: b"\0\0"}, check=_counts(0, 0, 0, 3))

# --- names ---------------------------------------------------------------------------------------


def _backing(name: bytes, fmt: bytes | None) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        base_b(path.parent / "base.qcow2")
        Poke(path).names([] if fmt is None else [(EXT_BACKING_FORMAT, fmt)], name)

    return edit


def _with_data_file(path: Path) -> None:
    """Write an image whose first cluster is at 0 of an external data file."""
    target = path.parent / f"{path.stem}.raw"
    qemu.create(path, "1M", data_file=target)
    qemu.io(path, "write -P 0x11 0 64k")


def _data_file(name: bytes, *, raw: bool = False) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        Poke(path).names([(EXT_DATA_FILE, name)]).u64(88, 2 if raw else 0)

    return edit


def _h83(path: Path) -> None:
    base_b(path.parent / "other.qcow2")
    _data_file(b"other.qcow2")(path)


def _h84(path: Path) -> None:
    base_b(path.parent / "base.qcow2")
    (path.parent / "H84.raw").write_bytes(b"data file, raw  " * 4096 * 16)
    Poke(path).names([(EXT_BACKING_FORMAT, b"qcow2"), (EXT_DATA_FILE, b"H84.raw")], b"base.qcow2").u64(88, 2)


_BASE = dict(OK)
_add("H66", "empty", "backing file /etc/passwd",
     _backing(b"/etc/passwd", b"raw"),
     "BACKING-FILE REF-ABSOLUTE", reads={0: b"ro"}, strict=FORBIDDEN)
_add("H67", "empty", "backing file outside the folder",
     _backing(b"../" * 12 + b"etc/hostname", b"raw"),
     "REF-TRAVERSAL", strict=FORBIDDEN)
_add("H68", "empty", "backing file over NBD",
     _backing(b"nbd://127.0.0.1:1/x", b"raw"),
     "REF-REMOTE", strict=FORBIDDEN)
_add("H69", "empty", "a json: backing file",
     _backing(b'json:{"driver":"file","filename":"/etc/hostname"}', b"raw"),
     "REF-JSON", strict=FORBIDDEN)
_add("H70", "empty", "backing device",
     _backing(b"/dev/sda", b"raw"),
     "REF-DEVICE", strict=FORBIDDEN)
_add("H71", "empty", "backing file over HTTP",
     _backing(b"http://127.0.0.1:1/i.raw", b"raw"),
     "REF-REMOTE", strict=FORBIDDEN)
_add("H72", "empty", "a backing file without a format",
     _backing(b"base.qcow2", None),
     "BACKING-NO-FORMAT", reads=_BASE)
_add("H73", "empty", "a host folder as backing file",
     _backing(b"fat:/etc", b"raw"),
     "REF-DEVICE", reads={0: b"\0\0"}, strict=FORBIDDEN)
_add("H74", "empty", "a file: backing file",
     _backing(b"file:base.qcow2", b"qcow2"),
     "BACKING-FILE", reads=_BASE)
_add("H75", "empty", "backing file over SSH",
     _backing(b"ssh://root@127.0.0.1:1/x", b"raw"),
     "REF-REMOTE", strict=FORBIDDEN)
_add("H76", "empty", "a plain backing file",
     _backing(b"base.qcow2", b"qcow2"),
     "BACKING-FILE", reads=_BASE)
_add("H77", "empty", "a backing file name with a NUL",
     _backing(b"base.qcow2\0.png", b"qcow2"),
     "REF-OBFUSCATED", reads=_BASE)
_add("H78", "empty", "a backing file name of no bytes",
     _backing(b"", b"qcow2"),
     "HEADER-INVALID", reads=ZEROS)
_add("H79", "data", "data file /etc/passwd",
     _data_file(b"/etc/passwd"),
     "EXTERNAL-DATA REF-ABSOLUTE", reads={0: b"ro"}, strict=FORBIDDEN)
_add("H80", "data", "a json: data file",
     _data_file(b'json:{"driver":"file","filename":"/etc/passwd"}'),
     "REF-JSON DATAFILE-NAME", strict=errors.Qcow2Error)
_add("H81", "data", "a data file outside the folder",
     _data_file(b"../../etc/passwd", raw=True),
     "REF-TRAVERSAL", strict=FORBIDDEN)
_add("H82", "data", "a data file over NBD",
     _data_file(b"nbd://127.0.0.1:1/x"),
     "REF-REMOTE", strict=errors.Qcow2Error)
_add("H83", "data", "a data file that is an image itself",
     _h83,
     "NESTED-IMAGE", reads={0: b"QF", 0x10000: b"\0\0"}, strict=FORBIDDEN)
_add("H84", "data", "a raw data file and a backing file",
     _h84,
     "BACKING-WITH-RAW-DATAFILE", reads={0: b"da"})
