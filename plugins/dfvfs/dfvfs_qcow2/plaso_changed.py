"""``--qcow_snapshots changed``: files of a snapshot that a later state has in the same way are not processed again.

Workers look through a folder of a snapshot and of the later states side by side, and produce event sources
for what differs. What is asked for comes to them by the environment, however they are started.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

from plaso.engine import worker as stock

from .later_states import FAILURES, LaterState, entry_at, states_of
from .wrapping import wrap_method

# Parsers read these together with other files, which may differ: a Chrome cache, OneDrive logs, a Spotlight
# store, user access logs, unified logs.
_READ_WITH_OTHERS = re.compile(r"index|.*\.(?:odl|odlgz|odlsent|aodl|tracev3|mdb)|\.?store\.db", re.IGNORECASE)
_WRITE_AHEAD = "-wal"  # of an SQLite database, which is read with it

_Find = Callable[[str], Any]  # a file of the same folder, by its name


def repeats(entry: Any, resolver_context: Any) -> bool:
    """Return whether a file of a snapshot is in a later state that is processed too, in the same way."""
    states = states_of(entry, resolver_context)
    if not states:
        return False
    folder = entry.path_spec.location.removesuffix(entry.name)

    def here(name: str) -> Any:
        return entry_at(entry.type_indicator, f"{folder}{name}", entry.path_spec.parent, resolver_context)

    def there(state: LaterState, name: str) -> Any:
        return state.entry(f"{folder}{name}")

    return _is_in_one_of(entry, here, [(state, partial(there, state)) for state in states])


def _is_in_one_of(entry: Any, here: _Find, later: Sequence[tuple[LaterState, _Find]]) -> bool:
    if entry.IsDirectory():
        return any(state.has(entry, there(entry.name)) for state, there in later)
    log = f"{entry.name}{_WRITE_AHEAD}"
    return (
        _READ_WITH_OTHERS.fullmatch(entry.name) is None
        and any(state.has(entry, there(entry.name)) and there(log) is None for state, there in later)
        and here(log) is None
    )


class _Folder:
    """A folder of a snapshot that yields its folders, and the files that no later state has in the same way."""

    def __init__(self, folder: Any, states: list[LaterState]) -> None:
        self._folder = folder
        self._states = states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._folder, name)

    @cached_property
    def _listed(self) -> dict[str, Any]:
        return _listed(self._folder)

    @property
    def sub_file_entries(self) -> Iterator[Any]:
        location = self._folder.path_spec.location
        later = [(state, _listed(state.entry(location)).get) for state in self._states]
        for entry in self._folder.sub_file_entries:
            if entry.IsDirectory() or not _is_in_one_of(entry, self._find, later):
                yield entry

    def _find(self, name: str) -> Any:
        return self._listed.get(name)


def _listed(folder: Any) -> dict[str, Any]:
    try:
        return {} if folder is None else {entry.name: entry for entry in folder.sub_file_entries}
    except FAILURES:
        return {}


def _process_directory(stock_method: Any, worker: Any, mediator: Any, folder: Any) -> None:
    states = states_of(folder, mediator.resolver_context)
    stock_method(worker, mediator, _Folder(folder, states) if states else folder)


def _process_file_entry(stock_method: Any, worker: Any, mediator: Any, entry: Any) -> None:
    if not repeats(entry, mediator.resolver_context):
        stock_method(worker, mediator, entry)


wrap_method(stock.EventExtractionWorker, "_ProcessDirectory", _process_directory)
wrap_method(stock.EventExtractionWorker, "_ProcessFileEntry", _process_file_entry)
