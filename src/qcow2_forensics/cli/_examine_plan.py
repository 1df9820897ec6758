"""Which parts an examination of an image has, each as the command line that it is."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from ..errors import Locked, Qcow2Error
from ..files.volumes import need_back_end
from ..reader.opening import open_disk
from ..text import plural
from . import _examine_parts as parts
from .options import passphrases_of

PAIRS = 500  # of neighbouring states compared without --last
_FEWEST_PAIRS = 20  # of an image with very many snapshots:
_ENTRIES_READ = 1_000_000  # each comparison reads the snapshot table, and an image can list 65,536
_MEMORIES = 50  # looked at, the latest


class PlannedPart(NamedTuple):
    """One part that is going to run: the command line it is, and who runs it."""

    kind: str
    title: str  # as the evidence has it
    stem: str  # of the names of its files
    command: tuple[str, ...]
    work: parts.Work


def plan(args: Namespace, path: str) -> tuple[list[PlannedPart], list[str]]:
    """Return the parts to run over an image, and why some are not."""
    image = _typed(path)
    folders, case = _options(args, "backing_dir"), _options(args, "case", "examiner", "note")
    disk = _options(
        args, "passphrase_file", "backing_dir", "backing_file", "no_backing", "eof", "assume", "virtual_size"
    )
    unseen: list[str] = []
    try:
        states, memories = parts.states_of(path)
    except Qcow2Error as error:
        unseen.append(f"the states of the image: {error}")
        states, memories = [], []
    unseen += _locked(args, path)
    hashed = ["--hash"] if args.hash else []
    audit = ("audit", image, "--depth", "deep", "--format", "html", *hashed, *case, *folders)
    timeline = ("timeline", image, "--no-files", "--deleted", "--format", "html", *case, *disk)
    residue = ("residue", image, "residue", *(_options(args, "limit") if args.pieces else ["--index-only"]), *folders)
    steps = [
        PlannedPart("audit", "audit", "audit", audit, parts.run_audit),
        _snapshots("snapshots", "snapshots, deleted ones included", image, "--deleted"),
        _snapshots("recovered", "recovered states", image, "--recovered", *_options(args, "virtual_size")),
        *_differences(args, image, states, [*case, *disk], unseen),
        PlannedPart("timeline", "timeline of the image, without its files", "timeline", timeline, parts.run_timeline),
        *_memories(args, image, memories, unseen),
        PlannedPart("residue", "residue", "residue", residue, parts.run_residue),
    ]
    return steps, unseen


def _locked(args: Namespace, path: str) -> Iterator[str]:
    """Yield that passphrases were given of which none opens the image: most parts would not need one."""
    passphrases = passphrases_of(args)
    if passphrases:
        try:
            open_disk(path, None, passphrases, follow=False).close()
        except Locked as error:
            yield f"the encrypted content: {error}"
        except (Qcow2Error, OSError):
            pass  # for the parts to report


def _snapshots(kind: str, title: str, image: str, *options: str) -> PlannedPart:
    return PlannedPart(kind, title, kind, ("snapshots", image, *options, "--format", "json"), parts.run_snapshots)


def _differences(
    args: Namespace, image: str, states: list[parts.ListedState], options: list[str], unseen: list[str]
) -> Iterator[PlannedPart]:
    """Yield what compares each state with the next."""
    with_files = len(states) > 1 and _with_files(args, unseen)
    files = ["--files"] if with_files else []
    guest = _options(args, "guest_passphrase_file") if with_files else []
    pairs = list(enumerate(pairwise(states), 1))
    most = args.last or min(PAIRS, max(_FEWEST_PAIRS, _ENTRIES_READ // max(len(pairs), 1)))
    if len(pairs) > most and not args.last:
        unseen.append(f"what differs in the first {plural(len(pairs) - most, 'pair')} of states: name more with --last")
    for number, (before, after) in pairs[-most:]:
        choice = (f"--from={before.choice}", f"--to={after.choice}", *files)
        command = ("diff", image, *choice, "--format", "html", *options, *guest)
        yield PlannedPart("diff", f"{before.label} → {after.label}", f"diff-{number}", command, parts.run_diff)


def _memories(
    args: Namespace, image: str, memories: list[parts.ListedState], unseen: list[str]
) -> Iterator[PlannedPart]:
    """Yield what shows each memory."""
    if len(memories) > _MEMORIES:
        left = plural(len(memories) - _MEMORIES, "memory", "memories")
        unseen.append(f"{left} before the last {_MEMORIES}: qcow2-forensics memory shows one by one")
    for number, state in list(enumerate(memories, 1))[-_MEMORIES:]:
        command = _memory_command(args, image, state.choice)
        yield PlannedPart("memory", f"memory of {state.label}", f"memory-{number}", command, parts.run_memory)


def _memory_command(args: Namespace, image: str, choice: str) -> tuple[str, ...]:
    return ("memory", image, f"--snapshot={choice}", "--summary", "json", *_options(args, "passphrase_file", "assume"))


def deleted_memories(
    args: Namespace, path: str, rows: Iterable[Mapping[str, Any]], unseen: list[str]
) -> list[PlannedPart]:
    """Return the parts for deleted snapshots that held memory."""
    held = [row for row in rows if row.get("deleted") and row["open_as"] and row["vm_state_size"]]
    if len(held) > _MEMORIES:
        unseen.append(f"the memories of {len(held) - _MEMORIES} deleted snapshots: there are too many")
    steps = []
    for number, row in enumerate(held[:_MEMORIES], 1):
        command = _memory_command(args, _typed(path), row["open_as"])
        title = f"memory of the deleted snapshot {row['name'] or row['id']}"
        steps.append(PlannedPart("memory", title, f"memory-deleted-{number}", command, parts.run_deleted_memory))
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
    found.append("times of files: qcow2-forensics timeline lists them")
    return found
