"""QCOW2 images inside Volatility 3: memory of any snapshot, and what the image itself shows.

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
    linux_kernel  the address space of a Linux guest, placed by its registers
    info, snapshots, audit, registers, vmstatedump, changes, scan: the plugins

Volatility imports every file below this folder at every start, and any error but ImportError ends it.
So this file imports them first, and one that raises anything else is left out with a warning: a plugin dropped
into the folder needs no guard of its own, and a mistake in it takes nothing else away. Those in ``_LATER`` are
executed at first use, so that users of other plugins do not wait for them. Neither the core nor numpy is imported
before an image needs them.
"""

from __future__ import annotations

import importlib.util
import logging
import pkgutil
import sys

_LATER = ("backing", "choice", "common", "content", "elision", "index_cache", "layers", "ram")

_log = logging.getLogger(__name__)

if importlib.util.find_spec("qcow2_forensics") is None:
    if not getattr(_log, "has_warned", False):
        _log.has_warned = True  # type: ignore[attr-defined]
        _log.warning("The QCOW2 plugins need the qcow2_forensics package: pip install qcow2-forensics")
    raise ImportError("qcow2_forensics is not installed")


def _import_later(name: str) -> None:
    """Put a module in its place that is executed when something of it is wanted."""
    spec = importlib.util.spec_from_file_location(f"{__name__}.{name}", f"{__path__[0]}/{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} cannot be imported")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = globals()[name] = module
    spec.loader.exec_module(module)


def _import_now(name: str) -> None:
    """Import a module; one that fails is left out, and what Volatility would not survive is a warning."""
    full = f"{__name__}.{name}"
    try:
        importlib.import_module(full)
    except ImportError:
        pass  # Volatility tries it again, and lists it among those that cannot be loaded
    except (Exception, SystemExit) as error:  # noqa: BLE001 - anything else would end every run of Volatility
        sys.modules[full] = None  # type: ignore[assignment] # so that nothing imports it again
        _log.warning("The plugin file %s is left out: %r", f"{name}.py", error)


for _name in _LATER:
    _import_later(_name)
for _module in pkgutil.iter_modules(__path__):
    if _module.name not in _LATER:
        _import_now(_module.name)
