"""The options that say which disk is meant, shared by every subcommand that opens one."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from ..errors import Locked, Qcow2Error
from ..format.image import Image
from ..reader.disk import Disk, Layer
from ..reader.opening import MissingPolicy, open_disk
from ..reader.resolver import COMMAND_LINE, Resolver
from ..reader.states import Backing, Choice, SnapshotName, choose
from ..text import cut

PASSPHRASE_VARIABLE = "QCOW2_PASSPHRASE"  # noqa: S105 - the name of a variable, not a secret

_PASSPHRASE_BYTES = 1 << 20  # key files are a few KiB; a device would never end


def add_image_argument(parser: argparse.ArgumentParser) -> None:
    """Add the positional IMAGE."""
    parser.add_argument("image", metavar="IMAGE", help="a QCOW2 (or QCOW) image; it is only read")


SNAPSHOT_HELP = (
    "a snapshot instead of the active state: its ID or name, index:N (from 0) or #N (from 1) for its place in the "
    "table, deleted:X for one that is in no table; id:X and name:X where X may be something else too"
)


def add_disk_arguments(parser: argparse.ArgumentParser, *, snapshot: bool = True) -> None:
    """Add the options that :func:`open_from` reads."""
    if snapshot:
        parser.add_argument("--snapshot", metavar="STATE", help=SNAPSHOT_HELP)
    add_key_arguments(parser)
    group = parser.add_argument_group("backing and data files")
    group.add_argument(
        "--backing-dir",
        metavar="DIR",
        action="append",
        default=[],
        help="a further folder in which files the image names may be opened (repeatable)",
    )
    group.add_argument(
        "--backing-file",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="the file to open where the image says NAME; =PATH where it names no data file (repeatable)",
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


def add_key_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option for a passphrase; never the passphrase itself, which others could see."""
    parser.add_argument(
        "--passphrase-file",
        metavar="FILE",
        help=f"file with the passphrase of an encrypted image; or set {PASSPHRASE_VARIABLE}, or be asked",
    )


def passphrase_of(args: argparse.Namespace) -> bytes | None:
    """Return the passphrase from the file or the environment, None when neither gives one.

    One newline at the end of the file is not part of it. What was asked for before is not asked again.
    """
    asked: bytes | None = getattr(args, "asked_passphrase", None)
    if asked is not None:
        return asked
    if args.passphrase_file:
        with Path(args.passphrase_file).open("rb") as file:
            secret = file.read(_PASSPHRASE_BYTES + 1)
        if len(secret) > _PASSPHRASE_BYTES:
            raise Qcow2Error(f"{cut(args.passphrase_file)} is too long for a passphrase")
        return secret.removesuffix(b"\n")
    value = os.environ.get(PASSPHRASE_VARIABLE)
    return None if value is None else os.fsencode(value)


def ask_passphrase(name: str) -> bytes:
    """Ask on the terminal; raises :class:`Locked` where there is none."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise Locked(name, f"set {PASSPHRASE_VARIABLE} or give --passphrase-file")
    try:
        return os.fsencode(getpass.getpass("Passphrase: "))
    except (EOFError, UnicodeError):
        print(file=sys.stderr)  # the prompt has no end of line yet
        raise Locked(name, "no passphrase was typed") from None


def resolver_of(args: argparse.Namespace) -> Resolver:
    """Return the policy the options widen."""
    files = {}
    for pair in args.backing_file:
        if "=" not in pair:
            raise Qcow2Error(f"--backing-file {cut(pair)} is not NAME=PATH")
        files.update(_name_and_path(pair))
    return Resolver(folders=args.backing_dir, files=files, remedies=COMMAND_LINE)


def _name_and_path(pair: str) -> dict[str, str]:
    """Return the path under its name. Both may hold "=": then every split counts whose path is there."""
    places = [at for at, character in enumerate(pair) if character == "="]
    there = [at for at in places if os.path.exists(pair[at + 1 :])]
    return {pair[:at]: pair[at + 1 :] for at in there or places[-1:]}


def open_from(args: argparse.Namespace, snapshot: SnapshotName = None, *, missing: MissingPolicy = "refuse") -> Disk:
    """Open the disk the options mean, or another state, asking for a passphrase when it is locked."""
    disk = open_disk(
        args.image,
        snapshot if snapshot is not None else getattr(args, "snapshot", None),
        passphrase_of(args),
        resolver_of(args),
        eof=args.eof,
        missing=missing,
        follow=not args.no_backing,
    )
    if disk.is_locked:
        try:
            passphrase = ask_passphrase("encrypted image")
            disk.unlock(passphrase)
            args.asked_passphrase = passphrase
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
