"""What a user may choose: options of ``vol`` and ``volshell``, and the same as environment variables.

The options are given before the plugin's name: ``vol --qcow2-snapshot 2 -f disk.qcow2 linux.pslist``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from volatility3.framework import constants, interfaces
from volatility3.framework.configuration import requirements

from . import common

if TYPE_CHECKING:
    from qcow2_forensics import NamedFiles

SNAPSHOT_VARIABLE = "QCOW2_SNAPSHOT"
PASSPHRASE_VARIABLE = "QCOW2_PASSPHRASE"  # noqa: S105 - the name of a variable
KEY_FILE_VARIABLE = "QCOW2_PASSPHRASE_FILE"
TIMELINE_VARIABLE = "QCOW2_TIMELINE"  # anything: the snapshots take part in Volatility's timeliner
LAYOUT_VARIABLE = "QCOW2_LAYOUT"
HOW_TO_UNLOCK = f"give --qcow2-key-file, or set {PASSPHRASE_VARIABLE} or {KEY_FILE_VARIABLE}"
SCAN_ZEROS_VARIABLE = "QCOW2_SCAN_ZEROS"

_PATH = "automagic.Qcow2Options."
_TEXTS = {
    "qcow2_snapshot": "Snapshot of a QCOW2 image to analyse: its ID or name, or 'disk' for the virtual disk",
    "qcow2_key_file": f"File with the passphrase of an encrypted QCOW2 image, or several separated as in PATH (or set "
    f"{KEY_FILE_VARIABLE}, or {PASSPHRASE_VARIABLE} to the passphrase)",
    "qcow2_backing_folder": "Further folder in which backing files of a QCOW2 image may lie, or several separated as in "
    "PATH (or set QCOW2_BACKING_DIR)",
    "qcow2_backing_file": "File to open for a name in a QCOW2 image: NAME=PATH[,format=FORMAT]",
    "qcow2_virtual_size": "Size of a recovered QCOW2 disk where nothing in the file gives it: 20G, or bytes (or set "
    "QCOW2_VIRTUAL_SIZE)",
    "qcow2_assume": "Read a QCOW2 image as if its header said so: FIELD=VALUE[,...], as extended-l2=on or "
    "compression=zstd (or set QCOW2_ASSUME)",
    "qcow2_layout": "Where RAM blocks of a QEMU memory stream lie: BLOCK@ADDRESS[,...], as qcow2.info lists them",
}
_FLAGS = {
    "qcow2_no_backing": "Read QCOW2 disks without their backing files (or set QCOW2_NO_BACKING)",
    "qcow2_scan_zeros": "Scan the zero pages of QCOW2 memory too, where skipping them cannot change a result",
}


def optional_text(name: str, description: str) -> requirements.StringRequirement:
    """Return the requirement of a text that may be left out."""
    return requirements.StringRequirement(name=name, description=description, optional=True)


def optional_flag(name: str, description: str) -> requirements.BooleanRequirement:
    """Return the requirement of a flag that is not set by default."""
    return requirements.BooleanRequirement(name=name, description=description, optional=True, default=False)


class Qcow2Options(interfaces.automagic.AutomagicInterface):
    """Carries the options for QCOW2 images to the layers and plugins that read them."""

    priority = 5  # before the LayerStacker

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        # Names unlike any plugin's: argparse would let a plugin's default overwrite ours in silence.
        return [
            *(optional_text(name, text) for name, text in _TEXTS.items()),
            *(optional_flag(name, text) for name, text in _FLAGS.items()),
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
    """Return whether the user wants zeros scanned like everything else."""
    return bool(_option(context, "qcow2_scan_zeros")) or os.environ.get(SCAN_ZEROS_VARIABLE, "") not in ("", "0")


def backing_folders(context: interfaces.context.ContextInterface) -> tuple[str, ...]:
    """Return the folders besides the image's own in which its backing files may lie."""
    from qcow2_forensics import folders_from_environment

    named = _paths(_option(context, "qcow2_backing_folder"))
    for folder in named:
        if not os.path.isdir(folder):
            common.warn(f"--qcow2-backing-folder: {folder!r} is not a folder")
    return (*named, *folders_from_environment())


def backing_file(context: interfaces.context.ContextInterface) -> NamedFiles:
    """Return the file that the user names for a name in an image."""
    from qcow2_forensics import named_files

    pair = _option(context, "qcow2_backing_file")
    return named_files([str(pair)] if pair else [], "--qcow2-backing-file")


def without_backing(context: interfaces.context.ContextInterface) -> bool:
    """Return whether disks are read without their backing files."""
    from qcow2_forensics import ALONE_VARIABLE

    return bool(_option(context, "qcow2_no_backing") or os.environ.get(ALONE_VARIABLE))


def virtual_size(context: interfaces.context.ContextInterface) -> int | None:
    """Return the size that the user states for a recovered disk; raises :class:`Qcow2Error` for what is no size."""
    from qcow2_forensics import parse_size, virtual_size_from_environment

    given = _option(context, "qcow2_virtual_size")
    return parse_size(str(given)) if given else virtual_size_from_environment()


def assumptions(context: interfaces.context.ContextInterface) -> str:
    """Return the header fields that the user states, as they were written; "" for none."""
    from qcow2_forensics import ASSUME_VARIABLE

    return str(_option(context, "qcow2_assume") or os.environ.get(ASSUME_VARIABLE) or "")


def passphrase(context: interfaces.context.ContextInterface) -> list[bytes] | None:
    """Return the passphrases, from the key files or the environment; they are never kept in a configuration."""
    from qcow2_forensics import Qcow2Error, passphrases_from_environment, passphrases_from_files

    named = _option(context, "qcow2_key_file")
    try:
        if named:
            return passphrases_from_files(_paths(named))
        return passphrases_from_environment() or None
    except (OSError, Qcow2Error) as error:
        common.warn(f"the key file {named or os.environ.get(KEY_FILE_VARIABLE)!r} cannot be read: {error}")
        return None


def _paths(given: Any) -> list[str]:
    """Return the paths of an option: one, one as a URL, or several separated as in PATH."""
    text = str(given or "")
    if text.startswith("file:"):
        return [common.local_path(text) or ""]
    return [text] if os.path.exists(text) else [item for item in text.split(os.pathsep) if item]


def _option(context: interfaces.context.ContextInterface, name: str) -> Any:
    return context.config.get(_PATH + name, None)
