"""What was audited: where it is, and the facts of its header that identify it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import Qcow2Error
from ..format.image import Image
from .facts import Facts

Answer = TypeVar("Answer")


def path_of(origin: object) -> Path | None:
    """Return the host path of an image, a source or a name; None where there is none."""
    if isinstance(origin, Image):
        return path_of(origin.source)
    path = origin if isinstance(origin, (str, os.PathLike)) else getattr(origin, "path", None)
    return Path(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) and path else None


def unopened(name: str, path: Path | None) -> dict[str, Any]:
    """Return what is known of a file that could not be opened as an image."""
    facts: dict[str, Any] = {"path": name}
    try:
        if path is not None:
            facts["file_size"] = path.stat().st_size
    except OSError:
        facts["file_size"] = None
    return facts


def identity(facts: Facts, name: str) -> dict[str, Any]:
    """Return the facts that identify an image; None where the evidence cannot be read."""
    image, header = facts.image, facts.header
    known: dict[str, Any] = {
        "path": name,
        "file_size": image.file_size,
        "version": header.version,
        "virtual_size": header.size,
    }
    if facts.image.has_geometry:
        known["cluster_size"] = header.cluster_size
        known["snapshots"] = _readable(lambda: _counted(image, "snapshots"))
        known["bitmaps"] = _readable(lambda: _counted(image, "bitmaps"))
    known["backing_file"] = _readable(lambda: image.backing_name)
    known["backing_format"] = _readable(lambda: image.backing_format)
    known["data_file"] = _readable(lambda: image.data_file_name) if header.external_data else None
    known["encryption"] = image.encryption.lower() or None
    known["refcount_bits"] = header.refcount_bits if header.version > 1 and header.refcount_order <= 6 else None
    known["unreadable"] = _readable(lambda: list(image.unreadable_facts)) if facts.image.has_geometry else None
    return known


def _counted(image: Image, part: str) -> int:
    """Return how many snapshots or bitmaps there are; raises where their table cannot be read to its end."""
    image.require(part)
    return len(image.snapshots if part == "snapshots" else image.bitmaps)


def _readable(question: Callable[[], Answer]) -> Answer | None:
    """Return an answer, None where the evidence cannot be read; a rule reports why."""
    try:
        return question()
    except (Qcow2Error, OSError):
        return None
