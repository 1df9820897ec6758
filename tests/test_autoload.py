"""The import hook, against stand-in frameworks in fresh interpreters, and against the real ones."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.tiers import every

HOOK = Path(__file__).parent.parent / "plugins" / "autoload"
PLUGIN_FOLDER = HOOK.parent / "volatility"

# Stand-ins with the module names the hook waits for; each part of ours records that it was imported.
STAND_INS = {
    "volatility3/__init__.py": "",
    "volatility3/framework/__init__.py": "",
    "volatility3/framework/constants/__init__.py": 'KEEP = PLUGINS_PATH = ["stock"]\nSEEN = __loader__, __spec__.loader\n',
    "dfvfs/__init__.py": "",
    "dfvfs/path/__init__.py": "import dfvfs.credentials\nDONE = True\n",
    "dfvfs/credentials/__init__.py": "",
    "dfvfs/resolver_helpers/__init__.py": "",
    "dfvfs/helpers/__init__.py": "",
    "dfvfs/helpers/source_scanner.py": "",
    "dfvfs/helpers/volume_scanner.py": "",
    "plaso/__init__.py": "",
    "plaso/cli/__init__.py": "",
    "plaso/cli/storage_media_tool.py": "",
    "plaso/cli/image_export_tool.py": "",
    "plaso/cli/extraction_tool.py": "",
    "plaso/cli/pinfo_tool.py": "",
    "plaso/engine/__init__.py": "",
    "plaso/engine/path_helper.py": "",
    "plaso/engine/worker.py": "",
    "plaso/multi_process/__init__.py": "",
    "plaso/output/__init__.py": "",
    "plaso/output/mediator.py": "",
    "plaso/parsers/__init__.py": "",
    "plaso/parsers/mediator.py": "",
    "plaso/parsers/ntfs.py": "",
    "plaso/preprocessors/__init__.py": "",
    "dissect/target/__init__.py": "",
    "dissect/target/container.py": "",
    "dissect/target/loader.py": "",
    "recorder.py": "CALLS = []\n",
    "dfvfs_qcow2/__init__.py": "",
    "dissect_qcow2/__init__.py": "",
}
sys.path.insert(0, str(HOOK))
PARTS = {name: part for name, part in importlib.import_module("qcow2_forensics_autoload").PARTS.items() if part}
# Each part imports what it patches, as the real ones do, and then notes that it is in place.
STAND_INS |= {
    f"{part.replace('.', '/')}.py": f"import recorder, {name} as module\nrecorder.CALLS.append(({name!r}, module))\n"
    for name, part in PARTS.items()
}


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    for name, text in STAND_INS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def run(
    where: Path, code: str, *options: str, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that sees the hook and ``where``, and no site-packages."""
    prelude = f"import sys; sys.path[:0] = [{str(HOOK)!r}, {str(where)!r}]\nimport qcow2_forensics_autoload as hook\n"
    environment = {"PATH": os.environ["PATH"], **environment}
    command = [sys.executable, "-S", "-E", *options, "-c", prelude + textwrap.dedent(code)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=check)


def test_plugin_folder_is_appended_in_place_so_that_a_users_own_folder_keeps_it(stand_ins: Path) -> None:
    result = run(
        stand_ins,
        """
        hook.install()
        import volatility3.framework.constants as constants
        assert constants.PLUGINS_PATH is constants.KEEP
        print(constants.PLUGINS_PATH)
        """,
    )
    assert result.stdout.strip() == str(["stock", str(PLUGIN_FOLDER)])
    assert not result.stderr


def test_the_part_for_every_awaited_module_is_imported_once_after_that_ran(stand_ins: Path) -> None:
    run(
        stand_ins,
        """
        hook.install()
        import importlib
        awaited = sorted(name for name, part in hook.PARTS.items() if part)
        for name in awaited:
            importlib.import_module(name)
        import dfvfs.path
        importlib.reload(dfvfs.path)
        from recorder import CALLS
        names = [name for name, _ in CALLS]
        assert sorted(names) == awaited, names
        assert names.index("dfvfs.credentials") < names.index("dfvfs.path")
        assert all(sys.modules[name] is module for name, module in CALLS)
        """,
    )


def test_installing_imports_nothing_but_the_hook(stand_ins: Path) -> None:
    result = run(
        stand_ins,
        """
        before = set(sys.modules)
        hook.install()
        print(sorted(set(sys.modules) - before))
        """,
    )
    assert result.stdout.strip() == "[]"


def test_an_unrelated_import_loads_no_back_end(stand_ins: Path) -> None:
    run(stand_ins, "hook.install(); import json, dfvfs; assert 'dfvfs_qcow2' not in sys.modules")


@pytest.mark.parametrize("value", ["0", "no", "off", "False", " 0 "])
def test_environment_variable_switches_it_off(stand_ins: Path, value: str) -> None:
    result = run(
        stand_ins,
        """
        hook.install()
        import volatility3.framework.constants as constants
        print(constants.PLUGINS_PATH, hook.is_installed())
        """,
        QCOW2_FORENSICS_AUTOLOAD=value,
    )
    assert result.stdout.strip() == "['stock'] False"


def test_module_keeps_its_real_loader_while_it_runs_and_after(stand_ins: Path) -> None:
    run(
        stand_ins,
        """
        hook.install()
        import inspect, importlib.machinery, importlib.resources
        import volatility3.framework.constants as constants
        for loader in (*constants.SEEN, constants.__loader__, constants.__spec__.loader):
            assert type(loader) is importlib.machinery.SourceFileLoader, loader
        assert "KEEP" in inspect.getsource(constants)
        assert importlib.resources.files(constants).joinpath("__init__.py").is_file()
        """,
    )


def test_looking_for_a_module_without_importing_it_activates_nothing(stand_ins: Path) -> None:
    run(
        stand_ins,
        """
        hook.install()
        import importlib.util
        spec = importlib.util.find_spec("dfvfs.path")
        assert spec.loader.get_filename("dfvfs.path") == spec.origin
        assert "dfvfs_qcow2" not in sys.modules
        import dfvfs.path
        from recorder import CALLS
        assert [name for name, _ in CALLS] == ["dfvfs.credentials", "dfvfs.path"]
        """,
    )


def test_missing_framework_still_raises_module_not_found(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
        hook.install()
        for name in hook.PARTS:
            try:
                __import__(name)
            except ModuleNotFoundError as error:
                assert error.name == name.partition(".")[0]
            else:
                raise AssertionError(name)
        """,
    )


def test_module_that_fails_to_import_is_still_awaited(stand_ins: Path) -> None:
    (stand_ins / "dfvfs/credentials/__init__.py").write_text(
        "import sys\nif not hasattr(sys, 'go'): raise ValueError\n"
    )
    run(
        stand_ins,
        """
        hook.install()
        try:
            import dfvfs.credentials
        except ValueError:
            sys.go = True
        else:
            raise AssertionError
        assert "dfvfs_qcow2" not in sys.modules
        import dfvfs.credentials
        from recorder import CALLS
        assert [name for name, _ in CALLS] == ["dfvfs.credentials"]
        """,
    )


@pytest.mark.parametrize("options", [(), ("-W", "error"), ("-W", "ignore")])
def test_failed_activation_says_so_in_one_line_and_the_tool_goes_on(stand_ins: Path, options: tuple[str, ...]) -> None:
    for part in ("path_spec", "resolver_helper"):
        (stand_ins / f"dfvfs_qcow2/{part}.py").write_text("raise RuntimeError('first\\nsecond \\x1b[31m')\n")
    result = run(
        stand_ins,
        "hook.install(); import dfvfs.path, dfvfs.resolver_helpers; print(dfvfs.path.DONE)",
        *options,
    )
    assert result.stdout.strip() == "True"
    assert result.stderr.count("\n") == 1
    assert "NOT active in dfVFS" in result.stderr
    assert "RuntimeError: first second" in result.stderr


def test_missing_plugin_folder_says_so(stand_ins: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    (alone / "qcow2_forensics_autoload.py").write_bytes((HOOK / "qcow2_forensics_autoload.py").read_bytes())
    code = f"""
        import importlib
        sys.path.insert(0, {str(alone)!r}); del sys.modules["qcow2_forensics_autoload"]
        import qcow2_forensics_autoload
        qcow2_forensics_autoload.install()
        import volatility3.framework.constants as constants
        print(constants.PLUGINS_PATH)
        """
    result = run(stand_ins, code)
    assert result.stdout.strip() == "['stock']"
    assert "NOT active in Volatility 3" in result.stderr


def test_what_was_imported_before_is_activated_on_installation(stand_ins: Path) -> None:
    run(
        stand_ins,
        """
        import dfvfs.path
        hook.install()
        from recorder import CALLS
        assert sorted(name for name, _ in CALLS) == ["dfvfs.credentials", "dfvfs.path"]
        """,
    )


def test_installing_twice_installs_once(stand_ins: Path) -> None:
    run(stand_ins, "n = len(sys.meta_path); hook.install(); hook.install(); assert len(sys.meta_path) == n + 1")


@pytest.mark.parametrize("position", ["0", "len(sys.meta_path)"])
def test_another_hook_that_asks_every_finder_does_not_recurse(stand_ins: Path, position: str) -> None:
    run(
        stand_ins,
        f"""
        class Greedy:
            busy = False
            def find_spec(self, name, path=None, target=None):
                if self.busy:
                    return None
                self.busy = True
                try:
                    for finder in sys.meta_path:
                        spec = finder.find_spec(name, path, target)
                        if spec is not None:
                            return spec
                finally:
                    self.busy = False
        hook.install()
        sys.meta_path.insert({position}, Greedy())
        import dfvfs.path
        from recorder import CALLS
        assert [name for name, _ in CALLS] == ["dfvfs.credentials", "dfvfs.path"]
        """,
    )


def test_finder_leaves_when_everything_awaited_has_come(stand_ins: Path) -> None:
    run(
        stand_ins,
        """
        n = len(sys.meta_path)
        hook.install()
        for name in sorted(hook.PARTS):
            assert hook.is_installed()
            __import__(name)
        assert not hook.is_installed() and len(sys.meta_path) == n
        """,
    )


def test_many_threads_importing_at_once_activate_each_module_once(stand_ins: Path) -> None:
    run(
        stand_ins,
        """
        import importlib, threading
        hook.install()
        errors = []
        start = threading.Barrier(16)
        def work(names):
            start.wait()
            try:
                for name in names:
                    importlib.import_module(name)
            except BaseException as error:
                errors.append(error)
        names = sorted(hook.PARTS)
        threads = [threading.Thread(target=work, args=(names[i % 5:] + names[:i % 5],)) for i in range(16)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not errors, errors
        from recorder import CALLS
        assert sorted(name for name, _ in CALLS) == sorted(name for name, part in hook.PARTS.items() if part)
        """,
    )


def test_startup_files_name_the_same_function() -> None:
    line = (HOOK / "qcow2_forensics_autoload.pth").read_text()
    assert line == "import qcow2_forensics_autoload; qcow2_forensics_autoload.install()\n"
    assert (HOOK / "qcow2_forensics_autoload.start").read_text() == "qcow2_forensics_autoload:install\n"


def real(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def test_every_part_is_there() -> None:
    folders = {"dfvfs_qcow2": HOOK.parent / "dfvfs", "dissect_qcow2": HOOK.parent / "dissect"}
    for part in PARTS.values():
        assert (folders[part.partition(".")[0]] / f"{part.replace('.', '/')}.py").is_file(), part


OLD = {
    "volatility3/framework/constants/__init__.py": (
        "PACKAGE_VERSION = '2.5.2'\nPLUGINS_PATH = ['stock']\n",
        "Volatility 3",
    ),
    "dfvfs/__init__.py": ("__version__ = '20260411'\n", "dfVFS"),
    "plaso/__init__.py": ("__version__ = '20240826'\n", "plaso"),
}


@pytest.mark.parametrize("file", OLD)
def test_a_framework_that_is_too_old_is_left_alone_and_says_so_once(stand_ins: Path, file: str) -> None:
    text, label = OLD[file]
    (stand_ins / file).write_text(text)
    result = run(
        stand_ins,
        """
        hook.install()
        for name in hook.PARTS:
            __import__(name)
        from recorder import CALLS
        print(sorted({name.partition(".")[0] for name, _ in CALLS}), sys.modules["volatility3.framework.constants"].PLUGINS_PATH)
        """,
    )
    assert result.stderr.count("NOT active") == 1
    assert f"NOT active in {label}" in result.stderr
    assert "is older than" in result.stderr
    untouched = file.partition("/")[0]
    assert f"'{untouched}'" not in result.stdout
    assert (str(PLUGIN_FOLDER) in result.stdout) == (untouched != "volatility3")


def test_the_oldest_versions_are_those_the_extras_ask_for() -> None:
    import tomllib

    hook = importlib.import_module("qcow2_forensics_autoload")
    extras = tomllib.loads((HOOK.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [item.split(">=") for extra in ("volatility", "dfvfs", "plaso", "dissect") for item in extras[extra]]
    bounds = {name.partition(".target")[0]: bound for name, _, bound in (("".join(i[:1]), "", i[-1]) for i in wanted)}
    for framework, oldest in hook.OLDEST.items():
        assert bounds[framework] == ".".join(map(str, oldest))


def test_asking_for_a_framework_by_name_serves_that_one_even_when_switched_off(stand_ins: Path) -> None:
    result = run(
        stand_ins,
        """
        hook.install()
        hook.wait_for("dfvfs", "plaso")
        import dfvfs.path, volatility3.framework.constants as constants
        from recorder import CALLS
        print([name for name, _ in CALLS], constants.PLUGINS_PATH)
        """,
        QCOW2_FORENSICS_AUTOLOAD="0",
    )
    assert result.stdout.strip() == "['dfvfs.credentials', 'dfvfs.path'] ['stock']"


def test_the_start_of_an_interpreter_costs_a_few_hundred_lines_and_no_further_module(stand_ins: Path) -> None:
    code = """
        lines = 0
        def note(_frame, event, _argument):
            global lines
            lines += event == "line"
            return note
        sys.modules.pop("qcow2_forensics_autoload")
        known = set(sys.modules)
        sys.settrace(note)
        import qcow2_forensics_autoload
        qcow2_forensics_autoload.install()
        sys.settrace(None)
        print(lines, *(set(sys.modules) - known))
        """
    lines, *modules = run(stand_ins, code).stdout.split()
    assert modules == ["qcow2_forensics_autoload"]
    assert int(lines) < 1000


def run_real(code: str) -> subprocess.CompletedProcess[str]:
    paths = [str(HOOK), *(str(Path(entry).absolute()) for entry in sys.path if entry)]
    prelude = f"import sys; sys.path[:0] = {paths!r}\nimport qcow2_forensics_autoload as hook; hook.install()\n"
    command = [sys.executable, "-I", "-W", "error", "-c", prelude + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@real("volatility3")
def test_real_volatility_finds_our_folder_as_a_plugin_package() -> None:
    result = run_real(
        """
        import volatility3.plugins
        import importlib.util
        print(list(importlib.util.find_spec("volatility3.plugins.qcow2").submodule_search_locations))
        """
    )
    assert str(PLUGIN_FOLDER / "qcow2") in result.stdout, result.stderr


@real("plaso")
@pytest.mark.parametrize(
    "first",
    every(
        4,
        [
            "dfvfs.path",
            "dfvfs.credentials",
            "dfvfs.resolver_helpers",
            "dfvfs.helpers.volume_scanner",
            "plaso.preprocessors",
            "dfvfs_qcow2",
        ],
    ),
)
def test_real_dfvfs_reads_qcow_with_our_back_end_whatever_is_imported_first(first: str) -> None:
    result = run_real(
        f"""
        import warnings; warnings.simplefilter("default")
        import {first}
        import dfvfs.resolver.resolver
        from dfvfs.resolver_helpers import manager
        print(type(manager.ResolverHelperManager.GetHelper("QCOW")).__module__)
        """
    )
    assert result.stdout.strip().startswith("dfvfs_qcow2."), result.stderr
    assert "NOT active" not in result.stderr
