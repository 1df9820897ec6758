"""What ``diff`` and ``timeline`` share: the volumes of a state, their labels, and records as JSON."""

from __future__ import annotations

import argparse
from typing import Any

from ..files.records import FileRecord, Volume
from ..files.volumes import GuestVolumes, Unread, open_volumes
from ..reader.disk import Layer
from ..reader.passphrases import passphrases_from_files
from ..text import iso_time, printable

LONGEST_PATH = 8192  # characters shown of one


def volumes_of(args: argparse.Namespace, disk: Layer, name: str) -> GuestVolumes:
    """Return the volumes of a state, with the passphrases that the options give."""
    return open_volumes(disk, name, passphrases_from_files(args.guest_passphrase_file))


def volume_label(volume: Volume) -> str:
    """Return what to call a volume: ``/p2/vg0/root (xfs)``, ``the whole disk (LUKS)``."""
    return printable(f"{volume.prefix or 'the whole disk'} ({volume.kind or 'unknown'})", LONGEST_PATH)


def volume_dict(volume: Volume) -> dict[str, Any]:
    """Return a volume for JSON."""
    return {
        "partition": volume.number,
        "offset": volume.offset,
        "path": volume.prefix,
        "type": volume.kind,
        "description": volume.description,
        "backend": volume.backend,
    }


def unread_dict(item: Unread) -> dict[str, Any]:
    """Return a volume that is not read for JSON."""
    return {**volume_dict(item.volume), "holds_files": item.holds_files, "why": item.why}


def record_dict(record: FileRecord, sha256: str | None = None) -> dict[str, Any]:
    """Return a record for JSON, which holds text as the file system does."""
    times = record.times
    shown: dict[str, Any] = {
        "path": record.full_path,
        "inode": record.inode,
        "address": record.address,
        "type": record.type,
        "allocated": record.allocated,
        "size": record.size,
        "mode": record.mode,
        "uid": record.uid,
        "gid": record.gid,
        "modified": iso_time(times.modified),
        "accessed": iso_time(times.accessed),
        "changed": iso_time(times.changed),
        "created": iso_time(times.created),
    }
    if record.link:
        shown["link"] = record.link
    if sha256 is not None:
        shown["sha256"] = sha256
    return shown
