"""What a user may choose: options of ``vol`` and ``volshell``, and the same as environment variables.

The options are given before the plugin's name: ``vol --qcow2-snapshot 2 -f disk.qcow2 linux.pslist``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from volatility3.framework import constants, interfaces
from volatility3.framework.configuration import requirements

from . import common

SNAPSHOT_VARIABLE = "QCOW2_SNAPSHOT"
PASSPHRASE_VARIABLE = "QCOW2_PASSPHRASE"  # noqa: S105 - the name of a variable
KEY_FILE_VARIABLE = "QCOW2_PASSPHRASE_FILE"
TIMELINE_VARIABLE = "QCOW2_TIMELINE"  # anything: the snapshots take part in Volatility's timeliner
LAYOUT_VARIABLE = "QCOW2_LAYOUT"
SCAN_ZEROS_VARIABLE = "QCOW2_SCAN_ZEROS"

DISK = "disk"  # in place of a snapshot: the virtual disk itself, as it is now
_PATH = "automagic.Qcow2Options."


class Qcow2Options(interfaces.automagic.AutomagicInterface):
    """Carries the options for QCOW2 images to the layers and plugins that read them."""

    priority = 5  # before the LayerStacker

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        # Names unlike any plugin's: argparse would let a plugin's default overwrite ours in silence.
        return [
            requirements.StringRequirement(
                name="qcow2_snapshot",
                description="Snapshot of a QCOW2 image to analyse: its ID or name, or 'disk' for the virtual disk",
                optional=True,
            ),
            requirements.StringRequirement(
                name="qcow2_key_file",
                description=f"File with the passphrase of an encrypted QCOW2 image (or set {PASSPHRASE_VARIABLE})",
                optional=True,
            ),
            requirements.StringRequirement(
                name="qcow2_backing_folder",
                description="Further folder in which backing files of a QCOW2 image may lie",
                optional=True,
            ),
            requirements.StringRequirement(
                name="qcow2_layout",
                description="Where RAM blocks of a QEMU memory stream lie: BLOCK@ADDRESS[,...], as qcow2.info lists them",
                optional=True,
            ),
            requirements.BooleanRequirement(
                name="qcow2_scan_zeros",
                description="Scan the zero pages of QCOW2 memory too, where skipping them cannot change a result",
                optional=True,
                default=False,
            ),
        ]

    def __call__(
        self,
        context: interfaces.context.ContextInterface,
        config_path: str,
        requirement: interfaces.configuration.RequirementInterface,
        progress_callback: constants.ProgressCallback = None,
    ) -> None:
        """Say so when an option cannot count, because a saved configuration names the snapshot already."""
        wanted = snapshot_option(context)
        if not wanted:
            return
        for key in tuple(context.config):
            if key.endswith(".class") and str(context.config[key]).endswith(".Qcow2VmStateLayer"):
                pinned = context.config.get(key.removesuffix("class") + "snapshot")
                common.warn(
                    f"the saved configuration names snapshot {pinned!r}: --qcow2-snapshot {wanted!r} is not used"
                )
                return


def snapshot_option(context: interfaces.context.ContextInterface) -> str | None:
    """Return the snapshot the user named, by the option or else by the environment."""
    return _option(context, "qcow2_snapshot") or os.environ.get(SNAPSHOT_VARIABLE) or None


def layout_option(context: interfaces.context.ContextInterface) -> str | None:
    """Return where the user says RAM blocks lie, by the option or else by the environment."""
    return _option(context, "qcow2_layout") or os.environ.get(LAYOUT_VARIABLE) or None


def scan_zeros(context: interfaces.context.ContextInterface) -> bool:
    """Tell whether the user wants zeros scanned like everything else."""
    return bool(_option(context, "qcow2_scan_zeros")) or os.environ.get(SCAN_ZEROS_VARIABLE, "") not in ("", "0")


def backing_folders(context: interfaces.context.ContextInterface) -> tuple[str, ...]:
    """Return the folders besides the image's own in which its backing files may lie."""
    from qcow2_forensics.reader.resolver import folders_from_environment

    folder = _option(context, "qcow2_backing_folder")
    return (*((str(folder),) if folder else ()), *folders_from_environment())


def passphrase(context: interfaces.context.ContextInterface) -> bytes | None:
    """Return the passphrase, from the key file or the environment; it is never kept in a configuration."""
    named = _option(context, "qcow2_key_file") or os.environ.get(KEY_FILE_VARIABLE)
    if named:
        path = common.local_path(str(named)) if str(named).startswith("file:") else str(named)
        try:
            return Path(path or "").read_bytes().removesuffix(b"\n").removesuffix(b"\r")
        except OSError as error:
            common.warn(f"the key file {named!r} cannot be read: {error.strerror}")
    given = os.environ.get(PASSPHRASE_VARIABLE)
    return os.fsencode(given) if given is not None else None


def _option(context: interfaces.context.ContextInterface, name: str) -> Any:
    return context.config.get(_PATH + name, None)
