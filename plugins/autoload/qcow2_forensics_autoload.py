"""The one import hook: it puts our parts into Volatility 3, dfVFS, plaso and dissect when they are imported.

None of them has entry points. ``qcow2_forensics_autoload.pth`` (Python 3.14 and older) or the
``.start`` file beside it (PEP 829, Python 3.15 and newer) calls :func:`install` when an interpreter
starts, so everything here must be cheap: no import beyond ``os`` and ``sys``, which ``site`` has loaded
already (``__future__`` alone would cost 0.2 ms, hence the quoted annotations), and one set lookup
per imported module afterwards::

    import volatility3.framework.constants
      -> _Finder.find_spec        the name is awaited: ask the finders after this one, wrap the loader
      -> _Loader.exec_module      the real loader runs the module, then the part for it is put in place

:data:`PARTS` names the part for each awaited module: a module of ours, which registers itself as its last
statement. That order matters: the hook also fires while such a module is half imported, because it imports
the module it patches, and then there is nothing to do. Volatility's part is a folder on its plugin path,
appended in place, because ``vol -p`` builds its own list from that one.

A framework older than :data:`OLDEST` is left alone. ``QCOW2_FORENSICS_AUTOLOAD=0`` switches the hook off.
A failure never stops the hooked tool, but it is always shown: its stock reader may give zeros where the
evidence has data.
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
PARTS = {
    "volatility3.framework.constants": "",  # no module: the plugin folder
    "dfvfs.path": "dfvfs_qcow2.path_spec",
    "dfvfs.credentials": "dfvfs_qcow2.credentials",
    "dfvfs.resolver_helpers": "dfvfs_qcow2.resolver_helper",
    "dfvfs.helpers.source_scanner": "dfvfs_qcow2.source_scanner",
    "dfvfs.helpers.volume_scanner": "dfvfs_qcow2.volume_scanner",
    "plaso.cli.storage_media_tool": "dfvfs_qcow2.plaso_options",
    "plaso.cli.image_export_tool": "dfvfs_qcow2.plaso_export",
    "plaso.cli.extraction_tool": "dfvfs_qcow2.plaso_extraction",
    "plaso.cli.pinfo_tool": "dfvfs_qcow2.plaso_pinfo",
    "plaso.engine.worker": "dfvfs_qcow2.plaso_worker",
    "plaso.engine.path_helper": "dfvfs_qcow2.plaso_names",
    "plaso.output.mediator": "dfvfs_qcow2.plaso_output",
    "plaso.parsers.mediator": "dfvfs_qcow2.plaso_events",
    "plaso.parsers.ntfs": "dfvfs_qcow2.plaso_mft",
    "plaso.preprocessors": "dfvfs_qcow2.plaso_preprocess",
    "dissect.target.container": "dissect_qcow2.container",
    "dissect.target.loader": "dissect_qcow2.loader",
}
FRAMEWORKS = {"volatility3": "Volatility 3", "dfvfs": "dfVFS", "plaso": "plaso", "dissect": "dissect"}
OLDEST = {"volatility3": (2, 11), "dfvfs": (20260712,), "plaso": (20260720,), "dissect": (3, 25)}
"""The oldest versions the tests pass with; pyproject.toml has the same bounds."""


def install() -> None:
    """Wait for every framework, unless the environment variable says no; what interpreters do at their start."""
    if os.environ.get(VARIABLE, "").strip().lower() not in {"0", "false", "no", "off"}:
        wait_for(*FRAMEWORKS)


def wait_for(*frameworks: str) -> None:
    """Wait for the modules of these frameworks, and serve those that are imported already; asked for by name."""
    finder = next((item for item in sys.meta_path if isinstance(item, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    names = [name for name in PARTS if name.partition(".")[0] in frameworks]
    finder.wait_for(names)
    for name in names:
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            finder.activate(name, module)


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
        self._waiting: set[str] = set()
        self._done: set[str] = set()
        self._asking: set[tuple[int, str]] = set()
        self._warned: set[str] = set()

    def wait_for(self, names: "Sequence[str]") -> None:
        self._waiting.update(name for name in names if name not in self._done)

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
        """Put our part for a module that has just been executed in place; never raises an ``Exception``."""
        if name not in self._waiting:
            return
        self._waiting.discard(name)
        self._done.add(name)
        if not self._waiting:
            # A new list: another thread may be walking the old one, and would skip a finder.
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        framework = name.partition(".")[0]
        try:
            too_old = _too_old(framework, module)
            if too_old:
                self._warn(framework, too_old)
            elif PARTS[name]:
                __import__(PARTS[name])
            else:
                _extend_plugin_path(module)
        except Exception as error:  # noqa: BLE001 - a part that cannot start must not stop the tool; it is shown
            self._warn(framework, f"{type(error).__name__}: {error}")

    def _warn(self, framework: str, why: str) -> None:
        text = why.encode("ascii", "backslashreplace").decode().replace("\n", " ")
        if text in self._warned:
            return
        self._warned.add(text)
        import warnings

        # Shown directly: a filter that hides warnings or makes them errors must do neither here.
        warnings.showwarning(
            f"qcow2-forensics is NOT active in {FRAMEWORKS[framework]}, its stock reader may give wrong data ({text})",
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


def _too_old(framework: str, module: "ModuleType") -> str:
    """Return a sentence when the framework is older than what the tests pass with, else an empty string."""
    version = getattr(sys.modules[framework], "__version__", None) or getattr(module, "PACKAGE_VERSION", None)
    if version is None and framework == "dissect":
        from importlib import metadata

        try:
            version = metadata.version("dissect.target")
        except metadata.PackageNotFoundError:  # run from a checkout
            return ""
    numbers = [int(part) for part in str(version or "").split(".") if part.isdecimal()]
    oldest = OLDEST[framework]
    if not numbers or tuple(numbers) >= oldest:
        return ""
    wanted = ".".join(str(number) for number in oldest)
    return f"{FRAMEWORKS[framework]} {version} is older than {wanted}: update it, or uninstall qcow2-forensics here"
