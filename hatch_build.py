"""Puts the parts into the wheel that are no packages of ours, and the README without links that would be dead.

A standard wheel gets the Volatility plugin folder and the auto-load hook as files. An editable one
gets only the two files that ``site`` must find in site-packages: they import the hook module from
the checkout, which finds the plugin folder beside itself, so no copy can go stale.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

_AUTOLOAD = Path("plugins/autoload")
_STARTUP = ("qcow2_forensics_autoload.pth", "qcow2_forensics_autoload.start")
_MODULE = "qcow2_forensics_autoload.py"
_VOLATILITY = Path("plugins/volatility/qcow2")
# Not below volatility3/: a second volatility3 folder hides an editable install of Volatility.
_VOLATILITY_IN_WHEEL = "qcow2_forensics_volatility/qcow2"


_RELATIVE_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]+\)")


class ReadmeMetadataHook(MetadataHookInterface):
    """Gives package indexes the README; a link to a file of the repository becomes the file's name."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": _RELATIVE_LINK.sub(r"\1", text)}


class AutoloadBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the files above; named in pyproject.toml."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        files = {str(root / _AUTOLOAD / name): name for name in _STARTUP}
        if version == "editable":
            build_data["force_include_editable"].update(files)
            return
        files[str(root / _AUTOLOAD / _MODULE)] = _MODULE
        for path in sorted((root / _VOLATILITY).rglob("*")):
            inside = path.relative_to(root / _VOLATILITY)
            if path.is_file() and "__pycache__" not in inside.parts:
                files[str(path)] = f"{_VOLATILITY_IN_WHEEL}/{inside.as_posix()}"
        build_data["force_include"].update(files)
