"""The layers of the package: nothing imports from what is above it."""

import ast
from pathlib import Path

import pytest

import fastadv

PACKAGE = Path(fastadv.__file__).parent
# From the lowest to the highest; the parts of one row do not import each other.
LAYERS = (
    ("_warnings",),
    ("_extras", "_renamed", "devices", "files", "names", "units", "version", "_build"),
    ("locks", "ops", "preprocessing", "team"),
    ("functional", "installation"),
    ("data", "nn"),
    ("attacks", "models"),
    ("evaluation",),
    ("report", "training"),
    ("study",),
    ("commands",),
    ("cli",),
    ("__main__",),
)


def imports(path):
    """(line, part of the package) of each import of fastadv in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastadv":
            parts = node.module.split(".")
            yield from ((node.lineno, part) for part in (parts[1:2] or [alias.name for alias in node.names]))
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name.split(".")[1]) for a in node.names if a.name.startswith("fastadv."))


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


def test_every_part_of_the_package_is_in_a_layer():
    assert {part_of(path) for path in FILES} - {"_build"} == {name for layer in LAYERS for name in layer} - {"_build"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_file_imports_from_lower_layers_only(path):
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    mine = part_of(path)
    wrong = [(line, part) for line, part in imports(path) if part != mine and not height[part] < height[mine]]
    assert not wrong
