"""``memory``: write the guest's memory to a file that other tools read, or print what it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import Locked, Qcow2Error
from ..format.source import FileSource
from ..reader.writer import HASHES, Writer, writing
from ..text import printable, size
from ._memory_facts import layout_facts, layout_lines, processor_facts, processor_lines
from .case import add_sidecar_arguments, now, origin_of, report_output, sidecar_of
from .options import add_assume_argument, add_key_arguments, ask_passphrase, passphrases_of
from .output import Progress

if TYPE_CHECKING:
    from ..memory import GuestMemory

HELP = "write the memory of a snapshot to a file, or print what it is"
DESCRIPTION = (
    "Write the guest-physical memory that a snapshot or a save file holds. Without OUT, print its layout, "
    "the processors' registers, the kernel, and the symbols that Volatility needs for it."
)
EPILOG = """examples:
  qcow2-forensics memory disk.qcow2 memory.raw
  qcow2-forensics memory disk.qcow2 memory.lime --snapshot before-incident --format lime
  qcow2-forensics memory disk.qcow2 state.qevm --snapshot 2 --format stream
  qcow2-forensics memory guest.save memory.raw --sidecar
  qcow2-forensics memory disk.qcow2

IMAGE is a QCOW2 image with a memory snapshot, a bare QEMU migration stream, a libvirt save file, or a Proxmox
state volume. The latest snapshot with memory is taken unless one is named; "leftover" is a memory that no snapshot
lists any more, but that is still mapped past the end of the disk.

Forms of OUT: "raw" is RAM at its guest-physical addresses, zeros where there is none; "lime" is RAM alone, with
headers that carry the addresses; "elf" is a core file with the processors' registers, for drgn and crash; "stream"
is QEMU's own form, with the devices and processors in it.

The output is sparse, and gets its name only when it is whole. Its SHA-256 is printed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``memory`` takes."""
    parser.add_argument("image", metavar="IMAGE", help="a QCOW2 image or a memory stream; it is only read")
    parser.add_argument(
        "output",
        metavar="OUT",
        nargs="?",
        help="the file to write; without it, the layout, the registers and the kernel are printed and nothing is written",
    )
    parser.add_argument(
        "--snapshot", metavar="STATE", help="the snapshot to take, as in export; the latest with memory by default"
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="write the state of one device instead; tpm-emulator/permanent is the file that swtpm keeps",
    )
    parser.add_argument(
        "--format", choices=("raw", "lime", "elf", "stream"), default="raw", help="form of OUT (default: raw)"
    )
    parser.add_argument(
        "--summary", choices=("text", "json"), default="text", help="form of what is printed (default: text)"
    )
    add_sidecar_arguments(parser, "source, snapshot, tool, times and hashes")
    parser.add_argument("--force", action="store_true", help="replace OUT when it exists")
    parser.add_argument(
        "--layout",
        metavar="BLOCK@ADDRESS[,...]",
        help="where RAM blocks lie, where you know better; a part of a block is BLOCK+OFFSET@ADDRESS",
    )
    parser.add_argument("--allow-truncated", action="store_true", help="take what a stream holds that ends early")
    parser.add_argument("--no-hash", action="store_true", help="do not compute the SHA-256 of OUT")
    add_key_arguments(parser)
    add_assume_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Write the memory and print what was written; without a file, print what the memory is."""
    if args.output is None:
        return _print_facts(args)
    sidecar = sidecar_of(args, "--summary json")
    started = now()
    with open_memory(args) as memory:
        device = _device(memory, args.device)
        form = "device" if device is not None else args.format
        total = len(device) if device is not None else memory.source.size if form == "stream" else memory.size
        hashes = () if args.no_hash else HASHES[:1]
        with (
            Progress("memory", total) as progress,
            writing(args.output, progress.advance, force=args.force, hashes=hashes) as writer,
        ):
            _write(memory, writer, form, device)
        written = {"output": args.output, "format": form, "size": writer.size, "sha256": writer.sha256}
        summary = {**written, **layout_facts(memory), **_origin(args, started)}
    report_output(args, sidecar, summary, _text(summary), as_json=args.summary == "json")
    return 0


def _text(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the summary for people."""
    machine = printable(summary["machine"]) or "?"
    yield f"{printable(summary['output'])}: {summary['size']} bytes ({size(summary['size'])}), machine {machine}"
    yield from layout_lines(summary, zeros=summary["format"] == "raw")
    if summary["sha256"]:
        yield f"sha256 {summary['sha256']}"


def open_memory(args: argparse.Namespace) -> GuestMemory:
    """Open the memory that the options mean, asking for a passphrase when it is locked."""
    from ..memory import open_guest_memory

    wanted = partial(
        open_guest_memory,
        args.image,
        args.snapshot,
        allow_truncated=args.allow_truncated,
        layout=args.layout,
        assume=dict(args.assume),
    )
    passphrase = passphrases_of(args)
    try:
        return wanted(passphrase=passphrase)
    except Locked as error:
        if passphrase is not None:
            raise
        return wanted(passphrase=ask_passphrase(error.method, error.member))


def _device(memory: GuestMemory, name: str | None) -> bytes | None:
    """Return the bytes of a device, None when no device is wanted."""
    if name is None:
        return None
    try:
        content: bytes = memory.read_device(name)
    except LookupError as error:
        raise Qcow2Error(str(error)) from None
    return content


def _write(memory: GuestMemory, writer: Writer, form: str, device: bytes | None) -> None:
    from ..memory.dump import write_lime, write_raw, write_stream
    from ..memory.elf_core import write_elf

    if device is not None:
        writer.data(device)
    elif form == "stream":
        write_stream(memory.source, writer)
    else:
        {"lime": write_lime, "elf": write_elf}.get(form, write_raw)(memory, writer)


def _origin(args: argparse.Namespace, started: str) -> dict[str, Any]:
    image = FileSource(args.image)
    try:
        return origin_of(args, [("image", image)], started)
    finally:
        image.close()


def facts_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the memory is as plain data, and write nothing."""
    started = now()
    with open_memory(args) as memory:
        return {**layout_facts(memory), **processor_facts(memory), **_origin(args, started)}


def _print_facts(args: argparse.Namespace) -> int:
    if args.device or args.sidecar:
        raise Qcow2Error("--device and --sidecar need OUT, the file to write")
    facts = facts_of(args)
    if args.summary == "json":
        print(json.dumps(facts))
        return 0
    print(f"{printable(args.image)}: {size(facts['ram_bytes'])} of RAM, machine {printable(facts['machine']) or '?'}")
    for line in (*layout_lines(facts), *processor_lines(facts)):
        print(line)
    return 0
