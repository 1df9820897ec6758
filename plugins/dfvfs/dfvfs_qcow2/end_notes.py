"""What a run has to say at its end, when plaso's status window has wiped what was printed before it."""

from __future__ import annotations

from collections import Counter

from qcow2_forensics import Severity
from qcow2_forensics.text import plural, printable

_MOST = 20  # lines about audits in one run

notices: list[str] = []  # of the scan, printed before
audits: list[str] = []  # one line an image


def note_audit(name: str, counts: Counter[Severity]) -> None:
    """Remember how many findings of each severity an image has."""
    found = [f"{counts[severity]} {severity.label}" for severity in sorted(Severity, reverse=True) if counts[severity]]
    audits.append(f"audit: {', '.join(found) or 'no findings'} in {printable(name)}")


def take(*, printed: bool) -> list[str]:
    """Return the texts to print, and forget them; notices only where they are no longer to be seen."""
    shown = [] if printed else list(notices)
    shown += audits[:_MOST]
    if len(audits) > _MOST:
        shown.append(f"audit: and {plural(len(audits) - _MOST, 'more image')}")
    if any(": no findings in " not in line for line in audits):
        shown.append("pinfo --sections warnings lists the findings.")
    notices.clear()
    audits.clear()
    return shown
