"""What a run has to say at its end, when plaso's status window has wiped what was printed before it.

In an attended run it is part of what the tool prints. Where nobody attends, or a program reads what the tool writes, the
tool prints what it prints without this package, and ours is on the standard error output.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from plaso.cli import tools

from qcow2_forensics import Severity
from qcow2_forensics.text import plural, printable

_MOST = 20  # lines about audits in one run
_HEALTHY = ": no findings in "

notices: list[str] = []  # of the scan, printed before
audits: list[str] = []  # one line an image


def is_attended(tool: Any) -> bool:
    """Whether a tool of plaso's prints for a person."""
    return not tool._unattended_mode and isinstance(tool._output_writer, tools.StdoutOutputWriter)


def say(tool: Any, text: str) -> None:
    """Print a text followed by an empty line."""
    if is_attended(tool):
        tool._output_writer.Write(f"{text}\n\n")
    else:
        sys.stdout.flush()  # what the tool said before comes before, where both go to one place
        sys.stderr.write(f"{text}\n\n")


def note_audit(name: str, counts: Counter[Severity]) -> None:
    """Remember how many findings of each severity an image has."""
    found = ", ".join(f"{counts[item]} {item.label}" for item in sorted(Severity, reverse=True) if counts[item])
    audits.append(f"audit: {found} in {printable(name)}" if found else f"audit{_HEALTHY}{printable(name)}")


def take(*, printed: bool, attended: bool = True) -> list[str]:
    """Return the texts to print, and forget them.

    Notices are only among them where what was ``printed`` is no longer to be seen, healthy images only in ``attended`` runs.
    """
    shown = [] if printed else list(notices)
    lines = [line for line in audits if attended or _HEALTHY not in line]
    shown += lines[:_MOST]
    if len(lines) > _MOST:
        shown.append(f"audit: and {plural(len(lines) - _MOST, 'more image')}")
    if any(_HEALTHY not in line for line in lines):
        shown.append("pinfo --sections warnings lists the findings.")
    notices.clear()
    audits.clear()
    return shown
