"""An nbdkit plug-in: every state of a QCOW2 image as a read-only NBD export. ``qcow2-forensics serve`` runs it.

By hand, run it on a Unix socket, or on the loopback address; nbdkit listens on every address otherwise:

    nbdkit -f -U case.sock python nbdkit_plugin.py image=disk.qcow2
    nbdkit -f -i 127.0.0.1 python nbdkit_plugin.py image=disk.qcow2 passphrase-file=key.txt

The export name chooses the state: none or "active" for the disk as it is now, else an ID or a name of a snapshot,
"deleted:NAME", or "recovered:1" where the image is damaged:

    nbdinfo --list 'nbd+unix:///?socket=case.sock'
    qemu-img convert -O raw 'nbd+unix:///before-incident?socket=case.sock' before.raw
    sudo nbd-client -unix case.sock -N before-incident -readonly /dev/nbd0

Parameters: image, passphrase-file and backing-dir, both repeatable; without a key file the passphrases are those of
QCOW2_PASSPHRASE_FILE and QCOW2_PASSPHRASE. QCOW2_BACKING_DIR, QCOW2_NO_BACKING, QCOW2_ASSUME and QCOW2_VIRTUAL_SIZE
count as everywhere. nbdkit runs Debian's own Python: the package must be installed there, or
PYTHONPATH must name where it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import nbdkit

import qcow2_forensics as q
from qcow2_forensics.reader import states
from qcow2_forensics.text import is_plain, printable

API_VERSION = 2

_EXPORTS = 10_000  # that nbdkit lists; one more and it lists none
_DESCRIBED = 300  # characters of a name: nbdkit takes 4096 bytes, and an escaped character may need ten

_REMEDIES = q.Remedies("backing-dir=DIR (serve: --backing-dir DIR)", alone=f"{q.ALONE_VARIABLE}=1")
_UNLOCK = f"give passphrase-file=FILE (serve: --passphrase-file FILE), or set {q.PASSPHRASE_VARIABLE} or {q.KEY_FILE_VARIABLE}"

images: list[str] = []  # one
key_files: list[str] = []
folders: list[str] = []


def config(key: str, value: str) -> None:
    """Take one parameter of the command line."""
    parameters = {"image": images, "passphrase-file": key_files, "backing-dir": folders}
    if key not in parameters:
        raise RuntimeError(f"unknown parameter {key}")
    parameters[key].append(str(Path(value).absolute()))  # nbdkit changes its folder when it goes to the background


def config_complete() -> None:
    """Open the active state once, or else the best recovered one, so that a mistake shows at the start."""
    if len(images) != 1:
        raise RuntimeError("one image=FILE is needed")
    try:
        opened("").close()
    except (q.NotQcow2, q.FormatError) as error:
        try:
            opened("recovered:1").close()
        except q.Qcow2Error:
            raise error from None
        print(f"qcow2-forensics: {error}; recovered:1 can be opened", file=sys.stderr)


def opened(name: str) -> q.Disk:
    """Return the state that an export name chooses."""
    keys = q.passphrases_from_files(key_files) if key_files else q.passphrases_from_environment()
    disk = q.open_disk(
        images[0],
        name or None,
        keys or None,
        q.Resolver(folders=[*folders, *q.folders_from_environment()], remedies=_REMEDIES),
        follow=not os.environ.get(q.ALONE_VARIABLE),
        assume=q.assumptions_from_environment(),
        virtual_size=q.virtual_size_from_environment(),
    )
    if disk.is_locked:
        disk.close()
        raise q.Locked(disk.locked_method, _UNLOCK, member=disk.locked_member)
    return disk


def thread_model() -> int:
    """Let nbdkit answer several requests at once: a disk has no position."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def list_exports(readonly: bool, is_tls: bool) -> Iterator[tuple[str, str]]:  # noqa: ARG001
    """Yield the name of every state and what it is: what opens that state alone, and shows as it is."""
    try:
        image = q.open_image(images[0])
    except (q.NotQcow2, q.FormatError):
        yield "recovered:1", "the best state that can be put together"
        return
    with image:
        entries = image.snapshots
        spelling, taken = states.spellings(entries), states.names_of(entries)
        yield states.spelled(taken, states.ACTIVE), "the disk as it is now"
        for entry in entries[: _EXPORTS - 1]:
            key = spelling(entry)
            key = key if is_plain(key) else states.spelled(taken, f"index:{entry.index}")
            yield key, f"snapshot {printable(entry.name, _DESCRIBED)}"
        if len(entries) >= _EXPORTS:
            print(
                f"qcow2-forensics: {len(entries) - _EXPORTS + 1} snapshots are missing from the list, which has room "
                f"for {_EXPORTS} states; each opens by its ID",
                file=sys.stderr,
            )
        problem = image.unreadable("snapshots")
        if problem is not None:
            print(f"qcow2-forensics: snapshots are missing from the list: {problem.error()}", file=sys.stderr)


def open(readonly: bool) -> q.Disk:  # noqa: A001, ARG001 - nbdkit's names
    """Open the state that this client asked for."""
    return opened(nbdkit.export_name())


def close(disk: q.Disk) -> None:
    """Close it when the client goes."""
    disk.close()


def get_size(disk: q.Disk) -> int:
    """Return the size of the disk in bytes."""
    return disk.size


def can_write(disk: q.Disk) -> bool:  # noqa: ARG001
    """Evidence is only read."""
    return False


def can_multi_conn(disk: q.Disk) -> bool:  # noqa: ARG001
    """Several connections see the same bytes."""
    return True


def can_extents(disk: q.Disk) -> bool:  # noqa: ARG001
    """Clients may ask where the holes are."""
    return True


def pread(disk: q.Disk, buffer: bytearray, offset: int, flags: int) -> None:  # noqa: ARG001
    """Fill ``buffer``; an error is an I/O error for the client, with the reason on nbdkit's standard error."""
    buffer[:] = disk.read(offset, len(buffer))


def extents(disk: q.Disk, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:  # noqa: ARG001
    """Return (offset, length, type) of what is stored and what is a hole."""
    hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    empty = (q.Kind.ZERO, q.Kind.HOLE)
    return [(item.offset, item.length, hole if item.kind in empty else 0) for item in disk.extents(offset, count)]
