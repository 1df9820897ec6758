"""QCOW2 images for dissect: every state a target of its own, read by qcow2-forensics.

Nothing is to be configured: where the package is installed beside dissect, ``target-query`` and its
sisters take ``disk.qcow2`` for one target per state, and ``disk.qcow2/NAME`` for the snapshot NAME (a
name, an ID, or whatever ``open_disk`` takes). For a library user::

    from dissect_qcow2 import Qcow2Container

    target = Target.open("disk.qcow2/before-incident")
    target.disks.add(Qcow2Container(Path("disk.qcow2"), snapshot="before-incident"))

dissect is published under the GNU AGPL, this adapter under Apache-2.0; see README.md beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .container import Qcow2Container
    from .loader import Qcow2Loader

MAGIC = b"QFI\xfb"  # the first bytes of an image

__all__ = ["Qcow2Container", "Qcow2Loader", "register"]


def __getattr__(name: str) -> Any:
    if name == "Qcow2Container":
        from .container import Qcow2Container

        return Qcow2Container
    if name == "Qcow2Loader":
        from .loader import Qcow2Loader

        return Qcow2Loader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Have dissect use the container in place of its own for QCOW2, and the loader; more than once does no harm."""
    from . import container, loader  # noqa: F401 - each registers itself when it is imported
