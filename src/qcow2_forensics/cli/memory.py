"""``memory``: write the guest's memory to a file that other tools read."""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

from ..errors import Qcow2Error
from ..reader.writer import HASHES, writing
from ..text import cut, printable, size
from .options import add_key_arguments, ask_passphrase, passphrases_of
from .output import Progress

_EPILOG = """examples:
  qcow2-forensics memory disk.qcow2 memory.raw
  qcow2-forensics memory disk.qcow2 memory.lime --snapshot before-incident --format lime
  qcow2-forensics memory disk.qcow2 state.qevm --snapshot 2 --format stream
  qcow2-forensics memory guest.save memory.raw

IMAGE is a QCOW2 image with a memory snapshot (the latest is taken unless one is named; "leftover" is one that
no snapshot lists any more but that is still mapped behind the disk), a bare QEMU migration stream, a libvirt save file, or a Proxmox state volume. "raw" is RAM at its guest-physical
addresses, zeros where there is none; "lime" is RAM alone, with headers that carry the addresses;
"elf" is a core file with the processors' registers, as drgn and crash open it; "stream" is QEMU's own form, with the devices and processors in it.

The output is sparse, and gets its name only when it is whole. Its SHA-256 is printed.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``memory`` to the command line."""
    parser = subparsers.add_parser(
        "memory",
        help="write the memory of a snapshot to a file",
        description="Write the guest-physical memory that a snapshot or a save file holds.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", metavar="IMAGE", help="a QCOW2 image or a memory stream; it is only read")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument(
        "--snapshot", metavar="STATE", help="the snapshot to take, as in export; the latest with memory by default"
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="write the state of one device instead; tpm-emulator/permanent is the file that swtpm keeps",
    )
    parser.add_argument("--format", choices=("raw", "lime", "elf", "stream"), default="raw", help="form of OUT (raw)")
    parser.add_argument("--summary", choices=("text", "json"), default="text", help="form of what is printed (text)")
    parser.add_argument("--force", action="store_true", help="replace OUT when it exists")
    parser.add_argument(
        "--layout",
        metavar="BLOCK@ADDRESS[,...]",
        help="where RAM blocks lie, where you know better; a part of a block is BLOCK+OFFSET@ADDRESS",
    )
    parser.add_argument("--allow-truncated", action="store_true", help="take what a stream holds that ends early")
    parser.add_argument("--no-hash", action="store_true", help="do not compute the SHA-256 of OUT")
    add_key_arguments(parser)
    parser.set_defaults(run=run)


def _snapshot(memory: Any) -> str | None:
    """Return which snapshot the memory is of, in words; None for a stream that is in none."""
    from ..reader.states import LEFTOVER
    from ..reader.vm_state import VmState

    state = memory.source
    if not isinstance(state, VmState):
        return None
    if state.snapshot is None:
        return f"{LEFTOVER} (behind the disk, listed by no snapshot)"
    return f"{cut(state.snapshot.id)} ({cut(state.snapshot.name)})"


def _device(memory: Any, name: str | None) -> bytes | None:
    """Return the bytes of a device, None when no device is wanted."""
    if name is None:
        return None
    try:
        content: bytes = memory.read_device(name)
    except LookupError as error:
        raise Qcow2Error(str(error)) from None
    return content


def run(args: argparse.Namespace) -> int:
    """Write the memory and print what was written."""
    from ..errors import Locked
    from ..memory import open_guest_memory
    from ..memory.dump import write_lime, write_raw, write_stream
    from ..memory.elf_core import write_elf

    wanted = partial(
        open_guest_memory, args.image, args.snapshot, allow_truncated=args.allow_truncated, layout=args.layout
    )
    passphrase = passphrases_of(args)
    try:
        memory = wanted(passphrase=passphrase)
    except Locked:
        if passphrase is not None:
            raise
        memory = wanted(passphrase=ask_passphrase("encrypted image"))
    with memory:
        device = _device(memory, args.device)
        form = "device" if device is not None else args.format
        total = len(device) if device is not None else memory.source.size if form == "stream" else memory.size
        hashes = () if args.no_hash else HASHES[:1]
        with (
            Progress("memory", total) as progress,
            writing(args.output, progress.advance, force=args.force, hashes=hashes) as writer,
        ):
            if device is not None:
                writer.data(device)
            elif form == "stream":
                write_stream(memory.source, writer)
            else:
                {"lime": write_lime, "elf": write_elf}.get(form, write_raw)(memory, writer)
        summary = {
            "output": args.output,
            "snapshot": _snapshot(memory),
            "format": form,
            "size": writer.size,
            "sha256": writer.sha256,
            "machine": memory.machine,
            "regions": [
                {
                    "address": region.address,
                    "length": region.length,
                    "block": region.block,
                    "reason": reason,
                }
                for region, reason in zip(memory.regions, memory.layout.reasons, strict=True)
            ],
            "notes": list(memory.layout.notes),
            "assumptions": list(memory.layout.assumptions),
            "checks": list(memory.layout.checks),
            "doubts": [{"address": address, "length": length} for address, length in memory.layout.doubts],
            "missing_bytes": memory.missing,
            "complete": memory.complete,
        }
    if args.summary == "json":
        print(json.dumps(summary))
        return 0
    machine = printable(memory.machine) or "?"
    print(f"{printable(args.output)}: {writer.size} bytes ({size(writer.size)}), machine {machine}")
    shown = printable(str(summary["snapshot"] or "none, the file is a stream itself"))
    print(f"snapshot: {shown}")
    for region in memory.regions:
        print(f"  {region.address:#014x} - {region.end - 1:#014x}  {printable(region.block)}")
    for assumption in memory.layout.assumptions:
        print(f"assumed: {printable(assumption)}")
    for check in memory.layout.checks:
        print(f"checked: {printable(check)}")
    if memory.missing:
        print(f"{memory.missing} bytes of RAM are not in the stream" + (": zeros" if args.format == "raw" else ""))
    if writer.sha256:
        print(f"sha256 {writer.sha256}")
    return 0
