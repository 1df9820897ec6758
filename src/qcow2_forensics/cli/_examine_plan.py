"""Which parts an examination of an image has, each as the command line that it is."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from ..errors import Qcow2Error
from ..files.volumes import need_back_end
from ..text import plural
from . import _examine_parts as parts

PAIRS = 500  # of neighbouring states compared without --last
_FEWEST_PAIRS = 20  # of an image with very many snapshots:
_ENTRIES_READ = 1_000_000  # each comparison reads the snapshot table, and an image can list 65,536
_MEMORIES = 50  # looked at, the latest


class Step(NamedTuple):
    """One part that is going to run: the command line it is, and who runs it."""

    kind: str
    title: str  # as the evidence has it
    stem: str  # of the names of its files
    command: tuple[str, ...]
    work: parts.Work


def plan(args: Namespace, path: str) -> tuple[list[Step], list[str]]:
    """Return the parts to run over an image, and why some are not."""
    typed = _typed(path)
    keys = _options(args, "passphrase_file")
    memory = [*keys, *_options(args, "assume")]
    folders = _options(args, "backing_dir")
    case = _options(args, "case", "examiner", "note")
    disk = [*keys, *folders, *_options(args, "backing_file", "no_backing", "eof", "assume", "virtual_size")]
    hashed = ["--hash"] if args.hash else []
    unseen: list[str] = []
    try:
        states, memories = parts.states_of(path)
    except Qcow2Error as error:
        unseen.append(f"the states of the image: {error}")
        states, memories = [], []
    with_files = _with_files(args, unseen) if len(states) > 1 else False
    audit = ("audit", typed, "--depth", "deep", "--format", "html", *hashed, *case, *folders)
    size = _options(args, "virtual_size")
    steps = [
        Step("audit", "audit", "audit", audit, parts.run_audit),
        _snapshots("snapshots", "snapshots, deleted ones included", typed, "--deleted"),
        _snapshots("recovered", "recovered states", typed, "--recovered", *size),
    ]
    pairs = list(enumerate(pairwise(states), 1))
    kept = pairs[-(args.last or min(PAIRS, max(_FEWEST_PAIRS, _ENTRIES_READ // len(pairs)))) :] if pairs else []
    if len(pairs) > len(kept) and not args.last:
        unseen.append(
            f"what differs in the first {plural(len(pairs) - len(kept), 'pair')} of states: name more with --last"
        )
    for number, (before, after) in kept:
        choice = (f"--from={before.choice}", f"--to={after.choice}", *(["--files"] if with_files else []))
        guest = _options(args, "guest_passphrase_file") if with_files else ()
        command = ("diff", typed, *choice, "--format", "html", *case, *disk, *guest)
        steps.append(Step("diff", f"{before.label} → {after.label}", f"diff-{number}", command, parts.run_diff))
    command = ("timeline", typed, "--no-files", "--deleted", "--format", "html", *case, *disk)
    steps.append(Step("timeline", "timeline of the image", "timeline", command, parts.run_timeline))
    if len(memories) > _MEMORIES:
        unseen.append(
            f"{plural(len(memories) - _MEMORIES, 'memory', 'memories')} before the last {_MEMORIES}: qcow2-forensics memory shows one by one"
        )
    for number, state in list(enumerate(memories, 1))[-_MEMORIES:]:
        command = ("memory", typed, f"--snapshot={state.choice}", "--summary", "json", *memory)
        steps.append(Step("memory", f"memory of {state.label}", f"memory-{number}", command, parts.run_memory))
    what = _options(args, "limit") if args.pieces else ["--index-only"]
    command = ("residue", typed, "residue", *what, *folders)
    steps.append(Step("residue", "residue", "residue", command, parts.run_residue))
    return steps, unseen


def _snapshots(kind: str, title: str, path: str, *options: str) -> Step:
    return Step(kind, title, kind, ("snapshots", path, *options, "--format", "json"), parts.run_snapshots)


def deleted_memories(args: Namespace, path: str, rows: Iterable[Mapping[str, Any]], unseen: list[str]) -> list[Step]:
    """Return the parts for deleted snapshots that held memory."""
    held = [row for row in rows if row.get("deleted") and row["open_as"] and row["vm_state_size"]]
    if len(held) > _MEMORIES:
        unseen.append(f"the memories of {len(held) - _MEMORIES} deleted snapshots: there are too many")
    steps = []
    for number, row in enumerate(held[:_MEMORIES], 1):
        read_as = _options(args, "passphrase_file", "assume")
        command = ("memory", _typed(path), f"--snapshot={row['open_as']}", "--summary", "json", *read_as)
        title = f"memory of the deleted snapshot {row['name'] or row['id']}"
        steps.append(Step("memory", title, f"memory-deleted-{number}", command, parts.run_deleted_memory))
    return steps


def _typed(path: str) -> str:
    """Return a path that no command takes for an option."""
    return f"./{path}" if path.startswith("-") else path


def _with_files(args: Namespace, unseen: list[str]) -> bool:
    """Whether files are compared too; where that was not declined but cannot be done, say why."""
    if args.no_files:
        return False
    try:
        need_back_end()
    except Qcow2Error as error:
        unseen.append(f"the files of the states: {error}; --no-files leaves them out")
        return False
    return True


def _options(args: Namespace, *names: str) -> list[str]:
    """Return options of this command as they are typed for another one."""
    typed: list[str] = []
    for name in names:
        value = getattr(args, name)
        if name == "eof" and value == "strict":  # the default
            continue
        option = f"--{name.replace('_', '-')}"
        values: Iterable[Any] = value if isinstance(value, list) else () if value in (None, False) else (value,)
        for one in values:
            text = "=".join(one) if isinstance(one, tuple) else str(one)
            typed += [option] if one is True else [f"{option}={text}"] if text.startswith("-") else [option, text]
    return typed


def left_out(args: Namespace) -> list[str]:
    """Return what the options leave out."""
    found = []
    if args.no_files:
        found.append("files of the states: --no-files")
    if args.last:
        found.append(f"all but the last {plural(args.last, 'pair')} of neighbouring states: --last {args.last}")
    if not args.pieces:
        found.append("the bytes of residue: --pieces writes them")
    if not args.hash:
        found.append("the SHA-256 of the image: --hash adds it")
    return found
