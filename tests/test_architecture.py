"""docs/architecture.md against the tree: each name on the page exists, and each package is on the page, in its layer."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/qcow2_forensics"
PAGE = (ROOT / "docs/architecture.md").read_text()
NOT_LAYERS = {"__init__", "__main__", "data"}  # the names of the package, the command, and scripts for the user
LONG = 400  # lines
REASON = re.compile("Longer than other modules: |More than 400 lines because ")


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
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        text = path.read_text()
        if len(text.splitlines()) > LONG and not REASON.search(ast.get_docstring(ast.parse(text)) or ""):
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []
