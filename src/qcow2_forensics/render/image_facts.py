"""The facts about the image that every renderer puts before the findings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..findings import Report
from ..text import plural, size, text


def heading(report: Report) -> str:
    """Return one sentence about the image: format, sizes, clusters, what it holds."""
    image = report.image
    parts = [_format(image)]
    if isinstance(image.get("virtual_size"), int):
        parts.append(f"{size(image['virtual_size'])} virtual")
    if isinstance(image.get("file_size"), int):
        parts.append(f"{size(image['file_size'])} file")
    if isinstance(image.get("cluster_size"), int):
        parts.append(f"{size(image['cluster_size'])} clusters")
    for key, one in (("snapshots", "snapshot"), ("bitmaps", "bitmap")):
        count = image.get(key)
        if isinstance(count, int) and count:
            parts.append(plural(count, one))
        elif count is None and key in image:
            parts.append(f"an unknown number of {key}")
    unread = image.get("unreadable") or ()
    if image.get("backing_file"):
        parts.append("with a backing file")
    elif "backing_file" in unread:
        parts.append("with a backing file whose name cannot be read")
    if image.get("data_file"):
        parts.append("with a data file")
    if image.get("encryption") not in (None, "", "none"):
        parts.append(f"encrypted ({text(image['encryption'], 40)})")
    return ", ".join(parts)


def _format(image: Mapping[str, Any]) -> str:
    version = image.get("version")
    if not isinstance(version, int):
        return "not a readable QCOW image"
    return "QCOW version 1" if version == 1 else f"QCOW2 version {version}"


def name(report: Report) -> str:
    """Return what the image is called, escaped."""
    return text(report.image.get("path") or "image")


def check_line(report: Report) -> str:
    """Return the ``qemu-img check`` counters as one sentence, empty when there are none; safe on a terminal.

    Where QEMU does not open the image, and so would count nothing, that is part of it.
    """
    check = report.check
    if check is None:
        return ""
    names = (("corruptions", "corruption"), ("leaks", "leak"), ("check-errors", "check error"))
    problems = [plural(check[key], one) for key, one in names if check.get(key)]
    total = check.get("total-clusters") or 0
    allocated = check.get("allocated-clusters") or 0
    parts = [", ".join(problems) if problems else "no errors"]
    if total:
        if "l1_table" in (report.image.get("unreadable") or ()):
            parts.append(f"an unknown number of {plural(total, 'cluster')} allocated: the L1 table cannot be read")
        elif allocated <= total:
            parts.append(f"{allocated} of {plural(total, 'cluster')} allocated ({allocated / total:.1%})")
        else:  # crafted tables, or clusters past the end of the disk
            parts.append(f"{plural(allocated, 'cluster')} allocated, more than the {total} of the disk")
    if check.get("compressed-clusters"):
        parts.append(f"{check['compressed-clusters']} compressed")
    if check.get("image-end-offset"):
        parts.append(f"image ends at {check['image-end-offset']:#x}")
    refused = report.details.get("not_opened_by_qemu")
    return ", ".join(parts) + (f"; QEMU itself does not open this image: {text(refused)}" if refused else "")
