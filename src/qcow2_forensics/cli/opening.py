"""The options that say which disk is meant, shared by every subcommand that opens one."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from pathlib import Path

from ..chain import find_snapshot, open_disk, open_vm_state
from ..disk import Disk
from ..errors import Locked, Qcow2Error, printable
from ..image import Image
from ..resolver import Resolver
from ..vm_state import VmState

PASSPHRASE_VARIABLE = "QCOW2_PASSPHRASE"  # noqa: S105 - the name of a variable, not a secret


def add_image_argument(parser: argparse.ArgumentParser) -> None:
    """Add the positional IMAGE."""
    parser.add_argument("image", metavar="IMAGE", help="a QCOW2 (or QCOW) image; it is only read")


def add_disk_arguments(parser: argparse.ArgumentParser, *, snapshot: bool = True) -> None:
    """Add the options that :func:`open_from` reads."""
    if snapshot:
        parser.add_argument("--snapshot", metavar="ID|NAME", help="a snapshot instead of the active state")
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
        help="the file to open where the image says NAME (repeatable)",
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
        return Path(args.passphrase_file).read_bytes().removesuffix(b"\n")
    value = os.environ.get(PASSPHRASE_VARIABLE)
    return None if value is None else os.fsencode(value)


def ask_passphrase(name: str) -> bytes:
    """Ask on the terminal; raises :class:`Locked` where there is none."""
    if not sys.stdin.isatty():
        raise Locked(name, f"set {PASSPHRASE_VARIABLE} or give --passphrase-file")
    return getpass.getpass("Passphrase: ").encode()


def resolver_of(args: argparse.Namespace) -> Resolver:
    """Return the policy the options widen."""
    files = {}
    for pair in args.backing_file:
        name, separator, path = pair.rpartition("=")
        if not separator:
            raise Qcow2Error(f"--backing-file {printable(pair)} is not NAME=PATH")
        files[name] = path
    return Resolver(folders=args.backing_dir, files=files)


def open_from(args: argparse.Namespace, snapshot: str | None = None) -> Disk:
    """Open the disk the options mean, asking for a passphrase when it is locked."""
    wanted = snapshot if snapshot is not None else getattr(args, "snapshot", None)
    disk = open_disk(
        args.image,
        None if wanted == "active" else wanted,
        passphrase_of(args),
        resolver_of(args),
        eof=args.eof,
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


def open_state_from(args: argparse.Namespace) -> VmState:
    """Open the VM state the options mean, asking for a passphrase when it is locked."""
    passphrase = passphrase_of(args)
    if passphrase is None:
        with Image(args.image) as image:
            if image.header.crypt_method and find_snapshot(image, args.snapshot) is not None:
                passphrase = ask_passphrase("encrypted image")
    return open_vm_state(args.image, args.snapshot, passphrase)
