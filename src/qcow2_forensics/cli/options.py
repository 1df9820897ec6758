"""The options that say which disk is meant, shared by every subcommand that opens one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack

from ..errors import Locked, Qcow2Error
from ..format.image import Image
from ..reader.damage_options import ASSUMPTIONS, parse_assumptions, parse_size
from ..reader.disk import Disk, Layer
from ..reader.named_files import named_files
from ..reader.opening import MissingPolicy, open_disk
from ..reader.passphrases import (
    KEY_FILE_VARIABLE,
    PASSPHRASE_VARIABLE,
    passphrases_from_environment,
    passphrases_from_files,
)
from ..reader.resolver import COMMAND_LINE, Resolver
from ..reader.states import Backing, Choice, SnapshotName, choose
from ..text import cut, printable

SNAPSHOT_HELP = (
    "a snapshot instead of the active state: its ID or name, index:N (from 0) or #N (from 1) for its place in the "
    "table, deleted:X for one that is in no table; id:X or name:X where the ID or name X means another state too"
)
KEY_HELP = (
    "file with the passphrase of an encrypted image, or of one below it (repeatable: each is tried on each); "
    f"or set {PASSPHRASE_VARIABLE} or {KEY_FILE_VARIABLE}"
)


def add_disk_arguments(parser: argparse.ArgumentParser, *, snapshot: bool = True) -> None:
    """Add the options that :func:`open_from` reads."""
    if snapshot:
        parser.add_argument("--snapshot", metavar="STATE", help=SNAPSHOT_HELP)
    add_key_arguments(parser)
    add_recovery_arguments(parser)
    group = parser.add_argument_group("backing and data files")
    add_backing_folders(
        group,
        "a further folder in which files the image names may be opened, or files of the same base name that "
        "stand in for them (repeatable)",
    )
    group.add_argument(
        "--backing-file",
        metavar="NAME=PATH[,format=FORMAT]",
        action="append",
        default=[],
        help="the file to open where the image says NAME, with its format where that is another than the image "
        "records; =PATH where it names no data file (repeatable)",
    )
    group.add_argument(
        "--no-backing",
        action="store_true",
        help="read this file alone: ranges it does not hold read as zeros, not as the backing file's bytes",
    )
    parser.add_argument(
        "--eof",
        choices=("strict", "zeros"),
        default="strict",
        help="what lies past the end of a cut-off file is an error (default), or zeros as QEMU has it",
    )


def add_recovery_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for damaged images that :func:`open_from` reads."""
    group = parser.add_argument_group("damaged images")
    add_assume_argument(group)
    group.add_argument(
        "--virtual-size",
        metavar="BYTES",
        type=bytes_of,
        help="the size of a recovered disk where nothing in the file gives it, as 20G",
    )


def add_assume_argument(parser: argparse._ActionsContainer) -> None:
    """Add the option that states what a damaged header should say."""
    parser.add_argument(
        "--assume",
        metavar="FIELD=VALUE",
        action="append",
        type=_assumption,
        default=[],
        help=f"read the image as if its header said so: compression={'|'.join(ASSUMPTIONS['compression'])}, "
        "extended-l2=on|off, version=2|3, cluster-size=BYTES (repeatable)",
    )


def add_guest_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options about the volumes in the guest."""
    parser.add_argument(
        "--guest-passphrase-file",
        metavar="FILE",
        action="append",
        default=[],
        help="file with a passphrase to try on LUKS and BitLocker volumes inside the guest (repeatable)",
    )


def add_backing_folders(parser: argparse._ActionsContainer, help_text: str) -> None:
    """Add the option for further folders in which files that an image names may be."""
    parser.add_argument(
        "--backing-dir", metavar="DIR", action="append", type=_existing_folder, default=[], help=help_text
    )


def _existing_folder(text: str) -> str:
    """Return the name of a folder that an option gives; there must be one."""
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{printable(text)} is not a folder")
    return text


def _assumption(text: str) -> tuple[str, str]:
    try:
        ((field, value),) = parse_assumptions(text).items()
    except Qcow2Error as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except ValueError:  # none or several
        raise argparse.ArgumentTypeError("write one FIELD=VALUE; the option is repeatable") from None
    return field, value


def bytes_of(text: str) -> int:
    """Return a number of bytes written as ``4096``, ``64K``, ``20G`` or ``1.5T``."""
    try:
        return parse_size(text)
    except Qcow2Error as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count_up_to(most: int) -> Callable[[str], int]:
    """Return what reads a number of an option, from 1 to ``most``."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and 1 <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"a number from 1 to {most} is needed")
        return int(text)

    return read


def add_key_arguments(parser: argparse.ArgumentParser, help_text: str = f"{KEY_HELP}, or be asked") -> None:
    """Add the option for passphrases; never a passphrase itself, which others could see."""
    parser.add_argument("--passphrase-file", metavar="FILE", action="append", default=[], help=help_text)


def passphrases_of(args: argparse.Namespace) -> list[bytes] | None:
    """Return the passphrases from the files or else the environment, None when neither gives one.

    What was asked for before is not asked again.
    """
    asked: list[bytes] = getattr(args, "asked_passphrases", [])
    return [
        *asked,
        *(passphrases_from_files(args.passphrase_file) if args.passphrase_file else passphrases_from_environment()),
    ] or None


def ask_passphrase(method: str, member: str) -> bytes:
    """Ask on the terminal; raises :class:`Locked` where there is none."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise Locked(
            method,
            f"set {PASSPHRASE_VARIABLE} or {KEY_FILE_VARIABLE}, or give --passphrase-file",
            member=member,
        )
    try:
        import getpass  # here: few images need it

        return os.fsencode(getpass.getpass("Passphrase: "))
    except (EOFError, UnicodeError):
        print(file=sys.stderr)  # the prompt has no end of line yet
        raise Locked(method, "no passphrase was typed", member=member) from None


def unlock_by_asking(disk: Disk) -> list[bytes]:
    """Ask for passphrases until every layer is open; returns them. One that opens nothing further is an error."""
    asked: list[bytes] = []
    while disk.is_locked:
        member = disk.locked_member
        if asked:
            print(f"The next one is for {printable(member)}.", file=sys.stderr)
        asked.append(ask_passphrase(disk.locked_method, member))
        try:
            disk.unlock(asked[-1])
        except Locked as error:
            if error.member == member:
                raise
    return asked


def resolver_of(args: argparse.Namespace) -> Resolver:
    """Return the policy the options widen."""
    files, formats = named_files(args.backing_file, "--backing-file")
    return Resolver(folders=args.backing_dir, files=files, formats=formats, remedies=COMMAND_LINE)


def open_with(
    args: argparse.Namespace, state: SnapshotName, passphrases: list[bytes] | None, missing: MissingPolicy = "refuse"
) -> Disk:
    """Open a state of the image as the options say, with these passphrases; it may stay locked."""
    return open_disk(
        args.image,
        state,
        passphrases,
        resolver_of(args),
        eof=args.eof,
        missing=missing,
        follow=not args.no_backing,
        assume=dict(args.assume),
        virtual_size=args.virtual_size,
    )


def open_from(args: argparse.Namespace, snapshot: SnapshotName = None, *, missing: MissingPolicy = "refuse") -> Disk:
    """Open the disk the options mean, or another state, asking for a passphrase when it is locked."""
    state = snapshot if snapshot is not None else getattr(args, "snapshot", None)
    disk = open_with(args, state, passphrases_of(args), missing)
    if disk.is_locked:
        try:
            args.asked_passphrases = unlock_by_asking(disk)
        except BaseException:
            disk.close()
            raise
    return disk


def chosen(path: str, text: str) -> Choice:
    """Return the state of an image that ``text`` means."""
    with Image(path) as image:  # one for each: what a deleted snapshot no longer owns is refused in its image
        return choose(image, text)


def open_layer(
    args: argparse.Namespace, state: Choice, stack: ExitStack, *, missing: MissingPolicy = "refuse"
) -> Layer:
    """Open a state, the disk below the image too, until ``stack`` ends."""
    if not isinstance(state, Backing):
        return stack.enter_context(open_from(args, state, missing=missing))
    disk = stack.enter_context(open_from(args))
    if disk.backing is None:
        raise Qcow2Error(f"{cut(args.image)} has no backing file")
    return disk.backing
