"""The public surface is exactly what ARCHITECTURE promises scripts, and cheap to import."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import qcow2_forensics as q
from tests.image_builder import Builder

CONTRACT = {
    "open_image",
    "open_disk",
    "open_vm_state",
    "open_guest_memory",
    "audit",
    "audit_path",
    "compare",
    "residue",
    "Resolver",
    "Limits",
    "Severity",
    "Evidence",
    "Finding",
    "Report",
    "Qcow2Error",
    "NotQcow2",
    "FormatError",
    "LimitExceeded",
    "Unsupported",
    "MissingFile",
    "ForbiddenReference",
    "Locked",
    "ReadError",
}


def _fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_every_name_of_the_contract_is_there_and_every_public_name_exists() -> None:
    assert set(q.__all__) >= CONTRACT
    for name in q.__all__:
        assert getattr(q, name) is not None


def test_type_checkers_find_each_public_name_where_it_is_imported_from() -> None:
    source = Path(q.__file__).read_text(encoding="utf-8")
    block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    ours = [node for node in block.body if isinstance(node, ast.ImportFrom) and node.level]
    seen = {alias.name: node.module for node in ours for alias in node.names if alias.asname == alias.name}
    assert seen == q._HOMES


@pytest.mark.parametrize("name", ["audit", "compare", "residue"])
def test_a_function_stays_one_after_the_package_of_its_name_was_imported(name: str) -> None:
    code = (
        f"import inspect, qcow2_forensics.{name}, qcow2_forensics as q;"
        f"from qcow2_forensics.{name} import {name};"
        f"print(inspect.isfunction(q.{name}), q.{name} is {name})"
    )
    assert _fresh(code) == "True True"


def test_the_package_of_residue_brings_no_numpy_until_it_is_used() -> None:
    assert _fresh("import sys, qcow2_forensics.residue; print('numpy' in sys.modules)") == "False"


def test_importing_the_package_imports_neither_numpy_nor_a_framework() -> None:
    code = (
        "import sys, qcow2_forensics;"
        "print([m for m in ('numpy', 'volatility3', 'dfvfs', 'pytsk3', 'cryptography', 'json') if m in sys.modules])"
    )
    found = _fresh(code)
    assert "numpy" not in found
    assert "volatility3" not in found
    assert "dfvfs" not in found
    assert "pytsk3" not in found
    assert "cryptography" not in found


def test_a_disk_that_nobody_holds_closes_its_file_at_once() -> None:
    code = (
        "import gc, os, importlib.resources, lzma, tempfile, qcow2_forensics as q;"
        "gc.disable();"
        "data = (importlib.resources.files('qcow2_forensics') / 'data' / 'demo.qcow2.xz').read_bytes();"
        "file = tempfile.NamedTemporaryFile(suffix='.qcow2');"
        "file.write(lzma.decompress(data)); file.flush();"
        "count = lambda: len(os.listdir('/proc/self/fd'));"
        "before = count();"
        "q.open_disk(file.name).read(0, 4096); q.open_vm_state(file.name).read(0, 4);"
        "print(count() - before)"
    )
    assert _fresh(code) == "0"


def test_importing_the_package_imports_none_of_its_modules() -> None:
    code = "import sys, qcow2_forensics; print([name for name in sys.modules if name.startswith('qcow2_forensics.')])"
    assert _fresh(code) == "[]"


@pytest.mark.parametrize(
    ("command", "unwanted"),
    [
        ("diff {} --from active", ("files", "render", "census.survey", "findings")),
        ("info {}", ("files", "render", "census", "findings", "reader.disk", "reader.resolver")),
    ],
)
def test_a_command_imports_nothing_for_what_it_is_not_asked_to_do(
    command: str, unwanted: tuple[str, ...], tmp_path: Path
) -> None:
    image = Builder().write(tmp_path / "a.qcow2")
    code = (
        "import contextlib, io, sys\n"
        "from qcow2_forensics.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    main({[item.format(image) for item in command.split()]})\n"
        f"unwanted = ('hashlib', 'logging', *('qcow2_forensics.' + name for name in {unwanted}))\n"
        "print([name for name in sys.modules if name.startswith(unwanted)])"
    )
    assert _fresh(code) == "[]"


def test_ctrl_c_while_the_command_is_imported_is_no_traceback() -> None:
    code = (
        "import signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'qcow2_forensics.cli': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from qcow2_forensics.__main__ import main\n"
        "sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "qcow2-forensics: interrupted\n")


def test_the_command_starts_where_ctrl_c_is_handled() -> None:
    project = tomllib.loads((PLUGINS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"]["qcow2-forensics"] == "qcow2_forensics.__main__:main"


PLUGINS = Path(__file__).parent.parent / "plugins"
# All words and the grammar of states are public as a whole, of packages what they list.
MODULES = {"qcow2_forensics.text", "qcow2_forensics.reader.states"}
PACKAGES = {f"qcow2_forensics{name}" for name in ("", ".compare", ".files", ".memory", ".recovery", ".residue")}


@pytest.mark.parametrize("package", sorted(PACKAGES | {"qcow2_forensics.render"}))
def test_no_public_name_of_a_package_gives_way_to_a_module_that_was_imported(package: str) -> None:
    found = importlib.import_module(package)
    modules = [name for _, name, _ in pkgutil.iter_modules(found.__path__) if name != "__main__"]
    for name in modules:
        importlib.import_module(f"{package}.{name}")
    assert [name for name in found.__all__ if isinstance(getattr(found, name), ModuleType)] == []


@pytest.mark.parametrize("adapter", ["dfvfs", "dissect", "tsk_img", "volatility"])
def test_an_adapter_imports_public_names_only(adapter: str) -> None:
    deeper = []
    for path in sorted((PLUGINS / adapter).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) and not node.level else None
            if module is None or module.partition(".")[0] != "qcow2_forensics" or module in MODULES:
                continue
            public = set(importlib.import_module(module).__all__) if module in PACKAGES else set()
            for name in (alias.name for alias in node.names):
                if name not in public and f"{module}.{name}" not in MODULES | PACKAGES:
                    deeper.append(f"{path.name}: {module}.{name}")
    assert deeper == []
