#!/usr/bin/env python3
"""Write the page about all findings from the rules themselves.

    tools/write_findings_page.py > docs/findings.md

A test keeps that page fresh.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from qcow2_forensics.audit import INCOMPLETE, LIMITED, UNREADABLE, catalog
from qcow2_forensics.audit.rules import CHAPTERS, Rule
from qcow2_forensics.findings import EVIDENCE_LIMIT, SCHEMA_VERSION, Severity
from qcow2_forensics.limits import ACCOUNT_REMAINDERS, ACCOUNT_ROWS, FINDINGS_PER_RULE
from qcow2_forensics.text import sentence

_VALIDATION = {
    "QEMU-made": "on images whose state QEMU itself produced",
    "crafted": "on images edited byte by byte",
    "derived": "from the text of the format",
}

_INTRODUCTION = f"""\
# Findings

<!-- Written by `tools/write_findings_page.py`; edit the rules, not this page. -->

A finding is an observation: what was seen, where it is in the file, and what it is consistent with. Conclusions are the
examiner's. Codes and severities are stable.

| severity | meaning |
|---|---|
| Critical | container metadata itself is exposed or overwritten |
| High | data is unreadable, at risk, or was made to mislead |
| Medium | needs an examiner's eye: evidence elsewhere, hidden, or left behind |
| Low | worth knowing; common on healthy images |
| Info | describes the image |

| depth | reads | finds |
|---|---|---|
| `triage` | header, extensions, snapshot table, names | in milliseconds |
| `standard` | every table and every refcount, each once | also everything `qemu-img check` counts |
| `deep` | free space and slack too, and decodes every compressed cluster | also residue |

Each finding says how it was validated: *QEMU-made* {_VALIDATION["QEMU-made"]}; *crafted* {_VALIDATION["crafted"]};
*derived* {_VALIDATION["derived"]}. Every code is tested on an image that triggers it and on a near miss that does not.

## The report as JSON

`Report.to_dict()`, `audit --format json` and each line of `audit --format jsonl` hold the same, under `schema` {SCHEMA_VERSION}:

| key | value |
|---|---|
| `schema` | version of this layout; raised when a reader of an older one would be misled |
| `tool` | what made the report, with its version |
| `depth` | `triage`, `standard` or `deep` |
| `image` | what was audited: `path`, `file_size`, `version`, `virtual_size`, `cluster_size`, `snapshots`, `bitmaps`, `backing_file`, `backing_format`, `data_file`, `encryption`, `refcount_bits`; null where there is none or it cannot be read; `unreadable` names what cannot be read: `snapshots`, `bitmaps`, `backing_file`, `backing_format`, `data_file`, `l1_table`, `refcount_table` |
| `check` | the fields of `qemu-img check --output=json`, equal to QEMU's; null at triage, for version 1, and where QEMU's check stops without counters |
| `findings` | list, worst first: `code`, `severity`, `title`, `note`, `confidence`, `scope` (always empty), `explained_by` (codes in the same report that account for it), `count`, `evidence` |
| `details` | further data: `account` (below), and what some commands add |

`details.account.files` has an account for the image (`file` is empty) and, at `deep`, for its external data file (`data`):

| key | value |
|---|---|
| `size` | bytes of the file |
| `exact` | true at `deep`: every byte is accounted for, remainders are read. At `standard` the account is of metadata and allocation, and no data is read |
| `unaccounted_bytes`, `unaccounted_runs` | remainders: their bytes that are not zero, and in how many runs; null at `standard` |
| `overlapping_bytes` | bytes that several structures claim |
| `totals` | list of `what`, `owner`, `remainder` (true where nothing accounts for it), `bytes`, and of remainders that were read `nonzero` |
| `rows` | list of `offset`, `length`, `what`, `owner`, `remainder`, `nonzero`, and `claims` where several claim it; rising, without gaps, they tile the file. Left out of JSON lines. Above {ACCOUNT_ROWS:,} rows those between remainders that are not zeros are joined |
| `rows_joined` | how many rows are part of a joined one |
| `remainders` | the first {ACCOUNT_REMAINDERS:,} rows of remainders that are not zeros |

An item of `evidence` has `field` and `value`, and where they apply `offset` and `length` (bytes in the file), `structure`,
`guest_offset` (bytes in the virtual disk), `snapshot` (ID, absent for the active state) and `file` (absent for the image
itself). At most {EVIDENCE_LIMIT} items are listed per finding; `count` says how many there were. Where there are more, those listed are spread
over the structures that are hit: every structure keeps its first items, and of too many structures every second, then every fourth
is listed. At most {FINDINGS_PER_RULE} findings are listed per code, the worst of them; what is left out is itself a finding, {LIMITED}.
"""

_OUTCOMES = f"""\
## The audit itself

### {UNREADABLE}

**High** · any depth

The file could not be opened or is not a QCOW image; nothing in it was examined. An audit never raises for bad evidence: this
finding stands in for the exception.

### {INCOMPLETE}

**Medium** · any depth

Some rules could not finish; each item names the rule and why. Consistent with damaged metadata or unreadable media.

### {LIMITED}

**Medium** · any depth

The image holds more than the audit lists or follows; each item says what, and how many of it were left out. Consistent with a
very long history, or with decoys.
"""


def page() -> str:
    """Return the page in Markdown."""
    rules = catalog()
    parts = [_INTRODUCTION, "\n".join(_table(rules)), *_chapters(rules), _OUTCOMES]
    return "\n".join(parts)


def _table(rules: dict[str, Rule]) -> Iterator[str]:
    yield "## All codes\n"
    yield "| code | severity | depth | title |\n|---|---|---|---|"
    for entry in rules.values():
        yield f"| [{entry.code}](#{entry.code.lower()}) | {entry.severity.label} | {entry.depth.label} | {entry.title} |"
    counts = {severity: sum(entry.severity is severity for entry in rules.values()) for severity in Severity}
    totals = ", ".join(f"{count} {severity.label}" for severity, count in sorted(counts.items(), reverse=True))
    yield f"\n{len(rules)} codes: {totals}.\n"


def _chapters(rules: dict[str, Rule]) -> Iterator[str]:
    for section in dict.fromkeys(entry.section for entry in rules.values()):
        yield f"## {CHAPTERS[section]}\n"
        for entry in rules.values():
            if entry.section == section:
                yield from _entry(entry)


def _entry(entry: Rule) -> Iterator[str]:
    yield f"### {entry.code}\n"
    yield f"**{entry.severity.label}** · {entry.depth.label} · {entry.validated}\n"
    yield f"{sentence(entry.title)}. {sentence(entry.note)}.\n"
    if entry.when:
        yield f"- Reported when {entry.when}."
    if entry.harmless:
        yield f"- Harmless: {entry.harmless}."
    if entry.explained_by:
        yield f"- Accounted for by {', '.join(entry.explained_by)} when that is found too."
    yield ""


if __name__ == "__main__":
    sys.stdout.write(page())
