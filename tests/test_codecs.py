"""Compressed clusters decode exactly as QEMU takes them, good streams and strange ones."""

from __future__ import annotations

import bz2
import contextlib
import random
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcow2_forensics as q
from qcow2_forensics.errors import FormatError, Unsupported
from qcow2_forensics.format import codecs
from qcow2_forensics.format.codecs import codec_of, inflate, unzstd
from qcow2_forensics.format.header import Compression
from qcow2_forensics.limits import ZSTD_FRAMES
from qcow2_forensics.residue import residue
from tests import qemu, work
from tests.image_builder import COMPRESSED, Builder, Poke, compressed_entry, deflate
from tests.tiers import quick

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CLUSTER = 65536
DATA = (b"compressible " * 400 + random.Random(3).randbytes(3000)) * 8
DATA = DATA[:CLUSTER]
HALF = CLUSTER // 2
SKIPPABLE = struct.pack("<II", 0x184D2A5A, 12) + b"skipped data"


def raw(data: bytes, level: int = 6, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -15, 8, strategy)
    return packer.compress(data) + packer.flush()


def far_apart() -> bytes:
    """Return a cluster whose only matches lie more than 4 KiB back, as QEMU never writes but reads."""
    block = random.Random(4).randbytes(30_000)
    return (block * 3)[:CLUSTER]


DEFLATE = {
    "as QEMU writes it": deflate(DATA),
    "full window": raw(far_apart()),
    "stored blocks": raw(DATA, 0),
    "fixed codes": raw(DATA, strategy=zlib.Z_FIXED),
    "longer than the cluster": raw(DATA + b"more" * 1000),
    "shorter than the cluster": raw(DATA[:-1]),
    "empty": raw(b""),
    "zlib header": zlib.compress(DATA),
    "two streams": raw(DATA[:HALF]) + raw(DATA[HALF:]),
    "garbage behind": raw(DATA) + b"\xff" * 100,
    "not flushed": raw(DATA)[:-1],
    "cut in half": raw(DATA)[:2000],
    "garbage": b"\xff" * 600,
    "reserved block type": b"\x07" + bytes(511),
}

ZSTD = {
    "one frame": zstd.compress(DATA),
    "two frames": zstd.compress(DATA[:HALF]) + zstd.compress(DATA[HALF:]),
    "many frames": b"".join(zstd.compress(DATA[at : at + 4096]) for at in range(0, CLUSTER, 4096)),
    "empty frame first": zstd.compress(b"") + zstd.compress(DATA),
    "skippable frame first": SKIPPABLE + zstd.compress(DATA),
    "skippable frame between": zstd.compress(DATA[:HALF]) + SKIPPABLE + zstd.compress(DATA[HALF:]),
    "garbage behind": zstd.compress(DATA) + b"\xff" * 100,
    "longer than the cluster": zstd.compress(DATA + b"more"),
    "second frame too long": zstd.compress(DATA[:HALF]) + zstd.compress(DATA[HALF:] + b"x"),
    "shorter than the cluster": zstd.compress(DATA[:-1]),
    "only skippable": SKIPPABLE,
    "cut in half": zstd.compress(DATA)[:2000],
    "garbage": b"\xff" * 600,
    "with checksum": zstd.compress(DATA, options={zstd.CompressionParameter.checksum_flag: 1}),
    "bad checksum": zstd.compress(DATA, options={zstd.CompressionParameter.checksum_flag: 1})[:-1] + b"\0",
    "large window": zstd.compress(DATA, options={zstd.CompressionParameter.window_log: 24}),
}


def image(path: Path, stream: bytes, compression: int) -> Path:
    builder = Builder(compression_type=compression)
    return builder.packed(0, stream).data(CLUSTER, b"\x22" * CLUSTER).write(path)


@qemu.requires_qemu
@pytest.mark.parametrize(
    ("stream", "compression"),
    [*((stream, 0) for stream in DEFLATE.values()), *((stream, 1) for stream in ZSTD.values())],
    ids=[*(f"deflate, {name}" for name in DEFLATE), *(f"zstd, {name}" for name in ZSTD)],
)
def test_a_stream_gives_what_qemu_makes_of_it(stream: bytes, compression: int, tmp_path: Path) -> None:
    path = image(tmp_path / "disk", stream, compression)
    wanted = qemu.read(path, 0, CLUSTER)
    with q.open_disk(path) as disk:
        if wanted is None:
            with pytest.raises(FormatError):
                disk.read(0, CLUSTER)
        else:
            assert disk.read(0, CLUSTER) == wanted
        assert disk.read(CLUSTER, CLUSTER) == b"\x22" * CLUSTER


def test_qemu_reads_the_streams_the_format_allows() -> None:
    assert inflate(DEFLATE["full window"], CLUSTER) == far_apart()
    for name in ("as QEMU writes it", "stored blocks", "longer than the cluster", "garbage behind"):
        assert inflate(DEFLATE[name], CLUSTER) == DATA
    for name in ("one frame", "two frames", "many frames", "skippable frame first", "garbage behind"):
        assert unzstd(ZSTD[name], CLUSTER) == DATA


@qemu.requires_qemu
@pytest.mark.parametrize("bits", quick([9, 12, 14, 16, 18, 21], [12, 16]))
@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_every_stream_of_a_converted_image_decodes(bits: int, compression: str, tmp_path: Path) -> None:
    generator = random.Random(bits)
    pieces = (b"text %d " % bits * 999, generator.randbytes(5000), bytes(3000))
    size = (3 << 20) + 7 * 512  # the last cluster is cut by the end of the disk
    data = b"".join(pieces[generator.randrange(3)] for _ in range(600)).ljust(size, b"\0")[:size]
    (tmp_path / "raw").write_bytes(data)
    options = {"cluster_size": 1 << bits, "compression_type": compression}
    qemu.convert(
        tmp_path / "raw", tmp_path / "disk", fmt="raw", target_format="qcow2", compressed=True, target_options=options
    )
    with q.open_disk(tmp_path / "disk") as disk:
        assert disk.read(0, disk.size) == data
        assert any(extent.kind == q.Kind.COMPRESSED for extent in disk.extents())


@qemu.requires_qemu
@pytest.mark.parametrize("missing", [0, 1, 100, 600, 2000])
def test_a_stream_cut_off_by_the_end_of_the_file_reads_as_in_qemu(missing: int, tmp_path: Path) -> None:
    stream = deflate(DATA)
    builder = Builder()
    path = builder.packed(0, stream).write(tmp_path / "disk")
    entry = compressed_entry(builder._end, len(stream), 16)
    poke = Poke(path)
    poke.u64(poke.get(poke.get(40)) & 0xFFFFFFFFFFFE00, entry).append(stream[: len(stream) - missing])
    wanted = qemu.read(path, 0, CLUSTER)
    with q.open_disk(path, eof="zeros") as disk:
        try:
            got: bytes | None = disk.read(0, CLUSTER)
        except FormatError:
            got = None
        assert got == wanted


@qemu.requires_qemu
def test_a_descriptor_that_covers_less_than_its_stream_is_an_error(tmp_path: Path) -> None:
    stream = deflate(random.Random(1).randbytes(CLUSTER // 2) + bytes(CLUSTER // 2))
    builder = Builder()
    host = builder.put(stream)
    builder.entry(0, COMPRESSED | host)  # one sector
    path = builder.write(tmp_path / "disk")
    assert qemu.read(path, 0, CLUSTER) is None
    with q.open_disk(path) as disk, pytest.raises(FormatError, match=r"32 of 65536|of 65536 bytes|bad deflate"):
        disk.read(0, 1)


@given(st.binary(max_size=3000), st.integers(1, 5000))
def test_inflate_gives_the_size_asked_for_or_an_error(data: bytes, size: int) -> None:
    with contextlib.suppress(ValueError):
        assert len(inflate(data, size)) == size


@given(st.binary(max_size=3000), st.integers(1, 5000), st.booleans())
def test_unzstd_gives_the_size_asked_for_or_an_error(data: bytes, size: int, valid: bool) -> None:
    stream = zstd.compress(data) + data if valid else data
    with contextlib.suppress(ValueError):
        assert len(unzstd(stream, size)) == size


def test_a_bomb_is_decoded_no_further_than_a_cluster() -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(32)) + bomb.flush()
    assert inflate(stream, CLUSTER) == bytes(CLUSTER)
    with pytest.raises(ValueError, match="more than"):
        unzstd(zstd.compress(bytes(32 << 20)), CLUSTER)


# --- what costs much ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (struct.pack("<II", 0x184D2A50, 0) * (4 << 17), "skippable"),
        (struct.pack("<II", 0x184D2A50, 0xFFFFFFFF), "give 0 of"),
        (struct.pack("<I", 0x184D2A50), "zstd"),
        (zstd.compress(b"") * 100_000, "more than 16384"),
    ],
    ids=["half a million skippable frames", "a skippable frame past the end", "half a head", "many empty frames"],
)
def test_zstd_frames_that_decode_to_nothing_cost_little(
    stream: bytes, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[int] = []
    library = codecs.zstd_module()

    class Counted:
        def __init__(self, **options: object) -> None:
            self._decoder = library.ZstdDecompressor(**options)

        def decompress(self, data: bytes, size: int) -> bytes:
            handed.append(len(data))
            return bytes(self._decoder.decompress(data, size))

        @property
        def eof(self) -> bool:
            return bool(self._decoder.eof)

    monkeypatch.setattr(codecs, "zstd_module", lambda: SimpleNamespace(**vars(library) | {"ZstdDecompressor": Counted}))
    with pytest.raises(ValueError, match=why), work.at_most(400_000):
        unzstd(stream, 2 << 20)
    assert len(handed) <= ZSTD_FRAMES
    assert sum(handed) <= len(stream)


@qemu.requires_qemu
@pytest.mark.parametrize("frame", [1, 16, 200, 256])
def test_any_number_of_zstd_frames_reads_as_in_qemu(frame: int, tmp_path: Path) -> None:
    data = DATA if frame > 1 else DATA[:4096]
    stream = b"".join(zstd.compress(data[at : at + frame]) for at in range(0, len(data), frame))
    builder = Builder(compression_type=1, cluster_bits=16 if frame > 1 else 12)
    if frame == 1:  # a descriptor has room for 16 sectors of 4 KiB clusters: as many frames as fit
        data, stream = DATA[:700].ljust(4096, b"\0"), stream[: 700 * 10] + zstd.compress(bytes(4096 - 700))
    path = builder.packed(0, stream).write(tmp_path / "disk")
    assert qemu.read(path, 0, len(data)) == data
    with q.open_disk(path) as disk:
        assert disk.read(0, len(data)) == data


def test_skippable_frames_between_many_others_are_passed_over() -> None:
    stream = b"".join(SKIPPABLE + zstd.compress(DATA[at : at + 64]) for at in range(0, CLUSTER, 64))
    assert unzstd(stream + b"rest", CLUSTER) == DATA
    assert codec_of(1).measure(stream + b"rest", CLUSTER) == (DATA, len(stream))


# --- one table of compression types ---------------------------------------------------------------


def test_every_compression_type_of_the_format_has_its_row() -> None:
    assert {kind: codec_of(kind).name for kind in Compression} == {0: "zlib", 1: "zstd"}


def test_a_compression_type_without_a_row_is_refused_by_everything_that_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = image(tmp_path / "disk", deflate(DATA), 1)  # would decode, if deflate were the answer to everything
    monkeypatch.delitem(codecs._CODECS, 1)
    with pytest.raises(Unsupported, match="compression type 1"):
        q.open_disk(path)
    with residue(path) as found:
        assert "compressed-slack" not in {piece.kind for piece in found.pieces()}
        assert isinstance(found.unseen, Unsupported)
        with pytest.raises(Unsupported, match="compression type 1"):
            list(found.hidden())
    report = q.audit(path, depth="deep")
    assert {"QCOW2-AUDIT-INCOMPLETE"} <= {finding.code for finding in report}
    assert "QCOW2-COMPRESSED-INVALID" not in {finding.code for finding in report}


def test_a_row_is_all_that_a_new_compression_type_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(data: bytes, size: int) -> bytes:
        return bz2.BZ2Decompressor().decompress(data, size)

    def begins(data: bytes, _: int) -> bool:
        return data.startswith(b"BZh")

    def measure(data: bytes, size: int) -> tuple[bytes, int]:
        return decode(data, size), len(stream)

    stream = bz2.compress(DATA)
    row = codecs.Codec(200, "bzip2", decode, measure, False, begins, lambda _: 1 << 20)
    path = image(tmp_path / "disk", stream, 200)
    with pytest.raises(Unsupported, match="compression type 200"):
        q.open_disk(path)
    monkeypatch.setitem(codecs._CODECS, 200, row)
    with q.open_disk(path) as disk:
        assert disk.read(0, CLUSTER) == DATA
    with residue(path) as found:
        assert [piece for piece in found.pieces() if piece.kind == "compressed-slack"] == []
    assert not {"QCOW2-COMPRESSED-INVALID", "QCOW2-AUDIT-INCOMPLETE"} & {
        one.code for one in q.audit(path, depth="deep")
    }
    path = image(tmp_path / "mistaken", stream, 1)
    (mistaken,) = [finding for finding in q.audit(path, depth="deep") if finding.code == "QCOW2-COMPRESSED-INVALID"]
    assert mistaken.title == "compressed clusters are bzip2, the header says zstd"


@pytest.mark.parametrize("kind", list(Compression))
def test_a_measured_stream_is_the_decoded_one_and_ends_where_the_next_begins(kind: Compression) -> None:
    codec = codec_of(kind)
    streams = {Compression.ZLIB: DEFLATE, Compression.ZSTD: ZSTD}[kind]
    for stream in streams.values():
        measured = codec.measure(stream, CLUSTER)
        if measured is not None:
            assert measured[0] == codec.decode(stream, CLUSTER) == codec.decode(stream[: measured[1]], CLUSTER)
            assert codec.measure(stream[: measured[1] - 1], CLUSTER) is None


def _several_blocks(generator: random.Random) -> bytes:
    """Return a stream as a writer that flushes makes it: each part has codes of its own."""
    packer = zlib.compressobj(generator.choice([1, 6, 9]), zlib.DEFLATED, -15, 8, generator.choice([0, 0, 2, 3, 4]))
    words = [generator.randbytes(generator.randrange(2, 9)) for _ in range(200)]
    parts = (b"".join(generator.choices(words, k=1500)), generator.randbytes(999) * 9, bytes(7000))
    stream = b"".join(packer.compress(part) + packer.flush(zlib.Z_FULL_FLUSH) for part in parts)
    return stream + packer.flush()


def _by_zlib(stream: bytes, size: int) -> bytes | None:
    try:
        cluster = zlib.decompressobj(-15).decompress(stream, size)
    except zlib.error:
        return None
    return cluster if len(cluster) == size else None


def test_what_zlib_refuses_is_refused_whatever_library_decodes() -> None:
    generator = random.Random(11)
    answers = {"bytes": 0, "refused": 0}
    for number in range(4000):
        if number % 50 == 0:
            intact = _several_blocks(generator)
        stream = bytearray(intact)
        reach = generator.choice([12, 100, 1000, len(stream)])  # code lengths come first, and again in each block
        for _ in range(generator.choice([1, 1, 2, 5])):
            stream[generator.randrange(reach)] ^= 1 << generator.randrange(8)
        size = generator.choice([512, 4096, 16384])
        wanted = _by_zlib(bytes(stream), size)
        try:
            got: bytes | None = inflate(bytes(stream), size)
        except ValueError:
            got = None
        assert got == wanted, stream.hex()
        answers["refused" if wanted is None else "bytes"] += 1
    assert min(answers.values()) > 500
