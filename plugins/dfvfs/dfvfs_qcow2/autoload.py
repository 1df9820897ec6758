"""Puts each part of the back-end in place when the module it belongs to has been imported.

dfVFS and plaso have no entry points and scan no folder. So a finder at the front of
``sys.meta_path`` waits for the modules in :data:`PARTS`; when one of them has been executed, ours
beside it is imported, and registers itself as its last statement. That order matters: the finder
also fires while one of our own modules is half imported (it imports the module it patches), and
then there is nothing to do, because that module is about to reach its end.

Everything is idempotent: the start-up hook that installs with the package calls :func:`on_import`
for the same modules.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PARTS = {
    "dfvfs.path": "path_spec",
    "dfvfs.credentials": "credentials",
    "dfvfs.resolver_helpers": "resolver_helper",
    "dfvfs.helpers.volume_scanner": "volume_scanner",
    "plaso.cli.storage_media_tool": "plaso_options",
    "plaso.cli.image_export_tool": "plaso_export",
    "plaso.engine.path_helper": "plaso_names",
    "plaso.parsers.mediator": "plaso_events",
    "plaso.preprocessors": "plaso_preprocess",
    "plaso.output.mediator": "plaso_output",
}


def on_import(module_name: str, module: ModuleType) -> None:  # noqa: ARG001 - the hook's calling convention
    """Put our part for ``module_name`` in place; the module has just been executed.

    Raises whatever goes wrong: the caller shows it, because "stock" may mean silent zeros.
    """
    part = PARTS.get(module_name)
    if part is not None:
        importlib.import_module(f"{__package__}.{part}")


def install() -> None:
    """Wait for the modules in :data:`PARTS`, and serve those that are imported already."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in PARTS:
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            on_import(name, module)


def is_active() -> bool:
    """Return whether dfVFS's resolver opens QCOW path specifications with this back-end."""
    manager = sys.modules.get("dfvfs.resolver_helpers.manager")
    ours = sys.modules.get(f"{__package__}.resolver_helper")
    if manager is None or ours is None:
        return False
    try:
        helper = manager.ResolverHelperManager.GetHelper("QCOW")
    except KeyError:
        return False
    return isinstance(helper, ours.QCOWResolverHelper)


class _Finder:
    """Finds nothing itself; wraps the loader of an awaited module."""

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PARTS or getattr(self._asking, "name", None) == fullname:
            return None
        self._asking.name = fullname
        try:
            spec = self._ask_the_others(fullname, path, target)
        finally:
            self._asking.name = None
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec

    def _ask_the_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find_spec is None else find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


class _Loader:
    """Stands in for a module's loader until the module runs, then puts that one back."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # not set yet: an object being copied
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create = getattr(self._loader, "create_module", None)
        module: ModuleType | None = None if create is None else create(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            on_import(module.__name__, module)
        except Exception as error:  # noqa: BLE001 - must not stop the tool; it is shown
            _warn(module.__name__, error)


def _warn(name: str, error: Exception) -> None:
    import warnings

    text = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode().replace("\n", " ")
    # Shown directly: a filter that hides warnings or makes them errors must do neither here.
    warnings.showwarning(
        f"qcow2-forensics is NOT fully active in dfVFS/plaso ({name}: {text}); the stock reader may give wrong data",
        RuntimeWarning,
        __file__,
        0,
        line="",
    )
