"""docs/architecture.md against the tree: each name on the page exists, and each package is on the page, in its layer."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/qcow2_forensics"
PAGE = (ROOT / "docs/architecture.md").read_text()
NOT_LAYERS = {"__init__", "__main__", "data"}  # the names of the package, the command, and scripts for the user
LONG = 400  # lines
# Modules of one name in several packages, since they are about the same thing: what that is.
SHARED_NAMES = {
    "account": "the account of every byte: made, turned into findings, shown",
    "audit": "a report, on the command line and in Volatility",
    "changes": "what changed between two states: files, or what plug-ins list of a memory",
    "content": "what bytes look like: a run of residue, or the start of a disk",
    "data_file": "an external data file: its account, and its residue",
    "header": "the header: what it says, and what is wrong with it",
    "hidden": "bytes of mapped clusters that no state shows: found, and reported",
    "image": "an image: its metadata, and pytsk3's own class of that name",
    "index_cache": "the index of a memory stream as bytes: written, and kept",
    "info": "what an image is, on the command line and in Volatility",
    "lines": "lines as The Sleuth Kit prints them; the plug-in passes the core's on",
    "lost_tables": "tables whose content is gone: reported, and put together again",
    "model": "the plain records of a package",
    "notes": "what the library notes while it works: taken, and printed",
    "opening": "images become disks; path specifications do",
    "options": "what a user may choose",
    "output": "where output goes: a file, or a folder of residue",
    "refcounts": "refcounts: as they are on disk, and through a table found by its form",
    "references": "names of other files in an image: parsed, resolved, reported",
    "scan": "a walk through everything that may hold a hit: free clusters, memories",
    "slack": "bytes after the header and after tables: found, and reported",
    "snapshots": "the snapshot table, on the command line and in Volatility",
    "streams": "compressed clusters: what their streams take, and what is left between",
    "vm_states": "VM states: of snapshots, and those that no snapshot has",
    "volumes": "the volumes of a guest's disk: their files, and where they count from",
}
REASON = re.compile("Longer than other modules: |More than 400 lines because ")


def sources() -> list[Path]:
    """Every module of the core and of the adapters."""
    return [*PACKAGE.rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]


def layers() -> list[tuple[list[str], str]]:
    """The rows of the table of layers: the packages of each, and what it says of them."""
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", PAGE, re.MULTILINE)
    return [(re.findall(r"`(\w+)`", names), what) for names, what in rows]


def modules(folder: Path) -> set[str]:
    """The modules and packages in a folder."""
    return {place.stem for place in folder.iterdir() if place.suffix == ".py" or (place / "__init__.py").exists()}


def test_every_package_has_its_layer_on_the_page() -> None:
    named = [name for names, _ in layers() for name in names]
    assert sorted(named) == sorted(modules(PACKAGE) - NOT_LAYERS)


def test_the_layers_of_the_page_are_those_of_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (enforced,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    rank = {name: number for number, layer in enumerate(enforced) for name in layer.split(" | ")}
    shown = [rank[name] for names, _ in layers() for name in sorted(names, key=rank.__getitem__)]
    assert shown == sorted(shown)


def test_what_the_page_names_in_a_layer_is_in_it() -> None:
    for packages, what in layers():
        held = "\n".join(path.read_text() for name in packages for path in (PACKAGE / name).rglob("*.py"))
        found = {module for name in packages if (PACKAGE / name).is_dir() for module in modules(PACKAGE / name)}
        for name in re.findall(r"`(\w+)`", what):
            assert name in found or f"class {name}" in held, f"{name} is not in {packages}"


def paths() -> Iterator[str]:
    """What the page names as a place in the tree."""
    tree = next(block for block in re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) if "src/" in block)
    for line in tree.splitlines():
        yield from re.split(r"\s{2,}", line)[:-1]  # the last column says what they are
    yield from re.findall(r"`((?:[a-z]+/)+[\w.]*)`", PAGE)


@pytest.mark.parametrize("name", sorted(set(paths())))
def test_places_named_on_the_page_exist(name: str) -> None:
    roots = (ROOT, PACKAGE)
    assert any((root / f"{name}{suffix}").exists() for root in roots for suffix in ("", ".py")), name


def test_every_adapter_is_on_the_page() -> None:
    adapters = {place.name for place in (ROOT / "plugins").iterdir() if place.is_dir() and place.name[0] not in "._"}
    assert adapters <= {name.split("/")[1] for name in paths() if name.startswith("plugins/")}


def test_a_long_module_gives_its_reason() -> None:
    silent = []
    for path in sources():
        text = path.read_text()
        if len(text.splitlines()) > LONG and not REASON.search(ast.get_docstring(ast.parse(text)) or ""):
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []


def test_modules_share_a_name_only_where_they_are_about_the_same_thing() -> None:
    count = Counter(path.stem for path in sources() if not path.stem.startswith("_"))
    assert {name for name, times in count.items() if times > 1} == SHARED_NAMES.keys()


def test_no_two_classes_share_a_name() -> None:
    count: Counter[str] = Counter()
    for path in sources():
        found = (node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))
        count.update(name for name in found if not name.startswith("_"))
    assert [name for name, times in count.items() if times > 1] == []
