"""QCOW2 images inside Volatility 3: memory of any snapshot, and what the image itself tells.

This folder goes on Volatility's plugin path, where its name is ``volatility3.plugins.qcow2``::

    FileLayer -> Qcow2VmStateLayer   the migration stream of one snapshot  --+
    FileLayer -> Qcow2DiskLayer      a disk that is itself a memory dump     +-> QemuRamLayer -> Intel ...
    FileLayer    a bare stream, libvirt save file, Proxmox state volume    --+

    common    the seam to the core: sources over layers, messages, what all our layers share
    options   --qcow2-snapshot and friends, and their environment variables
    choice    which state of the image is meant, and what to say about the others
    layers    VM state and disk;  backing: the files under a disk;  content: what a disk holds
    ram       guest-physical memory;  elision: when zeros need no scan;  index_cache
    stackers  offer the layers to Volatility
    info, snapshots, audit, registers, vmstatedump: the plugins

Volatility imports every file below this folder at every start, and only an ImportError is
forgiven there. So this file imports the others first and turns anything into that, and neither
the core nor numpy is imported before an image needs them.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging

_log = logging.getLogger(__name__)

if importlib.util.find_spec("qcow2_forensics") is None:
    if not getattr(_log, "told", False):
        _log.told = True  # type: ignore[attr-defined]
        _log.warning("The QCOW2 plugins need the qcow2_forensics package: pip install qcow2-forensics")
    raise ImportError("qcow2_forensics is not installed")

try:
    for _name in ("audit", "info", "layers", "options", "ram", "registers", "snapshots", "stackers", "vmstatedump"):
        importlib.import_module(f".{_name}", __name__)
except ImportError:
    raise
except Exception as error:  # anything else would end every run of Volatility
    raise ImportError(f"the QCOW2 plugins do not fit this Volatility: {error!r}") from error
