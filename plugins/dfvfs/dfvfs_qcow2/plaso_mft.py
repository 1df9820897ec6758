"""``--qcow_snapshots changed``: records of an NTFS ``$MFT`` give no rows that the ``$MFT`` of a later state gives too.

The file lists all files of its file system with their times, so each state has another one, in which most records say
the same. A row also names the folders above its file, which other records hold: what is compared are rows, record
by record.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pyfsntfs
from plaso.parsers import ntfs as stock

from .later_states import FAILURES, states_of
from .wrapping import wrap_method

_NUMBER = (1 << 48) - 1  # of a record, in a file reference; the rest is its sequence number


class _Rows:
    """A mediator that keeps what a record gives."""

    def __init__(self, mediator: Any) -> None:
        self._mediator = mediator
        self.rows: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mediator, name)

    # The names below are those of plaso's mediator.

    def ProduceEventData(self, event_data: Any, *_args: Any, **_kwargs: Any) -> None:  # noqa: N802
        """Keep a row."""
        self.rows.add(_row(event_data))

    def ProduceWarning(self, *_args: Any, **_kwargs: Any) -> None:  # noqa: N802
        """Give no warning: the later state gives its own."""


class _NewRows:
    """A mediator that passes on what none of the later tables gives for the same record."""

    def __init__(self, mediator: Any, tables: list[Any]) -> None:
        self._mediator = mediator
        self._tables = tables
        self._known: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mediator, name)

    def look_at(self, stock_method: Any, parser: Any, number: int) -> None:
        """Learn what the later tables give for a record."""
        rows = _Rows(self._mediator)
        for table in self._tables:
            with suppress(*FAILURES):  # what cannot be read repeats nothing
                record = table.get_file_entry(number) if number < table.number_of_file_entries else None
                if record is not None and not record.is_empty() and record.base_record_file_reference == 0:
                    stock_method(parser, rows, record)
        self._known = rows.rows

    def ProduceEventData(self, event_data: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N802
        """Pass on a row, unless it repeats."""
        if _row(event_data) not in self._known:
            self._mediator.ProduceEventData(event_data, *args, **kwargs)


def _row(event_data: Any) -> str:
    """Return all that an event says, with its times as they are stored."""
    values = {name: getattr(value, "timestamp", value) for name, value in event_data.GetAttributes()}
    return f"{event_data.data_type} {sorted(values.items())!r}"


def _parse_file(stock_method: Any, parser: Any, mediator: Any, file_object: Any) -> None:
    tables = list(_later_tables(mediator))
    stock_method(parser, _NewRows(mediator, tables) if tables else mediator, file_object)


def _later_tables(mediator: Any) -> Iterator[Any]:
    entry = mediator.GetFileEntry()
    if entry is None:
        return
    for state in states_of(entry, mediator.resolver_context):
        with suppress(*FAILURES):
            table = pyfsntfs.mft_metadata_file()
            table.open_file_object(state.entry(entry.path_spec.location).GetFileObject())
            yield table


def _parse_record(stock_method: Any, parser: Any, mediator: Any, record: Any) -> None:
    if isinstance(mediator, _NewRows):
        mediator.look_at(stock_method, parser, record.file_reference & _NUMBER)
    stock_method(parser, mediator, record)


wrap_method(stock.NTFSMFTParser, "ParseFileObject", _parse_file)
wrap_method(stock.NTFSMFTParser, "_ParseMFTEntry", _parse_record)
