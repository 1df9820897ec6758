"""``python -m dfvfs_qcow2 TOOL ...`` runs a plaso tool with the back-end active.

The explicit way where start-up files are not processed: ``python -S``, ``pip install --target``, a
checkout on ``PYTHONPATH``.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys

TOOLS = ("image_export", "log2timeline", "pinfo", "psort", "psteal")


def main() -> int:
    """Run the named tool with the remaining arguments and return its exit code."""
    name = sys.argv[1].removesuffix(".py") if len(sys.argv) > 1 else ""
    if name not in TOOLS:
        sys.stderr.write(f"usage: python -m {__package__} {{{','.join(TOOLS)}}} ...\n")
        return 2
    try:
        tool = importlib.import_module(f"plaso.scripts.{name}")
    except ImportError as error:
        sys.stderr.write(f"plaso is not installed: {error}; pip install 'qcow2-forensics[plaso]'\n")
        return 2
    sys.argv = [name, *sys.argv[2:]]
    result: int = tool.Main()
    return result


if __name__ == "__main__":
    multiprocessing.freeze_support()
    sys.exit(main())
