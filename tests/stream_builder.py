"""Hand-made migration streams: the grammar's corners, which no machine here sends."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence

PAGE = 4096
ZERO_FLAG, SIZES_FLAG, PAGE_FLAG, EOS_FLAG, CONTINUE_FLAG = 0x02, 0x04, 0x08, 0x10, 0x20


def name(text: str) -> bytes:
    data = text.encode()
    return bytes([len(data)]) + data


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def configuration(machine: str = "pc-i440fx-7.2", *subsections: bytes) -> bytes:
    return b"\x07" + u32(len(machine)) + machine.encode() + b"".join(subsections)


def subsection(title: str, content: bytes) -> bytes:
    return b"\x05" + name(title) + u32(1) + content


def capabilities(*names: str) -> bytes:
    return subsection("configuration/capabilities", u32(len(names)) + b"".join(map(name, names)))


def sizes(blocks: Mapping[str, int], extra: Mapping[str, bytes] | None = None) -> bytes:
    listed = b"".join(name(block) + u64(size) + (extra or {}).get(block, b"") for block, size in blocks.items())
    return u64(sum(blocks.values()) | SIZES_FLAG) + listed


def page(number: int, content: bytes | int, block: str | None = None) -> bytes:
    """A record of one page: bytes for a whole page, a number for a fill byte; a block's name starts it."""
    kind = ZERO_FLAG if isinstance(content, int) else PAGE_FLAG
    word = number * PAGE | kind | (CONTINUE_FLAG if block is None else 0)
    title = b"" if block is None else name(block)
    return u64(word) + title + (bytes([content]) if isinstance(content, int) else content)


def section(kind: int, number: int, body: bytes, title: str = "", footer: bool = True, version: int = 4) -> bytes:
    head = bytes([kind]) + u32(number)
    if kind in (1, 4):
        head += name(title) + u32(0) + u32(version)
    return head + body + (b"\x7e" + u32(number) if footer else b"")


def ram(start: bytes, *parts: bytes, footer: bool = True) -> bytes:
    """The RAM sections: the list of blocks, then every part with its end mark."""
    out = section(1, 2, start + u64(EOS_FLAG), "ram", footer)
    return out + b"".join(section(3, 2, part + u64(EOS_FLAG), footer=footer) for part in parts)


def cmos(below: int, above: int) -> bytes:
    content = bytearray(128)
    content[0x34:0x36] = min((below - (16 << 20)) >> 16, 0xFFFF).to_bytes(2, "little")
    content[0x5B:0x5E] = (above >> 16).to_bytes(3, "little")
    return bytes(content)


def devices(sections: Sequence[tuple[str, bytes]], footer: bool = True, described: bool = True) -> bytes:
    """Device sections of one buffer each, the end mark, and their description."""
    out = b"".join(
        section(4, 100 + number, body, title, footer, version=3) for number, (title, body) in enumerate(sections)
    )
    if not described:
        return out + b"\0"
    text = json.dumps(
        {
            "page_size": PAGE,
            "devices": [
                {"name": title, "instance_id": 0, "version": 3, "fields": [{"name": "data", "size": len(body)}]}
                for title, body in sections
            ],
        }
    ).encode()
    return out + b"\0\x06" + u32(len(text)) + text


def stream(*sections: bytes) -> bytes:
    return b"QEVM" + u32(3) + b"".join(sections)


def simple(records: Iterable[bytes], blocks: Mapping[str, int], *, machine: str = "pc-i440fx-7.2") -> bytes:
    """A whole stream of one RAM pass, with a CMOS that has all memory below 4 GiB."""
    total = sum(blocks.values())
    body = ram(sizes(blocks), b"".join(records))
    return stream(configuration(machine), body, devices([("mc146818rtc", cmos(min(max(total, 16 << 20), 4 << 30), 0))]))


def srat(*entries: tuple[int, int, int, int]) -> bytes:
    """An SRAT of ``(node, base, length, flags)`` entries, its checksum left out as QEMU leaves it."""
    body = b"".join(
        struct.pack("<BBIHQQIIQ", 1, 40, node, 0, base, length, 0, flags, 0) for node, base, length, flags in entries
    )
    return struct.pack("<4sIB39x", b"SRAT", 48 + len(body), 1) + body
