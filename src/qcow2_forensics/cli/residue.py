"""``residue``: writes out everything nothing points at, with an index."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..reader.resolver import COMMAND_LINE, Resolver
from ..residue import residue
from ..residue.model import KINDS
from ..text import plural, printable, size
from . import add_image_argument, complain
from .case import add_hash_source_argument, now, origin_of
from .options import add_backing_folders, bytes_of
from .output import Progress

if TYPE_CHECKING:
    from ..residue.output import Summary

HELP = "write out leaked, free and hidden data"
DESCRIPTION = (
    "Write everything nothing points at to a folder: leaked and free clusters, former tables, slack, "
    "data under zero flags, overwritten compressed clusters, trailing data."
)
EPILOG = """examples:
  qcow2-forensics residue disk.qcow2 residue/
  qcow2-forensics residue disk.qcow2 residue/ --kind free --kind leaked
  qcow2-forensics residue disk.qcow2 listing/ --index-only
  qcow2-forensics export disk.qcow2 old.raw --snapshot deleted:0x190000

DIR must not exist; it gets its name when everything is written. It holds one file per piece,
index.json and index.csv. index.json also says which files were read, with what, and when.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``residue`` takes."""
    add_image_argument(parser)
    parser.add_argument("folder", metavar="DIR", help="the folder to create")
    parser.add_argument(
        "--kind",
        action="append",
        metavar="KIND",
        choices=KINDS,
        help=f"only pieces of this kind (repeatable): {', '.join(KINDS)}",
    )
    parser.add_argument(
        "--limit", metavar="BYTES", type=bytes_of, help="stop writing files after so many bytes; index all"
    )
    parser.add_argument("--index-only", action="store_true", help="write the index, with hashes, and no pieces")
    add_hash_source_argument(parser)
    add_backing_folders(parser, "a further folder in which the data file may be (repeatable)")


def run(args: argparse.Namespace) -> int:
    """Write the residue of one image."""
    summary = write_folder(args)
    print(f"{plural(summary.pieces, 'piece')}, {size(summary.written)} written to {printable(args.folder)}")
    for line in summary.deleted:
        print(line)
    for sentence in doubts(summary):
        complain(sentence)
    if summary.skipped and not args.index_only:
        complain(f"in the index only: {plural(summary.skipped, 'piece')}")
    return 2 if summary.unseen else 0


def doubts(summary: Summary) -> list[str]:
    """Return what is to be known about the residue of a damaged image, a sentence each."""
    said = []
    if summary.problem:
        said.append(f"the disk cannot be read: {summary.problem}; what no readable table leads to counts as residue")
    if summary.unseen:
        said.append(f"not all clusters in use were looked into: {summary.unseen}")
    return said


def write_folder(args: argparse.Namespace) -> Summary:
    """Write the folder that the options mean and return what is in it."""
    from ..residue.output import write  # here: it brings numpy

    started = now()
    with (
        residue(args.image, resolver=Resolver(folders=args.backing_dir, remedies=COMMAND_LINE)) as found,
        Progress("residue", found.image.file_size) as progress,
    ):
        return write(
            found,
            args.folder,
            kinds=args.kind,
            limit=0 if args.index_only else args.limit,
            advance=progress.advance,
            origin=lambda: origin_of(args, [("image", found.image.source), ("data file", found.data)], started),
        )
