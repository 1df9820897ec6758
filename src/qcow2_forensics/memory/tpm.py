"""The state of an emulated TPM, as the files that swtpm keeps.

QEMU takes three blobs from the emulator and stores them one after the other, each behind its flags and its
length. A blob is swtpm's own form (big-endian)::

    header  u8 version  u8 least version  u16 10  u16 flags  u32 length of all
    record  u16 4, u32 length, and the content: what swtpm's file holds behind its own header

The permanent state holds the keys and the NVRAM of the TPM: what was sealed to it may be opened with it.
"""

from __future__ import annotations

import struct
from typing import Final

DEVICE: Final = "tpm-emulator"
PARTS: Final = {"permanent": "permall", "volatile": "volatilestate", "savestate": "savestate"}
"""The three states, in the order of the stream, and what swtpm names their files after ``tpm2-00.``"""

_HEADER = struct.Struct(">BBHHI")
_RECORD = struct.Struct(">HI")
_MIGRATED = 4


def split(body: bytes) -> dict[str, bytes]:
    """Return the states in a ``tpm-emulator`` section as the bytes of swtpm's files; empty ones are left out.

    A blob of another form (encrypted, or of a newer swtpm) is returned as it is.
    """
    found = {}
    at = 0
    for name in PARTS:
        if at + 8 > len(body):
            break
        length = int.from_bytes(body[at + 4 : at + 8], "big")
        blob = body[at + 8 : at + 8 + length]
        at += 8 + length
        if blob:
            found[name] = _file(blob)
    return found


def _file(blob: bytes) -> bytes:
    if len(blob) < _HEADER.size + _RECORD.size:
        return blob
    version, least, size, _flags, total = _HEADER.unpack_from(blob)
    kind, length = _RECORD.unpack_from(blob, size) if size == _HEADER.size else (-1, 0)
    start = size + _RECORD.size
    if kind != _MIGRATED or total != len(blob) or start + length > len(blob):
        return blob
    return _HEADER.pack(version, least, size, 0, size + length) + blob[start : start + length]
