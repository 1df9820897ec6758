"""A file system of a snapshot beside the same file system in later states of its image.

``changed`` asks for the files of a snapshot that a later state does not have in the same way::

    table    alpha ──> beta ──> gamma ──> active        a file of alpha is left out when beta has it,
             └─────────────────────────────^            or when the active state has it

A file is the same when its entry, its times and its content are. Content is known to be the same where the
file has the same extents in both states and the image's mappings say that those ranges are shared;
only where they do not say so, its bytes are read and compared.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from dfvfs.lib import definitions
from dfvfs.lib import errors as dfvfs_errors
from dfvfs.path import factory
from dfvfs.resolver import resolver
from dfvfs.volume import factory as volume_system_factory

from qcow2_forensics import Qcow2Error
from qcow2_forensics.files import Spans

from .inspection import open_image
from .names import SnapshotKey, snapshots_around
from .opening import open_state
from .selection import Selection, selection_from_environment

FAILURES = (OSError, ValueError, RuntimeError, KeyError, NotImplementedError, dfvfs_errors.Error, Qcow2Error)
_CHUNK = 1 << 20  # of content compared at a time
_KEPT = 64  # file systems whose later states are kept; each holds two open volumes
_PARTITIONS = frozenset(
    (definitions.TYPE_INDICATOR_APM, definitions.TYPE_INDICATOR_GPT, definitions.TYPE_INDICATOR_TSK_PARTITION)
)
_TIMES = tuple(
    f"{name}_time" for name in ["access", "added", "backup", "change", "creation", "deletion", "modification"]
)
_STAT = ("device_number", "group_identifier", "inode_number", "mode", "number_of_links", "owner_identifier")
_IN_FILE_SYSTEM = ("identifier", "inode", "mft_attribute", "mft_entry")  # beside a location, of one state alone

_plans: dict[tuple[str, str], dict[SnapshotKey, tuple[SnapshotKey | None, ...]]] = {}
_known: OrderedDict[tuple[int, str, str], list[LaterState]] = OrderedDict()
_differences: OrderedDict[tuple[int, str, SnapshotKey, SnapshotKey | None], Spans] = OrderedDict()


def _forget() -> None:
    """Share no open file with the parent of a forked worker."""
    _known.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def states_of(entry: Any, resolver_context: Any) -> list[LaterState]:
    """Return the later states that a file entry of a snapshot is compared with; none for other entries."""
    selection = selection_from_environment()
    if selection is None or getattr(entry.path_spec, "location", None) is None:
        return []
    return later_states(entry.path_spec, selection, resolver_context)


def later_states(path_spec: Any, selection: Selection, resolver_context: Any) -> list[LaterState]:
    """Return the file system of a path specification in the later states that its files are compared with.

    None for a file in no snapshot, or in one that is asked for in full.
    """
    parent = path_spec.parent
    if parent is None or not selection.wants_changed:
        return []
    key = (id(resolver_context), path_spec.type_indicator, parent.comparable)
    found = _known.get(key)
    if found is None:
        found = _known[key] = list(_later_states(path_spec, selection, resolver_context))
        while len(_known) > _KEPT:
            _known.popitem(last=False)
    return found


def _later_states(path_spec: Any, selection: Selection, resolver_context: Any) -> Iterator[LaterState]:
    for snapshot, qcow in snapshots_around(path_spec):
        for later in _compared_with(snapshot, qcow, selection, resolver_context):
            try:
                yield LaterState(path_spec, qcow, snapshot, later, resolver_context)
            except FAILURES:
                continue  # what cannot be opened has no file in the same way


def _compared_with(
    snapshot: SnapshotKey, qcow: Any, selection: Selection, resolver_context: Any
) -> tuple[SnapshotKey | None, ...]:
    if snapshot.deleted or snapshot.recovered:
        return (None,) if selection.is_reduced(snapshot) else ()
    known = (qcow.comparable, selection.text)
    if known not in _plans:
        try:
            _plans[known] = selection.later_states(open_image(qcow, resolver_context))
        except FAILURES:
            _plans[known] = {}
    return _plans[known].get(snapshot, ())


class LaterState:
    """One file system in a snapshot and in a later state, None for the active one."""

    def __init__(
        self, path_spec: Any, qcow: Any, snapshot: SnapshotKey, later: SnapshotKey | None, resolver_context: Any
    ) -> None:
        self._context = resolver_context
        self._volume_spec = path_spec.parent
        self._twin_spec = _in_state(path_spec.parent, qcow, snapshot, later)
        self._type_indicator = path_spec.type_indicator
        self._volume = resolver.Resolver.OpenFileObject(self._volume_spec, resolver_context=resolver_context)
        self._twin = resolver.Resolver.OpenFileObject(self._twin_spec, resolver_context=resolver_context)
        if self._volume is None or self._twin is None:
            raise OSError("the volume cannot be opened in both states")
        self._shared = _Placement(self._volume_spec, self._twin_spec)
        if self._shared.is_known:
            self._shared.may_differ = _may_differ(qcow, snapshot, later, resolver_context)

    def entry(self, location: str) -> Any:
        """Return the file entry at a location in the later state, None when there is none."""
        return entry_at(self._type_indicator, location, self._twin_spec, self._context)

    def has(self, entry: Any, twin: Any) -> bool:
        """Return whether ``twin``, the entry of the same name in the later state, is the same file as ``entry``.

        False where there is none, and wherever it cannot be known, as where a part of one of them cannot be read.
        """
        if twin is None:
            return False
        try:
            return bool(_described(entry) == _described(twin)) and self._is_same_content(entry, twin)
        except FAILURES:
            return False

    def _is_same_content(self, entry: Any, twin: Any) -> bool:
        if entry.entry_type != definitions.FILE_ENTRY_TYPE_FILE:
            return True
        streams, others = list(entry.data_streams), list(twin.data_streams)
        if [stream.name for stream in streams] != [stream.name for stream in others]:
            return False
        return all(map(self._is_same_stream, [entry] * len(streams), streams, [twin] * len(streams), others))

    def _is_same_stream(self, entry: Any, stream: Any, twin: Any, other: Any) -> bool:
        extents = [(item.extent_type, int(item.offset), int(item.size)) for item in stream.GetExtents()]
        if extents != [(item.extent_type, int(item.offset), int(item.size)) for item in other.GetExtents()]:
            return False
        if extents and (stream.IsDefault() or _size(entry, stream) == _size(twin, other)):
            stored = [extent[1:] for extent in extents if extent[0] != definitions.EXTENT_TYPE_SPARSE]
            return all(self._is_same_range(offset, size) for offset, size in stored)
        # Within the metadata of its file system.
        return _is_same_file(_opened(entry, stream), _opened(twin, other))

    def _is_same_range(self, offset: int, size: int) -> bool:
        if not self._shared.may_differ_in(offset, size):
            return True
        return all(
            not self._shared.may_differ_in(start, min(_CHUNK, offset + size - start))
            or _piece(self._volume, start, offset + size) == _piece(self._twin, start, offset + size)
            for start in range(offset, offset + size, _CHUNK)
        )


class _Placement:
    """Where a volume is on the disk of both states, when it is a part of it or all of it."""

    def __init__(self, volume: Any, twin: Any) -> None:
        one, two = (_offset_on_disk(spec) for spec in (volume, twin))
        self.is_known = one is not None and one == two
        self._offset = one or 0
        self.may_differ = Spans(())

    def may_differ_in(self, offset: int, size: int) -> bool:
        """Return whether a range of the volume may differ between the states."""
        return not self.is_known or self.may_differ.overlap([(self._offset + offset, size)]) > 0


def _offset_on_disk(path_spec: Any) -> int | None:
    offset = 0
    while path_spec.type_indicator in _PARTITIONS:
        system = volume_system_factory.Factory.NewVolumeSystem(path_spec.type_indicator)
        root = factory.Factory.NewPathSpec(path_spec.type_indicator, location="/", parent=path_spec.parent)
        system.Open(root)
        volume = system.GetVolumeByIdentifier(path_spec.location.strip("/"))
        if volume is None or len(volume.extents) != 1:
            return None
        offset += int(volume.extents[0].offset)
        path_spec = path_spec.parent
    is_disk = path_spec.type_indicator in (definitions.TYPE_INDICATOR_QCOW, definitions.TYPE_INDICATOR_ENCODED_STREAM)
    return offset if is_disk else None


def _may_differ(qcow: Any, snapshot: SnapshotKey, later: SnapshotKey | None, resolver_context: Any) -> Spans:
    key = (id(resolver_context), qcow.comparable, snapshot, later)
    if key not in _differences:
        from qcow2_forensics.compare import possible_differences  # numpy: only where it is needed

        before = open_state(qcow, resolver_context, snapshot).disk
        after = open_state(qcow, resolver_context, later).disk
        _differences[key] = Spans(item[:2] for item in possible_differences(before, after))
        while len(_differences) > _KEPT:
            _differences.popitem(last=False)
    return _differences[key]


def _in_state(path_spec: Any, qcow: Any, snapshot: SnapshotKey, later: SnapshotKey | None) -> Any:
    """Return a path specification with another state of one of the images it leads through."""
    if path_spec.type_indicator == definitions.TYPE_INDICATOR_ENCODED_STREAM and path_spec.parent is qcow:
        if later is None:
            return qcow
        return factory.Factory.NewPathSpec(path_spec.type_indicator, encoding_method=later.encoding_method, parent=qcow)
    if path_spec.parent is None:
        raise ValueError("the path specification leads through no such image")
    known = {name: getattr(path_spec, name) for name in factory.Factory.PROPERTY_NAMES if hasattr(path_spec, name)}
    if known.get("location"):
        known = {name: value for name, value in known.items() if name not in _IN_FILE_SYSTEM}
    parent = _in_state(path_spec.parent, qcow, snapshot, later)
    return factory.Factory.NewPathSpec(path_spec.type_indicator, parent=parent, **known)


def entry_at(type_indicator: str, location: str, parent: Any, resolver_context: Any) -> Any:
    """Return the file entry at a location of the file system in a volume, None when there is none."""
    spec = factory.Factory.NewPathSpec(type_indicator, location=location, parent=parent)
    try:
        return resolver.Resolver.OpenFileEntry(spec, resolver_context=resolver_context)
    except FAILURES:
        return None


# --- one file ------------------------------------------------------------------------------------


def _described(entry: Any) -> tuple[Any, ...]:
    """Return how a file entry describes its file, all that plaso shows of it, and where it is."""
    spec, stat = entry.path_spec, entry.GetStatAttribute()
    where = [getattr(spec, name, None) for name in ("location", *_IN_FILE_SYSTEM)]
    facts = [getattr(stat, name, None) for name in _STAT]
    attributes = () if entry.type_indicator == definitions.TYPE_INDICATOR_NTFS else entry.attributes
    names = [getattr(attribute, "name", None) for attribute in attributes]
    times = [_time(getattr(entry, name, None)) for name in _TIMES]
    return entry.entry_type, entry.size, entry.IsAllocated(), entry.link, where, facts, names, times


def _time(value: Any) -> Any:
    if value is None:
        return None
    timestamp = getattr(value, "timestamp", None)
    return type(value), value.CopyToDateTimeString() if timestamp is None else timestamp


def _opened(entry: Any, stream: Any) -> Any:
    opened = entry.GetFileObject(data_stream_name=stream.name)
    if opened is None:
        raise OSError("the content cannot be opened")
    return opened


def _size(entry: Any, stream: Any) -> int:
    return int(_opened(entry, stream).get_size())


def _is_same_file(one: Any, two: Any) -> bool:
    size = one.get_size()
    return bool(size == two.get_size()) and all(
        _piece(one, start, size) == _piece(two, start, size) for start in range(0, size, _CHUNK)
    )


def _piece(opened: Any, start: int, end: int) -> bytes:
    """Return a piece of a file or volume, whole; raises OSError."""
    wanted = min(_CHUNK, end - start)
    opened.seek(start, os.SEEK_SET)
    data = bytes(opened.read(wanted))
    if len(data) != wanted:
        raise OSError(f"the content ends {wanted - len(data)} bytes early")
    return data
