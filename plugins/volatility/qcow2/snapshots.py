"""The plugin ``qcow2.snapshots.Snapshots``."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from volatility3.framework.renderers import format_hints

from . import choice, common
from .evidence import ABSENT, EvidencePlugin, Row, hexadecimal
from .options import TIMELINE_VARIABLE

if TYPE_CHECKING:
    from volatility3.plugins.timeliner import TimeLinerType

NOT_COUNTED = -1  # what QEMU stores where the guest's instructions are not counted


def _bases() -> tuple[type, ...]:
    """Return the classes of the plugin: a part of the timeline only when that is asked for.

    Volatility's timeliner (2.28) emits the rows of all earlier plugins again, under the time of the last one: with the
    snapshots in it every row would carry the date of a snapshot as well.
    """
    if not os.environ.get(TIMELINE_VARIABLE):
        return (EvidencePlugin,)
    from volatility3.plugins import timeliner

    return EvidencePlugin, timeliner.TimeLinerInterface


class Snapshots(*_bases()):  # type: ignore[misc]
    """Lists the internal snapshots of a QCOW2 image, and which of them hold memory."""

    hidden = False
    columns = (
        ("ID", str),
        ("Name", str),
        ("Date", dt.datetime),
        ("Guest uptime", str),
        ("VM state bytes", int),
        ("Disk bytes", int),
        ("Instructions", int),
        ("Chosen", bool),
        ("Offset", format_hints.Hex),
    )

    def _rows(self) -> Iterator[Row]:
        from qcow2_forensics import Qcow2Error
        from qcow2_forensics.text import date_note, printable

        image = self.image()
        chosen = None
        try:
            made = choice.choose(image, self.wanted(), printable(image.name))
            chosen = made.snapshot if made is not None else None
        except Qcow2Error as error:
            common.warn(str(error))
        for problem in image.problems:
            if problem.blocks & {"disk", "snapshots"}:
                common.warn(f"{printable(image.name)}: {problem.error()}")
        for entry in image.snapshots:
            if date_note(entry.date_nsec):
                common.warn(
                    f"{printable(image.name)}: the recorded date of snapshot {choice.describe(entry)} is invalid"
                )
            yield (
                0,
                (
                    printable(entry.id),
                    printable(entry.name),
                    choice.snapshot_date(entry),
                    str(dt.timedelta(microseconds=entry.vm_clock_nsec // 1000)),
                    entry.vm_state_size,
                    ABSENT() if entry.disk_size is None else entry.disk_size,
                    ABSENT() if entry.icount in (None, NOT_COUNTED) else entry.icount,
                    entry == chosen,
                    hexadecimal(entry.offset),
                ),
            )

    def generate_timeline(self) -> Iterator[tuple[str, TimeLinerType, dt.datetime]]:
        """Yield when each snapshot was taken, by the clock of the host."""
        from volatility3.plugins import timeliner

        for entry in self.image().snapshots:
            memory = "with memory" if entry.vm_state_size else "without memory"
            words = f"QCOW2 snapshot {choice.describe(entry)} {memory} taken (host clock)"
            yield words, timeliner.TimeLinerType.CREATED, choice.snapshot_date(entry)
