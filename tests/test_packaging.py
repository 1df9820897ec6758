"""What the wheel, the source distribution and an editable install hold, and that each is live.

Everything is built and installed for real, into virtual environments of their own and without a
network: frameworks come from the test interpreter's site-packages, appended by a plain path line
(whose own ``.pth`` files ``site`` does not run, so the hook seen is the one under test).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from qcow2_forensics.cli.doctor import diagnose
from tests import filesystems, guest_disks
from tests.tiers import quick

ROOT = Path(__file__).parent.parent
FOLDER = "qcow2_forensics_volatility"
STARTUP = ["qcow2_forensics_autoload.pth", "qcow2_forensics_autoload.start"]
PYTEST = ".venv/bin/python -m pytest -n auto --dist loadfile"
TEST_COMMAND = f"python3 -m venv .venv && .venv/bin/pip install -q -e '.[all,test]' && {PYTEST}"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed"),
    pytest.mark.skipif(os.name == "nt", reason="the layout of a Windows environment is not covered"),
]


def execute(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "QCOW2_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def build(target: str, source: Path, folder: Path) -> Path:
    execute(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder, cwd=source)
    (built,) = folder.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return built


class Environment:
    """A virtual environment without pip; the test interpreter's pip installs into it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = Path(
            sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}, scheme="venv")
        )

    def install(self, *what: str | Path) -> None:
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
        execute(
            sys.executable, "-m", "pip", "--python", self.python, "install", *options, *what, PYTHONPATH=self.tools()
        )

    @staticmethod
    def tools() -> str:
        # pip runs under the target interpreter, where the build back-end is not installed.
        return str(Path(importlib.util.find_spec("hatchling").origin).parent.parent)  # type: ignore[union-attr, arg-type]

    def see_frameworks(self, folder: Path) -> None:
        """Let the environment import what ``folder`` holds, after its own packages."""
        (self.site / "zz_frameworks.pth").write_text(f"{folder}\n")

    def run(self, code: str, **environment: str) -> str:
        return execute(self.python, "-c", code, cwd=self.site.parent, **environment).strip()

    def files(self) -> set[str]:
        found = (path.relative_to(self.site) for path in self.site.rglob("*") if path.is_file())
        return {path.as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def frameworks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test interpreter's packages without ours, so that nothing of ours is found by accident."""
    folder = tmp_path_factory.mktemp("frameworks")
    ours = re.compile(r"_?_?(editable_)?(qcow2_forensics|qcow2-forensics|dfvfs_qcow2|dissect_qcow2|pytsk3_qcow2)")
    for scheme in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(scheme).iterdir():
            if not ours.match(entry.name) and entry.suffix != ".pth" and entry.name != "__pycache__":
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path, frameworks: Path) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install(wheel)
    environment.see_frameworks(frameworks)
    return environment


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory, frameworks: Path) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("editable"))
    environment.install("--editable", ROOT)
    environment.see_frameworks(frameworks)
    return environment


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


both = pytest.mark.parametrize("kind", quick(["installed", "editable"], []))


def sources(folder: str) -> set[str]:
    found = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def test_wheel_holds_the_packages_the_plugin_folder_and_the_hook_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"qcow2_forensics_autoload.py", *STARTUP}
    expected |= {f"qcow2_forensics/{name}" for name in sources("src/qcow2_forensics")}
    expected |= {f"dfvfs_qcow2/{name}" for name in sources("plugins/dfvfs/dfvfs_qcow2")}
    expected |= {f"dissect_qcow2/{name}" for name in sources("plugins/dissect/dissect_qcow2")}
    expected |= {f"pytsk3_qcow2/{name}" for name in sources("plugins/tsk_img/pytsk3_qcow2")}
    expected |= {f"{FOLDER}/qcow2/{name}" for name in sources("plugins/volatility/qcow2")}
    assert names == expected


def test_wheel_holds_both_licences_and_the_plugin_folder_its_own(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    licences = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert len(licences) == 3
    assert b"Volatility Software License" in archive.read(f"{FOLDER}/qcow2/LICENSE")


def test_wheel_puts_nothing_into_a_frameworks_own_folder(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert not tops & {"volatility3", "dfvfs", "dissect", "plaso", "pytsk3", "plugins", "qcow2"}


@pytest.mark.slow
def test_wheel_built_from_the_source_distribution_is_the_same(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):  # Debian 12's Python is 3.11.2, which has none; the archive is ours
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(tmp_path)  # noqa: S202
    (source,) = tmp_path.iterdir()
    again = build("wheel", source, tmp_path / "dist")
    first, second = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    assert {name: first.read(name) for name in first.namelist()} == {
        name: second.read(name) for name in second.namelist()
    }


def test_a_package_index_shows_the_readme_without_links_that_lead_nowhere(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    text = archive.read(name).decode()
    assert "Description-Content-Type: text/markdown" in text
    assert "docs/volatility.md" in text
    assert not [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("http")]


def test_every_extra_but_those_with_a_reason_is_in_all() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"\[(.*)\]", extras["all"][0])
    assert set(named.split(",")) == set(extras) - {"all", "dissect", "test", "lint", "dev"}


# What an extra installs that is not imported under its own name, or only by a tool that is started.
_IMPORTED_AS = {
    "cryptography": "cryptography",
    "dissect.target": "dissect",
    "libvhdi-python": "pyvhdi",
    "libvmdk-python": "pyvmdk",
    "zlib-ng": "zlib_ng",
}


def test_what_every_extra_installs_is_imported_by_something() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [path.read_text(encoding="utf-8") for top in ("src", "plugins") for path in (ROOT / top).rglob("*.py")]
    code = "\n".join(sources)
    for name in set(extras) - {"all", "test", "lint", "dev"}:
        wanted = [re.split(r"[><=\[]", item)[0] for item in extras[name] if not item.startswith("qcow2-forensics")]
        for package in wanted:
            if package.startswith("dissect.") and package != "dissect.target":
                continue  # file systems, which dissect.target imports by itself
            module = _IMPORTED_AS.get(package, package)
            assert re.search(rf"\b(?:import|from) {re.escape(module)}\b|[\"']{re.escape(module)}[\"']", code), package


@pytest.mark.slow
def test_source_distribution_holds_tests_and_no_leftovers(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"tests/test_packaging.py", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= set(names)
    kept = [name for name in names if not name.startswith("tests/regressions/")]
    assert not [name for name in kept if re.search(r"__pycache__|\.venv|\.git/|\.pyc$|\.qcow2$", name)]


@pytest.mark.slow
def test_editable_install_copies_only_the_two_startup_files(editable: Environment) -> None:
    names = {name for name in editable.files() if ".dist-info/" not in name and name != "zz_frameworks.pth"}
    assert names == {"_qcow2_forensics.pth", *STARTUP}


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["qcow2_forensics", "dfvfs_qcow2", "dissect_qcow2", "pytsk3_qcow2", "qcow2_forensics_autoload"]
)
def test_editable_install_imports_everything_from_the_checkout(editable: Environment, module: str) -> None:
    origin = editable.run(f"import importlib.util; print(importlib.util.find_spec({module!r}).origin)")
    assert Path(origin).is_relative_to(ROOT)


@both
def test_hook_runs_when_the_interpreter_starts(kind: str, request: pytest.FixtureRequest) -> None:
    environment: Environment = request.getfixturevalue(kind)
    code = "import sys; print('qcow2_forensics_autoload' in sys.modules, 'qcow2_forensics' in sys.modules)"
    assert environment.run(code) == "True False"
    assert environment.run(f"{code}; print(len(sys.meta_path))", QCOW2_FORENSICS_AUTOLOAD="0").endswith("3")


@both
@needs("volatility3")
def test_volatility_lists_our_plugins_without_options(kind: str, request: pytest.FixtureRequest) -> None:
    environment: Environment = request.getfixturevalue(kind)
    usage = environment.run("import sys; sys.argv = ['vol', '-h']; from volatility3.cli import main; main()")
    assert re.search(r"^\s+qcow2\.\w+\.\w+", usage, re.MULTILINE), usage[-2000:]
    where = environment.run("import volatility3.plugins as p; print(p.__path__[-1])")
    assert where == str(environment.site / FOLDER if kind == "installed" else ROOT / "plugins" / "volatility")


@pytest.mark.slow
@both
@needs("dfvfs")
def test_dfvfs_reads_qcow_with_our_back_end(kind: str, request: pytest.FixtureRequest) -> None:
    environment: Environment = request.getfixturevalue(kind)
    code = """
import dfvfs.resolver.resolver
from dfvfs.resolver_helpers import manager
import sys
helper = manager.ResolverHelperManager.GetHelper("QCOW")
print(sys.modules[type(helper).__module__].__file__)
"""
    folder = environment.site if kind == "installed" else ROOT / "plugins" / "dfvfs"
    assert Path(environment.run(code)).parent == folder / "dfvfs_qcow2"


@pytest.mark.slow
@both
def test_doctor_finds_every_installed_framework_active(kind: str, request: pytest.FixtureRequest) -> None:
    environment: Environment = request.getfixturevalue(kind)
    diagnosis = json.loads(execute(environment.python.parent / "qcow2-forensics", "doctor", "--format", "json"))
    assert diagnosis["healthy"], diagnosis
    assert diagnosis["hook"] == "running"
    active = {part["framework"] for part in diagnosis["frameworks"] if part["active"]}
    names = {
        "Volatility 3": "volatility3",
        "dfVFS": "dfvfs",
        "plaso": "plaso",
        "pytsk3": "pytsk3",
        "dissect": "dissect",
    }
    assert active == {label for label, name in names.items() if importlib.util.find_spec(name)}


@pytest.mark.slow
def test_doctor_finds_every_installed_library() -> None:
    import_names = {"numpy": "numpy", "cryptography": "cryptography", "zlib-ng": "zlib_ng", "lzallright": "lzallright"}
    found = {library.name: library.version for library in diagnose().libraries if library.name in import_names}
    assert found.keys() == import_names.keys()
    for name, module in import_names.items():
        assert (found[name] is not None) == (importlib.util.find_spec(module) is not None)


@pytest.mark.slow
@needs("volatility3")
def test_doctor_says_what_to_type_when_the_hook_is_off(installed: Environment) -> None:
    command = [str(installed.python.parent / "qcow2-forensics"), "doctor"]
    environment = {**os.environ, "QCOW2_FORENSICS_AUTOLOAD": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert f"vol -p {installed.site / FOLDER}" in done.stdout
    assert "switched off by QCOW2_FORENSICS_AUTOLOAD=0" in done.stdout


@pytest.mark.slow
@needs("volatility3")
@pytest.mark.parametrize("shipped_inside", [False, True])
def test_editable_volatility_keeps_working_beside_our_wheel(
    tmp_path: Path, wheel: Path, frameworks: Path, shipped_inside: bool
) -> None:
    # An editable install as setuptools makes it: a finder appended behind the path finder. The
    # counter-proof ships one file inside volatility3/, which is what our wheel must never do.
    environment = Environment(tmp_path / "venv")
    others = tmp_path / "others"
    others.mkdir()
    for entry in frameworks.iterdir():
        if not entry.name.startswith("volatility3"):
            (others / entry.name).symlink_to(entry)
    (environment.site / "editable_volatility.py").write_text(
        f"""
import sys
from importlib.util import spec_from_file_location
class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "volatility3":
            folder = {str(frameworks / "volatility3")!r}
            return spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
sys.meta_path.append(Finder)
"""
    )
    (environment.site / "__editable__.volatility3.pth").write_text("import editable_volatility\n")
    environment.install(wheel)
    environment.see_frameworks(others)
    code = "import volatility3.cli, volatility3.plugins as p; print(p.__path__[-1])"
    if shipped_inside:
        (environment.site / "volatility3" / "plugins").mkdir(parents=True)
        with pytest.raises(AssertionError, match="No module named 'volatility3.cli'"):
            environment.run(code)
    else:
        assert environment.run(code) == str(environment.site / FOLDER)


@pytest.mark.slow
def test_uninstalling_leaves_nothing_behind(tmp_path: Path, wheel: Path) -> None:
    environment = Environment(tmp_path)
    before = environment.files()
    environment.install(wheel)
    execute(sys.executable, "-m", "pip", "--python", environment.python, "uninstall", "--yes", "qcow2-forensics")
    left = {path.relative_to(environment.site).as_posix() for path in environment.site.rglob("*")}
    assert environment.files() == before
    assert not [name for name in left if "qcow2" in name]


def test_readme_and_ci_carry_the_same_test_command() -> None:
    assert TEST_COMMAND in (ROOT / "README.md").read_text().splitlines()
    ci = ROOT / ".ci" / "run"
    if ci.exists():
        lines = ci.read_text().splitlines()
        assert lines.index(TEST_COMMAND) < lines.index(f"{PYTEST} -m slow")


# Commands of every Debian system, by the packages util-linux, mount, coreutils and e2fsprogs, and of packages that
# .ci/run names by another command of theirs.
_ALWAYS_THERE = {"losetup", "mount", "mkswap", "blkid"}
_SAME_PACKAGE = {
    "e2fsck": "mke2fs",
    "ewfacquirestream": "ewfacquire",
    "fusermount": "fusermount3",
    "lvcreate": "pvcreate",
    "lvs": "pvcreate",
    "mactime": "fls",
    "mkfs.ext2": "mke2fs",
    "mkfs.ext4": "mke2fs",
    "mkfs.fat": "mkfs.vfat",
    "ntfs-3g": "mkntfs",
    "ntfscp": "mkntfs",
    "ntfsinfo": "mkntfs",
    "vgcreate": "pvcreate",
}


def test_ci_installs_every_tool_that_a_test_asks_for() -> None:
    """A machine that has them already hides a missing install step."""
    if not (ROOT / ".ci" / "run").exists():
        pytest.skip("the source distribution has no .ci/run")
    listed = {item.partition(":")[0] for item in re.findall(r"\S+:\S+", (ROOT / ".ci" / "run").read_text())}
    makers = {command[0] for command in guest_disks.MAKERS.values()}
    asked = {*makers, *filesystems.TOOLS.values(), *filesystems.HELPERS.values()}
    for file in (ROOT / "tests").glob("*.py"):
        for call in re.findall(r"(?:need_tools|\bneed|which)\(([^()]*)\)", file.read_text()):
            asked.update(re.findall(r'"([\w.-]+)"', call))
    needed = {_SAME_PACKAGE.get(tool, tool) for tool in asked - _ALWAYS_THERE}
    assert len(needed) > 20
    assert needed - listed - {"nbdkit"} == set()  # which .ci/run asks for its plug-in
