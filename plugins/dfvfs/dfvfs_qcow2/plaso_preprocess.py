"""What an audit of the image finds as warnings, and its snapshots as events.

The plugin runs once per image. The stock ``pinfo --sections warnings`` shows the warnings, and the
stock psort the events.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from dfdatetime import posix_time
from plaso.containers import events
from plaso.preprocessors import interface, manager

from qcow2_forensics import Qcow2Error
from qcow2_forensics.text import date_note, printable, snapshot_time

from . import end_notes
from .audit_notes import PARSER, audit_sentences
from .inspection import open_image, recovered_states, snapshot_path_spec
from .names import DATA_TYPE, SnapshotKey, label, qcow_path_specs, snapshots_around
from .opening import find_entry
from .sources import display_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcow2_forensics import SnapshotEntry

_MOST = 1000  # snapshots per image: a crafted image could fill the storage file

_Stock: Any = interface.FileSystemArtifactPreprocessorPlugin
_StockEventData: Any = events.EventData


class QCOWSnapshotEventData(_StockEventData):
    """An internal snapshot was taken; the clock is that of the virtualisation host."""

    DATA_TYPE = DATA_TYPE

    def __init__(self) -> None:
        super().__init__(data_type=DATA_TYPE)
        self.creation_time: Any = None
        self.display_name: str | None = None
        self.date_note: str | None = None  # what is wrong with the recorded date
        self.disk_size: int | None = None
        self.former_entry: str | None = None  # of a deleted snapshot: the file offset of its table entry
        self.identifier: str | None = None
        self.name: str | None = None
        self.position: int | None = None
        self.vm_clock: int | None = None
        self.vm_state_size: int | None = None


class QCOWPlugin(_Stock):
    """Audits each QCOW image that leads to a file system that plaso preprocesses."""

    ARTIFACT_DEFINITION_NAME = None

    def __init__(self) -> None:
        super().__init__()
        self._seen: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()

    def Collect(  # noqa: N802
        self,
        mediator: Any,
        artifact_definition: Any,  # noqa: ARG002 - plaso's signature
        searcher: Any,  # noqa: ARG002
        file_system: Any,
    ) -> None:
        """Write warnings and events about the images a file system lies in."""
        seen = self._seen.setdefault(mediator, set())
        for path_spec in qcow_path_specs(file_system._path_spec):
            if path_spec.comparable not in seen:
                seen.add(path_spec.comparable)
                _report_findings(mediator, path_spec)
                _report_snapshots(mediator, path_spec, _entries(path_spec))
        self._report_states(mediator, file_system._path_spec)

    def _report_states(self, mediator: Any, path_spec: Any) -> None:
        """Write events about the deleted snapshots a file system lies in, and warnings about recovered states."""
        seen = self._seen[mediator]
        for key, qcow in snapshots_around(path_spec):
            name = f"{qcow.comparable}{key.encoding_method}"
            if key.deleted and name not in seen:
                seen.add(name)
                _report_snapshots(mediator, qcow, [find_entry(open_image(qcow), key)])
            elif key.recovered and name not in seen:
                seen.add(name)
                warnings = [state.warning for state in recovered_states(qcow) if state.number == key.place]
                _warn(mediator, qcow, warnings)


class _Location:
    """Takes the place of the file entry that a warning is about in plaso's mediator."""

    def __init__(self, path_spec: Any) -> None:
        self.path_spec = path_spec


def _report_findings(mediator: Any, path_spec: Any) -> None:
    sentences, found = audit_sentences(path_spec)
    if found is not None:
        end_notes.note_audit(display_name(path_spec), Counter(finding.severity for finding in found))
    _warn(mediator, path_spec, sentences)


def _warn(mediator: Any, path_spec: Any, sentences: Sequence[str]) -> None:
    """Write warnings about what a path specification means."""
    before = mediator._file_entry
    mediator.SetFileEntry(_Location(path_spec))
    try:
        for sentence in sentences:
            mediator.ProducePreprocessingWarning(PARSER, sentence)
    finally:
        mediator.SetFileEntry(before)


def _entries(path_spec: Any) -> Sequence[SnapshotEntry]:
    try:
        return open_image(path_spec).snapshots[:_MOST]
    except (OSError, Qcow2Error):
        return ()  # the audit has said so


def _report_snapshots(mediator: Any, path_spec: Any, entries: Sequence[SnapshotEntry]) -> None:
    if not entries:
        return
    for entry in entries:
        stream = events.EventDataStream()
        stream.path_spec = snapshot_path_spec(path_spec, entry)
        mediator.AddArtifact(stream)
        event_data = _event_data(entry)
        event_data.SetEventDataStreamIdentifier(stream.GetIdentifier())
        event_data._event_values_hash = events.CalculateEventValuesHash(event_data, stream)
        mediator.AddArtifact(event_data)
        event = events.EventObject()
        event.date_time = event_data.creation_time
        event.timestamp = event_data.creation_time.GetPlasoTimestamp()
        event.timestamp_desc = "Snapshot Creation Time"
        event.SetEventDataIdentifier(event_data.GetIdentifier())
        mediator.AddArtifact(event)
    _count(mediator, len(entries))


def _event_data(entry: SnapshotEntry) -> QCOWSnapshotEventData:
    event_data = QCOWSnapshotEventData()
    event_data._parser_chain = PARSER
    event_data.creation_time = posix_time.PosixTimeInNanoseconds(
        timestamp=snapshot_time(entry.date_sec, entry.date_nsec)
    )
    key = SnapshotKey.of(entry)
    event_data.display_name = label(key)
    event_data.former_entry = f"{key.place:#x}" if key.deleted else None
    event_data.date_note = date_note(entry.date_nsec) or None
    event_data.disk_size = entry.disk_size
    event_data.identifier = printable(entry.id)
    event_data.name = printable(entry.name)
    event_data.position = key.position
    event_data.vm_clock = entry.vm_clock_nsec
    event_data.vm_state_size = entry.vm_state_size
    return event_data


def _count(mediator: Any, number_of_events: int) -> None:
    """Add the events to the counters that pinfo shows; extraction adds its own to the same totals."""
    writer = mediator._storage_writer
    if hasattr(writer, "GetParsersCounter"):
        writer.UpdateParsersCounter(
            writer.GetParsersCounter(), Counter({PARSER: number_of_events, "total": number_of_events})
        )
        writer.UpdateDataTypesCounter(
            writer.GetDataTypesCounter(), Counter({DATA_TYPE: number_of_events, "total": number_of_events})
        )


def register() -> None:
    """Register the plugin, once."""
    if QCOWPlugin.__name__.lower() not in manager.PreprocessPluginsManager._plugins:
        manager.PreprocessPluginsManager.RegisterPlugins([QCOWPlugin])


register()
