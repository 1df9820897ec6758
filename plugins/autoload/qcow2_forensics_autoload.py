"""One lazy import hook that switches our back-ends on inside Volatility 3 and dfVFS/plaso.

Neither framework has entry points. ``qcow2_forensics_autoload.pth`` (Python 3.14 and older) or the
``.start`` file beside it (PEP 829, Python 3.15 and newer) calls :func:`install` when an interpreter
starts, so everything here must be cheap: no import beyond ``os`` and ``sys``, which ``site`` has loaded
already (``__future__`` alone would cost 0.2 ms, hence the quoted annotations), and one set lookup
per imported module afterwards::

    import volatility3.framework.constants
      -> _Finder.find_spec        the name is awaited: ask the finders behind us, wrap the loader
      -> _Loader.exec_module      the real loader runs the module, then the back-end is activated

What is awaited, and what happens then:

* ``volatility3.framework.constants``: our plugin folder is appended to its ``PLUGINS_PATH``, in
  place, because ``vol -p`` builds its own list from that one.
* the dfVFS and plaso modules in ``_DFVFS``: ``dfvfs_qcow2.autoload.on_import(name, module)`` is called.

``QCOW2_FORENSICS_AUTOLOAD=0`` switches it off. A failure never stops the hooked tool, but it is
always shown: "stock" may mean zeros where the evidence has data.
"""

import os
import sys

TYPE_CHECKING = False  # importing typing would cost more than everything else here
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

VARIABLE = "QCOW2_FORENSICS_AUTOLOAD"
_VOLATILITY = ("volatility3.framework.constants",)
_DFVFS = (
    "dfvfs.path",
    "dfvfs.credentials",
    "dfvfs.resolver_helpers",
    "dfvfs.helpers.volume_scanner",
    "plaso.cli.storage_media_tool",
    "plaso.cli.image_export_tool",
    "plaso.engine.path_helper",
    "plaso.output.mediator",
    "plaso.parsers.mediator",
    "plaso.preprocessors",
)
AWAITED = frozenset(_VOLATILITY + _DFVFS)


def install() -> None:
    """Put the hook in front of the import system, once; what is imported already is activated now."""
    if os.environ.get(VARIABLE, "").strip().lower() in {"0", "false", "no", "off"}:
        return
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    for name in AWAITED.intersection(sys.modules):
        finder.activate(name, sys.modules[name])


def is_installed() -> bool:
    """Return whether the hook ran in this interpreter and still waits for something."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def plugin_folder() -> str:
    """Return the folder for Volatility's plugin path: installed beside this file, or in the checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(here, "qcow2_forensics_volatility")
    return installed if os.path.isdir(installed) else os.path.join(os.path.dirname(here), "volatility")


class _Finder:
    """A meta-path finder that finds nothing itself, and wraps the loaders of awaited modules."""

    def __init__(self) -> None:
        self._waiting = set(AWAITED)
        self._asking: set[tuple[int, str]] = set()
        self._warned: set[str] = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname not in self._waiting:
            return None
        import _thread

        # Another hook may answer by asking every finder again, us included: then stand aside.
        asked = (_thread.get_ident(), fullname)
        if asked in self._asking:
            return None
        self._asking.add(asked)
        try:
            spec = self._ask_the_others(fullname, path, target)
        finally:
            self._asking.discard(asked)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
        return spec

    def _ask_the_others(
        self, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None"
    ) -> "ModuleSpec | None":
        finders = list(sys.meta_path)
        # Those before us have declined already; if we are not in the list, somebody holds us alone.
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find_spec is None else find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None

    def activate(self, name: str, module: "ModuleType") -> None:
        """Switch our part on in a module that has just been executed; never raises an ``Exception``."""
        if name not in self._waiting:
            return
        self._waiting.discard(name)
        if not self._waiting:
            # A new list: another thread may be walking the old one, and would skip a finder.
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        try:
            if name in _VOLATILITY:
                _extend_plugin_path(module)
            else:
                from dfvfs_qcow2 import autoload

                autoload.on_import(name, module)
        except Exception as error:  # noqa: BLE001 - a back-end that cannot start must not stop the tool; it is shown
            self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        framework = "Volatility 3" if name in _VOLATILITY else "dfVFS/plaso"
        text = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode().replace("\n", " ")
        if text in self._warned:
            return
        self._warned.add(text)
        import warnings

        # Shown directly: a filter that hides warnings or makes them errors must do neither here.
        warnings.showwarning(
            f"qcow2-forensics is NOT active in {framework}, its stock reader may give wrong data ({text})",
            RuntimeWarning,
            __file__,
            0,
            line="",
        )


class _Loader:
    """Stands in for a module's loader until the module is about to run, then puts that one back."""

    def __init__(self, loader: "Any", finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> "Any":
        if name == "_loader":  # not set yet: an object being copied or unpickled
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        create = getattr(self._loader, "create_module", None)
        module: ModuleType | None = None if create is None else create(spec)
        return module

    def exec_module(self, module: "ModuleType") -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.activate(module.__name__, module)


def _extend_plugin_path(constants: "ModuleType") -> None:
    folder = plugin_folder()
    if not os.path.isdir(os.path.join(folder, "qcow2")):
        raise FileNotFoundError(f"the plugin folder {folder} is missing")
    paths: list[str] = constants.PLUGINS_PATH
    if folder not in paths:
        paths.append(folder)
