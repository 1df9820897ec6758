"""``mount``: every state of an image as read-only raw files in a folder, through FUSE."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Qcow2Error
from ..reader.disk import Disk
from ..reader.states import SnapshotName
from ..text import cut, printable
from . import add_images_argument, complain
from .options import add_disk_arguments, open_from, open_with, passphrases_of, resolver_of

if TYPE_CHECKING:
    from ..findings import Report
    from ..mount.folder import ImageFolder
    from ..mount.served_files import FileContent
    from ..recovery import RecoveredState

HELP = "show every state as a read-only raw file in a folder (FUSE)"
DESCRIPTION = "Mount images: each state of the disk, and guest memory, as a read-only raw file."
EPILOG = """examples:
  qcow2-forensics mount disk.qcow2 /mnt/case
  qcow2-forensics mount disk.qcow2 web.qcow2 /mnt/case --deleted
  qcow2-forensics mount damaged.qcow2 /mnt/case --recovered
  qcow2-forensics mount disk.qcow2 /mnt/case --background; mmls /mnt/case/disk.qcow2/active.raw
  fusermount -u /mnt/case

Each image becomes a folder with active.raw, one raw file per snapshot, guest memory as .memory.raw,
audit.json, and a README.txt that describes each file. Ctrl-C or "fusermount -u DIR" ends it.
DIR is made when it is not there, and then removed again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``mount`` takes."""
    add_images_argument(parser)
    parser.add_argument("folder", metavar="DIR", help="an empty folder, or one to make")
    add_disk_arguments(parser, snapshot=False)
    parser.add_argument("--deleted", action="store_true", help="also look for deleted snapshots in free space (slow)")
    parser.add_argument(
        "--recovered", action="store_true", help="also put lost states together from what is left of them (slow)"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave guest memory out")
    parser.add_argument("--no-audit", action="store_true", help="leave audit.json out")
    parser.add_argument("--allow-other", action="store_true", help="let other users, and root, see the files too")
    parser.add_argument("--background", action="store_true", help="return when the mount is there")


def run(args: argparse.Namespace) -> int:
    """Serve the images until they are unmounted; 2 when a state of them could not be served."""
    from ..mount.filesystem import need_fuse, serve
    from ..mount.served_files import UniqueNames, safe_name

    need_fuse()
    point = Path(args.folder).absolute()
    folders: dict[str, ImageFolder] = {}
    names = UniqueNames()
    _allow_many_files()
    with contextlib.ExitStack() as undo:
        for path in args.images:
            folder = undo.enter_context(_open(args, str(Path(path).absolute())))
            folders[names.of(folder.name)] = folder
            for sentence in folder.missing:
                complain(f"not served: {sentence}")
        missing = any(folder.missing for folder in folders.values())
        undo.enter_context(_mount_point(point))
        print(f"{printable(str(point))}: {', '.join(folders)}; Ctrl-C or fusermount -u ends it", file=sys.stderr)
        serve(
            {name: folder.files for name, folder in folders.items()},
            str(point),
            complain,
            foreground=not args.background,
            allow_other=args.allow_other,
            label=safe_name(next(iter(folders))) or "qcow2",
        )
    return 2 if missing else 0


def _open(args: argparse.Namespace, path: str) -> ImageFolder:
    from ..mount.folder import ImageFolder, Openers

    here = argparse.Namespace(**{**vars(args), "image": path})

    def disk(selector: SnapshotName, keys: Disk | None) -> Disk:
        if keys is None:
            return open_from(here, selector)  # asks for the passphrase, once
        opened = open_with(here, selector, None)
        opened.adopt_keys(keys)
        return opened

    def memory(selector: SnapshotName) -> FileContent:
        from ..memory import open_guest_memory
        from ..mount.served_files import MemoryContent

        return MemoryContent(open_guest_memory(path, selector, passphrases_of(here), assume=dict(args.assume)))

    def report() -> Report:
        from ..audit import audit

        return audit(path, resolver=resolver_of(here))

    def recovered() -> list[RecoveredState]:
        from ..recovery import recovered_states

        return recovered_states(path, virtual_size=args.virtual_size)

    return ImageFolder(
        path,
        Openers(
            disk,
            None if args.no_memory else memory,
            None if args.no_audit else report,
            args.deleted,
            recovered if args.recovered else None,
        ),
    )


@contextlib.contextmanager
def _mount_point(point: Path) -> Any:
    """Make sure of an empty folder to mount at; remove it afterwards if it was made here."""
    made = not point.exists()
    if not made and not point.is_dir():
        raise Qcow2Error(f"{cut(str(point))} is not a folder")
    if not made and any(point.iterdir()):
        raise Qcow2Error(f"{cut(str(point))} is not empty: what is in it would be hidden")
    try:
        if made:
            point.mkdir()
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                point.rmdir()


def _allow_many_files() -> None:
    """Raise the limit of open files: each state of a chain keeps every file of the chain open."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
