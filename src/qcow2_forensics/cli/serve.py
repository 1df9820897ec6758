"""``serve``: every state of an image over NBD, through nbdkit and its Python plug-in."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import FormatError, Locked, NotQcow2, Qcow2Error
from ..reader.damage_options import assumptions_from_environment, virtual_size_from_environment
from ..reader.opening import open_disk
from ..reader.passphrases import KEY_FILE_VARIABLE, PASSPHRASE_VARIABLE
from ..reader.resolver import ALONE_VARIABLE, Remedies, Resolver, folders_from_environment
from ..reader.signals import ended_by_signals
from ..reader.writer import refuse_missing_folder
from ..text import cut, printable
from . import add_image_argument
from .options import KEY_HELP, add_backing_folders, add_key_arguments, passphrases_of

HELP = "serve every state over NBD, read-only"
DESCRIPTION = "Serve every state of an image as a read-only NBD export, through nbdkit."
EPILOG = """examples:
  qcow2-forensics serve disk.qcow2 --nbd case.sock
  qcow2-forensics serve disk.qcow2 --nbd 127.0.0.1:10809 --passphrase-file key.txt
  qemu-img convert -O raw 'nbd+unix:///before-incident?socket=case.sock' before.raw

The export name chooses the state: none or "active" for the disk as it is now, else an ID or a name of a
snapshot, or recovered:1 where the image is damaged. Ctrl-C ends it. The server is nbdkit
(apt install nbdkit nbdkit-plugin-python).
"""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_PLUGIN = Path(__file__).parent.parent / "data" / "nbdkit_plugin.py"
_REMEDIES = Remedies("--backing-dir DIR", alone=f"{ALONE_VARIABLE}=1")
_UNLOCK = f"give --passphrase-file FILE, or set {PASSPHRASE_VARIABLE} or {KEY_FILE_VARIABLE}"
_INSTALL = "serve needs nbdkit and its Python plug-in: apt install nbdkit nbdkit-plugin-python"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``serve`` takes."""
    add_image_argument(parser)
    parser.add_argument(
        "--nbd",
        metavar="SOCKET|HOST:PORT",
        required=True,
        help="a Unix socket to make, or a loopback address with its port",
    )
    add_key_arguments(parser, KEY_HELP)
    add_backing_folders(parser, "a further folder for backing files (repeatable)")


def listening(where: str) -> list[str]:
    """Return nbdkit's options for a Unix socket, or for a port of the loopback interface."""
    host, colon, port = where.rpartition(":")
    if not colon or not port.isdecimal() or "/" in where:
        if os.path.lexists(where):
            raise Qcow2Error(f"{cut(where)} exists; name a new socket")
        refuse_missing_folder(Path(where))
        return ["-U", os.path.abspath(where)]
    host = host.strip("[]")
    if host not in _LOOPBACK:
        raise Qcow2Error(
            f"{cut(where)} is no loopback address; evidence is served to this machine only, on {_LOOPBACK[0]}:PORT"
        )
    return ["-i", host, "-p", port]


def open_once(args: argparse.Namespace) -> None:
    """Open the active state as the plug-in will, so that a mistake is one sentence: nbdkit shows a traceback."""
    with contextlib.suppress(NotQcow2, FormatError):  # recovered:1 may open, which the plug-in tries
        disk = open_disk(
            args.image,
            None,
            passphrases_of(args),
            Resolver(folders=[*args.backing_dir, *folders_from_environment()], remedies=_REMEDIES),
            follow=not os.environ.get(ALONE_VARIABLE),
            assume=assumptions_from_environment(),
            virtual_size=virtual_size_from_environment(),
        )
        disk.close()
        if disk.is_locked:
            raise Locked(disk.locked_method, _UNLOCK, member=disk.locked_member)


def run(args: argparse.Namespace) -> int:
    """Run nbdkit until it is ended."""
    engine = shutil.which("nbdkit")
    if engine is None:
        raise Qcow2Error(_INSTALL)
    known = subprocess.run([engine, "python", "--dump-plugin"], capture_output=True, text=True, check=False)
    if known.returncode:
        raise Qcow2Error(_INSTALL)
    parameters = [f"image={os.path.abspath(args.image)}"]
    parameters += [f"passphrase-file={os.path.abspath(path)}" for path in args.passphrase_file]
    parameters += [f"backing-dir={os.path.abspath(folder)}" for folder in args.backing_dir]
    where = listening(args.nbd)
    open_once(args)
    # nbdkit runs the system's Python: PYTHONPATH names our package and what it needs, where they are here.
    path = [str(_PLUGIN.parent.parent.parent), *(item for item in sys.path if item.endswith(("-packages", ".zip")))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [engine, "--foreground", "--readonly", *where, "python", str(_PLUGIN), *parameters]
    print(f"serving {printable(args.image)} on {printable(args.nbd)}; Ctrl-C ends it", file=sys.stderr)
    with ended_by_signals(), subprocess.Popen(command, env=environment) as server:
        try:
            return 2 if server.wait() else 0
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()
            server.wait()
            if where[0] == "-U":
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(where[1])
