"""What every mutated image is put through, and what may come out of it.

A target takes an open source and uses the public interface as its users would. It may end in a
:class:`Qcow2Error` (adapters: in what their framework expects); anything else is an escape.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable

import qcow2_forensics as q
from qcow2_forensics.bitmaps import dirty_ranges
from qcow2_forensics.limits import MiB
from qcow2_forensics.source import BytesSource, Source

_READ_LIMIT = 4 * MiB  # guest bytes read per view: what is decoded is streamed, not kept
_PIECES = 2000  # extents looked at per view


def _tolerate(work: Callable[[], object], *allowed: type[BaseException]) -> None:
    try:
        work()
    except (q.Qcow2Error, *allowed):
        pass


def _view(source: Source, snapshot: object, eof: str) -> None:
    disk = q.open_disk(source, snapshot, passphrase="fuzz", missing="zeros", eof=eof)  # type: ignore[arg-type]
    _tolerate(lambda: list(itertools.islice(disk.extents(), _PIECES)))
    for offset in (0, 512, max(0, disk.size - 4096), disk.size // 2 & ~511):
        _tolerate(lambda at=offset: disk.read(at, 4096))
    done = 0
    while done < min(disk.size, _READ_LIMIT):
        _tolerate(lambda at=done: disk.read(at, 65536))
        done += 65536


def read(source: Source) -> None:
    """Open, map and read the active state and the first snapshots, strictly and as QEMU does."""
    with q.open_image(source) as image:
        image.problems  # noqa: B018
        entries = image.snapshots[:3]
        for bitmap in image.bitmaps[:3]:
            _tolerate(lambda entry=bitmap: list(itertools.islice(dirty_ranges(image, entry), _PIECES)))
    for eof in ("strict", "zeros"):
        for snapshot in (None, *entries):
            _tolerate(lambda s=snapshot, e=eof: _view(source, s, e))


def vm_state(source: Source) -> None:
    """Read the VM state and index the guest's memory."""
    _tolerate(lambda: q.open_vm_state(source, passphrase="fuzz").read(0, MiB))

    def memory() -> None:
        guest = q.open_guest_memory(source, passphrase="fuzz")
        for region in itertools.islice(guest.regions, 4):
            _tolerate(lambda r=region: guest.read(r.address, min(r.length, 65536)))

    _tolerate(memory)


def audit(source: Source) -> None:
    """Audit at every depth: never an exception."""
    for depth in ("triage", "standard", "deep"):
        q.audit(source, depth=depth).to_json()


def compare(source: Source) -> None:
    """Compare each snapshot with the active state."""
    with q.open_image(source) as image:
        entries = image.snapshots[:2]
    for entry in entries:

        def differences(wanted: object = entry) -> None:
            before = q.open_disk(source, wanted, passphrase="fuzz", missing="zeros")  # type: ignore[arg-type]
            after = q.open_disk(source, passphrase="fuzz", missing="zeros")
            if max(before.size, after.size) <= 64 * MiB:
                list(itertools.islice(q.compare(before, after), _PIECES))

        _tolerate(differences)


def residue(source: Source) -> None:
    """Collect the residue."""
    from qcow2_forensics import residue as module

    image = q.open_image(source)
    _tolerate(lambda: list(itertools.islice(module.residue(image), _PIECES)))


def img_info(source: Source) -> None:
    """Open the file system through pytsk3."""
    import pytsk3

    import pytsk3_qcow2

    def use() -> None:
        image = pytsk3_qcow2.Img_Info(source, passphrase="fuzz")
        for offset in (0, 4096):
            _tolerate(lambda at=offset: image.read(at, 4096), OSError)
        _tolerate(lambda: pytsk3.FS_Info(image), OSError)

    _tolerate(use, OSError)


def command_line(source: Source) -> None:
    """Print what the command line prints, from the same bytes."""
    from qcow2_forensics.cli import info

    def use() -> None:
        with q.open_image(source) as image:
            text = info._as_text(info.collect(image))
            assert text.isprintable() or all(c.isprintable() or c == "\n" for c in text), "unescaped output"
            io.StringIO().write(text)

    _tolerate(use)


TARGETS: dict[str, Callable[[Source], None]] = {
    "read": read,
    "vm_state": vm_state,
    "audit": audit,
    "compare": compare,
    "residue": residue,
    "img_info": img_info,
    "command_line": command_line,
}


def run(name: str, data: bytes) -> None:
    """Put one image through one target."""
    try:
        TARGETS[name](BytesSource(data, "fuzzed.qcow2"))
    except q.Qcow2Error:
        pass
