"""One image becomes one folder: a raw file per state, guest memory beside it, the audit, a README.

Everything is opened before the mount appears: its sizes are then known, what cannot be opened is listed with
its reason, and no look at the folder makes anybody wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import NotQcow2, Qcow2Error
from ..findings import Report
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..format.source import ClosedOnError, Closing
from ..reader.disk import Disk
from ..reader.states import Rebuilt, SnapshotName
from ..reader.vm_state import VmState
from ..text import __version__, printable, short_date, short_time, size, snapshot_time
from .served_files import DiskContent, File, FileContent, MemoryContent, TextContent, UniqueNames, safe_name

if TYPE_CHECKING:
    from ..recovery import RecoveredState

_README = "README.txt"
_AUDIT = "audit.json"

_HEAD = """{image}

Every state of this QCOW2 image as a raw file, read-only, through qcow2-forensics {version}.
The image is only read; nothing in this folder can be changed. Holes are zeros. A range that cannot be
read is an I/O error, and its reason is printed where the mount was started.

"""

_TAIL = """
Examples (read-only, without replaying a journal):
  mmls {example}
  fls -r -o 2048 {example}     (a partition that starts at sector 2048)
  sudo mount -o loop,ro,noload,offset=$((2048*512)) {example} /mnt     (ext4 in the first partition)
  cp --sparse=always {example} /elsewhere/
"""


class ServedState(NamedTuple):
    """A state to be served: how to open it, what its files are called, what it is."""

    selector: SnapshotName
    stem: str
    description: str
    time: int
    entry: SnapshotEntry | None
    gone: bool = False  # a deleted snapshot of which only the name is left


@dataclass(slots=True)
class Openers:
    """How the caller opens what a folder shows; None leaves that part out.

    ``disk`` opens one state, with the keys of a disk that is open already where there is one. ``memory``
    opens the guest memory of a snapshot whose disk does not open. ``report`` audits the image.
    ``recovered`` puts states together from what is left of a damaged image, and reads the whole file for it.
    """

    disk: Callable[[SnapshotName, Disk | None], Disk]
    memory: Callable[[SnapshotName], FileContent] | None
    report: Callable[[], Report] | None
    deleted: bool = False
    recovered: Callable[[], list[RecoveredState]] | None = None  # looks for states that no table leads to


class ImageFolder(Closing):
    """The files of one image. A context manager: closing it closes every state."""

    def __init__(self, path: str, openers: Openers) -> None:
        self.name = safe_name(Path(path).name) or "image"
        self.files: dict[str, File] = {}
        self.missing: list[str] = []
        self._names = UniqueNames()
        self._path = path
        self._openers = openers
        self._gone: list[str] = []
        self._keys: Disk | None = None  # the first state that opened: deriving keys takes seconds
        self._lines: list[tuple[str, str]] = []
        self._undo = ExitStack()
        with ClosedOnError(self):
            self._fill()

    def _fill(self) -> None:
        modified = Path(self._path).stat().st_mtime_ns
        for state in _states(self._path, modified, self._openers):
            self._add_state(state)
        with suppress(NotQcow2), Image(self._path) as image:
            problem = image.unreadable("snapshots")
            if problem is not None:
                self.missing.append(f"snapshots: {problem.error()}")
        if not self.files:
            raise Qcow2Error("; ".join(self.missing))
        if self._openers.report is not None:
            try:
                content = TextContent(self._openers.report().to_json() + "\n")
            except (Qcow2Error, OSError) as error:
                self.missing.append(f"{_AUDIT}: {error}")
            else:
                self._add(_AUDIT, "", content, modified, "what the auditor observed")
        self._add(_README, "", TextContent(self._readme()), modified, "this page")

    def _add_state(self, state: ServedState) -> None:
        if state.gone:
            self._gone.append(state.description)
            return
        if isinstance(state.selector, Rebuilt) and state.selector.is_memory:
            self._add_memory(state, None)
            return
        disk: Disk | None = None
        try:
            disk = self._openers.disk(state.selector, self._keys)
        except (Qcow2Error, OSError) as error:
            self.missing.append(f"{state.description}: {error}")
        else:
            self._undo.callback(disk.close)
            self._keys = self._keys or disk
            self._add(state.stem, ".raw", DiskContent(disk), state.time, state.description)
        if state.entry is not None and state.entry.vm_state_size:
            self._add_memory(state, disk)

    def _add_memory(self, state: ServedState, disk: Disk | None) -> None:
        """Add the guest memory of a state, unless no memory is wanted; ``disk`` is that of the state where it is open."""
        if self._openers.memory is None:
            return
        description = f"guest memory of {state.description}"
        try:
            content = _memory(disk) if disk is not None else self._openers.memory(state.selector)
        except (Qcow2Error, OSError) as error:
            self.missing.append(f"{description}: {error}")
        else:
            self._add(state.stem, ".memory.raw", content, state.time, description)

    def _add(self, stem: str, suffix: str, content: FileContent, time: int, description: str) -> None:
        name = self._names.of(stem, suffix)
        self.files[name] = File(name, content, time)
        self._lines.append((name, f"{description}, {size(content.size)}" if suffix else description))

    def _readme(self) -> str:
        lines = [*self._lines, (_README, "this page")]
        width = max(len(name) for name, _ in lines)
        text = _HEAD.format(image=printable(str(Path(self._path).absolute())), version=__version__)
        text += "".join(f"{name:<{width}}  {description}\n" for name, description in lines)
        if not self._openers.deleted:
            text += "\nDeleted snapshots were not looked for (--deleted does, and reads all free space).\n"
        if self._openers.recovered is None:
            text += "\nStates to be recovered were not looked for (--recovered does, and reads the whole file).\n"
        if self._gone:
            text += "\nOnly the name is left of:\n" + "".join(f"  {line}\n" for line in self._gone)
        if self.missing:
            text += "\nNot here, because it could not be opened:\n" + "".join(f"  {line}\n" for line in self.missing)
        return text + _TAIL.format(example=next(name for name in self.files if name.endswith(".raw")))

    def close(self) -> None:
        """Close every state."""
        self._undo.close()


def _memory(disk: Disk) -> FileContent:
    """Return the guest memory of the snapshot at which ``disk`` is open."""
    from ..memory import open_guest_memory

    return MemoryContent(open_guest_memory(VmState(disk)))


def _states(path: str, modified: int, openers: Openers) -> Iterator[ServedState]:
    """Yield the active state, each snapshot in the order of its table, then what is deleted and what is recovered.

    An image without a usable header has no states but the recovered ones; where those are not asked for, it raises.
    """
    yield ServedState(None, "active", f"the disk as it is now, modified {short_time(modified)} UTC", modified, None)
    try:
        with Image(path) as image:
            yield from _listed(image, deleted=openers.deleted)
    except Qcow2Error:
        if openers.recovered is None:
            raise
    for found in openers.recovered() if openers.recovered is not None else ():
        what = (
            f"recovered state {found.number}: {found.what}, {found.confidence.label}; its size from {found.size_from}"
        )
        yield ServedState(found, f"recovered-{found.number}", what, modified, None)


def _listed(image: Image, *, deleted: bool) -> Iterator[ServedState]:
    for entry in image.snapshots:
        yield _snapshot("snapshot", entry, entry, "")
    if not deleted:
        return
    from ..residue import Residue

    for item in Residue(image).deleted_snapshots():
        state = _snapshot("deleted", item.entry, item.selector, f", {item.readable:.1%} of it readable")
        yield state._replace(gone=item.is_gone)


def _snapshot(kind: str, entry: SnapshotEntry, selector: SnapshotName, left: str) -> ServedState:
    seconds, nanoseconds = entry.date_sec, entry.date_nsec
    stem = "-".join(part for part in (kind, safe_name(entry.id), safe_name(entry.name)) if part)
    what = f"{kind} snapshot" if kind != "snapshot" else kind
    description = (
        f'{what} {printable(entry.id)} "{printable(entry.name)}" of {short_date(seconds, nanoseconds, " UTC")}{left}'
    )
    return ServedState(selector, stem, description, snapshot_time(seconds, nanoseconds), entry)
