"""For each finding the command to type next: what shows more of it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..findings import Finding
from ..text import printable

_TOOL = "qcow2-forensics"
_ASSUMPTION = re.compile(r"[a-z0-9-]+=[a-z0-9]+", re.ASCII)
_SHOWN = 4096  # bytes of a place that are shown


def next_command(finding: Finding, path: str, depth: str = "standard") -> str:
    """Return a command line about a finding of the image at ``path``, empty where there is nothing to add.

    Nothing of it but numbers and snapshot IDs of plain text comes from the evidence.
    """
    image = shlex.quote(printable(path))
    make = _COMMANDS.get(finding.code)
    if make is not None:
        return make(finding, image)
    if depth == "triage":
        return f"{_TOOL} audit {image}"
    return _bytes_at(finding, image)


def _bytes_at(finding: Finding, image: str) -> str:
    """Return the command that shows the bytes of the first place in the image."""
    for item in finding.evidence:
        if item.offset is not None and not item.file:
            return f"xxd -s {item.offset:#x} -l {max(16, min(item.length or 64, _SHOWN))} {image}"
    return ""


def _snapshot(finding: Finding) -> str | None:
    """Return the ID of the snapshot a finding is about where it can be typed as it is, else None."""
    ident = next((item.snapshot for item in finding.evidence if item.snapshot), "")
    return ident if ident.isascii() and ident.isdigit() else None


def _chosen(finding: Finding) -> str:
    ident = _snapshot(finding)
    return "" if ident is None else f" --snapshot {ident}"


def _deleted(finding: Finding, image: str) -> str:
    selector = next((str(item.value) for item in finding.evidence if item.field == "open_as"), "")
    if not selector.removeprefix("deleted:0x").isalnum():
        return f"{_TOOL} snapshots {image} --deleted"
    return f"{_TOOL} export {image} recovered.raw --snapshot {selector}"


def _assuming(otherwise: Callable[[Finding, str], str]) -> Callable[[Finding, str], str]:
    """Return the export under the header field that a finding proposes; another command where it proposes none."""

    def command(finding: Finding, image: str) -> str:
        field = next((str(item.value) for item in finding.evidence if item.field == "read_as"), "")
        if not _ASSUMPTION.fullmatch(field):
            return otherwise(finding, image)
        return f"{_TOOL} export {image} OUT.raw --assume {field}"

    return command


def _residue(kind: str) -> Callable[[Finding, str], str]:
    return lambda _, image: f"{_TOOL} residue {image} residue --kind {kind}"


def _simple(words: str) -> Callable[[Finding, str], str]:
    return lambda _, image: f"{_TOOL} {words.format(image)}"


def _of_snapshot(words: str) -> Callable[[Finding, str], str]:
    return lambda finding, image: f"{_TOOL} {words.format(image)}{_chosen(finding)}"


def commands_after(path: str, parts: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return what an examiner types after an examination: each command with what it is for.

    ``parts`` are those of ``examination.json``. Nothing from the evidence but numbers is part of a command.
    """
    image = shlex.quote(printable(path))
    memories = [part["facts"] for part in parts if part["kind"] == "memory" and part["facts"]]
    systems = {facts["kernel"]["system"] for facts in memories if facts.get("kernel")}
    found = [
        ("every state, and memory, as files for any tool", f"{_TOOL} mount {image} MOUNTPOINT"),
        ("file times of every state", f"{_TOOL} timeline {image} | mactime -b - -d -z UTC"),
        ("the same and more, in plaso", f"log2timeline --qcow_snapshots all --storage_file case.plaso {image}"),
        ("the bytes of residue", f"{_TOOL} residue {image} residue"),
    ]
    for system in sorted(systems):
        found.append(("processes of the latest memory", f"vol -s SYMBOLS -f {image} {system}.pslist"))
    if memories:
        found.append(("memory as a raw file", f"{_TOOL} memory {image} memory.raw --sidecar"))
    if len(memories) > 1:
        found.append(("what changed between the last two memories", f"vol -s SYMBOLS -f {image} qcow2.changes"))
    return [{"what": what, "command": command} for what, command in found]


_NAMES = _simple("info {}")
_CHAIN = _simple("audit {} --backing-dir FOLDER")
_DEEP = _simple("audit {} --depth deep")
_MEMORY = _of_snapshot("memory {} memory.raw")
_CHECK: Callable[[Finding, str], str] = lambda _, image: f"qemu-img check {image}"  # noqa: E731 - a row of the table

_COMMANDS: dict[str, Callable[[Finding, str], str]] = {
    "QCOW2-BACKING-DEEP": _CHAIN,
    "QCOW2-BACKING-FILE": _NAMES,
    "QCOW2-BACKING-MISSING": _CHAIN,
    "QCOW2-BITMAPS": _NAMES,
    "QCOW2-CHECK-ABORTED": _CHECK,
    "QCOW2-CHECK-CORRUPTIONS": _CHECK,
    "QCOW2-CHECK-LEAKS": _residue("leaked"),
    "QCOW2-COMPRESSED-INVALID": _assuming(_bytes_at),
    "QCOW2-COMPRESSED-SLACK": _residue("compressed-slack"),
    "QCOW2-DATAFILE-NAME": _CHAIN,
    "QCOW2-ENCRYPTED": _NAMES,
    "QCOW2-EXTERNAL-DATA": _NAMES,
    "QCOW2-FEATURES": _NAMES,
    "QCOW2-GATEKEEPER": _NAMES,
    "QCOW2-GEOMETRY-CONTRADICTED": _assuming(_simple("snapshots {} --recovered")),
    "QCOW2-HEADER-SLACK": _residue("header-slack"),
    "QCOW2-INTERNAL-SNAPSHOTS": _simple("snapshots {}"),
    "QCOW2-L1-SLACK": _residue("l1-slack"),
    "QCOW2-L1-TABLE-LOST": _residue("leaked"),
    "QCOW2-L2-TABLE-LOST": _assuming(_residue("leaked")),
    "QCOW2-LEAKED-DATA": _residue("leaked"),
    "QCOW2-RECOVERABLE-SNAPSHOT": _deleted,
    "QCOW2-REFCOUNT-HIGH": _CHECK,
    "QCOW2-REFCOUNT-LOW": _CHECK,
    "QCOW2-RESIDUAL-CLUSTERS": _residue("free"),
    "QCOW2-RESIDUAL-SNAPSHOT-ENTRY": _simple("snapshots {} --deleted"),
    "QCOW2-SNAPSHOT": _of_snapshot("export {} snapshot.raw"),
    "QCOW2-SNAPSHOT-ID-GAP": _simple("snapshots {} --deleted"),
    "QCOW2-SNAPSHOT-SIZE-CHANGED": _simple("snapshots {}"),
    "QCOW2-SNAPSHOT-VMSTATE": _MEMORY,
    "QCOW2-SUBCLUSTER-RESIDUE": _residue("subcluster"),
    "QCOW2-TABLE-SLACK": _residue("table-slack"),
    "QCOW2-TRAILING-DATA": _residue("trailing"),
    "QCOW2-VMSTATE-TRACE": _DEEP,
    "QCOW2-WRITER-PROFILE": _NAMES,
    "QCOW2-ZERO-FLAG-V2": _assuming(_bytes_at),
    "QCOW2-ZERO-ALLOC-DATA": _residue("zero-flagged"),
}
