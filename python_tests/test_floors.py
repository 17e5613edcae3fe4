"""Imports run downward only, so that a part can be read, tested and changed without those above it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mas_ext

PACKAGE = Path(mas_ext.__file__).parent

# From the roof down. A part may import those of lower floors, never one of its own floor or above.
FLOORS = [
    {"cli", "comparison", "integrations"},
    {"trainer"},
    {"training"},
    {"methods", "compat", "task_free"},
    {"penalty", "distillation", "replay"},
    {"optim"},
    {"importance", "state"},
    {"parameters", "info"},
    {"kernels"},
    {"_C"},
]
FLOOR = {part: number for number, floor in enumerate(FLOORS) for part in floor}
# Beside all floors: they know nothing of the house, and one another only from left to right.
LEAVES = ["scenarios", "models", "metrics", "failures", "_arguments"]
# The command line is the door to what it starts.
DOOR = ("cli", "comparison")


def imports(file: Path) -> Iterator[list[str]]:
    """Everything that a file imports, anywhere in it, as the parts of a dotted name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write out relative imports"
            assert node.module
            yield from ([*node.module.split("."), alias.name] for alias in node.names)


def part_of(file: Path) -> str:
    """The first name below mas_ext."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def edges() -> Iterator[tuple[str, str, Path]]:
    """A part of the package, another one that it imports, and the file that does."""
    for file in PACKAGE.rglob("*.py"):
        for name in imports(file):
            imported = [*name, "__init__"][1]
            if part_of(file) != "__init__" and name[0] == "mas_ext" and imported != part_of(file):
                yield part_of(file), imported, file


def test_imports_run_downward() -> None:
    found = list(edges())
    assert ("kernels", "_C") in {edge[:2] for edge in found}
    for part, imported, file in found:
        below = f"{file} imports {imported}, which is not below it"
        if part in LEAVES:
            assert imported in LEAVES[LEAVES.index(part) :], below
        elif imported not in LEAVES and (part, imported) != DOOR:
            assert FLOOR[imported] > FLOOR[part], below


def test_the_top_is_what_users_import() -> None:
    modules = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__", "_arguments"}
    assert len(modules) <= 10, modules


@pytest.mark.parametrize(
    "folder", sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__")
)
def test_folders_have_no_circles(folder: str) -> None:
    graph: dict[str, set[str]] = {}
    for file in (PACKAGE / folder).rglob("*.py"):
        own = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        graph[own] = {
            ".".join(name[:k]) for name in imports(file) for k in range(3, len(name) + 1)
        } - {own}
    TopologicalSorter({own: used & graph.keys() for own, used in graph.items()}).prepare()


def test_only_the_kernels_touch_the_extension() -> None:
    assert {part for part, imported, _ in edges() if imported == "_C"} == {"kernels"}


def test_leaves_import_only_what_reads_tensors_and_data() -> None:
    allowed = {"torch", "numpy", "safetensors", "mas_ext", *sys.stdlib_module_names}
    for file in PACKAGE.rglob("*.py"):
        if part_of(file) in LEAVES:
            assert {name[0] for name in imports(file)} <= allowed, file
